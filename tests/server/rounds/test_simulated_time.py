from collections.abc import Mapping
from typing import Any

import pytest
import torch

from corolla.config.run import RunConfig
from corolla.server.rounds import simulated_time


def made(classes: Mapping[str, Mapping[str, Any]], **changes: Any) -> RunConfig:
    return RunConfig.model_validate({"classes": classes, **changes})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, 12.0),
        ({"speed": 4.0}, 3.0),
        ({"speed": 0.5}, 24.0),
        ({"upload": 10.0}, 12 + 300 / 10),
        ({"download": 40.0}, 12 + 100 / 40),
        ({"speed": 2.0, "upload": 100.0, "download": 50.0}, 12 / 2 + 100 / 50 + 300 / 100),
    ],
)
def test_a_task_takes_its_steps_and_its_bytes(given: Mapping[str, float], wanted: float) -> None:
    config = made({"own": given, "other": {"speed": 9.0}}, step_seconds=3.0)
    assert simulated_time.seconds(config, "own", steps=4, down=100, up=300) == pytest.approx(wanted)


def test_a_step_takes_a_second_unless_it_is_said() -> None:
    assert simulated_time.seconds(made({"own": {"speed": 2.0}}), "own", 10, 0, 0) == 5.0
    assert simulated_time.seconds(made({}, buffer=1, cohort=1), "", 10, 0, 0) == 10.0


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, False),
        ({"classes": {"a": {"drop": 0.5}}}, False),
        ({"classes": {"a": {}, "b": {"speed": 2.0}}}, True),
        ({"classes": {"a": {"upload": 1e3}}}, True),
        ({"classes": {"a": {"download": 1e3}}}, True),
        ({"step_seconds": 0.5}, True),
        ({"deadline_simulated": 5.0}, True),
        ({"buffer": 2, "cohort": 2}, True),
    ],
)
def test_time_is_simulated_where_something_says_how_long_it_takes(
    settings: Mapping[str, Any], wanted: bool
) -> None:
    assert RunConfig.model_validate(settings).simulates_time is wanted


def test_a_round_lasts_until_its_slowest_reply_or_its_deadline() -> None:
    plain, limited = made({}, step_seconds=1.0), made({}, deadline_simulated=10.0)
    assert simulated_time.round_seconds(plain, [3.0, 7.0, 5.0], missing=True) == 7.0
    assert simulated_time.round_seconds(limited, [3.0, 7.0], missing=False) == 7.0
    assert simulated_time.round_seconds(plain, [], missing=False) == 0.0
    assert simulated_time.round_seconds(limited, [3.0, 7.0], missing=True) == 10.0


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 1.0])
def test_clients_are_silent_as_often_as_their_class_says(drop: float) -> None:
    """Binomial: 4 standard deviations over 20 clients and 200 rounds; none at 0 and at 1."""
    config = made({"own": {"drop": drop}})
    names = [f"c{i}" for i in range(20)]
    found = [simulated_time.silent(config, "own", n, r) for n in names for r in range(200)]
    spread = 4 * (4000 * drop * (1 - drop)) ** 0.5
    assert abs(sum(found) - 4000 * drop) <= spread


def test_silence_is_a_function_of_seed_client_and_round() -> None:
    config = made({"own": {"drop": 0.5}})
    before = torch.get_rng_state()

    def history(client: str, seed: int) -> list[bool]:
        seeded = config.model_copy(update={"seed": seed})
        return [simulated_time.silent(seeded, "own", client, round) for round in range(64)]

    assert history("a", 0) == history("a", 0)
    assert len({tuple(history(c, s)) for c in "ab" for s in (0, 1)}) == 4
    assert not any(simulated_time.silent(config, "", "a", round) for round in range(64))
    assert torch.equal(torch.get_rng_state(), before)
