from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.commands.simulate import in_process
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.errors import ConfigError
from corolla.interfaces import Strategy
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.scaffold import Scaffold
from corolla.tensors import tree
from corolla.types import Correct, Cost, Fit, Params, Payload, Size
from tests.strategies import tiny


def one(value: float) -> Params:
    return {"x": torch.tensor([value], dtype=torch.float64)}


def value(params: Params) -> float:
    return float(params["x"])


def test_the_control_variate_by_hand() -> None:
    """x = 10, y = 6, Σ lr = 0.5, c = 3, c_m = 1: c_m' = 1 - 3 + 4 / 0.5 = 6, sent (6 - 1) / 4."""
    client = tiny.Scripted(one(6.0), 5, population=4, kept={"control": one(1.0)}, distance=0.5)
    update = Scaffold().local(client, {"adapter": one(10.0), "control": one(3.0)})
    assert value(update.payload["adapter"]) == -4.0
    assert value(update.payload["control"]) == 1.25
    assert value(update.keep["control"]) == 6.0
    found = client.asked[0]["correct"](one(7.0), one(0.0))
    assert value(found) == 9.0  # g - c_m + c


def test_a_newcomer_has_a_control_variate_of_zero() -> None:
    client = tiny.Scripted(one(6.0), 5, population=4, distance=0.5)
    update = Scaffold().local(client, {"adapter": one(10.0), "control": one(3.0)})
    assert value(update.keep["control"]) == 5.0  # 0 - 3 + 8
    assert value(update.payload["control"]) == 1.25


def test_the_server_averages_models_and_adds_up_controls() -> None:
    """Moves by examples, (1·4 + 3·8) / 4; controls are shares of 1 / N already."""
    strategy, aggregator = Scaffold(), Scaffold().aggregator()
    for move, change, n in ((4.0, 0.5, 1), (8.0, 2.0, 3)):
        aggregator.add({"adapter": one(move), "control": one(change)}, n)
    state, _ = strategy.apply({"adapter": one(1.0), "control": one(10.0)}, aggregator.finalise())
    assert (value(state["adapter"]), value(state["control"])) == (8.0, 12.5)


@dataclass(frozen=True)
class Quadratic(tiny.Scripted):
    """A client whose loss is curvature / 2 · (x - target)², trained by SGD."""

    curvature: float = 1.0
    target: float = 0.0
    steps: int = 1
    lr: float = 0.1

    @property
    def trainer(self) -> "Quadratic":  # type: ignore[override]
        return self

    def fit(  # type: ignore[override]
        self, start: Params, *, correct: Correct | None = None
    ) -> Fit:
        x = dict(start)
        for _ in range(self.steps):
            gradient: Params = {"x": self.gradient(x["x"])}
            gradient = correct(gradient, x) if correct else gradient
            x = {"x": x["x"] - self.lr * gradient["x"]}
        return Fit(x, self.num_examples, {}, self.steps * self.lr)

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        return self.curvature * (x - self.target)


def federation(**changes: float) -> list[Quadratic]:
    """Unlike clients: the optimum of the mean loss is (1·0 + 4·6 + 2·9) / 7 = 6."""
    made = [
        Quadratic({}, 5, population=3, curvature=k, target=t) for k, t in ((1, 0), (4, 6), (2, 9))
    ]
    return [replace(own, **changes) for own in made]  # type: ignore[arg-type]


def play(
    strategy: Strategy, clients: Sequence[Quadratic], rounds: int, start: float = 1.0
) -> tuple[list[Payload], list[Quadratic]]:
    """States after each round, and the clients with what they keep."""
    state, states, members = strategy.init(one(start), 0), [], list(clients)
    for _ in range(rounds):
        updates = tiny.scripted(strategy, state, members)
        aggregator = strategy.aggregator()
        for update in updates:
            aggregator.add(update.payload, update.num_examples)
        state, _ = strategy.apply(state, aggregator.finalise())
        members = [replace(own, kept=u.keep) for own, u in zip(members, updates, strict=True)]
        states.append(state)
    return states, members


