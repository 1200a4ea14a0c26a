"""When a run has come to its end: all its rounds, or the first of its stop conditions."""

from collections.abc import Mapping, Sequence
from typing import Any

from corolla.config.run import RunConfig


def ended(
    config: RunConfig, base_loss: float, lines: Sequence[Mapping[str, Any]], seconds: float
) -> str:
    """Why no further round is due; "" while one is. There is always a first one.

    `lines` are those of metrics.jsonl, `base_loss` is the held-out loss of the untouched model, and
    `seconds` is how long the run has been running, in all its processes.
    """
    if not lines:
        return ""
    if lines[-1]["round"] >= config.rounds:
        return f"all {config.rounds} rounds"
    # Of a run that was extended the last round of before may have been measured out of turn.
    due = [line for line in lines if line["round"] % config.eval_every == 0]
    losses = [line["eval_loss"] for line in due if line["eval_loss"] is not None]
    if config.target_loss is not None and losses and losses[-1] <= config.target_loss:
        return f"target-loss {config.target_loss:g} reached: held-out loss {losses[-1]:.4f}"
    if config.patience and (vain := _in_vain([base_loss, *losses])) >= config.patience:
        return f"patience {config.patience}: {vain} evaluations without a lower held-out loss"
    if config.max_seconds is not None and seconds >= config.max_seconds:
        return f"max-seconds {config.max_seconds:g} are over"
    return ""


def _in_vain(losses: Sequence[float]) -> int:
    """How many losses came after the first of the lowest ones."""
    return len(losses) - 1 - losses.index(min(losses))
