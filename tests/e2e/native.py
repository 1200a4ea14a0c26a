"""Real `corolla-phone` processes for tests, and a simulation that takes what they sent."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from corolla.commands.simulate.in_process import InProcess
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.encoding import Encoder
from corolla.models import pretrained
from corolla.proto import update_pb2
from corolla.wire.messages import Reply, pack_reply, unpack_reply, unpack_task
from corolla.wire.packet import Packet
from tests.e2e.gateways import Gateway


@dataclass
class Phone:
    """A native client that is running."""

    process: subprocess.Popen[bytes]
    state: Path
    log: Path

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def rounds(self) -> list[dict[str, object]]:
        """What it noted of each round."""
        return [json.loads(line) for line in (self.state / "log.jsonl").read_text().splitlines()]

    def kept(self, round: int) -> Packet:
        """The reply it sent in a round."""
        path = self.state / "updates" / f"round-{round:03d}"
        return Packet(
            path.with_suffix(".header").read_bytes(), path.with_suffix(".payload").read_bytes()
        )


def write_tokens(config: RunConfig, clients: Mapping[str, Path]) -> None:
    """The sequences that clients of a simulation train on, as files of native clients."""
    federation = federated.load(config)
    encoder = Encoder(pretrained.load(config).tokenizer, federation.labels, config.max_length)
    for client, path in clients.items():
        lines = []
        for number, example in enumerate(federation.clients[client].train):
            for own in encoder(example):
                line = {"input_ids": own.input_ids, "labels": own.labels, "example": number}
                lines.append(json.dumps(line) + "\n")
        path.write_text("".join(lines))


def command(
    build: Path, folder: Path, gateway: Gateway, publisher: Path, device: str, tokens: Path
) -> list[str]:
    """`corolla-phone` of a device that says it is charging, idle and on an unmetered network."""
    script = folder / f"{device}.script"
    script.write_text('{"after": 0, "charging": true, "idle": true, "metered": false}\n')
    return [
        *(str(build / "corolla-phone"), "--gateway", gateway.address, "--name", device),
        *("--root-certificates", str(gateway.ca), "--token-file", str(gateway.token)),
        *("--publisher", str(publisher), "--data", str(tokens)),
        *("--state", str(folder / f"native-{device}"), "--platform", f"script:{script}"),
        "--keep-updates",
    ]


@contextmanager
def running_natives(
    folder: Path, commands: Mapping[str, Sequence[str]]
) -> Iterator[Mapping[str, Phone]]:
    """Native clients by device; told to stop at the end, by their ids."""
    with ExitStack() as stack:
        phones = {device: _start(folder, device, told) for device, told in commands.items()}
        for phone in phones.values():
            stack.callback(_end, phone.process)
        yield phones


def _start(folder: Path, device: str, told: Sequence[str]) -> Phone:
    log = folder / f"native-{device}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            told, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ
        )
    return Phone(process, folder / f"native-{device}", log)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


@dataclass(frozen=True)
class Recorded(InProcess):
    """A simulation in which some clients answer what native clients sent to a real server."""

    sent: Mapping[tuple[str, int], Packet] = field(default_factory=dict)
    """(client, round) → the reply, of another run."""

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client, packet in packets.items():
            task = unpack_task(packet)
            found = self.sent.get((client, task.round))
            yield client, self.worker(client, packet) if found is None else answer(packet, found)


def answer(packet: Packet, sent: Packet) -> Packet:
    """The reply of another run as one to this task: the same numbers, other names of the run."""
    task = unpack_task(packet)
    found = unpack_reply(sent, 1 << 30)
    blank = Reply(task.run_id, task.round, task.base_version, task.kind, found.client)
    own = {name: getattr(found, name) for name in ("num_examples", "metrics", "payload", "scalars")}
    return pack_reply(Reply(**{**vars(blank), **own}))


def version(sent: Packet) -> str:
    """The version of the server's state that a reply is based on."""
    head = update_pb2.Reply()
    head.ParseFromString(sent.header)
    return head.base_version
