"""Rounds with differential privacy of clients, on updates that are known: nobody trains here.

The oracle is numpy in fp64: each update clipped by hand, their sum, noise that the test has drawn.
Numbers are those of the fault matrix (docs/deploy.md).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.errors import RoundError
from corolla.privacy.accounting import gaussian_epsilon
from corolla.privacy.client_level import ClientLevel
from corolla.server.rounds.call import Plan, RoundCall, RoundEvents
from corolla.server.rounds.federation import Federation, merges
from corolla.server.rounds.round import RoundResult, run_round
from corolla.server.rounds.spending import Spending
from corolla.server.rounds.verdicts import Code
from corolla.tensors import tree
from corolla.types import Payload
from corolla.wire import codec
from corolla.wire.messages import pack_reply, unpack_reply
from corolla.wire.packet import Packet
from tests.server.rounds.lying import EXAMPLES, FRESH, Array, Fault, Lying, tensor

CLIP, Z = 0.05, 2.0


@dataclass
class Private:
    """A run with dp=client, round after round, whose noise the test decides."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    noise: float = 0.0
    """Every value of it."""
    drawn: Sequence[float] = ()
    """Uniform numbers, one a client: who is drawn by chance."""
    last: bool = False
    """Whether no other attempt follows."""
    events: list[Mapping[str, Any]] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = {"cohort": 4, "noise_multiplier": Z, "clip": CLIP, **self.settings}
        config = RunConfig(rank=2, local_steps=1, batch_size=8, dp="client", **given)
        made = build_strategy(config)
        self.federation = Federation("ab" * 16, config, made, EXAMPLES, lambda spec: FRESH)
        self.state = made.init(FRESH, 0)
        self.memory: Payload = {}
        self.round = 1
        level = ClientLevel(
            config, 4, config.cohort or 4, normal=self.normal, uniform=lambda n: self.uniform(n)
        )
        self.spending = Spending(config, level)

    def normal(self, shape: Sequence[int]) -> Tensor:
        assert len(self.events) == self.round, "noise is drawn after its event is on disk"
        return torch.full(tuple(shape), self.noise, dtype=torch.float64)

    def uniform(self, n: int) -> Tensor:
        assert n == len(self.drawn)
        return torch.tensor(self.drawn, dtype=torch.float64)

    def step(self, **faults: Fault) -> RoundResult:
        found = run_round(
            RoundCall(
                self.federation, self.state, {}, self.round, memory=self.memory, last=self.last
            ),
            Lying("fedavg", faults),
            spending=self.spending,
            events=RoundEvents(on_plan=self.plans.append, note=self.events.append),
        )
        self.state, self.memory = found.state, found.memory
        self.round += 1
        return found

    def moved(self) -> Array:
        """The whole model, which began at 0."""
        return flat(self.state["adapter"])


def flat(params: Mapping[str, Tensor]) -> Array:
    return np.concatenate([params[name].double().numpy().ravel() for name in sorted(FRESH)])


def clipped(client: str, round: int = 1, factor: float = 1.0) -> Array:
    own = factor * flat({name: tensor(client, round, name) for name in FRESH})
    return np.asarray(own * min(1.0, CLIP / float(np.linalg.norm(own))))


def times(factor: float) -> Fault:
    """The update of a client, so many times as large."""

    def fault(packet: Packet) -> Iterator[Packet | None]:
        payload = codec.decode(packet.payload)
        larger = {g: {n: factor * t for n, t in own.items()} for g, own in payload.items()}
        yield pack_reply(replace(unpack_reply(packet, 1 << 30), payload=codec.encode(larger)))

    return fault


def silent(packet: Packet) -> list[Packet | None]:
    return [None]


def test_clipped_updates_are_added_up_with_noise_over_the_planned_number() -> None:
    private = Private(noise=1.0)
    private.step(ada=times(100.0), ben=times(1e-3))
    factors = {"ada": 100.0, "ben": 1e-3}
    wanted = sum(clipped(c, 1, factors.get(c, 1.0)) for c in EXAMPLES) + Z * CLIP
    np.testing.assert_allclose(private.moved(), wanted / 4, rtol=1e-6, atol=1e-9)


