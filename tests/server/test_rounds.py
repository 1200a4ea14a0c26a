import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla import codec, data, models
from corolla.client.memory import Memory
from corolla.client.worker import Worker
from corolla.config import RunConfig
from corolla.errors import RoundError
from corolla.lora import LoraModel
from corolla.proto import update_pb2 as pb
from corolla.server.rounds import Federation, RoundResult, evaluate_clients, run_round
from corolla.types import Metrics, Params, Payload
from corolla.wire import Kind, Packet, Reply, Task, pack_reply, unpack_reply, unpack_task

Settings = Callable[..., RunConfig]
Tamper = Callable[[Packet], Packet | None]

# Values of the adapters of the tiny model at rank 2, by hand: A is 2 x in, B is out x 2.
# in: 16 for q, k, v, o, gate and up, 24 for down; out: 16, 8, 8, 16, 24, 24, 16.
A_BYTES = 4 * 2 * (6 * 16 + 24)
B_BYTES = 4 * 2 * (16 + 8 + 8 + 16 + 24 + 24 + 16)


@dataclass
class Local:
    """Clients in this process; some answers are changed on their way, in any order."""

    workers: Mapping[str, Worker]
    tamper: Mapping[str, Tamper] = field(default_factory=dict)
    order: Sequence[str] = ()

    def clients(self) -> Mapping[str, int]:
        return {c: len(w.data.clients[c].train) for c, w in self.workers.items()}

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client in self.order or packets:
            packet: Packet | None = self.workers[client](client, packets[client])
            if packet and client in self.tamper:
                packet = self.tamper[client](packet)
            yield client, packet


@dataclass
class Setting:
    """A federation before its first round."""

    federation: Federation
    worker: Worker
    state: Payload

    def run(self, round: int = 1, **changes: Any) -> RoundResult:
        """One round from the first state."""
        return run_round(self.federation, self.state, {}, round, self.network(**changes))

    def network(self, **changes: Any) -> Local:
        return Local(dict.fromkeys(self.federation.clients, self.worker), **changes)


@pytest.fixture
def setup(settings: Settings, tmp_path: Path) -> Callable[..., Setting]:
    def make(**changes: Any) -> Setting:
        config = settings(**changes)
        model = LoraModel(models.load(config))
        worker = Worker(config, model, data.load(config), Memory(tmp_path / "memory"))
        clients = {c: len(s.train) for c, s in worker.data.clients.items()}
        strategy = config.build_strategy()
        state = strategy.init(model.init(config.lora, 0), 0)
        fresh = cache(lambda spec: model.init(spec, 0))
        return Setting(Federation("ab" * 16, config, strategy, clients, fresh), worker, state)

    return make


def equal(one: Payload, other: Payload) -> bool:
    return one.keys() == other.keys() and all(
        one[g].keys() == other[g].keys() and all(torch.equal(one[g][n], t) for n, t in p.items())
        for g, p in other.items()
    )


def copy(payload: Payload) -> Payload:
    return {g: {n: t.clone() for n, t in p.items()} for g, p in payload.items()}


def changed(**fields: Any) -> Tamper:
    """An answer with other fields in its header, which is otherwise right."""
    return lambda packet: pack_reply(replace(unpack_reply(packet, 1 << 30), **fields))


def header(**fields: Any) -> Tamper:
    """As `changed`, for values that no honest sender can write."""

    def tamper(packet: Packet) -> Packet:
        head = pb.Reply()
        head.ParseFromString(packet.header)
        for name, value in fields.items():
            setattr(head, name, value)
        return Packet(head.SerializeToString(), packet.payload)

    return tamper


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Tamper:
    """An answer whose first group of tensors is changed and packed again."""

    def tamper(packet: Packet) -> Packet:
        reply = unpack_reply(packet, 1 << 30)
        payload = {group: dict(params) for group, params in codec.decode(reply.payload).items()}
        change(next(params for params in payload.values() if params))
        return pack_reply(replace(reply, payload=codec.encode(payload)))

    return tamper


def each(function: Callable[[torch.Tensor], torch.Tensor]) -> Tamper:
    """An answer with a function of its first tensor."""

    def change(params: dict[str, torch.Tensor]) -> None:
        name = min(params)
        params[name] = function(params[name]).contiguous()

    return tensors(change)


