"""The README's advice on where to start stands on the results of its experiment."""

import json
from pathlib import Path

import pytest

from corolla.config.load import load
from experiments.start import run

RESULTS = json.loads(run.RESULTS.read_text())
README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", run.rows(RESULTS))
def test_the_readme_has_the_rows_of_the_results(row: str) -> None:
    assert f"\n{row}\n" in README


def test_the_readme_says_when_and_from_where() -> None:
    assert f"Measured {RESULTS['machine']['date'][:10]} by" in README
    assert {f"{row['runs'][0]['base']:.3f}" for row in RESULTS["rows"]} == {"4.753"}
    assert "(held-out loss 4.753)" in README
    worst = max(error for row in RESULTS["rows"] for error in row["runs"][0]["rank_errors"])
    assert f"({worst:.1%} off in effective weights in the worst round here)" in README


def test_the_results_are_of_the_scripts_commands() -> None:
    wanted = [(need, settings) for need, own in run.NEEDS.items() for settings in own]
    assert [(row["need"], row["settings"]) for row in RESULTS["rows"]] == wanted
    for row in RESULTS["rows"]:
        assert row["command"] == run.command(row["settings"])
        load(None, {}, [f"{key}={value}" for key, value in row["settings"].items()])
