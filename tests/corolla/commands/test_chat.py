"""`corolla chat`: a result and its base model are asked what they were trained to be asked."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from corolla.cli.app import app
from corolla.commands import chat
from corolla.config.run import RunConfig
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.types import Adapter

Settings = Callable[..., RunConfig]


@pytest.fixture
def adapter(settings: Settings, tmp_path: Path) -> Path:
    """One that makes the model say something else."""
    config = settings(rank=4)
    model = LoraModel(pretrained.load(config))
    start = model.init(config.lora, 0)
    noise = torch.Generator().manual_seed(3)
    moved = {name: t + torch.randn(t.shape, generator=noise) for name, t in start.items()}
    folder = tmp_path / "adapter"
    model.save(folder, Adapter(moved), config.lora)
    return folder


@torch.no_grad()
def greedy(model: torch.nn.Module, tokenizer: object, prompt: str, most: int) -> str:
    """The likeliest token again and again, by hand."""
    ids = tokenizer(prompt + "\n", return_tensors="pt")["input_ids"]  # type: ignore[operator]
    eos, start = tokenizer.eos_token_id, ids.shape[1]  # type: ignore[attr-defined]
    if eos is not None and ids[0, -1] == eos:
        ids, start = ids[:, :-1], start - 1
    for _ in range(most):
        token = model(input_ids=ids).logits[0, -1].argmax()
        if token == eos:
            break
        ids = torch.cat([ids, token[None, None]], dim=1)
    text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)  # type: ignore[attr-defined]
    return str(text).strip()


def test_both_answer_as_plain_peft_and_transformers_do(settings: Settings, adapter: Path) -> None:
    name = settings().model
    found = chat.once(chat.open_chat(adapter, None, ["max-new-tokens=6"], ""), "how are you?")
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    expected = {"base model": greedy(base, tokenizer, "how are you?", 6)}
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    expected["fine-tuned"] = greedy(tuned, tokenizer, "how are you?", 6)
    assert found == expected
    assert found["base model"] != found["fine-tuned"]


def test_a_conversation_remembers_until_another_begins(adapter: Path) -> None:
    opened = chat.open_chat(adapter, None, ["max-new-tokens=2"], "be brief")
    said = chat.once(opened, "first")
    chat.once(opened, "second")
    for speaker in opened.speakers:
        assert [turn.role for turn in speaker.turns] == [
            *("system", "user", "assistant", "user", "assistant")
        ]
        assert [turn.content for turn in speaker.turns][:3] == [
            *("be brief", "first", said[speaker.name])
        ]
    opened.begin()
    assert chat.once(opened, "first") == said


def test_answers_are_heard_while_they_are_made(adapter: Path) -> None:
    opened = chat.open_chat(adapter, None, ["max-new-tokens=6"], "")
    heard = list[str]()
    answer = opened.ask(opened.speakers[0], "what is it?", heard.append)
    assert heard[-1] == answer
    assert all(answer.startswith(part) for part in heard)


def test_a_terminal_shows_both_and_obeys_commands(adapter: Path) -> None:
    opened = chat.open_chat(adapter, None, ["max-new-tokens=3"], "")
    typed: Iterator[str] = iter(["", "[bold]hello", "/new", "/quit", "never read"])
    screen = io.StringIO()
    chat.talk(Console(file=screen, width=80), opened, lambda: next(typed))
    shown = screen.getvalue()
    assert "base model" in shown
    assert "fine-tuned" in shown
    assert "another conversation" in shown
    assert next(typed) == "never read"
    assert all(not speaker.turns for speaker in opened.speakers)


def test_what_is_longer_than_the_model_reads_is_said(adapter: Path) -> None:
    screen = io.StringIO()
    typed = iter(["word " * 4000])

    def read() -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    opened = chat.open_chat(adapter, None, ["max-new-tokens=3"], "")
    chat.talk(Console(file=screen, width=200), opened, read)
    assert "the model reads" in screen.getvalue()


def test_scripts_ask_once(adapter: Path) -> None:
    command = ["chat", str(adapter), "--once", "hello", "--set", "max-new-tokens=3"]
    plain, as_json = (CliRunner().invoke(app, [*command, *more]) for more in ([], ["--json"]))
    assert plain.exit_code == as_json.exit_code == 0, plain.output
    answers = json.loads(as_json.stdout)
    assert answers.keys() == {"base model", "fine-tuned"}
    for name, answer in answers.items():
        assert f"{name}: {answer or '(nothing)'}" in plain.stdout


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--json"], "add --once"),
        (["--once", " "], "found an empty one"),
        ([], "needs a terminal"),
    ],
)
def test_a_wrong_order_is_one_line(adapter: Path, more: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["chat", str(adapter), *more])
    assert done.exit_code == 2
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_that_is_no_result_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["chat", str(tmp_path), "--once", "hello"])
    assert done.exit_code == 1
    assert "is no adapter" in done.stderr
