from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from corolla.config.run import RunConfig
from corolla.data.rows import Example
from corolla.errors import DataError
from corolla.evaluation.answers import choice_accuracy
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.models.trainable import Trainable
from corolla.server.runs import evaluate
from corolla.server.runs.evaluate import Evaluator, fairness
from corolla.types import Adapter, LoraSpec, Params

Settings = Callable[..., RunConfig]
HELD = [Example(f"answer {i}", prompt=f"question {i}") for i in range(5)]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_ANSWER_TOKENS", 6)


def evaluator(
    config: RunConfig, heldout: list[Example] = HELD, labels: list[str] | None = None
) -> Evaluator:
    model = LoraModel(pretrained.load(config, labels or ()))
    return Evaluator(config, model, heldout, labels or [])


def adapter(model: Trainable, spec: LoraSpec) -> Params:
    noise = torch.Generator().manual_seed(0)
    return {n: 0.3 * torch.randn(t.shape, generator=noise) for n, t in model.init(spec, 0).items()}


def plain_loss(folder: Path | None, tiny_model: Path) -> float:
    """The loss by transformers and peft alone, one example at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    if folder:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    total, targets = 0.0, 0
    for example in HELD:
        prompt = tokenizer(f"{example.prompt}\n")["input_ids"]
        answer = [*tokenizer(example.text)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        total, targets = total + float(loss) * len(answer), targets + len(answer)
    return total / targets


def test_the_score_of_a_saved_adapter_is_that_of_plain_peft(
    settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    judge = evaluator(settings())
    tuned = Adapter(adapter(judge.model, settings().lora))
    judge.save(tuned, tmp_path / "adapter")
    zero = Adapter(judge.model.init(settings().lora, 0))
    found = [judge.score(a)["loss"] for a in (zero, tuned, zero)]
    wanted = [plain_loss(f, tiny_model) for f in (None, tmp_path / "adapter", None)]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert abs(wanted[0] - wanted[1]) > 1e-2


def test_an_adapter_without_factors_is_the_base_model(settings: Settings, tiny_model: Path) -> None:
    assert evaluator(settings()).score(Adapter({}))["loss"] == pytest.approx(
        plain_loss(None, tiny_model), rel=1e-5
    )


def test_no_more_examples_than_asked_for(settings: Settings) -> None:
    held = [Example("x" * (i + 1), prompt="?") for i in range(40)]
    judge = evaluator(settings(eval_examples=4), held)
    # at even distances: 5, 15, 25 and 35, with <eos>
    found = judge.score(Adapter({}))
    assert found["targets"] == sum(i + 2 for i in (5, 15, 25, 35))


def test_answers_come_from_the_model(settings: Settings) -> None:
    """An adapter that is trained to say one thing says it."""
    judge = evaluator(settings())
    zero = Adapter(judge.model.init(settings().lora, 0))
    before = judge.samples(zero)
    assert [(s.prompt, s.reference) for s in before] == [
        (e.prompt, e.text) for e in (HELD[1], HELD[3])
    ]
    assert judge.samples(zero) == before
    assert judge.samples(Adapter(adapter(judge.model, settings().lora))) != before


def test_free_text_is_continued(settings: Settings) -> None:
    text = "abc def ghi jkl mno pqr stu vwx yza bcd efg hij"
    (sample,) = evaluator(settings(), [Example(text), Example("more")]).samples(Adapter({}))
    assert f"{sample.prompt} {sample.reference}" == text
    assert sample.prompt
    assert sample.reference


@pytest.mark.parametrize(
    "text", ["", " ", "x", " " + "x" * 45, "x" * 45, "\n\n" + "x " * 25], ids=ascii
)
def test_any_free_text_can_be_shown(settings: Settings, text: str) -> None:
    """Also what leaves no token to continue from."""
    samples = evaluator(settings(), [Example(text), Example("more")]).samples(Adapter({}))
    assert samples
    assert all(text.startswith(s.prompt) or "more".startswith(s.prompt) for s in samples)


def test_texts_that_are_too_long_to_show_are_left_out(settings: Settings) -> None:
    held = [Example("x" * 1000, prompt="?"), Example("short", prompt="!")]
    assert [s.prompt for s in evaluator(settings(), held).samples(Adapter({}))] == ["!"]


def test_a_classifier_answers_with_a_label(settings: Settings) -> None:
    labels = ["no", "yes"]
    held = [Example("good enough", label="yes"), Example("bad enough", label="no")]
    judge = evaluator(settings(), held, labels)
    start = judge.model.init(settings().lora, 0)
    head = next(n for n in start if not n.endswith(("lora_A", "lora_B")))
    flat = {**start, head: torch.zeros_like(start[head])}
    found = judge.score(Adapter(flat))
    assert found["loss"] == pytest.approx(0.693147, rel=1e-5)  # ln 2: both classes alike
    samples = judge.samples(Adapter(start))
    assert [(s.prompt, s.reference) for s in samples] == [(e.text, e.label) for e in held]
    assert all(s.answer in labels for s in samples)


def test_nothing_that_can_be_scored_is_one_line(settings: Settings) -> None:
    """Every held-out prompt is longer than max_length."""
    with pytest.raises(DataError, match="none of 1 held-out examples has a target left"):
        evaluator(settings(), [Example("yes", prompt="p" * 100)])


def test_held_out_examples_without_a_target_are_counted(settings: Settings) -> None:
    judge = evaluator(settings(), [*HELD, Example("yes", prompt="p" * 100)])
    assert judge.skipped == 1


def test_an_examination_adds_answers_and_choices(settings: Settings) -> None:
    """Scores of a round stay cheap; the base model's answers are what it gives without adapter."""
    config = settings(answer="exact", max_new_tokens=3)
    held = [Example(f"no {i}", prompt=f"q {i}", choices=(f"no {i}", "yes")) for i in range(4)]
    judge = evaluator(config, held)
    zero = Adapter(judge.model.init(config.lora, 0))
    said = [s.answer for s in judge.samples(zero)]
    assert said != ["no 1", "no 3"]
    assert judge.examine(zero) == {
        **judge.score(zero),
        "exact_match": 0.0,
        **choice_accuracy(judge.model.model, judge.model.base, held, config),
    }
    repeat = [Example(s.answer, prompt=s.prompt) for s in evaluator(config).samples(zero)]
    again = evaluator(config.model_copy(update={"max_new_tokens": 6}), repeat)
    assert again.examine(zero)["exact_match"] == 1.0


