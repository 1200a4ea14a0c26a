"""Differential privacy: objects that bound, sum, add noise, and say what that has cost.

Two units. "example": each client clips the gradients of its examples and adds noise in every step
(DP-SGD, Abadi et al., CCS 2016, arXiv 1607.00133), so that all it sends is private. "client": the
server clips what each client contributes and adds noise to the sum of a round (DP-FedAvg, McMahan
et al., ICLR 2018, arXiv 1710.06963), so that the model does not tell who took part; the server
itself sees updates. Neighbours have one example, or one client, more or less.

Noise is fp64 made of bits of the operating system, never of a seed of the run: who knows the seed
would take it off. It is no defence against attacks on floating-point numbers (Mironov, CCS 2012).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from corolla.interfaces import Aggregator
from corolla.privacy import accounting, banded
from corolla.privacy.accounting import Release
from corolla.privacy.calibration import (
    client_noise,
    noise_bands,
    refuse_delta,
    refuse_mixture,
    sampling_probability,
)
from corolla.privacy.clipped_sum import CLIP_GROUP, ClippedSum
from corolla.privacy.guarantee import NEIGHBOURS, Guarantee, client_guarantee
from corolla.privacy.participation import Participation
from corolla.privacy.randomness import (
    NOISE,
    Normal,
    Uniform,
    joint_norm,
    os_normal,
    os_uniform,
)
from corolla.types import Metrics, Payload

if TYPE_CHECKING:
    from corolla.config.run import RunConfig


_RATE = 0.2
"""η of adaptive clipping: how fast log(clip) follows."""


class ClientLevel:
    """Differential privacy of clients on the server, and its account over all rounds of a run.

    A round releases (Σ_m clip(x_m) + noise) / cohort: the denominator is the planned size, never
    that of who answered, and nobody weighs more. Noise has std noise_multiplier · clip; with
    dp_mechanism=banded it is correlated over `separation` rounds (see banded.py).

    With dp_sampling=fixed chance is no help, for who is asked is known: a client has spent what the
    rounds it took part in have, and the guarantee is that of the client who has spent most. (Of
    neighbours, one is without this client's updates; its place in a cohort stays empty.) With
    poisson every round costs everyone alike, and less, as long as nobody sees who is in it.

    With clip_quantile the clip follows that quantile of the norms (Andrew et al., "Differentially
    Private Learning with Adaptive Clipping", NeurIPS 2021, arXiv 1905.03871): C ← C exp(-0.2 (b̃ -
    quantile)), b̃ the noisy part of the contributions within C. The account sees one mechanism of
    noise_multiplier z: counts have noise of σ_b = max(cohort / 20, z) and updates of z_Δ = (z⁻² -
    (2 σ_b)⁻²)^-½. (σ_b >= z is ours: without it, small cohorts would need infinite noise.)

    `past` are the events that an earlier process of this run has noted, oldest first. An event
    counts even if its round is done again: what it announces may have been seen.

    Raises ConfigError for settings that do not go together, and a delta of 1 / population or more.
    """

    def __init__(
        self,
        config: "RunConfig",
        population: int,
        cohort: int,
        past: Sequence[Mapping[str, Any]] = (),
        normal: Normal = os_normal,
        uniform: Uniform = os_uniform,
    ) -> None:
        refuse_mixture(config)
        refuse_delta(config, population, "clients")
        self.config, self.cohort = config, cohort
        self.sampling_probability = sampling_probability(config, population, cohort)
        self.noise_multiplier = client_noise(config, population, cohort)
        self._normal, self._uniform = normal, uniform
        self._multipliers: defaultdict[int, list[float]] = defaultdict(list)
        """With Poisson sampling: round → the noise multiplier of each time it was noted."""
        self._parts = Participation(noise_bands(config), config.separation, config.participations)
        for event in past:
            self._charge(event["round"], event)

    def able(self, clients: Iterable[str], round: int) -> list[str]:
        """Returns the clients that may take part in `round`, out of `clients`."""
        return [client for client in clients if not self.refusal(client, round)]

    def refusal(self, client: str, round: int) -> str:
        """Why a client may not take part; "" if it may."""
        return self._parts.refusal(client, round)

    def next_epsilon(self, round: int) -> float:
        """Returns the epsilon spent once `round` is released too, with the worst client in it."""
        if self.config.dp_sampling == "poisson":
            return self._of_poisson({round: [self.noise_multiplier]})
        mu = self._parts.next_mu(round, self.noise_multiplier)
        return accounting.gaussian_epsilon(mu, self.config.delta)

    def draw(self, clients: Sequence[str]) -> list[str]:
        """A Poisson sample of clients, by secret chance; it may be empty."""
        chosen = (self._uniform(len(clients)) < self.sampling_probability).tolist()
        return [client for client, taken in zip(clients, chosen, strict=True) if taken]

    def aggregator(
        self, make: Callable[[], Aggregator], memory: Payload, like: Payload
    ) -> ClippedSum:
        """An empty sum for one round; `like` is the form of an update (Strategy.update_like)."""
        return ClippedSum(make, self._clip(memory), like)

    def release(
        self,
        summed: ClippedSum,
        clients: Sequence[str],
        memory: Payload,
        note: Callable[[Mapping[str, Any]], None],
        *,
        round: int,
    ) -> tuple[Payload, Payload, Metrics]:
        """The aggregate with noise, what replaces groups of `memory`, and what may be told.

        `clients` are those in the sum. `note` gets the event before any noise is drawn: if it
        raises, nothing is released.
        """
        event = {
            "unit": "client",
            "neighbours": NEIGHBOURS["client"],
            "mechanism": self.config.dp_mechanism,
            "noise_multiplier": self.noise_multiplier,
            "clip": summed.clip,
            "sampling_probability": self.sampling_probability,
            "clients": sorted(clients),
            "delta": self.config.delta,
        }
        self._charge(round, event)
        spent = self.guarantee().epsilon
        note({**event, "epsilon": spent})
        of_updates, of_counts = self._split()
        noise, std = self._noise(summed, memory), of_updates * summed.clip
        aggregate = {
            group: {
                name: ((total + std * noise[f"{group}/{name}"]) / self.cohort).to(
                    summed.dtypes[group, name]
                )
                for name, total in own.items()
            }
            for group, own in summed.total.items()
        }
        metrics = {"clip": summed.clip, "noise_std": std / self.cohort, "epsilon": spent}
        metrics |= self._norms(aggregate, metrics["noise_std"], round)
        if self.config.clip_quantile is None:
            return aggregate, self._remember(noise, memory), metrics
        bits = summed.within - summed.clients / 2  # ±1/2 of each client
        within = (bits + of_counts * float(self._normal(()))) / self.cohort + 0.5
        clip = summed.clip * math.exp(-_RATE * (within - self.config.clip_quantile))
        after = {CLIP_GROUP: {"clip": torch.tensor(clip, dtype=torch.float64)}}
        return aggregate, after, {**metrics, "clipped": 1 - within}

    def _norms(self, aggregate: Payload, std: float, round: int) -> Metrics:
        """The norms of the noise, as expected, and of the mean update: made of what is released.

        The squares of both add up to that of the aggregate, on average.
        """
        values = sum(tensor.numel() for own in aggregate.values() for tensor in own.values())
        noise = std * math.sqrt(values) * banded.spread(round, noise_bands(self.config))
        square = float(joint_norm(aggregate)) ** 2 - noise**2
        return {"noise_norm": noise, "update_norm": math.sqrt(max(0.0, square))}

    def guarantee(self) -> Guarantee:
        """Returns the guarantee for what has been spent so far."""
        if self.config.dp_sampling == "poisson":
            spent = self._of_poisson({})
        else:
            spent = accounting.gaussian_epsilon(self._parts.mu, self.config.delta)
        return client_guarantee(self.config, spent, self.sampling_probability, self._parts.times)

    def _charge(self, round: int, event: Mapping[str, Any]) -> None:
        """Put what is noted on the account."""
        z = event["noise_multiplier"]
        if self.config.dp_sampling == "poisson":
            self._multipliers[round].append(z)
        else:
            self._parts.note(round, event["clients"], z)

    def _of_poisson(self, more: Mapping[int, Sequence[float]]) -> float:
        """Returns the epsilon of the rounds so far and of `more` together.

        A round that is done again asks the same cohort: one secret draw, seen k times with noise of
        z each, which is once with z / √k. Two draws would cost less.
        """
        rounds = self._multipliers.keys() | more.keys()
        return accounting.epsilon(
            (
                Release(
                    accounting.combined([*self._multipliers.get(t, ()), *more.get(t, ())]),
                    self.sampling_probability,
                )
                for t in rounds
            ),
            self.config.delta,
        )

    def _clip(self, memory: Payload) -> float:
        return float(memory[CLIP_GROUP]["clip"]) if CLIP_GROUP in memory else self.config.clip

    def _split(self) -> tuple[float, float]:
        """The noise multiplier of updates, and the std of the noise on counts."""
        z = self.noise_multiplier
        if self.config.clip_quantile is None:
            return z, 0.0
        of_counts = max(self.cohort / 20, z)
        return (z**-2 - (2 * of_counts) ** -2) ** -0.5, of_counts

    def _noise(self, summed: ClippedSum, memory: Payload) -> banded.Noise:
        """In units of the noise of a single round, by "group/name", drawn in that order."""
        fresh = {
            f"{group}/{name}": self._normal(own[name].shape)
            for group, own in sorted(summed.total.items())
            for name in sorted(own)
        }
        bands = noise_bands(self.config)
        past = [memory.get(f"{NOISE}{lag}", {}) for lag in range(1, bands)]
        return banded.correlate(fresh, past, bands)

    def _remember(self, noise: banded.Noise, memory: Payload) -> Payload:
        """The noise of the last `bands` - 1 rounds. It must stay as secret as updates."""
        kept = range(1, noise_bands(self.config))
        past = {lag + 1: memory[f"{NOISE}{lag}"] for lag in kept if f"{NOISE}{lag}" in memory}
        return {f"{NOISE}{lag}": own for lag, own in {1: noise, **past}.items() if lag in kept}
