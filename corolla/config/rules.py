"""Which settings go together: unsafe or meaningless combinations are refused with the reason."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from corolla.aggregation import robust
from corolla.aggregation.sums import ByGroup, SeedSums, WeightedMean
from corolla.errors import ConfigError
from corolla.strategies import registry
from corolla.tensors import factors
from corolla.types import Aggregator, LoraSpec, Params, Size, Strategy, TrainerName

if TYPE_CHECKING:
    from corolla.config.run import RunConfig

_BOTH, _CLIENT = ("example", "client"), ("client",)
_OF_PRIVACY = {
    **dict.fromkeys(("epsilon", "delta", "clip", "noise_multiplier", "participations"), _BOTH),
    **dict.fromkeys(("clip_quantile", "dp_sampling", "dp_mechanism", "separation"), _CLIENT),
}
"""Setting → the values of dp with which it says something."""

_EMBEDDINGS = ("embed", "wte", "wpe")
"""Of layers whose input is numbers of tokens: parts of their names."""


def refuse(config: "RunConfig", strategy: Strategy) -> None:
    """Raises ConfigError for settings that the strategy does not go with."""
    if len(set(config.loras)) > 1 and not strategy.mixed_ranks:
        able = [n for n, c in registry.STRATEGIES.items() if c.mixed_ranks]
        raise ConfigError(
            f"strategy {config.strategy} needs one rank and alpha for all clients, found "
            f"ranks {[spec.rank for spec in config.loras]}, "
            f"alphas {[spec.alpha for spec in config.loras]}: use {' or '.join(able)}"
        )
    if config.buffer and not registry.traits(strategy).stale:
        known = registry.STRATEGIES.items()
        able = [name for name, cls in known if registry.traits(cls).stale]
        raise ConfigError(
            f"buffer applies updates made from older states, and those of strategy "
            f"{config.strategy} count only for the state they were made from (its base, phase "
            f"or directions change): use {' or '.join(able)}"
        )
    if config.parameters != "lora" and not _without_factors(strategy):
        known = registry.STRATEGIES.items()
        raise ConfigError(
            f"strategy {config.strategy} trains LoRA factors, found "
            f"parameters={config.parameters}: use "
            f"{' or '.join(name for name, cls in known if _without_factors(cls))}"
        )
    usable = registry.traits(strategy).optimizers
    if config.optimizer not in usable:
        raise ConfigError(
            f"strategy {config.strategy} is derived for {' or '.join(usable)}, found optimizer "
            f"{config.optimizer}: set optimizer={usable[0]} and its lr"
        )
    if registry.traits(strategy).personal and not config.eval_clients:
        raise ConfigError(
            f"strategy {config.strategy} has personal models, which clients evaluate and save: "
            f"found eval-clients=0, raise it"
        )
    _refuse_codecs(config, strategy)
    _refuse_start(config, strategy)
    used = {config.trainer_of(name) for name in config.classes or ("",)}
    _refuse_robust(config, strategy, used)
    refuse_private(config, strategy)
    if config.local_epochs is not None and "zeroth_order" in used:
        raise ConfigError(
            "local-epochs is for first-order clients: how many scalars a zeroth-order one "
            "sends must be known beforehand, use local-steps"
        )
    if len(strategy.trainers) > 1 and used != set(strategy.trainers):
        raise ConfigError(
            f"strategy {config.strategy} needs classes of clients with trainers "
            f"{' and '.join(strategy.trainers)}, found {' and '.join(sorted(used))}: set "
            f"classes.NAME.trainer for at least two"
        )
    for name in config.classes or ("",):
        own = config.of_class(name)
        if config.trainer_of(name) == "zeroth_order" and own.local_steps * own.queries > 1 << 16:
            raise ConfigError(
                f"local-steps {own.local_steps} times queries {own.queries} is more than the "
                f"65536 scalars that an update holds: lower one, and take more rounds"
            )
    for name, wanted in config.classes.items():
        if wanted.trainer and wanted.trainer not in strategy.trainers:
            raise ConfigError(
                f"class {name} has trainer {wanted.trainer}, but clients of strategy "
                f"{config.strategy} train with {' or '.join(strategy.trainers)}"
            )


def _refuse_codecs(config: "RunConfig", strategy: Strategy) -> None:
    """Raises ConfigError for codecs that are none, or would change what updates mean."""
    up, down, updates = config.uplink, config.downlink, registry.traits(strategy).updates
    given = f"strategy {config.strategy} sends {updates}"
    if updates == "scalars" and (config.codec or config.codec_down):
        raise ConfigError(f"{given}: there is nothing to compress, leave codec and codec-down out")
    if up.needs_differences and updates != "differences":
        raise ConfigError(f"{given}: codec top_k is for differences, where 0 means no change")
    if up.needs_differences and registry.traits(strategy).rebases:
        raise ConfigError(
            f"strategy {config.strategy} has new coordinates in each round: what codec top_k "
            f"leaves out cannot be added to a later update; use int8 or int4"
        )
    if up.lossy and not up.needs_differences and registry.traits(strategy).mirrors:
        raise ConfigError(
            f"strategy {config.strategy} sums up what its clients keep, so nothing may be lost on "
            f"the way: add top_k to codec, which sends the rest later, or use zstd alone"
        )
    if up.needs_factors and updates != "factors":
        able = [
            n for n, c in registry.STRATEGIES.items() if registry.traits(c).updates == "factors"
        ]
        raise ConfigError(
            f"{given}: codec rank keeps the products of factors, use {' or '.join(able)}"
        )
    if down.needs_factors or down.needs_differences or down.number == "int4":
        raise ConfigError(
            f"codec-down {', '.join(config.codec_down)}: a broadcast holds weights, not their "
            f"changes; use fp16, bf16 or int8, and zstd"
        )


def _refuse_robust(config: "RunConfig", strategy: Strategy, used: Collection[TrainerName]) -> None:
    """Raises ConfigError for a rule that does not fit the strategy or the size of its cohorts."""
    rule = config.robust
    if config.byzantine and rule not in robust.COUNTING:
        raise ConfigError(
            f"byzantine is for robust={' or '.join(robust.COUNTING)}, found robust={rule}"
        )
    if rule == "none":
        return
    if registry.traits(strategy).mirrors:
        raise ConfigError(
            f"robust={rule} does not fit strategy {config.strategy}: the server sums up what its "
            f"clients keep, and a rule would leave parts out"
        )
    likes = [
        strategy.update_like(_one_module(config, spec), Size(1, 1, scalars=1, trainer=trainer))
        for spec in set(config.loras)
        for trainer in used
    ]
    traits = registry.traits(strategy)
    reason = robust.refusal(rule, config.compared_in(strategy), traits, likes)
    if reason:
        raise ConfigError(f"robust={rule} does not fit strategy {config.strategy}: {reason}")
    size = config.buffer or config.cohort or min(8, config.clients or 8)
    hostile = robust.hostile(size, config.byzantine)
    if size < (needed := robust.least(rule, hostile)):
        raise ConfigError(
            f"robust={rule} needs {needed} clients a round where {hostile} may be hostile, "
            f"found {size}: raise cohort"
        )


def _one_module(config: "RunConfig", spec: LoraSpec) -> Params:
    """The smallest adapter of a rank: the form of updates follows from it."""
    a, b = torch.zeros(spec.rank, 1), torch.zeros(1, spec.rank)
    return {"m" + factors.A: a, "m" + factors.B: b} if config.parameters == "lora" else {}


def refuse_public(config: "RunConfig") -> None:
    """Raises ValueError for public rows without a use, or a start that cannot be made of them."""
    if config.start == "random":
        if config.public:
            raise ValueError(f"public={config.public} is for start=gradient: leave it out")
        return
    if not config.public:
        raise ValueError("start=gradient needs public=FILE.jsonl: rows that belong to no client")
    if config.public == config.data:
        raise ValueError("public rows belong to no client: found the file of the clients' data")
    if config.parameters != "lora" or config.quantization != "none":
        raise ValueError(
            f"start=gradient makes an adapter from gradients of the base: found parameters="
            f"{config.parameters}, quantization={config.quantization}"
        )


def refuse_privacy(config: "RunConfig") -> None:
    """Raises ValueError for settings of differential privacy that say nothing, or too much."""
    level = config.dp
    for key, levels in _OF_PRIVACY.items():
        value = getattr(config, key)
        if level not in levels and value != type(config).model_fields[key].default:
            raise ValueError(
                f"{key.replace('_', '-')}={value} is for dp={' or dp='.join(levels)}, "
                f"found dp={level}: add it, or leave {key.replace('_', '-')} out"
            )
    if level == "none":
        return
    if config.epsilon and config.noise_multiplier:
        raise ValueError(
            f"epsilon={config.epsilon:g} decides the noise, and so does noise-multiplier="
            f"{config.noise_multiplier:g}: give one of them"
        )
    if not config.epsilon and not config.noise_multiplier:
        raise ValueError(
            f"dp={level} needs epsilon, the budget of the run, or noise-multiplier; found neither"
        )
    for wrong, why in _PRIVATE[level](config):
        if wrong:
            raise ValueError(f"dp={level} {why}")


def _of_clients(config: "RunConfig") -> list[tuple[bool, str]]:
    banded, poisson = config.dp_mechanism == "banded", config.dp_sampling == "poisson"
    return [
        (
            config.robust != "none",
            f"puts noise on a sum, and robust={config.robust} makes none: clip bounds what a "
            f"hostile client can do, leave robust out",
        ),
        (
            bool(config.buffer),
            "counts rounds, each with its own cohort, and buffer has none: leave buffer out",
        ),
        (
            config.selection == "weighted",
            "counts each client alike: use selection=uniform",
        ),
        (
            config.max_norm is not None,
            "clips updates instead of refusing them, for who is refused would tell of them: leave "
            "max-norm out, clip does its work",
        ),
        (
            poisson and (banded or bool(config.participations) or config.separation > 1),
            "with dp-sampling=poisson draws clients by chance alone: leave participations, "
            "separation and dp-mechanism=banded out, or use dp-sampling=fixed",
        ),
        (
            banded and config.separation < 2,
            "with dp-mechanism=banded takes noise back over as many rounds as a client stays away: "
            "set separation to 2 or more",
        ),
        (
            banded and config.clip_quantile is not None,
            "with dp-mechanism=banded has one clip in all rounds: leave clip-quantile out",
        ),
    ]


def _of_examples(config: "RunConfig") -> list[tuple[bool, str]]:
    inputs = [m for m in config.target_modules or () if any(e in m.lower() for e in _EMBEDDINGS)]
    return [
        (
            config.parameters in ("prompt", "ia3"),
            f"needs the gradient of each example, which parameters={config.parameters} adds up "
            f"before anything can clip it: use parameters=lora",
        ),
        (
            bool(inputs),
            f"needs the gradient of each example, which adapters of embeddings do not give: leave "
            f"{', '.join(inputs)} out of target-modules",
        ),
    ]


_PRIVATE = {"client": _of_clients, "example": _of_examples}


def refuse_private(config: "RunConfig", strategy: Strategy) -> None:
    """Raises ConfigError for a strategy, or settings of its training, that dp does not go with."""
    if config.dp == "none":
        return
    if registry.traits(strategy).personal:
        raise ConfigError(
            f"dp={config.dp} forbids measuring models on clients' examples, and those of strategy "
            f"{config.strategy} are personal and measured there: use {_PRIVATE_STRATEGIES}"
        )
    if config.dp == "client" and (why := not_noised(strategy)):
        raise ConfigError(
            f"dp=client does not fit strategy {config.strategy}: {why}; use {_PRIVATE_STRATEGIES}, "
            f"or dp=example"
        )
    if config.dp_mechanism == "banded" and registry.traits(strategy).rebases:
        raise ConfigError(
            f"dp-mechanism=banded takes back noise of earlier rounds, and that of strategy "
            f"{config.strategy} lies along directions which are new in each round: use "
            f"dp-mechanism=gaussian, or ffa_lora"
        )


_PRIVATE_STRATEGIES = "ffa_lora, fed_sb, fedsvd, rolora, fedavg or seed_pool"


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


def _is_mean(aggregator: Aggregator) -> bool:
    """Whether the mean of clients' updates is all that it makes of them."""
    if isinstance(aggregator, ByGroup):
        return all(map(_is_mean, aggregator.groups.values()))
    return type(aggregator) in (WeightedMean, SeedSums)  # a subclass may keep single updates


