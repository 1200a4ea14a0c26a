"""The client side of a round: one resident model that serves one client, or many in simulation."""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from corolla import seeds
from corolla.client.training.dpsgd import SelfTestError
from corolla.client.training.first_order import FirstOrder
from corolla.client.training.zeroth_order import ZerothOrder
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, Encoder
from corolla.data.federated import FederatedData
from corolla.data.rows import Example
from corolla.directions import seedlog
from corolla.errors import (
    ArtefactError,
    ConfigError,
    CorollaError,
    ModelError,
    RoundError,
    StoppedError,
    WireError,
)
from corolla.evaluation.scoring import score
from corolla.host import logs
from corolla.interfaces import Client, ForwardTrainer, LocalTrainer
from corolla.models.dense import DenseModel
from corolla.models.lora import LoraModel
from corolla.models.records import write_update
from corolla.models.trainable import Trainable
from corolla.privacy import example_level, ledger
from corolla.privacy.example_level import ExampleLevel
from corolla.privacy.ledger import Ledger, Limit
from corolla.storage.folders import client_folder, round_folder
from corolla.storage.memory import Memory
from corolla.strategies import registry
from corolla.types import LoraSpec, Payload, TrainerName, row_name
from corolla.wire import codec, compression, messages
from corolla.wire.messages import Capabilities, Kind, Log, Reply, Task, pack_reply, unpack_task
from corolla.wire.packet import Packet

_RESIDENT_CLIENTS = 64
"""How many simulated clients keep their tokens in memory."""

_OUT_OF_MEMORY = "out of memory: lower micro_batch_size or max_length"

_OWED = "owed-"
"""Prefix of the groups that hold what a codec has left out of the updates so far."""

_PUBLIC = ("local_steps",)
"""Metrics of training that are not measured on data."""

_log = logs.logger("worker")


@dataclass(frozen=True)
class LocalClient:
    """One client during one task: what a strategy sees of it."""

    model: Trainable
    lora: LoraSpec
    data: Sequence[Encoded]
    config: RunConfig
    seed: int
    round: int
    kind: TrainerName
    population: int = 1
    kept: Payload = field(default_factory=dict)
    on_step: Callable[[int], None] | None = None
    private: ExampleLevel | None = None

    @property
    def trainer(self) -> FirstOrder:
        if not isinstance(self.model, LoraModel | DenseModel):
            raise ConfigError(f"{self.config.strategy}: no first-order training of all parameters")
        return FirstOrder(self.model, *self._rest)

    @property
    def forward(self) -> ZerothOrder:
        return ZerothOrder(self.model, *self._rest)

    @property
    def _rest(self) -> tuple[Any, ...]:
        """What both trainers take beside the model, in their order."""
        own = self.lora, self.data, self.config, self.seed, self.round
        return *own, self.on_step, self.private


class _Trainer:
    """The methods of a `LocalTrainer` alone."""

    def __init__(self, whole: LocalTrainer) -> None:
        self.init = whole.init
        self.fit = whole.fit


class _Forward:
    """What a `ForwardTrainer` has, alone."""

    def __init__(self, whole: ForwardTrainer) -> None:
        self.queries = whole.queries
        self.walk = whole.walk


class _Guarded:
    """A client under dp=example as its strategy sees it: the members of `types.Client` alone.

    A strategy of a user's own so does not come across examples, or a trainer without privacy, by
    accident. It is no sandbox: code of the same process that means to find them will.
    """

    def __init__(self, whole: Client) -> None:
        self.seed, self.lora, self.population = whole.seed, whole.lora, whole.population
        self.kept, self.kind = whole.kept, whole.kind
        self._trainer: Callable[[], LocalTrainer] = lambda: _Trainer(whole.trainer)
        self._forward: Callable[[], ForwardTrainer] = lambda: _Forward(whole.forward)

    @property
    def trainer(self) -> LocalTrainer:
        return self._trainer()

    @property
    def forward(self) -> ForwardTrainer:
        return self._forward()


