"""Which settings go with which strategy: what would be unsafe or mean nothing is refused."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from corolla.aggregation import robust
from corolla.aggregation.sums import ByGroup, SeedSums, WeightedMean
from corolla.config.run import RunConfig
from corolla.config.sections.rule import Rule, refusal
from corolla.errors import ConfigError
from corolla.interfaces import Aggregator, Strategy, Traits
from corolla.strategies import registry
from corolla.tensors import factors
from corolla.types import LoraSpec, Params, Size, Space, TrainerName
from corolla.wire.compression import PLAIN, Pipeline


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

    @cached_property
    def pipelines(self) -> tuple[Pipeline, Pipeline]:
        """Of updates and of broadcasts. Raises ConfigError for codecs that are none."""
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


def _able(fits: Callable[[type[Strategy]], object]) -> str:
    """Names of all strategies that fit."""
    return " or ".join(name for name, cls in registry.STRATEGIES.items() if fits(cls))


_STATE: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: len(set(asked.config.loras)) > 1 and not asked.strategy.mixed_ranks,
        why=lambda asked: (
            f"{asked.subject} needs one rank and alpha for all clients, found "
            f"ranks {[spec.rank for spec in asked.config.loras]}, "
            f"alphas {[spec.alpha for spec in asked.config.loras]}"
        ),
        instead=lambda asked: f"use {_able(lambda cls: cls.mixed_ranks)}",
    ),
    Rule(
        when=lambda asked: asked.config.buffer and not asked.traits.stale,
        why=lambda asked: (
            f"buffer applies updates made from older states, and those of {asked.subject} count "
            f"only for the state they were made from (its base, phase or directions change)"
        ),
        instead=lambda asked: f"use {_able(lambda cls: registry.traits(cls).stale)}",
    ),
    Rule(
        when=lambda asked: not asked.config.kind.factors and not _without_factors(asked.strategy),
        why=lambda asked: (
            f"{asked.subject} trains LoRA factors, found parameters={asked.config.parameters}"
        ),
        instead=lambda asked: f"use {_able(_without_factors)}",
    ),
    Rule(
        when=lambda asked: asked.config.optimizer not in asked.traits.optimizers,
        why=lambda asked: (
            f"{asked.subject} is derived for {' or '.join(asked.traits.optimizers)}, found "
            f"optimizer {asked.config.optimizer}"
        ),
        instead=lambda asked: f"set optimizer={asked.traits.optimizers[0]} and its lr",
    ),
    Rule(
        when=lambda asked: asked.traits.personal and not asked.config.eval_clients,
        why=lambda asked: f"{asked.subject} has personal models, which clients evaluate and save",
        instead="found eval-clients=0, raise it",
    ),
)

_LAYERS: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.config.partial and not asked.config.kind.factors,
        why=lambda asked: "classes.NAME.layers are those of LoRA adapters",
        instead=lambda asked: f"parameters={asked.config.parameters} has none",
    ),
    Rule(
        when=lambda asked: asked.config.partial and not asked.traits.partial,
        why=lambda asked: (
            f"in {asked.subject} a block that clients of a class do not train is not the same as "
            f"no change of it"
        ),
        instead=lambda asked: f"use {_able(lambda cls: registry.traits(cls).partial)}",
    ),
    Rule(
        when=lambda asked: asked.config.partial and "zeroth_order" in asked.trainers,
        why=lambda asked: "classes.NAME.layers is for first-order clients",
        instead="directions are of all trained tensors: set layers for the run",
    ),
    Rule(
        when=lambda asked: (
            asked.config.partial and (asked.config.robust != "none" or asked.config.dp == "client")
        ),
        why=lambda asked: "classes.NAME.layers makes updates of unlike forms",
        instead="robust and dp=client are for updates of one form: set layers for the run",
    ),
)

_CODECS: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.pipelines != (PLAIN, PLAIN) and asked.traits.updates == "scalars",
        why=lambda asked: f"{asked.subject} sends scalars",
        instead="there is nothing to compress, leave codec and codec-down out",
    ),
    Rule(
        when=lambda asked: asked.up.needs_differences and asked.traits.updates != "differences",
        why=lambda asked: f"{asked.subject} sends {asked.traits.updates}",
        instead="codec top_k is for differences, where 0 means no change",
    ),
    Rule(
        when=lambda asked: asked.up.needs_differences and asked.traits.rebases,
        why=lambda asked: f"{asked.subject} has new coordinates in each round",
        instead="what codec top_k leaves out cannot be added to a later update; use int8 or int4",
    ),
    Rule(
        when=lambda asked: (
            asked.up.lossy and not asked.up.needs_differences and asked.traits.mirrors
        ),
        why=lambda asked: (
            f"{asked.subject} sums up what its clients keep, so nothing may be lost on the way"
        ),
        instead="add top_k to codec, which sends the rest later, or use zstd alone",
    ),
    Rule(
        when=lambda asked: asked.up.needs_factors and asked.traits.updates != "factors",
        why=lambda asked: f"{asked.subject} sends {asked.traits.updates}",
        instead=lambda asked: (
            f"codec rank keeps the products of factors, use "
            f"{_able(lambda cls: registry.traits(cls).updates == 'factors')}"
        ),
    ),
    Rule(
        when=lambda asked: (
            asked.down.needs_factors or asked.down.needs_differences or asked.down.number == "int4"
        ),
        why=lambda asked: f"codec-down {', '.join(asked.config.codec_down)}",
        instead="a broadcast holds weights, not their changes; use fp16, bf16 or int8, and zstd",
    ),
)

_START: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.config.start == "gradient" and not takes_start(asked.strategy),
        why=lambda asked: (
            f"start=gradient is an adapter that the server hands out, and clients of "
            f"{asked.subject} begin from another"
        ),
        instead=lambda asked: f"use {_able(lambda cls: takes_start(cls()))}",
    ),
)

_ROBUST: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.config.byzantine and asked.config.robust not in robust.COUNTING,
        why=lambda asked: (
            f"byzantine is for robust={' or '.join(robust.COUNTING)}, found "
            f"robust={asked.config.robust}"
        ),
    ),
    Rule(
        when=lambda asked: asked.config.robust != "none" and asked.traits.mirrors,
        why=lambda asked: f"robust={asked.config.robust} does not fit {asked.subject}",
        instead="the server sums up what its clients keep, and a rule would leave parts out",
    ),
    Rule(
        when=lambda asked: asked.unfit_for_robust,
        why=lambda asked: f"robust={asked.config.robust} does not fit {asked.subject}",
        instead=lambda asked: asked.unfit_for_robust,
    ),
    Rule(
        when=lambda asked: asked.cohort < asked.least,
        why=lambda asked: (
            f"robust={asked.config.robust} needs {asked.least} clients a round where "
            f"{asked.hostile} may be hostile, found {asked.cohort}"
        ),
        instead="raise cohort",
    ),
)

_PRIVATE_STRATEGIES = "ffa_lora, fed_sb, fedsvd, rolora, fedavg or seed_pool"

_PRIVATE: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.config.dp != "none" and asked.traits.personal,
        why=lambda asked: (
            f"dp={asked.config.dp} forbids measuring models on clients' examples, and those of "
            f"{asked.subject} are personal and measured there"
        ),
        instead=f"use {_PRIVATE_STRATEGIES}",
    ),
    Rule(
        when=lambda asked: asked.config.dp == "client" and not_noised(asked.strategy),
        why=lambda asked: f"dp=client does not fit {asked.subject}",
        instead=lambda asked: (
            f"{not_noised(asked.strategy)}; use {_PRIVATE_STRATEGIES}, or dp=example"
        ),
    ),
    Rule(
        when=lambda asked: asked.config.dp_mechanism == "banded" and asked.traits.rebases,
        why=lambda asked: (
            f"dp-mechanism=banded takes back noise of earlier rounds, and that of {asked.subject} "
            f"lies along directions which are new in each round"
        ),
        instead="use dp-mechanism=gaussian, or ffa_lora",
    ),
)

_TRAINERS: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: (
            asked.config.local_epochs is not None and "zeroth_order" in asked.trainers
        ),
        why=lambda asked: "local-epochs is for first-order clients",
        instead="how many scalars a zeroth-order one sends must be known beforehand, use "
        "local-steps",
    ),
    Rule(
        when=lambda asked: (
            len(asked.strategy.trainers) > 1 and asked.trainers != set(asked.strategy.trainers)
        ),
        why=lambda asked: (
            f"{asked.subject} needs classes of clients with trainers "
            f"{' and '.join(asked.strategy.trainers)}, found "
            f"{' and '.join(sorted(asked.trainers))}"
        ),
        instead="set classes.NAME.trainer for at least two",
    ),
    Rule(
        when=lambda asked: asked.overfull,
        why=lambda asked: (
            f"local-steps {asked.overfull[0].local_steps} times queries "
            f"{asked.overfull[0].queries} is more than the 65536 scalars that an update holds"
        ),
        instead="lower one, and take more rounds",
    ),
    Rule(
        when=lambda asked: asked.misfits,
        why=lambda asked: (
            f"class {asked.misfits[0]} has trainer "
            f"{asked.config.classes[asked.misfits[0]].trainer}, but clients of {asked.subject} "
            f"train with {' or '.join(asked.strategy.trainers)}"
        ),
    ),
)

RULES = (*_STATE, *_LAYERS, *_CODECS, *_START, *_ROBUST, *_PRIVATE, *_TRAINERS)
"""Of several that apply, the first is told."""

_GATEWAYS: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.traits.keeps or asked.traits.mirrors or asked.traits.personal,
        why=lambda asked: (
            f"clients of {asked.subject} keep a state of their own from round to round"
        ),
    ),
    Rule(
        when=lambda asked: asked.up.needs_differences,
        why=lambda asked: "clients keep what codec top_k leaves out for a later round",
    ),
    Rule(
        when=lambda asked: asked.config.buffer,
        why=lambda asked: "buffer applies updates one by one, at times that are simulated",
    ),
    Rule(
        when=lambda asked: asked.config.selection == "weighted",
        why=lambda asked: "selection=weighted needs to know the examples of each client",
    ),
    Rule(
        when=lambda asked: asked.config.local_epochs is not None,
        why=lambda asked: (
            "local-epochs bounds the weight of an update by the examples of its client"
        ),
    ),
    Rule(
        when=lambda asked: asked.config.dp_sampling == "poisson",
        why=lambda asked: (
            "dp-sampling=poisson draws from all clients there are, also those that are away"
        ),
    ),
    Rule(
        when=lambda asked: (
            asked.config.dp == "client"
            and (asked.config.participations or asked.config.separation > 1)
        ),
        why=lambda asked: "participations and separation bar single clients for a while",
    ),
)


def refuse(config: RunConfig, strategy: Strategy) -> None:
    """Raises ConfigError for settings that the strategy does not go with."""
    if reason := refusal(RULES, Asked(config, strategy)):
        raise ConfigError(reason)


def refuse_gateways(config: RunConfig, strategy: Strategy) -> None:
    """Raises ConfigError for settings that gateways do not go with."""
    if reason := refusal(_GATEWAYS, Asked(config, strategy)):
        raise ConfigError(
            f"{reason}, and devices behind a gateway come and go: use another setting, or clients "
            f"of their own (corolla client)"
        )


def refuse_kept_updates(config: RunConfig) -> None:
    """Raises ConfigError for --keep-updates where updates may not be kept."""
    if config.dp == "client":
        raise ConfigError(
            "--keep-updates keeps what dp=client hides: the update of each client; leave it out"
        )


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
    if not _is_mean(strategy.aggregator()):
        return "what it adds up is not one mean over all clients, which noise could be put on"
    return ""


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


def _is_mean(aggregator: Aggregator) -> bool:
    """Returns whether an aggregator makes nothing of clients' updates but their mean."""
    if isinstance(aggregator, ByGroup):
        return all(map(_is_mean, aggregator.groups.values()))
    return type(aggregator) in (WeightedMean, SeedSums)  # a subclass may keep single updates


def _without_factors(strategy: Strategy | type[Strategy]) -> bool:
    """Returns whether a strategy can train other tensors than LoRA factors."""
    return strategy.full or registry.traits(strategy).dense


def _one_module(config: RunConfig, spec: LoraSpec) -> Params:
    """The smallest adapter of a rank: the form of updates follows from it."""
    a, b = torch.zeros(spec.rank, 1), torch.zeros(1, spec.rank)
    return {"m" + factors.A: a, "m" + factors.B: b} if config.kind.factors else {}
