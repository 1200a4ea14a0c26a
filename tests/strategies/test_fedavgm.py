from pathlib import Path

import pytest
import torch

from corolla.strategies.fedavg import FedAvg
from corolla.strategies.fedavgm import FedAvgM
from corolla.types import Cost, Params, Payload, Size
from tests.strategies import tiny


def one(value: float) -> Params:
    return {"x": torch.tensor([value])}


def path(strategy: FedAvgM, deltas: list[float], start: float = 1.0) -> list[Payload]:
    """States after rounds whose clients move by these on average."""
    state, states = strategy.init(one(start), 0), []
    for delta in deltas:
        now = float(state["adapter"]["x"])
        clients = [tiny.Scripted(one(now + 2 * delta), 1), tiny.Scripted(one(now), 1)]
        state = tiny.play(strategy, state, clients)
        states.append(state)
    return states


def test_three_rounds_by_hand() -> None:
    """Beta = 0.5, lr = 0.25: v = 4, 2 + 2 = 4, 2 - 6 = -4; w = 1 + 1 + 1 - 1."""
    states = path(FedAvgM(beta=0.5, lr=0.25), [4.0, 2.0, -6.0])
    assert [float(own["momentum"]["x"]) for own in states] == [4.0, 4.0, -4.0]
    assert [float(own["adapter"]["x"]) for own in states] == [2.0, 3.0, 2.0]


def test_momentum_goes_on_when_nobody_moves() -> None:
    states = path(FedAvgM(beta=0.5), [8.0, 0.0, 0.0])
    assert [float(own["adapter"]["x"]) for own in states] == [9.0, 13.0, 15.0]


def test_the_mean_is_weighted_by_examples() -> None:
    strategy = FedAvgM()
    clients = [tiny.Scripted(one(5.0), 1), tiny.Scripted(one(9.0), 3)]
    found = tiny.play(strategy, strategy.init(one(1.0), 0), clients)
    assert float(found["adapter"]["x"]) == 8.0  # 1 + (4 + 3·8) / 4


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_without_momentum_it_is_fedavg_bit_for_bit(model: str, tmp_path: Path) -> None:
    states = []
    for name, options in (("fedavgm", {"beta": 0.0}), ("fedavg", {}), ("fedavgm", {})):
        run = tiny.start(tiny.config(name, options=options), model, tmp_path / f"{name}{options}")
        run.step()
        run.step()
        states.append(run.state["adapter"])
    assert tiny.same(states[0], states[1])
    assert not tiny.same(states[1], states[2])


def test_momentum_stays_on_the_server() -> None:
    state = FedAvgM().init(one(1.0), 0)
    assert FedAvgM().broadcast(state).payload.keys() == {"adapter"}
    sizes = [Size(A=3, B=5, head=2)]
    assert FedAvgM().cost(sizes) == FedAvg().cost(sizes) == [Cost(up=40, down=40)]


@pytest.mark.parametrize("options", [{"beta": 1.0}, {"beta": -0.1}, {"lr": 0.0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs 0 <= beta < 1 and lr > 0"):
        FedAvgM(**options)
