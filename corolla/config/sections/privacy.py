"""Differential privacy: what is protected, by how much noise, and which settings undo it."""

from typing import Annotated, Literal

from pydantic import Field

from corolla.config.sections.defence import Defence
from corolla.config.sections.population import Population
from corolla.config.sections.rule import Rule
from corolla.config.sections.section import Fraction, Positive, key, within
from corolla.config.sections.training import Training


class Privacy(Defence, Training, Population):
    """A budget of privacy and the noise that keeps it."""

    dp: Literal["none", "example", "client"] = key(
        "none",
        "What differential privacy protects: nothing, each example (where rows have user_id, each "
        "user), or each client.",
        "client",
        beside="epsilon=8",
        against=(
            "epsilon=null",
            "robust=median",
            "buffer=2",
            "selection=weighted",
            "max_norm=10",
            "strategy=flora",
            "strategy=feddpa",
        ),
    )
    epsilon: Annotated[float, within("epsilon")] | None = key(
        None,
        "The privacy budget of the run, which noise is made for and no round exceeds.",
        8.0,
        effect="none; dp needs it or noise_multiplier",
        beside="dp=example",
        against=("dp=none", "noise_multiplier=1", "parameters=prompt"),
    )
    delta: Annotated[float, Field(gt=0, lt=0.1)] = key(
        1e-5,
        "The probability that epsilon may not hold: less than 1 in the number of examples, or "
        "clients.",
        1e-6,
        beside="dp=example epsilon=8",
        against=("dp=none epsilon=null",),
    )
    clip: Annotated[float, within("clip")] = key(
        1.0,
        "The L2 norm that one example's gradient, or one client's update, is clipped to.",
        0.5,
        beside="dp=client epsilon=8",
        against=("dp=none epsilon=null",),
    )
    noise_multiplier: Annotated[float, within("noise_multiplier")] | None = key(
        None,
        "The standard deviation of the noise on a sum, over clip, instead of epsilon.",
        1.0,
        effect="what epsilon asks for",
        beside="dp=client",
        against=("dp=none", "epsilon=8"),
    )
    clip_quantile: Fraction | None = key(
        None,
        "The quantile of the updates' norms that clip follows, from its given value on.",
        0.5,
        effect="none: clip stays as it is",
        beside="dp=client epsilon=8",
        against=("dp=example", "dp_mechanism=banded separation=2"),
    )
    dp_sampling: Literal["fixed", "poisson"] = key(
        "fixed",
        "How a cohort is drawn: of a fixed size, or each client by a secret coin, which makes "
        "privacy stronger.",
        "poisson",
        beside="dp=client epsilon=8",
        against=("dp=example", "participations=2", "dp_mechanism=banded separation=2"),
    )
    dp_mechanism: Literal["gaussian", "banded"] = key(
        "gaussian",
        "The noise of a round: independent, or banded, of which later rounds take a part back.",
        "banded",
        beside="dp=client epsilon=8 separation=2",
        against=("separation=1", "clip_quantile=0.5", "dp=example separation=1", "strategy=fedsvd"),
    )
    participations: Positive | None = key(
        None,
        "The number of rounds that one client may train in, which bounds the noise.",
        4,
        effect="all rounds",
        beside="dp=client epsilon=8",
        against=("dp=none epsilon=null", "dp_sampling=poisson"),
    )
    separation: Positive = key(
        1,
        "The number of rounds after which a client may train again.",
        2,
        beside="dp=client epsilon=8",
        against=("dp=example", "dp_sampling=poisson"),
    )


def _only_with(key: str, levels: tuple[str, ...]) -> Rule["Privacy"]:
    """Refuses a setting that is given where `dp` is none of the levels it is for."""
    name = key.replace("_", "-")
    return Rule(
        when=lambda run: (
            run.dp not in levels and getattr(run, key) != Privacy.model_fields[key].default
        ),
        why=lambda run: (
            f"{name}={getattr(run, key)} is for dp={' or dp='.join(levels)}, found dp={run.dp}"
        ),
        instead=f"add it, or leave {name} out",
    )


