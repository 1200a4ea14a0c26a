"""The client side of a round: one resident model that serves one client, or many in simulation."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from corolla import seeds
from corolla.artefacts.card import write_brief_card
from corolla.artefacts.records import write_decoded, write_update
from corolla.client.training import private
from corolla.client.training.first_order import FirstOrder
from corolla.client.training.zeroth_order import ZerothOrder
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, Encoder
from corolla.data.federated import FederatedData
from corolla.data.rows import Example, counted, unit_of, units
from corolla.directions import seedlog
from corolla.errors import ConfigError, CorollaError, ModelError, WireError
from corolla.evaluation.scoring import halves, score_by_row
from corolla.interfaces import Client, Strategy, Traits
from corolla.models import layers
from corolla.models.sparse import carried
from corolla.models.trainable import Differentiable, Trainable
from corolla.privacy import example_level, ledger
from corolla.privacy.example_level import ExampleLevel
from corolla.privacy.ledger import Ledger, Limit
from corolla.storage.folders import client_folder, round_folder
from corolla.storage.memory import Memory
from corolla.strategies import offset
from corolla.strategies.listing import registry
from corolla.types import Adapter, LoraSpec, Metrics, Payload, TrainerName, Update, row_name
from corolla.wire import codec, ranges
from corolla.wire.envelope import Envelope
from corolla.wire.messages import Capabilities, Kind, Log, Reply, Task, pack_reply, unpack_task
from corolla.wire.packet import Packet
from corolla.wire.ranges import Range
from corolla.wire.task_settings import TaskSettings

_RESIDENT_CLIENTS = 64
"""How many simulated clients keep their tokens in memory."""

_OUT_OF_MEMORY = "out of memory: lower micro_batch_size or max_length"

_OWED = "owed-"
"""Prefix of the groups that hold what a codec has left out of the updates so far."""


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
        if not isinstance(self.model, Differentiable):
            raise ConfigError(
                f"{registry.label(self.config.strategy)}: no first-order training of all parameters"
            )
        return FirstOrder(
            self.model,
            lora=self.lora,
            data=self.data,
            config=self.config,
            seed=self.seed,
            round=self.round,
            on_step=self.on_step,
            private=self.private,
        )

    @property
    def forward(self) -> ZerothOrder:
        return ZerothOrder(
            self.model,
            lora=self.lora,
            data=self.data,
            config=self.config,
            seed=self.seed,
            round=self.round,
            on_step=self.on_step,
            private=self.private,
        )


@dataclass(frozen=True)
class Device:
    """The capabilities, ledger and limit of a worker's device; a simulation has none of them."""

    capabilities: Capabilities | None = None
    """The capabilities that the device tells when it is greeted.

    With them, what goes wrong in the code of a strategy is told by its type alone: the text may be
    of the data.
    """
    ledger: Path | None = None
    """File of what the examples have cost in privacy; None: beside what the client keeps."""
    limit: Limit | None = None
    """The most that the owner allows the examples to cost over all runs.

    With a limit the device takes part in runs with dp=example alone.
    """


SIMULATED = Device()


@dataclass(frozen=True)
class Received:
    """The start of local work: a task's settings, and all groups that it needs."""

    settings: TaskSettings
    groups: Payload
    """The groups that the strategy's halves read: those that were sent, and those held here."""
    kept: Payload
    """Groups that the strategy keeps on this device, as of the last update that was accepted."""
    owed: Payload
    """The parts of the updates so far that the codec has left out."""


class _NotHeldError(Exception):
    """A task names groups that are not held here. Never leaves this module."""

    def __init__(self, groups: Sequence[str]) -> None:
        super().__init__(f"{', '.join(groups)}: not held here")
        self.groups = groups


