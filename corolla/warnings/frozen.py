"""Warnings about parts of a model that stay as they are though an adapter is trained."""

import json
from collections.abc import Sequence

from corolla.config.run import RunConfig
from corolla.models import layers
from corolla.models.experts.reach import Reach
from corolla.tensors import units
from corolla.warnings.outcome import RunWarning


def of_experts(config: RunConfig, reached: Reach) -> list[RunWarning]:
    """A warning about fused experts that an adapter does not reach; none for other kinds."""
    if not config.kind.target_modules or not reached.experts:
        return []
    ends = sorted({".".join(name.split(".")[-2:]) for name in reached.frozen_experts})
    instead = f"set target_parameters={json.dumps(ends)}"
    if not config.kind.factors:
        instead = "parameters=lora has adapters for them, with target_parameters"
    numbers = {"values": float(reached.frozen_values), "parameters": float(reached.parameters)}
    return [RunWarning("experts", reached.experts, instead, numbers)]


def of_classes(config: RunConfig, names: Sequence[str]) -> list[RunWarning]:
    """A warning about blocks of the run that clients of no class train.

    `names` are those of the trained tensors. Raises ModelError for a block that is not there.
    """
    parts = [own.layers for own in config.classes.values()]
    there = {place[1] for name in names if (place := units.block(name))}
    if not parts or not there or None in parts:
        return []
    within = [name for name in names if units.block(name)]
    some = {number for text in parts if text for number in layers.chosen(within, text)}
    if not (idle := there - some):
        return []
    said = " and ".join(f"{name}={own.layers}" for name, own in config.classes.items())
    why = (
        f"clients of no class train blocks {layers.text(idle)} of the run (layers of classes: "
        f"{said}), which are sent all the same and never change"
    )
    return [RunWarning("layers", why, f"set layers={layers.text(some)} for the run")]
