import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.commands.check import options
from corolla.commands.check.tables import TRIALS, Trial
from corolla.errors import ConfigError
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.listing import registry
from corolla.strategies.listing.options import option
from corolla.strategies.listing.registry import STRATEGIES

HERE = "tests.corolla.commands.check.test_options:"


@dataclass(frozen=True)
class Plain(FedAvg):
    """Options of every type, none of which says a value to try."""

    rate: float = 0.5
    level: int = 3
    fast: bool = False
    kind: Literal["mean", "median", "best"] = "mean"
    even: int = 2
    said: float = option(1.0, "One with an example.", 0.25)
    none: float = option(1.0, "One that has no other value.", 1.0)
    beside: int = option(1, "One that needs another.", 2, beside={"fast": True})
    text: str = "free"

    def __post_init__(self) -> None:
        if self.even % 2:
            raise ValueError(f"even must be even, found {self.even}")


def tried(name: str) -> list[Trial]:
    return list(options.trials(HERE + "Plain", name, {}))


def test_values_follow_from_the_option_itself() -> None:
    assert tried("rate") == [Trial(0.25)]
    assert tried("level") == [Trial(4)]
    assert tried("fast") == [Trial(True)]
    assert tried("kind") == [Trial("median"), Trial("best")]
    assert tried("even") == [Trial(4)]
    assert tried("said") == [Trial(0.25)]
    assert tried("none") == []
    assert tried("beside") == [Trial(2, {"fast": True})]


def test_an_option_without_a_value_to_try_is_told_how_to_declare_one() -> None:
    with pytest.raises(ConfigError, match=r"default 'free' .*option\(default, text, example\)"):
        tried("text")


def test_what_is_set_is_not_tried() -> None:
    assert "rate" in options.names(HERE + "Plain", {})
    assert "rate" not in options.names(HERE + "Plain", {"rate": 0.1})


def test_every_option_of_every_strategy_has_a_value_to_try_or_says_that_there_is_none() -> None:
    for name, cls in STRATEGIES.items():
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            found = options.trials(name, field.name, {})
            assert bool(found) == (field.metadata["example"] != field.default)
            for trial in found:
                registry.create(name, {**trial.beside, field.name: trial.value})


def test_rows_of_trials_are_of_options_that_are_there() -> None:
    for name, option_name in TRIALS:
        assert option_name in options.names(name, {})


def test_settings_are_for_all_or_for_one() -> None:
    found = options.given(["fedavgm", "fedadam"], ["strategy.lr=0.5", "fedadam.beta1=0.1"])
    assert found == {"fedavgm": {"lr": 0.5}, "fedadam": {"lr": 0.5, "beta1": 0.1}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lr=0.5"], r"--set 'lr=0.5': check takes options of the strategies that it checks"),
        (["rounds"], "check takes options"),
        (["fedprox.mu=1"], "check takes options of the strategies that it checks"),
        (["strategy.betta=0.5"], "strategy fedavgm has no option 'betta': did you mean 'beta'"),
        (["strategy.beta=2"], "needs 0 <= beta < 1"),
        (["strategy.=2"], "check takes options"),
    ],
)
def test_what_is_no_option_is_answered_in_one_line(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        options.given(["fedavgm"], settings)
    assert "\n" not in str(raised.value)


def test_the_command_refuses_a_bad_option_before_anything_runs() -> None:
    done = CliRunner().invoke(app, ["check", "fedavgm", "--set", "strategy.beta=2"])
    assert done.exit_code == 2
    assert "fedavgm on llama" not in done.output