def refuse_kept_updates(config: "RunConfig") -> None:
    """Raises ConfigError for --keep-updates where updates may not be kept."""
    if config.dp == "client":
        raise ConfigError(
            "--keep-updates keeps what dp=client hides: the update of each client; leave it out"
        )


def _refuse_start(config: "RunConfig", strategy: Strategy) -> None:
    """Raises ConfigError for a start that the strategy would not follow."""
    if config.start == "gradient" and not takes_start(strategy):
        known = registry.STRATEGIES.items()
        raise ConfigError(
            f"start=gradient is an adapter that the server hands out, and clients of strategy "
            f"{config.strategy} begin from another: use "
            f"{' or '.join(name for name, cls in known if takes_start(cls()))}"
        )


def refuse_gateways(config: "RunConfig", strategy: Strategy) -> None:
    """Raises ConfigError for settings that gateways do not go with."""
    traits = registry.traits(strategy)
    for wrong, why in (
        (
            traits.keeps or traits.mirrors or traits.personal,
            f"clients of strategy {config.strategy} keep a state of their own from round to round",
        ),
        (
            config.uplink.needs_differences,
            "clients keep what codec top_k leaves out for a later round",
        ),
        (
            bool(config.buffer),
            "buffer applies updates one by one, at times that are simulated",
        ),
        (
            config.selection == "weighted",
            "selection=weighted needs to know the examples of each client",
        ),
        (
            config.local_epochs is not None,
            "local-epochs bounds the weight of an update by the examples of its client",
        ),
        (
            config.dp_sampling == "poisson",
            "dp-sampling=poisson draws from all clients there are, also those that are away",
        ),
        (
            config.dp == "client" and bool(config.participations or config.separation > 1),
            "participations and separation bar single clients for a while",
        ),
    ):
        if wrong:
            raise ConfigError(
                f"{why}, and devices behind a gateway come and go: use another setting, or clients "
                f"of their own (corolla client)"
            )


def takes_start(strategy: Strategy) -> bool:
    """Whether first-order clients get the adapter that the strategy began from, at its scaling."""
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


def _without_factors(strategy: Strategy | type[Strategy]) -> bool:
    """Whether it can train other tensors than LoRA factors."""
    return strategy.full or registry.traits(strategy).dense
