"""`corolla data`: what it counts, against counts made by hand, and what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app

RUNNER = CliRunner()

Rows = list[dict[str, Any]]


def written(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def looked(*options: str) -> dict[str, Any]:
    result = RUNNER.invoke(app, ["data", *options, "--json"])
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Three clients; the first has a row twice, and one with the second; one is held out too."""
    rows: Rows = [
        {"client_id": "a", "prompt": f"q{i}", "response": f"r{i}", "split": "train"}
        for i in (0, 0, 1, 2)
    ]
    rows += [{**rows[2], "client_id": "b"}, {**rows[2], "client_id": "b", "prompt": "own"}]
    rows += [{**rows[0], "client_id": "c"}]
    rows += [{**rows[3], "client_id": "b", "split": "test"}]
    rows += [{**rows[0], "prompt": "new", "split": "test", "system": "be brief", "page": 3}]
    return written(tmp_path / "x.jsonl", rows)


def test_what_is_counted(pairs: str) -> None:
    found = looked(pairs, "--set", "eval-fraction=0.01")
    assert found["container"] == "JSON lines, UTF-8"
    assert found["rows"] == 9
    assert found["forms"] == {"prompt and response": 9}
    assert found["columns"]["prompt"] == 9
    assert found["columns_unused"] == {"system": 1}
    assert found["columns_unknown"] == {"page": 1}
    assert found["clients_left_out"] == 1
    assert {c: n["train"] + n["validation"] for c, n in found["clients"].items()} == {
        "a": 4,
        "b": 2,
    }
    assert found["held_out"] == 2
    assert found["lengths"]["rows"] == found["lengths"]["of"] == 5


def test_duplicates_are_counted_within_across_and_beyond_clients(pairs: str) -> None:
    """Validation rows are given, so that nothing is carved from those for training."""
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    rows += [{"client_id": "a", "prompt": "v", "response": "v", "split": "validation"}]
    found = looked(written(Path(pairs), rows), "--set", "min-examples=1")
    # a: q0 twice; q1 at a and b, q0 twice at a and once at c; q2 is held out and trained on.
    assert found["duplicates"] == {"within": 1, "across": 2 + 3, "held_out": 1}


def test_what_is_cut_and_dropped(tmp_path: Path) -> None:
    rows = [
        {"client_id": "a", "prompt": "q", "response": "word " * 60},
        {"client_id": "a", "prompt": "word " * 60, "response": "a"},
        *({"client_id": "a", "prompt": "q", "response": "a"} for _ in range(8)),
        *({"client_id": "long", "prompt": "word " * 60, "response": "a"} for _ in range(4)),
    ]
    for row in rows:
        row["split"] = "train"
    rows += [{**rows[2], "split": "test"}, {**rows[2], "split": "validation"}]
    path = written(tmp_path / "x.jsonl", rows)
    found = looked(path, "--set", "max-length=16")
    assert found["clients_without_target"] == ["long"]
    lengths = found["lengths"]
    assert (lengths["rows"], lengths["longer"]) == (10, 2)
    assert (lengths["cut"], lengths["dropped"], lengths["split"]) == (1, 1, 0)
    assert lengths["without_target"] == {"a": 1}
    part = looked(path, "--set", "max-length=16", "--sample", "3")["lengths"]
    assert (part["rows"], part["of"]) == (3, 10)
    result = RUNNER.invoke(app, ["data", path, "--set", "max-length=16"], terminal_width=200)
    told = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert "left out, no target long" in told
    assert "1 are cut at max-length=16; 1 have no target within max-length=16" in told


def test_the_example_says_what_is_learnt(tmp_path: Path) -> None:
    rows = [{"prompt": "the question", "response": "its answer"}] * 40
    path = written(tmp_path / "x.jsonl", rows)
    found = looked(path)["example"]
    learnt = "".join(text for text, own in found["parts"] if own)
    asked = "".join(text for text, own in found["parts"] if not own)
    assert "its answer" in learnt
    assert "the question" in asked
    assert "answer" not in asked
    shown = RUNNER.invoke(app, ["data", path]).stdout
    assert "»its answer" in shown


def test_labels_are_counted(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i % 3 == 0} for i in range(60)]
    found = looked(written(tmp_path / "x.jsonl", rows), "--set", "partition=iid", "--clients", "2")
    assert found["forms"] == {"text and label": 60}
    assert set(found["labels"]) == {"True", "False"}
    assert sum(found["labels"].values()) == found["lengths"]["of"] == found["lengths"]["targets"]
    many = [{"text": f"t{i}", "label": f"l{i}"} for i in range(60)]
    found = looked(written(tmp_path / "y.jsonl", many), "--clients", "2")
    assert "60 labels of 60 rows" in found["notes"][0]
    one = written(tmp_path / "z.jsonl", [{"text": "t", "label": "l"}] * 60)
    result = RUNNER.invoke(app, ["data", one])
    assert result.exit_code == 1
    assert "all 60 rows have the label 'l'" in result.stderr


def test_columns_and_splits_are_named_on_the_command_line(tmp_path: Path) -> None:
    rows = [{"body": f"q{i}", "reply": "r", "fold": "sft"} for i in range(40)]
    rows += [{"body": "q", "reply": "r", "fold": "rest"}] * 7
    path = written(tmp_path / "x.jsonl", rows)
    names = {"columns.prompt": "body", "columns.response": "reply", "columns.split": "fold"}
    options = [f"--set={name}={theirs}" for name, theirs in names.items()]
    found = looked(path, *options, "--set", "splits.train=sft", "--clients", "2")
    assert (found["rows"], found["rows_of_other_splits"]) == (40, {"rest": 7})
    table = tmp_path / "run.toml"
    table.write_text(
        '[columns]\nprompt = "body"\nresponse = "reply"\nsplit = "fold"\n[splits]\ntrain = "sft"\n'
    )
    assert looked(path, "--config", str(table), "--clients", "2") == found


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["missing.jsonl"], 1, "cannot read data file missing.jsonl"),
        (["--set", "columns.prompt=body"], 2, "columns, splits and subset are of other data"),
        (["x.jsonl", "--set", "columns.promt=body"], 2, "columns.promt names nothing that is read"),
        (["x.jsonl", "--set", "splits.dev=body"], 2, "splits.dev names nothing that is read"),
        (["x.jsonl", "--set", "columns.prompt=[1]"], 2, "expected a name, found [1]"),
        (["x.jsonl", "--set", "columns=3"], 2, "columns: expected a table"),
        (["--sample", "0"], 2, "0 is not in the range"),
        (["--model", "./none"], 1, "neither a model folder nor a .gguf file"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "x.jsonl", [{"text": "a"}] * 40)
    result = RUNNER.invoke(app, ["data", *options], terminal_width=200)
    assert result.exit_code == code
    assert says in result.stderr
