import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from corolla.directions import signs
from corolla.strategies.scalars.fedkseed import FedKSeed
from corolla.strategies.scalars.fedkseed_pro import FedKSeedPro, _draw, probabilities
from corolla.types import Cost, Params, Payload, Size
from corolla.wire import messages
from tests.strategies import devices, tiny

START: Params = {
    "m.lora_A": torch.tensor([[0.5, -1.0, 2.0]]),
    "m.lora_B": torch.tensor([[3.0], [0.25]]),
}


def client(n: int, seed: int, *scalars: float, step: float = -0.25) -> tiny.Scripted:
    return tiny.Scripted({}, n, seed=seed, kind="zeroth_order", scalars=scalars, step=step)


# Probabilities


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e6, width=32, allow_subnormal=False),
            st.integers(0, 50),
        ),
        min_size=1,
        max_size=64,
    )
)
def test_probabilities_are_positive_and_within_a_factor_of_e(
    history: list[tuple[float, int]],
) -> None:
    magnitudes = torch.tensor([m if n else 0.0 for m, n in history])
    found = probabilities(magnitudes, torch.tensor([float(n) for _, n in history]))
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((found > 0).all())
    assert float(found.max() / found.min()) <= math.e * (1 + 1e-12)


def test_probabilities_by_hand() -> None:
    """Means 2, 4, 1, and 7 / 3 for the seed that was never used: softmax of (1, 3, 0, 4/3) / 3."""
    found = probabilities(torch.tensor([6.0, 4.0, 2.0, 0.0]), torch.tensor([3.0, 1.0, 2.0, 0.0]))
    weights = [math.exp(x / 3) for x in (1, 3, 0, 4 / 3)]
    assert found.tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-12)
    assert float(found.max() / found.min()) == pytest.approx(math.e, rel=1e-12)


@pytest.mark.parametrize(
    ("magnitudes", "counts"),
    [
        ([0.0] * 4, [0.0] * 4),
        ([2.0] * 4, [4.0] * 4),
        ([1.0, 2.0, 3.0, 0.5], [2.0, 4.0, 6.0, 1.0]),
        ([3.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]),
    ],
)
def test_equal_histories_are_uniform(magnitudes: list[float], counts: list[float]) -> None:
    found = probabilities(torch.tensor(magnitudes), torch.tensor(counts))
    assert found.tolist() == pytest.approx([0.25] * 4, rel=1e-12)


def test_draws_follow_the_probabilities() -> None:
    chances = torch.tensor([0.1, 0.4, 0.2, 0.3])
    drawn = _draw(7, 20_000, chances)
    assert drawn.dtype == torch.int64
    counts = drawn.bincount(minlength=4).double() / 20_000
    for found, wanted in zip(counts.tolist(), chances.tolist(), strict=True):
        assert found == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 20_000))


