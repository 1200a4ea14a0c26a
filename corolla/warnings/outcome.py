"""Warnings of a run, with what to do: settings that do harm, and results that are harmful.

Four verdicts are made of a run that has ended, from what run.json and metrics.jsonl hold:

- worse: the loss of the last model is above that of the base model by more than its standard error;
- diverging: the loss rose in three evaluations running and has not come back, or is not finite;
- noise: the noise of differential privacy is longer than the mean update in half of the rounds;
- drift: on rows of the key `drift` the margin of right answers is lower than the base model's, or
  the loss is higher, by a mean change whose 95 % interval over rows does not reach 0.

The loss is the held-out one with its standard error over rows (corolla.evaluation.scoring). Of
personal models it is the mean over clients on their own examples, with that over clients.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from corolla.config.run import RunConfig
from corolla.warnings import effects

VERDICTS = ("worse", "diverging", "noise", "drift")
"""Ids of warnings of a run that has ended; all others are told when it begins."""
_RISES = 3
"""Evaluations running, each with a higher loss, after which a run is said to diverge."""
_LESS = (
    "turn the adapter down with corolla edit (lines, scale or safe), train less, or add such rows; "
    "docs/after.md says what the numbers can show"
)
_PRIVACY = "docs/privacy.md says which strategies noise hurts least"


@dataclass(frozen=True)
class RunWarning:
    """Something that does not end a run and that its user should know."""

    id: str
    """One of VERDICTS, of a run that has ended; or, when it begins, columns, data, eps, experts,
    extended, layers, memory, no_effect, template or unbounded."""
    why: str
    instead: str
    """The advice on what to do about it; "" without any."""
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The sentence that is shown."""
        return f"{self.why}: {self.instead}" if self.instead else self.why

    def to_json(self) -> dict[str, Any]:
        """For run.json; a number that is not finite is null there."""
        finite = {name: x if math.isfinite(x) else None for name, x in self.numbers.items()}
        return {"id": self.id, "text": self.text, "numbers": finite}


@dataclass(frozen=True)
class Measured:
    """The losses of one run: before it, after each evaluation, and at its end."""

    what: str
    """The name of the loss in a sentence."""
    base: float | None
    course: Sequence[tuple[int, float]]
    """(round, loss) of each evaluation, the base model's first, as round 0."""
    final: float | None
    error: float | None
    """The standard error of `final`; None where one row or client was measured."""


def of_settings(config: RunConfig, deployed: bool = False) -> list[RunWarning]:
    """A warning for each setting that the run does not read (corolla.warnings.effects)."""
    return [
        RunWarning("no_effect", f"{idle.setting} has no effect ({idle.why})", idle.instead)
        for idle in effects.without_effect(config, deployed)
    ]


