"""An interrupted task goes on where it stopped, with the bits it would have had."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import Exported
from tests.client.native import core_tasks
from tests.client.native.core_tasks import Case

Make = Callable[..., Case]
PASSES = 12  # of the task below: four steps of three sequences


@pytest.fixture
def make(tmp_path: Path, native_build: Path, small_bundle: Exported) -> Make:
    def made(**changes: Any) -> Case:
        check = native_build / "corolla-native-check"
        return core_tasks.case(tmp_path, small_bundle, check, **changes)

    return made


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("grad", {}),
    "sgd": ("grad", {"optimizer": "sgd", "lr": 0.05}),
    "forward": ("loss", {"strategy": "seed_pool", "queries": 2, "eps": 1e-2}),
}


@pytest.mark.parametrize("name", RUNS)
def test_interruptions_change_no_bit(make: Make, name: str) -> None:
    method, changes = RUNS[name]
    case = make(**changes)
    task = case.task()
    whole = case.native(task, method)
    checkpoint = case.folder / "other" / "checkpoint.safetensors"
    per_step = 3 if method == "grad" else 12
    for passes in (per_step + 1, per_step, 2 * per_step - 1):  # in the middle, at an end, ...
        done = case.run(task, method, state="other", passes=passes)
        assert (done.returncode, done.stderr) == (1, "not charging any more\n")
        assert checkpoint.exists()
    resumed = case.native(task, method, state="other")
    assert (resumed.payload, resumed.error) == (whole.payload, "")
    for group, params in whole.scalars.items():
        for tensor, bits in params.items():
            assert resumed.scalars[group][tensor].equal(bits)
    for metric in ("train_loss", "local_steps", "target_tokens", "device_loss_last"):
        assert resumed.metrics[metric] == whole.metrics[metric]
    assert resumed.num_examples == whole.num_examples
    assert not checkpoint.exists(), "a finished task leaves nothing behind"


def test_another_task_does_not_go_on_from_it(make: Make) -> None:
    case = make()
    task = case.task()
    checkpoint = case.folder / "state" / "checkpoint.safetensors"
    for other in (
        replace(task, round=2),
        replace(task, base_version="w"),
        replace(task, run_id="cd" * 16),
    ):
        assert case.run(task, "grad", passes=7).returncode == 1
        held = checkpoint.read_bytes()
        fresh = case.native(other, "grad", state="fresh")
        assert case.native(other, "grad").payload == fresh.payload
        assert not checkpoint.exists()
        checkpoint.write_bytes(held)  # of a device that died before it could delete it
        assert case.run(other, "grad", passes=0).returncode == 1
        assert checkpoint.read_bytes() != held
        checkpoint.unlink()


def test_other_data_do_not_go_on_from_it(make: Make) -> None:
    case = make()
    task = case.task()
    assert case.run(task, "grad", passes=7).returncode == 1
    fewer = case.folder / "fewer.jsonl"
    fewer.write_text("".join(case.tokens().read_text().splitlines(keepends=True)[1:]))
    fresh = case.native(task, "grad", state="fresh", tokens=fewer)
    assert case.native(task, "grad", tokens=fewer).payload == fresh.payload


def test_a_damaged_checkpoint_is_none(make: Make) -> None:
    case = make()
    task = case.task()
    whole = case.native(task, "grad", state="fresh")
    assert case.run(task, "grad", passes=7).returncode == 1
    checkpoint = case.folder / "state" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-5])
    assert case.native(task, "grad").payload == whole.payload


def test_conditions_are_asked_before_each_pass(make: Make) -> None:
    case = make()
    assert case.run(case.task(), "grad", passes=PASSES - 1).returncode == 1
    (case.folder / "state" / "checkpoint.safetensors").unlink()
    assert case.run(case.task(), "grad", passes=PASSES).returncode == 0
