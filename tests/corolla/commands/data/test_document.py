"""The commands of docs/data.md, run as they stand there."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from corolla.cli.app import app

DOCUMENT = Path(__file__).resolve().parents[4] / "docs" / "data.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the commands name, and a hub with their set."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "models" / "mine")
    pairs = [{"client_id": f"c{i % 3}", "prompt": f"q{i}", "response": "a"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "rows.csv").write_text("body,reply\n" + "q,a\n" * 60)
    rows = [{"text": f"row {i}"} for i in range(60)]

    def load(name: str, subset: str) -> dict[str, list[dict[str, Any]]]:
        assert (name, subset) == ("some/set", "main")
        return {"train_sft": rows, "test_sft": rows[:9], "train_gen": rows[:5]}

    monkeypatch.setattr("datasets.load_dataset", load)
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_shell_examples(line: str, place: Path) -> None:
    program, *words = shlex.split(line)
    assert program == "corolla"
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


def test_there_are_commands() -> None:
    assert len(LINES) >= 4