_BOTH, _CLIENT = ("example", "client"), ("client",)

SETTINGS: tuple[Rule[Privacy], ...] = (
    _only_with("epsilon", _BOTH),
    _only_with("delta", _BOTH),
    _only_with("clip", _BOTH),
    _only_with("noise_multiplier", _BOTH),
    _only_with("participations", _BOTH),
    _only_with("clip_quantile", _CLIENT),
    _only_with("dp_sampling", _CLIENT),
    _only_with("dp_mechanism", _CLIENT),
    _only_with("separation", _CLIENT),
    Rule(
        when=lambda run: run.epsilon and run.noise_multiplier,
        why=lambda run: (
            f"epsilon={run.epsilon:g} decides the noise, and so does noise-multiplier="
            f"{run.noise_multiplier:g}"
        ),
        instead="give one of them",
    ),
    Rule(
        when=lambda run: run.dp != "none" and not run.epsilon and not run.noise_multiplier,
        why=lambda run: (
            f"dp={run.dp} needs epsilon, the budget of the run, or noise-multiplier; found neither"
        ),
    ),
)

CLIENTS: tuple[Rule[Privacy], ...] = (
    Rule(
        when=lambda run: run.dp == "client" and run.robust != "none",
        why=lambda run: f"dp=client puts noise on a sum, and robust={run.robust} makes none",
        instead="clip bounds what a hostile client can do, leave robust out",
    ),
    Rule(
        when=lambda run: run.dp == "client" and run.buffer,
        why=lambda run: "dp=client counts rounds, each with its own cohort, and buffer has none",
        instead="leave buffer out",
    ),
    Rule(
        when=lambda run: run.dp == "client" and run.selection == "weighted",
        why=lambda run: "dp=client counts each client alike",
        instead="use selection=uniform",
    ),
    Rule(
        when=lambda run: run.dp == "client" and run.max_norm is not None,
        why=lambda run: (
            "dp=client clips updates instead of refusing them, for who is refused would tell of "
            "them"
        ),
        instead="leave max-norm out, clip does its work",
    ),
    Rule(
        when=lambda run: (
            run.dp_sampling == "poisson"
            and (run.dp_mechanism == "banded" or run.participations or run.separation > 1)
        ),
        why=lambda run: "dp=client with dp-sampling=poisson draws clients by chance alone",
        instead="leave participations, separation and dp-mechanism=banded out, or use "
        "dp-sampling=fixed",
    ),
    Rule(
        when=lambda run: run.dp_mechanism == "banded" and run.separation < 2,
        why=lambda run: (
            "dp=client with dp-mechanism=banded takes noise back over as many rounds as a client "
            "stays away"
        ),
        instead="set separation to 2 or more",
    ),
    Rule(
        when=lambda run: run.dp_mechanism == "banded" and run.clip_quantile is not None,
        why=lambda run: "dp=client with dp-mechanism=banded has one clip in all rounds",
        instead="leave clip-quantile out",
    ),
)

_EMBEDDINGS = ("embed", "wte", "wpe")
"""Parts of the names of layers whose input is numbers of tokens."""


def _embeddings(run: Privacy) -> list[str]:
    """The target modules that are embeddings."""
    modules = run.target_modules or ()
    return [name for name in modules if any(part in name.lower() for part in _EMBEDDINGS)]


EXAMPLES: tuple[Rule[Privacy], ...] = (
    Rule(
        when=lambda run: run.dp == "example" and run.kind.not_private,
        why=lambda run: (
            f"dp=example needs the gradient of each example, which parameters={run.parameters} "
            f"{run.kind.not_private}"
        ),
        instead="use parameters=lora",
    ),
    Rule(
        when=lambda run: run.dp == "example" and _embeddings(run),
        why=lambda run: (
            "dp=example needs the gradient of each example, which adapters of embeddings do not "
            "give"
        ),
        instead=lambda run: f"leave {', '.join(_embeddings(run))} out of target-modules",
    ),
)
