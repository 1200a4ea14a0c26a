"""Examples → token ids and labels, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from corolla.config.run import RunConfig
from corolla.data import templates
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

    Free text becomes consecutive windows, so that nothing of a long text is lost. What answers
    answer is masked by position, never by token id; a conversation is cut at the end, and an
    example whose answers are cut away altogether gives nothing: callers count these.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: Sequence[str]
    max_length: int
    day: str = ""
    """The date that chat templates write for today's, in ISO 8601; "": today's date."""

    @classmethod
    def of(
        cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] = ()
    ) -> "Encoder":
        """The encoder of a run."""
        return cls(tokenizer, labels, config.max_length, config.template_date or "")

    def __call__(self, example: Example) -> list[Encoded]:
        """The sequences of one example; empty when no target is left, or it has no label.

        Raises DataError for a label that is none of the run's, and for turns that the model's chat
        template does not take.
        """
        if self.labels:
            if example.label is None:
                return []
            if example.label not in self.labels:
                raise DataError("an example has a label that the model was not built for")
            ids = self.tokenizer(example.text, truncation=True, max_length=self.max_length)
            return [Encoded(ids["input_ids"], self.labels.index(example.label))]
        if not example.dialogue:
            return self._windows(example.text)
        rendered = self._renderer.sequences(example.dialogue, example.tools, self.max_length)
        found = [self._cut(sequence) for sequence in rendered]
        return [encoded for encoded in found if encoded.targets]

    def prompt_ids(self, example: Example) -> list[int]:
        """The tokens a model is given to say the last answer of a dialogue."""
        turns = example.dialogue[: example.last + 1]
        return self._renderer.prompt(turns, example.tools)

    @cached_property
    def _renderer(self) -> templates.ChatTemplate | templates.PlainForm:
        return templates.renderer(self.tokenizer, self.day)

    def _cut(self, rendered: templates.Rendered) -> Encoded:
        ids = list(rendered.ids[: self.max_length])
        return Encoded(
            ids, [i if own else IGNORE for i, own in zip(ids, rendered.learnt, strict=False)]
        )

    def _windows(self, text: str) -> list[Encoded]:
        ids, eos = list(self.tokenizer(text)["input_ids"]), self.tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
        # One token of overlap: each token but the very first is the target of one window.
        starts = range(0, len(ids) - 1, self.max_length - 1)
        cuts = (ids[i : i + self.max_length] for i in starts)
        return [Encoded(window, window) for window in cuts]


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