class Worker:
    """Answers tasks for the clients whose data it holds.

    `record` (simulation only) is a folder for each client's adapter after local training;
    `capabilities` is what a device says of itself when it is greeted; with it, what goes wrong in
    the code of a strategy is told by its type alone: the text may be of the data.

    Under dp=example a client writes in its ledger what a round costs before it trains, and answers
    with an update that is private and what is known without its data. `ledger` is where a device
    keeps that (default: beside what the client keeps), `limit` what its owner allows over all runs:
    then it takes part in nothing else. A strategy sees no more of such a client than `Client` has.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Trainable,
        data: FederatedData,
        memory: Memory,
        record: Path | None = None,
        on_step: Callable[[int], None] | None = None,
        capabilities: Capabilities | None = None,
        ledger: Path | None = None,
        limit: Limit | None = None,
    ) -> None:
        self.config = config
        self.capabilities = capabilities
        self.limit = limit
        self._ledger = ledger
        self.model = model
        self.data = data
        self.memory = memory
        self.record = record
        self.on_step = on_step
        self.strategy = build_strategy(config)
        self.traits = registry.traits(self.strategy)
        self._encoder = Encoder(model.base.tokenizer, data.labels, config.max_length)
        self._encoded: OrderedDict[str, tuple[list[Encoded], int]] = OrderedDict()

    def __call__(self, client: str, packet: Packet) -> Packet:
        """The reply of one client to one packet. What goes wrong becomes an error reply."""
        task = unpack_task(packet)
        blank = Reply(task.run_id, task.round, task.base_version, task.kind, client)
        try:
            return pack_reply(self._answer(client, task, blank))
        except CorollaError as error:
            reply = replace(blank, error=str(error))
        # A task that does not fit this model, or numbers and nesting that no server sends.
        except (LookupError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            text = "" if self.capabilities else f": {error}"
            why = f"task cannot be done here: {type(error).__name__}{text}"
            reply = replace(blank, error=_OUT_OF_MEMORY if _of_memory(error) else why)
        except MemoryError:
            reply = replace(blank, error=_OUT_OF_MEMORY)
        return pack_reply(reply)

    def _answer(self, client: str, task: Task, blank: Reply) -> Reply:
        if client not in self.data.clients:
            raise WireError("this device has no such client")
        own = self.model.base.fingerprint
        if task.model_sha256 not in ("", own):
            raise ModelError(
                f"this device has base model {own[:12]}, the run is of {task.model_sha256[:12]}: "
                f"give it the same one, in the same number type"
            )
        if task.kind == Kind.HELLO:
            return replace(
                blank,
                num_examples=len(self.data.clients[client].train),
                model_sha256=own,
                capabilities=self.capabilities,
            )
        self._refuse(task.kind)
        settings = json.loads(task.config)
        sent = messages.content(task)
        if "form" in settings:
            sent = self.config.downlink.unpack(sent, compression.blank(settings["form"]))
        for group in task.cached.keys() & sent.keys():
            self.memory.keep(group, sent[group], task.cached[group])
        missing = self.memory.missing(task.cached)
        followed = self._follow(task.log, sent) if task.log else {}
        if missing or followed is None:
            missing = missing or ["log"]
            return replace(blank, missing=missing, error=f"{', '.join(missing)}: not held here")
        self.memory.prune(task.cached)
        received = {**followed, **sent, **self.memory.recall(task.cached)}
        kept, owed = self._kept(client, settings["accepted"], commit=task.kind == Kind.TRAIN)
        if task.kind == Kind.EVALUATE:
            lora = LoraSpec(**settings["lora"])
            return self._evaluate(client, lora, {**received, **kept}, blank)
        return self._train(client, task, settings, received, kept, owed, blank)

    def _follow(self, log: Log, sent: Payload) -> Payload | None:
        """The first state and all rows up to the task's version; None when some are missing.

        Raises WireError when the start is not the server's or the rows do not lead to its version.
        """
        fresh = self.model.init(self.config.lora, seeds.derive(self.config.seed, "init"))
        first = self.strategy.init(fresh, self.config.seed)
        origin = seedlog.origin(self.model.base.fingerprint, first)
        if origin != log.origin:
            raise WireError(
                f"this device starts from version {origin[:8]}, the server from {log.origin[:8]}: "
                f"another base model, or another adapter on it"
            )
        if log.start:
            if codec.content_id(sent.get("start", {})) != log.start:
                raise WireError("the snapshot does not match its content id")
            self.memory.keep_start(log.since, sent["start"], log.number - len(log.rows))
        if self.memory.extend(log.since, log.rows) != log.version:
            raise WireError(
                f"{len(log.rows)} rows from version {log.since[:8]} do not lead to "
                f"{log.version[:8]}: the log has a gap or a foreign row"
            )
        known = self.memory.log(log.version, origin)
        if known is None:
            return None
        snapshot, rows, before = known
        if log.number != before + len(rows):
            raise WireError(f"log ends at row {log.number}, here at {before + len(rows)}")
        numbers = range(before + 1, log.number + 1)
        named = {row_name(number): row for number, row in zip(numbers, rows, strict=True)}
        last = {seedlog.LAST: {"number": torch.tensor(log.number)}}
        start = {} if snapshot is None else {"start": snapshot}
        return {**first, **start, **named, **last}

    def _kept(self, client: str, accepted: int, commit: bool) -> tuple[Payload, Payload]:
        """What the strategy keeps here, and what the codec has left out of updates so far."""
        if not (self.traits.keeps or self.config.uplink.needs_differences):
            return {}, {}
        try:
            kept = self.memory.kept(client, accepted, commit)
        except WireError:
            if self.traits.keeps:
                raise
            kept = {}  # what was left out is lost; updates go on without it
        owed = {g.removeprefix(_OWED): p for g, p in kept.items() if g.startswith(_OWED)}
        return {g: params for g, params in kept.items() if not g.startswith(_OWED)}, owed

    def _train(
        self,
        client: str,
        task: Task,
        settings: Mapping[str, Any],
        received: Payload,
        kept: Payload,
        owed: Payload,
        blank: Reply,
    ) -> Reply:
        lora, name = LoraSpec(**settings["lora"]), settings["class"]
        self.model.check_rank(lora)
        config = self.config.of_class(name)
        seed = seeds.derive(self.config.seed, "client", client, task.round)
        count = len(self.data.clients[client].train)
        private, spent = None, 0.0
        if config.dp == "example":
            private = example_level.example_level(config, count)
            spent = self._spend(client, task, private)
        with _withheld() if private else nullcontext():
            data, skipped = self._tokens(client)
            member: Client = LocalClient(
                self.model,
                lora,
                data,
                config,
                seed,
                task.round,
                self.config.trainer_of(name),
                settings["population"],
                kept,
                self.on_step,
                private and _once(private),
            )
            if private:
                member = _Guarded(member)
            update = self.strategy.local(member, received)
        if private:
            known = {name: update.metrics[name] for name in _PUBLIC if name in update.metrics}
            most = min(count, private.steps * private.batch)
            update = replace(update, num_examples=most, metrics={**known, "epsilon": spent})
        else:
            update = replace(update, metrics={**update.metrics, "skipped": float(skipped)})
        if self.record:
            folder = client_folder(round_folder(self.record, task.round), client)
            write_update(folder, self.model, lora, update, client)
        uplink, keep = self.config.uplink, update.keep
        if uplink.needs_differences:
            payload, owed = compression.feedback(uplink, update.payload, owed, seed)
            keep = {**keep, **{_OWED + group: params for group, params in owed.items()}}
        else:
            payload = uplink.pack(update.payload, seed)
        if self.traits.keeps or uplink.needs_differences:
            self.memory.stage(client, task.round, keep)
        dense, scalars = messages.enclose(payload)
        return replace(
            blank,
            num_examples=update.num_examples,
            metrics=update.metrics,
            payload=dense,
            scalars=scalars,
        )

    def _refuse(self, kind: Kind) -> None:
        """Raises ConfigError for what would tell of single examples more than was agreed on."""
        if self.limit and self.config.dp != "example":
            raise ConfigError(
                f"this device gives at most epsilon {self.limit.epsilon:g} of its examples: it "
                f"takes part in runs with dp=example alone, found dp={self.config.dp}"
            )
        if kind == Kind.EVALUATE and self.config.dp != "none":
            raise ConfigError(f"dp={self.config.dp}: nothing is measured on this device's examples")

    def _spend(self, client: str, task: Task, private: ExampleLevel) -> float:
        """Write down what a round costs; what this run has cost with it.

        Raises ConfigError when that is more than the run or the owner allows, or the owner's delta
        protects nobody; RoundError when the ledger cannot be read or written.
        """
        path = self._ledger or self.memory.kept_folder(client) / ledger.NAME
        own, release = Ledger(path), private.release
        if self.limit and self.limit.delta * private.examples >= 1:
            _log.error("no privacy limit", delta=self.limit.delta, examples=private.examples)
            raise ConfigError(
                "the delta of this device's own privacy limit is no protection among its examples: "
                "its owner has to set one below 1 / examples"
            )
        try:
            run = own.epsilon(private.delta, task.run_id, [release])
            if private.budget is not None and run > private.budget:
                raise ConfigError(
                    f"privacy budget: this round would bring the run to epsilon {run:.4g} of "
                    f"{private.budget:g} at delta {private.delta:g} for this client's examples"
                )
            if self.limit:
                life = own.epsilon(self.limit.delta, more=[release])
                if life > self.limit.epsilon:  # by how much tells of runs of others
                    _log.error("privacy limit", epsilon=life, limit=vars(self.limit))
                    raise ConfigError("this round would exceed this device's own privacy limit")
            own.spend(task.run_id, task.round, release)
        except ArtefactError as error:  # names a file: for the owner
            _log.error("no privacy ledger", why=str(error))
            raise RoundError(
                "this device's privacy ledger cannot be used; its own log says why"
            ) from error
        return run

    def _evaluate(self, client: str, lora: LoraSpec, known: Payload, blank: Reply) -> Reply:
        examples = self.data.clients[client].eval[: self.config.eval_client_examples]
        data, _ = encode_all(self._encoder, examples)
        adapter = self.strategy.adapter(known)
        self.model.show(adapter, lora)
        if self.traits.personal:
            self.model.save(self.memory.kept_folder(client) / "adapter", adapter, lora)
        at_a_time = min(8, self.config.micro_batch_size or 8)  # what training fits in, this does
        base, device = self.model.base, self.model.device
        metrics = score(self.model.model, data, base.pad_id, device, at_a_time)
        return replace(blank, num_examples=len(data), metrics=metrics)

    def _tokens(self, client: str) -> tuple[list[Encoded], int]:
        """A client's training sequences, and how many examples have no target left."""
        if client not in self._encoded:
            self._encoded[client] = encode_all(self._encoder, self.data.clients[client].train)
        self._encoded.move_to_end(client)
        while len(self._encoded) > _RESIDENT_CLIENTS:
            self._encoded.popitem(last=False)
        return self._encoded[client]