def test_one_step_of_all_clients_is_centralised_sgd() -> None:
    clients, x = federation(), torch.tensor([1.0], dtype=torch.float64)
    states, _ = play(Scaffold(), clients, 5)
    for state in states:
        x = x - 0.1 * torch.stack([own.gradient(x) for own in clients]).mean(0)
        assert value(state["adapter"]) == pytest.approx(float(x), rel=1e-12)


def test_with_one_step_a_control_is_the_clients_own_gradient() -> None:
    states, members = play(Scaffold(), federation(), 3)
    before = states[1]["adapter"]["x"]
    for own in members:
        assert value(own.kept["control"]) == pytest.approx(float(own.gradient(before)), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 5])
def test_controls_of_all_clients_add_up_to_n_times_the_servers(steps: int) -> None:
    for rounds in range(1, 6):
        states, members = play(Scaffold(), federation(steps=steps), rounds)
        total = sum(value(own.kept["control"]) for own in members)
        assert total == pytest.approx(3 * value(states[-1]["control"]), rel=1e-9)


def test_finds_the_optimum_where_fedavg_drifts() -> None:
    """Ten steps of clients with unlike curvatures: FedAvg ends elsewhere."""
    clients = federation(steps=10)
    assert value(play(Scaffold(), clients, 200)[0][-1]["adapter"]) == pytest.approx(6.0, abs=1e-9)
    assert abs(value(play(FedAvg(), clients, 200)[0][-1]["adapter"]) - 6.0) > 0.3


# Real rounds


def test_the_first_round_is_fedavg_with_sgd_bit_for_bit(tmp_path: Path) -> None:
    settings = {"lr": 0.3, "optimizer": "sgd"}
    runs = [
        tiny.start(tiny.config(name, **settings), "bert", tmp_path / name)
        for name in ("scaffold", "fedavg")
    ]
    for run in runs:
        run.step()
    assert tiny.same(runs[0].state["adapter"], runs[1].state["adapter"])
    for run in runs:
        run.step()
    assert not tiny.same(runs[0].state["adapter"], runs[1].state["adapter"])


def test_controls_on_the_devices_add_up_to_the_servers(tmp_path: Path) -> None:
    """Two of four clients a round: Σ c_m = N c over those that ever took part."""
    run = tiny.start(tiny.config("scaffold", cohort=2), "llama", tmp_path)
    accepted: dict[str, int] = {}
    for round in range(1, 6):
        run.step()
        accepted |= dict.fromkeys(run.network.sent, round)
        memory = run.network.worker.memory
        own = [memory.kept(client, last)["control"] for client, last in accepted.items()]
        for name, control in run.state["control"].items():
            total = torch.stack([mine[name].double() for mine in own]).sum(0)
            assert torch.allclose(total, 4 * control.double(), rtol=1e-4, atol=1e-6)
    assert len(accepted) == 4
    assert tree.norm(run.state["control"]) > 1e-3


class StopError(Exception):
    """As if the process had been killed."""


@dataclass
class Killed:
    """An observer that dies in a round, after the first update has arrived."""

    in_round: int
    round: int = 0

    def started(self, facts: Mapping[str, Any], first_round: int) -> None:
        pass

    def warned(self, text: str) -> None:
        pass

    def round_started(self, round: int, cohort: int) -> None:
        self.round = round

    def replied(self, client: str) -> None:
        if self.round == self.in_round:
            raise StopError

    def round_ended(self, line: Mapping[str, Any]) -> None:
        pass


def test_controls_survive_a_killed_run(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Devices have staged what the server never accepted: it must not count."""
    config = settings(strategy="scaffold", optimizer="sgd", lr=0.3, rounds=4, cohort=3)
    wanted = in_process.simulate(config, tmp_path / "straight")
    with pytest.raises(StopError):
        in_process.simulate(config, tmp_path / "killed", Killed(in_round=3))
    found = in_process.simulate(config, tmp_path / "killed", resume=True)
    assert found.adapter_hash == wanted.adapter_hash


def test_costs_twice_the_adapter_both_ways() -> None:
    assert Scaffold().cost([Size(A=3, B=5, head=2)]) == [Cost(up=80, down=80)]


def test_adamw_is_refused() -> None:
    with pytest.raises(ConfigError, match="scaffold is derived for sgd, found optimizer adamw"):
        build_strategy(RunConfig(strategy="scaffold"))
