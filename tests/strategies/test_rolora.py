from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from corolla.errors import RoundError
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import run_round
from corolla.strategies.rolora import RoLora
from corolla.tensors import tree
from corolla.types import Cost, LoraSpec, Params, Payload, Size
from corolla.wire import messages
from corolla.wire.messages import pack_reply, unpack_reply, unpack_task
from corolla.wire.packet import Packet
from tests.strategies import tiny

SPEC = LoraSpec(2, 4.0)
START: Params = {**tiny.pair(2, 0), "m.lora_B": torch.zeros(10, 2), "bias": torch.tensor([1.0])}


def round_of(state: Payload, seeds: tuple[int, ...]) -> tuple[Payload, list[tiny.Scripted]]:
    """One round in which each client would move everything, if it could."""
    clients = [
        tiny.Scripted({**tiny.pair(2, seed), "bias": torch.tensor([float(seed)])}, n, SPEC)
        for n, seed in enumerate(seeds, 1)
    ]
    return tiny.play(RoLora(), state, clients), clients


def test_b_first_then_a_and_the_other_factor_stays_bit_for_bit() -> None:
    """With B = 0 the gradient of A is zero: A first would waste a round."""
    state = RoLora().init(START, 0)
    for round in range(1, 5):
        before = state
        state, clients = round_of(before, (10 * round + 1, 10 * round + 2))
        moved, still = ("A", "B") if round % 2 == 0 else ("B", "A")
        assert tiny.same(state[still], before[still])
        assert not tiny.same(state[moved], before[moved])
        (name,) = state[moved]
        one, two = (own.outcome[name] for own in clients)
        assert torch.allclose(state[moved][name], (one + 2 * two) / 3, atol=1e-6)
        assert float(state["head"]["bias"]) == pytest.approx(10 * round + 5 / 3)  # (1 + 2·2) / 3
        for own in clients:
            trained = {n for n in START if own.asked[0]["train"](n)}
            assert trained == {f"m.lora_{moved}", "bias"}


@pytest.mark.parametrize("round", [1, 2])
def test_the_product_of_the_means_is_the_mean_of_the_products(round: int) -> None:
    state = RoLora().init({**START, **tiny.pair(2, 7)}, 0)
    for _ in range(round - 1):
        state, _ = round_of(state, (1, 2))
    before = {**state["A"], **state["B"]}
    state, clients = round_of(state, (3, 4, 5))
    moved = "m.lora_A" if round == 2 else "m.lora_B"
    ideal = torch.stack(
        [
            own.num_examples / 6 * tiny.dense({**before, moved: own.outcome[moved]})
            for own in clients
        ]
    ).sum(0)
    found = tiny.dense(RoLora().adapter(state).trained)
    assert float((found - ideal).norm() / ideal.norm()) < 1e-6


@pytest.mark.parametrize(("phase", "trained"), [(0, "m.lora_B"), (1, "m.lora_A")])
def test_the_phase_is_the_broadcasts_and_no_counter_of_the_client(phase: int, trained: str) -> None:
    state = {
        **RoLora().init(START, 0),
        "phase": {"trains_a": torch.tensor(phase, dtype=torch.uint8)},
    }
    client = tiny.Scripted(tiny.pair(2, 1), 1, SPEC)
    for _ in range(3):
        (update,) = tiny.scripted(RoLora(), state, [client])
        assert update.payload["adapter"].keys() == {trained, "bias"}


def test_a_factor_is_sent_to_who_lacks_it_and_both_to_who_was_absent(tmp_path: Path) -> None:
    run = tiny.start(tiny.config("rolora", cohort=2, rounds=8), "bert", tmp_path)
    holds: dict[str, set[str]] = {}
    sizes = []
    for _ in range(8):
        current = {group: tree.digest(run.state[group]) for group in ("A", "B")}
        before = run.state
        run.step()
        for client, received in run.network.received.items():
            lacks = {g for g, content in current.items() if content not in holds.get(client, ())}
            assert received.keys() == {"head", "phase"} | lacks
            frozen = "B" if before["phase"]["trains_a"] else "A"
            for name, tensor in before[frozen].items():
                assert torch.equal(run.network.trained[client][name], tensor)
            holds[client] = set(current.values())
            sizes.append(len(lacks))
    assert {1, 2} <= set(sizes)
    assert len(holds) == len(tiny.CLIENTS)


@dataclass
class Late(Network):
    """The clients of a run; in the next round `client` answers as it did in the last one."""

    run: tiny.Run
    client: str
    relabelled: bool
    before: dict[str, Packet] = field(default_factory=dict)

    def clients(self) -> Mapping[str, int]:
        return tiny.CLIENTS

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        old = unpack_reply(self.before[self.client], 1 << 30)
        for client, answer in self.run.network.ask(packets):
            task = unpack_task(packets[client])
            stale = replace(old, round=task.round, base_version=task.base_version)
            yield (
                client,
                answer if client != self.client else pack_reply(stale if self.relabelled else old),
            )


@pytest.mark.parametrize(
    ("relabelled", "why"), [(False, "reply is stale"), (True, "update differs in")]
)
def test_an_update_of_the_phase_before_is_refused(
    tmp_path: Path, relabelled: bool, why: str
) -> None:
    """Also when it claims to be of this round: it holds the other factor."""
    run = tiny.start(tiny.config("rolora", cohort=4), "bert", tmp_path)
    run.step()
    late = Late(run, "b", relabelled, dict(run.network.sent))
    result = run_round(RoundCall(run.federation, run.state, run.held, 2), late)
    assert result.dropped.keys() == {"b"}
    assert why in result.dropped["b"]
    assert result.num_examples.keys() == {"a", "c", "d"}
    strict = run.federation.config.model_copy(update={"quorum": 1.0})
    with pytest.raises(RoundError, match=why):
        run_round(RoundCall(replace(run.federation, config=strict), run.state, run.held, 2), late)


def test_bytes_are_those_of_one_factor(tmp_path: Path) -> None:
    """A 3 values, B 5, head 2: up what is trained, down what has changed and the phase's byte."""
    odd, even = Size(A=3, B=5, head=2, round=1), Size(A=3, B=5, head=2, round=2)
    assert RoLora().cost([odd]) == [Cost(up=28, down=21, once=20)]
    assert RoLora().cost([even]) == [Cost(up=20, down=29, once=12)]
    run = tiny.start(tiny.config("rolora", cohort=4), "llama", tmp_path)
    a, b = 4 * 4 * (6 * 32 + 48), 4 * 4 * (2 * 32 + 2 * 16 + 2 * 48 + 32)
    downs = []
    for up in (b, a, b):
        run.step()
        downs.append({messages.content_bytes(own) for own in run.network.received.values()})
        assert {messages.content_bytes(run.network.update(c)) for c in run.network.sent} == {up}
    assert downs == [{a + b + 1}, {b + 1}, {a + 1}]
