"""Examples → token ids and labels, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from corolla.data.rows import Example
from corolla.errors import DataError

IGNORE = -100
"""The label of a position that does not count in the loss."""


@dataclass(frozen=True)
class Encoded:
    """One sequence. `labels` has one id a position (IGNORE where masked), or is one class."""

    input_ids: Sequence[int]
    labels: Sequence[int] | int
    example: int | None = None
    """Which of a client's examples it comes from: windows of one text count once."""
    unit: int | None = None
    """The number, from 0, of its user among the client's; None where rows name no users."""

    @property
    def targets(self) -> int:
        """How many predictions count: target tokens (the first has no context), or 1."""
        if isinstance(self.labels, int):
            return 1
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Encoder:
    """Turns examples into sequences of at most `max_length` tokens.

    Free text becomes consecutive windows, so that nothing of a long text is lost. A prompt is
    masked by position, never by token id; a response is cut at the end, and an example whose
    response is cut away altogether gives nothing: callers count these.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: Sequence[str]
    max_length: int

    def __call__(self, example: Example) -> list[Encoded]:
        """The sequences of one example; empty when no target is left, or it has no label."""
        if self.labels:
            if example.label is None:
                return []
            if example.label not in self.labels:
                raise DataError("an example has a label that the model was not built for")
            ids = self.tokenizer(example.text, truncation=True, max_length=self.max_length)
            return [Encoded(ids["input_ids"], self.labels.index(example.label))]
        if example.prompt is None:
            return self._windows(example.text)
        prompt, response = self._pair(example.prompt, example.text)
        input_ids = (prompt + response)[: self.max_length]
        labels = ([IGNORE] * len(prompt) + response)[: self.max_length]
        encoded = Encoded(input_ids, labels)
        return [encoded] if encoded.targets else []

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokens a model is given to answer `prompt`."""
        return self._pair(prompt, "")[0]

    def _windows(self, text: str) -> list[Encoded]:
        ids = self._with_eos(list(self.tokenizer(text)["input_ids"]))
        # One token of overlap: each token but the very first is the target of one window.
        starts = range(0, len(ids) - 1, self.max_length - 1)
        cuts = (ids[i : i + self.max_length] for i in starts)
        return [Encoded(window, window) for window in cuts]

    def _pair(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        if getattr(self.tokenizer, "chat_template", None):
            user = [{"role": "user", "content": prompt}]
            asked = str(
                self.tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
            )
            turn = [*user, {"role": "assistant", "content": response}]
            whole = str(self.tokenizer.apply_chat_template(turn, tokenize=False))
            answer = whole[len(asked) :] if whole.startswith(asked) else response
            return self._plain(asked), self._with_eos(self._plain(answer))
        ids = self.tokenizer(prompt + "\n")["input_ids"]
        last = {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id} - {None}
        prefix = list(ids[:-1] if ids and ids[-1] in last else ids)
        return prefix, self._with_eos(self._plain(response))

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


def examples_of(data: Sequence[Encoded], indices: Sequence[int]) -> set[int]:
    """The distinct examples that these sequences come from: the weight of an update counts them."""
    return {i if (own := data[i].example) is None else own for i in indices}


def collate(
    batch: Sequence[Encoded], pad_id: int, device: torch.device, length: int | None = None
) -> dict[str, Tensor]:
    """Right-padded `input_ids` and `attention_mask` (batch, time), and `labels`.

    Labels are (batch, time) with IGNORE at padding, or (batch,) classes. `length`: tokens of each
    (None: as many as the longest has). Raises ValueError for a sequence that is longer.
    """
    longest = length or max(len(sequence.input_ids) for sequence in batch)
    ids = [_filled(sequence.input_ids, longest, pad_id) for sequence in batch]
    mask = [_filled([1] * len(sequence.input_ids), longest, 0) for sequence in batch]
    labels = [
        sequence.labels
        if isinstance(sequence.labels, int)
        else _filled(sequence.labels, longest, IGNORE)
        for sequence in batch
    ]
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(rows).to(device) for name, rows in tensors.items()}


def _filled(values: Sequence[int], length: int, filler: int) -> list[int]:
    if len(values) > length:
        raise ValueError(f"a sequence of {len(values)} tokens is longer than {length}")
    return [*values, *[filler] * (length - len(values))]
