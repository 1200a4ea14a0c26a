"""The line of metrics.jsonl that says what a round was like."""

from collections import Counter
from typing import Any

from corolla.host.heap import peak_rss
from corolla.server.rounds.round import RoundResult
from corolla.server.rounds.spending import Spending
from corolla.server.runs.attempts import Done
from corolla.types import Metrics


def metrics_line(round: int, done: Done, scores: Metrics, account: Spending) -> dict[str, Any]:
    """Returns the line of a round; `scores` are of its model, where an evaluation was due."""
    result, config, dp = done.result, account.config, account.config.dp
    metrics = dict(result.metrics)
    if dp == "none":
        metrics.pop("epsilon", None)  # whatever a client says: nobody has promised it anything
    if not account.level:  # with dp=client no client tells metrics, and these are of the release
        for name in ("noise_norm", "update_norm"):
            metrics.pop(name, None)
    line: dict[str, Any] = {
        **metrics,  # first: no name that a client sends may replace one of ours
        "round": round,
        "train_loss": metrics.get("train_loss"),
        "eval_loss": scores.get("loss"),
        "eval_accuracy": scores.get("accuracy"),
        **({"eval_f1": scores["f1"]} if "f1" in scores else {}),
        **{name: own for name, own in scores.items() if name.startswith("personal_loss")},
        **(_planned(done, account) if account.level else _counted(result)),
        "formula_up": result.cost.up,
        "formula_down": result.cost.down,
        "seconds": done.seconds,
        "peak_rss": peak_rss(),
        **({"attempt": done.attempt} if done.attempt else {}),
        "sampling_probability": result.sampling_probability,
        "client_loss": dict(result.client_loss),
        **account.gradient_norms(done.federation, result.updates),
        **({"delta": config.delta, "withheld": account.withheld} if dp != "none" else {}),
    }
    if result.dropped and dp != "client":
        line["dropped_why"] = dict(result.dropped)
    return line


def _counted(result: RoundResult) -> dict[str, Any]:
    """Returns the counts of a round: its clients and verdicts, its bytes, its simulated seconds."""
    return {
        "bytes_up": result.traffic.up,
        "bytes_down": result.traffic.down,
        "framing_up": result.traffic.framing_up,
        "framing_down": result.traffic.framing_down,
        **({"sim_seconds": result.sim_seconds} if result.sim_seconds is not None else {}),
        "clients": result.updates,
        "dropped": max(len(result.dropped), result.asked - result.updates),
        "verdicts": Counter(str(verdict.code) for verdict in result.verdicts.values()),
    }


def _planned(done: Done, account: Spending) -> dict[str, Any]:
    """The same as far as no update decides it, and, of a secret cohort, as nobody's presence does.

    `clients` are those that have answered, whatever they sent; bytes are those of the formula.
    """
    result = done.result
    moved = {"bytes_up": result.cost.up, "bytes_down": result.cost.down}
    if account.poisson:
        return {**moved, "clients": done.federation.cohort_size}
    answered = min(result.answered, result.asked)
    return {**moved, "clients": answered, "dropped": result.asked - answered}