class Worker:
    """Answers tasks for the clients whose data it holds.

    `record` (simulation only) is a folder for each client's adapter after local training; `on_step`
    is told the tokens of each local step.

    Under dp=example a client writes in its ledger what a round costs before it trains, and answers
    with an update that is private and what is known without its data. A strategy sees no more of
    such a client than `Client` has.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Trainable,
        data: FederatedData,
        memory: Memory,
        record: Path | None = None,
        on_step: Callable[[int], None] | None = None,
        device: Device = SIMULATED,
    ) -> None:
        self.config = config
        self.device = device
        self.model = model
        self.data = data
        self.memory = memory
        self.record = record
        self.on_step = on_step
        self.strategy = build_strategy(config)
        self.traits = registry.traits(self.strategy)
        self.downlink, self.uplink = Envelope(config.downlink), Envelope(config.uplink)
        self._encoder = Encoder.of(config, model.base.tokenizer, data.labels)
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
            text = "" if self.device.capabilities else f": {error}"
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
            return self._hello(client, blank)
        private.refuse(self.config, self.device.limit, task.kind)
        try:
            received = self._receive(client, task)
        except _NotHeldError as lacking:
            return replace(blank, missing=lacking.groups, error=str(lacking))
        if task.kind == Kind.EVALUATE:
            return self._evaluate(client, received, blank)
        return self._train(client, task, received, blank)

    def _hello(self, client: str, blank: Reply) -> Reply:
        # With a limit nothing else is done than dp=example, and of users no number of rows is told.
        dp = "example" if self.device.limit else self.config.dp
        return replace(
            blank,
            num_examples=counted(dp, self.data.clients[client].train),
            model_sha256=self.model.base.fingerprint,
            capabilities=self.device.capabilities,
        )

    def _receive(self, client: str, task: Task) -> Received:
        """Keep what a task brings, and add to it what is held here already.

        Raises WireError for numbers out of their ranges (see wire/ranges.py), before any row is
        looked at, and _NotHeldError when that is not all it names; what came with it is kept all
        the same.
        """
        settings = TaskSettings.from_json(task.config)
        beside = int(task.kind != Kind.TRAIN)  # the untouched model is measured, and the last one
        allowed = Range(1 - beside, self.config.rounds + beside)
        ranges.check("round", task.round, allowed)
        sent = self.downlink.open(task, settings.like)
        self.memory.prune(task.cached)  # first: a server may name ever other groups, and send few
        for group in task.cached.keys() & sent.keys():
            self.memory.keep(group, sent[group], task.cached[group])
        missing = self.memory.missing(task.cached)
        followed = self._follow(task.log, sent) if task.log else {}
        if missing or followed is None:
            raise _NotHeldError(missing or ["log"])
        groups = {**followed, **sent, **self.memory.recall(task.cached)}
        ranges.check_tensors(groups)
        kept, owed = self._kept(client, settings.accepted, commit=task.kind == Kind.TRAIN)
        return Received(settings, carried.taken(self.model, groups), kept, owed)

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
        """Returns (groups the strategy keeps here, parts of updates the codec has left out)."""
        if not (self.traits.keeps or self.uplink.owes):
            return {}, {}
        try:
            kept = self.memory.kept(client, accepted, commit)
        except WireError:
            if self.traits.keeps:
                raise
            kept = {}  # what was left out is lost; updates go on without it
        owed = {g.removeprefix(_OWED): p for g, p in kept.items() if g.startswith(_OWED)}
        return {g: params for g, params in kept.items() if not g.startswith(_OWED)}, owed

    def _train(self, client: str, task: Task, received: Received, blank: Reply) -> Reply:
        lora = received.settings.lora
        self.model.check_rank(lora)
        seed = seeds.derive(self.config.seed, "client", client, task.round)
        update = self._update(client, task, received, seed)
        sealed = self.uplink.seal(update.payload, seed, received.owed)
        reply = replace(blank, payload=sealed.data, scalars=sealed.scalars)
        if self.record:
            folder = client_folder(round_folder(self.record, task.round), client)
            write_update(folder, self.model, lora, update, client)
            if self.config.uplink.lossy:
                opened = self.uplink.open(reply, self.uplink.like(update.payload))
                write_decoded(folder, self.model, lora, update.payload, opened)
        if self.traits.keeps or self.uplink.owes:
            owed = {_OWED + group: params for group, params in sealed.owed.items()}
            self.memory.stage(client, task.round, {**update.keep, **owed})
        return replace(reply, num_examples=update.num_examples, metrics=update.metrics)

    def _update(self, client: str, task: Task, received: Received, seed: int) -> Update:
        """Returns a strategy's update of a client's examples; under dp=example paid for first."""
        config = self.config.of_class(received.settings.kind)
        if config.dp != "example":
            data, skipped = self._tokens(client)
            member = self._member(data, task, received, config, seed)
            update = _local(self.strategy, member, received.groups, config)
            return replace(update, metrics={**update.metrics, "skipped": float(skipped)})
        rows = self.data.clients[client].train
        level = example_level.example_level(config, counted(config.dp, rows), unit_of(rows))
        path = self.device.ledger or self.memory.kept_folder(client) / ledger.NAME
        spent = private.spend(Ledger(path), self.device.limit, task, level)

        def local(rows: Callable[[], Sequence[Encoded]]) -> Update:
            member = self._member(rows(), task, received, config, seed)
            guarded = private.Guarded(replace(member, private=private.once(level)))
            return _local(self.strategy, guarded, received.groups, config)

        update = private.answered(
            lambda: local(lambda: self._tokens(client)[0]), lambda: local(lambda: ())
        )
        return private.published(update, level, spent)

    def _member(
        self,
        data: Sequence[Encoded],
        task: Task,
        received: Received,
        config: RunConfig,
        seed: int,
    ) -> LocalClient:
        """A client with these sequences as a strategy sees it."""
        return LocalClient(
            model=self.model,
            lora=received.settings.lora,
            data=data,
            config=config,
            seed=seed,
            round=task.round,
            kind=self.config.trainer_of(received.settings.kind),
            population=received.settings.population,
            kept=received.kept,
            on_step=self.on_step,
        )

    def _evaluate(self, client: str, received: Received, blank: Reply) -> Reply:
        lora = received.settings.lora
        examples = self.data.clients[client].eval[: self.config.eval_client_examples]
        data, _ = encode_all(self._encoder, examples)
        adapter = _adapter(self.strategy, received)
        self.model.show(adapter, lora)
        if self.traits.personal:
            _save_personal(self.memory, client, self.model, adapter, lora)
        at_a_time = min(8, self.config.micro_batch_size or 8)  # what training fits in, this does
        place = list(self.data.clients).index(client)  # clients of one row are of either half
        metrics = _scores(self.model, data, at_a_time, place)
        return replace(blank, num_examples=len(data), metrics=metrics)

    def _tokens(self, client: str) -> tuple[list[Encoded], int]:
        """A client's training sequences, and how many examples have no target left.

        With dp=example nobody counts the latter.
        """
        if client not in self._encoded:
            rows = self.data.clients[client].train
            self._encoded[client] = _sequences(self._encoder, rows, self.config.dp)
            self.model.base.check_ids(own.input_ids for own in self._encoded[client][0])
        self._encoded.move_to_end(client)
        while len(self._encoded) > _RESIDENT_CLIENTS:
            self._encoded.popitem(last=False)
        return self._encoded[client]


def _local(strategy: Strategy, member: Client, groups: Payload, config: RunConfig) -> Update:
    """Returns the update of the strategy's client half, without what was not trained."""
    update = _beside(strategy, groups).local(member, groups)
    return _changed(update, registry.traits(strategy), config)


