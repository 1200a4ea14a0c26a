"""`corolla evaluate` on adapters without a run, and on tables of any scores."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.commands import artefacts
from corolla.commands.artefacts import evaluate_adapter, evaluate_tasks, print_scores
from corolla.config.run import RunConfig
from corolla.errors import ConfigError, DataError
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.types import Adapter

Settings = Callable[..., RunConfig]


@pytest.fixture
def adapter(settings: Settings, tmp_path: Path) -> Path:
    """One that changes nothing."""
    model = LoraModel(pretrained.load(settings()))
    folder = tmp_path / "adapter"
    model.save(folder, Adapter(model.init(settings().lora, 0)), settings().lora)
    return folder


def rows(path: Path, made: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def test_choices_and_answers_are_scored(adapter: Path, tmp_path: Path) -> None:
    made = [{"prompt": f"q{i}", "choices": ["1", "2 2"], "answer": i % 2} for i in range(40)]
    settings = ["answer=gsm8k", "max-new-tokens=4", "max-length=64"]
    found = evaluate_adapter(adapter, None, rows(tmp_path / "d.jsonl", made), settings)
    assert found["base"] == found["adapter"]
    assert 0 <= found["base"]["exact_match"] <= 1
    assert found["base"]["choice_accuracy"] in {i / 10 for i in range(11)}  # ten are held out
    assert found["base"].keys() == {
        *("loss", "loss_error", "accuracy", "targets"),
        *("exact_match", "choice_accuracy", "choice_accuracy_norm"),
    }


def test_answers_need_prompts(adapter: Path, tmp_path: Path) -> None:
    data = rows(tmp_path / "d.jsonl", [{"text": f"t {i}"} for i in range(40)])
    with pytest.raises(DataError, match="needs rows with prompt and response"):
        evaluate_adapter(adapter, None, data, ["answer=exact", "max-length=64"])


def test_tasks_need_a_language_model(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "labels_of", lambda folder: ("no", "yes"))
    with pytest.raises(ConfigError, match="is a classifier"):
        evaluate_tasks(adapter, None, ["hellaswag"])


def test_tasks_bring_their_data(adapter: Path) -> None:
    command = ["evaluate", str(adapter), "--tasks", "x", "--data", "y"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "leave out --data" in result.stderr


def test_a_table_has_every_score() -> None:
    screen = io.StringIO()
    scores = {
        "base": {"loss": 2.5, "f1": 0.125, "targets": 7.0, "pick/acc": 0.25},
        "adapter": {"loss": 1.5, "f1": 0.25, "targets": 7.0, "pick/acc": 0.5},
    }
    print_scores(Console(file=screen, width=100), scores)
    shown = screen.getvalue()
    for text in ("2.5000", "1.5000", "macro F1", "12.5%", "25.0%", "pick/acc", "0.5000", " 7 "):
        assert text in shown, text
