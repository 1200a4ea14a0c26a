"""The set of blocks and modules that a budget leads to, and the settings that say it.

A run settles its budgets before the first round: they become `layers` or `target_modules`, so that
all that follow these keys need to know nothing of budgets.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from corolla.budgets import asked, costs, knapsack
from corolla.budgets.asked import MEANING, Budget
from corolla.budgets.knapsack import End, Level, Option
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.estimates import flops, footprint
from corolla.estimates.footprint import Batch, Workload
from corolla.interfaces import Strategy
from corolla.models import anatomy, layers
from corolla.models.anatomy import Anatomy
from corolla.tensors import factors, units

if TYPE_CHECKING:
    from corolla.models.pretrained import Base


@dataclass(frozen=True)
class Problem:
    """A model whose modules can be trained, as one class of clients would train them."""

    model: Anatomy
    config: RunConfig
    """The settings of the class."""
    names: Sequence[str]
    """The modules that may be trained."""
    values: Mapping[str, int]
    """The value of each module."""
    labels: int = 0

    @cached_property
    def strategy(self) -> Strategy:
        """The strategy that updates are of."""
        return build_strategy(self.config)

    @property
    def batch(self) -> Batch:
        """A step of the longest sequences."""
        run = self.config
        tokens = min(run.max_length, self.model.positions or run.max_length)
        size = run.micro_batch_size or run.batch_size
        return Batch(size, tokens, size * (tokens - 1))

    @property
    def members(self) -> dict[int, list[str]]:
        """The modules of each block, the last one first."""
        return costs.by_block(self.names)


@dataclass(frozen=True)
class Chosen:
    """The modules that are trained, and what they cost of what all of them would."""

    names: Sequence[str]
    taken: int
    total: int


def settled(
    config: RunConfig, base: "Base", labels: Sequence[str] = ()
) -> tuple[RunConfig, dict[str, Any]]:
    """The settings with what their budgets lead to, and what run.json says of it; `base` stays.

    With `public` modules are scored on its rows, else all count alike. Raises ConfigError where
    nothing fits, DataError for public rows that cannot be used, ModelError for a model whose
    operations are not known.
    """
    if not config.budgeted:
        return config, {}
    found: Mapping[str, float] = {}
    if config.public:
        from corolla.budgets import scores  # imports peft, which plans do without
        from corolla.data import public
        from corolla.models.lora import LoraModel

        rows = public.sequences(config, base.tokenizer, labels, "budget")
        model = LoraModel(base, config.target_modules, blocks=config.layers)
        try:
            found = scores.of_modules(model, config, rows)
        finally:
            model.detach()
    return foreseen(config, anatomy.read(config.model), len(labels), found)


def foreseen(
    config: RunConfig, model: Anatomy, labels: int = 0, scored: Mapping[str, float] | None = None
) -> tuple[RunConfig, dict[str, Any]]:
    """The same from the sizes of a model; without scores all modules of a rank count alike."""
    if not config.budgeted:
        return config, {}
    given = config
    names = _ordered(model.linear(config.target_modules, config.layers))
    values = _values(names, scored or {})
    told: dict[str, Any] = {"scores": "public" if scored else "none"}
    if config.budget:
        problem = Problem(model, config, names, values, labels)
        found = chosen(problem, asked.read(config.budget), whole_blocks=False, key="budget")
        told["run"] = _told(config.budget, found)
        config = config.model_copy(update={**_as_keys(config, names, found.names), "budget": None})
        names = list(found.names)
    classes = dict(config.classes)
    for name, own in config.classes.items():
        if not own.budget:
            continue
        some = _ordered(layers.kept(names, own.layers))
        problem = Problem(model, config.of_class(name), some, values, labels)
        key = f"classes.{name}.budget"
        found = chosen(problem, asked.read(own.budget), whole_blocks=True, key=key)
        told.setdefault("classes", {})[name] = _told(own.budget, found)
        blocks = layers.text(costs.by_block(found.names))
        classes[name] = own.model_copy(update={"layers": blocks, "budget": None})
    config = config.model_copy(update={"classes": classes, **_unread(config)})
    told["given"] = _changed(given, config)
    return config, {"budget": told}


def resumed(config: RunConfig, begun: RunConfig) -> RunConfig:
    """The settings of a run that goes on: budgets lead to what they led to when it began."""
    if not config.budgeted:
        return config
    classes = {
        name: begun.classes[name] if own.budget and name in begun.classes else own
        for name, own in config.classes.items()
    }
    keys = ["scores", "public", "public_examples"]
    if config.budget:
        keys += ["layers", "target_modules", "budget"]
    return config.model_copy(
        update={**{key: getattr(begun, key) for key in keys}, "classes": classes}
    )


def recalled(facts: Mapping[str, Any], run: Path, resume: bool) -> Mapping[str, Any]:
    """The facts of a run, with what run.json in its folder said of budgets when it began."""
    if not resume:
        return facts
    info = json.loads((run / "run.json").read_text())
    return {**facts, "budget": info["budget"]} if "budget" in info else facts


def chosen(problem: Problem, budget: Budget, whole_blocks: bool, key: str) -> Chosen:
    """The modules of most value within a budget. Raises ConfigError where none fits."""
    whole_blocks = whole_blocks or budget.unit == "memory"
    by_unit = {"flops": _flops, "bytes": _bytes}
    if budget.unit == "memory":
        levels, fixed, total = _memory(problem)
    else:
        levels, fixed, total = by_unit[budget.unit](problem, whole_blocks)
    if budget.share == 1:
        return Chosen(sorted(problem.names), total, total)
    limit = most = budget.of(total)
    while found := knapsack.best(levels, most, fixed):
        members = problem.members
        items = [n for item in found for n in members[int(item)]] if whole_blocks else list(found)
        if (taken := _cost(problem, budget, items)) <= limit:
            return Chosen(sorted(items), taken, total)
        most -= taken - limit  # an estimate of memory is rounded
    least = (knapsack.least(levels) + fixed) / total
    raise ConfigError(
        f"{key}={budget.text} is too little to train anything: the least takes {least:.3f} of the "
        f"{MEANING[budget.unit]}, raise it"
    )


# --- costs ----------------------------------------------------------------------------------------


def _flops(problem: Problem, whole_blocks: bool) -> tuple[list[Level], int, int]:
    """(levels, the cost of any set, that of everything) in operations backwards."""
    rank, values = problem.config.rank, problem.values
    total = _cost(problem, asked.read("flops:1"), problem.names)
    fixed = flops.head(problem.model, problem.batch, True, problem.labels).backward
    if whole_blocks:
        levels = costs.of_blocks(
            problem.model, problem.batch, problem.names, rank, _of_block(problem)
        )
    else:
        levels = costs.of_modules(
            problem.model, problem.batch, problem.names, [rank], lambda name, rank: values[name]
        )
    return levels, fixed, total


def _bytes(problem: Problem, whole_blocks: bool) -> tuple[list[Level], int, int]:
    sizes = {name: _update_bytes(problem, [name]) for name in problem.names}
    rank = problem.config.rank
    if whole_blocks:
        value = _of_block(problem)
        items = {
            str(block): [Option(rank, value(str(block), rank), sum(sizes[n] for n in own))]
            for block, own in problem.members.items()
        }
    else:
        items = {n: [Option(rank, problem.values[n], sizes[n])] for n in problem.names}
    return knapsack.plain(items), 0, sum(sizes.values())


def _memory(problem: Problem) -> tuple[list[Level], int, int]:
    """Memory as levels of whole blocks: what lies above the deepest keeps its activations too.

    Costs are differences of the estimate of clients (estimates/footprint.py), which takes the
    blocks of a model to be alike.
    """
    numbers, idle = list(problem.members), _idle(problem)
    peak = {number: _peak(problem, [number]) - idle for number in numbers}
    own = 0
    if len(numbers) > 1:
        own = _peak(problem, numbers[:2]) - idle - peak[numbers[1]]
    value, rank = _of_block(problem), problem.config.rank
    levels = []
    for number, below in zip(numbers, [*numbers[1:], numbers[-1]], strict=True):
        item = str(number)
        gained = value(item, rank)
        ends = [End({item: rank}, gained, peak[numbers[0]])]
        ways = {item: [Option(rank, gained, own)]}
        levels.append(Level(ways, ends, peak[below] - peak[number]))
    return levels, 0, _peak(problem, numbers) - idle


def _idle(problem: Problem) -> int:
    """Bytes of a client that trains nothing: those of one block of two, less a block's own."""
    numbers = list(problem.members)
    first = _peak(problem, numbers[:1])
    if len(numbers) < 2:
        return 0
    second = _peak(problem, numbers[1:2])
    between = (second - first) // (numbers[0] - numbers[1])
    return first - (_peak(problem, numbers[:2]) - second) - between