def test_26_two_of_ten_replies_keep_their_noise() -> None:
    """As many as answer: the divisor and the noise are those of the plan."""
    private = Private({"quorum": 0.5}, noise=1.0)
    found = private.step(ada=silent, dot=silent)
    wanted = (clipped("ben") + clipped("cyd") + Z * CLIP) / 4
    np.testing.assert_allclose(private.moved(), wanted, rtol=1e-6, atol=1e-9)
    assert private.events[0]["clients"] == ["ben", "cyd"]
    assert found.metrics["noise_std"] == pytest.approx(Z * CLIP / 4)


def test_26_an_update_of_zeros_is_legal() -> None:
    private = Private()
    private.step(**dict.fromkeys(EXAMPLES, times(0.0)))
    assert not private.moved().any()
    assert private.events[0]["clients"] == sorted(EXAMPLES)


def test_06_fewer_than_the_quorum_spend_nothing() -> None:
    private = Private({"quorum": 0.75})
    before = tree.digest_all(private.state)
    with pytest.raises(RoundError, match=r"^round 1: too few clients gave a valid update$"):
        private.step(ada=silent, dot=silent)
    assert private.events == []
    assert tree.digest_all(private.state) == before
    assert private.spending.level is not None and private.spending.level.guarantee().epsilon == 0


def test_09_what_is_not_finite_is_refused_before_it_is_clipped() -> None:
    private = Private()
    found = private.step(cyd=times(math.inf))
    assert found.verdicts["cyd"].code == Code.NOT_FINITE
    assert private.events[0]["clients"] == ["ada", "ben", "dot"]
    wanted = sum(clipped(c) for c in ("ada", "ben", "dot")) / 4
    np.testing.assert_allclose(private.moved(), wanted, rtol=1e-6, atol=1e-9)


def test_a_disk_that_is_full_releases_nothing() -> None:
    private = Private()

    class FullError(Exception):
        pass

    class Full(list[Mapping[str, Any]]):
        def append(self, event: Mapping[str, Any]) -> None:
            raise FullError

    private.events = Full()
    before = tree.digest_all(private.state)
    with pytest.raises(FullError):
        private.step()
    assert tree.digest_all(private.state) == before


def test_what_clients_measure_does_not_leave_the_server() -> None:
    private = Private()
    found = private.step(cyd=silent)
    assert (found.num_examples, found.client_loss) == ({}, {})
    assert set(found.metrics) == {"clip", "noise_std", "epsilon", "noise_norm", "update_norm"}
    assert found.dropped == {"cyd": ""}
    assert found.metrics["epsilon"] == pytest.approx(gaussian_epsilon(1 / Z, 1e-5))
    event = private.events[0]
    assert event["epsilon"] == found.metrics["epsilon"]
    assert (event["unit"], event["noise_multiplier"], event["clip"]) == ("client", Z, CLIP)


def test_who_has_had_its_turns_is_neither_asked_nor_folded_in() -> None:
    private = Private({"cohort": 2, "participations": 1, "rounds": 3})
    for _ in range(2):
        private.step()
    cohorts = [set(plan.cohort) for plan in private.plans]
    assert cohorts[0] | cohorts[1] == set(EXAMPLES)
    why = private.spending.ended(private.federation, 3)
    assert why == "participations: 0 clients may still take part in round 3, 1 are needed"
    with pytest.raises(RoundError, match="none of 4 clients"):
        private.step()


def test_a_reply_of_who_may_not_take_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway's devices are known only when they have answered."""
    private = Private({"participations": 1, "quorum": 0.1})
    private.step()
    account = private.spending
    monkeypatch.setattr(account, "able", lambda federation, members, number: list(members))
    with pytest.raises(RoundError) as raised:
        private.step()
    assert {verdict.code for verdict in raised.value.verdicts.values()} == {Code.BUDGET}
    assert "has trained in 1 rounds" in raised.value.verdicts["ada"].why
    assert len(private.events) == 1


