"""Federations on tiny random models, with effective weights read by peft: what tests share."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from corolla import seeds
from corolla.client.training.worker import Worker
from corolla.commands.check import tiny_models
from corolla.commands.check.tiny_models import Size, word_tokenizer
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data.federated import FederatedData
from corolla.data.partition import Split
from corolla.data.rows import Example
from corolla.directions import moving, seedlog
from corolla.interfaces import ForwardTrainer, LocalTrainer, Observed, Strategy
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.federation import Federation, Held
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, run_round
from corolla.storage.memory import Memory
from corolla.strategies.listing import registry
from corolla.tensors import factors
from corolla.types import (
    Broadcast,
    Correct,
    Fit,
    LoraSpec,
    Move,
    Params,
    Payload,
    Pool,
    TrainerName,
    Update,
    Walk,
    row_name,
)
from corolla.wire import messages
from corolla.wire.messages import unpack_reply, unpack_task
from corolla.wire.packet import Packet

KINDS = tiny_models.KINDS
VOCABULARY = 64
LABELS = ("no", "perhaps", "yes")
CLIENTS = {"a": 3, "b": 9, "c": 6, "d": 4}
"""Client → training examples."""
IDS = torch.arange(2, 26).reshape(2, 12)
"""Input for comparing logits."""

_SIZE = Size(vocabulary=VOCABULARY, intermediate=48, layers=1, positions=32)


def base(kind: str, blocks: int = 1) -> Base:
    """The same weights each time."""
    model = tiny_models.build(kind, replace(_SIZE, layers=blocks), len(LABELS), seed=7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # transformers starts biases at 0 and norms at 1
                noise = torch.randn(parameter.shape, generator=seeds.generator(7, name))
                parameter += 0.05 * noise
    model.requires_grad_(False)
    task = "classify" if kind == "bert" else "causal"
    return Base(model, word_tokenizer(VOCABULARY), task, kind, kind, pretrained.fingerprint(model))


def lora_model(kind: str, dropout: float = 0.0, blocks: int = 1) -> LoraModel:
    """An adapter on all linear layers of a tiny model."""
    return LoraModel(base(kind, blocks), dropout=dropout)


def adapter(model: LoraModel, spec: LoraSpec, seed: int) -> Params:
    """An adapter as after training: nothing in it is zero, the head is away from its start."""
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=seeds.generator(seed, name))
        for name, tensor in model.init(spec, seed).items()
    }


def block(model: LoraModel, rank: int, seed: int) -> Params:
    """A frozen block of that rank on every module."""
    whole = adapter(model, LoraSpec(rank, 1.0), seed)
    return {name: tensor for name, tensor in whole.items() if ".lora_" in name}


def logits(model: nn.Module) -> Tensor:
    """Logits on IDS."""
    with torch.no_grad():
        return cast(Tensor, model(input_ids=IDS).logits)


def data(kind: str) -> FederatedData:
    """Random words, each client from its own part of the vocabulary."""
    generator = seeds.generator(7, "words")
    labels = list(LABELS) if kind == "bert" else []
    clients: dict[str, Split] = {}
    for index, (client, number) in enumerate(CLIENTS.items()):
        words = torch.randint(12 * index, 12 * index + 20, (number, 8), generator=generator)
        rows = [
            Example(" ".join(f"w{w}" for w in row), label=labels[sum(row) % 3] if labels else None)
            for row in words.tolist()
        ]
        clients[client] = Split(rows, rows[:2])
    return FederatedData(kind, clients, [], labels, "")


def config(strategy: str, **changes: Any) -> RunConfig:
    """Three of four clients a round, two steps each."""
    traits = registry.traits(registry.find(strategy))
    values = {
        "strategy": strategy,
        "rank": 4,
        "alpha": 8.0,
        "cohort": 3,
        "local_steps": 2,
        "batch_size": 3,
        "lr": 1e-2 if "adamw" in traits.optimizers else 0.3,
        "optimizer": traits.optimizers[0],
        "schedule": "constant",
    }
    return RunConfig(**{**values, **changes})


def classes(name: str) -> dict[str, Any]:
    """One for each way to train, where there is more than one."""
    trainers = registry.find(name).trainers
    if len(trainers) == 1:
        return {}
    return {"classes": {trainer: {"trainer": trainer, "lr": 1e-2} for trainer in trainers}}


@dataclass
class Tracer(Network):
    """A network of clients in this process that writes down all that travels."""

    worker: Worker
    reverse: bool = False
    visits: list[str] = field(default_factory=list)
    received: dict[str, Payload] = field(default_factory=dict)
    sent: dict[str, Packet] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    trained: dict[str, Params] = field(default_factory=dict)
    dense: dict[str, Params] = field(default_factory=dict)

    def clients(self) -> Mapping[str, int]:
        return dict(CLIENTS)

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        """Trains the cohort; forgets the round before."""
        for seen in (self.visits, self.received, self.sent, self.examples, self.trained):
            seen.clear()
        self.dense.clear()
        for client in sorted(packets, reverse=self.reverse):
            answer = self.worker(client, packets[client])
            self.visits.append(client)
            self.received[client] = delivered(packets[client])
            self.sent[client] = answer
            self.examples[client] = unpack_reply(answer, 1 << 30).num_examples
            self.trained[client] = self.model.read()
            self.dense[client] = effective(self.model)
            yield client, answer

    @property
    def model(self) -> LoraModel:
        """The resident model."""
        return cast(LoraModel, self.worker.model)

    def update(self, client: str) -> Payload:
        """What a client of the last cohort sent."""
        return messages.content(unpack_reply(self.sent[client], 1 << 30))

    def mean(self) -> Params:
        """Σ n_m W_m / Σ n of what the clients' models held after training, dense, in fp64."""
        total = sum(self.examples.values())
        names = next(iter(self.dense.values()))
        return {
            n: torch.stack([self.examples[c] / total * w[n] for c, w in self.dense.items()]).sum(0)
            for n in names
        }


