"""What a device has, and how training is made to fit."""

import os
from pathlib import Path

import psutil
import pytest

from corolla.client.device import machine
from corolla.config.build import build_strategy
from corolla.config.load import validate
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, ModelError
from corolla.estimates import footprint
from corolla.estimates.footprint import Batch, Workload
from corolla.models import anatomy
from corolla.proto import update_pb2


def test_probe_is_what_the_system_says(tmp_path: Path) -> None:
    found = machine.probe(tmp_path / "not" / "yet")
    assert 0 < found.memory_bytes <= psutil.virtual_memory().total
    assert found.cores == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    assert found.accelerator in ("cpu", "cuda", "mps")
    assert found.runtime.startswith("python 3") and "torch 2" in found.runtime
    assert 0 <= found.battery_percent <= 100
    assert 0 < found.storage_bytes <= psutil.disk_usage(str(tmp_path)).total
    update_pb2.Capabilities(**vars(found))  # every field travels


def group(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\n")


def test_a_control_group_limits_memory_less_what_is_used(tmp_path: Path) -> None:
    group(tmp_path, "1000", 700, 100)
    found = list(machine._limit(tmp_path, "memory.max", "memory.current"))
    assert found == [(1000, 600)]
    group(tmp_path, "max", 700, 100)
    assert list(machine._limit(tmp_path, "memory.max", "memory.current")) == []
    group(tmp_path, str(1 << 62), 700, 100)
    assert list(machine._limit(tmp_path, "memory.max", "memory.current")) == []
    assert list(machine._limit(tmp_path / "none", "memory.max", "memory.current")) == []


def config(**changes: object) -> RunConfig:
    return validate({"batch_size": 8, "max_length": 256, **changes})


BATCH = Batch(8, 256, 8 * 255)


def need(own: RunConfig, trainer: str = "first_order") -> int:
    model = anatomy.read("embedded")
    return footprint.client(Workload(model, BATCH), own, trainer).total  # type: ignore[arg-type]


def chosen(budget: int, own: RunConfig, alone: bool = False) -> dict[str, object]:
    model = anatomy.read("embedded")
    strategy = None if alone else build_strategy(own)
    choice = machine.choose(budget, Workload(model, BATCH), own, strategy=strategy)
    assert choice.estimate.total <= budget
    return choice.overrides


def test_nothing_is_changed_where_it_fits() -> None:
    assert chosen(need(config()), config()) == {}


def test_smaller_micro_batches_come_first() -> None:
    assert chosen(need(config()) - 1, config()) == {"micro_batch_size": 4}
    assert chosen(need(config(micro_batch_size=2)), config()) == {"micro_batch_size": 2}


def test_then_gradient_checkpointing_with_the_largest_micro_batch_that_fits() -> None:
    own = config()
    found = chosen(need(own.model_copy(update={"micro_batch_size": 1})) - 1, own)
    assert found["gradient_checkpointing"] is True
    assert need(own.model_copy(update=found)) < need(own.model_copy(update={"micro_batch_size": 1}))


def test_then_a_lower_rank_where_clients_may_differ() -> None:
    smallest = {"micro_batch_size": 1, "gradient_checkpointing": True}
    for strategy, able in (("flora", True), ("fedavg", False)):
        own = config(strategy=strategy, rank=64)
        below = need(own.model_copy(update=smallest)) - 1
        if able:
            assert chosen(below, own) == {**smallest, "rank": 32}
            with pytest.raises(ConfigError, match="too little"):  # a server would refuse its update
                chosen(below, own, alone=True)
        else:
            with pytest.raises(ConfigError, match="too little"):
                chosen(below, own)


def test_then_zeroth_order_where_the_strategy_has_it() -> None:
    """With short sequences and a high rank, the optimiser is what is left to save."""
    classes = {"large": {}, "small": {"trainer": "zeroth_order"}}
    model, short = anatomy.read("embedded"), Batch(8, 32, 8 * 31)
    for strategy, changes in (("mixed", {"classes": classes}), ("fedavg", {})):
        own = config(strategy=strategy, rank=64, **changes)
        built = build_strategy(own)
        least = {"micro_batch_size": 1, "gradient_checkpointing": True}
        smallest = own.model_copy(update=least)
        budget = footprint.client(Workload(model, short), smallest, "first_order").total - 1
        if strategy == "mixed":
            found = machine.choose(
                budget, Workload(model, short), own, trainer="first_order", strategy=built
            )
            assert found.overrides["trainer"] == "zeroth_order"
        else:
            with pytest.raises(ConfigError, match="too little"):
                machine.choose(budget, Workload(model, short), own, strategy=built)


def test_a_budget_that_nothing_fits_says_what_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"100 MB of memory is too little .* the least is \d+ MB"):
        machine.fit(config(), "embedded", 100_000_000)
    with pytest.raises(ModelError, match="not on this machine"):
        machine.fit(config(), "./nowhere", 100_000_000)


def test_a_device_changes_only_what_concerns_nobody_else() -> None:
    budget = need(config(strategy="flora", micro_batch_size=4))
    overrides, estimate = machine.fit(config(strategy="flora"), "embedded", budget)
    assert overrides.keys() <= {"micro_batch_size", "gradient_checkpointing"}
    assert overrides and estimate.total <= budget


def test_a_budget_counts_evaluation_as_the_worker_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of short batches evaluation takes most: it is counted, in micro-batches of training."""
    own = config(batch_size=1, micro_batch_size=1)
    model = anatomy.read("embedded")
    eight = Batch(8, 256, 8 * 255)

    def total(changed: RunConfig, evaluated: Batch | None) -> int:
        batch = Batch(changed.batch_size, 256, changed.batch_size * 255)
        return footprint.client(Workload(model, batch, evaluated), changed, "first_order").total

    _, one = machine.fit(own, "embedded", 1 << 40)
    assert one.total == total(own, Batch(1, 256, 255))
    free = config(batch_size=1, micro_batch_size=None)
    _, all_eight = machine.fit(free, "embedded", 1 << 40)
    assert all_eight.total == total(free, eight) > total(free, None)
