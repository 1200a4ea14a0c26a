"""Warnings about parts of a model that stay as they are though an adapter is trained."""

import json

from corolla.config.run import RunConfig
from corolla.models.experts.reach import Reach
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