def delivered(packet: Packet) -> Payload:
    """All that a task brings: its groups, and each row of its log by name."""
    task = unpack_task(packet)
    rows = task.log.rows if task.log else ()
    last = task.log.number if task.log else 0
    numbers = range(last - len(rows) + 1, last + 1)
    named = {row_name(n): row for n, row in zip(numbers, rows, strict=True)}
    return {**messages.content(task), **named}


@dataclass
class Run:
    """A federation and where it stands."""

    federation: Federation
    network: Tracer
    state: Payload
    first: Payload
    held: Held = field(default_factory=dict)
    done: list[RoundResult] = field(default_factory=list)

    @property
    def model(self) -> LoraModel:
        """The resident model."""
        return self.network.model

    def step(self) -> RoundResult:
        """One round."""
        result = run_round(
            RoundCall(self.federation, self.state, self.held, len(self.done) + 1), self.network
        )
        self.state, self.held = result.state, result.held
        self.done.append(result)
        return result


def start(
    settings: RunConfig, kind: str, folder: Path, *, reverse: bool = False, blocks: int = 1
) -> Run:
    """A federation before its first round."""
    model = lora_model(kind, settings.dropout, blocks)
    strategy = build_strategy(settings)
    worker = Worker(settings, model, data(kind), Memory(folder))
    first = strategy.init(
        model.init(settings.lora, seeds.derive(settings.seed, "init")), settings.seed
    )
    origin = seedlog.origin(model.base.fingerprint, first)
    fresh = cache(lambda spec: model.init(spec, 0))
    federation = Federation("0" * 32, settings, strategy, CLIENTS, fresh, origin)
    return Run(federation, Tracer(worker, reverse), first, first)


