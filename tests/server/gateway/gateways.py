"""A gateway with its phones on loopback, over TLS: what tests of both share."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import grpc

from corolla import seeds
from corolla.client.phone.session import Phone
from corolla.client.phone.session import Settings as PhoneSettings
from corolla.client.training.worker import Worker
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data.federated import FederatedData
from corolla.directions import seedlog
from corolla.errors import StoppedError
from corolla.host import certificates as certs
from corolla.phones import bundle, protocol
from corolla.server.gateway.access import TokenFile
from corolla.server.gateway.gateway import Gateway
from corolla.server.gateway.service import serve_phones
from corolla.server.gateway.settings import GatewaySettings
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Federation, Held
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, run_round
from corolla.storage.memory import Memory
from corolla.types import Params, Payload
from corolla.wire import messages, rpc
from corolla.wire.messages import Kind, Task
from corolla.wire.packet import Packet
from tests.strategies import tiny

TOKEN = "0123456789abcdef-shared-by-all"
OTHER = "fedcba9876543210-of-p9-alone"


@cache
def certificates(folder: Path) -> Path:
    """ca.pem, gateway.pem and gateway.key."""
    certs.make(folder, ["localhost"], ["localhost"])
    return folder


def tokens(folder: Path) -> Path:
    """A file of tokens: one of any device, one of p9."""
    path = folder / "tokens"
    path.write_text(f"# of a test\n{TOKEN}\n{OTHER} p9\n")
    return path


@dataclass
class Clock:
    """Seconds that stand still until a test goes on to later ones."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class World:
    """A gateway that serves, and what its phones need to find it."""

    gateway: Gateway
    address: str
    folder: Path
    server: rpc.TlsServer
    clock: "Clock | None" = None

    def later(self, seconds: float) -> None:
        """Time goes on, and who waits for it looks at the clock."""
        assert self.clock, "this gateway's clock is the machine's"
        self.clock.now += seconds
        self.look()

    def end_round(self) -> None:
        """Time goes on to the deadline of the task in progress, if there is one."""
        job = self.gateway.rounds.job
        if self.clock and job:
            self.later(max(0.0, job.round.deadline - self.clock.now))

    def look(self) -> None:
        """Who waits for a change of the round looks again."""
        with self.gateway.rounds.changed:
            self.gateway.rounds.changed.notify_all()

    def channel(self, address: str = "") -> grpc.Channel:
        ca = self.folder / "certs" / "ca.pem"
        return rpc.tls_channel(address or self.address, ca, most_bytes=protocol.MAX_MESSAGE)


@contextmanager
def serving(
    folder: Path, clock: Callable[[], float] = time.monotonic, **changes: Any
) -> Iterator[World]:
    """A gateway called "gate" that phones reach over TLS; impatient, as tests are.

    Its clock is the machine's unless another is given.
    """
    own = certificates(folder / "certs") if not (folder / "certs").exists() else folder / "certs"
    usual: dict[str, Any] = {"retry": 0.05, "lease": 5.0}
    settings = GatewaySettings("gate", folder / "gate", **{**usual, **changes})
    known = TokenFile(tokens(folder))
    gateway = Gateway(settings, clock=clock, names=known.names)
    server = serve_phones(gateway, known, "localhost:0", own / "gateway.pem", own / "gateway.key")
    try:
        yield World(
            gateway,
            f"localhost:{server.port}",
            folder,
            server,
            clock if isinstance(clock, Clock) else None,
        )
    finally:
        server.stop()


@dataclass
class Shared:
    """Trains for all phones of a test: one model, one at a time, a memory for each phone."""

    config: RunConfig
    data: FederatedData
    folder: Path
    before: Callable[[str], None] = lambda client: None
    lock: threading.Lock = field(default_factory=threading.Lock)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = tiny.lora_model("llama")

    def of(self, phone: str) -> "Own":
        return Own(self, phone)


@dataclass
class Own:
    """One phone's PhoneTrainer."""

    shared: Shared
    phone: str

    @property
    def memory(self) -> Memory:
        return Memory(self.shared.folder / self.phone)

    def examples(self) -> int:
        return len(self.shared.data.clients[self.phone].train)

    def missing(self, run_id: str, groups: Mapping[str, str]) -> Sequence[str]:
        return self.memory.missing(groups)

    def answer(
        self, client: str, packet: Packet, model: Path | None, wanted: Callable[[], bool]
    ) -> Packet:
        assert client == self.phone
        self.shared.before(client)
        with self.shared.lock:
            self.shared.asked.append(client)
            worker = Worker(self.shared.config, self.shared.model, self.shared.data, self.memory)
            return worker(client, packet)


@contextmanager
def phones(
    world: World, trainers: Mapping[str, Any], conditions: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Phone]]:
    """Phones (device → trainer) that serve in threads of their own until the end."""
    able = {"charging": True, "idle": True, **(conditions or {})}
    with ExitStack() as stack:
        stop, found, threads = threading.Event(), {}, []
        for device, trainer in trainers.items():
            settings = PhoneSettings(
                device,
                TOKEN,
                world.folder / "phones" / device,
                conditions=lambda: able,
                pauses=(0.05, 0.5),
            )
            channel = stack.enter_context(world.channel())
            found[device] = Phone(settings, channel, trainer, stop)
            threads.append(threading.Thread(target=served, args=(found[device],)))
        for thread in threads:
            thread.start()
        try:
            yield found
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def served(phone: Phone) -> None:
    """Until it is stopped."""
    with suppress(StoppedError):
        phone.run()


