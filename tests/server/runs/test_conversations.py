"""Runs on conversations: what is trained and scored, and the date that a template writes."""

import json
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import transformers

from corolla.commands.simulate.in_process import simulate
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.encoding import IGNORE, Encoder
from corolla.errors import ConfigError, DataError
from corolla.server.runs import setup
from corolla.server.runs.folder import stored_run
from corolla.server.runs.observer import Silent
from corolla.server.runs.setup import set_up
from tests.conftest import byte_tokenizer

Settings = Callable[..., RunConfig]
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}[assistant]{% endif %}"
DATED = "{{ strftime_now('%d %b') }}" + TURNS + ASKS
OPEN = TURNS + "{% if add_generation_prompt %}[assistant]<think>{% endif %}"


def chat_model(folder: Path, tiny_model: Path, template: str) -> str:
    """The tiny model, with a tokenizer that has a chat template."""
    transformers.AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def talks(folder: Path, **more: Any) -> str:
    """Conversations of four clients, with two answers each."""
    rows = [
        {
            "client_id": name,
            "messages": [
                {"role": "user", "content": f"{name} {i}?"},
                {"role": "assistant", "content": f"{name[::-1]}"},
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": "ab" * (1 + i % 3)},
            ],
            **more,
        }
        for name in ("ada", "ben", "cyd", "dot")
        for i in range(6)
    ]
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Day(date):
    """A calendar that stands still."""

    now = "2026-01-31"

    @classmethod
    def today(cls) -> "Day":
        return cls.fromisoformat(cls.now)


class Stop(Silent):
    """Ends a run after a round."""

    def round_ended(self, line: Mapping[str, Any]) -> None:
        if line["round"] == 1:
            raise KeyboardInterrupt


def test_a_run_that_is_resumed_on_another_day_goes_on_with_its_own(
    settings: Settings, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "date", Day)
    config = settings(model=chat_model(tmp_path / "model", tiny_model, DATED), max_length=96)
    whole = simulate(config, tmp_path / "whole")
    with pytest.raises(Exception, match="stopped"):
        simulate(config, tmp_path / "parts", observer=Stop())
    monkeypatch.setattr(Day, "now", "2026-02-01")
    resumed = simulate(config, tmp_path / "parts", resume=True)
    other = simulate(config, tmp_path / "other")
    assert resumed.adapter_hash == whole.adapter_hash != other.adapter_hash
    days = [stored_run(tmp_path / name)[0].template_date for name in ("whole", "parts", "other")]
    assert days == ["2026-01-31", "2026-01-31", "2026-02-01"]
    chosen = config.model_copy(update={"template_date": "2026-01-31"})
    assert simulate(chosen, tmp_path / "chosen").adapter_hash == whole.adapter_hash


def test_a_run_without_a_date_says_nothing_of_it(settings: Settings, tmp_path: Path) -> None:
    config = settings(rounds=1)
    folder = simulate(config, tmp_path / "out").folder
    assert "template_date" not in json.loads((folder / "run.json").read_text())["config"]
    assert "template_date" not in config.model_dump(mode="json")
    dated = settings(template_date="2026-01-31").model_dump(mode="json")
    assert dated["template_date"] == "2026-01-31"


@pytest.mark.parametrize("day", ["31.1.2026", "2026-02-30", "20260131", ""])
def test_what_is_no_day_is_said(settings: Settings, day: str) -> None:
    with pytest.raises(ConfigError, match="expected a day as YYYY-MM-DD"):
        settings(template_date=day)


@pytest.mark.parametrize("template", [TURNS + ASKS, None], ids=["chat", "plain"])
def test_scores_are_of_all_answers_of_a_conversation(
    settings: Settings, tmp_path: Path, tiny_model: Path, template: str | None
) -> None:
    """Held-out targets are the letters of the answers and one end of turn each, by hand."""
    model = chat_model(tmp_path / "model", tiny_model, template) if template else str(tiny_model)
    config = settings(model=model, data=talks(tmp_path), rounds=1, max_length=96, answer="exact")
    summary = simulate(config, tmp_path / "out")
    info = json.loads((summary.folder / "run.json").read_text())
    held = federated.load(config).heldout
    learnt = [turn.content for row in held for turn in row.turns if turn.role == "assistant"]
    assert info["final"]["targets"] == sum(len(answer) + 1 for answer in learnt)
    assert 0 <= info["final"]["exact_match"] <= 1
    assert info["heldout_skipped"] == 0


def test_a_generated_answer_is_compared_with_the_last_of_a_conversation(
    settings: Settings, tmp_path: Path, tiny_model: Path
) -> None:
    model = chat_model(tmp_path / "model", tiny_model, TURNS + ASKS)
    loaded = set_up(settings(model=model, data=talks(tmp_path), max_length=96), None)
    row, tokenizer = loaded.data.heldout[0], loaded.model.base.tokenizer
    encoder = Encoder.of(loaded.config, tokenizer)
    (found,) = encoder(row)
    asked = encoder.prompt_ids(row)
    assert list(found.input_ids[: len(asked)]) == asked
    rest = list(found.input_ids[len(asked) :])
    assert tokenizer.decode(rest) == f"{row.answer}<eos>"
    assert not isinstance(found.labels, int)
    assert list(found.labels[len(asked) :]) == rest
    assert found.labels[len(asked) - 1] == IGNORE


def test_columns_that_are_not_used_are_told_of(settings: Settings, tmp_path: Path) -> None:
    config = settings(data=talks(tmp_path, system="Be brief.", topic="x"), max_length=96)
    told = {own["id"]: own["text"] for own in set_up(config, None).facts["warnings"]}
    assert "are not used: system: rename them" in told["columns"]
    plain = set_up(settings(data=talks(tmp_path), max_length=96), None).facts["warnings"]
    assert "columns" not in {own["id"] for own in plain}


def test_a_template_that_asks_otherwise_is_told_of(
    settings: Settings, tmp_path: Path, tiny_model: Path
) -> None:
    model = chat_model(tmp_path / "model", tiny_model, OPEN)
    told = {own["id"]: own["text"] for own in set_up(settings(model=model), None).facts["warnings"]}
    assert "asks with '[user]9274<eos>\\n[assistant]<think>'" in told["template"]
    assert "\n" not in told["template"]


def test_a_template_that_cannot_be_trained_on_is_refused(
    settings: Settings, tmp_path: Path, tiny_model: Path
) -> None:
    model = chat_model(tmp_path / "model", tiny_model, "{{ raise_exception('never') }}")
    with pytest.raises(DataError, match="refuses a row of turns: never") as caught:
        set_up(settings(model=model), None)
    assert "\n" not in str(caught.value)
