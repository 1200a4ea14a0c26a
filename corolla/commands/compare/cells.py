"""The cells of a comparison, read from the folders of their runs: points, costs and evidence."""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.errors import ArtefactError
from corolla.models.files import adapter_files
from corolla.server.runs import journal
from corolla.tensors import factors
from corolla.types import Params

_BY_CHANCE = "drawn by secret chance"
"""Stands for the members of a cohort where they may not be told."""
_WORK = ("local_steps", "local_epochs", "batch_size", "queries", "classes")
"""Settings that decide, with the trainers, how clients work."""


@dataclass(frozen=True)
class Point:
    """A global model on its way: after `round` rounds, at what price, how good."""

    round: int
    bytes: float
    """Up and down so far, mean over all clients of the federation."""
    seconds: float
    loss: float


@dataclass(frozen=True)
class Cell:
    """One finished run. `loss` is that of its last point; `own_loss` the mean over clients.

    The latter is of the half of each client's own examples that chooses nothing.
    """

    method: str
    lr: float
    seed: int
    personal: bool
    pooled: bool
    """True where one client had the rows of all: it and nobody else was drawn and measured."""
    points: Sequence[Point]
    accuracy: float
    own_loss: float | None
    choosing_loss: float | None
    """The mean over clients on the other half, by which learning rates are chosen."""
    peak_rss: int
    bytes_up: float
    bytes_down: float
    dropped: int
    simulated: bool
    """True where seconds are simulated ones."""
    evidence: Mapping[str, Any]
    work: Sequence[Any]
    """How clients train: trainers, steps, batch size. Who works alike reads the same tokens."""
    tokens: Sequence[float | None]
    """Target tokens that the cohort trained on, per round; None with differential privacy."""
    epsilon: float | None = None
    """Spent in all; None without differential privacy."""
    cpu_seconds: float | None = None
    beside: bool = False
    """True where another cell ran at the same time: its seconds are from a shared machine."""
    served: Mapping[str, Any] | None = None
    """Ranks and bytes of adapter/ and served/, as run.json has them; None without factors."""
    warnings: Sequence[Mapping[str, Any]] = ()
    """The warnings of the run, as its run.json has them."""
    aggregation_errors: Sequence[float] | None = None
    initial_sha256: str | None = None

    @property
    def loss(self) -> float:
        return self.points[-1].loss


