"""How good a model is on examples: the loss that training uses, and what it means to people."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corolla.data.encoding import IGNORE, Encoded, collate
from corolla.models.products import surprise
from corolla.types import Metrics

SHARES = {
    "accuracy": "accuracy",
    "f1": "macro F1",
    "exact_match": "exact match",
    "choice_accuracy": "right choice",
    "choice_accuracy_norm": "right choice, per byte",
}
"""Scores between 0 and 1, and what people call them."""


_last: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Model → whether its logits are what its output layer gives."""

RowLosses = Mapping[int, tuple[float, int]]
"""Number of a row → (its summed loss, its targets)."""


def loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The summed cross-entropy of a batch over its targets, in fp32.

    Logits of a causal model at position t predict label t + 1; masked labels add nothing. Where
    gradients are wanted, logits of a large vocabulary are computed a part at a time.
    """
    if torch.is_grad_enabled() and (head := _in_parts(model, batch["labels"])):
        states, labels = _before_head(model, head, batch)
        return surprise.summed(states, head, labels)
    return F.cross_entropy(*predictions(model, batch), reduction="sum")


def _in_parts(model: Any, labels: Tensor) -> Any:
    """The output layer of a model, where it is the last step and its logits are too many; or None.

    That it is the last is tried once for a model: others cap or scale what it gives.
    """
    if labels.dim() == 1:
        return None
    head = model.get_output_embeddings()
    count = int((labels[:, 1:] != IGNORE).sum())
    if not surprise.carried(head) or not surprise.worth(count, head):
        return None
    if model not in _last:
        _last[model] = _is_last(model, head)
    return head if _last[model] else None


@torch.no_grad()
def _is_last(model: Any, head: nn.Linear) -> bool:
    """Returns whether logits are what the output layer gives, bit for bit, for a few tokens."""
    given: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: given.append(output.clone()))
    was = model.training
    model.eval()
    try:
        ids = torch.arange(min(8, head.out_features), device=model.device)[None]
        logits = model(input_ids=ids).logits
    finally:
        model.train(was)
        hook.remove()
    # A token of padding alone may have logits of zeros, which any factor leaves as they are.
    return len(given) == 1 and torch.equal(given[0], logits) and bool(logits.any())


def _before_head(model: Any, head: nn.Linear, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(what the output layer gets at the targets (n, width), labels (n,)); it computes none."""
    wanted = batch["labels"][:, 1:] != IGNORE
    states: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states.append(_before(args[0], wanted)[wanted])
        return (states[0][:0],)

    hook = head.register_forward_pre_hook(keep)
    try:
        model(**{name: batch[name] for name in ("input_ids", "attention_mask") if name in batch})
    finally:
        hook.remove()
    return states[0], batch["labels"][:, 1:][wanted]


