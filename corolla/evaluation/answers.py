"""Answers of a model, beyond its loss: generated answers compared, given choices ranked."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, Encoder
from corolla.data.rows import Example
from corolla.errors import DataError
from corolla.evaluation.scoring import log_likelihoods
from corolla.models.pretrained import Base
from corolla.types import Metrics

_BATCH = 16
_GROUPED = r"[0-9]{1,3}(?:[,\u00a0\u202f ][0-9]{3})+(?![0-9])"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w).])[-−])?\$?"
    rf"(?P<rest>(?:(?:{_GROUPED}|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}}(?!\w))?)"
)
"""A number with groups of three digits, which commas or spaces part, a fraction and an exponent."""


def ask(model: Any, base: Base, examples: Sequence[Example], config: RunConfig) -> Metrics:
    """Scores of a model's answers to examples; empty when nothing is asked.

    `exact_match` where the config has `answer`; `choice_accuracy` and `choice_accuracy_norm` where
    the data has choices. Raises DataError for examples that cannot be asked.
    """
    found: dict[str, float] = {}
    if config.answer != "none":
        check(examples, config)
        found["exact_match"] = exact_match(model, base, examples, config)
    if examples and all(example.choices for example in examples):
        found |= choice_accuracy(model, base, examples, config)
    return found


def check(examples: Sequence[Example], config: RunConfig) -> None:
    """Raises DataError when `answer` asks for what the examples do not have."""
    if config.answer == "none":
        return
    if not all(example.dialogue for example in examples):
        raise DataError(
            f"answer={config.answer} compares answers: it needs rows with prompt and response, "
            f"{config.data} has others"
        )
    for example in examples:
        if config.answer == "gsm8k" and final_number(example.answer) is None:
            raise DataError(
                f"answer=gsm8k needs a number in every response, {config.data} has one without: "
                f"{example.answer[:60]!r}"
            )


def exact_match(model: Any, base: Base, examples: Sequence[Example], config: RunConfig) -> float:
    """The part of the examples that the model answers with the response, decoding greedily."""
    encoder = Encoder.of(config, base.tokenizer)
    prompts = [encoder.prompt_ids(example)[-config.max_length :] for example in examples]
    answers = generate(model, base, prompts, config.max_new_tokens, config.prefix)
    pairs = zip(answers, examples, strict=True)
    right = sum(same(answer, example.answer, config.answer) for answer, example in pairs)
    return right / len(examples)


def same(answer: str, reference: str, kind: str) -> bool:
    """gsm8k: the same final number; exact: the same text but for white space and case."""
    if kind == "gsm8k":
        number = final_number(answer)
        return number is not None and number == final_number(reference)
    return answer.casefold().split() == reference.casefold().split()


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, else the last number; $ and a last dot are not it.

    As answers of GSM8K are written (Cobbe et al. 2021, arXiv 2110.14168): 1,000 and 1 000 are a
    thousand, and so is 1e3; in 1,2,3 there are three numbers.
    """
    _, mark, after = text.rpartition("####")
    found = list(_NUMBER.finditer(after))
    if not found:
        return None
    number = found[0 if mark else -1]
    size = Decimal(re.sub(r"[,\s]", "", number["rest"]))
    return -size if number["sign"] else size


class _Heard(TextStreamer):  # type: ignore[misc]  # transformers says no types
    """Tells the text of an answer so far whenever it has grown."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hear: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._hear, self._text = hear, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each whole word."""
        self._text += text
        self._hear(self._text.strip())


@torch.no_grad()
def generate(
    model: Any,
    base: Base,
    prompts: Sequence[Sequence[int]],
    most: int,
    virtual: int = 0,
    hear: Callable[[str], None] | None = None,
) -> list[str]:
    """Greedy continuations of at most `most` tokens, without the prompts.

    `hear` takes the text of a single prompt's continuation so far, while it is made.

    Batches are of like length, padded on the left; none outgrows the positions that the model has:
    of a prompt that leaves no room the end counts.
    With `virtual` tokens of a trained prompt they are of equal length: peft puts the prompt before
    the padding, and its model would answer something else.
    """
    settings = model.generation_config
    stops = settings.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops}
    stops = sorted((stops | {base.tokenizer.eos_token_id}) - {None})
    positions = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        prompts = [prompt[-max(1, positions - virtual - 1) :] for prompt in prompts]
    found = [""] * len(prompts)
    for rows in _batches([len(prompt) for prompt in prompts], alike=virtual > 0):
        longest = max(1, *(len(prompts[i]) for i in rows))
        ids = torch.full((len(rows), longest), base.pad_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(rows):
            own = prompts[i] or [base.pad_id]  # a prompt without tokens: start from any one
            ids[row, -len(own) :] = torch.tensor(own)
            mask[row, -len(own) :] = 1
        room = positions - longest - virtual if positions else most
        greedy = GenerationConfig(
            max_new_tokens=max(1, min(most, room)),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            eos_token_id=stops or None,
            pad_token_id=base.pad_id,
        )
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=greedy,
            streamer=_Heard(base.tokenizer, hear) if hear else None,
        )
        texts = base.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            found[i] = str(text).strip()
    return found


def _batches(lengths: Sequence[int], alike: bool) -> Iterator[list[int]]:
    """Indices by length, in batches; `alike`: all of a batch have the same."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for _, group in itertools.groupby(order, key=lambda i: lengths[i] if alike else 0):
        rows = list(group)
        yield from (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH))


def choice_accuracy(
    model: Any, base: Base, examples: Sequence[Example], config: RunConfig
) -> Metrics:
    """How often the right choice is the likeliest answer to its prompt.

    A choice counts as training counts it: with the end of the sequence. `choice_accuracy_norm`
    divides ln p by the UTF-8 bytes of the choice, so that long ones are not at a disadvantage
    (`acc_norm` of Gao et al., lm-evaluation-harness). Long prompts lose their beginning.
    """
    asked = sequences_of_choices(examples, base, config)
    scores = iter(log_likelihoods(model, asked, base.pad_id, model.device))
    right = right_norm = 0
    for example in examples:
        own = [next(scores) for _ in example.choices]
        each = [
            score / len(choice.encode()) for score, choice in zip(own, example.choices, strict=True)
        ]
        right += example.choices[own.index(max(own))] == example.text
        right_norm += example.choices[each.index(max(each))] == example.text
    number = len(examples)
    return {"choice_accuracy": right / number, "choice_accuracy_norm": right_norm / number}


def sequences_of_choices(
    examples: Sequence[Example], base: Base, config: RunConfig
) -> list[Encoded]:
    """All choices of all examples in their order, each after its prompt, with its targets.

    Raises DataError for a choice without a token that a model could predict.
    """
    encoder = replace(Encoder.of(config, base.tokenizer), max_length=1 << 30)
    return [
        _last(encoder(replace(example, text=choice)), config.max_length)
        for example in examples
        for choice in example.choices
    ]


def _last(encoded: Sequence[Encoded], length: int) -> Encoded:
    """The last tokens of one choice after its prompt."""
    if not encoded or isinstance(encoded[0].labels, int):
        raise DataError("a choice has no tokens that a model could predict")
    return Encoded(encoded[0].input_ids[-length:], encoded[0].labels[-length:])
