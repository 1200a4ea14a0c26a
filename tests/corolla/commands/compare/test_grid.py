"""What a comparison is made of: methods, learning rates, seeds and the cells that follow."""

from pathlib import Path
from typing import Any

import pytest

from corolla.commands.compare.grid import (
    QUICK,
    ComparisonGrid,
    Method,
    learning_rates,
    make_grid,
)
from corolla.config.run import RunConfig
from corolla.errors import ConfigError


def test_each_method_has_its_usual_rate_in_the_middle_of_three() -> None:
    found = make_grid(["fedavg", "fedkseed"], options={"model": "some/model"})
    for method in found.methods:
        usual = RunConfig(strategy=method.label, model="some/model").lr
        assert method.lrs == pytest.approx((usual / 3, usual, 3 * usual), rel=5e-3)
    assert found.methods[0].lrs != found.methods[1].lrs
    assert found.seeds == (0, 1, 2)
    assert found.cells() == 2 * (3 + 2)


def test_given_rates_are_for_all_and_a_given_rate_is_the_middle() -> None:
    found = make_grid(["fedavg", "fedkseed"], lrs=[0.1, 0.2])
    assert [method.lrs for method in found.methods] == [(0.1, 0.2)] * 2
    assert make_grid(["fedavg"], options={"lr": 0.3}).methods[0].lrs == (0.1, 0.3, 0.9)


def test_seeds_count_from_the_one_given() -> None:
    assert make_grid(["fedavg"], options={"seed": 7}, seeds=2).seeds == (7, 8)


def test_the_embedded_comparison_is_short_unless_told_otherwise(tmp_path: Path) -> None:
    config = make_grid(["fedavg"]).methods[0].config
    assert {key: getattr(config, key) for key in QUICK} == QUICK
    given = make_grid(["fedavg"], options={"cohort": 8}, settings=["eval-examples=256"])
    assert (given.methods[0].config.cohort, given.methods[0].config.eval_examples) == (8, 256)
    assert make_grid(["fedavg"], options={"clients": 3}).methods[0].config.cohort == 3
    other = make_grid(["fedavg"], options={"data": str(tmp_path / "mine.jsonl")}).methods[0].config
    assert other.eval_examples == RunConfig().eval_examples
    assert other.cohort is None


def test_cells_side_by_side_have_a_thread_each() -> None:
    assert make_grid(["fedavg"]).methods[0].config.threads == 1
    assert make_grid(["fedavg"], jobs=1).methods[0].config.threads == 0
    assert make_grid(["fedavg"], settings=["threads=3"]).methods[0].config.threads == 3


def test_options_of_a_strategy_are_for_it_alone() -> None:
    found = make_grid(["fedavg", "flora"], settings=["flora.energy=0.9"])
    assert [method.config.options for method in found.methods] == [{}, {"energy": 0.9}]


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        ([], {}, "name strategies"),
        (["fedavgg"], {}, "did you mean 'fedavg'"),
        (["fedavg", "flora", "fedavg"], {}, "fedavg is named twice"),
        (["ffa-lora", "ffa_lora"], {}, "ffa_lora is named twice"),
        (["fedavg"], {"seeds": 0}, "--seeds 0"),
        (["fedavg"], {"jobs": -1}, "--jobs -1"),
        (["fedavg"], {"lrs": [0.1, -1.0]}, "--lrs 0.1, -1.0"),
        (["fedavg"], {"lrs": [0.1, 0.1]}, "different positive"),
        (["fedavg"], {"lrs": [float("nan")]}, "--lrs nan"),
        (["fedavg"], {"settings": ["eval-clients=0"]}, "eval-clients=0"),
        (["fedavg"], {"settings": ["ranc=1"]}, "did you mean 'rank'"),
        (
            ["fedavg"],
            {"settings": ["dp=client", "epsilon=8"], "lrs": [0.1, 0.2]},
            "may not choose one",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(
    names: list[str], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_grid(names, **given)


def test_with_privacy_nothing_is_tried_on_clients_examples() -> None:
    """One learning rate each, and no updates are kept where they are hidden."""
    for level, kept in (("client", False), ("example", True)):
        found = make_grid(["fedavg", "ffa_lora"], options={"dp": level, "epsilon": 8.0}, seeds=2)
        for method in found.methods:
            assert method.lrs == (method.config.lr,)
            (last,) = found.others(method, method.config.lr)
            assert last.keep == kept


def test_learning_rates_of_a_command_line() -> None:
    assert learning_rates("1e-3, 3e-3,") == [0.001, 0.003]
    assert learning_rates("") == []
    with pytest.raises(ConfigError, match="--lrs '1e-3;2'"):
        learning_rates("1e-3;2")


def test_one_seed_and_one_rate_is_one_cell_that_keeps_its_updates() -> None:
    grid = make_grid(["fedavg", "flora"], lrs=[0.01, 0.02, 9.0])
    method = grid.methods[0]
    one = ComparisonGrid((Method("fedavg", method.config, (0.1,)),), (5,))
    assert [job.name for job in one.search(one.methods[0])] == ["fedavg-0.1-5"]
    assert one.search(one.methods[0])[0].keep
    assert one.others(one.methods[0], 0.1) == []
    assert [job.keep for job in grid.search(method)] == [False] * 3
    assert [job.keep for job in grid.others(method, 0.01)] == [False, True]
