"""The experiment at equal epsilon: what it runs, what it makes of the results, and that it does."""

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments.privacy import run


def test_searches_are_of_equal_size_and_on_the_first_seed() -> None:
    found = {group: run.search(*group) for group in run.groups(run.LEVELS, run.STRATEGIES)}
    assert len(found) == 15
    for group, cells in found.items():
        same = found[*group[:3], "fedavg" if group[3] == "ffa_lora" else group[3]]
        assert len(set(cells)) == len(same) >= 2
        assert {cell.group for cell in cells} == {group}
        assert {cell.seed for cell in cells} == {run.SEEDS[0]}
        for cell in cells:
            config = cell.config(quick=False)
            assert (config.dp, config.epsilon) == (group[1], group[2])


def _results(folder: Path, losses: dict[tuple[str, float, int], float]) -> run.Results:
    """Client-level cells at clip 0.5: (strategy, lr, seed) → loss."""
    cells: list[dict[str, Any]] = []
    for (strategy, lr, seed), loss in losses.items():
        cell = run.Cell("client", "client", 8.0, strategy, lr, 0.5, seed)
        cells.append({"cell": asdict(cell), "loss": loss, "base": 5.0})
    (folder / "results.json").write_text(json.dumps({"cells": cells}))
    return run.Results(folder, quick=False)


def test_the_best_of_a_search_is_compared_in_pairs(tmp_path: Path) -> None:
    of_fedavg = {("fedavg", 0.004, 0): 4.0, ("fedavg", 0.016, 0): 4.5}
    of_fedavg |= {("fedavg", 0.004, 1): 4.2, ("fedavg", 0.004, 2): 4.4}
    of_ffa = {("ffa_lora", 0.016, seed): 3.9 + 0.1 * seed for seed in run.SEEDS}
    results = _results(tmp_path, of_fedavg | of_ffa)
    first, second = run.rows(results, ["client"], ["fedavg", "ffa_lora"])
    assert (first["lr"], first["seeds"], first["loss"]) == (0.004, 3, pytest.approx(4.2))
    assert second["difference"] == pytest.approx(statistics.fmean([-0.1, -0.2, -0.3]))
    assert second["half_difference"] == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert "-0.200 ± 0.248" in run.table([first, second])
    run.plot(results, [first, second])
    assert (tmp_path / "losses.png").stat().st_size > 5000


def test_a_cell_is_run_once(tmp_path: Path) -> None:
    cell = run.Cell("client", "client", 8.0, "ffa_lora", 4e-3, 0.1, 0)
    results = run.Results(tmp_path, quick=True)
    loss = results.run(cell)
    assert loss is not None
    stored = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert stored[0]["privacy"]["unit"] == "client"
    assert stored[0]["privacy"]["epsilon"] <= 8.0
    again = run.Results(tmp_path, quick=True)
    assert again.run(cell) == loss
    assert len(again.cells) == 1