def outcome(
    config: RunConfig, info: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> list[RunWarning]:
    """The verdicts on a run that has ended; `info` and `lines` are run.json and metrics.jsonl."""
    losses = _personal(info, lines) if info["personal"] else _held_out(info, lines)
    found = [*_worse(config, losses), *_diverging(config, losses, lines), *_noise(config, lines)]
    return [*found, *drifted(info.get("drift", {}))]


def _held_out(info: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Measured:
    base, final = info["base"], info["final"]
    measured = [(line["round"], loss) for line in lines if (loss := line["eval_loss"]) is not None]
    course = [(0, base["loss"]), *measured]
    return Measured("held-out loss", base["loss"], course, final["loss"], final.get("loss_error"))


def _personal(info: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Measured:
    what, fair = "clients' mean loss on their own examples", info["fairness"]
    measured = [(line["round"], loss) for line in lines if (loss := line.get("personal_loss"))]
    if not fair:
        return Measured(what, None, measured, None, None)
    base, final = fair["base"]["mean"], fair["final"]["mean"]
    clients = fair["final"]["clients"]
    error = fair["final"]["std"] / math.sqrt(clients - 1) if clients > 1 else None
    return Measured(what, base, [(0, base), *measured], final, error)


def of_extension(config: RunConfig, before: Sequence[int]) -> list[dict[str, Any]]:
    """The warning, for run.json, of a run that was extended while its learning rate fell.

    `before`: the numbers of rounds that it was begun and gone on with.
    """
    first = next((rounds for rounds in before if rounds != config.rounds), None)
    if first is None or config.schedule == "constant":
        return []
    found = RunWarning(
        "extended",
        f"extended from {first} rounds to {config.rounds}: with schedule={config.schedule} the "
        f"learning rate fell over {first} rounds at first, so this is not the result of a run of "
        f"{config.rounds} rounds",
        "with schedule=constant it is",
        {"from": first, "to": config.rounds},
    )
    return [found.to_json()]


def _worse(config: RunConfig, losses: Measured) -> Iterator[RunWarning]:
    base, final, error = losses.base, losses.final, losses.error
    if base is None or final is None or not final - base > (error or 0.0):
        return
    more = "" if error is None else f", more than its standard error of {error:.2g}"
    yield RunWarning(
        "worse",
        f"worse than the base model: the {losses.what} is {final:.4g} after the run and "
        f"{base:.4g} before, {final - base:.2g} higher{more}",
        f"do not use this result; {_calmer(config)}",
        {"base": base, "final": final, **({} if error is None else {"error": error})},
    )


def _diverging(
    config: RunConfig, losses: Measured, lines: Sequence[Mapping[str, Any]]
) -> Iterator[RunWarning]:
    trained = [(line["round"], x) for line in lines if (x := line["train_loss"]) is not None]
    ends = [(lines[-1]["round"], losses.final)] if lines and losses.final is not None else []
    for what, course in (("training loss", trained), (losses.what, [*losses.course, *ends])):
        if broken := next((point for point in course if not math.isfinite(point[1])), None):
            yield RunWarning(
                "diverging",
                f"diverging: the {what} of round {broken[0]} is {broken[1]}",
                f"do not use this result; {_calmer(config)}",
                {"round": broken[0], "loss": broken[1]},
            )
            return
    if rise := _rise(losses.course, losses.error or 0.0):
        (first, low), (last, high) = rise
        yield RunWarning(
            "diverging",
            f"diverging: the {losses.what} rose from {low:.4g} to {high:.4g} in every evaluation "
            f"from round {first} to {last}, and has not come back",
            f"{_calmer(config)}, or end a run early with patience",
            {"from_round": first, "to_round": last, "from": low, "to": high},
        )


def _rise(
    course: Sequence[tuple[int, float]], error: float
) -> tuple[tuple[int, float], tuple[int, float]] | None:
    """(round, loss) at both ends of the last rise in three evaluations running; None without one.

    A loss that wavers about its lowest value rises three times running by chance every so often:
    what counts is that the end of the run is above the beginning of the rise by more than `error`.
    """
    found, start = None, 0
    for i, (before, after) in enumerate(itertools.pairwise(course), start=1):
        if not after[1] > before[1]:
            start = i
        elif i - start >= _RISES and course[-1][1] - course[start][1] > error:
            found = course[start], after
    return found


def _noise(config: RunConfig, lines: Sequence[Mapping[str, Any]]) -> Iterator[RunWarning]:
    rounds = [
        (line["noise_norm"], line["update_norm"])
        for line in lines
        if "noise_norm" in line and "update_norm" in line
    ]
    over = sum(noise > update for noise, update in rounds)
    if not over or 2 * over < len(rounds):
        return
    noise, update = (math.fsum(part) / len(rounds) for part in zip(*rounds, strict=True))
    most = " can be at most" if config.dp == "example" else ""
    yield RunWarning(
        "noise",
        f"noise: in {over} of {len(rounds)} rounds the noise of dp={config.dp} was longer than "
        f"the mean update{most}: norms of {noise:.2g} and {update:.2g} on average",
        f"ask more clients a round (cohort), train fewer values (a lower rank), "
        f"{'take larger batches, ' if config.dp == 'example' else ''}or allow more epsilon; "
        f"{_PRIVACY}",
        {"rounds": len(rounds), "over": over, "noise": noise, "update": update},
    )


def drifted(domains: Mapping[str, Mapping[str, Any]]) -> list[RunWarning]:
    """A warning for each domain, as corolla/drift/measure.py tells it, that tuning has harmed."""
    found = []
    for name, told in domains.items():
        margin, loss = told.get("margin_change", {}), told["forgetting"]
        if (high := margin.get("high")) is not None and high < 0:
            what, change, interval = "margin of right answers", margin["mean"], margin
        elif (low := loss["low"]) is not None and low > 0:
            what, change, interval = "loss", loss["mean"], loss
        else:
            continue
        found.append(
            RunWarning(
                "drift",
                f"drift: on {name} the {what} changed by {change:+.3g} "
                f"({interval['low']:+.3g} to {interval['high']:+.3g}, 95 % of {told['rows']} rows)",
                _LESS,
                {"mean": change, "low": interval["low"], "high": interval["high"]},
            )
        )
    return found


def _calmer(config: RunConfig) -> str:
    """Returns the advice by which a run does less harm."""
    calmer = f"lower lr (here {config.lr:g}), or take fewer local steps"
    if config.dp != "none":
        return f"{calmer}; or ask more clients a round, or allow more epsilon ({_PRIVACY})"
    return calmer
