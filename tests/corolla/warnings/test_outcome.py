"""The verdicts on runs that have ended, from the numbers that their files hold."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from corolla.commands.simulate import in_process
from corolla.config.run import RunConfig
from corolla.server.runs import run
from corolla.warnings.outcome import VERDICTS, RunWarning, outcome

Settings = Callable[..., RunConfig]


def judged(
    *losses: float | None,
    base: float = 4.0,
    error: float | None = 0.1,
    config: RunConfig | None = None,
    **lines: Sequence[Any],
) -> list[RunWarning]:
    """The verdicts on a run whose rounds have these held-out losses, and `lines` key by key."""
    found = [
        {"round": r, "eval_loss": loss, "train_loss": 1.0} for r, loss in enumerate(losses, start=1)
    ]
    for key, values in lines.items():
        for line, value in zip(found, values, strict=True):
            line[key] = value
    final = {"loss": losses[-1]} | ({} if error is None else {"loss_error": error})
    info = {"personal": False, "base": {"loss": base}, "final": final, "fairness": {}}
    return outcome(config or RunConfig(lr=0.5), info, found)


def ids(found: Sequence[RunWarning]) -> list[str]:
    return [warning.id for warning in found]


def test_a_run_that_gets_better_warns_of_nothing() -> None:
    assert judged(3.5, 3.0, 2.0) == []


def test_a_loss_above_the_base_by_more_than_its_standard_error_is_worse() -> None:
    assert ids(judged(4.09)) == []
    (found,) = judged(4.25)
    assert found.id == "worse"
    assert found.numbers == {"base": 4.0, "final": 4.25, "error": 0.1}
    assert "4.25 after the run and 4 before, 0.25 higher" in found.text
    assert "lower lr (here 0.5)" in found.instead
    assert ids(judged(4.01, error=None)) == ["worse"]  # one row has no standard error


def test_three_rises_running_are_diverging() -> None:
    assert ids(judged(2.0, 2.5, 3.0)) == []
    (found,) = judged(2.0, 2.5, 3.0, 3.5)
    assert found.id == "diverging"
    assert found.numbers == {"from_round": 1, "to_round": 4, "from": 2.0, "to": 3.5}
    assert "rose from 2 to 3.5 in every evaluation from round 1 to 4" in found.text
    assert "patience" in found.instead
    # The base model is the first point of the course.
    assert ids(judged(4.5, 5.0, 6.0)) == ["worse", "diverging"]


def test_a_rise_counts_from_where_it_begins_and_rounds_without_evaluation_do_not() -> None:
    (found,) = judged(3.0, 2.0, None, 2.5, None, 3.0, 3.5)
    assert (found.numbers["from_round"], found.numbers["to_round"]) == (2, 7)
    (found,) = judged(2.0, 2.5, 3.0, 3.5, 3.4)  # it has come back a little
    assert (found.id, found.numbers["to_round"]) == ("diverging", 4)


def test_a_loss_that_wavers_or_comes_back_does_not_diverge() -> None:
    assert judged(3.0, 2.00, 2.01, 2.02, 2.03) == []  # three times up, within its error
    assert judged(2.0, 2.5, 3.0, 3.5, 2.0) == []
    assert judged(2.0, 2.5, 2.5, 3.0, 3.5) == []  # one that stays is no rise


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_diverging(loss: float) -> None:
    for found in (
        judged(3.0, loss),
        judged(3.0, loss, 2.0),
        judged(3.0, 2.0, train_loss=[1.0, loss]),
    ):
        warning = next(warning for warning in found if warning.id == "diverging")
        assert warning.numbers["round"] == 2
        assert "round 2" in warning.why
        told = json.dumps(warning.to_json(), allow_nan=False)
        assert json.loads(told)["numbers"]["loss"] is None
    assert ids(judged(3.0, 2.0, train_loss=[None, None])) == []  # withheld for privacy


def test_noise_above_the_mean_update_in_half_of_the_rounds() -> None:
    private = RunConfig(dp="client", epsilon=8)

    def noisy(*noise: float) -> list[RunWarning]:
        norms = [1.0] * len(noise)
        losses = [3.0] * len(noise)
        return judged(*losses, config=private, noise_norm=noise, update_norm=norms)

    assert ids(noisy(0.5, 0.9, 1.5)) == []
    (found,) = noisy(0.5, 0.9, 1.5, 2.1)
    assert found.id == "noise"
    assert found.numbers == {"rounds": 4, "over": 2, "noise": 1.25, "update": 1.0}
    assert "in 2 of 4 rounds the noise of dp=client" in found.why
    assert "cohort" in found.instead and "epsilon" in found.instead


def test_personal_models_are_judged_by_their_clients() -> None:
    def own(after: float, std: float) -> list[RunWarning]:
        spread = {"clients": 5.0, "best_decile": 0.0, "worst_decile": 0.0}
        fair = {
            "base": {**spread, "mean": 4.0, "std": 0.5},
            "final": {**spread, "mean": after, "std": std},
        }
        worse = {"loss": 9.0, "loss_error": 0.1}  # of the shared part alone
        info = {"personal": True, "base": {"loss": 4.0}, "final": worse, "fairness": fair}
        line = {"round": 1, "eval_loss": 9.0, "personal_loss": after, "train_loss": 1.0}
        return outcome(RunConfig(), info, [line])

    assert own(3.0, 0.5) == []
    assert own(4.4, 1.0) == []  # 1.0 / sqrt(5 - 1)
    (found,) = own(4.6, 1.0)
    assert (found.id, found.numbers["error"]) == ("worse", 0.5)
    assert "clients' mean loss on their own examples" in found.why


def test_a_harmful_run_says_so_where_it_is_kept(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        **{"model": "embedded", "data": "embedded", "clients": 2, "cohort": 1, "rounds": 1},
        **{"max_length": 256, "eval_clients": 0},
    }
    harmful, good = (
        in_process.simulate(settings(**small, lr=lr), tmp_path / name)
        for name, lr in (("harmful", 100.0), ("good", 1e-3))
    )
    for summary, wanted in ((harmful, ["worse"]), (good, [])):
        info = json.loads((summary.folder / "run.json").read_text())
        assert [w["id"] for w in info["warnings"] if w["id"] in VERDICTS] == wanted
        assert info["warnings"] == list(summary.warnings)
        page = (summary.folder / "report.html").read_text()
        assert page.count('<p class="warn" role="alert">') == len(wanted)
        assert ("worse than the base model" in page) == bool(wanted)
        assert info["base"]["loss_error"] > 0


@pytest.mark.parametrize("dp", ["client", "example"])
def test_noise_that_drowns_updates_is_told(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dp: str
) -> None:
    monkeypatch.setattr(run, "write_report", lambda path, info, lines: None)
    found = {}
    for z in (1e-3, 30.0):
        config = settings(dp=dp, noise_multiplier=z, rounds=2, lr=1e-4, delta=1e-2, clip=0.01)
        summary = in_process.simulate(config, tmp_path / f"{z:g}")
        found[z] = {warning["id"]: warning for warning in summary.warnings}
    assert "noise" not in found[1e-3]
    assert found[30.0]["noise"]["numbers"]["over"] == 2
