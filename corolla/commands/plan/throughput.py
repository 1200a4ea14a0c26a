"""How fast this machine is, measured."""

import time

import torch

from corolla.estimates.footprint import Batch
from corolla.models.anatomy import Anatomy

_CALIBRATION = 0.2
"""Seconds of a measurement."""


def throughput(model: Anatomy, batch: Batch, threads: int) -> float:
    """Floating-point operations a second of this machine's CPU, in a product like the model's."""
    if threads:
        torch.set_num_threads(threads)
    inputs = torch.ones(batch.positions, model.hidden)
    matrix = torch.ones(model.hidden, model.intermediate)
    inputs @ matrix
    done, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < _CALIBRATION or not done:
        inputs @ matrix
        done += 1
    return 2.0 * done * inputs.numel() * model.intermediate / took
