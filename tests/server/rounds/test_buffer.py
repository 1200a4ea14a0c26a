"""Rounds on simulated devices, by hand: who is there, how long it takes, what is stale."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.errors import RoundError
from corolla.server.rounds import buffer
from corolla.server.rounds.buffer import Flight
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.cohort import Trace
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, run_round
from corolla.server.runs.checkpoint import Checkpoint, load, save
from corolla.types import Params, Payload
from corolla.wire import codec, compression
from corolla.wire.messages import Reply, Task, pack_reply, unpack_task
from corolla.wire.packet import Packet

FRESH: Params = {"x.lora_A": torch.zeros(1, 3), "x.lora_B": torch.zeros(2, 1)}
BYTES = 4 * 5
"""Of an update and of a broadcast."""
EXAMPLES = {"a": 1, "b": 2, "c": 3, "d": 4}
GOALS = {"a": 1.0, "b": -2.0, "c": 5.0, "d": 11.0}


@dataclass
class Devices(Network):
    """Each client goes half the way from the state it received to a goal of its own."""

    asked: list[list[str]] = field(default_factory=list)
    wrong: frozenset[str] = frozenset()
    codec: Sequence[str] = ()
    accepted: dict[tuple[str, int], int] = field(default_factory=dict)
    """What a client was told in a round: which of its updates was the last to be accepted."""

    def clients(self) -> Mapping[str, int]:
        return EXAMPLES

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        self.asked.append(list(packets))
        for client in reversed(list(packets)):
            yield client, self._answer(client, unpack_task(packets[client]))

    def _answer(self, client: str, task: Task) -> Packet:
        self.accepted[client, task.round] = json.loads(task.config)["accepted"]
        start = codec.decode(task.payload)["adapter"]
        sent = {name: (GOALS[client] - w) / 2 for name, w in start.items()}
        echo = (task.run_id, task.round, task.base_version, task.kind, client)
        if client in self.wrong:
            return pack_reply(Reply(*echo, error="battery empty"))
        data = compression.pipeline(self.codec).encode({"adapter": sent}, 0)
        return pack_reply(Reply(*echo, EXAMPLES[client], {}, data))


@dataclass
class Server:
    """A run of rounds, each from what a checkpoint of the last one holds."""

    federation: Federation
    network: Devices
    at: Checkpoint

    def step(self) -> RoundResult:
        at, round = self.at, self.at.round + 1
        found = run_round(
            RoundCall(self.federation, at.state, at.held, round, memory=at.memory), self.network
        )
        self.at = Checkpoint(at.run_id, round, found.state, found.held, found.memory)
        return found

    @property
    def weight(self) -> float:
        """All values of the model are the same."""
        values = {float(v) for t in self.at.state["adapter"].values() for v in t.flatten()}
        (value,) = values
        return value


def server(trace: Trace | None = None, wrong: str = "", **settings: Any) -> Server:
    values = {"rank": 1, "local_steps": 4, "batch_size": 8, "cohort": 4, **settings}
    config = RunConfig.model_validate(values)
    strategy = build_strategy(config)
    federation = Federation("ab" * 16, config, strategy, EXAMPLES, lambda spec: FRESH, trace=trace)
    state = strategy.init(FRESH, 0)
    network = Devices(wrong=frozenset(wrong), codec=config.codec)
    return Server(federation, network, Checkpoint("", 0, state, {}))


def speeds(**found: float) -> Mapping[str, Mapping[str, float]]:
    """Classes of one client each, in the order of clients."""
    return {f"of-{client}": {"speed": speed} for client, speed in found.items()}


# Synchronous rounds


TIMES: Mapping[str, Mapping[str, float]] = {
    "of-a": {"speed": 2.0, "upload": 10.0, "download": 20.0},  # 12/2 + 20/20 + 20/10 = 9
    "of-b": {},  # 12
    "of-c": {"speed": 4.0, "download": 5.0},  # 3 + 20/5 = 7
    "of-d": {"speed": 3.0},  # 4
}


@pytest.mark.parametrize(
    ("deadline", "seconds", "late"),
    [(None, 12.0, ""), (12.0, 12.0, ""), (11.0, 11.0, "b"), (8.5, 8.5, "ab"), (4.0, 4.0, "abc")],
)
def test_a_round_takes_its_slowest_client_and_later_ones_are_dropped(
    deadline: float | None, seconds: float, late: str
) -> None:
    changes: dict[str, Any] = {"classes": TIMES, "step_seconds": 3.0, "quorum": 0.1}
    run = server(**changes, deadline_simulated=deadline)
    found = run.step()
    assert found.sim_seconds == pytest.approx(seconds)
    assert set(found.dropped) == set(late)
    assert all("late: " in why and "simulated seconds" in why for why in found.dropped.values())
    there = [c for c in EXAMPLES if c not in late]
    assert found.traffic.up == len(there) * BYTES
    mean = sum(EXAMPLES[c] * GOALS[c] / 2 for c in there) / sum(EXAMPLES[c] for c in there)
    assert run.weight == pytest.approx(mean)


def test_too_many_late_replies_end_a_round() -> None:
    run = server(classes=TIMES, step_seconds=3.0, deadline_simulated=8.5, quorum=0.75)
    with pytest.raises(RoundError, match=r"round 1: 2 of 4 .* 3 are needed; a: late: 9 simulated"):
        run.step()


def test_time_is_not_simulated_unless_asked_for() -> None:
    assert server().step().sim_seconds is None
    assert server(step_seconds=0.5).step().sim_seconds == 2.0


def test_silent_clients_are_not_asked_and_give_no_answer() -> None:
    run = server(classes={"gone": {"drop": 1.0}, "there": {}}, quorum=0.5)
    found = run.step()
    assert run.network.asked == [["b", "d"]]
    assert found.dropped == {"a": "no answer", "c": "no answer"}
    assert set(found.num_examples) == {"b", "d"}
    assert found.traffic.down == 4 * BYTES  # the server has sent it


def test_only_clients_that_can_be_reached_are_drawn() -> None:
    trace = Trace({"a": [(1, 2)], "b": [(2, 2)], "d": [(1, 1)]}, "")
    run = server(trace, cohort=2)
    found = [run.step() for _ in range(2)]
    assert run.network.asked == [["a", "d"], ["a", "b"]]
    assert [r.sampling_probability for r in found] == [1.0, 1.0]
    with pytest.raises(RoundError, match="round 3: none of 4 clients can be reached"):
        run.step()


def test_a_round_makes_do_with_those_there_are() -> None:
    """The quorum is a part of them."""
    run = server(Trace({"a": [(1, 2)]}, ""), cohort=3, quorum=1.0)
    assert set(run.step().num_examples) == {"a"}


def test_weighted_selection_counts_examples() -> None:
    drawn = {"uniform": 0, "weighted": 0}
    for selection in drawn:
        run = server(cohort=1, selection=selection)
        for _ in range(200):
            drawn[selection] += "d" in run.step().num_examples
    # 200/4 and 200 · 4/10, within 4 standard deviations
    assert abs(drawn["uniform"] - 50) < 25
    assert abs(drawn["weighted"] - 80) < 28


# Asynchronous rounds

# With four steps of a second: a answers after 1 s, b 3 s, c 5 s, d 12 s.
BY_HAND: dict[str, Any] = {"classes": speeds(a=4.0, b=4 / 3, c=4 / 5, d=4 / 12), "buffer": 2}
# Round by round: seconds, and (client, the round its state is from) of the two updates.
EXPECTED = [
    (3.0, [("a", 1), ("b", 1)]),
    (2.0, [("a", 2), ("c", 1)]),  # a at 4, c at 5
    (1.0, [("a", 3), ("b", 2)]),  # both at 6
    (3.0, [("a", 4), ("b", 4)]),  # a at 7, b at 9
    (1.0, [("a", 5), ("c", 3)]),  # both at 10
    (2.0, [("a", 6), ("b", 5)]),  # a at 11, b before d at 12
    (1.0, [("a", 7), ("d", 1)]),  # d at 12, a at 13
]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_updates_are_taken_as_they_arrive_and_count_less_the_older_they_are(power: float) -> None:
    run = server(**BY_HAND, staleness_power=power)
    weights = [0.0]  # before round 1, before round 2, …
    for round, (seconds, taken) in enumerate(EXPECTED, start=1):
        found = run.step()
        shares = {c: EXAMPLES[c] / (1 + round - base) ** power for c, base in taken}
        change = sum(shares[c] * (GOALS[c] - weights[base - 1]) / 2 for c, base in taken)
        weights.append(weights[-1] + change / sum(shares.values()))
        assert found.sim_seconds == pytest.approx(seconds, abs=1e-9)
        assert found.num_examples == {c: EXAMPLES[c] for c, _ in taken}
        assert list(found.num_examples) == sorted(found.num_examples)  # not as they arrived
        stale = [round - base for _, base in taken]
        assert found.metrics["staleness"] == sum(stale) / 2
        assert found.metrics["staleness_max"] == max(stale)
        assert run.weight == pytest.approx(weights[-1], rel=1e-6)
        assert found.traffic.up == 2 * BYTES
        assert found.traffic.down == (4 if round == 1 else 2) * BYTES


def test_devices_are_told_which_update_was_accepted_by_the_round_they_made_it_in() -> None:
    """They keep what a codec has left out under that round."""
    run = server(**BY_HAND, codec=["top_k:1.0"])
    for _ in EXPECTED:
        assert run.step().dropped == {}
    made = sorted(run.network.accepted)  # of each client, round after round
    before = {"a": [1, 2, 3, 4, 5, 6, 7], "b": [1, 2, 4, 5, 7], "c": [1, 3, 6], "d": [1]}
    assert made == [(c, r) for c, rounds in before.items() for r in rounds]
    for client, rounds in before.items():
        told = [run.network.accepted[client, r] for r in rounds]
        assert told == [0, *rounds[:-1]]


def test_what_is_in_flight_survives_a_checkpoint(tmp_path: Any) -> None:
    plain, interrupted = server(**BY_HAND), server(**BY_HAND)
    for _ in range(7):
        wanted = plain.step()
        save(tmp_path, replace(interrupted.at, run_id="ab" * 16))
        found = load(tmp_path)
        assert found is not None
        interrupted.at = found
        again = interrupted.step()
        assert again.metrics == wanted.metrics
        assert again.sim_seconds == wanted.sim_seconds
        assert interrupted.weight == plain.weight
    assert interrupted.network.asked == plain.network.asked


def test_nobody_is_asked_while_at_work() -> None:
    run = server(**BY_HAND, selection="weighted", seed=3)
    busy: set[str] = set()
    for _ in range(30):
        before = len(run.network.asked)
        found = run.step()
        for asked in run.network.asked[before:]:
            assert not busy & set(asked)
            busy |= set(asked)
        assert len(busy) == 4
        busy -= set(found.num_examples)


@pytest.mark.parametrize("cohort", [2, 3, 4])
def test_a_full_buffer_of_equal_speeds_is_synchronous_training(cohort: int) -> None:
    plain, buffered = server(cohort=cohort), server(cohort=cohort, buffer=cohort)
    for _ in range(12):
        wanted, found = plain.step(), buffered.step()
        assert found.num_examples == wanted.num_examples
        assert found.metrics == {**wanted.metrics, "staleness": 0.0, "staleness_max": 0.0}
        assert (found.traffic.up, found.traffic.down) == (wanted.traffic.up, wanted.traffic.down)
        for name, tensor in wanted.state["adapter"].items():
            assert torch.equal(found.state["adapter"][name], tensor)
    assert buffered.network.asked == plain.network.asked


@pytest.mark.parametrize("failing", ["silent", "wrong"])
def test_a_client_that_fails_is_replaced_when_its_time_has_come(failing: str) -> None:
    """a fails after 1 s: d takes its place from 1 s to 3 s, b and c have answered at 2 s."""
    classes: dict[str, dict[str, float]] = {"of-a": {"speed": 4.0}, "others": {"speed": 2.0}}
    classes["others"]["share"] = 3
    if failing == "silent":
        classes["of-a"]["drop"] = 1.0
    seed = next(s for s in range(99) if "d" not in server(cohort=3, seed=s).step().num_examples)
    wrong = "a" if failing == "wrong" else ""
    run = server(cohort=3, buffer=3, classes=classes, seed=seed, wrong=wrong)
    found = run.step()
    first = ["a", "b", "c"] if failing == "wrong" else ["b", "c"]
    assert run.network.asked == [first, ["d"]]
    assert found.dropped == {"a": "no answer" if failing == "silent" else "battery empty"}
    assert set(found.num_examples) == {"b", "c", "d"}
    assert found.sim_seconds == 3.0
    assert found.metrics["staleness_max"] == 0.0


def test_a_buffer_that_cannot_be_filled_meets_the_quorum_or_ends_the_round() -> None:
    trace = Trace({"a": [(1, 1)], "b": [(1, 1)]}, "")
    assert set(server(trace, buffer=4, quorum=0.5).step().num_examples) == {"a", "b"}
    with pytest.raises(RoundError, match="2 of 4 clients gave a valid update, 3 are needed"):
        server(trace, buffer=4, quorum=0.75).step()
    with pytest.raises(RoundError, match="none of 4 clients can be reached"):
        server(Trace({"a": [(2, 3)]}, ""), buffer=1).step()


def test_a_stale_reply_is_checked_against_its_own_task() -> None:
    """One in flight whose packet was made for another round or state is refused when it arrives."""
    run = server(**BY_HAND)
    run.step()
    now, flights = buffer.recall(run.at.memory)
    (c, d) = sorted(flights, key=lambda flight: flight.client)
    assert (c.client, d.client, c.round, d.round) == ("c", "d", 1, 1)
    for changed in (replace(c, round=2), replace(c, base_version="0" * 64)):
        memory = {**run.at.memory, **buffer.remember(now, [changed, d])}
        other = server(**BY_HAND)
        other.at = replace(run.at, memory=memory)
        assert "stale" in other.step().dropped["c"]


def test_a_memory_gives_back_what_it_was_given() -> None:
    packet = Packet(b"\x00\xff header", b"")
    flights = [
        Flight("ünï/cøde", 3, "ff", frozenset({"x", "y"}), 0.1 + 0.2, packet),
        Flight("b", 1, "", frozenset(), 1e9, None),
    ]
    memory: Payload = codec.decode(codec.encode(buffer.remember(1 / 3, flights)))
    assert buffer.recall(memory) == (1 / 3, flights)
    assert buffer.recall({}) == (0.0, [])


def test_other_memory_is_left_alone() -> None:
    other = {"ledger": {"epsilon": torch.ones(1)}}
    run = server(**BY_HAND)
    run.at = replace(run.at, memory=other)
    assert run.step().memory["ledger"] is other["ledger"]
    plain = server()
    plain.at = replace(plain.at, memory=other)
    assert plain.step().memory == other


@pytest.mark.parametrize(
    ("examples", "staleness", "power", "wanted"),
    [(8, 0, 0.5, 8.0), (8, 3, 0.5, 4.0), (8, 3, 0.0, 8.0), (6, 2, 1.0, 2.0), (8, 1, 2.0, 2.0)],
)
def test_weights_of_stale_updates(
    examples: int, staleness: int, power: float, wanted: float
) -> None:
    assert buffer.weight(examples, staleness, power) == pytest.approx(wanted)
