"""Token files: what the Encoder makes of a device's rows, one line per sequence."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.data.encoding import IGNORE, Encoder
from corolla.data.rows import Example
from corolla.errors import ConfigError, DataError, ModelError
from corolla.phones import token_file
from tests.conftest import byte_tokenizer


def rows(path: Path, made: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_what_the_encoder_makes(tiny_model: Path, tmp_path: Path) -> None:
    long = "abcdefghij" * 3
    data = rows(
        tmp_path / "d.jsonl",
        [
            {"prompt": "ask", "response": "tell"},
            {"text": long, "split": "train"},
            {"text": "held out", "split": "test"},
            {"text": "own", "split": "validation"},
            {"prompt": "too long a prompt", "response": "cut away"},
            {"text": "ok"},
        ],
    )
    out = tmp_path / "t.jsonl"
    assert token_file.write(str(tiny_model), data, out, 12) == (5, 3)
    encoder = Encoder(byte_tokenizer(), (), 12)
    (pair,) = encoder(Example("tell", "ask"))
    windows, (short,) = encoder(Example(long)), encoder(Example("ok"))
    assert len(windows) == 3
    assert pair.labels[0] == IGNORE  # type: ignore[index]
    assert read(out) == [
        {"input_ids": pair.input_ids, "labels": pair.labels, "example": 0},
        *({"input_ids": window.input_ids, "example": 1} for window in windows),
        {"input_ids": short.input_ids, "example": 3},
    ]


def test_a_template_that_writes_a_date_needs_that_of_the_run(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "bundle")
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    order = (
        str(tmp_path / "bundle"),
        rows(tmp_path / "d.jsonl", [{"prompt": "q", "response": "a"}]),
    )
    for day in ("", "tomorrow"):
        with pytest.raises(ConfigError, match="give --template-date as YYYY-MM-DD"):
            token_file.write(*order, tmp_path / "t.jsonl", 8, day)
    token_file.write(*order, tmp_path / "t.jsonl", 8, "2026-01-31")
    assert byte_tokenizer().decode(read(tmp_path / "t.jsonl")[0]["input_ids"]) == "31qa<eos>"


def test_a_bundle_has_a_tokenizer(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "bundle")
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    data = rows(tmp_path / "d.jsonl", [{"text": "abc"}])
    token_file.write(str(tmp_path / "bundle"), data, tmp_path / "t.jsonl", 8)
    ids = list(byte_tokenizer()("abc")["input_ids"])
    assert read(tmp_path / "t.jsonl") == [{"input_ids": [*ids, 0], "example": 0}]


@pytest.mark.parametrize(
    ("row", "length", "error", "said"),
    [
        ({"text": "a", "label": "x"}, 8, DataError, "not on classes"),
        ({"text": "a", "split": "test"}, 8, DataError, "leaves no sequence with a target"),
        ({"prompt": "12345678", "response": "a"}, 8, DataError, "raise --max-length"),
        ({"text": "a"}, 1, ConfigError, "at least 2 tokens"),
    ],
)
def test_rows_that_cannot_be_trained_on(
    tiny_model: Path,
    tmp_path: Path,
    row: dict[str, Any],
    length: int,
    error: type[Exception],
    said: str,
) -> None:
    data, out = rows(tmp_path / "d.jsonl", [row]), tmp_path / "t.jsonl"
    with pytest.raises(error, match=said):
        token_file.write(str(tiny_model), data, out, length)
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_a_folder_that_does_not_exist_is_named(tiny_model: Path, tmp_path: Path) -> None:
    data, out = rows(tmp_path / "d.jsonl", [{"text": "abc"}]), tmp_path / "no" / "t.jsonl"
    with pytest.raises(ConfigError, match=r"t.jsonl: there is no folder .*/no$"):
        token_file.write(str(tiny_model), data, out, 8)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    data = rows(tmp_path / "d.jsonl", [{"text": "abc"}])
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        token_file.write(str(tmp_path), data, tmp_path / "t.jsonl", 8)


def test_the_command(tiny_model: Path, tmp_path: Path) -> None:
    data, out = rows(tmp_path / "d.jsonl", [{"text": "abc"}]), tmp_path / "t.jsonl"
    command = ["tokens", data, "--model", str(tiny_model), "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "1 sequences of 1 examples" in " ".join(result.stdout.split())
    result = CliRunner().invoke(app, ["tokens", "none.jsonl", *command[2:]])
    assert result.exit_code == 1
    assert result.stderr == "error: cannot read data file none.jsonl: No such file or directory\n"
