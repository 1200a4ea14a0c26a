"""A base model and the tuned one, side by side: two models, or one that shows either."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corolla.evaluation.scoring import predictions

Shown = Callable[[], AbstractContextManager[Any]]
"""Shows a model while the context lasts."""

_VALUES = 1 << 24
"""Logits of one model that are held at a time: 64 MB."""


@dataclass(frozen=True)
class Pair:
    """Two models: the base, and what tuning made of it. Both are in evaluation mode."""

    base: Shown
    tuned: Shown
    prompt: bool = False
    """True where the tuned model has a trained prompt: its blocks see other positions."""


def of_peft(tuned: Any) -> Pair:
    """An adapter of peft on its base: the base is what shows while the adapter is disabled."""

    @contextmanager
    def shown() -> Iterator[Any]:
        yield tuned

    @contextmanager
    def base() -> Iterator[Any]:
        with tuned.disable_adapter():
            yield tuned

    return Pair(base, shown, bool(tuned.active_peft_config.is_prompt_learning))


def of_models(before: Any, after: Any) -> Pair:
    """Two models that are both in memory."""

    @contextmanager
    def base() -> Iterator[Any]:
        yield before

    @contextmanager
    def shown() -> Iterator[Any]:
        yield after

    return Pair(base, shown)


@torch.no_grad()
def logits(
    pair: Pair, batches: Sequence[dict[str, Tensor]], vocabulary: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(number of the batch, logits of the base, of the tuned model, labels), in fp32 (n, classes).

    n are the targets of a batch. Each model is shown for as many batches as fit into 64 MB.
    """
    for part in _parts(batches, vocabulary):
        with pair.base() as model:
            before = [predictions(model, batches[i])[0] for i in part]
        with pair.tuned() as model:
            for i, own in zip(part, before, strict=True):
                after, labels = predictions(model, batches[i])
                yield i, own, after, labels


def _parts(batches: Sequence[dict[str, Tensor]], vocabulary: int) -> Iterator[list[int]]:
    part: list[int] = []
    held = 0
    for i, batch in enumerate(batches):
        size = int((batch["labels"][:, 1:] >= 0).sum()) * vocabulary
        if part and held + size > _VALUES:
            yield part
            part, held = [], 0
        part.append(i)
        held += size
    if part:
        yield part
