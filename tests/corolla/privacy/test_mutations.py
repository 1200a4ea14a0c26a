"""Each of these breaks differential privacy in a way that has been seen: a check must notice."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from corolla.privacy import banded, randomness
from corolla.privacy.client_level import ClientLevel
from corolla.privacy.clipped_sum import ClippedSum
from corolla.privacy.example_level import ExampleLevel
from corolla.types import Payload
from tests.corolla.privacy import privacy_checks as checks

Break = Callable[[pytest.MonkeyPatch], None]


def no_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(banded, "correlate", lambda z, *rest: {n: 0 * t for n, t in z.items()})


def halved_noise(patch: pytest.MonkeyPatch) -> None:
    real = ClientLevel._split
    patch.setattr(ClientLevel, "_split", lambda own: (real(own)[0] / 2, real(own)[1]))


def slightly_less_noise(patch: pytest.MonkeyPatch) -> None:
    real = ClientLevel._split
    patch.setattr(ClientLevel, "_split", lambda own: (real(own)[0] * 0.98, real(own)[1]))


def the_same_noise_in_each_tensor(patch: pytest.MonkeyPatch) -> None:
    def correlate(fresh: banded.Noise, past: object, bands: int) -> banded.Noise:
        longest = max(fresh.values(), key=Tensor.numel).flatten()
        return {n: longest[:1].expand(t.shape) for n, t in fresh.items()}

    patch.setattr(banded, "correlate", correlate)


def noise_on_one_group_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        *(banded, "correlate"),
        lambda z, *rest: {n: t if n.startswith("adapter") else 0 * t for n, t in z.items()},
    )


def noise_for_those_who_answered(patch: pytest.MonkeyPatch) -> None:
    """The noise of a mean, divided by the planned cohort, and scaled to the replies."""
    real = ClientLevel.release

    def release(own: ClientLevel, summed: ClippedSum, *rest: Any, **named: Any) -> Any:
        planned, own.cohort = own.cohort, max(1, summed.clients)
        try:
            return real(own, summed, *rest, **named)
        finally:
            own.cohort = planned

    patch.setattr(ClientLevel, "release", release)


def no_clip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(randomness, "clip_factors", lambda norms, clip: torch.ones_like(norms))


def clip_that_lets_nan_pass(patch: pytest.MonkeyPatch) -> None:
    """As min(1, C / norm) does where a norm is NaN."""
    patch.setattr(
        *(randomness, "clip_factors"),
        lambda norms, clip: torch.ones_like(norms) if norms.isnan() else clip / norms.clamp(clip),
    )


def clip_of_each_tensor(patch: pytest.MonkeyPatch) -> None:
    def longest(payload: Payload) -> Tensor:
        return torch.stack(
            [t.double().norm() for own in payload.values() for t in own.values()]
        ).max()

    patch.setattr(randomness, "joint_norm", longest)


def clip_that_skips_single_values(patch: pytest.MonkeyPatch) -> None:
    real = randomness.joint_norm
    patch.setattr(
        *(randomness, "joint_norm"),
        lambda payload: real(
            {g: {n: t for n, t in own.items() if t.dim()} for g, own in payload.items()}
        ),
    )


def weighted_mean(patch: pytest.MonkeyPatch) -> None:
    """Weights by examples after the clip, normalised as means are."""
    real = ClippedSum.add

    def add(own: ClippedSum, payload: Payload, weight: float) -> None:
        before = {g: {n: t.clone() for n, t in p.items()} for g, p in own.total.items()}
        real(own, payload, weight)
        for group, params in own.total.items():
            for name, total in params.items():
                added = total - before[group][name]
                total.copy_(before[group][name] + min(weight, 100.0) * added)

    patch.setattr(ClippedSum, "add", add)


def divided_by_replies(patch: pytest.MonkeyPatch) -> None:
    noise_for_those_who_answered(patch)


def noted_afterwards(patch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = ClientLevel.release

    def release(own: ClientLevel, *args: Any, **named: Any) -> Any:
        *given, note = args
        events: list[Mapping[str, Any]] = []
        found = real(own, *given, events.append, **named)
        note(events[0])
        return found

    patch.setattr(ClientLevel, "release", release)


def clip_that_follows_the_wrong_way(patch: pytest.MonkeyPatch) -> None:
    """Counting those that were clipped, as if these were those that were not."""
    real = ClippedSum.add

    def add(own: ClippedSum, payload: Payload, weight: float) -> None:
        before = own.within
        real(own, payload, weight)
        own.within = before + (own.within == before)

    patch.setattr(ClippedSum, "add", add)


def batches_of_one_size(patch: pytest.MonkeyPatch) -> None:
    """A shuffled batch, accounted for as a Poisson sample."""
    patch.setattr(
        ExampleLevel, "draw", lambda own: torch.randperm(own.examples)[: own.batch].tolist()
    )


def batches_of_an_epoch(patch: pytest.MonkeyPatch) -> None:
    """Each example once, in a new order, before any comes again."""
    left: list[int] = []

    def draw(own: ExampleLevel) -> list[int]:
        left[:] = left or torch.randperm(own.examples).tolist()
        found, left[:] = left[: own.batch], left[own.batch :]
        return found

    patch.setattr(ExampleLevel, "draw", draw)


def batches_twice_as_likely(patch: pytest.MonkeyPatch) -> None:
    real = ExampleLevel.draw
    patch.setattr(ExampleLevel, "draw", lambda own: sorted({*real(own), *real(own)}))


def cohorts_of_one_size(patch: pytest.MonkeyPatch) -> None:
    def draw(own: ClientLevel, clients: Sequence[str]) -> list[str]:
        return [clients[i] for i in torch.randperm(len(clients))[: own.cohort].tolist()]

    patch.setattr(ClientLevel, "draw", draw)


def gradients_without_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        *(ExampleLevel, "noised"),
        lambda own, sums: {n: (own.clip * t / own.batch).float() for n, t in sums.items()},
    )


def gradients_with_half_the_noise(patch: pytest.MonkeyPatch) -> None:
    real = ExampleLevel.noised

    def noised(own: ExampleLevel, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        noisy = real(own, sums).items()
        return {n: ((t + own.clip * sums[n] / own.batch) / 2).float() for n, t in noisy}

    patch.setattr(ExampleLevel, "noised", noised)


def noise_of_a_seed(patch: pytest.MonkeyPatch) -> None:
    """What follows torch.manual_seed can be computed, and taken off."""

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), dtype=torch.float64)

    defaults = cast(tuple[Any, ...], ClientLevel.__init__.__defaults__)
    patch.setattr(
        *(ClientLevel.__init__, "__defaults__"),
        tuple(normal if d is randomness.os_normal else d for d in defaults),
    )


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (no_noise, checks.noise_has_its_std),
        (halved_noise, checks.noise_has_its_std),
        (slightly_less_noise, checks.noise_has_its_std),
        (the_same_noise_in_each_tensor, checks.noise_has_its_std),
        (noise_on_one_group_alone, checks.noise_has_its_std),
        (noise_for_those_who_answered, checks.noise_has_its_std),
        (no_clip, checks.sensitivity_is_at_most_the_clip),
        (clip_that_lets_nan_pass, checks.sensitivity_is_at_most_the_clip),
        (clip_of_each_tensor, checks.sensitivity_is_at_most_the_clip),
        (clip_that_skips_single_values, checks.sensitivity_is_at_most_the_clip),
        (weighted_mean, checks.sensitivity_is_at_most_the_clip),
        (divided_by_replies, checks.denominator_is_the_planned_cohort),
        (noted_afterwards, checks.nothing_is_drawn_before_it_is_noted),
        (clip_that_follows_the_wrong_way, checks.clip_follows_the_norms),
        (batches_of_one_size, checks.batches_are_poisson),
        (batches_of_an_epoch, checks.batches_are_poisson),
        (batches_twice_as_likely, checks.batches_are_poisson),
        (cohorts_of_one_size, checks.cohorts_are_poisson),
        (gradients_without_noise, checks.gradients_have_their_noise),
        (gradients_with_half_the_noise, checks.gradients_have_their_noise),
        (noise_of_a_seed, checks.noise_is_of_the_operating_system),
    ],
    ids=lambda value: value.__name__,
)
def test_a_check_notices(
    broken: Break, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes on the code as it is, and fails on the broken one."""
    check()
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_what_is_broken_is_repaired_afterwards() -> None:
    """The patches above are gone: nothing else runs on broken code."""
    assert math.isclose(float(randomness.clip_factors(torch.tensor(4.0), 1.0)), 0.25)
    checks.noise_has_its_std()
