from pathlib import Path
from typing import Any

import pytest

from corolla.config.run import RunConfig
from corolla.config.sections.groups import ClientClass
from corolla.config.sections.kinds import KINDS
from tests.corolla.config.configs import BOTH, load

LORA, FULL = KINDS["lora"].zeroth_order, KINDS["full"].zeroth_order


@pytest.mark.parametrize(
    ("changes", "lr"),
    [
        ({}, 3e-3),
        ({"model": "some/model"}, 3e-4),
        ({"strategy": "ferret"}, 3e-3),
        ({"strategy": "mixed", "classes": BOTH}, 3e-3),
        ({"strategy": "seed_pool"}, LORA.embedded),
        ({"strategy": "seed-pool"}, LORA.embedded),
        ({"strategy": "fedmezo", "model": "some/model"}, LORA.other),
        ({"strategy": "fedkseed", "parameters": "full"}, FULL.embedded),
        (
            {"strategy": "fedkseed", "parameters": "full", "model": "some/model"},
            FULL.other,
        ),
        ({"strategy": "seed_pool", "lr": 0.5}, 0.5),
        ({"lr": 0.5}, 0.5),
    ],
)
def test_the_default_learning_rate_fits_trainer_and_model(
    tmp_path: Path, changes: dict[str, Any], lr: float
) -> None:
    assert load(tmp_path, None, **changes).lr == lr


def test_zeroth_order_clients_of_a_first_order_strategy_have_a_rate_of_their_own() -> None:
    """The run's rate is that of backpropagation."""
    classes = {
        "a": ClientClass(),
        "b": ClientClass(trainer="zeroth_order"),
        "c": ClientClass(trainer="zeroth_order", lr=0.25),
    }
    run = RunConfig(strategy="mixed", classes=classes, lr=0.5)
    found = [run.of_class(name).lr for name in "abc"]
    assert found == [0.5, LORA.embedded, 0.25]
    hub = RunConfig(strategy="mixed", classes=classes, model="some/model")
    assert hub.of_class("b").lr == LORA.other


@pytest.mark.parametrize("embedded", [True, False])
def test_full_training_is_far_more_careful_than_that_of_adapters(embedded: bool) -> None:
    """A step is as noisy as there are parameters."""
    assert 10 * FULL.of(embedded) <= LORA.of(embedded)


def test_a_zeroth_order_run_takes_more_steps_unless_told() -> None:
    """A step says little and its scalar is all that is sent: many of them make a round."""
    assert RunConfig().local_steps == RunConfig(strategy="mixed").local_steps == 10
    assert RunConfig(strategy="seed_pool").local_steps == 50
    assert RunConfig(strategy="seed_pool", local_steps=3).local_steps == 3
