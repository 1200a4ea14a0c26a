"""Targets of the fuzz bench: valid replies and tasks, who reads them, and what must then hold."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corolla import seeds
from corolla.aggregation.sums import summable
from corolla.client.training.worker import Worker
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data import federated as data
from corolla.directions import seedlog
from corolla.errors import WireError
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.phones import protocol
from corolla.proto import device_pb2 as device
from corolla.proto import update_pb2 as update
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.gate import judge
from corolla.server.rounds.tasks import Traffic, make_tasks
from corolla.server.rounds.verdicts import Expected, Judged
from corolla.storage.memory import Memory
from corolla.strategies.listing import registry
from corolla.types import Params, Payload
from corolla.wire import codec, messages, packet
from corolla.wire.compression import pipeline
from corolla.wire.messages import Kind, Reply, Task, pack_bundle, pack_reply, pack_task, unpack_task
from corolla.wire.packet import Packet
from corolla.wire.parsing import parse
from experiments.bench import mutations

BOUND = 1.0
"""The norm that an update may have at most."""


@dataclass(frozen=True)
class Target:
    """A valid reply, what the server expects, and how it would be folded in."""

    name: str
    honest: Packet
    task: Task
    expect: Expected
    strategy: str

    def examine(self, mutated: Packet) -> tuple[Judged, float]:
        """The verdict, and the change of the model in parts of the bound.

        Raises AssertionError where the gate lets through what it must not.
        """
        judged = judge(mutated, "ada", self.task, self.expect)
        why = judged.verdict.why
        assert why.isprintable(), f"not one line: {why!r}"
        assert len(why) <= 300, f"{len(why)} characters"
        if not judged.verdict.accepted:
            assert (judged.reply, judged.update, judged.members) == (None, {}, {})
            return judged, 0.0
        aggregator = registry.create(self.strategy).aggregator()
        reply = judged.reply
        assert reply is not None
        if self.expect.sums is not None:
            assert 1 <= reply.clients <= reply.num_examples
            partial, like = summable(aggregator), self.expect.like
            assert partial is not None
            assert like is not None
            partial.absorb(judged.update, float(reply.num_examples), like)
            return judged, _length(aggregator.finalise()) / BOUND
        own = [(judged, self.expect)]
        if reply.bundle:
            assert len(judged.members) == reply.clients <= self.expect.most_clients
            one = replace(self.expect, most_clients=0)
            own = [(member, one) for member in judged.members.values() if member.reply]
        for member, expect in own:
            assert member.reply is not None
            assert expect.like is not None
            assert 1 <= member.reply.num_examples <= expect.most_examples
            assert _form(member.update) == _form(expect.like)
            aggregator.add(member.update, float(member.reply.num_examples))
        return judged, _length(aggregator.finalise()) / BOUND if own else 0.0


def _form(payload: Payload) -> object:
    return {g: {n: (t.dtype, t.shape) for n, t in p.items()} for g, p in payload.items()}


def _length(aggregate: Payload) -> float:
    """The norm of an aggregate's move, from dense matrices in fp64; infinite if not finite."""
    total = 0.0
    for group, params in aggregate.items():
        for name, tensor in params.items():
            moved = tensor.double()
            if group == "factors" and name.endswith(".lora_A"):
                moved = params[name[:-1] + "B"].double() @ moved
            elif group == "factors" and name.endswith(".lora_B"):
                continue
            total += float(moved.square().sum())
    return math.sqrt(total) if math.isfinite(total) else math.inf


def _random(name: str, *shape: int) -> Tensor:
    return 0.02 * torch.randn(shape, generator=seeds.generator(0, "fuzz", name))


FRESH: Params = {
    **{f"layers.{i}.q_proj.lora_A": _random(f"a{i}", 4, 64) for i in range(3)},
    **{f"layers.{i}.q_proj.lora_B": _random(f"b{i}", 48, 4) for i in range(3)},
    "score.weight": _random("head", 2, 64),
}
TASK = Task("ab" * 16, 3, "cd" * 32, Kind.TRAIN, "{}", model_sha256="ef" * 32)


def _honest(payload: Payload | bytes, client: str = "ada", **changes: Any) -> Packet:
    dense, scalars = (payload, {}) if isinstance(payload, bytes) else messages.enclose(payload)
    echo = (TASK.run_id, TASK.round, TASK.base_version, TASK.kind)
    reply = Reply(*echo, client, 5, {"train_loss": 2.0}, dense, scalars=scalars)
    return pack_reply(replace(reply, **changes))


