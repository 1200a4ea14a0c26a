"""Which settings go with which strategy: what would be unsafe or mean nothing is refused."""

import math

from corolla.aggregation import robust
from corolla.config import codecs, sums
from corolla.config.asked import (
    Asked,
    able,
    not_noised,
    takes_magnitudes,
    takes_other_places,
    takes_parts,
    takes_patterns,
    takes_start,
    without_factors,
)
from corolla.config.run import RunConfig
from corolla.config.sections.rule import Rule, refusal
from corolla.errors import ConfigError
from corolla.interfaces import Choosing, Stacking, Strategy
from corolla.strategies.listing import registry

_STATE: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.config.new_tokens and asked.traits.personal,
        why=lambda asked: f"{asked.subject} has no mean of rows of new-tokens: clients keep them",
        instead=lambda asked: f"use {able(lambda cls: not registry.traits(cls).personal)}",
    ),
    Rule(
        when=lambda asked: len(set(asked.config.loras)) > 1 and not asked.strategy.mixed_ranks,
        why=lambda asked: (
            f"{asked.subject} needs one rank and alpha for all clients, found "
            f"ranks {[spec.rank for spec in asked.config.loras]}, "
            f"alphas {[spec.alpha for spec in asked.config.loras]}"
        ),
        instead=lambda asked: f"use {able(lambda cls: cls.mixed_ranks)}",
    ),
    Rule(
        when=lambda asked: asked.config.buffer and not asked.traits.stale,
        why=lambda asked: (
            f"buffer applies updates made from older states, and those of {asked.subject} count "
            f"only for the state they were made from (its base, phase or directions change)"
        ),
        instead=lambda asked: f"use {able(lambda cls: registry.traits(cls).stale)}",
    ),
    Rule(
        when=lambda asked: not asked.config.kind.factors and not without_factors(asked.strategy),
        why=lambda asked: (
            f"{asked.subject} trains LoRA factors, found parameters={asked.config.parameters}"
        ),
        instead=lambda asked: f"use {able(without_factors)}",
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
        when=lambda asked: asked.config.regrow and takes_other_places(asked),
        why=lambda asked: f"regrow={asked.config.regrow} exchanges places between rounds",
        instead=takes_other_places,
    ),
    Rule(
        when=lambda asked: asked.config.partial and not asked.config.kind.factors,
        why=lambda asked: "classes.NAME.layers are those of LoRA adapters",
        instead=lambda asked: f"parameters={asked.config.parameters} has none",
    ),
    Rule(
        when=lambda asked: asked.config.partial and isinstance(asked.strategy, Choosing),
        why=lambda asked: f"{asked.subject} says by itself which blocks clients train in a round",
        instead="leave classes.NAME.layers out, or set layers for the run",
    ),
    Rule(
        when=lambda asked: asked.config.partial and not takes_parts(asked.strategy),
        why=lambda asked: (
            f"in {asked.subject} a block that clients of a class do not train is not the same as "
            f"no change of it"
        ),
        instead=lambda asked: f"use {able(takes_parts)}",
    ),
    Rule(
        when=lambda asked: (
            asked.config.partial
            and asked.traits.partial == "sent"
            and len({spec.rank for spec in asked.config.loras}) > 1
        ),
        why=lambda asked: (
            f"clients of {asked.subject} with a smaller rank hold a cut model, which would count "
            f"for blocks that they do not train"
        ),
        instead="leave classes.NAME.layers out, or give all clients one rank",
    ),
    Rule(
        when=lambda asked: asked.config.budgeted and "zeroth_order" in asked.trainers,
        why=lambda asked: "budget is a share of a backward pass, and of what it trains",
        instead="clients without gradients have none: set layers",
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

_RANKS: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.config.dora and not takes_magnitudes(asked.strategy),
        why=lambda asked: (
            f"dora divides by the lengths of W + s B A, and {asked.subject} reckons with B A alone"
        ),
        instead=lambda asked: f"use {able(takes_magnitudes)}",
    ),
    Rule(
        when=lambda asked: asked.config.patterned and not takes_patterns(asked.strategy),
        why=lambda asked: (
            f"rank-pattern and alpha-pattern give modules ranks and scalings of their own, and "
            f"{asked.subject} reckons with one for all"
        ),
        instead=lambda asked: f"use {able(takes_patterns)}",
    ),
    Rule(
        when=lambda asked: asked.config.patterned and len(set(asked.config.loras)) > 1,
        why=lambda asked: "rank-pattern and alpha-pattern are those of all clients",
        instead="leave the ranks and alphas of clients out",
    ),
    Rule(
        when=lambda asked: (
            isinstance(asked.strategy, Stacking)
            and takes_start(asked.strategy)
            and (asked.config.max_rank or math.inf) < asked.config.lora.rank
        ),
        why=lambda asked: (
            f"clients of {asked.subject} go on with an adapter of rank {asked.config.lora.rank}, "
            f"which is more than max-rank={asked.config.max_rank}"
        ),
        instead="raise max-rank, or lower rank",
    ),
)

_START: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.config.start != "random" and not takes_start(asked.strategy),
        why=lambda asked: (
            f"start={asked.config.start} is an adapter that the server hands out, and clients of "
            f"{asked.subject} begin from another"
        ),
        instead=lambda asked: f"use {able(lambda cls: takes_start(cls()))}",
    ),
    Rule(
        when=lambda asked: (
            (wanted := asked.config.begins.frozen)
            and asked.frozen not in (("A", "B") if wanted == "either" else (wanted,))
        ),
        why=lambda asked: f"start={asked.config.start} makes a factor that must not be trained",
        instead=lambda asked: (
            "use strategy=ffa_lora"
            + (" strategy.train=A" if asked.config.begins.frozen == "B" else "")
        ),
    ),
    Rule(
        when=lambda asked: (
            asked.frozen == "B"
            and asked.config.begins.zero == "B"
            and asked.config.start != "random"
        ),
        why=lambda asked: f"start={asked.config.start} leaves B at zero, and train=A keeps it",
        instead="use strategy.train=B",
    ),
    Rule(
        when=lambda asked: asked.config.begins.offset and asked.unfit_for_offset,
        why=lambda asked: f"start={asked.config.start} takes a part out of the base",
        instead=lambda asked: asked.unfit_for_offset,
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

_HARDEST: tuple[Rule[Asked], ...] = (
    Rule(
        when=lambda asked: asked.config.keep_hardest and asked.config.dp != "none",
        why=lambda asked: (
            f"keep-hardest chooses by what examples are, which no epsilon of dp={asked.config.dp} "
            f"covers"
        ),
        instead="leave it out",
    ),
    Rule(
        when=lambda asked: asked.config.keep_hardest and "zeroth_order" in asked.trainers,
        why=lambda asked: "keep-hardest is for first-order clients",
        instead="to score is a part of the work of zeroth-order ones: leave it out",
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

RULES = (
    *(*_STATE, *_RANKS, *_LAYERS, *codecs.SQUARES, *codecs.CODECS, *_START, *_ROBUST, *_PRIVATE),
    *(*_HARDEST, *_TRAINERS, *sums.SECURE),
)
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
        when=lambda asked: asked.config.secure_sum,
        why=lambda asked: "members of a secure sum have keys of their own",
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
    if config.secure_sum:
        raise ConfigError(
            "--keep-updates keeps what secure-sum=true hides: the update of each client; leave it "
            "out"
        )
    if config.dp == "client":
        raise ConfigError(
            "--keep-updates keeps what dp=client hides: the update of each client; leave it out"
        )
