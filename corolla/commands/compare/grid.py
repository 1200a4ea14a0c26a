"""The grid of a comparison: methods, each a strategy with its settings, learning rates and seeds.

All of a method's learning rates are tried at the first seed; the best, by the loss on the clients'
own validation examples, is run with the other seeds. With differential privacy each method has one
learning rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from corolla.config.load import load
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.strategies import files, registry

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

    def describe(self) -> dict[str, Any]:
        """What results say of the method: its strategy, what it aggregates, how clients train."""
        cls = registry.find(self.config.strategy)
        approximate = self.config.robust != "none" or self.config.uplink.lossy
        return {
            "label": self.label,
            "strategy": self.config.strategy,
            "personal": registry.traits(cls).personal,
            "aggregates": "other" if approximate else cls.aggregates,
            "trainers": list(cls.trainers),
        }


@dataclass(frozen=True)
class Job:
    """A cell to run. `keep`: its updates are kept until the aggregation error is measured."""

    method: Method
    lr: float
    seed: int
    keep: bool

    @property
    def name(self) -> str:
        return f"{self.method.label}-{self.lr:g}-{self.seed}"

    @property
    def config(self) -> RunConfig:
        return self.method.config.model_copy(update={"lr": self.lr, "seed": self.seed})


@dataclass(frozen=True)
class ComparisonGrid:
    """What is compared: everything that decides the numbers, and what stands in compare.json."""

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
        keep = seed == self.seeds[-1] and kept
        return Job(method, lr, seed, keep)


def make_grid(
    names: Sequence[str],
    file: Path | None = None,
    options: Mapping[str, object] | None = None,
    settings: Sequence[str] = (),
    *,
    seeds: int = 3,
    lrs: Sequence[float] = (),
    jobs: int = 0,
) -> ComparisonGrid:
    """The comparison that a command line asks for. Raises ConfigError for what makes no sense.

    With `jobs` other than 1 every cell gets one thread, unless `threads` is given.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: expected at least 1; 3 give an interval")
    if any(not 0 < lr < float("inf") for lr in lrs) or len({f"{lr:g}" for lr in lrs}) < len(lrs):
        raise ConfigError(f"--lrs {', '.join(map(str, lrs))}: expected different positive numbers")
    if jobs < 0:
        raise ConfigError(f"--jobs {jobs}: expected 1 or more; 0 is as many as cores")
    methods = [
        _method(name, load(file, {**(options or {}), "strategy": name}, settings), lrs, jobs)
        for name in names
    ]
    if any(registry.traits(registry.find(m.config.strategy)).personal for m in methods):
        # Personal models are those of clients that train: all methods are measured on these.
        participants = {"eval_participants": True}
        methods = [replace(m, config=m.config.model_copy(update=participants)) for m in methods]
    labels = [method.label for method in methods]
    if not labels:
        raise ConfigError(f"name strategies to compare: {', '.join(registry.STRATEGIES)}")
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise ConfigError(f"{twice} is named twice: each strategy once, classes by different names")
    first = methods[0].config
    if first.eval_clients < 1:
        raise ConfigError("eval-clients=0 leaves no clients whose examples choose the lr: raise it")
    return ComparisonGrid(tuple(methods), tuple(range(first.seed, first.seed + seeds)))


def _method(name: str, config: RunConfig, lrs: Sequence[float], jobs: int) -> Method:
    """A strategy with the settings that a comparison changes, and the learning rates to try."""
    changes: dict[str, Any] = {}
    if config.model == config.data == "embedded":
        changes = {key: value for key, value in QUICK.items() if key not in config.model_fields_set}
        if "cohort" in changes and config.clients:
            changes["cohort"] = min(changes["cohort"], config.clients)
    if jobs != 1 and not config.threads:
        changes["threads"] = 1
    factors = FACTORS if config.dp == "none" else (1.0,)
    tried = tuple(lrs) or tuple(float(f"{config.lr * f:.3g}") for f in factors)
    if config.dp != "none" and len(tried) > 1:
        raise ConfigError(
            f"--lrs {', '.join(f'{lr:g}' for lr in tried)}: with dp={config.dp} clients' "
            f"examples may not choose one, for no epsilon counts that: give one, or leave "
            f"--lrs out for each strategy's usual one"
        )
    return Method(_label(name), config.model_copy(update=changes), tried)


def learning_rates(text: str) -> list[float]:
    """'1e-3,3e-3' → [0.001, 0.003]. Raises ConfigError."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"--lrs {text!r}: expected numbers between commas") from error


def _label(name: str) -> str:
    """`flora`; of one's own the name of the class."""
    return name.rpartition(":")[2] if ":" in name else name.replace("-", "_")
