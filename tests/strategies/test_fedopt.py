import math

import pytest
import torch

from corolla.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from corolla.types import Params, Payload
from tests.strategies import tiny

ALL = [FedAdam, FedYogi, FedAdagrad]
OPTIONS = {"lr": 1.0, "beta1": 0.5, "beta2": 0.75, "tau": 2.0}


def params(*values: float) -> Params:
    return {"x": torch.tensor(values, dtype=torch.float64)}


def path(strategy: FedAdam, deltas: list[Params]) -> list[Payload]:
    """States after rounds in which the clients moved by these."""
    state, states = strategy.init(params(*[0.0] * len(deltas[0]["x"])), 0), []
    for delta in deltas:
        aggregator = strategy.aggregator()
        aggregator.add({"adapter": {"x": delta["x"] * 4}}, 1)
        aggregator.add({"adapter": {"x": delta["x"] * 0}}, 3)
        state, _ = strategy.apply(state, aggregator.finalise())
        states.append(state)
    return states


@pytest.mark.parametrize(
    ("kind", "variances"),
    [
        (FedAdam, [7.0, 6.25]),  # 0.75·4 + 0.25·16, 0.75·7 + 0.25·4
        (FedYogi, [8.0, 7.0]),  # 4 + 0.25·16 as 4 < 16, 8 - 0.25·4 as 8 > 4
        (FedAdagrad, [20.0, 24.0]),  # 4 + 16, 20 + 4
    ],
)
def test_two_rounds_of_algorithm_2_by_hand(kind: type[FedAdam], variances: list[float]) -> None:
    """Δ = 4, then 2; v starts at tau² = 4; m = 0.5·4 = 2, then 0.5·2 + 0.5·2 = 2."""
    options = {k: v for k, v in OPTIONS.items() if (kind, k) != (FedAdagrad, "beta2")}
    states = path(kind(**options), [params(4.0), params(2.0)])
    assert [float(own["variance"]["x"]) for own in states] == variances
    assert [float(own["momentum"]["x"]) for own in states] == [2.0, 2.0]
    one = 2 / (math.sqrt(variances[0]) + 2)
    two = one + 2 / (math.sqrt(variances[1]) + 2)
    assert [float(own["adapter"]["x"]) for own in states] == pytest.approx([one, two], rel=1e-12)


def test_yogi_is_unmoved_where_the_square_is_the_variance() -> None:
    (state,) = path(FedYogi(**OPTIONS), [params(2.0)])
    assert float(state["variance"]["x"]) == 4.0


@pytest.mark.parametrize("kind", ALL)
def test_the_first_step_in_closed_form_with_the_papers_defaults(kind: type[FedAdam]) -> None:
    """Each value by itself; no step is larger than lr |m| / tau."""
    deltas = params(1e-6, -2e-3, 0.1, -30.0, 0.0)
    strategy = kind()
    (state,) = path(strategy, [deltas])
    tau, b1, b2 = 1e-3, strategy.beta1, strategy.beta2
    for delta, found in zip(deltas["x"].tolist(), state["adapter"]["x"].tolist(), strict=True):
        square = delta * delta
        v = {
            FedAdam: b2 * tau**2 + (1 - b2) * square,
            FedYogi: tau**2 + math.copysign(1 - b2, square - tau**2) * square,
            FedAdagrad: tau**2 + square,
        }[kind]
        wanted = strategy.lr * (1 - b1) * delta / (math.sqrt(v) + tau)
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-15)
        assert abs(found) <= strategy.lr * (1 - b1) * abs(delta) / tau


def test_defaults_are_the_papers() -> None:
    """Section 5: β₁ = 0.9 and β₂ = 0.99, no momentum in FedAdagrad, tau = 1e-3."""
    for kind, beta1 in ((FedAdam, 0.9), (FedYogi, 0.9), (FedAdagrad, 0.0)):
        made = kind()
        assert (made.beta1, made.beta2, made.tau) == (beta1, 0.99, 1e-3)


@pytest.mark.parametrize("kind", ALL)
def test_what_the_optimiser_knows_stays_on_the_server(kind: type[FedAdam]) -> None:
    state = kind().init(tiny.pair(2, 0), 0)
    assert state.keys() == {"adapter", "momentum", "variance"}
    assert kind().broadcast(state).payload.keys() == {"adapter"}
    assert all(torch.equal(t, torch.full_like(t, 1e-6)) for t in state["variance"].values())
    assert kind.name == kind.__name__.lower()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta1": 1.0}, "beta1 and beta2 must be from 0 to below 1, found 1.0 and 0.99"),
        ({"beta2": -0.1}, "beta1 and beta2 must be"),
        ({"lr": 0.0}, "lr and tau must be above 0, found 0.0 and 0.001"),
        ({"tau": 0.0}, "lr and tau must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedYogi(**options)


def test_adagrad_has_no_beta2() -> None:
    with pytest.raises(ValueError, match="beta2 is not part of FedAdagrad"):
        FedAdagrad(beta2=0.5)