def overflowing() -> bytes:
    """A safetensors buffer whose empty tensor has 2**64 columns."""
    entry = {"dtype": "F32", "shape": [0, 1 << 62, 4], "data_offsets": [0, 0]}
    text = json.dumps({"__metadata__": {"groups": '["a"]'}, "a/x": entry}).encode()
    return struct.pack("<Q", len(text)) + text


HOSTILE: dict[str, Tamper] = {
    "silence": lambda packet: None,
    "no header": lambda packet: Packet(b"", packet.payload),
    "junk header": lambda packet: Packet(b"\xff" * 50, packet.payload),
    "huge header": lambda packet: Packet(b"\x00" * (2 << 20), packet.payload),
    "no payload": changed(payload=b""),
    "other payload": lambda packet: Packet(packet.header, b"x" * len(packet.payload)),
    "longer payload": lambda packet: Packet(packet.header, packet.payload + b"x"),
    "huge payload": changed(payload=b"\xff" * (2 << 20)),
    "junk payload": changed(payload=b"junk"),
    "pickle": changed(payload=b"\x80\x04\x8c\x02os\x8c\x06system\x93."),
    "overflowing shape": changed(payload=overflowing()),
    "empty payload": changed(payload=codec.encode({})),
    "nan": each(lambda t: t * math.nan),
    "one inf": each(lambda t: t.index_fill(0, torch.tensor([0]), math.inf)),
    "transposed": each(lambda t: t.T),
    "broadcastable": each(lambda t: t[:1]),
    "scalar": each(lambda t: t.sum()),
    "extra dimension": each(lambda t: t[None]),
    "float64": each(lambda t: t.double()),
    "float16": each(lambda t: t.half()),
    "int8": each(lambda t: t.char()),
    "complex": each(lambda t: t.to(torch.complex64)),
    "missing tensor": tensors(lambda params: params.__delitem__(min(params))),
    "extra tensor": tensors(lambda params: params.update(extra=torch.zeros(1))),
    "renamed tensor": tensors(lambda params: params.update(other=params.pop(min(params)))),
    "no examples": changed(num_examples=0),
    "all examples of the world": header(num_examples=2**64 - 1),
    "more examples than it can train on": changed(num_examples=10**12),
    "old round": changed(round=0),
    "next round": changed(round=2),
    "other model": changed(base_version="0" * 64),
    "other run": changed(run_id="0" * 32),
    "other name": changed(client="ben"),
    "no name": changed(client=""),
    "other kind": changed(kind=Kind.EVALUATE),
    "other schema": header(schema=2),
    "error": changed(error="out of memory"),
    "missing groups": changed(missing=["A"], error="missing", payload=b""),
    "missing groups without error": changed(missing=["A"]),
    "missing groups without payload": changed(missing=["A"], payload=b"", num_examples=10**9),
    "a thousand metrics": changed(metrics={f"{i}": 1.0 for i in range(1000)}),
}


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("strategy", ["fedavg", "flora"])
def test_a_hostile_reply_costs_its_sender_the_round_and_nobody_else(
    setup: Callable[..., Setting], strategy: str, attack: str
) -> None:
    setting = setup(strategy=strategy)
    found = setting.run(tamper={"cyd": HOSTILE[attack]})
    assert set(found.num_examples) == {"ada", "ben", "dot"}
    assert set(found.dropped) == {"cyd"}
    wanted = setting.run(tamper={"cyd": lambda packet: None})
    assert equal(found.state, wanted.state)
    assert found.num_examples == wanted.num_examples
    assert found.metrics == wanted.metrics
    assert found.bytes_up == wanted.bytes_up


def test_every_client_but_the_quorum_may_be_hostile(setup: Callable[..., Setting]) -> None:
    setting = setup()
    tamper = {"ada": HOSTILE["nan"], "dot": HOSTILE["junk header"]}
    assert set(setting.run(tamper=tamper).num_examples) == {"ben", "cyd"}


def test_answers_in_the_name_of_others_do_not_count(setup: Callable[..., Setting]) -> None:
    """Second answers, strangers, and an answer of one client sent as another's."""
    setting = setup()
    wanted = setting.run()

    class Noisy(Local):
        def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
            honest = dict(super().ask(packets))
            yield "stranger", honest["ada"]
            for client, packet in honest.items():
                yield client, packet
                yield client, honest["ada"]
                yield "ada", packet
                yield "", None

    noisy = Noisy(dict.fromkeys(setting.federation.clients, setting.worker))
    found = run_round(setting.federation, setting.state, {}, 1, noisy)
    assert equal(found.state, wanted.state)
    assert found.num_examples == wanted.num_examples
    assert found.dropped == {}


