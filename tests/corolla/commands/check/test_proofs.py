import json

import pytest
import torch
from rich.console import Console

from corolla.commands.check.findings import Finding, Result
from corolla.commands.check.proofs import EXACT, LOGITS, conform
from corolla.commands.check.screen import print_findings
from corolla.errors import ConfigError

OWN = "tests.strategies.sabotaged:"
WEIGHTS, FACTORS = "mean of effective weights", "mean of factors"
ONE, LEAK, EXPECTED = "one client", "no leak between clients", "as expected"
UP, DOWN = "bytes up = formula", "bytes down = formula"
ALWAYS = [LEAK, "grouping", "order", ONE, "bytes up = formula", "bytes down = formula"]
ALWAYS += ["saved and reloaded"]


def check(name: str, *models: str) -> Result:
    (result,) = conform([OWN + name], rounds=2, models=models or ["llama"])
    return result


def failed(result: Result) -> set[str]:
    return {finding.check for finding in result.findings if not finding.passed}


# What must fail is named, and nothing else may: a check that fails on everything shows nothing.
@pytest.mark.parametrize(
    ("name", "model", "expected"),
    [
        ("ScalingForgotten", "llama", {WEIGHTS, ONE}),
        ("WeightsOnBothFactors", "gpt2", {WEIGHTS}),
        ("LeakingB", "llama", {LEAK}),
        ("DrawsFromGlobalState", "llama", {LEAK}),
        ("TrainsA", "gpt2", {WEIGHTS, ONE}),
        ("Unweighted", "llama", {FACTORS}),
        ("UnweightedB", "gpt2", {WEIGHTS}),
        ("HeadForgotten", "bert", {FACTORS, ONE}),
        ("HalfTheBytes", "llama", {"bytes up = formula"}),
        ("DownloadForgotten", "llama", {"bytes down = formula"}),
        ("SavesUntuned", "llama", {FACTORS, ONE}),
        ("KeepsTheLast", "llama", {FACTORS, "grouping", "order"}),
        ("ClaimsFactorsAreExact", "llama", {WEIGHTS}),
        ("MergesIntoHalf", "llama", {WEIGHTS, ONE}),
        ("ResidualForgotten", "llama", {WEIGHTS, DOWN}),
        ("ResidualScaledTwice", "gpt2", {WEIGHTS}),
        ("ResidualNotTrainedBeside", "llama", {WEIGHTS}),
        ("SquareRootOnOneSide", "llama", {EXPECTED}),
        ("PenaltyNotRelative", "llama", {EXPECTED}),
        ("FrozenHalfNotRestored", "llama", {WEIGHTS}),
        ("SingularValuesForgotten", "gpt2", {WEIGHTS, ONE}),
        ("CoresBySize", "llama", {WEIGHTS}),
        ("NormsForgotten", "llama", {EXPECTED}),
        ("MomentumForgotten", "llama", {EXPECTED}),
        ("BetasConfused", "llama", {EXPECTED}),
        ("SignForgotten", "bert", {EXPECTED}),
        ("AveragesB", "llama", {UP, DOWN}),
        ("SendsLocal", "llama", {FACTORS, ONE}),
        ("SendsBoth", "llama", {UP}),
        ("UnweightedScalars", "llama", {FACTORS}),
        ("AddsUpClients", "gpt2", {FACTORS}),
        ("SignsOfTheRoundBefore", "llama", {FACTORS, ONE}),
        ("StepForgotten", "llama", {FACTORS, ONE}),
        ("StepForgottenInSums", "gpt2", {FACTORS, ONE}),
        ("Uphill", "bert", {FACTORS, ONE}),
        ("ReplaysAnotherSeed", "llama", {FACTORS, ONE}),
        ("CountsTheFirstClient", "llama", {FACTORS, "order"}),
        ("RowsOfWholeNumbers", "llama", {FACTORS, ONE}),
        ("KeepsTheLastRow", "llama", {FACTORS}),
        ("DirectionsFromGlobalState", "llama", {LEAK}),
        ("HeaderForgotten", "llama", {"bytes up = formula"}),
        ("SmallRows", "llama", {"bytes down = formula"}),
        ("ClassesAlike", "llama", {FACTORS}),
    ],
)
def test_fails_on_a_known_mistake_and_says_which(name: str, model: str, expected: set[str]) -> None:
    result = check(name, model)
    assert failed(result) == expected
    assert not result.passed


def test_fails_when_the_weight_is_not_the_number_of_examples_trained_on() -> None:
    assert not check("CountsClients").passed


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
        ("WrongKeys", "0 of 3 clients gave a valid update"),
        ("PhaseStuck", "round 2: 0 of 3 clients gave a valid update"),
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
    broken, sound = conform([OWN + "Raises", OWN + "Own"], rounds=1, models=["llama"])
    assert (broken.passed, sound.passed) == (False, True)


def test_a_users_own_strategy_passes_every_check_on_every_model() -> None:
    (result,) = conform([OWN + "Own"], rounds=2)
    assert result.passed
    found = {(finding.check, finding.model) for finding in result.findings}
    assert found >= {(c, m) for c in [WEIGHTS, *ALWAYS] for m in ("llama", "gpt2", "bert")}
    assert len(result.findings) == len(found)


def test_says_what_it_does() -> None:
    said: list[str] = []
    conform(["ffa_lora"], said.append, rounds=1, models=["llama", "bert"])
    assert said == ["ffa_lora on llama", "ffa_lora on bert"]


def test_measures_the_inexactness_of_a_mean_of_factors() -> None:
    (result,) = conform(["fedavg"], rounds=1, models=["llama"])
    (finding,) = [f for f in result.findings if f.check == FACTORS]
    assert "the weighted covariance" in finding.note
    assert 0.01 < float(finding.note.split("%")[0]) / 100 < 1


def test_unknown_strategies_are_a_users_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fedavg'"):
        conform(["fedavgg"])


def test_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    conform([OWN + "DrawsFromGlobalState"], rounds=1, models=["llama"])
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
