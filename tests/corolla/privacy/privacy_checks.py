"""What the mechanisms of differential privacy must do, as functions that raise AssertionError.

test_client_level.py calls them on the code as it is, test_mutations.py on code that it has
broken: each must notice. They go through the public interface alone, with the operating system's
randomness where the randomness matters. False alarms have a probability of at most 1e-9.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from scipy.stats import binom, chi2
from torch import Tensor

from corolla.config.run import RunConfig
from corolla.privacy import randomness
from corolla.privacy.client_level import ClientLevel
from corolla.privacy.example_level import ExampleLevel
from corolla.strategies.listing import registry
from corolla.types import Metrics, Params, Payload, Size

FALSE_ALARM = 1e-9
C = 0.5


def config(**changes: Any) -> RunConfig:
    """Of a run with dp=client."""
    given = {"dp": "client", "delta": 1e-5, "clip": C, "rounds": 10, **changes}
    if "epsilon" not in given:
        given.setdefault("noise_multiplier", 1.0)
    return RunConfig(**given)


def level(cohort: int = 10, population: int = 1000, **changes: Any) -> ClientLevel:
    """The object under test, as a run makes it."""
    own = {key: changes.pop(key) for key in ("past", "normal", "uniform") if key in changes}
    return ClientLevel(config(**changes), population, cohort, **own)


def silent(shape: Sequence[int]) -> Tensor:
    """Instead of noise."""
    return torch.zeros(tuple(shape), dtype=torch.float64)


def release(
    own: ClientLevel,
    updates: Sequence[tuple[Payload, float]],
    like: Payload,
    strategy: str = "fedavg",
    memory: Payload | None = None,
    round: int = 1,
    clients: Sequence[str] | None = None,
    note: Callable[[Mapping[str, Any]], None] = lambda event: None,
) -> tuple[Payload, Payload, Metrics]:
    """One round of a server: (payload, weight) of each client → what is released."""
    memory = memory or {}
    summed = own.aggregator(registry.create(strategy).aggregator, memory, like)
    for payload, weight in updates:
        summed.add(payload, weight)
    names = [f"c{i}" for i in range(len(updates))] if clients is None else clients
    return own.release(summed, names, memory, note, round=round)


def flat(payload: Payload) -> Tensor:
    """All values in one vector, fp64."""
    parts = [own[name].double().flatten() for _, own in sorted(payload.items()) for name in own]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def fresh() -> Params:
    """A small adapter with a head, in which one tensor is a single value."""
    return {
        "m.lora_A": torch.eye(2, 6),
        "m.lora_B": torch.zeros(5, 2),
        "scale": torch.zeros(()),
        "head.weight": torch.zeros(3, 4),
    }


def form(strategy: str) -> Payload:
    """What an update of a strategy looks like."""
    known = registry.create(strategy)
    size = Size(12, 10, 13, scalars=7, trainer=known.trainers[0], step=-0.1, round=1, rank=2)
    return known.update_like(fresh(), size)


def filled(like: Payload, value: Callable[[Tensor], Tensor]) -> Payload:
    """The same form with other values, but for what a server demands as it is."""
    return {
        group: {
            name: tensor
            if name in ("step", "seed")
            else tensor % 5
            if name == "directions"
            else value(tensor).to(tensor.dtype)
            for name, tensor in own.items()
        }
        for group, own in like.items()
    }


def random(like: Payload, seed: int, scale: float = 1.0) -> Payload:
    generator = torch.Generator().manual_seed(seed)
    return filled(like, lambda t: scale * torch.randn(t.shape, generator=generator))


def hostile(like: Payload) -> list[tuple[Payload, float]]:
    """Updates that somebody might send, with the weights that they might claim."""
    broken = dict(like)
    group = sorted(like)[0]
    poisoned = {n: t.clone() for n, t in filled(like, torch.ones_like)[group].items()}
    name = next(n for n, t in poisoned.items() if n not in ("step", "seed", "directions"))
    poisoned[name].view(-1)[0] = math.nan
    broken[group] = poisoned
    largest = 3e4 if any(t.dtype == torch.float16 for t in like[group].values()) else 3e38
    return [
        (random(like, 0), 1.0),
        (random(like, 1, 1e-3), 1e12),
        (filled(like, torch.zeros_like), 1.0),
        (filled(like, lambda t: torch.full_like(t, largest)), 1e12),
        (filled(like, lambda t: torch.full_like(t, -largest)), 1e-9),
        (filled(like, lambda t: torch.full_like(t, math.inf)), 1.0),
        (filled(like, lambda t: torch.full_like(t, math.nan)), 5.0),
        (broken, 5.0),
        *[(random(like, 2, 100.0), 1e12)] * 3,
    ]


def sensitivity_is_at_most_the_clip(strategy: str = "fedavg") -> None:
    """Whoever is left out, the sum that noise goes on moves by at most C."""
    like = form(strategy)
    updates = hostile(like)
    own = level(normal=silent)
    whole = flat(release(own, updates, like, strategy)[0])
    assert bool(whole.isfinite().all())
    moved = []
    for left_out in range(len(updates)):
        others = updates[:left_out] + updates[left_out + 1 :]
        part = flat(release(own, others, like, strategy)[0])
        moved.append(own.cohort * float((whole - part).norm()))
    assert max(moved) <= C * (1 + 1e-5), f"moved by {max(moved) / C} times the clip"
    assert max(moved) >= C * (1 - 1e-5), "long updates should use all of the clip"


def noise_has_its_std(clients: int = 3, **changes: Any) -> None:
    """That which the event promises, on 3e5 coordinates of the aggregate, by a chi-square test.

    Of 3e5 coordinates, 1e-9 is 0.8 % of the standard deviation.
    """
    like: Payload = {
        "adapter": {"a": torch.zeros(250, 400, dtype=torch.float64)},
        "head": {"w": torch.zeros(200_000, dtype=torch.float64)},
    }
    events: list[Mapping[str, Any]] = []
    own = level(**changes)
    updates = [(filled(like, torch.zeros_like), 1.0)] * clients
    aggregate, _, metrics = release(own, updates, like, note=events.append)
    (event,) = events
    promised = event["noise_multiplier"] * event["clip"] / own.cohort
    assert metrics["noise_std"] == promised
    for noise in (
        flat(aggregate),
        flat({"a": aggregate["adapter"]}),
        flat({"h": aggregate["head"]}),
    ):
        is_normal(noise / promised)


def is_normal(z: Tensor) -> None:
    """N(0, 1), by its mean, its variance and its tails, each to FALSE_ALARM."""
    n = len(z)
    low, high = chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], n)
    assert low <= float(z.square().sum()) <= high, f"std {float(z.square().mean().sqrt())}"
    assert abs(float(z.mean())) * math.sqrt(n) <= 6.2
    for bound in (0.5, 1.0, 2.0, 3.0):
        inside = math.erf(bound / math.sqrt(2))
        least, most = binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], n, inside)
        assert least <= int((z.abs() <= bound).sum()) <= most, f"tails beyond {bound}"


def denominator_is_the_planned_cohort() -> None:
    """However many answer: neither the sum nor the noise is divided by that."""
    like: Payload = {"adapter": {"w": torch.zeros(4, dtype=torch.float64)}}
    own = level(cohort=10, normal=silent)
    one = (filled(like, lambda t: torch.full_like(t, 0.01)), 7.0)
    for replies in (0, 1, 2, 10):
        found = release(own, [one] * replies, like)[0]["adapter"]["w"]
        assert torch.allclose(found, torch.full_like(found, 0.01 * replies / 10), rtol=1e-12)


def nothing_is_drawn_before_it_is_noted() -> None:
    """The event is written first; if it cannot be, there is no noise and no aggregate."""
    like: Payload = {"adapter": {"w": torch.zeros(4)}}
    order: list[str] = []

    def normal(shape: Sequence[int]) -> Tensor:
        order.append("noise")
        return silent(shape)

    def note(event: Mapping[str, Any]) -> None:
        order.append("note")

    def fails(event: Mapping[str, Any]) -> None:
        raise OSError("the disk is full")

    own = level(normal=normal, clip_quantile=0.5)
    release(own, [], like, note=note)
    assert order == ["note", "noise", "noise"]  # of the sum, and of the count of the clip
    order.clear()
    try:
        release(own, [], like, note=fails)
    except OSError:
        assert not order
    else:
        raise AssertionError("released what could not be noted")


def clip_follows_the_norms() -> None:
    """Down where all updates are within it, up where none is."""
    like: Payload = {"adapter": {"w": torch.zeros(4)}}
    for scale, goes_up in ((1e-3, False), (1e3, True)):
        own = level(cohort=40, normal=silent, clip_quantile=0.5)
        memory: Payload = {}
        updates = [(random(like, 0, scale), 1.0)] * 40
        clips = []
        for round in range(1, 4):
            _, memory, metrics = release(own, updates, like, memory=memory, round=round)
            clips.append(metrics["clip"])
        assert clips == sorted(clips, reverse=not goes_up)
        assert clips[0] == C != clips[1] != clips[2]


def samples_are_poisson(draw: Callable[[], Sequence[int]], n: int, q: float, draws: int) -> None:
    """Each of n by a coin of its own, of probability q, in each draw."""
    drawn = torch.zeros(draws, n, dtype=torch.bool)
    for row in drawn:
        chosen = draw()
        assert len(set(chosen)) == len(chosen)
        row[list(chosen)] = True
    tail = FALSE_ALARM / n**2
    for i in range(n):  # how often each
        least, most = binom.ppf([tail, 1 - tail], draws, q)
        assert least <= int(drawn[:, i].sum()) <= most
    for other in (drawn.roll(1, 1), drawn.roll(7, 1), drawn.roll(1, 0)):  # with whom, and again
        both = int((drawn & other).sum())
        assert abs(both - draws * n * q * q) <= 8 * math.sqrt(draws * n) * q
    sizes = drawn.sum(dim=1).double()
    usual = n * q * (1 - q)
    spread = float((sizes - n * q).square().mean()) / usual
    kurtosis = (1 - 6 * q * (1 - q)) / usual
    assert abs(spread - 1) <= 8 * math.sqrt((2 + kurtosis) / draws), f"sizes vary by {spread}"


def examples(**changes: Any) -> ExampleLevel:
    """As a client makes it."""
    given = {"examples": 50, "batch": 10, "clip": C, "noise_multiplier": 1.3, "delta": 1e-3}
    return ExampleLevel(**{**given, "steps": 4, **changes})


def batches_are_poisson() -> None:
    own = examples()
    assert own.release.sampling_probability == own.sampling_probability == 0.2
    samples_are_poisson(own.draw, own.examples, 0.2, draws=3000)


def cohorts_are_poisson() -> None:
    own = level(cohort=10, population=50, delta=1e-3, dp_sampling="poisson")
    names = [f"c{i}" for i in range(50)]
    samples_are_poisson(
        lambda: [int(name[1:]) for name in own.draw(names)], 50, own.sampling_probability, 3000
    )


def gradients_have_their_noise() -> None:
    """C (sum + N(0, z²)) / expected batch, at all tensors of a step, of sums in units of C."""
    own = examples()
    sums: Params = {
        "w": torch.ones(300, 400),
        "b": torch.full((200_000,), -2.0, dtype=torch.float64),
    }
    found = own.noised(sums)
    assert {t.dtype for t in found.values()} == {torch.float32}
    for name, total in sums.items():
        noise = found[name].double() * own.batch / own.clip - total.double()
        is_normal(noise.flatten() / own.noise_multiplier)


def noise_is_of_the_operating_system() -> None:
    """No seed repeats it, whoever sets it."""
    seen = set()
    for _ in range(2):
        torch.manual_seed(0)
        like: Payload = {"adapter": {"w": torch.zeros(1, dtype=torch.float64)}}
        seen.add(float(release(level(), [], like)[0]["adapter"]["w"]))
        seen.add(float(examples().noised({"w": torch.zeros(1, dtype=torch.float64)})["w"]))
        seen.add(float(randomness.os_uniform(1)))
    assert len(seen) == 6
