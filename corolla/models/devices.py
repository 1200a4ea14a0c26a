"""Where a model computes: its device, and the number of CPU threads."""

import os

import torch
from torch import nn

from corolla.config.run import RunConfig
from corolla.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device by name; 'auto' is CUDA, else Apple's MPS, else the CPU. Raises ConfigError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} is not available here: {str(error)[:120]}") from error
    return device


def set_threads(config: RunConfig) -> None:
    """One number of CPU threads for every engine: it decides the last bits of matrix products.

    threads=0: OMP_NUM_THREADS where that is set, else as many as there are cores.
    """
    limit = os.environ.get("OMP_NUM_THREADS", "")
    usual = int(limit) if limit.isdigit() and int(limit) else os.cpu_count() or 1
    torch.set_num_threads(config.threads or usual)


def free(model: nn.Module) -> None:
    """Give back the memory of all tensors of a model, which is of no use afterwards."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.new_empty(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of torch: another process may need it
