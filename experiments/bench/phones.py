"""A gateway with hundreds of phones that vanish: do its rounds end in time, does its memory grow?

    python -m experiments.bench.phones --json FILE

The gateway is a process of its own, as `corolla gateway` starts it, asked over its socket as a
SuperNode's ClientApp would. Phones are threads of this process that run client/phone/session.py
over TLS on loopback, each with a connection of its own; what they "train" is an array, made
without torch. In every round each phone that gets a task vanishes with the given probability: no
word to the gateway, its connection closed, back with the next round. README.md says how to read
the table.
"""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from corolla.client.phone.session import Phone, Settings
from corolla.config.run import RunConfig
from corolla.errors import StoppedError
from corolla.host import certificates
from corolla.phones import protocol
from corolla.proto import update_pb2
from corolla.server.gateway.daemon import GatewayOrder
from corolla.server.gateway.settings import GatewaySettings
from corolla.wire import messages, rpc
from corolla.wire.messages import Kind, Task
from corolla.wire.packet import Packet

TOKEN = "a-token-of-the-bench-0123456789"
RUN = "b" * 32


@dataclass(frozen=True)
class Options:
    """How large everything is. The fields are the options of the command."""

    phones: int = field(default=500, metadata={"help": "that check in"})
    rounds: int = field(default=50, metadata={"help": "tasks of the gateway, one after another"})
    seats: int = field(default=350, metadata={"help": "updates asked for in a round"})
    vanish: float = field(default=0.2, metadata={"help": "probability, per phone and round"})
    deadline: float = field(default=30.0, metadata={"help": "seconds the server gives a round"})
    width: int = field(default=256, metadata={"help": "inputs and outputs of the 4 modules"})
    rank: int = field(default=8, metadata={"help": "of the adapter"})


@dataclass(frozen=True)
class Round:
    """What was seen of one: seconds until the reply, updates in it, the gateway's memory after."""

    seconds: float
    updates: int
    vanished: int
    error: str
    rss: int


def run(options: Options, told: Callable[[int, Round], None] = lambda n, r: None) -> list[Round]:
    """All rounds; `told` hears of each."""
    with tempfile.TemporaryDirectory(prefix="corolla-phones-") as scratch:
        folder = Path(scratch)
        certificates.make(folder / "certs", ["localhost"], ["localhost"])
        (folder / "tokens").write_text(TOKEN + "\n")
        with _gateway(folder) as (process, socket, address):
            memory = psutil.Process(process.pid)
            with _phones(folder, address, options) as vanishing:
                done = []
                for number in range(1, options.rounds + 1):
                    vanishing.number = number
                    done.append(_round(options, number, socket, memory, vanishing))
                    told(number, done[-1])
                return done


def _round(
    options: Options,
    number: int,
    socket: Path,
    memory: psutil.Process,
    vanishing: "_Vanishing",
) -> Round:
    began = time.monotonic()
    packet = rpc.ask_trainer(
        socket, messages.pack_task(_task(options, number)), 2 * options.deadline
    )
    seconds = time.monotonic() - began
    reply = messages.unpack_reply(packet, len(packet.payload))
    gone = len([entry for entry in vanishing.gone if entry[1] == number])
    return Round(seconds, reply.clients, gone, reply.error, memory.memory_info().rss)


def _task(options: Options, number: int) -> Task:
    """FedAvg over four modules; the global adapter travels to every phone."""
    config = RunConfig(strategy="fedavg", rank=options.rank, deadline=options.deadline)
    settings = {
        "lora": {"rank": options.rank, "alpha": 16.0, "rslora": False},
        "class": "",
        "population": options.phones,
        "accepted": 0,
        "fresh": {"adapter": {n: ("float32", s) for n, s in _shapes(options).items()}},
        "run": config.model_dump(mode="json"),
    }
    return Task(
        *(RUN, number, f"{number:064d}", Kind.TRAIN, json.dumps(settings)),
        payload=_adapter(options, 0.0),
        seats=options.seats,
    )


def _shapes(options: Options) -> Mapping[str, list[int]]:
    into = {f"m{i}.lora_A": [options.rank, options.width] for i in range(4)}
    return {**into, **{f"m{i}.lora_B": [options.width, options.rank] for i in range(4)}}


def _adapter(options: Options, value: float) -> bytes:
    """A payload of one group whose values are all alike, by numpy alone."""
    head: dict[str, Any] = {"__metadata__": {"groups": json.dumps(["adapter"])}}
    at, parts = 0, []
    for name, shape in sorted(_shapes(options).items()):
        parts.append(np.full(shape, value, dtype="<f4").tobytes())
        place = [at, at + len(parts[-1])]
        head[f"adapter/{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": place}
        at = place[1]
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


class _Gone(Exception):  # noqa: N818 - it is no error that a phone vanishes
    """A phone's process ends in the midst of its work."""


@dataclass
class _Vanishing:
    """Who leaves in which round: a hash decides, so that every run is the same."""

    probability: float
    number: int = 0
    gone: set[tuple[str, int]] = field(default_factory=set)

    def strikes(self, device: str, round: int) -> bool:
        draw = hashlib.sha256(f"{device}/{round}".encode()).digest()[:4]
        if int.from_bytes(draw, "little") >= self.probability * 2**32:
            return False
        self.gone.add((device, round))
        return True


