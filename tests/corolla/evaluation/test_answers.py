from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
import torch
import transformers

from corolla.config.run import RunConfig
from corolla.data.rows import Example
from corolla.errors import DataError
from corolla.evaluation import answers
from corolla.evaluation.answers import choice_accuracy, exact_match, final_number, generate, same
from corolla.models import pretrained, trainable
from corolla.types import Adapter

Settings = Callable[..., RunConfig]
SMALL = "tiny prompts of | quite different | l | engths, so that padding shows".split("|")


@pytest.fixture
def base(settings: Settings) -> pretrained.Base:
    return pretrained.load(settings())


def one_by_one(base: pretrained.Base, ids: list[int], most: int, model: Any = None) -> list[int]:
    """Greedy decoding from its definition: no cache, no batch, no padding."""
    grown = list(ids)
    for _ in range(most):
        with torch.no_grad():
            logits = (model or base.model)(input_ids=torch.tensor([grown])).logits
        grown.append(int(logits[0, -1].argmax()))
        if grown[-1] == base.tokenizer.eos_token_id:
            break
    return grown[len(ids) :]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7.\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### $18.", "18"),
        ("#### 42.00", "42"),
        ("#### -5", "-5"),
        ("#### -$5.50", "-5.5"),
        ("#### $-5", "-5"),
        ("#### .5 litres", "0.5"),
        ("#### 3 of 4", "3"),
        ("the answer is 12.", "12"),
        ("first 1, then 2, then 3", "3"),
        ("10-5", "5"),
        ("4 #### 5 #### 6", "6"),
        ("7 ####", None),
        ("none", None),
        ("", None),
        ("$", None),
        ("−8", "-8"),
        ("it is 1 000", "1000"),
        ("#### 1 000 000.5", "1000000.5"),
        ("1\u202f234 or 1\u00a0234", "1234"),
        ("of 1,2,3", "3"),
        ("#### 1,2,3", "1"),
        ("1,000,5", "5"),
        ("1,2345", "2345"),
        ("in 2024 500 people", "500"),
        ("7 12", "12"),
        ("12 3456", "3456"),
        ("#### 1e3", "1000"),
        ("-1.5E+2", "-150"),
        ("2e-2", "0.02"),
        ("1e3x", "3"),
        ("4 eggs", "4"),
        ("1,000", "1000"),
    ],
)
def test_the_final_number_of_an_answer(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "reference", "kind", "right"),
    [
        ("so it is $1,000.00", "#### 1000", "gsm8k", True),
        ("so it is 1001", "#### 1000", "gsm8k", False),
        ("no idea", "#### 1000", "gsm8k", False),
        (" Paris\n", "paris", "exact", True),
        ("New  York", "new york", "exact", True),
        ("Paris.", "Paris", "exact", False),
    ],
)
def test_answers_are_compared(answer: str, reference: str, kind: str, right: bool) -> None:
    assert same(answer, reference, kind) is right


def test_every_answer_of_gsm8k_is_read() -> None:
    """Two rows of the data set, and what its own authors extract from them."""
    rows = {
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 "
        "clips altogether in April and May.\n#### 72": 72,
        "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n#### 10": 10,
    }
    assert {text: final_number(text) for text in rows} == rows


def test_generation_in_batches_is_greedy_decoding(base: pretrained.Base) -> None:
    """A model whose prompts are padded wrongly would answer otherwise."""
    prompts = [base.tokenizer(text)["input_ids"] for text in SMALL]
    wanted = [one_by_one(base, ids, 12) for ids in prompts]
    found = generate(base.model, base, prompts, 12)
    texts = [base.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in wanted]
    assert found == texts
    assert len(set(texts)) == len(texts)


def test_a_model_with_a_trained_prompt_is_not_padded(settings: Settings) -> None:
    config = settings(parameters="prompt", virtual_tokens=5)
    resident = trainable.build(config, pretrained.load(config))
    noise = torch.Generator().manual_seed(0)
    start = resident.init(config.lora, 0)
    tuned = {name: torch.randn(t.shape, generator=noise) for name, t in start.items()}
    resident.show(Adapter(tuned), config.lora)
    base = resident.base
    prompts = [base.tokenizer(text)["input_ids"] for text in [*SMALL, *SMALL]]
    wanted = [one_by_one(base, ids, 8, resident.model) for ids in prompts]
    texts = [base.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in wanted]
    assert generate(resident.model, base, prompts, 8, 5) == texts


def test_what_a_model_prefers_to_sample_is_greedy_here(base: pretrained.Base) -> None:
    prompts = [base.tokenizer(text)["input_ids"] for text in SMALL]
    plain = generate(base.model, base, prompts, 8)
    settings = base.model.generation_config
    settings.do_sample, settings.temperature, settings.top_p, settings.top_k = True, 5.0, 0.9, 7
    settings.repetition_penalty, settings.max_length = 5.0, 3
    assert generate(base.model, base, prompts, 8) == plain


