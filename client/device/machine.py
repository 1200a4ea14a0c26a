"""The resources of a device, and how training is made to fit into a part of them."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.estimates import footprint
from corolla.estimates.footprint import Batch, Estimate, Workload
from corolla.interfaces import Strategy
from corolla.models import anatomy
from corolla.strategies.listing import registry
from corolla.types import TrainerName
from corolla.wire.messages import Capabilities

_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60
"""The first version of control groups writes a huge number where there is none."""


def probe(folder: Path | None = None) -> Capabilities:
    """Reads this device's Capabilities now: free memory and cores of its container, power, disk.

    `folder`: of the disk that counts. That a network is metered, or a device in use, no system
    tells in one way: its owner says so.
    """
    accelerator, size = _accelerator()
    battery = _battery()
    disk = shutil.disk_usage(_existing(folder or Path.home()))
    return Capabilities(
        memory_bytes=memory(),
        cores=cores(),
        accelerator=accelerator,
        accelerator_bytes=size,
        runtime=_runtime(),
        battery_percent=battery[0],
        charging=battery[1],
        storage_bytes=disk.free,
    )


def memory() -> int:
    """Bytes that processes of this container can still take."""
    own = [limit - used for limit, used in _limits(_CGROUP)]
    return max(0, min([int(psutil.virtual_memory().available), *own]))


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, in use) of memory by each control group that this process is in."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kind, own = line.split(":", 2)
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            place = root / "memory"
            if not kind:
                names, place = ("memory.max", "memory.current"), root
            elif "memory" not in kind.split(","):
                continue
            inner = place / own.lstrip("/")
            for folder in (inner, *inner.parents):
                if folder == place.parent:
                    break
                yield from _limit(folder, *names)


def _limit(folder: Path, most: str, used: str) -> Iterator[tuple[int, int]]:
    with suppress(OSError, ValueError):  # no limit is written as "max"
        limit = int((folder / most).read_text())
        if limit < _NO_LIMIT:
            facts = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
            cached = facts.get("total_inactive_file", facts.get("inactive_file", "0"))
            yield limit, int((folder / used).read_text()) - int(cached)  # that can be dropped


@cache
def _accelerator() -> tuple[str, int]:
    """(name, bytes of its memory). Imports torch only where there are signs of one."""
    nvidia = Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists()
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if (nvidia or apple) and find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return "cuda", int(torch.cuda.get_device_properties(0).total_memory)
        if torch.backends.mps.is_available():
            return "mps", int(psutil.virtual_memory().total)
    return "cpu", 0


def _battery() -> tuple[int, bool]:
    """(percent, charging); without a battery (100, True)."""
    read = getattr(psutil, "sensors_battery", None)  # not on every system
    with suppress(OSError, RuntimeError, NotImplementedError, ValueError):
        if read and (found := read()):
            return max(0, min(100, round(found.percent))), bool(found.power_plugged)
    return 100, True


@cache
def _runtime() -> str:
    """The versions of packages from their metadata, without importing them."""
    found = [f"python {platform.python_version()}"]
    for name in ("corolla", "torch"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)[:128]


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


# --- a budget -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """How a client trains so that it fits. What is None stays as the config has it."""

    estimate: Estimate
    micro_batch_size: int | None = None
    gradient_checkpointing: bool | None = None
    rank: int | None = None
    trainer: TrainerName | None = None

    @property
    def overrides(self) -> dict[str, object]:
        """Settings that differ from the config, by key; rank and trainer are those of a class."""
        names = ("micro_batch_size", "gradient_checkpointing", "rank", "trainer")
        return {name: own for name in names if (own := getattr(self, name)) is not None}


def choose(
    budget: int,
    work: Workload,
    config: RunConfig,
    *,
    trainer: TrainerName | None = None,
    strategy: Strategy | None = None,
) -> Choice:
    """The way that costs least and fits into `budget` bytes.

    In this order: as configured, smaller micro-batches, gradient checkpointing, a lower rank and
    zeroth order, the last two only where the `strategy` has clients of different kinds, and not
    without one, where the device decides alone: a server would refuse its updates. Raises
    ConfigError with what the smallest way needs.
    """
    first = trainer or config.trainer_of("")
    tried: list[Estimate] = []
    for choice in _ways(config, first, strategy):
        changed = config.model_copy(
            update={key: value for key, value in choice.items() if key != "trainer"}
        )
        kind = choice.get("trainer", first)
        estimate = footprint.client(work, changed, kind)
        if estimate.total <= budget:
            return Choice(estimate, **choice)
        tried.append(estimate)
    least = min(tried, key=lambda estimate: estimate.total)
    raise ConfigError(
        f"{_size(budget)} of memory is too little for {registry.label(config.strategy)} on "
        f"{work.model.name}: the least is {_size(least.total)}, of which weights "
        f"{_size(least.terms['weights'])}; lower max-length ({config.max_length}), or take a "
        f"smaller model"
    )


def fit(
    config: RunConfig, model: str, budget: int, labels: int = 0
) -> tuple[dict[str, object], Estimate]:
    """Returns (settings that a device changes so that training fits, the Estimate with them).

    Training is that of `config` on the device's `model`. Its sequences are taken to be as long as
    max_length. Only what concerns nobody else is changed: `micro_batch_size` and
    `gradient_checkpointing`. Raises ConfigError, ModelError.
    """
    known = anatomy.read(model)
    longest = min(config.max_length, known.positions or config.max_length)
    batch = Batch(config.batch_size, longest, config.batch_size * (longest - 1))
    scored = Batch(8, longest, 8 * (longest - 1))
    choice = choose(budget, Workload(known, batch, scored, labels), config)
    return choice.overrides, choice.estimate


def _ways(
    config: RunConfig, trainer: TrainerName, strategy: Strategy | None
) -> Iterator[dict[str, Any]]:
    """Yields changes of settings, from the changes that cost least to those that cost most."""
    size = config.micro_batch_size or config.batch_size
    halves = [size >> i for i in range(1, size.bit_length())]
    micro: list[dict[str, Any]] = [{}, *({"micro_batch_size": half} for half in halves)]
    yield from micro
    if trainer == "zeroth_order":
        return
    spare: dict[str, Any] = (
        {} if config.gradient_checkpointing else {"gradient_checkpointing": True}
    )
    if spare:
        yield from ({**spare, **way} for way in micro)
    if strategy is None:
        return
    if strategy.mixed_ranks and config.kind.factors:
        ranks = [config.rank >> i for i in range(1, config.rank.bit_length())]
        yield from ({**spare, **micro[-1], "rank": rank} for rank in ranks)
    if "zeroth_order" in strategy.trainers:
        yield from ({**way, "trainer": "zeroth_order"} for way in micro)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
