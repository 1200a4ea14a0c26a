"""The most that a device can train within its memory, bytes and seconds.

Every combination of settings is a point; each limit only rises with the number of blocks, so the
most blocks that fit are found by halving. (After FedPipe, Fang et al., 2024, arXiv 2404.06448; its
ranks of single modules are one rank here.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from corolla.budgets import costs
from corolla.config.run import RunConfig
from corolla.estimates import flops, footprint
from corolla.estimates.footprint import Batch, Workload
from corolla.models import layers
from corolla.models.anatomy import Anatomy

SCORED = 8
"""Sequences that a client evaluates at a time."""


@dataclass(frozen=True)
class Limits:
    """The limits of the devices of a class; None: no limit."""

    memory: int | None = None
    """Bytes of the peak of training."""
    bytes: int | None = None
    """Bytes of an update."""
    seconds: float | None = None
    """Seconds of a round: its steps, and what travels where the class says how fast."""
    flops: float | None = None
    """Operations a second of its devices."""


@dataclass(frozen=True)
class Need:
    """The needs of a way to train, in the units of Limits."""

    memory: int
    bytes: int
    seconds: float

    def within(self, limits: Limits) -> bool:
        """Returns whether it is within all limits."""
        return not self.beyond(limits)

    def beyond(self, limits: Limits) -> list[str]:
        """The names of the limits that it exceeds."""
        names = ("memory", "bytes", "seconds")
        most = {name: getattr(limits, name) for name in names}
        return [n for n in names if most[n] is not None and getattr(self, n) > most[n]]


@dataclass(frozen=True)
class Way:
    """A way to train: the last blocks of so many, and the settings of memory."""

    blocks: Sequence[int]
    """Numbers of the blocks, the last one first."""
    rank: int
    micro_batch_size: int
    dtype: str
    quantization: str

    @property
    def value(self) -> int:
        """The amount that is trained: blocks times rank, as no module is known to matter more."""
        return len(self.blocks) * self.rank


Traffic = Callable[[RunConfig], tuple[int, int]]
"""Settings of a class → bytes of (its update, a task and its reply)."""


@dataclass(frozen=True)
class Device:
    """Devices of a class, and the work that a run has for them."""

    model: Anatomy
    config: RunConfig
    """The settings of the class."""
    limits: Limits
    speed: float
    """Operations a second."""
    rates: tuple[float | None, float | None]
    """Bytes a second up and down; None: no time."""
    traffic: Traffic

    @property
    def numbers(self) -> list[int]:
        """Numbers of the blocks that may be trained, the last one first."""
        run = self.config
        return list(costs.by_block(list(self.model.linear(run.target_modules, run.layers))))

    def best(self, rank: int, dtype: str, quantization: str) -> tuple[Way, Need] | None:
        """The way with most blocks, then the largest micro-batch; None where nothing fits."""
        numbers = self.numbers
        smallest = Way(numbers, rank, 1, dtype, quantization)
        most = self._most(smallest)
        if not most:
            return None
        way = replace(smallest, blocks=numbers[:most])
        for size in self._micro():
            larger = replace(way, micro_batch_size=size)
            if (need := self.need(larger)).within(self.limits):
                return larger, need
        return way, self.need(way)

    def least(self, dtype: str, quantization: str) -> Need:
        """The needs of one block of rank 1 and micro-batches of one sequence."""
        return self.need(Way(self.numbers[:1], 1, 1, dtype, quantization))

    def need(self, way: Way) -> Need:
        """The needs of a way to train."""
        config = self.settings(way)
        up, exchange = self.traffic(config)
        scored = self._batch(SCORED) if config.eval_clients else None
        work = Workload(self.model, self._batch(config.batch_size), scored)
        memory = footprint.client(work, config, "first_order", exchange).total
        seconds = config.local_steps * self._operations(config, way) / self.speed
        for rate, size in zip(self.rates, (up, exchange - up), strict=True):
            seconds += size / rate if rate else 0.0
        return Need(memory, up, seconds)

    def settings(self, way: Way) -> RunConfig:
        """The settings of the class with those of a way to train."""
        update: dict[str, Any] = {"layers": layers.text(way.blocks), "rank": way.rank}
        update |= {"micro_batch_size": way.micro_batch_size, "dtype": way.dtype}
        return self.config.model_copy(update={**update, "quantization": way.quantization})

    def _most(self, way: Way) -> int:
        """The most blocks of it that fit: each limit rises with their number."""
        low, high = 0, len(way.blocks)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.need(replace(way, blocks=way.blocks[:middle])).within(self.limits)
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _micro(self) -> list[int]:
        """Sizes of micro-batches, from that of the settings down in halves to more than 1."""
        size = self.config.micro_batch_size or self.config.batch_size
        return [size >> i for i in range(size.bit_length()) if size >> i > 1]

    def _batch(self, sequences: int) -> Batch:
        """Sequences of the largest length."""
        tokens = min(self.config.max_length, self.model.positions or self.config.max_length)
        return Batch(sequences, tokens, sequences * (tokens - 1))

    def _operations(self, config: RunConfig, way: Way) -> float:
        """Operations of a step: those counted here, or those of plan where these are more."""
        batch = self._batch(config.batch_size)
        names = self.model.linear(config.target_modules, config.layers)
        work = flops.total(flops.count(self.model, batch, dict.fromkeys(names, way.rank)))
        again = work.forward if config.gradient_checkpointing else 0
        planned = footprint.operations(self.model, config, "first_order", batch)
        return max(work.forward + work.backward + again, planned)