def test_a_huge_update_does_not_end_the_run(setup: Callable[..., Setting]) -> None:
    """Finite, as declared, and large enough to make every honest client diverge."""
    setting = setup()
    network = setting.network(tamper={"cyd": each(lambda t: torch.full_like(t, 3e38))})
    state: Payload = setting.state
    for round in (1, 2, 3):
        found = run_round(setting.federation, state, {}, round, network)
        assert len(found.num_examples) >= 3
        state = found.state


def test_the_aggregate_is_the_weighted_mean_of_what_clients_sent(
    setup: Callable[..., Setting],
) -> None:
    setting = setup(local_epochs=1)
    sent: dict[str, Reply] = {}

    def keep(packet: Packet) -> Packet:
        reply = unpack_reply(packet, 1 << 30)
        sent[reply.client] = reply
        return packet

    found = setting.run(tamper=dict.fromkeys(setting.federation.clients, keep))
    # 6, 9, 12 and 7 rows without two held out: one in ten, at least one, twice
    assert found.num_examples == {"ada": 4, "ben": 7, "cyd": 10, "dot": 5}
    updates = {c: codec.decode(r.payload)["adapter"] for c, r in sent.items()}
    for name, start in setting.state["adapter"].items():
        mean = sum(found.num_examples[c] * u[name].double() for c, u in updates.items()) / 26
        torch.testing.assert_close(
            found.state["adapter"][name], (start.double() + mean).float(), rtol=1e-6, atol=1e-8
        )
    losses = {c: r.metrics["train_loss"] for c, r in sent.items()}
    assert found.client_loss == losses
    weighted = sum(found.num_examples[c] * loss for c, loss in losses.items()) / 26
    assert found.metrics["train_loss"] == pytest.approx(weighted)
    assert found.metrics["local_steps"] == sum(r.metrics["local_steps"] for r in sent.values())


@pytest.mark.parametrize("strategy", ["fedavg", "ffa_lora", "flora"])
def test_the_order_of_arrival_changes_no_bit(setup: Callable[..., Setting], strategy: str) -> None:
    setting = setup(strategy=strategy)
    answers: dict[str, Packet] = {}

    class Recorded(Local):
        def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
            for client in self.order:
                if client not in answers:
                    answers[client] = self.workers[client](client, packets[client])
                yield client, answers[client]

    results = []
    for order in itertools.permutations(setting.federation.clients):
        network = Recorded(dict.fromkeys(order, setting.worker), order=order)
        results.append(run_round(setting.federation, setting.state, {}, 1, network))
    assert len(results) == 24
    assert all(equal(found.state, results[0].state) for found in results)
    assert all(found.metrics == results[0].metrics for found in results)


def test_a_missed_quorum_says_why_and_changes_nothing(setup: Callable[..., Setting]) -> None:
    setting = setup(quorum=0.75)
    before = copy(setting.state)
    tamper = {"ada": HOSTILE["error"], "cyd": HOSTILE["nan"]}
    with pytest.raises(RoundError) as caught:
        setting.run(round=2, tamper=tamper)
    message = str(caught.value)
    for part in ("round 2", "2 of 4", "3 are needed", "ada: out of memory"):
        assert part in message
    assert equal(setting.state, before)


def test_the_quorum_itself_is_enough(setup: Callable[..., Setting]) -> None:
    setting = setup(quorum=0.75)
    assert len(setting.run(tamper={"ada": HOSTILE["error"]}).num_examples) == 3


def test_what_a_client_says_stays_on_one_line(setup: Callable[..., Setting]) -> None:
    setting = setup(quorum=1.0)
    hostile = changed(error="a\nb\r\n\x1b[2Jc")
    with pytest.raises(RoundError) as caught:
        setting.run(tamper={"ada": hostile})
    assert str(caught.value).isprintable()


def test_nobody_answers(setup: Callable[..., Setting]) -> None:
    setting = setup()
    with pytest.raises(RoundError, match=r"0 of 4 .* ada: no answer"):
        setting.run(tamper=dict.fromkeys(setting.federation.clients, HOSTILE["silence"]))