def _of_block(problem: Problem) -> costs.Value:
    members = problem.members
    return lambda item, rank: sum(problem.values[n] for n in members.get(int(item), ()))


def _cost(problem: Problem, budget: Budget, names: Sequence[str]) -> int:
    """The cost of a set, counted anew."""
    if budget.unit == "bytes":
        return sum(_update_bytes(problem, [name]) for name in names)
    if budget.unit == "memory":
        return _peak(problem, list(costs.by_block(names))) - _idle(problem)
    ranks = dict.fromkeys(names, problem.config.rank)
    return costs.backward(problem.model, problem.batch, ranks, problem.labels)


def _peak(problem: Problem, blocks: Sequence[int]) -> int:
    """Bytes of a client that trains these blocks."""
    config = problem.config.model_copy(update={"layers": layers.text(list(blocks))})
    work = Workload(problem.model, problem.batch, labels=problem.labels)
    return footprint.client(work, config, "first_order").total


def _update_bytes(problem: Problem, names: Sequence[str]) -> int:
    """Bytes of what a client sends of these modules, before any codec."""
    shapes = problem.model.linear()
    rank = problem.config.rank
    params = {}
    for name in names:
        out, into = shapes[name]
        params[name + factors.A] = torch.empty(rank, into, device="meta")
        params[name + factors.B] = torch.empty(out, rank, device="meta")
    like = problem.strategy.update_like(params, factors.size(params))
    tensors = [tensor for group in like.values() for tensor in group.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- names ----------------------------------------------------------------------------------------


def short(name: str) -> str:
    """A module's name from its stack on: models and their files differ in what stands before."""
    place = units.block(name)
    if place is None:
        return name
    stack, number = place
    rest = name[len(stack) + len(str(number)) + 2 :]
    return f"{stack.rpartition('.')[2]}.{number}.{rest}"


def _ordered(names: Sequence[str] | Mapping[str, object]) -> list[str]:
    """The modules from the loss downwards, in the order of preference among equals."""
    numbered = {name: place[1] if (place := units.block(name)) else -1 for name in names}
    return sorted(numbered, key=lambda name: (-numbered[name], name))


def _values(names: Sequence[str], scored: Mapping[str, float]) -> dict[str, int]:
    if not scored:
        return dict.fromkeys(names, 1)
    known = {short(name): own for name, own in knapsack.whole(scored).items()}
    return {name: known[short(name)] for name in names}


def _as_keys(config: RunConfig, names: Sequence[str], found: Sequence[str]) -> dict[str, Any]:
    """The settings that mean these modules: blocks where these are whole, else their names."""
    blocks = costs.by_block(found)
    if set(layers.kept(names, layers.text(blocks))) == set(found):
        return {"layers": layers.text(blocks)}
    return {"layers": None, "target_modules": sorted(map(short, found))}


def _unread(config: RunConfig) -> dict[str, Any]:
    """The settings of public rows as a run has them that has chosen: it reads them no more.

    A start that is made of these rows still reads them.
    """
    keys = ("scores",) if config.begins.rows else ("scores", "public", "public_examples")
    return {key: RunConfig.model_fields[key].default for key in keys}


def _changed(given: RunConfig, config: RunConfig) -> dict[str, Any]:
    """The settings as they were given, of those that a choice has changed."""
    said, fields = given.model_dump(mode="json"), RunConfig.model_fields
    changed = [key for key in fields if getattr(given, key) != getattr(config, key)]
    return {key: said.get(key, fields[key].default) for key in changed}


def _told(text: str, found: Chosen) -> dict[str, Any]:
    return {
        "asked": text,
        "taken": found.taken,
        "total": found.total,
        "modules": [short(name) for name in found.names],
    }