def renamed(prefix: str) -> FederatedData:
    """The tiny federation with clients `<prefix>a`, …"""
    found = tiny.data("llama")
    clients = {prefix + name: split for name, split in found.clients.items()}
    return FederatedData(found.name, clients, found.heldout, found.labels, found.fingerprint)


@dataclass
class Behind(Network):
    """A network of one member: the gateway of `world`."""

    world: World
    waits: float = 0.0

    def clients(self) -> Mapping[str, int]:
        return {"gate": 1}

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for member, packet in packets.items():
            yield member, self.world.gateway.answer(packet)


@dataclass
class Flat(Network):
    """The same clients in this process, without a gateway."""

    worker: Worker
    data: FederatedData

    def clients(self) -> Mapping[str, int]:
        return {client: len(split.train) for client, split in self.data.clients.items()}

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client, packet in packets.items():
            yield client, self.worker(client, packet)


@dataclass
class Course:
    """Rounds of a federation: the state after each."""

    federation: Federation
    network: Network
    state: Payload
    held: Held = field(default_factory=dict)
    done: list[RoundResult] = field(default_factory=list)

    def step(self) -> RoundResult:
        number = len(self.done) + 1
        result = run_round(RoundCall(self.federation, self.state, self.held, number), self.network)
        self.state, self.held = result.state, result.held
        self.done.append(result)
        return result


def course(config: RunConfig, network: Network, seats: Mapping[str, int]) -> Course:
    """A federation of tiny models before its first round."""
    model = tiny.lora_model("llama")
    strategy = build_strategy(config)
    first = strategy.init(model.init(config.lora, seeds.derive(config.seed, "init")), config.seed)
    origin = seedlog.origin(model.base.fingerprint, first)
    federation = Federation(
        "0" * 32,
        config,
        strategy,
        network.clients(),
        cache(lambda spec: model.init(spec, 0)),
        origin,
        seats=seats,
    )
    return Course(federation, network, first)


PLANNED = {"grad": 300, "loss": 200, "q4": 50}
"""Megabytes that the programs of `a_bundle` need for 64 tokens; for fewer in proportion."""


def a_bundle(folder: Path, adapter: Params, model_sha256: str = "ab" * 32) -> bundle.Manifest:
    """A signed bundle whose programs are a few bytes that nobody runs, and publisher.pub in it."""
    folder.mkdir(parents=True)
    contents = {name: name.encode() for name in ("fp32.pte", "base.ptd", "q4.pte")}
    for name, data in contents.items():
        (folder / name).write_bytes(data)

    def method(file: str, megabytes: int) -> bundle.Method:
        planned = {tokens: megabytes * tokens * 10**6 // 64 for tokens in (16, 32, 64)}
        return bundle.Method(file=file, planned=planned)

    both = {kind: method("fp32.pte", PLANNED[kind]) for kind in ("loss", "grad")}
    small = {"loss": method("q4.pte", PLANNED["q4"])}
    made = bundle.Manifest(
        model="tiny",
        model_sha256=model_sha256,
        executorch="1.5.1",
        executorch_min="1.5.0",
        rank=max(t.shape[0] for name, t in adapter.items() if name.endswith(".lora_A")),
        targets=("q_proj",),
        vocab=64,
        length=64,
        tokenizer=bundle.Tokenizer(files=(), eos=0, pad=0, bos=0),
        adapter=[bundle.Tensor(name=n, shape=tuple(adapter[n].shape)) for n in sorted(adapter)],
        programs=[
            bundle.Program(
                name="fp32",
                base="fp32",
                files=("fp32.pte", "base.ptd"),
                eps=(1e-4, 1e-2),
                methods=both,
            ),
            bundle.Program(
                name="q4", base="8da4w", files=("q4.pte",), eps=(1e-3, 1e-2), methods=small
            ),
        ],
        files={name: bundle.describe(folder / name) for name in contents},
    )
    bundle.write(folder, made, bundle.signing_key(folder / "publisher.key"))
    return made


def a_task(config: RunConfig, seats: int = 2, round: int = 1, **changes: Any) -> Task:
    """A TRAIN task of fedavg without a model: one module of two by two."""
    fresh = {"m.lora_A": ("float32", [1, 2]), "m.lora_B": ("float32", [2, 1])}
    settings = {
        "lora": {"rank": 1, "alpha": 1.0, "rslora": False},
        "class": "",
        "population": 9,
        "accepted": 0,
        "fresh": {"adapter": fresh},
        "run": config.model_dump(mode="json"),
    }
    values: dict[str, Any] = {"config": json.dumps(settings), "seats": seats, **changes}
    return Task("0" * 32, round, f"{round:064d}", Kind.TRAIN, **values)


def update_of(task: Task, client: str, value: float = 1.0, examples: int = 3) -> Packet:
    """A valid reply to `a_task`, all values alike."""
    import torch

    like = {"m.lora_A": torch.full((1, 2), value), "m.lora_B": torch.full((2, 1), value)}
    payload, _ = messages.enclose({"adapter": like})
    return messages.pack_reply(
        messages.Reply(
            *(task.run_id, task.round, task.base_version, task.kind, client),
            num_examples=examples,
            payload=payload,
        )
    )


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