@dataclass
class _Trainer:
    """A PhoneTrainer that trains nothing."""

    device: str
    options: Options
    vanishing: _Vanishing

    def examples(self) -> int:
        return 80

    def missing(self, run_id: str, groups: Mapping[str, str]) -> Sequence[str]:
        return list(groups)

    def answer(
        self, client: str, packet: Packet, model: Path | None, wanted: Callable[[], bool]
    ) -> Packet:
        task = protocol.read_task(packet.header)
        if self.vanishing.strikes(self.device, task.round):
            raise _Gone
        payload = _adapter(self.options, 1e-3 * (int(self.device[1:]) + 1))
        head = update_pb2.Reply(
            schema=task.schema,
            run_id=task.run_id,
            round=task.round,
            base_version=task.base_version,
            kind=task.kind,
            client=client,
            num_examples=80,
            metrics={"train_loss": 1.0},
            payload_bytes=len(payload),
            payload_sha256=protocol.sha256(payload),
        )
        return Packet(head.SerializeToString(), payload)


@contextmanager
def _phones(folder: Path, address: str, options: Options) -> Iterator[_Vanishing]:
    stop, vanishing = threading.Event(), _Vanishing(options.vanish)
    threads = [
        threading.Thread(
            target=_serve, args=(folder, address, f"p{i}", options, vanishing, stop), daemon=True
        )
        for i in range(options.phones)
    ]
    threading.stack_size(512 << 10)
    for thread in threads:
        thread.start()
    try:
        yield vanishing
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        threading.stack_size(0)


def _serve(
    folder: Path,
    address: str,
    device: str,
    options: Options,
    vanishing: _Vanishing,
    stop: threading.Event,
) -> None:
    """One phone's life: whenever it has vanished it begins anew, with the next round."""
    settings = Settings(device, TOKEN, folder / "phones" / device)
    while not stop.is_set():
        with (
            contextlib.suppress(StoppedError, _Gone),
            rpc.tls_channel(
                address, folder / "certs" / "ca.pem", most_bytes=protocol.MAX_MESSAGE
            ) as channel,
        ):
            Phone(settings, channel, _Trainer(device, options, vanishing), stop).run()
        left = vanishing.number
        while vanishing.number == left and not stop.wait(0.5):
            pass


@contextmanager
def _gateway(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path, str]]:
    """(its process, its socket, where it listens)."""
    order = GatewayOrder(
        GatewaySettings("gate", folder / "gate", retry=1.0, lease=10.0),
        "localhost:0",
        folder / "certs" / "gateway.pem",
        folder / "certs" / "gateway.key",
        folder / "tokens",
    )
    (folder / "gate").mkdir()
    with rpc.private_socket(folder / "gate") as socket:
        process = subprocess.Popen(
            [sys.executable, "-m", "corolla.server.gateway.daemon", str(socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps(order.to_json()).encode() + b"\n")
            process.stdin.flush()
            ready = json.loads(process.stdout.readline() or b"{}")
            yield process, socket, str(ready["phones"])
        finally:
            process.kill()
            process.communicate()


def table(options: Options, rounds: Sequence[Round]) -> str:
    """What counts, as Markdown."""
    seconds, full = [r.seconds for r in rounds], [r for r in rounds if r.updates == options.seats]
    due = options.deadline
    early, late = rounds[len(rounds) // 5], rounds[-1]
    lines = [
        (
            "rounds answered by the server's deadline",
            f"{sum(s <= due for s in seconds)} of {len(rounds)}",
        ),
        ("rounds with all the updates asked for", f"{len(full)} of {len(rounds)}"),
        ("updates of a round, fewest", f"{min(r.updates for r in rounds)} of {options.seats}"),
        (
            "phones that vanished in a round, mean",
            f"{statistics.mean(r.vanished for r in rounds):.0f}",
        ),
        ("seconds of a round, median", f"{statistics.median(seconds):.1f}"),
        ("seconds of a round, longest", f"{max(seconds):.1f}"),
        (f"gateway's memory after round {len(rounds) // 5 + 1}", f"{early.rss / 1e6:.0f} MB"),
        (f"gateway's memory after round {len(rounds)}", f"{late.rss / 1e6:.0f} MB"),
        ("gateway's memory, most", f"{max(r.rss for r in rounds) / 1e6:.0f} MB"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for one in fields(Options):
        kind = type(one.default)
        text = f"{one.metadata['help']} ({one.default})"
        parser.add_argument(f"--{one.name}", type=kind, default=one.default, help=text)
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    given = vars(parser.parse_args(arguments))
    path = given.pop("json")
    options = Options(**given)

    def told(number: int, done: Round) -> None:
        print(
            f"round {number}: {done.updates} updates in {done.seconds:.1f} s, {done.vanished} "
            f"vanished, gateway {done.rss / 1e6:.0f} MB {done.error}",
            file=sys.stderr,
        )

    rounds = run(options, told)
    print(table(options, rounds))
    if path:
        facts = {"options": asdict(options), "cores": os.cpu_count()}
        path.write_text(json.dumps({**facts, "rounds": [asdict(r) for r in rounds]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
