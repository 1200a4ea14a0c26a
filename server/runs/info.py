"""Facts of a run for run.json and the journal: settings, inputs, versions, privacy."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from corolla.config.run import RunConfig
from corolla.interfaces import Strategy
from corolla.privacy.guarantee import NEIGHBOURS, Unit
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.spending import Spending
from corolla.server.runs.evaluate import Evaluator
from corolla.strategies.listing.registry import label, traits
from corolla.types import Aggregates
from corolla.version import __version__


def run_info(
    facts: Mapping[str, Any],
    federation: Federation,
    evaluator: Evaluator,
    account: Spending,
    keep_updates: bool,
) -> dict[str, Any]:
    """Returns the object of run.json from the start; `facts` are the hashes of model and data."""
    packages = ("flwr", "torch", "peft", "transformers", "safetensors")
    return {
        **facts,
        "corolla": __version__,
        "run_id": federation.run_id,
        "keep_updates": keep_updates,
        "config": federation.config.model_dump(mode="json"),
        "strategy": label(federation.config.strategy),
        "aggregates": _aggregates(federation.config, federation.strategy),
        "personal": traits(federation.strategy).personal,
        "num_clients": len(federation.clients),
        **_examples(federation),
        "own_devices": federation.own_devices,
        "cohort": federation.cohort_size,
        "target_modules": evaluator.model.targets,
        "labels": list(evaluator.labels),
        "heldout_skipped": evaluator.skipped,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "platform": platform.platform(),
        **privacy_info(account),
        "warnings": list(facts.get("warnings", ())),
    }


def _examples(federation: Federation) -> dict[str, int]:
    """The training examples of all clients; not told where privacy is promised."""
    if federation.config.dp != "none":
        return {}
    return {"num_examples": sum(federation.clients.values())}


def privacy_info(account: Spending) -> dict[str, Any]:
    """The object of run.json, where there is differential privacy."""
    found = account.to_json()
    return {"privacy": found} if found else {}


def privacy_budget(config: RunConfig, unit: Unit) -> dict[str, Any]:
    """Returns the journal's facts of differential privacy before anything is spent."""
    if config.dp == "none":
        return {}
    facts = {"unit": unit, "neighbours": NEIGHBOURS[unit]}
    facts |= {"sampling": config.dp_sampling} if config.dp == "client" else {}
    return {"privacy": {**facts, "delta": config.delta, "budget": config.epsilon}}


def _aggregates(config: RunConfig, strategy: Strategy) -> Aggregates:
    """Names the values that a run averages.

    Without factors, the trained tensors are the weights themselves.
    """
    if config.robust != "none":
        return "other"
    dense = not config.kind.factors
    return "weights" if dense and strategy.aggregates == "factors" else strategy.aggregates
