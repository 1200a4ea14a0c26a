"""A run and the strategy that it names, and the facts of strategies that rules look at."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from corolla.aggregation import robust
from corolla.aggregation.sums import ByGroup, SeedSums, WeightedMean
from corolla.config.run import RunConfig
from corolla.interfaces import Aggregator, Strategy, Traits
from corolla.strategies.listing import registry
from corolla.tensors import factors
from corolla.types import LoraSpec, Params, Size, Space, TrainerName
from corolla.wire.compression import Pipeline


@dataclass(frozen=True)
class Asked:
    """A config and the strategy that it names, with what the rules look at."""

    config: RunConfig
    strategy: Strategy

    @cached_property
    def traits(self) -> Traits:
        """The traits that the strategy states of itself."""
        return registry.traits(self.strategy)

    @property
    def subject(self) -> str:
        """The strategy in a sentence."""
        return f"strategy {registry.label(self.config.strategy)}"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of clients; "" alone where all are alike."""
        return tuple(self.config.classes) or ("",)

    @cached_property
    def trainers(self) -> set[TrainerName]:
        """How clients of this run train."""
        return {self.config.trainer_of(name) for name in self.classes}

    @property
    def batch_sizes(self) -> set[int]:
        """The sequences of a local step, of every class."""
        return {self.config.of_class(name).batch_size for name in self.classes}

    @cached_property
    def pipelines(self) -> tuple[Pipeline, Pipeline]:
        """The codecs of updates and of broadcasts. Raises ConfigError for codecs that are none."""
        return self.config.uplink, self.config.downlink

    @property
    def up(self) -> Pipeline:
        """How updates are compressed."""
        return self.pipelines[0]

    @property
    def down(self) -> Pipeline:
        """How broadcasts are compressed."""
        return self.pipelines[1]

    @property
    def cohort(self) -> int:
        """Updates of a round."""
        run = self.config
        return run.buffer or run.cohort or min(8, run.clients or 8)

    @property
    def hostile(self) -> int:
        """Updates of a round that may be hostile."""
        return robust.hostile(self.cohort, self.config.byzantine)

    @property
    def least(self) -> int:
        """Updates that the rule of robust aggregation needs; 0 without one."""
        rule = self.config.robust
        return 0 if rule == "none" else robust.least(rule, self.hostile)

    @cached_property
    def unfit_for_robust(self) -> str:
        """Why updates of this strategy cannot be defended by the rule; "" if they can."""
        run = self.config
        if run.robust == "none":
            return ""
        likes = [
            self.strategy.update_like(_one_module(run, spec), Size(1, 1, scalars=1, trainer=how))
            for spec in set(run.loras)
            for how in self.trainers
        ]
        return robust.refusal(run.robust, compared_in(run, self.strategy), self.traits, likes) or ""

    @property
    def frozen(self) -> str:
        """The factor that ffa_lora freezes, "" of another strategy: a start may be for it alone."""
        if registry.label(self.config.strategy) != "ffa_lora":
            return ""
        return "A" if getattr(self.strategy, "train", "B") == "B" else "B"

    @property
    def unfit_for_offset(self) -> str:
        """Why a constant block beside the base does not go with this run; "" if it does."""
        run = self.config
        if self.traits.personal:
            return f"models of {self.subject} are mixtures, of which it would be no constant part"
        if "zeroth_order" in self.trainers:
            return "what clients without gradients move has no block beside it"
        if run.weight_decay:
            return "weight-decay would shrink what is put in its place, set it to 0"
        if run.max_rank:
            return "max-rank would keep that part and cut what is learnt, leave it out"
        if self.down.lossy:
            return "codec-down would round that part, which is much larger than what is learnt"
        return ""

    @cached_property
    def overfull(self) -> list[RunConfig]:
        """Settings of classes whose updates would hold too many scalars."""
        zeroth = [n for n in self.classes if self.config.trainer_of(n) == "zeroth_order"]
        settings = [self.config.of_class(name) for name in zeroth]
        return [own for own in settings if own.local_steps * own.queries > 1 << 16]

    @property
    def misfits(self) -> list[str]:
        """Classes whose clients train as the strategy does not."""
        usable = self.strategy.trainers
        classes = self.config.classes.items()
        return [name for name, own in classes if own.trainer and own.trainer not in usable]


def able(fits: Callable[[type[Strategy]], object]) -> str:
    """Names of all strategies that fit."""
    return " or ".join(name for name, cls in registry.STRATEGIES.items() if fits(cls))


def compared_in(config: RunConfig, strategy: Strategy) -> Space:
    """Returns the space in which the rule of robust aggregation compares the strategy's updates."""
    own = robust.space_of(registry.traits(strategy))
    return own if config.robust_space == "auto" else config.robust_space