def test_poisson_asks_those_that_chance_has_drawn() -> None:
    private = Private({"cohort": 2, "dp_sampling": "poisson"}, drawn=(0.4, 0.6, 0.1, 0.5))
    found = private.step(cyd=silent)
    assert private.plans[0].cohort == {"ada": 1, "cyd": 1}
    assert private.events[0]["clients"] == ["ada"]
    assert private.events[0]["sampling_probability"] == found.sampling_probability == 0.5
    np.testing.assert_allclose(private.moved(), clipped("ada") / 2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("nobody", ["drawn", "answers", "online"])
def test_a_round_of_nobody_is_one_of_noise(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = (0.9,) * 4 if nobody == "drawn" else (0.0,) * 4
    private = Private({"cohort": 2, "dp_sampling": "poisson"}, noise=1.0, drawn=drawn)
    if nobody == "online":
        monkeypatch.setattr(Lying, "online", lambda self: set())
    found = private.step(**dict.fromkeys(EXAMPLES, silent))
    assert (found.updates, private.events[0]["clients"]) == (0, [])
    assert private.plans[0].cohort == ({} if nobody == "drawn" else dict.fromkeys(EXAMPLES, 1))
    np.testing.assert_allclose(private.moved(), Z * CLIP / 2, rtol=1e-6)


def test_errors_of_all_that_were_drawn_are_no_round() -> None:
    """But in the last attempt, for who is drawn is not drawn again: they count as absent."""

    def broken(packet: Packet) -> list[Packet | None]:
        return [pack_reply(replace(unpack_reply(packet, 1 << 30), error="no", payload=b""))]

    private = Private({"cohort": 2, "dp_sampling": "poisson"}, drawn=(0.0,) * 4)
    faults = dict.fromkeys(EXAMPLES, broken)
    with pytest.raises(RoundError, match=r"too few clients gave a valid update$"):
        private.step(**faults)
    assert private.events == []
    private.last = True
    found = private.step(**faults)
    assert (found.updates, found.answered, private.events[0]["clients"]) == (0, 4, [])


def test_a_kept_draw_is_asked_again() -> None:
    private = Private({"cohort": 2, "dp_sampling": "poisson"}, drawn=(0.9,) * 4)
    found = run_round(
        RoundCall(private.federation, private.state, {}, 1, cohort={"ben": 1}),
        Lying("fedavg"),
        spending=private.spending,
        events=RoundEvents(on_plan=private.plans.append, note=private.events.append),
    )
    assert (found.updates, private.plans[0].cohort) == (1, {"ben": 1})


def test_adaptive_clip_goes_on_from_the_memory_of_the_run() -> None:
    """C ← C exp(-0.2 (b - quantile)); nothing is within 1e-3, so b = 0 without noise."""
    private = Private({"clip": 1e-3, "clip_quantile": 0.5})
    first = private.step().metrics["clip"]
    second = private.step().metrics["clip"]
    assert first == 1e-3
    assert second == pytest.approx(1e-3 * math.exp(0.1))


def test_gateways_send_every_update() -> None:
    config = RunConfig(dp="client", noise_multiplier=1.0)
    assert merges(config, build_strategy(config)) is None
    assert merges(RunConfig(dp="example", epsilon=1), build_strategy(config)) is not None


def test_the_noise_on_gradients_is_that_of_the_largest_client_in_the_mean() -> None:
    """z clip √(values · steps) / batch, over √updates; clip · steps is all that gradients add."""
    given = {"dp": "example", "noise_multiplier": 2.0, "clip": 0.5, "delta": 1e-4}
    config = RunConfig(**given, batch_size=2, local_steps=9)

    def norms(config: RunConfig = config, **changes: Any) -> Mapping[str, float]:
        made = build_strategy(config)
        federation = Federation("ab" * 16, config, made, EXAMPLES, lambda spec: FRESH)
        return Spending(config).gradient_norms(replace(federation, **changes), 4)

    values, batch = sum(t.numel() for t in FRESH.values()), min(2, max(EXAMPLES.values()))
    wanted = 2.0 * 0.5 * math.sqrt(values * 9) / batch / math.sqrt(4)
    assert norms() == pytest.approx({"noise_norm": wanted, "update_norm": 0.5 * 9})
    # One number a query of forward passes; who sends control variates too trains no more values.
    forward = RunConfig(**given, batch_size=2, local_steps=9, strategy="seed_pool", queries=3)
    assert norms(forward)["noise_norm"] == pytest.approx(wanted * math.sqrt(3 / values))
    scaffold = RunConfig(**given, batch_size=2, local_steps=9, strategy="scaffold", optimizer="sgd")
    assert norms(scaffold) == norms()
    # Nothing without privacy, without an update, and of what devices only say.
    assert norms(RunConfig()) == {}
    assert norms(seats=dict.fromkeys(EXAMPLES, 3)) == {}
    assert norms(own_devices=True) == norms()
    assert norms(own_devices=True, clients={"ada": 10**9}) == {}
    budget = RunConfig(dp="example", epsilon=8, delta=1e-4)
    assert norms(budget, own_devices=True) == {}
