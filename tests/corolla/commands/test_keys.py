"""`corolla keys` in all its forms, and the page in docs that it writes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.commands import keys
from corolla.config.keys import table
from corolla.config.run import RunConfig

PAGE = Path(__file__).resolve().parents[3] / "docs" / "settings.md"


def run(*options: str, code: int = 0) -> str:
    """What the command prints; on stderr where it fails."""
    result = CliRunner().invoke(app, ["keys", *options], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


def test_the_page_in_docs_is_what_the_command_prints() -> None:
    assert run("--markdown") == PAGE.read_text(encoding="utf-8"), (
        "python -m corolla keys --markdown > docs/settings.md"
    )


def test_every_key_has_a_row_of_the_page() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    assert [row.split("`")[1] for row in rows] == [key.name for key in table()]
    assert {row.replace("\\|", "").count("|") for row in rows} == {6}


def test_all_keys_are_listed_by_group() -> None:
    printed = run()
    assert [key.name for key in table() if key.name not in printed] == []
    assert "population: " in printed


@pytest.mark.parametrize("word", ["epsilon", "Epsilon", "privacy_budget"])
def test_one_key_is_told_in_full(word: str) -> None:
    printed = run(word)
    for part in ("privacy", "number from 1e-06 to 1e+06", "--set dp=example --set epsilon=8.0"):
        assert part in printed
    assert "not with noise_multiplier=1" in printed
    assert "give one of them" in printed


def test_a_key_of_a_class_and_an_option_are_found_by_their_names() -> None:
    assert run("classes.phone.local-steps").startswith("classes.NAME.local_steps: ")
    assert run("flora.compact-at").startswith("flora.compact_at: ")


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("simulated", ["step_seconds", "deadline_simulated", "classes.NAME.drop"]),
        ("compact at", ["flora.compact_at", "fedex_lora.compact_at"]),
        ("privacy", ["dp", "separation"]),
    ],
)
def test_a_word_finds_the_keys_whose_name_group_or_text_has_it(word: str, found: list[str]) -> None:
    names = [key.name for key in keys.find(word)]
    assert [name for name in found if name not in names] == []
    assert len(names) < 30


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("epsillon", "did you mean 'epsilon'?"),
        ("zzzz", "none is like it: corolla keys lists all"),
        ("nonsenseword", "none is like it: corolla keys lists all"),
        ("", "lists all"),
    ],
)
def test_a_word_that_no_key_has_is_one_line_and_an_exit_code(word: str, hint: str) -> None:
    told = run(word, code=2)
    assert hint in told
    assert len(told.splitlines()) == 1


def test_json_has_all_there_is_to_say() -> None:
    known = {key["name"]: key for key in json.loads(run("--json"))}
    assert known.keys() >= RunConfig.model_fields.keys()
    (clip,) = json.loads(run("clip", "--json"))
    assert known["clip"] == clip
    assert clip["settings"] == ["dp=client", "epsilon=8", "clip=0.5"]
    assert "is for dp=example or dp=client" in clip["refused"]["dp=none epsilon=null"]
    assert (clip["default"], clip["group"]) == (1.0, "privacy")
    assert clip["type"] == "number from 1e-10 to 1e+10"


@pytest.mark.parametrize("options", [["--json", "--markdown"], ["lr", "--markdown"]])
def test_forms_that_exclude_each_other_are_refused(options: list[str]) -> None:
    assert "--markdown" in run(*options, code=2)