def test_answers_that_cannot_be_compared_are_refused_before_a_round(settings: Settings) -> None:
    with pytest.raises(DataError, match="needs a number in every response"):
        evaluator(settings(answer="gsm8k"), [Example("yes", prompt="?")])


def test_fairness_by_hand() -> None:
    """Twenty clients: a tenth is two. Who was measured once does not count."""
    clients: dict[str, dict[str, dict[str, float]]] = {
        f"c{i}": {"base": {"loss": 5.0}, "final": {"loss": float(i)}} for i in range(20)
    }
    clients["late"] = {"base": {}, "final": {"loss": 1000.0}}
    found = fairness(clients)
    assert found["base"] == {
        **{"clients": 20.0, "mean": 5.0, "std": 0.0, "best_decile": 5.0, "worst_decile": 5.0}
    }
    assert found["final"]["std"] == pytest.approx(float(np.std(range(20))))
    assert (found["final"]["mean"], found["final"]["clients"]) == (9.5, 20.0)
    assert (found["final"]["best_decile"], found["final"]["worst_decile"]) == (0.5, 18.5)


@pytest.mark.parametrize("number", [1, 9, 10, 19])
def test_a_tenth_is_at_least_one_client(number: int) -> None:
    clients = {f"c{i}": {w: {"loss": float(i)} for w in ("base", "final")} for i in range(number)}
    found = fairness(clients)["final"]
    assert (found["best_decile"], found["worst_decile"]) == (0.0, number - 1.0)


def test_without_clients_there_is_no_fairness() -> None:
    assert fairness({}) == {}
    assert fairness({"a": {"base": {}, "final": {"loss": 1.0}}}) == {}