@dataclass(frozen=True)
class Scripted:
    """A client (and its trainer) whose training ends where the test says."""

    outcome: Params
    num_examples: int
    lora: LoraSpec = field(default_factory=lambda: LoraSpec(1, 1.0))
    seed: int = 0
    fresh: Params = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    kind: TrainerName = "first_order"
    scalars: Sequence[float] = (1.0, -2.0, 0.5)
    step: float = -0.25
    population: int = 1
    kept: Payload = field(default_factory=dict)
    distance: float = 1.0

    @property
    def trainer(self) -> LocalTrainer:
        return self

    @property
    def forward(self) -> ForwardTrainer:
        return self

    @property
    def queries(self) -> int:
        return len(self.scalars)

    def walk(
        self,
        start: Params,
        moves: Sequence[Move],
        pool: Pool,
        directions: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Walk:
        """Ends at `outcome` with the scalars the test says; `asked` holds how it was called."""
        self.asked.append({"start": start, "moves": moves, "pool": pool, "directions": directions})
        scalars = torch.tensor(self.scalars, dtype=dtype)
        return Walk(scalars, self.step, self.outcome, self.num_examples, {})

    def init(self, seed: int) -> Params:
        return self.fresh

    def fit(
        self,
        start: Params,
        *,
        frozen: Sequence[Params] = (),
        train: Callable[[str], bool] = lambda name: True,
        correct: Correct | None = None,
        strength: float = 1.0,
    ) -> Fit:
        """`outcome` for what is trained; `asked` holds how it was called."""
        asked = {"start": start, "frozen": frozen, "train": train, "correct": correct}
        self.asked.append({**asked, "strength": strength})
        params = {n: self.outcome.get(n, t) if train(n) else t for n, t in start.items()}
        return Fit(params, self.num_examples, {"train_loss": 0.0}, self.distance)


def seen(broadcast: Broadcast, first: Payload, lora: LoraSpec | None = None) -> Payload:
    """What a client that holds all sees of a broadcast: with a log, also the first state."""
    payload = {**broadcast.payload, **broadcast.cached}
    payload |= broadcast.fitted(lora) if broadcast.fitted and lora else {}
    if broadcast.log is None:
        return payload
    rows = {row_name(n): row for n, row in enumerate(broadcast.log, 1)}
    last = {seedlog.LAST: {"number": torch.tensor(len(rows))}}
    return {**first, **payload, **rows, **last}


def play(
    strategy: Strategy, state: Payload, clients: Sequence[Scripted], first: Payload | None = None
) -> Payload:
    """One round with scripted clients; `first` is the state before all rounds."""
    broadcast = strategy.broadcast(state)
    aggregator = strategy.aggregator()
    for client in clients:
        received = seen(broadcast, state if first is None else first, client.lora)
        update = strategy.local(client, received)
        aggregator.add(update.payload, update.num_examples)
    return strategy.apply(state, aggregator.finalise())[0]


def pair(rank: int, seed: int, out: int = 10, into: int = 8) -> Params:
    """Random factors of one module, as after training."""
    generator = seeds.generator(seed, "pair", rank)
    return {
        "m.lora_A": torch.randn(rank, into, generator=generator),
        "m.lora_B": torch.randn(out, rank, generator=generator),
    }


def dense(params: Params, module: str = "m") -> Tensor:
    """B A of one module in fp64."""
    return params[module + ".lora_B"].double() @ params[module + ".lora_A"].double()


def peft_mean(
    clients: Sequence[tuple[Params, LoraSpec, float]], kind: str, **options: Any
) -> Tensor:
    """Clients' (factors, spec, weight) of one module as peft combines them: "cat" or "svd"."""
    out, into = len(clients[0][0]["m.lora_B"]), clients[0][0]["m.lora_A"].shape[1]
    model: Any = nn.Sequential(OrderedDict(m=nn.Linear(into, out, bias=False)))
    for index, (params, spec, _) in enumerate(clients):
        own = LoraConfig(r=spec.rank, lora_alpha=int(spec.alpha), target_modules=["m"])
        name = f"c{index}"
        if index:
            model.add_adapter(name, own)
        else:
            model = get_peft_model(model, own, adapter_name=name)
        layer = model.base_model.model.m
        layer.lora_A[name].weight.data = params["m.lora_A"].clone()
        layer.lora_B[name].weight.data = params["m.lora_B"].clone()
    names, weights = [f"c{i}" for i in range(len(clients))], [weight for *_, weight in clients]
    model.add_weighted_adapter(names, weights, "mean", combination_type=kind, **options)
    return cast(Tensor, layer.get_delta_weight("mean").detach().double())


def scripted(strategy: Strategy, state: Payload, clients: Sequence[Scripted]) -> list[Update]:
    """What scripted clients send in one round."""
    broadcast = strategy.broadcast(state)
    return [strategy.local(own, seen(broadcast, state, own.lora)) for own in clients]


def observed(run: "Run", before: Payload) -> Observed:
    """The last round of a run as it happened, `before` being the state that it began with."""
    spec, network = run.federation.config.lora, run.network
    adapter = run.federation.strategy.adapter(before)
    start = {**run.model.init(spec, 0), **adapter.trained}
    if adapter.moves:
        start |= moving.settle(adapter.trained, adapter.moves)
    if adapter.frozen:
        start |= factors.bake(adapter.frozen[0], 1 / spec.scaling)
    total = sum(network.examples.values())
    shares = {client: n / total for client, n in network.examples.items()}
    loras = {client: run.federation.lora(client) for client in shares}
    sent = {client: network.update(client) for client in shares}
    return Observed(spec, start, dict(network.trained), shares, loras, before, sent)


def effective(model: LoraModel) -> Params:
    """What a model adds to the base weights, by peft, plus its frozen blocks; dense, in fp64."""
    dense = dict(peft_weights(model.model))
    for stack in model.frozen:
        for name in factors.modules(stack):
            added = stack[name + ".lora_B"].double() @ stack[name + ".lora_A"].double()
            layer = model.model.base_model.model.get_submodule(name)
            dense[name] = dense[name] + (added.T if layer.fan_in_fan_out else added)
    return dense


def saved(run: Run, folder: Path, blocks: int = 1) -> Params:
    """What the saved global adapter adds to the base weights, loaded by peft alone."""
    strategy, spec = run.federation.strategy, run.federation.config.lora
    run.model.save(folder, strategy.adapter(run.state), spec)
    plain = base(run.model.base.name, blocks).model
    return peft_weights(PeftModel.from_pretrained(plain, str(folder)))


def peft_weights(model: PeftModel) -> Params:
    """What the adapter adds to every weight, in the weight's orientation; to the head as well."""
    found: dict[str, Tensor] = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            found[name] = module.get_delta_weight("default").detach().double()
        elif isinstance(module, ModulesToSaveWrapper):
            before = dict(module.original_module.named_parameters())
            for part, parameter in module.modules_to_save["default"].named_parameters():
                moved = parameter.detach().double() - before[part].detach().double()
                found[f"{name}.{part}"] = moved
    return found


def relative(found: Params, wanted: Params) -> float:
    """‖found - wanted‖ / ‖wanted‖ over all tensors of `wanted`."""
    off = sum(float((found[n] - wanted[n]).square().sum()) for n in wanted)
    return math.sqrt(off / sum(float(wanted[n].square().sum()) for n in wanted))


def same(one: Params, other: Params) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def names(payload: Payload) -> dict[str, dict[str, tuple[Sequence[int], torch.dtype]]]:
    """Groups, names, shapes and types."""
    return {
        group: {n: (tuple(t.shape), t.dtype) for n, t in params.items()}
        for group, params in payload.items()
    }
