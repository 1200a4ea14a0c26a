import json
import math

import pytest
import torch
from rich.console import Console

from corolla.commands.check.findings import Finding, Result, Worst
from corolla.commands.check.oracle import EXACT
from corolla.commands.check.proofs import conform
from corolla.commands.check.screen import print_findings
from corolla.commands.check.traffic import LOGITS
from corolla.errors import ConfigError

OWN = "tests.strategies.sabotaged:"
WEIGHTS, FACTORS = "mean of effective weights", "mean of factors"
ALWAYS = ["weights = examples", "shares alone count", "every weight counts", "examples counted"]
ALWAYS += ["order", "grouping", "partial sums", "linear as declared", "server half is pure"]
ALWAYS += ["no leak between clients", "starts from the model", "evaluates the model", "one client"]
ALWAYS += ["bytes up = formula", "bytes down = formula", "bytes at first = formula"]
ALWAYS += ["saved and reloaded"]


def check(name: str, *models: str) -> Result:
    (result,) = conform([OWN + name], models=models or ["llama"], tried=[])
    return result


def test_a_forgotten_head_passes_where_there_is_none() -> None:
    assert check("HeadForgotten", "llama").passed


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("Raises", "ValueError: a mistake of its author"),
        ("RaisesType", "TypeError: a mistake of its author"),
        ("RaisesKey", "KeyError: 'a mistake of its author'"),
        ("RaisesIndex", "IndexError: a mistake of its author"),
        ("RaisesZeroDivision", "ZeroDivisionError: a mistake of its author"),
        ("RaisesAssertion", "AssertionError: a mistake of its author"),
        ("RaisesOnDevice", "RuntimeError: a mistake of its author"),
        ("WrongKeys", "0 of 2 clients gave a valid update"),
        ("PhaseStuck", "round 2: 0 of 5 clients gave a valid update"),
        ("NotFinite", "the aggregate is not finite"),
        ("SeedOfItsChoice", "update has seed "),
        ("RateOfItsChoice", "update has step "),
    ],
)
def test_a_strategy_that_raises_fails_with_a_finding(name: str, note: str) -> None:
    result = check(name)
    (finding,) = result.findings
    assert (finding.check, finding.passed, result.passed) == ("runs", False, False)
    assert note in finding.note


def test_a_strategy_that_raises_does_not_stop_the_next() -> None:
    broken, sound = conform([OWN + "Raises", OWN + "Own"], models=["llama"], tried=[])
    assert (broken.passed, sound.passed) == (False, True)


def test_a_users_own_strategy_passes_every_check_on_every_model() -> None:
    (result,) = conform([OWN + "Own"])
    assert result.passed
    usual = [finding for finding in result.findings if not finding.options]
    found = {(finding.check, finding.model) for finding in usual}
    always = {(c, m) for c in [WEIGHTS, *ALWAYS] for m in ("llama", "gpt2", "bert")}
    assert found == {*always, ("start beside the base", "bert"), ("secure sum", "bert")}
    assert len(usual) == len(found)


def test_says_what_it_does() -> None:
    said: list[str] = []
    conform(["fedprox"], said.append, models=["llama", "bert"])
    assert said == ["fedprox on llama", "fedprox on bert", "fedprox on bert with mu=0.1"]


def test_measures_the_inexactness_of_a_mean_of_factors() -> None:
    (result,) = conform(["fedavg"], models=["llama"])
    (finding,) = [f for f in result.findings if f.check == FACTORS]
    assert "the weighted covariance" in finding.note
    assert 0.01 < float(finding.note.split("%")[0]) / 100 < 1


def test_unknown_strategies_are_a_users_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fedavg'"):
        conform(["fedavgg"])


def test_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    conform([OWN + "DrawsFromGlobalState"], models=["llama"])
    assert torch.equal(torch.get_rng_state(), before)


def test_limits_are_those_of_single_precision() -> None:
    assert (EXACT, LOGITS) == (1e-6, 1e-5)


def test_nan_never_passes_and_a_result_without_findings_fails() -> None:
    assert not Finding("mean", "llama", float("nan"), 1.0).passed
    assert Finding("mean", "llama", 1.0, 1.0).passed
    assert not Result("none", "weights", []).passed


def test_json_and_table_hold_every_finding() -> None:
    findings = [Finding("mean", "llama", 2e-7, 1e-6), Finding("order", "gpt2", 0.5, 1e-6, "why")]
    result = Result("mine", "weights", findings)
    loaded = json.loads(json.dumps(result.to_json()))
    assert [f["passed"] for f in loaded["findings"]] == [True, False]
    assert loaded["passed"] is False
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        print_findings(console, [result])
    text = capture.get()
    assert all(part in text for part in ("mine: FAILED", "2.0e-07", "5.0e-01", "order, gpt2: why"))


def test_the_worst_of_many_errors_is_kept_with_its_place() -> None:
    worst = Worst()
    assert worst.finding("order", "llama", 0.0) == Finding("order", "llama", 0.0, 0.0)
    for measured, place in ((0.1, "first"), (0.3, "second"), (0.2, "third")):
        worst.see(measured, place)
    assert worst.finding("order", "llama", 0.2) == Finding("order", "llama", 0.3, 0.2, "second")
    assert worst.finding("order", "llama", 0.4).note == ""
    for measured, place in ((math.nan, "here"), (1.0, "later")):
        worst.see(measured, place)
    assert math.isnan(worst.measured)
    assert not worst.finding("order", "llama", 9.0).passed
    assert worst.note == "here"


def test_a_table_has_rows_for_models_and_for_options() -> None:
    usual = [Finding("order", "llama", 0.0, 1e-6), Finding("order", "bert", 0.0, 1e-6)]
    tried = [
        Finding("order", "bert", 0.0, 1e-6, options={"mu": 0.1}),
        Finding("option has an effect", "bert", 1.0, 0.0, "mu=0.1 changes nothing", {"mu": 0.1}),
    ]
    result = Result("mine", "factors", [*usual, *tried], seconds=12.34, cpu_seconds=5.06)
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        print_findings(console, [result])
    text = " ".join(capture.get().split())
    assert "mine: FAILED (mean of factors)" in text
    assert "mu=0.1 │ bert │ 2 │ option has an effect" in text
    assert "option has an effect, bert with mu=0.1: mu=0.1 changes nothing" in text
    assert "4 proofs in 12.3 s, 5.1 s of CPU time" in text
