"""Strategies with one known mistake each: the check must fail, by the names that find it.

Another mistake is another row. What must fail is named, and nothing else may: a check that fails
on everything shows nothing.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from corolla.commands.check.findings import Finding
from corolla.commands.check.proofs import conform
from tests.strategies import mutants, sabotaged

WEIGHTS, FACTORS, EXPECTED = "mean of effective weights", "mean of factors", "as expected"
BY_EXAMPLES, SHARES, EACH = "weights = examples", "shares alone count", "every weight counts"
ORDER, GROUPING, SUMS = "order", "grouping", "partial sums"
LINEAR, PURE, ONE = "linear as declared", "server half is pure", "one client"
LEAK, START, COUNTED = "no leak between clients", "starts from the model", "examples counted"
UP, DOWN, FIRST = "bytes up = formula", "bytes down = formula", "bytes at first = formula"
EVALUATES, EFFECT = "evaluates the model", "option has an effect"
MIRRORS, KEPT, STAYS = "mirrors what clients keep", "what is kept counts", "what is kept stays"
DIRECTIONS = "directions of one's own"
PARTS, SPARSE, TURNED = "blocks by class", "sparse sets", "magnitudes"
BESIDE = "start beside the base"
BEST, ADDS_UP = "best of max_rank", "max_rank adds up"
UNWEIGHTED = (BY_EXAMPLES, SHARES, EACH, SUMS, LINEAR)
FOLDED = (BY_EXAMPLES, SHARES, ORDER, GROUPING)


@dataclass(frozen=True)
class Mutant:
    """A strategy with a mistake, the checks that must find it, on which model and option."""

    name: str
    found: Sequence[str]
    model: str = "llama"
    option: str = ""
    rounds: int = 2
    """Fewer than the command runs, where these are enough."""


MUTANTS = [
    # How clients are put together.
    Mutant("MedianOfMeans", (EXPECTED, *FOLDED, EACH)),
    Mutant("ByArrival", (SHARES, ORDER, GROUPING, EACH)),
    Mutant("FirstHalf", (FACTORS, *FOLDED, EACH)),
    Mutant("WeightsByPosition", (FACTORS, *FOLDED)),
    Mutant("LastOfOddDropped", (FACTORS, *FOLDED, EACH)),
    Mutant("LastThirtyTwo", (BY_EXAMPLES,)),
    Mutant("ClaimsLinear", (LINEAR,)),
    Mutant("SaysNothingOfWeights", (SHARES, EACH)),
    Mutant("MeanOfMeans", (GROUPING,)),
    Mutant("CountedTwice", (GROUPING,)),
    Mutant("RunningMean", (FACTORS, *FOLDED, SUMS, LINEAR)),
    Mutant("OneDictionaryForAll", (GROUPING, SUMS)),
    Mutant("GatewaysOfOneExample", (SUMS,)),
    Mutant("ScalarsLostInMerge", (GROUPING,)),
    # What a client weighs.
    Mutant("WeightsSquared", (FACTORS, BY_EXAMPLES, SHARES, SUMS, LINEAR)),
    Mutant("WeightsRooted", (WEIGHTS, BY_EXAMPLES, SHARES, SUMS, LINEAR)),
    Mutant("WeightsClamped", (BY_EXAMPLES, SHARES)),
    Mutant("WholeWeights", (BY_EXAMPLES,)),
    Mutant("StillClientsForgotten", (BY_EXAMPLES,)),
    Mutant("SumsInHalf", (FACTORS, *FOLDED, SUMS, LINEAR, ONE)),
    # The server half and its options.
    Mutant("MomentumOfAnother", (EXPECTED, BY_EXAMPLES)),
    Mutant("RateIgnored", (EXPECTED, BY_EXAMPLES, EFFECT), "bert", "lr"),
    Mutant("PullIgnored", (EFFECT,), "bert", "mu"),
    Mutant("FloorIgnored", (EXPECTED, BY_EXAMPLES), "bert", "tau"),
    Mutant("CutTooFar", (EXPECTED, BY_EXAMPLES), "bert", "residual_rank"),
    Mutant("EnergyOfValues", (EXPECTED, BY_EXAMPLES), "bert", "energy"),
    Mutant("StartUnbalanced", (START, EVALUATES), "bert", "balanced"),
    Mutant("LeavesOutWhatCounts", (PARTS,), "bert"),
    Mutant("StartsFromSmallB", (BESIDE,), "bert"),
    Mutant("WithoutValues", ("runs",), "bert", "only"),
    Mutant("CutsTheNewest", (BEST, ADDS_UP)),
    Mutant("HiddenMomentum", (SHARES, LINEAR, PURE)),
    Mutant("ChangesItsState", (WEIGHTS, LEAK, BY_EXAMPLES, EACH, LINEAR, PURE)),
    Mutant("SaysLittle", (EXPECTED, BY_EXAMPLES)),
    Mutant("GenerousFormula", (UP,)),
    # Devices.
    Mutant("FirstFactorReused", (START,)),
    Mutant("ControlAveraged", (MIRRORS,)),
    Mutant("ControlByExamples", (MIRRORS,)),
    Mutant("OwnFactorForgotten", (KEPT,)),
    Mutant("SameDirections", (DIRECTIONS,)),
    # What passed at first when somebody tried to get past the check.
    Mutant("LateSign", (WEIGHTS, BY_EXAMPLES), rounds=5),
    Mutant("FisherUnweighted", (EXPECTED, BY_EXAMPLES, SHARES, SUMS, LINEAR)),
    Mutant("FisherOfTheMean", (EXPECTED, BY_EXAMPLES)),
    Mutant("FisherFloorTooHigh", (EXPECTED, BY_EXAMPLES)),
    Mutant("SaysItRounds", (FACTORS, BY_EXAMPLES, SHARES, SUMS, LINEAR)),
    Mutant("EvaluatesItsStart", (EVALUATES,)),
    Mutant("OnceForgotten", (FIRST,)),
    Mutant("GenerousDownload", (DOWN,)),
    Mutant("CountsIn32Bits", (BY_EXAMPLES, SHARES)),
    Mutant("SameWeightReplaced", (FACTORS, BY_EXAMPLES, SHARES), rounds=3),
]

SABOTAGED = [
    Mutant("ScalingForgotten", (WEIGHTS, BY_EXAMPLES, ONE)),
    Mutant("WeightsOnBothFactors", (WEIGHTS, BY_EXAMPLES, SHARES), "gpt2"),
    Mutant("LeakingB", (LEAK, START)),
    Mutant("DrawsFromGlobalState", (LEAK,)),
    Mutant("TrainsA", (WEIGHTS, BY_EXAMPLES, ONE), "gpt2"),
    Mutant("Unweighted", (FACTORS, *UNWEIGHTED)),
    Mutant("UnweightedB", (WEIGHTS, *UNWEIGHTED), "gpt2"),
    Mutant("CountsClients", (COUNTED,)),
    Mutant("HeadForgotten", (FACTORS, BY_EXAMPLES, ONE, PARTS, BESIDE, SPARSE, TURNED), "bert"),
    Mutant("HalfTheBytes", (UP,)),
    Mutant("DownloadForgotten", (DOWN,)),
    Mutant("SavesUntuned", (FACTORS, START, BY_EXAMPLES, EACH, ONE)),
    Mutant("KeepsTheLast", (FACTORS, BY_EXAMPLES, EACH, ORDER, GROUPING, SUMS, LINEAR)),
    Mutant("ClaimsFactorsAreExact", (WEIGHTS, BY_EXAMPLES)),
    Mutant("MergesIntoHalf", (WEIGHTS, BY_EXAMPLES, ONE)),
    Mutant("ResidualForgotten", (WEIGHTS, BY_EXAMPLES, DOWN)),
    Mutant("ResidualScaledTwice", (WEIGHTS, BY_EXAMPLES), "gpt2"),
    Mutant("ResidualNotTrainedBeside", (WEIGHTS, START, BY_EXAMPLES)),
    Mutant("SquareRootOnOneSide", (EXPECTED, BY_EXAMPLES)),
    Mutant("PenaltyNotRelative", (EXPECTED, BY_EXAMPLES)),
    Mutant("FrozenHalfNotRestored", (WEIGHTS, START, BY_EXAMPLES)),
    Mutant("SingularValuesForgotten", (WEIGHTS, BY_EXAMPLES, ONE), "gpt2"),
    Mutant("CoresBySize", (WEIGHTS, *UNWEIGHTED)),
    Mutant("NormsForgotten", (EXPECTED, BY_EXAMPLES)),
    Mutant("MomentumForgotten", (EXPECTED, BY_EXAMPLES)),
    Mutant("BetasConfused", (EXPECTED, BY_EXAMPLES)),
    Mutant("SignForgotten", (EXPECTED, BY_EXAMPLES, PARTS, BESIDE, SPARSE, TURNED), "bert"),
    Mutant("AveragesB", (EXPECTED, BY_EXAMPLES, START, UP, DOWN, FIRST)),
    Mutant("SendsLocal", (FACTORS, BY_EXAMPLES, ONE)),
    Mutant("SendsBoth", (STAYS, UP)),
    Mutant("UnweightedScalars", (FACTORS, BY_EXAMPLES, SHARES, EACH, SUMS)),
    Mutant("AddsUpClients", (FACTORS, BY_EXAMPLES, SHARES, SUMS), "gpt2"),
    Mutant("SignsOfTheRoundBefore", (FACTORS, BY_EXAMPLES, ONE)),
    Mutant("StepForgotten", (FACTORS, BY_EXAMPLES, ONE)),
    Mutant("StepForgottenInSums", (FACTORS, BY_EXAMPLES, ONE), "gpt2"),
    Mutant("Uphill", (FACTORS, BY_EXAMPLES, ONE, SPARSE, TURNED), "bert"),
    Mutant("ReplaysAnotherSeed", (FACTORS, BY_EXAMPLES, ONE)),
    Mutant("CountsTheFirstClient", (FACTORS, *FOLDED, EACH, SUMS)),
    Mutant("RowsOfWholeNumbers", (FACTORS, BY_EXAMPLES, ONE)),
    Mutant("KeepsTheLastRow", (FACTORS, BY_EXAMPLES)),
    Mutant("DirectionsFromGlobalState", (LEAK,)),
    Mutant("HeaderForgotten", (UP,)),
    Mutant("SmallRows", (DOWN,)),
    Mutant("ClassesAlike", (FACTORS, BY_EXAMPLES)),
    Mutant("ForgetsWhatWasTrained", (EVALUATES,), rounds=5),
    Mutant("ShrinksWhatIsFrozen", (FACTORS, BY_EXAMPLES), rounds=5),
    Mutant("TrainsEverything", (FACTORS, BY_EXAMPLES, ONE)),
]


@cache
def failed(module: str, mutant: Mutant) -> dict[str, Finding]:
    """Check → the finding that failed; of a mutant with an option, only those with that option."""
    name = f"{module}:{mutant.name}"
    tried = [mutant.option] if mutant.option else []
    (result,) = conform([name], rounds=mutant.rounds, models=[mutant.model], tried=tried)
    assert not result.passed
    found = {f.check: f for f in result.findings if not f.passed}
    assert all(bool(f.options) == bool(mutant.option) for f in found.values())
    return found


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_is_found_by_name(mutant: Mutant) -> None:
    assert failed(mutants.__name__, mutant).keys() == set(mutant.found)


@pytest.mark.parametrize("mutant", SABOTAGED, ids=lambda mutant: mutant.name)
def test_a_sabotage_is_found_by_name(mutant: Mutant) -> None:
    assert failed(sabotaged.__name__, mutant).keys() == set(mutant.found)


def strategies_of(module: str | None) -> set[str]:
    """Names of public classes that name or inherit a strategy."""
    tree = ast.parse(Path(str(module)).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_every_mutant_has_a_row() -> None:
    public = {n for n in strategies_of(mutants.__file__) if not n.startswith("_")} - {"Keeper"}
    assert public == {mutant.name for mutant in MUTANTS}


@pytest.mark.parametrize(
    ("name", "check", "said"),
    [
        ("MedianOfMeans", EACH, "weights of ada, ben, cyd, dot, eve change nothing"),
        ("LastThirtyTwo", BY_EXAMPLES, "40 clients of 1 to 23 examples"),
        ("StillClientsForgotten", BY_EXAMPLES, "5 clients and 2 whose update changes nothing"),
        ("WeightsClamped", BY_EXAMPLES, "6 clients of 1 to 100,000 examples"),
        ("WholeWeights", BY_EXAMPLES, "7 late clients"),
        ("MeanOfMeans", GROUPING, "merged as ("),
        ("FirstHalf", ORDER, " clients in the order "),
        ("FirstFactorReused", START, " starts from another model than the server's"),
        ("ControlAveraged", MIRRORS, "control is not the mean of what 7 clients keep"),
        ("SameDirections", DIRECTIONS, "gus in 1 takes those of dot in 1"),
    ],
)
def test_the_finding_says_which_cohort_order_weight_or_client(
    name: str, check: str, said: str
) -> None:
    (row,) = (mutant for mutant in MUTANTS if mutant.name == name)
    assert said in failed(mutants.__name__, row)[check].note
