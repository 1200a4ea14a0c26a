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
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from corolla.errors import ConfigError
from corolla.privacy import accounting, banded
from corolla.privacy.accounting import Release
from corolla.privacy.participation import Participation
from corolla.types import Aggregator, Metrics, Payload

if TYPE_CHECKING:
    from corolla.config.run import RunConfig

Normal = Callable[[Sequence[int]], Tensor]
"""Shape → independent N(0, 1), fp64."""

Uniform = Callable[[int], Tensor]
"""n → independent uniform values in [0, 1), fp64 (n,)."""

NEIGHBOURS = {
    "example": "add or remove one example",
    "client": "add or remove one client's updates",
}
"""Unit → what two data sets differ in, at most, that nobody can tell apart.

A client's place in the cohorts stays: with another one in its stead, two updates would differ.
"""

_CLIP = "privacy-clip"
NOISE = "privacy-noise-"
"""Groups of a server's memory: the clip of the next round; noise of so many rounds ago."""

_SLICE = 1 << 20
"""Values that get their noise at a time: fp64 and what it is made of take 32 bytes each."""

_RATE = 0.2
"""η of adaptive clipping: how fast log(clip) follows."""


def os_uniform(n: int) -> Tensor:
    """Uniform values in [0, 1), fp64 (n,): 53 bits each, all from the operating system."""
    words = np.frombuffer(os.urandom(8 * n), dtype=np.uint64)
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64)).mul_(2.0**-53)


def os_normal(shape: Sequence[int]) -> Tensor:
    """N(0, 1) by Box and Muller (1958), fp64, from the operating system; at most 8.6 in size."""
    n = math.prod(shape)
    half = (n + 1) // 2
    radius = (1 - os_uniform(half)).log_().mul_(-2).sqrt_()  # of (0, 1]: never infinite
    angle = os_uniform(half).mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:n].reshape(tuple(shape))


