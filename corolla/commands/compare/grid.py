"""The grid of a comparison: methods, each a strategy with its settings, learning rates and seeds.

All of a method's learning rates are tried at the first seed; the best, by the loss on every second
of the clients' own examples, is run with the other seeds. With differential privacy each method has
one learning rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.commands.compare import contenders
from corolla.commands.compare.contenders import Baseline, Contender
from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.strategies.listing import files, registry

FACTORS = (1 / 3, 1.0, 3.0)
"""Learning rates that are tried without --lrs, relative to each strategy's usual one."""
QUICK = {"cohort": 4, "eval_examples": 64, "eval_client_examples": 4}
"""With the embedded model, unless given: six strategies take less than half an hour on 2 cores."""


@dataclass(frozen=True)
class Method:
    """A strategy with its settings and the learning rates to try."""

    label: str
    config: RunConfig
    lrs: tuple[float, ...]
    file_name: str = ""
    """The beginning of the names of its cells; "": its label."""
    baseline: Baseline | None = None

    def describe(self) -> dict[str, Any]:
        """Returns the entry of a method in results.

        Its strategy, what it aggregates, how clients train.
        """
        cls = registry.find(self.config.strategy)
        approximate = self.config.robust != "none" or self.config.uplink.lossy
        return {
            "label": self.label,
            "strategy": registry.label(self.config.strategy),
            "personal": registry.traits(cls).personal,
            "baseline": self.baseline,
            "file_name": self.file_name or self.label,
            "aggregates": "other" if approximate else cls.aggregates,
            "trainers": list(cls.trainers),
        }

    def cell(self, lr: float, seed: int) -> str:
        """The name of a cell, also of its files."""
        return f"{self.file_name or self.label}-{lr:g}-{seed}"


@dataclass(frozen=True)
class Job:
    """A cell to run. `keep`: its updates are kept until the aggregation error is measured."""

    method: Method
    lr: float
    seed: int
    keep: bool

    @property
    def name(self) -> str:
        return self.method.cell(self.lr, self.seed)

    @property
    def config(self) -> RunConfig:
        return self.method.config.model_copy(update={"lr": self.lr, "seed": self.seed})


@dataclass(frozen=True)
class ComparisonGrid:
    """The methods and seeds that are compared: all that decides the numbers, as in compare.json."""

    methods: tuple[Method, ...]
    seeds: tuple[int, ...]

    def search(self, method: Method) -> list[Job]:
        """All learning rates at the first seed: the same number for every method."""
        return [self._job(method, lr, self.seeds[0]) for lr in method.lrs]

    def others(self, method: Method, lr: float) -> list[Job]:
        """The other seeds; the first one's run is that of the search."""
        return [self._job(method, lr, seed) for seed in self.seeds[1:]]

    def cells(self) -> int:
        """How many runs this is when none fails."""
        return sum(len(m.lrs) + len(self.seeds) - 1 for m in self.methods)

    def to_json(self) -> dict[str, Any]:
        methods = [
            {
                "label": m.label,
                "lrs": list(m.lrs),
                "config": m.config.model_dump(mode="json"),
                "file": files.digest(m.config.strategy),
            }
            for m in self.methods
        ]
        return {"methods": methods, "seeds": list(self.seeds)}

    def _job(self, method: Method, lr: float, seed: int) -> Job:
        config = method.config
        kept = config.kind.factors and not config.buffer and config.dp != "client"
        keep = seed == self.seeds[-1] and kept and not method.baseline
        return Job(method, lr, seed, keep)


