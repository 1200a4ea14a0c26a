import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from corolla.config import schedule
from corolla.config.run import RunConfig

Settings = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("sequences", "batch_size", "epochs", "steps"),
    [(10, 3, 1, 4), (9, 3, 1, 3), (9, 3, 4, 12), (1, 8, 2, 2), (16, 8, 1, 2), (17, 8, 1, 3)],
)
def test_epochs_count_every_started_batch(
    settings: Settings, sequences: int, batch_size: int, epochs: int, steps: int
) -> None:
    config = settings(batch_size=batch_size, local_epochs=epochs, local_steps=99)
    assert schedule.steps_per_round(config, sequences) == steps
    order = [i for batch in schedule.batches(config, sequences, 1) for i in batch]
    assert Counter(order) == dict.fromkeys(range(sequences), epochs)


@pytest.mark.parametrize("steps", [1, 4, 7, 23])
def test_steps_are_as_many_as_asked(settings: Settings, steps: int) -> None:
    config = settings(batch_size=3, local_steps=steps)
    assert schedule.steps_per_round(config, 10) == steps
    found = list(schedule.batches(config, 10, 1))
    assert len(found) == steps
    assert [len(batch) for batch in found] == [3 if (t + 1) % 4 else 1 for t in range(steps)]
    for start in range(0, steps - 3, 4):
        epoch = [i for batch in found[start : start + 4] for i in batch]
        assert sorted(epoch) == list(range(10))


def test_every_epoch_has_an_order_of_its_own(settings: Settings) -> None:
    config = settings(batch_size=10, local_epochs=5)
    orders = [tuple(batch) for batch in schedule.batches(config, 10, 1)]
    assert len(set(orders)) == 5
    assert orders == [tuple(batch) for batch in schedule.batches(config, 10, 1)]
    assert orders != [tuple(batch) for batch in schedule.batches(config, 10, 2)]


def test_the_order_does_not_come_from_the_global_state(settings: Settings) -> None:
    config = settings(batch_size=10, local_epochs=3)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        drawn = []
        for batch in schedule.batches(config, 10, 5):
            torch.rand(3, generator=torch.Generator().manual_seed(0))
            drawn.append(batch)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(drawn)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("kind", "warmup", "wanted"),
    [
        ("constant", 0.0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", 1.0, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("constant", 0.3, [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("linear", 1.0, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [(1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]),
        (
            "cosine",
            1.0,
            [0.25, 0.5, 0.75, 1, *((1 + math.cos(math.pi * t / 4)) / 2 for t in range(4))],
        ),
    ],
)
def test_rates_of_two_rounds_of_four_steps(
    settings: Settings, kind: str, warmup: float, wanted: list[float]
) -> None:
    config = settings(rounds=2, schedule=kind, warmup_rounds=warmup, lr=123.0)
    found = [schedule.rate(config, r, 4, step) for r in (1, 2) for step in range(4)]
    assert found == pytest.approx(wanted, abs=1e-12)
    first = [schedule.rate(config, r, 4) for r in (1, 2)]
    assert first == [found[0], found[4]]


def test_no_rate_is_zero(settings: Settings) -> None:
    """A step that moves nothing would be a waste of its forward passes."""
    for kind in ("constant", "linear", "cosine"):
        for warmup in (0.0, 0.5, 3.0):
            config = settings(rounds=3, schedule=kind, warmup_rounds=warmup)
            found = [schedule.rate(config, r, 5, step) for r in (1, 2, 3) for step in range(5)]
            assert all(0 < factor <= 1 for factor in found)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 1.5])
@pytest.mark.parametrize(("steps", "middle"), [(1, 0), (4, 2), (7, 3)])
def test_the_step_of_a_round_is_that_of_its_middle(
    settings: Settings, kind: str, warmup: float, steps: int, middle: int
) -> None:
    config = settings(
        rounds=3, schedule=kind, warmup_rounds=warmup, lr=3e-4, queries=3, local_steps=steps
    )
    for round in (1, 2, 3):
        found = schedule.step_size(config, round, 10)
        exact = -3e-4 * schedule.rate(config, round, steps, middle) / 3
        assert found == pytest.approx(exact, rel=2.0**-24)
        assert found == float(torch.tensor(found, dtype=torch.float32))  # as it travels


def test_the_step_depends_on_how_many_steps_there_are(settings: Settings) -> None:
    """With a schedule, epochs of more batches have another middle."""
    config = settings(rounds=1, schedule="linear", lr=1.0, local_epochs=1, batch_size=1)
    assert [schedule.step_size(config, 1, n) for n in (1, 2, 4, 5)] == pytest.approx(
        [-1, -1 / 2, -1 / 2, -3 / 5]
    )
