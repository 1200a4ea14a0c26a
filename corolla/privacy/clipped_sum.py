"""Sums of updates, each clipped to a joint norm: their sensitivity to one client is known."""

from collections.abc import Callable
from typing import Self

import torch

from corolla.errors import ConfigError
from corolla.interfaces import Aggregator
from corolla.privacy import randomness
from corolla.types import Payload

CLIP_GROUP = "privacy-clip"


class ClippedSum:
    """Σ_m min(1, clip / |x_m|) x_m in fp64, an aggregator that gives out nothing by itself.

    x_m is the contribution of a client: what the strategy's own aggregator, made by `make`, makes
    of its update alone, whatever its weight. |x_m| is the joint L2 norm over all groups and
    tensors, those without dimensions too. A contribution that is not finite counts as 0. `like` has
    the form of updates.
    """

    linear = True

    def __init__(self, make: Callable[[], Aggregator], clip: float, like: Payload) -> None:
        if make() is make():
            raise ConfigError(
                "dp=client needs aggregator() to make a new one each time: this strategy's gives "
                "out the same again, which mixes clients before anything is clipped"
            )
        self.clip = clip
        self.clients = 0
        self.within = 0
        """How many contributions were not shortened."""
        self._make = make
        form = self._contribution(like)
        self.dtypes = {(g, n): t.dtype for g, own in form.items() for n, t in own.items()}
        self.total = {
            g: {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in own.items()}
            for g, own in form.items()
        }

    def add(self, payload: Payload, weight: float) -> None:
        own = self._contribution(payload)
        if _shapes(own) != _shapes(self.total):  # broadcasting would multiply a value
            raise ValueError("an update does not have the form of the others")
        norm = randomness.joint_norm(own)
        factor = float(randomness.clip_factors(norm, self.clip))
        self.clients += 1
        self.within += bool(norm <= self.clip)
        if factor:  # 0 · inf is no 0
            for group, params in own.items():
                for name, tensor in params.items():
                    self.total[group][name] += factor * tensor.double().cpu()

    def merge(self, other: Self) -> None:
        self.clients += other.clients
        self.within += other.within
        for group, params in other.total.items():
            for name, tensor in params.items():
                self.total[group][name] += tensor

    def finalise(self) -> Payload:
        raise ValueError("a sum of clipped updates is released with noise, by ClientLevel")

    def _contribution(self, payload: Payload) -> Payload:
        alone = self._make()
        alone.add(payload, 1.0)
        return alone.finalise()


def _shapes(payload: Payload) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(g, n): tuple(t.shape) for g, own in payload.items() for n, t in own.items()}