def not_noised(strategy: Strategy) -> str:
    """Why noise on a sum of clipped updates would not make a strategy private; "" if it does."""
    traits = registry.traits(strategy)
    if traits.mirrors:
        return "the server sums up what its clients keep, and neither may be clipped nor noised"
    if traits.individual or not strategy.aggregator().linear:
        return "its updates are not added up, each is used by itself"
    if not traits.bounded:
        return "a clipped update may still move the model by any amount"
    if not is_mean(strategy.aggregator()):
        return "what it adds up is not one mean over all clients, which noise could be put on"
    return ""


def takes_parts(strategy: Strategy | type[Strategy]) -> bool:
    """Returns whether clients of a class may train some blocks alone."""
    traits = registry.traits(strategy)
    able = traits.partial and not (traits.personal or traits.rebases)
    return bool(able) and "first_order" in strategy.trainers


def takes_patterns(strategy: Strategy | type[Strategy]) -> bool:
    """Returns whether modules may have ranks and scalings of their own."""
    personal = registry.traits(strategy).personal
    return without_factors(strategy) and not (strategy.mixed_ranks or personal)


def takes_magnitudes(strategy: Strategy | type[Strategy]) -> bool:
    """Returns whether a strategy can train magnitudes of DoRA: as any tensor, beside factors."""
    return takes_patterns(strategy)


def takes_other_places(asked: Asked) -> str:
    """Why places of a sparse set cannot be exchanged between rounds of a run; "" if they can."""
    strategy, traits = asked.strategy, asked.traits
    state = strategy.init({"m.delta": torch.zeros(1)}, 0)
    if state.keys() != {"adapter"} or strategy.broadcast(state).log is not None:
        return f"{asked.subject} keeps more of each place than its value, use fedavg or fedprox"
    if traits.keeps or traits.mirrors or traits.personal:
        return f"clients of {asked.subject} keep something of each place, use fedavg or fedprox"
    if asked.config.buffer:
        return "buffer applies updates of places that are no more, leave it out"
    if asked.up.needs_differences:
        return "codec top_k sends later what it leaves out, of places that are no more"
    if asked.config.dp_mechanism == "banded":
        return "dp-mechanism=banded takes back noise of places that are no more"
    return ""


def takes_sparse(strategy: Strategy) -> bool:
    """Returns whether clients may start from some values of the adapter and 0 for the others.

    So it is where all that they receive is that adapter, and the server adds their changes of what
    they received, tensor by tensor, to the whole one.
    """
    traits = registry.traits(strategy)
    own = traits.personal or traits.keeps or traits.mirrors or strategy.aggregates == "weights"
    if own or not traits.dense or traits.updates != "differences" or strategy.mixed_ranks:
        return False
    start = {"m" + factors.A: torch.ones(1, 1), "m" + factors.B: torch.zeros(1, 1)}
    sent = strategy.broadcast(strategy.init(start, 0))
    alone = not (sent.cached or sent.fitted or sent.log is not None)
    return (
        alone and sent.payload.keys() == {"adapter"} and sent.payload["adapter"].keys() == {*start}
    )


def takes_start(strategy: Strategy) -> bool:
    """Returns whether first-order clients get the strategy's start adapter, at its scaling."""
    if "first_order" not in strategy.trainers:
        return False
    one, scaling = torch.ones(1, 1), 2.0
    state = strategy.init({"m" + factors.A: one, "m" + factors.B: one}, 0)
    found = strategy.adapter(state)
    parts = [factors.bake(p, scaling) for p in (found.trained, *found.residuals)] + [*found.frozen]
    total = sum(
        float(factors.product(p, m))
        for p in parts
        for m in factors.modules(p)
        if m + factors.B in p
    )
    return strategy.broadcast(state).log is None and abs(total - scaling) < 1e-5


def is_mean(aggregator: Aggregator) -> bool:
    """Returns whether an aggregator makes nothing of clients' updates but their mean."""
    if isinstance(aggregator, ByGroup):
        return all(map(is_mean, aggregator.groups.values()))
    return type(aggregator) in (WeightedMean, SeedSums)  # a subclass may keep single updates


def without_factors(strategy: Strategy | type[Strategy]) -> bool:
    """Returns whether a strategy can train other tensors than LoRA factors."""
    return strategy.full or registry.traits(strategy).dense


def _one_module(config: RunConfig, spec: LoraSpec) -> Params:
    """The smallest adapter of a rank: the form of updates follows from it."""
    a, b = torch.zeros(spec.rank, 1), torch.zeros(1, spec.rank)
    return {"m" + factors.A: a, "m" + factors.B: b} if config.kind.factors else {}
