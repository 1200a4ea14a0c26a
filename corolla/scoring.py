"""How good a model is on examples: the loss that training uses, and what it means to people."""

import math
from collections.abc import Sequence

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


def _predictions(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits of the targets in fp32 (n, classes), targets (n,))."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    if labels.dim() == 1:
        return logits.float(), labels
    wanted = labels[:, 1:] != IGNORE
    # Only positions with a target: with a large vocabulary the logits are most of the memory.
    return logits[:, :-1][wanted].float(), labels[:, 1:][wanted]


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
