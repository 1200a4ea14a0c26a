"""Numbers of a base and its tuned model on a domain: loss, margin, divergence, contribution."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor
from torch.nn import functional

from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, Encoder, collate
from corolla.data.rows import Example
from corolla.drift import contribution, interval, pair
from corolla.drift.domains import Domain
from corolla.drift.pair import Pair
from corolla.errors import ConfigError, DataError
from corolla.evaluation.answers import sequences_of_choices
from corolla.models.pretrained import Base

_BATCH = 8


@dataclass
class _Sums:
    """The sums over the targets of one row, or of one choice of it; losses and kl in nats."""

    before: float = 0.0
    after: float = 0.0
    kl: float = 0.0
    same: int = 0
    """Targets at which both models find the same token most likely."""
    targets: int = 0


def measure(
    domains: Sequence[Domain], models: Pair, base: Base, config: RunConfig
) -> dict[str, dict[str, Any]]:
    """Domain → what run.json says of it.

    Of each: rows, loss before and after (nats per target, of the right choice where there are
    choices), forgetting (their difference with a 95 % interval over rows), the share of rows whose
    loss rose, kl = KL(base ‖ tuned) in fp32 over the whole vocabulary, mean over targets,
    agreement on the likeliest token, and tuco, the mean contribution of tuning at the prompts'
    ends (None for a model with a trained prompt). With choices also margin = ln p(answer) / bytes
    less the best other's, before, after and its change. All changes are exactly 0 for two equal
    models. Raises DataError for rows without a target.
    """
    return {domain.name: _measure(domain, models, base, config) for domain in domains}


def _measure(domain: Domain, models: Pair, base: Base, config: RunConfig) -> dict[str, Any]:
    sums = _compare(_parts(domain, base, config), models, base)
    right = {row: own for (row, choice), own in sums.items() if choice == _right(domain.rows[row])}
    losses = {row: (own.after - own.before, own.targets) for row, own in right.items()}
    targets = sum(own.targets for own in right.values())
    found: dict[str, Any] = {
        "rows": len(right),
        "loss": {
            "before": math.fsum(own.before for own in right.values()) / targets,
            "after": math.fsum(own.after for own in right.values()) / targets,
        },
        "forgetting": interval.of_targets(losses).to_json(),
        "worse_share": sum(change > 0 for change, _ in losses.values()) / len(right),
        "kl": math.fsum(own.kl for own in right.values()) / targets,
        "agreement": sum(own.same for own in right.values()) / targets,
        "tuco": _tuco(domain, models, base, config),
    }
    if domain.choices:
        found |= _margins(domain, sums)
    return found


def _parts(domain: Domain, base: Base, config: RunConfig) -> list[tuple[int, int, Encoded]]:
    """(row, choice, sequence) of all sequences; without choices it is number 0."""
    if domain.choices:
        asked = iter(sequences_of_choices(domain.rows, base, config))
        return [
            (row, choice, next(asked))
            for row, example in enumerate(domain.rows)
            for choice in range(len(example.choices))
        ]
    encoder = Encoder.of(config, base.tokenizer)
    found = [(row, 0, own) for row, example in enumerate(domain.rows) for own in encoder(example)]
    if not found:
        raise DataError(
            f"drift: no row of {domain.name} has a target within max_length={config.max_length}"
        )
    return found


def _compare(
    parts: Sequence[tuple[int, int, Encoded]], models: Pair, base: Base
) -> dict[tuple[int, int], _Sums]:
    """(row, choice) → its sums under both models, which see the same batches."""
    order = sorted(range(len(parts)), key=lambda i: len(parts[i][2].input_ids))
    groups = [order[at : at + _BATCH] for at in range(0, len(order), _BATCH)]
    base.check_ids(own.input_ids for _, _, own in parts)
    device = base.model.device
    batches = [collate([parts[i][2] for i in own], base.pad_id, device) for own in groups]
    found: dict[tuple[int, int], _Sums] = {}
    for number, before, after, labels in pair.logits(models, batches, base.embeddings):
        values = zip(*_of_targets(before, after, labels), strict=True)
        for i in groups[number]:
            row, choice, own = parts[i]
            sums = found.setdefault((row, choice), _Sums())
            for loss, tuned, kl, same in islice(values, own.targets):
                sums.before, sums.after = sums.before + loss, sums.after + tuned
                sums.kl, sums.same, sums.targets = sums.kl + kl, sums.same + same, sums.targets + 1
    return found


def _of_targets(before: Tensor, after: Tensor, labels: Tensor) -> list[list[Any]]:
    """Losses before and after, KL(before ‖ after), and 1 where both guess the same: by target."""
    p, q = functional.log_softmax(before, dim=-1), functional.log_softmax(after, dim=-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)  # rounding may leave -1e-9
    losses = (functional.cross_entropy(own, labels, reduction="none") for own in (before, after))
    same = before.argmax(-1) == after.argmax(-1)
    return [own.tolist() for own in (*losses, kl, same)]


def _right(example: Example) -> int:
    """The index of the right choice; 0 without choices."""
    return example.choices.index(example.text) if example.choices else 0


def _margins(domain: Domain, sums: Mapping[tuple[int, int], _Sums]) -> dict[str, Any]:
    """The mean margin before and after, its change, and how often the right choice is likeliest."""
    margins: dict[str, list[float]] = {"before": [], "after": []}
    for row, example in enumerate(domain.rows):
        right = _right(example)
        for when, own in margins.items():
            scores = [
                -getattr(sums[row, number], when) / len(choice.encode())
                for number, choice in enumerate(example.choices)
            ]
            own.append(scores.pop(right) - max(scores))
    changes = [b - a for a, b in zip(margins["before"], margins["after"], strict=True)]
    return {
        "margin": {when: statistics.fmean(own) for when, own in margins.items()},
        "margin_change": interval.of_rows(changes).to_json(),
        "right": {when: sum(m > 0 for m in own) / len(own) for when, own in margins.items()},
    }


def _tuco(domain: Domain, models: Pair, base: Base, config: RunConfig) -> float | None:
    """The mean of TuCo over the ends of prompts, of texts over the end of their first window."""
    encoder = Encoder.of(config, base.tokenizer)
    prompts = []
    for example in domain.rows:
        if example.dialogue:
            ids = encoder.prompt_ids(example)[-config.max_length :]
        else:
            ids = list(base.tokenizer(example.text)["input_ids"])[: config.max_length]
        prompts.append(Encoded(ids or [base.pad_id], ids or [base.pad_id]))
    prompts.sort(key=lambda own: len(own.input_ids))
    found: list[float] = []
    for at in range(0, len(prompts), _BATCH):
        batch = collate(prompts[at : at + _BATCH], base.pad_id, base.model.device)
        stream = contribution.stream(models, batch)
        if stream is None:
            return None
        found += stream.tuco.tolist()
    return statistics.fmean(found)


def check(config: RunConfig, task: str) -> None:
    """Raises ConfigError for a model that writes no text."""
    if task != "causal":
        raise ConfigError(
            f"drift needs a model that writes text, {config.model} is a classifier here: leave "
            f"drift out"
        )