@dataclass(frozen=True)
class Guarantee:
    """What is promised to each example or client, in the terms that decide what it means."""

    unit: Literal["example", "client"]
    epsilon: float
    delta: float
    budget: float | None
    """What epsilon may become in this run; None: the noise was given, and epsilon follows."""
    how: str
    """What the accounting rests on: how participants are drawn, how often one takes part."""

    def line(self) -> str:
        """All of it in one line."""
        budget = "" if self.budget is None else f" of a budget of {self.budget:g}"
        return (
            f"epsilon {self.epsilon:.4g}{budget} at delta {self.delta:g}, to "
            f"{NEIGHBOURS[self.unit]}; {self.how}"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; epsilon is None where it is infinite."""
        found = asdict(self)
        return found | {"epsilon": self.epsilon if math.isfinite(self.epsilon) else None}


def clip_factors(norms: Tensor, clip: float) -> Tensor:
    """min(1, clip / norm); 0 where the norm is not finite, 1 where it is 0."""
    factors = clip / norms.clamp(min=clip)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))


@dataclass(frozen=True)
class ExampleLevel:
    """DP-SGD of one client that holds `examples`: who is in a step, the noise, what it costs.

    A step takes each example by an independent coin with probability batch / examples, sums their
    gradients, clipped to joint norm `clip`, adds noise of std noise_multiplier · clip, and divides
    by the expected size of the batch. `steps` are those of a round.
    """

    examples: int
    batch: int
    clip: float
    noise_multiplier: float
    delta: float
    steps: int
    budget: float | None = None
    normal: Normal = os_normal
    uniform: Uniform = os_uniform

    @property
    def sampling_probability(self) -> float:
        """Of each example, in each step."""
        return min(1.0, self.batch / self.examples)

    @property
    def release(self) -> Release:
        """What a round spends."""
        return Release(self.noise_multiplier, self.sampling_probability, self.steps)

    def draw(self) -> list[int]:
        """The examples of a step: a Poisson sample, which may be empty."""
        return (self.uniform(self.examples) < self.sampling_probability).nonzero()[:, 0].tolist()

    def noised(self, clipped_sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(sum + N(0, (noise_multiplier · clip)²)) / expected batch, in the types given."""
        std, expected = self.noise_multiplier * self.clip, min(self.batch, self.examples)
        found: dict[str, Tensor] = {}
        for name, total in sorted(clipped_sums.items()):
            noisy = total.detach().to("cpu", copy=True).reshape(-1)  # some devices have no fp64
            for part in torch.split(noisy, _SLICE):
                part.copy_((part.double() + std * self.normal(part.shape)) / expected)
            found[name] = noisy.reshape(total.shape).to(total.device)
        return found

    def guarantee(self, rounds: int) -> Guarantee:
        """After the client has trained in so many rounds."""
        spent = accounting.epsilon([self.release] * rounds, self.delta)
        how = f"Poisson sampling of examples, q = {self.sampling_probability:.4g}"
        return Guarantee("example", spent, self.delta, self.budget, how)


def example_level(config: "RunConfig", examples: int) -> ExampleLevel:
    """That of a client with so many training examples.

    The noise is given, or that with which all rounds it may train in cost `epsilon`. Raises
    ConfigError for settings that do not go together, and a delta of 1 / examples or more.
    """
    from corolla.config.schedule import (
        steps_per_round,  # it needs the config, which may need this module
    )

    _refuse_delta(config, examples, "training examples of a client")
    q = min(1.0, config.batch_size / examples)
    steps = steps_per_round(config, examples)
    rounds = min(config.rounds, config.participations or config.rounds)
    noise = _noise(config, steps * rounds, q)
    return ExampleLevel(
        *(examples, config.batch_size, config.clip, noise, config.delta, steps), config.epsilon
    )


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
        norm = joint_norm(own)
        factor = float(clip_factors(norm, self.clip))
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


def joint_norm(payload: Payload) -> Tensor:
    """The L2 norm over all tensors of all groups: fp64, no dimensions."""
    squares = [t.double().square().sum().cpu() for own in payload.values() for t in own.values()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


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
        _refuse_mixture(config)
        _refuse_delta(config, population, "clients")
        self.config, self.cohort = config, cohort
        self.sampling_probability = _probability(config, population, cohort)
        self.noise_multiplier = _client_noise(config, population, cohort)
        self._normal, self._uniform = normal, uniform
        self._multipliers: defaultdict[int, list[float]] = defaultdict(list)
        """With Poisson sampling: round → the noise multiplier of each time it was noted."""
        self._parts = Participation(_bands(config), config.separation, config.participations)
        for event in past:
            self._charge(event["round"], event)

    def able(self, clients: Iterable[str], round: int) -> list[str]:
        """Who of `clients` may take part."""
        return [client for client in clients if not self.refusal(client, round)]

    def refusal(self, client: str, round: int) -> str:
        """Why a client may not take part; "" if it may."""
        return self._parts.refusal(client, round)

    def next_epsilon(self, round: int) -> float:
        """What will have been spent if `round` is released too, with the worst client in it."""
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
        if self.config.clip_quantile is None:
            return aggregate, self._remember(noise, memory), metrics
        bits = summed.within - summed.clients / 2  # ±1/2 of each client
        within = (bits + of_counts * float(self._normal(()))) / self.cohort + 0.5
        clip = summed.clip * math.exp(-_RATE * (within - self.config.clip_quantile))
        after = {_CLIP: {"clip": torch.tensor(clip, dtype=torch.float64)}}
        return aggregate, after, {**metrics, "clipped": 1 - within}

    def guarantee(self) -> Guarantee:
        """What has been spent so far."""
        if self.config.dp_sampling == "poisson":
            spent = self._of_poisson({})
        else:
            spent = accounting.gaussian_epsilon(self._parts.mu, self.config.delta)
        return _guarantee(self.config, spent, self.sampling_probability, self._parts.times)

    def _charge(self, round: int, event: Mapping[str, Any]) -> None:
        """Put what is noted on the account."""
        z = event["noise_multiplier"]
        if self.config.dp_sampling == "poisson":
            self._multipliers[round].append(z)
        else:
            self._parts.note(round, event["clients"], z)

    def _of_poisson(self, more: Mapping[int, Sequence[float]]) -> float:
        """What the rounds so far, and `more`, cost together.

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
        return float(memory[_CLIP]["clip"]) if _CLIP in memory else self.config.clip

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
        bands = _bands(self.config)
        past = [memory.get(f"{NOISE}{lag}", {}) for lag in range(1, bands)]
        return banded.correlate(fresh, past, bands)

    def _remember(self, noise: banded.Noise, memory: Payload) -> Payload:
        """The noise of the last `bands` - 1 rounds. It must stay as secret as updates."""
        kept = range(1, _bands(self.config))
        past = {lag + 1: memory[f"{NOISE}{lag}"] for lag in kept if f"{NOISE}{lag}" in memory}
        return {f"{NOISE}{lag}": own for lag, own in {1: noise, **past}.items() if lag in kept}


def client_plan(config: "RunConfig", population: int, cohort: int) -> list[Guarantee]:
    """What each of `planned_rounds` will have cost, for a client that takes part when it may."""
    z, q = _client_noise(config, population, cohort), _probability(config, population, cohort)
    found = []
    for rounds in planned_rounds(config.rounds):
        if config.dp_sampling == "poisson":
            spent = accounting.epsilon([Release(z, q, rounds)], config.delta)
        else:
            mu = _sensitivity(config, rounds) / z
            spent = accounting.gaussian_epsilon(mu, config.delta)
        found.append(_guarantee(config, spent, q, _participations(config, rounds)))
    return found


def planned_rounds(rounds: int, most: int = 20) -> list[int]:
    """At most so many rounds, evenly spaced, the last one among them."""
    return sorted({math.ceil(rounds * i / most) for i in range(1, most + 1)})


def _guarantee(config: "RunConfig", spent: float, q: float, times: int) -> Guarantee:
    if config.dp_sampling == "poisson":
        how = f"Poisson sampling of clients, q = {q:.4g}"
    else:
        how = f"no amplification, each client in at most {times} round{'s' * (times != 1)}"
        if config.dp_mechanism == "banded":
            how += f", noise correlated over {config.separation} rounds"
    return Guarantee("client", spent, config.delta, config.epsilon, how)


def _probability(config: "RunConfig", population: int, cohort: int) -> float:
    """That a client is in a round by a chance that nobody knows the outcome of."""
    return min(1.0, cohort / population) if config.dp_sampling == "poisson" else 1.0


def _client_noise(config: "RunConfig", population: int, cohort: int) -> float:
    if config.dp_sampling == "poisson":
        return _noise(config, config.rounds, _probability(config, population, cohort))
    of_one = _noise(config, 1, 1.0)
    return of_one if config.epsilon is None else of_one * _sensitivity(config, config.rounds)


def _noise(config: "RunConfig", count: int, q: float) -> float:
    """What is given, or what makes so many releases cost `epsilon`."""
    budget, given = config.epsilon, config.noise_multiplier
    if budget is None and given is not None:
        return given
    if budget is not None and given is None:
        return accounting.calibrate(budget, config.delta, count, q) * (1 + 1e-9)  # sums round
    raise ConfigError(
        f"dp={config.dp} needs epsilon, which noise is made for, or noise-multiplier, found "
        f"{'neither' if budget is None else 'both'}: give one of them"
    )


def _sensitivity(config: "RunConfig", rounds: int) -> float:
    most = config.participations or rounds
    return banded.sensitivity(rounds, _bands(config), most, config.separation)


def _bands(config: "RunConfig") -> int:
    return config.separation if config.dp_mechanism == "banded" else 1


def _participations(config: "RunConfig", rounds: int) -> int:
    """How often a client can take part in so many rounds."""
    possible = math.ceil(rounds / config.separation)
    return min(possible, config.participations or possible)


def _refuse_mixture(config: "RunConfig") -> None:
    """Raises ConfigError for what the account of clients could not tell the truth about."""
    banded, chance = config.dp_mechanism == "banded", config.dp_sampling == "poisson"
    if chance and (banded or config.participations or config.separation > 1):
        raise ConfigError(
            "dp-sampling=poisson draws clients by chance alone: leave out participations, "
            "separation and dp-mechanism=banded, or use dp-sampling=fixed"
        )
    if banded and config.clip_quantile is not None:
        raise ConfigError("dp-mechanism=banded has one clip in all rounds: leave out clip-quantile")


def _refuse_delta(config: "RunConfig", count: int, of: str) -> None:
    """Delta is a chance that anything may happen: for 1 / count, that one is published whole."""
    if not count:
        raise ConfigError(f"dp={config.dp} needs {of} to protect, found none")
    if config.delta >= 1 / count:
        raise ConfigError(
            f"delta={config.delta:g} is no protection among {count} {of}: set less than "
            f"{1 / count:.3g}"
        )


def _shapes(payload: Payload) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(g, n): tuple(t.shape) for g, own in payload.items() for n, t in own.items()}