def make_grid(
    names: Sequence[str | Contender],
    file: Path | None = None,
    options: Mapping[str, object] | None = None,
    settings: Sequence[str] = (),
    *,
    seeds: int = 3,
    lrs: Sequence[float] = (),
    jobs: int = 0,
) -> ComparisonGrid:
    """The comparison that a command line asks for. Raises ConfigError for what makes no sense.

    `names` are contenders, or what they are called (see contenders.py). With `jobs` other than 1
    every cell gets one thread, unless `threads` is given.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: expected at least 1; 3 give a verdict")
    if any(not 0 < lr < float("inf") for lr in lrs) or len({f"{lr:g}" for lr in lrs}) < len(lrs):
        raise ConfigError(f"--lrs {', '.join(map(str, lrs))}: expected different positive numbers")
    if jobs < 0:
        raise ConfigError(f"--jobs {jobs}: expected 1 or more; 0 is as many as cores")
    named = [own if isinstance(own, Contender) else contenders.contender(own) for own in names]
    if not any(own.baseline is None for own in named):
        raise ConfigError(f"name strategies to compare: {', '.join(registry.STRATEGIES)}")
    labels = [own.label for own in named]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(
            f"{twice} is named twice: each once, with other settings or classes of other names"
        )
    configs = [_config(own, file, options or {}, settings, jobs) for own in named]
    alone = [own.label for own in named if own.baseline]
    if alone and any(config.dp == "client" for config in configs):
        raise ConfigError(f"--with {alone[0]}: dp=client protects one client among others")
    own_models = [registry.traits(registry.find(c.strategy)).personal for c in configs]
    if any(own_models):  # all are measured on clients that train, as personal models have to be
        participants = {"eval_participants": True}
        configs = [
            config if personal else config.model_copy(update=participants)
            for config, personal in zip(configs, own_models, strict=True)
        ]
    tried = _rates(named, configs, lrs)
    if configs[0].eval_clients < 1:
        raise ConfigError("eval-clients=0 leaves no clients whose examples choose the lr: raise it")
    files_of = contenders.file_names(labels)
    methods = [
        Method(own.label, config, rates, files_of[own.label], own.baseline)
        for own, config, rates in zip(named, configs, tried, strict=True)
    ]
    first = configs[0].seed
    return ComparisonGrid(tuple(methods), tuple(range(first, first + seeds)))


def _config(
    own: Contender,
    file: Path | None,
    options: Mapping[str, object],
    settings: Sequence[str],
    jobs: int,
) -> RunConfig:
    """The settings of a contender, its own before those of all, and those of a comparison."""
    common = {key: value for key, value in options.items() if key not in own.keys}
    common |= {"strategy": own.strategy}
    given = [*contenders.of_others(settings, own.strategy), *own.settings]
    config = load(file, common, given)
    changes: dict[str, Any] = {}
    if config.model == config.data == "embedded":
        changes = {key: value for key, value in QUICK.items() if key not in config.model_fields_set}
        if config.dp != "none":  # nothing is measured on clients' examples
            del changes["eval_client_examples"]
        if "cohort" in changes and config.clients:
            changes["cohort"] = min(changes["cohort"], config.clients)
    if jobs != 1 and not config.threads:
        changes["threads"] = 1
    return config.model_copy(update=changes)


def _rates(
    named: Sequence[Contender], configs: Sequence[RunConfig], lrs: Sequence[float]
) -> list[tuple[float, ...]]:
    """The learning rates to try, as many for each; one where clients' examples may not choose.

    Raises ConfigError for rates that are given twice, or may not be tried.
    """
    own = next((c for c in named if lrs and "lr" in c.keys), None)
    if own:
        raise ConfigError(f"--lrs names the rates of all, {own.label} one of its own: give one")
    private = next((config.dp for config in configs if config.dp != "none"), None)
    if private and len(lrs) > 1:
        raise ConfigError(
            f"--lrs {', '.join(f'{lr:g}' for lr in lrs)}: with dp={private} clients' examples may "
            f"not choose one, for no epsilon counts that: give one, or leave --lrs out for each "
            f"strategy's usual one"
        )
    factors = (1.0,) if private else FACTORS
    return [tuple(lrs) or tuple(float(f"{c.lr * f:.3g}") for f in factors) for c in configs]


def learning_rates(text: str) -> list[float]:
    """'1e-3,3e-3' → [0.001, 0.003]. Raises ConfigError."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"--lrs {text!r}: expected numbers between commas") from error
