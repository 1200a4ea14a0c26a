"""Example-level privacy: noise on sums of clipped gradients, drawn on the device."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from corolla.privacy import accounting, randomness
from corolla.privacy.accounting import Release
from corolla.privacy.calibration import noise_multiplier_for, refuse_delta
from corolla.privacy.guarantee import Guarantee
from corolla.privacy.randomness import Normal, Uniform, os_normal, os_uniform

if TYPE_CHECKING:
    from corolla.config.run import RunConfig


@dataclass(frozen=True)
class ExampleLevel:
    """DP-SGD of one client that holds `examples`: who is in a step, the noise, what it costs.

    A step takes each example by an independent coin with probability batch / examples, sums their
    gradients, clipped to joint norm `clip`, adds noise of std noise_multiplier · clip, and divides
    by the expected size of the batch. `steps` are those of a round. Sums are in units of `clip`
    until the noise is on them: whatever clip a server chooses, no sum of clipped gradients can
    overflow, or be lost, before it is noised. Where rows name users, `unit` is "user", and an
    example is all that a user has: `examples` and `batch` count users.
    """

    examples: int
    batch: int
    clip: float
    noise_multiplier: float
    delta: float
    steps: int
    budget: float | None = None
    unit: Literal["example", "user"] = "example"
    normal: Normal = os_normal
    uniform: Uniform = os_uniform

    @property
    def sampling_probability(self) -> float:
        """Of each example, in each step."""
        return min(1.0, self.batch / self.examples)

    @property
    def release(self) -> Release:
        """The release that one round spends."""
        return Release(self.noise_multiplier, self.sampling_probability, self.steps)

    def draw(self) -> list[int]:
        """The examples of a step: a Poisson sample, which may be empty."""
        return (self.uniform(self.examples) < self.sampling_probability).nonzero()[:, 0].tolist()

    def noised(self, clipped_sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Clip · (sum + N(0, noise_multiplier²)) / expected batch, of sums in units of `clip`.

        Computed in fp64 and rounded once, to fp32, on the CPU: some devices have no fp64.
        """
        expected = min(self.batch, self.examples)
        found: dict[str, Tensor] = {}
        for name, total in sorted(clipped_sums.items()):
            sums = total.detach().cpu().reshape(-1)
            noisy = torch.empty(sums.shape, dtype=torch.float32)
            parts = (torch.split(whole, randomness.SLICE) for whole in (sums, noisy))
            for part, rounded in zip(*parts, strict=True):
                drawn = self.noise_multiplier * self.normal(part.shape)
                rounded.copy_(self.clip * ((part.double() + drawn) / expected))
            found[name] = noisy.reshape(total.shape)
        return found

    def noise_norm(self, values: int) -> float:
        """The expected L2 norm of the noise on a round's gradients of so many values, all steps."""
        expected = min(self.batch, self.examples)
        return self.noise_multiplier * self.clip * math.sqrt(values * self.steps) / expected

    @property
    def gradient_bound(self) -> float:
        """The L2 norm that a round's clipped gradients have at most, with batches as expected."""
        return self.clip * self.steps

    def guarantee(self, rounds: int) -> Guarantee:
        """After the client has trained in so many rounds."""
        spent = accounting.epsilon([self.release] * rounds, self.delta)
        how = f"Poisson sampling of {self.unit}s, q = {self.sampling_probability:.4g}"
        return Guarantee(self.unit, spent, self.delta, self.budget, how)


def example_level(
    config: "RunConfig", examples: int, unit: Literal["example", "user"] = "example"
) -> ExampleLevel:
    """That of a client with so many training examples, or users.

    The noise is given, or that with which all rounds it may train in cost `epsilon`. Raises
    ConfigError for settings that do not go together, and a delta of 1 / examples or more.
    """
    from corolla.config.schedule import (
        steps_per_round,  # it needs the config, which may need this module
    )

    of = "training examples of a client" if unit == "example" else "users of a client"
    refuse_delta(config, examples, of)
    q = min(1.0, config.batch_size / examples)
    steps = steps_per_round(config, examples)
    rounds = min(config.rounds, config.participations or config.rounds)
    noise = noise_multiplier_for(config, steps * rounds, q)
    return ExampleLevel(
        *(examples, config.batch_size, config.clip, noise, config.delta, steps),
        *(config.epsilon, unit),
    )
