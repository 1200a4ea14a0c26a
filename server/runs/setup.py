"""Data and model that a server loads before the first round, whichever engine carries messages."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corolla.budgets import settle
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.data import census, federated
from corolla.data.encoding import Encoder
from corolla.data.federated import FederatedData
from corolla.data.templates import ChatTemplate, renderer, writes_date
from corolla.directions.pools import SignPool
from corolla.evaluation.labels import ordered
from corolla.evaluation.scoring import loss_sum
from corolla.interfaces import Strategy
from corolla.models import devices, pretrained, trainable
from corolla.models.experts import reach
from corolla.models.pretrained import Base
from corolla.models.trainable import Trainable
from corolla.server.rounds.cohort import read_trace
from corolla.server.runs.evaluate import Evaluator
from corolla.warnings import frozen
from corolla.warnings.outcome import RunWarning, of_settings

_UNMOVED = 0.1
_KEPT = 1 << 24
_SAFE_EPS = 1e-4
"""In fp32 no model's loss is rounded as much as it changes over this distance."""
_DIRECTIONS = 4
_FURTHER = 2
"""So near that curvature hardly shows; where rounding swallows both, the slopes differ by this."""


@dataclass(frozen=True)
class Setup:
    """Data, strategy, the model with its evaluator, and the facts of them for run.json."""

    config: RunConfig
    """The settings of the run, with the date that its chat template writes."""
    data: FederatedData
    strategy: Strategy
    model: Trainable
    evaluator: Evaluator
    facts: Mapping[str, Any]


def set_up(config: RunConfig, run_id: str | None, deployed: bool = False) -> Setup:
    """Load data and model. Raises CorollaError for whatever is wrong with them.

    `deployed`: clients are devices with data of their own, the server has what it measures on.
    """
    trace = read_trace(Path(config.availability)) if config.availability else None
    dataset = federated.load_heldout(config) if deployed else federated.load(config)
    dataset = replace(dataset, labels=ordered(config, dataset.labels))
    devices.set_threads(config)
    base = pretrained.load(config, dataset.labels)
    config, chosen = settle.settled(_dated(config, base), base, dataset.labels)
    if not deployed:
        dataset = census.with_targets(config, dataset, base.tokenizer)
    facts: dict[str, Any] = {
        "run_id": run_id,
        "model_sha256": base.fingerprint,
        "data_sha256": dataset.fingerprint,
        "clients_left_out": dataset.left_out,
        **_of_data(config, base, dataset),
        **({"per_user": True} if config.dp == "example" and dataset.names_users else {}),
        **({"availability_sha256": trace.sha256} if trace else {}),
        **chosen,
    }
    parts = reach.parts(base.model)
    model = trainable.build(config, base)
    trained = trainable.sizes(model)
    reached = reach.of(parts, trained)
    facts["reach"] = reached.to_json()
    evaluator = Evaluator(config, model, dataset.heldout, dataset.labels)
    warned = [*of_settings(config, deployed), *_of_rows(config, dataset, base)]
    warned += [*_of_model(model), *frozen.of_experts(config, reached), *_of_eps(config, evaluator)]
    warned += frozen.of_classes(config, list(trained or ()))
    warned += [RunWarning("data", why, instead) for why, instead in dataset.notes]
    bounded = config.max_norm is not None or config.robust != "none" or config.dp == "client"
    if deployed and not bounded:
        why = "no max-norm and no robust rule: one client can move the model as far as it likes"
        warned.append(RunWarning("unbounded", why, "set max-norm or robust"))
    facts["warnings"] = [warning.to_json() for warning in warned]
    return Setup(config, dataset, build_strategy(config), model, evaluator, facts)


def _dated(config: RunConfig, base: Base) -> RunConfig:
    """The settings, with the day that all parties write for today's, where a template does so."""
    if config.template_date or base.task == "classify" or not writes_date(base.tokenizer):
        return config
    return config.model_copy(update={"template_date": date.today().isoformat()})