class Speaker:
    """Writes given tokens, whatever it is asked: a stand-in that `generate` can drive."""

    def __init__(self, base: pretrained.Base, says: str) -> None:
        self.model = base.model
        self.says = base.tokenizer(says)["input_ids"]
        self.asked: list[Any] = []
        self.device = torch.device("cpu")
        self.generation_config = transformers.GenerationConfig()

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        self.asked.append((input_ids.shape, options))
        said = torch.tensor([self.says] * len(input_ids))
        return torch.cat([input_ids, said[:, : options["generation_config"].max_new_tokens]], 1)


def test_exact_match_by_hand(base: pretrained.Base, settings: Settings) -> None:
    held = [Example(f"thus\n#### {n}", prompt="how many?") for n in (41, 42, 43, 42)]
    config = settings(answer="gsm8k")
    assert exact_match(Speaker(base, "I say 42."), base, held, config) == 0.5
    assert (
        exact_match(
            Speaker(base, "I say 42."),
            base,
            held,
            config.model_copy(
                update={"max_new_tokens": 7}  # cut before the 2
            ),
        )
        == 0.0
    )
    asked = answers.ask(Speaker(base, "#### 41"), base, held, config)
    assert asked == {"exact_match": 0.25}


def test_an_answer_stays_within_the_positions_of_the_model(base: pretrained.Base) -> None:
    """The tiny model has 128."""
    speaker = Speaker(base, "x")
    generate(speaker, base, [[5] * 100, [5] * 120], 256)
    generate(speaker, base, [[5] * 200], 256)
    lengths = [options["generation_config"].max_new_tokens for _, options in speaker.asked]
    assert lengths == [8, 1]
    assert [tuple(shape) for shape, _ in speaker.asked] == [(2, 120), (1, 127)]


def test_nothing_is_asked_without_being_wanted(base: pretrained.Base, settings: Settings) -> None:
    assert answers.ask(None, base, [Example("a", prompt="b")], settings()) == {}
    assert answers.ask(None, base, [], settings()) == {}


@pytest.mark.parametrize(
    ("example", "kind", "reason"),
    [
        (Example("free text"), "exact", "needs rows with prompt and response"),
        (Example("text", label="a"), "gsm8k", "needs rows with prompt and response"),
        (Example("no number", prompt="?"), "gsm8k", "'no number'"),
    ],
)
def test_examples_that_cannot_be_asked(
    settings: Settings, example: Example, kind: str, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        answers.check([Example("1", prompt="?"), example], settings(answer=kind))


def dense_log_likelihood(base: pretrained.Base, prompt: str, choice: str) -> float:
    """By transformers alone: the prompt and a line end, the choice, the end of the sequence."""
    before = base.tokenizer(prompt + "\n")["input_ids"]
    after = [*base.tokenizer(choice)["input_ids"], base.tokenizer.eos_token_id]
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([before + after])).logits[0].double()
    spoken = torch.log_softmax(logits, -1)[len(before) - 1 : -1]
    return float(spoken[range(len(after)), after].sum())


def test_choices_are_ranked_by_their_likelihood(base: pretrained.Base, settings: Settings) -> None:
    """The choice that transformers finds likeliest is right for one half, wrong for the other."""
    asked = []
    for i, prompt in enumerate(["which?", "one or more", "?", "this is a longer one"]):
        choices = ("a", "bb ccc", f"long choice {i}", "ünï")
        each = {c: dense_log_likelihood(base, prompt, c) for c in choices}
        plain = max(each, key=lambda c: each[c])
        right = plain if i % 2 else next(c for c in choices if c != plain)
        asked.append((Example(right, prompt, choices=choices), each))
    wanted_norm = sum(
        e.text == max(each, key=lambda c: each[c] / len(c.encode())) for e, each in asked
    )
    found = choice_accuracy(base.model, base, [e for e, _ in asked], settings(max_length=64))
    assert found == {"choice_accuracy": 0.5, "choice_accuracy_norm": wanted_norm / 4}


def test_a_long_choice_gains_by_the_norm(base: pretrained.Base, settings: Settings) -> None:
    choices = ("a", "a" * 30)
    each = [dense_log_likelihood(base, "?", c) for c in choices]
    assert each[0] > each[1]
    assert each[0] / 1 < each[1] / 30
    found = choice_accuracy(
        base.model, base, [Example("a", "?", choices=choices)], settings(max_length=64)
    )
    assert found == {"choice_accuracy": 1.0, "choice_accuracy_norm": 0.0}


def test_a_long_prompt_loses_its_beginning_and_no_choice(
    base: pretrained.Base, settings: Settings
) -> None:
    room, choices = 20, ("yes", "no", "perhaps")
    held, wanted = [], 0
    for letter in "abcdefgh":
        prompt = f"{letter} and so on, " * 10
        # one token a byte; the line end and the end of the sequence take two
        each = [dense_log_likelihood(base, prompt[len(c) + 2 - room :], c) for c in choices]
        held.append(Example("no", prompt, choices=choices))
        wanted += each[1] == max(each)
    found = choice_accuracy(base.model, base, held, settings(max_length=room))
    assert found["choice_accuracy"] == wanted / 8
