"""From phones' replies to their gateway's: each passed by the gate, then summed or bundled."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from corolla import seeds
from corolla.aggregation import robust
from corolla.config import schedule
from corolla.config.build import build_strategy
from corolla.config.load import validate
from corolla.config.run import RunConfig
from corolla.errors import WireError
from corolla.interfaces import Strategy
from corolla.server.rounds.expectations import sent
from corolla.server.rounds.federation import merges
from corolla.server.rounds.gate import judge
from corolla.server.rounds.metrics import mean_metrics
from corolla.server.rounds.verdicts import Expected, Judged
from corolla.strategies.listing import files, registry
from corolla.tensors import factors
from corolla.types import PER_USER, Params
from corolla.wire import codec, limits, messages
from corolla.wire.messages import Reply, Task, pack_reply
from corolla.wire.packet import Packet
from corolla.wire.task_settings import TaskSettings


@dataclass(frozen=True)
class Merging:
    """The facts of a task that a gateway must know to judge and to merge the replies to it."""

    task: Task
    config: RunConfig
    strategy: Strategy
    kind: str
    """The class of the gateway and of its phones, "" without classes."""
    fresh: Params
    """An adapter of theirs, without values that mean anything."""
    chosen: Sequence[str] = ()
    """The units that they train, of a strategy that is Choosing."""

    def expected(self, phone: str, examples: int, kind: str | None = None) -> Expected:
        """Returns the Expected of a valid reply by a phone with so many training examples.

        `kind` is the class of a native phone, which may be another than the gateway's.
        """
        name = self.kind if kind is None else kind
        own = self.config.of_class(name)
        round, steps = self.task.round, schedule.steps_per_round(own, examples)
        size = replace(
            factors.size(self.fresh),
            scalars=steps * own.queries,
            trainer=self.config.trainer_of(name),
            seed=seeds.derive(self.config.seed, "client", phone, round),
            round=round,
            step=schedule.step_size(own, round, examples),
            chosen=self.chosen,
        )
        return Expected(
            sent(self.config, self.strategy, name, self.strategy.update_like(self.fresh, size)),
            self.config.uplink,
            min(examples, steps * own.batch_size),
            self.config.max_norm,
            space=robust.space_of(registry.traits(self.strategy)),
        )

    def judge(self, packet: Packet, phone: str, examples: int, kind: str | None = None) -> Judged:
        """The verdict on a phone's reply."""
        return judge(packet, phone, self.task, self.expected(phone, examples, kind))

    def merge(self, gateway: str, replies: Iterable[tuple[str, int, str | None, Packet]]) -> Packet:
        """The gateway's reply, of (phone, its examples, its class, packet) that are judged valid.

        They are folded in the order given, one in memory at a time; a bundle holds them all.
        """
        blank = Reply(
            self.task.run_id, self.task.round, self.task.base_version, self.task.kind, gateway
        )
        aggregator = merges(self.config, self.strategy)
        packets: list[Packet] = []
        examples: dict[str, int] = {}
        metrics: dict[str, Mapping[str, float]] = {}
        for phone, own, kind, packet in replies:
            judged = self.judge(packet, phone, own, kind)
            if judged.reply is None or not judged.verdict.accepted:
                continue  # its file was damaged in the meantime
            reply = judged.reply
            if aggregator is None:
                packets.append(packet)
            else:
                aggregator.add(judged.update, reply.num_examples)
            examples[phone], metrics[phone] = reply.num_examples, reply.metrics
        return pack_reply(
            replace(
                blank,
                num_examples=sum(examples.values()),
                metrics=mean_metrics(_common(metrics), examples),
                payload=messages.pack_bundle(packets)
                if aggregator is None
                else codec.encode(aggregator.sums()),
                clients=len(examples),
                bundle=aggregator is None,
            )
        )


def _common(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Metrics under the names that most phones report: one phone's own names crowd none out.

    PER_USER is kept if one says it: those who do not are others.
    """
    counts = Counter(name for own in metrics.values() for name in own)
    names = [name for name in sorted(counts) if 2 * counts[name] > len(metrics)]
    most = limits.MAX_METRICS - 1
    kept = frozenset(sorted(names, key=lambda name: -counts[name])[:most]) | {PER_USER}
    return {
        phone: {name: value for name, value in own.items() if name in kept}
        for phone, own in metrics.items()
    }


def prepare(task: Task, allow: Iterable[str] = ()) -> Merging:
    """Reads a gateway's task as a Merging. Raises ConfigError or WireError in one line."""
    try:
        told = TaskSettings.from_json(task.config)
        run, kind = dict(told.run), str(told.kind)
        if "strategy" in run:  # before anything imports it
            run["strategy"] = files.allowed(str(run["strategy"]), allow, "gateway")
        config = validate(run)
        form = (told.fresh or {})["adapter"]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"the task's settings cannot be read: {type(error).__name__}") from error
    config.of_class(kind)
    try:
        fresh = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in form.items()}
    except RuntimeError as error:  # torch says so of memory
        raise WireError("the task's adapter takes more memory than this gateway has") from error
    bare = replace(task, payload=b"", scalars={}, log=None, seats=0)
    return Merging(bare, config, build_strategy(config), kind, fresh, told.chosen)
