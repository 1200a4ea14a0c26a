"""The steps of `corolla edit` as a user writes them: names, arguments, and what each does.

A step is NAME or NAME:ARGUMENT,ARGUMENT. Several are a line with spaces between them, a list of
such texts in JSON, or a file: FILE.json with that list, FILE.toml with it as `steps`. Nothing here
needs torch, so that the help of the command does not wait for it.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.errors import ConfigError


@dataclass(frozen=True)
class Argument:
    """One argument of a step: a number within bounds, a word, or the path of a model."""

    name: str
    kind: type = float
    default: Any = None
    """The value where none is given; `...` marks an argument that must be given."""
    above: float = -math.inf
    """The number must be more than this."""
    least: float = -math.inf
    most: float = math.inf
    words: Sequence[str] = ()
    """The words to choose from; empty for a number or a path."""

    def read(self, text: str) -> Any:
        """The value of a text. Raises ValueError with what was expected."""
        if self.words or self.kind is str:
            if self.words and text not in self.words:
                raise ValueError(f"{self.name} is {' or '.join(self.words)}, found {text!r}")
            return text
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        within = self.above < value and self.least <= value <= self.most
        if not (within and abs(value) < math.inf):
            raise ValueError(f"{self.name} is {self._expected()}, found {text!r}")
        return value

    def _expected(self) -> str:
        bounds = []
        if math.isfinite(self.above):
            bounds.append(f"above {self.above:g}")
        if math.isfinite(self.least):
            bounds.append(f"at least {self.least:g}")
        if math.isfinite(self.most):
            bounds.append(f"at most {self.most:g}")
        kind = "a whole number" if self.kind is int else "a number"
        return " ".join([kind, " and ".join(bounds)]) if bounds else kind


@dataclass(frozen=True)
class Form:
    """How a step is written, what it does, and what it makes of the number and rank of updates."""

    written: str
    does: str
    arguments: tuple[Argument, ...] = ()
    many: bool = False
    """True for a step of as many numbers as there are adapters."""
    combines: bool = False
    """True where several adapters become one."""
    full: bool = False
    """True where the product has full rank afterwards."""
    cuts: bool = False
    """True where the product has factors afterwards, whatever it was."""


def _density(name: str, default: Any = ...) -> Argument:
    return Argument(name, default=default, above=0.0, most=1.0)


_SEED = Argument("the seed", int, 0, least=0)

FORMS: Mapping[str, Form] = {
    "weights": Form(
        "weights[:W,W,…]",
        "the sum of the adapters, each times its weight; 1/n each unless given, negative to take "
        "away (task arithmetic)",
        (Argument("a weight"),),
        many=True,
        combines=True,
    ),
    "ties": Form(
        "ties[:DENSITY[,LAMBDA]]",
        "keep the largest values of each adapter (share 0.2), elect a sign for each place, average "
        "those that agree, times lambda (1); then rank or energy (TIES)",
        (_density("density", 0.2), Argument("lambda", default=1.0)),
        combines=True,
        full=True,
    ),
    "dare": Form(
        "dare:DENSITY[,SEED]",
        "of each adapter keep values at random, this share of them, divided by it; then weights or "
        "ties where there are several, then rank or energy (DARE)",
        (_density("density"), _SEED),
        full=True,
    ),
    "scale": Form("scale:X", "times x; negative to undo", (Argument("x", default=...),)),
    "lines": Form(
        "lines:ALPHA[,BETA]",
        "block l of L times alpha + beta l / (L - 1), so that early blocks move less; beta is "
        "1 - alpha unless given; modules outside of blocks times alpha (LiNeS)",
        (Argument("alpha", default=..., least=0.0), Argument("beta")),
    ),
    "reset": Form(
        "reset[:SHARE[,SEED]]",
        "set this share (0.5) of the modules to zero, drawn at random (half fine-tuning)",
        (Argument("the share", default=0.5, least=0.0, most=1.0), _SEED),
    ),
    "intruders": Form(
        "intruders[:K[,EPS[,LAMBDA]]]",
        "of base + adapter, the singular directions among the first k (10) with a cosine below eps "
        "(0.5) to all of the base, times lambda (0.75): 1 leaves them, 0 takes them out",
        (
            Argument("k", int, 10, least=1),
            Argument("eps", default=0.5, least=0.0, most=1.0),
            Argument("lambda", default=0.75, least=0.0, most=1.0),
        ),
    ),
    "safe": Form(
        "safe:UNALIGNED,ALIGNED[,TAU[,published]]",
        "project onto the directions in which two models differ, where the cosine to the "
        "projection is below tau (0.5); published: the paper's formula, which also shrinks "
        "(Safe LoRA)",
        (
            Argument("the unaligned model", str, ...),
            Argument("the aligned model", str, ...),
            Argument("tau", default=0.5, least=-1.0, most=1.0),
            Argument("the last argument", str, "", words=("published",)),
        ),
    ),
    "balance-head": Form(
        "balance-head",
        "give all rows of a classifier's head the same length, their mean one: for heads trained "
        "on skewed labels (FedLoGe)",
    ),
    "rank": Form(
        "rank[:R]",
        "the best adapter of rank R by SVD, and its error; R is the largest of the adapters unless "
        "given",
        (Argument("the rank", int, None, least=1),),
        cuts=True,
    ),
    "energy": Form(
        "energy:E",
        "of each module the smallest rank that keeps this share of the squared singular values",
        (_density("the share"),),
        cuts=True,
    ),
}
"""Name of a step → its form, in the order of the help."""


@dataclass(frozen=True)
class Step:
    """One step as it was asked for."""

    name: str
    values: Sequence[Any]

    @property
    def form(self) -> Form:
        """How such steps are written, and what they do."""
        return FORMS[self.name]


def explained() -> str:
    """Returns the help of all steps, a line each."""
    return "\n\n".join(f"{form.written} - {form.does}." for form in FORMS.values())


def texts(given: str) -> list[str]:
    """The steps of a line, of a list in JSON, or of a .toml or .json file, one text each.

    Raises ConfigError for what is none of these.
    """
    found: Any
    path = Path(given)
    try:
        if given.lstrip().startswith("["):
            found = json.loads(given)
        elif path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".toml":
            found = tomllib.loads(path.read_text(encoding="utf-8"))["steps"]
        else:
            found = given.split()
    except KeyError as error:
        raise ConfigError(f"--steps {given}: expected a list `steps` in it, found none") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--steps {given} cannot be read: {error}") from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ConfigError(f"--steps: expected a list of texts such as rank:8, found {found!r}")
    if not found:
        raise ConfigError("--steps is empty: name at least one step, such as rank:8")
    return found


def read(given: str, adapters: int) -> list[Step]:
    """The steps that are asked for of so many adapters.

    Raises ConfigError for one that is not known, has other arguments, or does not fit the others.
    """
    steps = [_step(text) for text in texts(given)]
    left, full = adapters, ""
    for step in steps:
        if step.form.many and step.values and len(step.values) != left:
            raise ConfigError(
                f"--steps {step.name} has {len(step.values)} weights for {left} adapters: "
                f"give one each"
            )
        left = 1 if step.form.combines else left
        full = step.name if step.form.full else "" if step.form.cuts else full
    if left > 1:
        raise ConfigError(
            f"--steps leaves {left} adapters apart: say how they become one, with weights or ties"
        )
    if full:
        raise ConfigError(
            f"--steps: {full} makes matrices of full rank, which are no adapter: add rank:R or "
            f"energy:E after it"
        )
    return steps


def _step(text: str) -> Step:
    name, mark, rest = text.partition(":")
    form = FORMS.get(name)
    if form is None:
        raise ConfigError(f"--steps {text}: no such step, there are {', '.join(FORMS)}")
    given = rest.split(",") if mark else []
    arguments = form.arguments * max(1, len(given)) if form.many else form.arguments
    if len(given) > len(arguments):
        raise ConfigError(f"--steps {text}: expected {form.written}")
    try:
        values = [own.read(value) for own, value in zip(arguments, given, strict=False)]
    except ValueError as error:
        raise ConfigError(f"--steps {text}: {error}") from error
    if form.many:
        return Step(name, values)
    left = [own.default for own in arguments[len(given) :]]
    if ... in left:
        raise ConfigError(f"--steps {text}: expected {form.written}")
    return Step(name, [*values, *left])