def read_cell(folder: Path, method: Mapping[str, Any], costs: Mapping[str, Any]) -> Cell:
    """A run's folder as a cell; `costs` is what was measured outside of it.

    `method` has its label, whether it is personal, and its trainers.

    Raises ArtefactError when it is not that of a finished run.
    """
    try:
        info = json.loads((folder / "run.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return _cell(info, lines, _planned(folder, info["config"]), method, costs)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ArtefactError(f"{folder} is no finished run: {error!r}") from error


def _cell(
    info: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    plans: Mapping[int, list[str]] | None,
    method: Mapping[str, Any],
    costs: Mapping[str, Any],
) -> Cell:
    config, personal = info["config"], method["personal"]
    clients = info["clients"]
    pooled = config["pooled"]
    own = _mean(clients, "final", "loss_reported")
    if personal and own is None:
        raise ArtefactError(
            "clients have too few examples of their own to choose a rate by some and report "
            "others: raise eval-fraction, eval-clients or eval-client-examples"
        )
    clock = "sim_seconds" if all("sim_seconds" in line for line in lines) else "seconds"
    key = "personal_loss_reported" if personal else "eval_loss"
    before = _mean(clients, "base", "loss_reported") if personal else None
    first = info["base"]["loss"] if before is None else before
    points, sent, passed = [Point(0, 0.0, 0.0, first)], 0.0, 0.0
    for line in lines:
        sent += (line["bytes_up"] + line["bytes_down"]) / info["num_clients"]
        passed += line[clock]
        if line.get(key) is not None:
            points.append(Point(line["round"], sent, passed, line[key]))
    return Cell(
        method=method["label"],
        lr=config["lr"],
        seed=config["seed"],
        personal=personal,
        pooled=pooled,
        points=points,
        accuracy=info["final"]["accuracy"],
        own_loss=None if pooled else own,
        choosing_loss=_mean(clients, "final", "loss_choosing"),
        peak_rss=info["peak_rss"],
        bytes_up=info["bytes_up"] / info["num_clients"],
        bytes_down=info["bytes_down"] / info["num_clients"],
        dropped=sum(line.get("dropped", 0) for line in lines),
        simulated=clock == "sim_seconds",
        evidence=_evidence(info, lines, plans),
        work=[method["trainers"], *(config[k] for k in _WORK)],
        tokens=[line.get("target_tokens") for line in lines],
        epsilon=info.get("privacy", {}).get("epsilon"),
        served=info.get("served"),
        warnings=info["warnings"],
        **costs,
    )


def _mean(clients: Mapping[str, Any], when: str, name: str) -> float | None:
    """The mean of a loss over the clients that were measured then; None where none was."""
    known = [scores[when][name] for scores in clients.values() if name in scores[when]]
    return statistics.fmean(known) if known else None


def _evidence(
    info: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    plans: Mapping[int, list[str]] | None,
) -> dict[str, Any]:
    """Returns the facts that must be the same for all methods at one seed."""
    cohorts = _cohorts(lines) if plans is None else [plans.get(line["round"]) for line in lines]
    clients = {
        name: (scores["base"].get("examples"), round(scores["base"].get("loss", 0.0), 4))
        for name, scores in info["clients"].items()
    }
    return {
        "model": info["model_sha256"],
        "data": info["data_sha256"],
        "partition": digest([info["num_clients"], clients]),
        "base model's loss": round(info["base"]["loss"], 4),
        "cohorts": [digest(members) if members else None for members in cohorts],
    }


def _cohorts(lines: Sequence[Mapping[str, Any]]) -> list[list[str] | None]:
    """Returns the clients asked in each round; None where the line does not tell all of them."""
    told = [sorted({*line.get("client_loss", {}), *line.get("dropped_why", {})}) for line in lines]
    asked = [line["clients"] + line.get("dropped", 0) for line in lines]
    return [own if len(own) == n else None for own, n in zip(told, asked, strict=True)]


def _planned(folder: Path, config: Mapping[str, Any]) -> dict[int, list[str]] | None:
    """The cohorts as the journal has them: with differential privacy the lines do not tell.

    Those drawn by secret chance differ, and have to: they all stand for the same draw.
    """
    if config.get("dp", "none") == "none":
        return None
    plans = journal.past(journal.read(folder)).plans
    secret = config["dp_sampling"] == "poisson"
    return {n: [_BY_CHANCE] if secret else sorted(plan["cohort"]) for n, plan in plans.items()}


def digest(value: object) -> str:
    """The sha256 of a value as JSON: short evidence that two are equal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def aggregation_errors(folder: Path) -> list[float] | None:
    """Per round, how far the new global effective update is from the clients' weighted mean.

    ‖ΔW - Σ p_m ΔW_m‖ / ‖Σ p_m ΔW_m‖ in the Frobenius norm over all adapted modules, all relative to
    the base model, p_m by examples; from the files of --keep-updates, without a dense matrix. None
    without such files, and where magnitudes are in the weights as well, which need the base.
    """
    rounds = sorted((folder / "updates").glob("round-*"))
    if not rounds or _of_dora(folder / "global" / rounds[0].name):
        return None
    return [_error(path, folder / "global" / path.name) for path in rounds]


def _of_dora(adapter: Path) -> bool:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return bool(config.get("use_dora"))


def _error(round: Path, after: Path) -> float:
    parts: list[Params] = []
    for note in sorted(round.glob("*/update.json")):
        weight = json.loads(note.read_text()).get("weight")
        if weight is not None:  # None: the reply was not accepted
            update, _ = adapter_files.read_adapter(note.parent)
            parts.append(factors.bake(update, weight))
    return factors.distance(adapter_files.read_adapter(after)[0], factors.stack(parts))