def test_draws_depend_on_the_seed_alone_and_go_on() -> None:
    chances = torch.full((64,), 1 / 64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = _draw(7, 100, chances)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(_draw(7, 200, chances)[:100], one)
    assert not torch.equal(_draw(8, 100, chances), one)


@given(
    st.lists(st.floats(2.0**-20, 1.0, width=32), min_size=1, max_size=70), st.integers(0, 2**32 - 1)
)
def test_draws_are_in_range(chances: list[float], seed: int) -> None:
    drawn = _draw(seed, 50, torch.tensor(chances))
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < len(chances)


def test_draws_are_those_of_the_cumulated_probabilities() -> None:
    """By inversion, from the same words on every platform."""
    chances = [0.5, 0.125, 0.375]
    words = signs.words((3, 0), 0, 30, stream=1)
    heights = list(itertools.accumulate(chances))
    wanted = [next(k for k, h in enumerate(heights) if (int(w) >> 11) / 2**53 < h) for w in words]
    assert _draw(3, 30, torch.tensor(chances)).tolist() == wanted


# Rounds


def test_two_rounds_by_hand() -> None:
    """Moves as in FedKSeed; magnitudes are clipped at 1000, unweighted, and zeros do not count."""
    strategy = FedKSeedPro(size=4)
    first = strategy.init(START, 5)
    state = first
    sums, magnitudes, counts = ([0.0] * 4 for _ in range(3))
    for _ in range(2):
        members = [
            client(1, 11, 1.0, -2000.0, 0.5),
            client(3, 12, 4.0, 0.0, -0.25, 8.0, step=-0.5),
        ]
        chances = strategy.broadcast(state).payload["probabilities"]["scalars"]
        wanted = probabilities(torch.tensor(magnitudes), torch.tensor(counts))
        torch.testing.assert_close(chances, wanted.float(), rtol=1e-6, atol=0)
        state = tiny.play(strategy, state, members, first)
        for member, p in zip(members, (0.25, 0.75), strict=True):
            chosen = member.asked[0]["directions"]
            assert chosen == _draw(member.seed, len(member.scalars), chances).tolist()
            for k, g in zip(chosen, member.scalars, strict=True):
                sums[k] += p * member.step * g
                magnitudes[k] += min(abs(g), 1000.0)
                counts[k] += g != 0
        assert state["sums"]["scalars"].tolist() == pytest.approx(sums, rel=1e-6)
        assert state["magnitudes"]["scalars"].tolist() == pytest.approx(magnitudes, rel=1e-6)
        assert state["counts"]["scalars"].tolist() == counts


def test_any_tree_gives_the_same_history() -> None:
    """Whole numbers: bit for bit."""
    strategy = FedKSeedPro(size=8)
    parts: list[tuple[Payload, int]] = []
    generator = torch.Generator().manual_seed(0)
    for m in range(4):
        group = {
            "scalars": torch.randint(-5, 6, (6,), generator=generator).float(),
            "step": torch.tensor(-0.5),
            "directions": torch.randint(0, 8, (6,), generator=generator, dtype=torch.int32),
        }
        parts.append(({"scalars": group}, 2**m))
    found: list[dict[str, Tensor]] = []
    for order in itertools.permutations(parts):
        for cut in range(5):
            left, right = strategy.aggregator(), strategy.aggregator()
            for side, some in ((left, order[:cut]), (right, order[cut:])):
                for part in some:
                    side.add(*part)
            left.merge(right)
            found.append({n: g["scalars"] for n, g in left.finalise().items()})
    assert all(tiny.same(found[0], other) for other in found)


def test_before_any_history_it_draws_uniformly_and_moves_as_fedkseed() -> None:
    pro, plain = FedKSeedPro(size=16), FedKSeed(size=16)
    states = {}
    for strategy in (pro, plain):
        first = strategy.init(START, 5)
        members = [client(2, 3, 1.0, -1.0, 2.0, 0.25)]
        received = tiny.seen(strategy.broadcast(first), first)
        update = dict(strategy.local(members[0], received).payload["scalars"])
        update["directions"] = torch.tensor([3, 1, 3, 15], dtype=torch.int32)
        aggregator = strategy.aggregator()
        aggregator.add({"scalars": update}, 2)
        states[strategy.name] = strategy.apply(first, aggregator.finalise())[0]["sums"]
    assert tiny.same(states["fedkseed_pro"], states["fedkseed"])


@pytest.mark.parametrize("options", [{"size": 100}, {"size": 0}, {"directions": "uniform"}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        FedKSeedPro(**options)


def test_bytes_are_the_formula() -> None:
    """K = 1024 and 200 steps: 8 K + 8 · 200 + 8 in all."""
    strategy = FedKSeedPro()
    scalars = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    first = strategy.init(START, 0)
    members = [client(5, m, *scalars) for m in range(60)]
    received = tiny.seen(strategy.broadcast(first), first)
    assert {messages.content_bytes(strategy.local(m, received).payload) for m in members} == {1604}
    state = tiny.play(strategy, first, members, first)
    assert bool((state["sums"]["scalars"] != 0).all())
    assert messages.content_bytes(strategy.broadcast(state).payload) == 8 * 1024 + 4
    (cost,) = strategy.cost([Size(1, 2, 3, 200, "zeroth_order")])
    assert cost == Cost(8 * 200 + 4, 8 * 1024 + 4, at_most=True)


@pytest.mark.parametrize("space", ["lora", "full"])
def test_all_devices_end_with_the_servers_bits(space: str, tmp_path: Path) -> None:
    run = devices.start(
        "llama",
        tmp_path,
        strategy="fedkseed_pro",
        parameters=space,
        options={"size": 16, "directions": "sign"},
        lr=1e-3,
        local_steps=4,
    )
    for members in ("ab", "b", "abc"):
        result = run.step(*members)
        assert result.traffic.up == len(members) * (8 * 4 + 4)
        assert result.traffic.down <= len(members) * (8 * 16 + 4)
    assert run.hashes() == dict.fromkeys("abcd", run.server())
    chances = run.federation.strategy.broadcast(run.state).payload["probabilities"]["scalars"]
    assert float(chances.max() / chances.min()) == pytest.approx(math.e, rel=1e-5)
