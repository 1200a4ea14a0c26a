"""How good a model is on examples: the loss that training uses, and what it means to people."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corolla.encoding import IGNORE, Encoded, collate
from corolla.types import Metrics


def loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The summed cross-entropy of a batch over its targets, in fp32.

    Logits of a causal model at position t predict label t + 1; masked labels add nothing.
    """
    return F.cross_entropy(*_predictions(model, batch), reduction="sum")


def _predictions(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits of the targets in fp32 (n, classes), targets (n,))."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    if labels.dim() == 1:
        return model(**inputs).logits.float(), labels
    wanted = labels[:, 1:] != IGNORE
    with _only(model, wanted):
        logits = model(**inputs).logits
    if logits.dim() == 3:  # a head that is not one module: the hook had nothing to hold on to
        logits = logits[:, :-1][wanted]
    return logits.float(), labels[:, 1:][wanted]


@contextmanager
def _only(model: Any, wanted: Tensor) -> Iterator[None]:
    """Let the output layer see only positions with a target.

    With a vocabulary of 262,144 (Gemma 3) the logits of one batch are gigabytes, most of them for
    padding and prompts.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][:, :-1][wanted],))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def score(
    model: nn.Module,
    data: Sequence[Encoded],
    pad_id: int,
    device: torch.device,
    batch_size: int = 8,
) -> Metrics:
    """`loss` (nats per target), `accuracy` of the most likely target, `targets` (how many).

    Sequences are batched by length, which does not change the result. NaN without targets.
    """
    ordered = sorted(data, key=lambda sequence: len(sequence.input_ids))
    losses: list[float] = []
    right = targets = 0
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], pad_id, device)
        logits, wanted = _predictions(model, batch)
        losses.append(float(F.cross_entropy(logits, wanted, reduction="sum")))
        right += int((logits.argmax(dim=-1) == wanted).sum())
        targets += wanted.numel()
    if not targets:
        return {"loss": math.nan, "accuracy": math.nan, "targets": 0.0}
    return {
        "loss": math.fsum(losses) / targets,
        "accuracy": right / targets,
        "targets": float(targets),
    }