def _once(private: ExampleLevel) -> ExampleLevel:
    """The same, for as many steps as were written down: who trains twice pays twice."""
    left = iter(range(private.steps))

    def uniform(count: int) -> torch.Tensor:
        if next(left, None) is None:
            raise ConfigError(
                f"dp=example: the strategy takes more than the {private.steps} steps of a round"
            )
        return private.uniform(count)

    return replace(private, uniform=uniform)


@contextmanager
def _withheld() -> Iterator[None]:
    """What goes wrong while an update is made from examples is for the log of their owner.

    Raises RoundError in place of any error but those of settings, of who stops, and of the
    comparison before the first step, which looks at no example.
    """
    try:
        yield
    except (ConfigError, SelfTestError, StoppedError):
        raise
    except Exception as error:
        # The text of an error of other code may be of the data.
        why = str(error) if isinstance(error, CorollaError) else type(error).__name__
        _log.error("not trained", why=why)
        raise RoundError("this device could not train; its own log says why") from error


def _of_memory(error: Exception) -> bool:
    """A GPU's has a type in torch; on the CPU it is a plain RuntimeError of its allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def encode_all(encoder: Encoder, examples: Sequence[Example]) -> tuple[list[Encoded], int]:
    """(sequences, number of examples without a target)."""
    encoded = [encoder(example) for example in examples]
    sequences = [replace(s, example=i) for i, own in enumerate(encoded) for s in own]
    return sequences, sum(not own for own in encoded)
