"""The demo with a language model: its settings, what it compares, and the table in its README."""

import json
from pathlib import Path
from typing import Any

import pytest

from corolla.config.load import load
from corolla.data.rows import Example
from corolla.models.files.folders import PACKAGED
from experiments.demo_llm import run

ENTRY = (
    "Module: pdb\nName: Pdb.checkline\nKind: method\nParameters: filename, lineno\n\nCheck a line."
)


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_its_settings_name_a_model_that_pip_installs(name: str) -> None:
    assert load(run.HERE / f"{name}.toml", {}).model in PACKAGED


def test_lines_are_right_where_they_are_the_datas() -> None:
    asked = [Example(ENTRY, prompt="pdb.Pdb.checkline(filename, lineno)")] * 4
    other = ENTRY.replace("method", "function")
    entries = [ENTRY, other, "Sure! " + ENTRY, ENTRY.partition("\nParameters")[0]]
    found = run.right(entries, asked)
    assert found == {"Module": 0.75, "Name": 1.0, "Kind": 0.75, "Parameters": 0.75, "all": 0.25}


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    results: dict[str, Any] = json.loads(run.RESULTS.read_text())
    assert run.table(results) in Path(run.HERE, "README.md").read_text()