def _adapter(strategy: Strategy, received: Received) -> Adapter:
    """The model that a client evaluates: the global one, with what it keeps."""
    groups = {**received.groups, **received.kept}
    return _beside(strategy, groups).adapter(groups)


def _beside(strategy: Strategy, groups: Payload) -> Strategy:
    """The strategy: devices are not told of a start, but of what it puts beside the base."""
    return offset.beside(strategy) if offset.GROUP in groups else strategy


def _changed(update: Update, traits: Traits, config: RunConfig) -> Update:
    """An update without what was not trained, where the aggregate takes this for no change."""
    if traits.partial != "absent":
        return update
    return replace(update, payload=layers.sent(update.payload, config.layers))


def _sequences(encoder: Encoder, rows: Sequence[Example], dp: str) -> tuple[list[Encoded], int]:
    """The sequences of rows, how many have no target left; of guarded ones 0."""
    return (private.sequences(encoder, rows), 0) if dp == "example" else encode_all(encoder, rows)


def _scores(model: Trainable, data: Sequence[Encoded], at_a_time: int, place: int) -> Metrics:
    """The scores of a model on the sequences of `encode_all`, and losses by halves of the rows."""
    numbers = [sequence.example or 0 for sequence in data]  # encode_all has numbered them
    base, device = model.base, model.device
    metrics, rows = score_by_row(model.model, data, numbers, base.pad_id, device, at_a_time)
    return {**metrics, **halves(rows, place)}


def _save_personal(
    memory: Memory, client: str, model: Trainable, adapter: Adapter, lora: LoraSpec
) -> None:
    """Write a client's own model, where there is room for it: in the place of the last one."""
    if memory.room:
        parts = (adapter.trained, *adapter.frozen, *adapter.residuals)
        memory.room.ask(sum(codec.file_bytes(part) for part in parts))
    folder = memory.kept_folder(client) / "adapter"
    model.save(folder, adapter, lora)
    what = "The personal model of one client: what all share, and what it keeps for itself."
    write_brief_card(folder, what, model.base.name)
    if memory.room:
        memory.room.settle()


def _of_memory(error: Exception) -> bool:
    """Returns whether memory ran out.

    torch has a type for a GPU's memory, a RuntimeError's text for the CPU's.
    """
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def encode_all(encoder: Encoder, examples: Sequence[Example]) -> tuple[list[Encoded], int]:
    """(sequences, number of examples without a target)."""
    encoded = [encoder(example) for example in examples]
    numbered = enumerate(zip(encoded, units(examples), strict=True))
    sequences = [replace(s, example=i, unit=unit) for i, (own, unit) in numbered for s in own]
    return sequences, sum(not own for own in encoded)
