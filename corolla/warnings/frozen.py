"""Warnings about parts of a model that stay as they are though an adapter is trained."""

from corolla.config.run import RunConfig
from corolla.models.experts.reach import Reach
from corolla.warnings.outcome import RunWarning


def of_experts(config: RunConfig, reached: Reach) -> list[RunWarning]:
    """A warning about fused experts that an adapter does not reach; none for other kinds."""
    if not config.kind.target_modules or not reached.experts:
        return []
    numbers = {"values": float(reached.frozen_values), "parameters": float(reached.parameters)}
    return [RunWarning("experts", reached.experts, "parameters=full trains them", numbers)]