def targets() -> list[Target]:
    """One reply of every kind that a server reads."""
    adapter: Payload = {"adapter": FRESH}
    halves: Payload = {"adapter": {n: t.bfloat16() for n, t in FRESH.items()}}
    is_head = {n: n.startswith("score") for n in FRESH}
    stacked: Payload = {
        "factors": {n: t for n, t in FRESH.items() if not is_head[n]},
        "head": {n: t for n, t in FRESH.items() if is_head[n]},
    }
    step, scalars = torch.tensor(-4.0), _random("scalars", 64)
    own = torch.randint(8, (64,), generator=seeds.generator(0, "k"), dtype=torch.int32)
    seeded: Payload = {"scalars": {"scalars": scalars, "step": step, "seed": torch.tensor(7)}}
    directed: Payload = {"scalars": {"scalars": scalars, "step": step, "directions": own}}
    most: Payload = {"scalars": {**directed["scalars"], "directions": torch.full_like(own, 7)}}
    expect = Expected(adapter, most_examples=8, max_norm=BOUND)
    found = [
        Target("dense", _honest(adapter), TASK, expect, "fedavg"),
        Target("dense bf16", _honest(halves), TASK, replace(expect, like=halves), "fedavg"),
        Target(
            "factors",
            _honest(stacked),
            TASK,
            replace(expect, like=stacked, space="products"),
            "flora",
        ),
        Target("seeded", _honest(seeded), TASK, replace(expect, like=seeded), "seed_pool"),
        Target("directed", _honest(directed), TASK, replace(expect, like=most), "fedkseed"),
    ]
    for steps in (["zstd"], ["int8", "zstd"], ["top_k:0.1", "int4"], ["bf16"]):
        made = pipeline(steps)
        sent = _honest(made.pack(adapter, 1))
        found.append(Target("+".join(steps), sent, TASK, replace(expect, codec=made), "fedavg"))
    seated = replace(TASK, seats=3)
    mean = registry.create("fedavg").aggregator()
    for weight in (2, 5):
        mean.add(adapter, weight)
    partial = summable(mean)
    assert partial is not None
    sent = _honest(partial.sums(), clients=2, num_examples=7)
    sums = replace(expect, sums=partial.sums_like(adapter), most_clients=3)
    found.append(Target("sums", sent, seated, sums, "fedavg"))
    parts = {frozenset(partial.sums_like(own)): 8 for own in (adapter, {"other": {}})}
    like = {**adapter, "other": {}}
    either = replace(sums, like=like, sums=partial.sums_like(like), parts=parts)
    found.append(Target("sums of a class", sent, seated, either, "fedavg"))
    packets = [_honest(stacked, f"ada/p{i}") for i in range(3)]
    sent = _honest(pack_bundle(packets), clients=3, bundle=True, num_examples=0)
    expect = replace(expect, like=stacked, space="products", most_clients=3)
    found.append(Target("bundle", sent, seated, expect, "flora"))
    return found


def mutate(rng: random.Random, target: Target) -> Packet:
    """A mutated reply; of a bundle, mostly inside one of its entries."""
    reply = target.honest
    if target.name == "bundle" and rng.random() < 0.7:
        entries = messages.unpack_bundle(reply.payload, 9)
        at = rng.randrange(len(entries))
        entries[at] = mutations.reply(rng, rng.choice(entries))
        body = pack_bundle(entries)
        return Packet(mutations.sealed(reply.header, body, mutations.REPLY), body)
    return mutations.reply(rng, reply)


# --- messages -------------------------------------------------------------------------------------