def test_every_reply_is_observed(setup: Callable[..., Setting]) -> None:
    setting = setup()
    seen: list[str] = []
    network = setting.network(tamper={"ben": HOSTILE["silence"]})
    run_round(setting.federation, setting.state, {}, 1, network, seen.append)
    assert seen == ["ada", "ben", "cyd", "dot"]


def test_only_the_cohort_is_asked(setup: Callable[..., Setting]) -> None:
    setting = setup(cohort=2)
    cohorts = set()
    for round in range(1, 9):
        found = setting.run(round=round)
        assert len(found.num_examples) == 2
        cohorts.add(tuple(found.num_examples))
    assert len(cohorts) > 1


def test_bytes_are_those_of_the_tensors(setup: Callable[..., Setting]) -> None:
    found = setup().run()
    assert found.bytes_up == found.bytes_down == 4 * (A_BYTES + B_BYTES)
    assert 0 < found.framing_up < 4 * 4096
    assert 0 < found.framing_down < 4 * 8192


def test_cached_groups_travel_once_to_each_client(setup: Callable[..., Setting]) -> None:
    setting = setup(strategy="ffa_lora", cohort=2)
    state: Payload = setting.state
    held: Mapping[str, frozenset[str]] = {}
    known: set[str] = set()
    for round in range(1, 7):
        found = run_round(setting.federation, state, held, round, setting.network())
        new = set(found.num_examples) - known
        assert found.bytes_down == 2 * B_BYTES + len(new) * A_BYTES
        assert found.bytes_up == 2 * B_BYTES
        state, held, known = found.state, found.held, known | new
    assert known == {"ada", "ben", "cyd", "dot"}


def test_a_client_that_lost_its_cache_gets_it_again(
    setup: Callable[..., Setting], tmp_path: Path
) -> None:
    setting = setup(strategy="ffa_lora")
    first = setting.run()
    old = setting.worker
    wiped = Worker(old.config, old.model, old.data, Memory(tmp_path / "new device"))
    network = Local({**dict.fromkeys(setting.federation.clients, old), "ben": wiped})
    second = run_round(setting.federation, first.state, first.held, 2, network)
    assert second.bytes_down == 5 * B_BYTES + A_BYTES  # ben is asked twice, then with everything
    assert second.dropped == {}
    third = run_round(setting.federation, second.state, second.held, 3, network)
    assert (third.bytes_down, third.dropped) == (4 * B_BYTES, {})


def test_a_client_that_failed_is_not_believed_to_hold_anything(
    setup: Callable[..., Setting],
) -> None:
    setting = setup(strategy="ffa_lora")
    found = setting.run(tamper={"ben": HOSTILE["silence"], "cyd": HOSTILE["nan"]})
    assert set(found.held) == {"ada", "dot"}


def test_mixed_ranks_are_checked_client_by_client(setup: Callable[..., Setting]) -> None:
    setting = setup(strategy="flora", ranks=[2, 4])
    found = setting.run()
    assert found.dropped == {}
    assert found.bytes_up == 2 * (A_BYTES + B_BYTES) + 2 * 2 * (A_BYTES + B_BYTES)
    assert {t.shape[0] for n, t in found.state["block-000001"].items() if n.endswith("A")} == {12}


class Counting:
    """A thousand clients that train nothing: client i answers with tensors full of i."""

    def __init__(self, metrics: Callable[[int], Metrics] = lambda i: {}) -> None:
        self.names = {f"c{i:03d}": i for i in range(1000)}
        self.metrics = metrics
        self.asked: list[str] = []

    def clients(self) -> Mapping[str, int]:
        return {name: 1 + i % 7 for name, i in self.names.items()}

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        self.asked = list(packets)
        for client in reversed(list(packets)):
            i, task = self.names[client], unpack_task(packets[client])
            sent = {n: torch.full_like(t, float(i)) for n, t in FRESH.items()}
            yield client, pack_reply(_answer(task, client, 1 + i % 7, sent, self.metrics(i)))


FRESH: Params = {"x.lora_A": torch.zeros(1, 3), "x.lora_B": torch.zeros(2, 1)}


def _answer(task: Task, client: str, examples: int, sent: Params, metrics: Metrics) -> Reply:
    data = codec.encode({"adapter": sent})
    echo = (task.run_id, task.round, task.base_version, task.kind)
    return Reply(*echo, client, examples, metrics, data)