def _of_rows(config: RunConfig, dataset: FederatedData, base: Base) -> list[RunWarning]:
    """Warnings about columns that are not used, and about a template that asks otherwise."""
    found = []
    if dataset.unused:
        why = f"{config.data} has columns that change the meaning of its rows and are not used: "
        instead = "rename them, or put what they say into the turns of messages"
        found.append(RunWarning("columns", why + ", ".join(sorted(dataset.unused)), instead))
    if any(row.dialogue for row in dataset.heldout):
        form = renderer(base.tokenizer, config.template_date or "")
        if isinstance(form, ChatTemplate) and (why := form.check()):
            found.append(RunWarning("template", why, "compare both with what will be asked"))
    return found


def _of_data(config: RunConfig, base: Base, dataset: FederatedData) -> dict[str, Any]:
    """Facts of the rows. Under privacy lengths are not told: nothing would hide whose they are."""
    facts: dict[str, Any] = {"data": {"container": dataset.container}}
    if dataset.without:
        facts["clients_without_target"] = list(dataset.without)
    if config.dp == "none" and dataset.clients:
        encoder = Encoder.of(config, base.tokenizer, dataset.labels)
        facts["data"]["lengths"] = census.sample(dataset, encoder, config.seed)
    return facts


def _of_eps(config: RunConfig, evaluator: Evaluator) -> list[RunWarning]:
    """Warnings about perturbations so small that what is measured is rounding."""
    found: list[RunWarning] = []
    names = [n for n in config.classes or ("",) if config.trainer_of(n) == "zeroth_order"]
    for eps in sorted({config.of_class(name).eps for name in names}):
        if (unmoved := evaluator.model.unmoved(eps)) > _UNMOVED:
            why = f"eps={eps:g} leaves {unmoved:.0%} of the {config.dtype} weights as they are, "
            instead, numbers = "raise eps, or use dtype=float32", {"eps": eps, "part": unmoved}
            found.append(RunWarning("eps", why + "by rounding", instead, numbers))
        if config.dtype == "float32" and eps >= _SAFE_EPS:
            continue
        near, far = _slopes(config, evaluator, eps), _slopes(config, evaluator, _FURTHER * eps)
        apart = float((near - far).square().mean().sqrt())
        typical = float(far.square().mean().sqrt())
        if not apart < typical / 2:
            why = (
                f"slopes measured at eps={eps:g} and at {_FURTHER} eps differ by {apart:.2g}, and "
                f"are of size {typical:.2g}, so they are rounding in {config.dtype}"
            )
            other = "" if config.dtype == "float32" else ", or use dtype=float32"
            numbers = {"eps": eps, "apart": apart, "typical": typical}
            found.append(RunWarning("eps", why, f"raise eps{other}", numbers))
    return found


@torch.no_grad()
def _slopes(config: RunConfig, evaluator: Evaluator, eps: float) -> Tensor:
    """(L(w + eps z) - L(w - eps z)) / (2 eps) of summed losses, for a few directions."""
    model, batch = evaluator.model, evaluator.probe
    space = model.enter(model.init(config.lora, 0), config.lora, ())
    pool = SignPool(_DIRECTIONS, (0, 0))
    slopes = []
    for k in range(_DIRECTIONS):
        space.look(pool, {k: eps})
        above = float(loss_sum(model.model, batch))
        space.look(pool, {k: -eps})
        slopes.append((above - float(loss_sum(model.model, batch))) / (2 * eps))
    space.look(pool, {})
    return torch.tensor(slopes, dtype=torch.float64)


def _of_model(model: Trainable) -> list[RunWarning]:
    """Warnings about memory."""
    found = []
    if model.kept_bytes > _KEPT:
        why = (
            f"{model.kept_bytes / 1e6:.0f} MB of weights are in no .safetensors file of the model "
            f"and are kept in memory twice"
        )
        instead = "save the model with save_pretrained, which writes such files"
        found.append(RunWarning("memory", why, instead, {"bytes": model.kept_bytes}))
    return found
