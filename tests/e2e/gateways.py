"""A real `corolla gateway` for tests, and its phones: one a process, the others threads."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from corolla.client.device import settings as own
from corolla.client.phone.session import Phone, Settings
from corolla.client.phone.trainer import TorchTrainer
from corolla.errors import StoppedError
from corolla.host import certificates
from corolla.host.processes import free_port
from corolla.phones import protocol
from corolla.wire import rpc
from corolla.wire.packet import Packet
from tests.e2e.federation import Server, register, running
from tests.e2e.forked import Commands

TOKEN = "a-token-of-the-tests-0123456789"
ABLE = "--charging --unmetered --idle"


@dataclass
class Gateway:
    """Where phones find it, what they must show, and its words."""

    address: str
    ca: Path
    token: Path
    log: Path
    state: Path
    commands: Commands | None = None
    """Starts its phones; None: cold."""


@contextmanager
def running_gateway(
    folder: Path, server: Server, name: str, seats: int = 0, options: str = ""
) -> Iterator[Gateway]:
    """`corolla gateway`, its state in folder/state-NAME; its key is registered with the server."""
    state, log, tls = folder / f"state-{name}", folder / f"{name}.log", folder / f"certs-{name}"
    certificates.make(tls, [], ["localhost"])
    token = folder / f"token-{name}"
    token.write_text(TOKEN + "\n")
    address = f"localhost:{free_port()}"
    command = ["gateway", "--server", server.address, "--root-certificates", str(server.ca)]
    command += ["--listen", address, "--name", name, "--state", str(state), "--tokens", str(token)]
    command += ["--certificate", str(tls / "gateway.pem"), "--key", str(tls / "gateway.key")]
    command += ["--seats", str(seats), "--retry", "1", "--lease", "30", *options.split()]
    with running(command, log, server.commands) as process:
        register(state, server.keys / f"{name}.pub", process, log)
        yield Gateway(address, tls / "ca.pem", token, log, state, server.commands)


@contextmanager
def running_phones(
    folder: Path, gateway: Gateway, data: Mapping[str, Path]
) -> Iterator[Mapping[str, Path]]:
    """Phones (device → file of its rows): the first a `corolla phone`, the others threads of this
    process, one of which trains at a time. Yields the log of the first."""
    first, *others = data
    log, training = folder / f"phone-{first}.log", threading.Lock()
    with ExitStack() as stack:
        command = phone_command(folder, gateway, first, data[first])
        stack.enter_context(running(command, log, gateway.commands))
        stop = threading.Event()
        threads = []
        for device in others:
            channel = stack.enter_context(
                rpc.tls_channel(gateway.address, gateway.ca, most_bytes=protocol.MAX_MESSAGE)
            )
            mine = own.load(
                None,
                {
                    "server": gateway.address,
                    "data": str(data[device]),
                    "state": folder / f"phone-{device}",
                    "threads": 1,
                },
            )
            trainer = InTurn(TorchTrainer(mine), training)
            settings = Settings(device, TOKEN, mine.state, pauses=(0.2, 2.0))
            phone = Phone(settings, channel, trainer, stop)
            threads.append(threading.Thread(target=_serve, args=(phone,)))
        for thread in threads:
            thread.start()
        try:
            yield {first: log}
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def phone_command(folder: Path, gateway: Gateway, device: str, data: Path) -> list[str]:
    """`corolla phone` of a device that is charging, idle and on an unmetered network."""
    command = ["phone", "--gateway", gateway.address, "--root-certificates", str(gateway.ca)]
    command += ["--token-file", str(gateway.token), "--data", str(data), "--name", device]
    command += ["--state", str(folder / f"phone-{device}"), "--model", "embedded"]
    return [*command, "--threads", "1", *ABLE.split()]


@dataclass
class InTurn:
    """A trainer of one phone among several in this process."""

    trainer: TorchTrainer
    lock: threading.Lock

    def examples(self) -> int:
        return self.trainer.examples()

    def missing(self, run_id: str, groups: Mapping[str, str]) -> Sequence[str]:
        with self.lock:
            return self.trainer.missing(run_id, groups)

    def answer(
        self, client: str, packet: Packet, model: Path | None, wanted: Callable[[], bool]
    ) -> Packet:
        with self.lock:
            return self.trainer.answer(client, packet, model, wanted)


def wait_for(true: Callable[[], object], seconds: float, log: Path) -> None:
    """Until something is true; the log says why it is not."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _serve(phone: Phone) -> None:
    try:
        phone.run()
    except StoppedError:
        return