def crowd(network: Counting, **changes: Any) -> tuple[Federation, Payload]:
    config = RunConfig(rank=1, local_steps=1, batch_size=7, **changes)
    strategy = config.build_strategy()
    state = strategy.init(FRESH, 0)
    return Federation("ab" * 16, config, strategy, network.clients(), lambda spec: FRESH), state


def test_a_thousand_clients_in_one_round() -> None:
    network = Counting()
    federation, state = crowd(network, cohort=1000)
    found = run_round(federation, state, {}, 1, network)
    weights = {i: 1 + i % 7 for i in range(1000)}
    mean = sum(i * w for i, w in weights.items()) / sum(weights.values())
    assert len(found.num_examples) == 1000
    assert sum(found.num_examples.values()) == sum(weights.values())
    for tensor in found.state["adapter"].values():
        assert tensor.flatten().tolist() == pytest.approx([mean] * tensor.numel(), rel=1e-6)
    assert found.bytes_up == found.bytes_down == 1000 * 4 * (3 + 2)


def test_few_of_a_thousand_clients() -> None:
    network = Counting()
    federation, state = crowd(network, cohort=10)
    for round in range(1, 6):
        found = run_round(federation, state, {}, round, network)
        assert len(network.asked) == len(found.num_examples) == 10


def test_ranks_go_to_clients_in_the_order_of_their_names() -> None:
    network = Counting()
    federation, _ = crowd(network, strategy="flora", ranks=[1, 2, 3])
    assert [federation.lora(f"c{i:03d}").rank for i in (0, 1, 2, 3, 999)] == [1, 2, 3, 1, 1]


def test_metrics_are_means_weighted_by_examples() -> None:
    """Of those who report them; work is summed."""
    reported: dict[int, Metrics] = {
        0: {"loss": 1.0, "skipped": 2.0, "target_tokens": 10.0},
        1: {"loss": 4.0, "skipped": 3.0},
        2: {"rare": 5.0},
    }
    network = Counting(lambda i: reported.get(i, {}))
    network.names = {"c0": 0, "c1": 1, "c2": 2}
    federation, state = crowd(network)
    found = run_round(federation, state, {}, 1, network).metrics
    # weights 1, 2 and 3
    assert found == {
        "loss": pytest.approx((1 * 1.0 + 2 * 4.0) / 3),
        "skipped": 5.0,
        "target_tokens": 10.0,
        "rare": 5.0,
    }


@pytest.mark.parametrize("name", ["train_loss", "target_tokens", "anything"])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1)])
def test_huge_metrics_do_not_end_a_round(name: str, signs: tuple[int, int]) -> None:
    values = {1: 1.7e308 * signs[0], 2: 1.7e308 * signs[1]}
    network = Counting(lambda i: {name: values.get(i, 1.0)})
    network.names = {f"c{i}": i for i in range(6)}
    federation, state = crowd(network)
    found = run_round(federation, state, {}, 1, network)
    assert len(found.num_examples) == 6
    assert all(math.isfinite(value) for value in found.metrics.values())


def test_evaluation_collects_what_clients_measure(setup: Callable[..., Setting]) -> None:
    setting = setup()
    found = evaluate_clients(setting.federation, setting.state, {}, 0, setting.network())
    assert set(found) == {"ada", "ben", "cyd", "dot"}
    assert all(scores["examples"] == 1 for scores in found.values())
    assert all(math.isfinite(scores["loss"]) for scores in found.values())


def test_evaluation_asks_no_more_than_it_may(setup: Callable[..., Setting]) -> None:
    for most in (0, 2):
        setting = setup(eval_clients=most)
        found = evaluate_clients(setting.federation, setting.state, {}, 0, setting.network())
        assert len(found) == most


def test_a_hostile_reply_to_an_evaluation_costs_its_score_alone(
    setup: Callable[..., Setting],
) -> None:
    setting = setup()
    honest = evaluate_clients(setting.federation, setting.state, {}, 1, setting.network())
    attacks = [
        a for a in HOSTILE if "payload" in a or "header" in a or a.startswith(("no", "other"))
    ]
    for attack in (*attacks, "silence", "error", "old round", "a thousand metrics"):
        network = setting.network(tamper={"cyd": HOSTILE[attack]})
        found = evaluate_clients(setting.federation, setting.state, {}, 1, network)
        for client in ("ada", "ben", "dot"):
            assert found[client] == honest[client], attack