def sequence_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The summed cross-entropy of each sequence over its targets, in fp32, (batch,).

    Each depends on its own sequence alone, and the work on the form of the batch alone: logits are
    computed for every position, of which those without a target add nothing. Differential privacy
    of examples rests on both.
    """
    labels = batch["labels"]
    if labels.dim() == 1:
        return F.cross_entropy(*predictions(model, batch), reduction="none")
    every = torch.ones_like(labels[:, 1:], dtype=torch.bool)
    losses = F.cross_entropy(*predictions(model, batch, every), reduction="none")
    return losses.view(every.shape).sum(1)


def predictions(
    model: Any, batch: dict[str, Tensor], wanted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(logits in fp32 (n, classes), labels (n,)) of the targets, or of `wanted` positions."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    labels = batch["labels"]
    if labels.dim() == 1:
        return model(**inputs).logits.float(), labels
    if wanted is None:
        wanted = labels[:, 1:] != IGNORE
    with _only(model, wanted):
        logits = model(**inputs).logits
    if logits.dim() == 3:  # a head that is not one module: the hook had nothing to hold on to
        logits = _before(logits, wanted)[wanted]
    return logits.float(), labels[:, 1:][wanted]


def _before(rows: Tensor, wanted: Tensor) -> Tensor:
    """The positions of (batch, time, …) before those of `wanted`; virtual tokens come first."""
    return rows[:, -1 - wanted.shape[1] : -1]


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
    hook = head.register_forward_pre_hook(lambda module, args: (_before(args[0], wanted)[wanted],))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def score_by_row(
    model: nn.Module,
    data: Sequence[Encoded],
    rows: Sequence[int],
    pad_id: int,
    device: torch.device,
    batch_size: int = 8,
) -> tuple[Metrics, RowLosses]:
    """Scores, and the losses of the rows that the sequences are parts of, by number.

    `loss` (nats per target), `accuracy` of the most likely target, `targets` (how many). Of a
    classifier also `f1`, see `macro_f1`. Sequences are batched by length, which does not change
    the result. NaN without targets.
    """
    order = sorted(range(len(data)), key=lambda i: len(data[i].input_ids))
    losses: list[float] = []
    classes: list[tuple[int, int]] = []
    by_row: dict[int, tuple[float, int]] = {}
    right = targets = 0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([data[i] for i in chosen], pad_id, device)
        logits, wanted = predictions(model, batch)
        losses.append(float(F.cross_entropy(logits, wanted, reduction="sum")))
        surprises = iter(F.cross_entropy(logits, wanted, reduction="none").tolist())
        for i in chosen:
            total, number = by_row.get(rows[i], (0.0, 0))
            own = math.fsum(islice(surprises, data[i].targets))
            by_row[rows[i]] = total + own, number + data[i].targets
        guessed = logits.argmax(dim=-1)
        right += int((guessed == wanted).sum())
        targets += wanted.numel()
        if batch["labels"].dim() == 1:
            classes += zip(wanted.tolist(), guessed.tolist(), strict=True)
    if not targets:
        return {"loss": math.nan, "accuracy": math.nan, "targets": 0.0}, {}
    metrics = {
        "loss": math.fsum(losses) / targets,
        "accuracy": right / targets,
        **({"f1": macro_f1(classes)} if classes else {}),
        "targets": float(targets),
    }
    return metrics, by_row


def standard_error(rows: RowLosses) -> Metrics:
    """`loss_error`, the standard error of a loss Σ loss / Σ targets over rows; none of one row.

    Rows are drawn, and their targets come together: sqrt(n / (n - 1) · Σ (l_i - L t_i)²) / Σ t_i,
    the linearised error of a ratio (Cochran, "Sampling Techniques", 1977, section 6.4). With equal
    numbers of targets it is that of the mean of the rows' losses.
    """
    if len(rows) < 2:
        return {}
    targets = sum(number for _, number in rows.values())
    mean = math.fsum(loss for loss, _ in rows.values()) / targets
    squares = math.fsum((loss - mean * number) ** 2 for loss, number in rows.values())
    return {"loss_error": math.sqrt(len(rows) / (len(rows) - 1) * squares) / targets}


def halves(rows: RowLosses, first: int = 0) -> Metrics:
    """The losses of every second row, so that a choice by one half can be reported by the other.

    `loss_choosing` is of rows 0, 2, … and `loss_reported` of 1, 3, …, as counted from `first`;
    none where there is no row.
    """
    found: dict[str, float] = {}
    for name, remainder in (("loss_choosing", 0), ("loss_reported", 1)):
        own = [rows[row] for row in rows if (first + row) % 2 == remainder]
        if own:
            found[name] = math.fsum(loss for loss, _ in own) / sum(number for _, number in own)
    return found


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN), from pairs (wanted, guessed).

    Classes that are neither wanted nor guessed do not count, as in scikit-learn.
    """
    hits = Counter(wanted for wanted, guessed in pairs if wanted == guessed)
    seen = Counter(name for pair in pairs for name in pair)
    return math.fsum(2 * hits[name] / seen[name] for name in seen) / len(seen)


@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    data: Sequence[Encoded],
    pad_id: int,
    device: torch.device,
    batch_size: int = 8,
) -> list[float]:
    """The log-likelihood of each sequence's targets, given what comes before them, in nats."""
    order = sorted(range(len(data)), key=lambda i: len(data[i].input_ids))
    found = [0.0] * len(data)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([data[i] for i in rows], pad_id, device)
        logits, wanted = predictions(model, batch)
        surprises = iter(F.cross_entropy(logits, wanted, reduction="none").tolist())
        for i in rows:
            found[i] = -math.fsum(islice(surprises, data[i].targets))
    return found