def readers() -> Mapping[
    str, tuple[bytes, Callable[[random.Random, bytes], bytes], Callable[[bytes], object]]
]:
    """Reader → (valid bytes, how they are mutated, what reads them and raises WireError alone)."""
    chunk = protocol.chunk(b"x" * 50, 0, 50, "ab" * 16)
    manifest = device.Manifest()
    for name in ("config.json", "model.safetensors"):
        file = manifest.files.add(path=name)
        file.blob.CopyFrom(device.Blob(sha256="12" * 32, size=5))
        file.chunks = b"\x12" * 32
    hello = device.CheckInRequest(protocol=1, device="phone-1", num_examples=5)
    lease = device.CheckInResponse(lease=device.Lease(id="ab" * 16, seconds=5.0))
    body = codec.encode({"A": {"w": torch.ones(3)}})
    beside = codec.encode({"B": {"w": torch.ones(3)}})
    work = pack_task(replace(TASK, payload=body, cached={"A": "12" * 16}))
    honest = _honest({"adapter": FRESH})

    def like(kind: Any) -> Callable[[random.Random, bytes], bytes]:
        return lambda rng, data: mutations.message(rng, data, kind)

    def parsed(kind: Any, use: Callable[[Any], object] = lambda found: found) -> Any:
        return lambda data: use(parse(kind(), data, protocol.MAX_MESSAGE))

    capable = update.Capabilities(memory_bytes=5, runtime="corolla", cores=2)
    return {
        "check-in": (
            hello.SerializeToString(),
            like(device.CheckInRequest),
            parsed(device.CheckInRequest, lambda m: protocol.check_device(m.device)),
        ),
        "lease": (
            lease.SerializeToString(),
            like(device.CheckInResponse),
            parsed(device.CheckInResponse, lambda m: (protocol.check_id(m.lease.id), pause(m))),
        ),
        "chunk": (
            chunk.SerializeToString(),
            like(device.Chunk),
            parsed(device.Chunk, lambda m: protocol.check_chunk(m, 0, 50)),
        ),
        "blob": (
            device.Blob(sha256="12" * 32, size=5).SerializeToString(),
            like(device.Blob),
            parsed(device.Blob, lambda m: protocol.check_blob(m, 1 << 20)),
        ),
        "manifest": (manifest.SerializeToString(), like(device.Manifest), protocol.read_manifest),
        "task header": (work.header, like(update.Task), protocol.read_task),
        "reply header": (
            honest.header,
            like(update.Reply),
            lambda data: protocol.read_reply(Packet(data, b"")),
        ),
        "groups": (body, mutations.payload, lambda data: protocol.join([data, beside])),
        "payload": (body, mutations.payload, codec.decode),
        "capabilities": (
            capable.SerializeToString(),
            like(update.Capabilities),
            parsed(update.Capabilities, messages.load_capabilities),
        ),
        "bundle": (
            pack_bundle([honest]),
            like(update.Bundle),
            lambda data: messages.unpack_bundle(data, 3),
        ),
        "Flower's array": (mutations.npy("(5,)", b"12345"), mutations.payload, packet._npy_bytes),
    }


def pause(answer: device.CheckInResponse) -> float:
    """How long a phone would wait, which must be a time."""
    seconds = protocol.wait(answer.retry, 0.5)
    assert 0 <= seconds <= 86_400, f"a phone would wait for {seconds} s"
    return seconds


# --- tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A worker, a task that it can do, and what it then answers."""

    worker: Worker
    client: str
    task: Packet
    reply: Packet

    def examine(self, mutated: Packet) -> str:
        """The worker's answer to a mutated task; WireError where it is no task at all."""
        try:
            unpack_task(mutated)
        except WireError:
            try:
                self.worker(self.client, mutated)
            except WireError:
                return "refused"
            raise AssertionError("a task that cannot be read was done") from None
        reply = messages.unpack_reply(self.worker(self.client, mutated), 1 << 30)
        assert "\n" not in reply.error, f"more than one line: {reply.error}"
        return "missing" if reply.missing else "error" if reply.error else "done"


def devices(folder: Path, **settings: Any) -> dict[str, Device]:
    """One for each kind of task: all tensors, cached groups, a log, a compressed broadcast."""
    kinds: dict[str, dict[str, Any]] = {
        "dense": {"strategy": "fedavg"},
        "cached groups": {"strategy": "ffa_lora"},
        "log": {"strategy": "seed_pool"},
        "compressed": {"strategy": "fedavg", "codec_down": ["int8", "zstd"]},
    }
    return {
        name: _device(folder / f"{i}", RunConfig(**{**settings, **own}))
        for i, (name, own) in enumerate(kinds.items())
    }


def _device(folder: Path, config: RunConfig) -> Device:
    model = LoraModel(pretrained.load(config))
    federated = data.load(config)
    worker = Worker(config, model, federated, Memory(folder))
    clients = {client: len(split.train) for client, split in federated.clients.items()}
    strategy = build_strategy(config)
    start = model.init(config.lora, seeds.derive(config.seed, "init"))
    state = strategy.init(start, config.seed)
    origin = seedlog.origin(model.base.fingerprint, state)
    fresh = cache(lambda spec: model.init(spec, 0))
    federation = Federation("ab" * 16, config, strategy, clients, fresh, origin)
    client = min(clients)
    tasks = make_tasks(federation, state, {}, 1, Kind.TRAIN, {client: 0}, Traffic())
    task = pack_task(tasks[client])
    return Device(worker, client, task, worker(client, task))
