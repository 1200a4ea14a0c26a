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

from corolla import seeds
from corolla.client.training.worker import Worker
from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.config.sections.kinds import KINDS
from corolla.data import federated
from corolla.directions import seedlog
from corolla.errors import RoundError
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.proto import update_pb2 as pb
from corolla.server.rounds import expectations
from corolla.server.rounds.call import RoundCall, RoundEvents
from corolla.server.rounds.federation import Federation, Held
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import RoundResult, evaluate_clients, run_round
from corolla.storage.memory import Memory
from corolla.tensors import tree
from corolla.types import Metrics, Params, Payload, Size, row_name
from corolla.wire import codec, messages, scalar_groups
from corolla.wire.messages import (
    SCHEMA,
    Kind,
    Log,
    Reply,
    Task,
    pack_reply,
    pack_task,
    unpack_reply,
    unpack_task,
)
from corolla.wire.packet import Packet

Settings = Callable[..., RunConfig]
Tamper = Callable[[Packet], Packet | None]

# Values of the adapters of the tiny model at rank 2, by hand: A is 2 x in, B is out x 2.
# in: 16 for q, k, v, o, gate and up, 24 for down; out: 16, 8, 8, 16, 24, 24, 16.
A_BYTES = 4 * 2 * (6 * 16 + 24)
B_BYTES = 4 * 2 * (16 + 8 + 8 + 16 + 24 + 24 + 16)


@dataclass
class Local(Network):
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
        return run_round(RoundCall(self.federation, self.state, {}, round), self.network(**changes))

    def network(self, **changes: Any) -> Local:
        return Local(dict.fromkeys(self.federation.clients, self.worker), **changes)

    def device(self, folder: Path) -> Worker:
        """A device with a memory of its own; the model and the data are shared."""
        return Worker(self.worker.config, self.worker.model, self.worker.data, Memory(folder))

    def shown(self, state: Payload) -> str:
        """What the model of a state is, as the server has it."""
        adapter = self.federation.strategy.adapter(state)
        self.worker.model.show(adapter, self.federation.config.lora)
        return tree.digest(self.worker.model.read())


@pytest.fixture
def setup(settings: Settings, tmp_path: Path) -> Callable[..., Setting]:
    def make(**changes: Any) -> Setting:
        config = settings(**{"rounds": 20, **changes})
        model = LoraModel(pretrained.load(config))
        worker = Worker(config, model, federated.load(config), Memory(tmp_path / "memory"))
        clients = {c: len(s.train) for c, s in worker.data.clients.items()}
        strategy = build_strategy(config)
        start = model.init(config.lora, seeds.derive(config.seed, "init"))
        state = strategy.init(start, config.seed)
        origin = seedlog.origin(model.base.fingerprint, state)
        fresh = cache(lambda spec: model.init(spec, 0))
        federation = Federation("ab" * 16, config, strategy, clients, fresh, origin)
        return Setting(federation, worker, state)

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
    "other schema": header(schema=SCHEMA + 1),
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
    assert found.traffic.up == wanted.traffic.up


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
    found = run_round(RoundCall(setting.federation, setting.state, {}, 1), noisy)
    assert equal(found.state, wanted.state)
    assert found.num_examples == wanted.num_examples
    assert found.dropped == {}


def test_a_huge_update_does_not_end_the_run(setup: Callable[..., Setting]) -> None:
    """Finite, as declared, and large enough to make every honest client diverge."""
    setting = setup()
    network = setting.network(tamper={"cyd": each(lambda t: torch.full_like(t, 3e38))})
    state: Payload = setting.state
    for round in (1, 2, 3):
        found = run_round(RoundCall(setting.federation, state, {}, round), network)
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


@pytest.mark.parametrize("strategy", ["fedavg", "ffa_lora", "flora", "seed_pool", "fedkseed_pro"])
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
        results.append(run_round(RoundCall(setting.federation, setting.state, {}, 1), network))
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


def test_all_who_forget_are_asked_once_more_together(setup: Callable[..., Setting]) -> None:
    """Each ask may take a deadline: one for each who says so would hold a round up for ever."""
    setting = setup(strategy="ffa_lora")
    wanted = setting.run()
    asked: list[list[str]] = []

    class Forgetful(Local):
        def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
            asked.append(sorted(packets))
            for client, packet in super().ask(packets):
                forgets = packet and (len(asked) == 1 and client in ("ada", "cyd"))
                yield client, HOSTILE["missing groups"](packet) if packet and forgets else packet

    network = Forgetful(dict.fromkeys(setting.federation.clients, setting.worker))
    found = run_round(RoundCall(setting.federation, setting.state, {}, 1), network)
    assert asked == [["ada", "ben", "cyd", "dot"], ["ada", "cyd"]]
    assert found.dropped == {}
    assert equal(found.state, wanted.state)
    assert found.traffic.down > wanted.traffic.down


def test_every_reply_is_observed(setup: Callable[..., Setting]) -> None:
    setting = setup()
    seen: list[str] = []
    network = setting.network(tamper={"ben": HOSTILE["silence"]})
    run_round(
        RoundCall(setting.federation, setting.state, {}, 1),
        network,
        events=RoundEvents(on_reply=seen.append),
    )
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
    assert found.traffic.up == found.traffic.down == 4 * (A_BYTES + B_BYTES)
    assert 0 < found.traffic.framing_up < 4 * 4096
    assert 0 < found.traffic.framing_down < 4 * 8192


def test_cached_groups_travel_once_to_each_client(setup: Callable[..., Setting]) -> None:
    setting = setup(strategy="ffa_lora", cohort=2)
    state: Payload = setting.state
    held: Mapping[str, frozenset[str]] = {}
    known: set[str] = set()
    for round in range(1, 7):
        found = run_round(RoundCall(setting.federation, state, held, round), setting.network())
        new = set(found.num_examples) - known
        assert found.traffic.down == 2 * B_BYTES + len(new) * A_BYTES
        assert found.traffic.up == 2 * B_BYTES
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
    second = run_round(RoundCall(setting.federation, first.state, first.held, 2), network)
    assert second.traffic.down == 5 * B_BYTES + A_BYTES  # ben is asked twice, then with everything
    assert second.dropped == {}
    third = run_round(RoundCall(setting.federation, second.state, second.held, 3), network)
    assert (third.traffic.down, third.dropped) == (4 * B_BYTES, {})


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
    assert found.traffic.up == 2 * (A_BYTES + B_BYTES) + 2 * 2 * (A_BYTES + B_BYTES)
    assert {t.shape[0] for n, t in found.state["block-000001"].items() if n.endswith("A")} == {12}


class Counting(Network):
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
    strategy = build_strategy(config)
    state = strategy.init(FRESH, 0)
    return Federation("ab" * 16, config, strategy, network.clients(), lambda spec: FRESH), state


def test_a_thousand_clients_in_one_round() -> None:
    network = Counting()
    federation, state = crowd(network, cohort=1000)
    found = run_round(RoundCall(federation, state, {}, 1), network)
    weights = {i: 1 + i % 7 for i in range(1000)}
    mean = sum(i * w for i, w in weights.items()) / sum(weights.values())
    assert len(found.num_examples) == 1000
    assert sum(found.num_examples.values()) == sum(weights.values())
    for tensor in found.state["adapter"].values():
        assert tensor.flatten().tolist() == pytest.approx([mean] * tensor.numel(), rel=1e-6)
    assert found.traffic.up == found.traffic.down == 1000 * 4 * (3 + 2)


def test_few_of_a_thousand_clients() -> None:
    network = Counting()
    federation, state = crowd(network, cohort=10)
    for round in range(1, 6):
        found = run_round(RoundCall(federation, state, {}, round), network)
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
    found = run_round(RoundCall(federation, state, {}, 1), network).metrics
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
    found = run_round(RoundCall(federation, state, {}, 1), network)
    assert len(found.num_examples) == 6
    assert all(math.isfinite(value) for value in found.metrics.values())


# Logs of seeded steps: who holds what, and what it is sent

POOL: dict[str, Any] = {"strategy": "seed_pool", "options": {"size": 8}}


@dataclass
class Watching(Local):
    """Writes down which rows each client was sent, and which model it then had."""

    logs: dict[str, Log] = field(default_factory=dict)
    sent: dict[str, Payload] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for client, packet in packets.items():
            task = unpack_task(packet)
            assert task.log is not None
            self.logs[client], self.sent[client] = task.log, messages.content(task)
            worker = self.workers[client]
            reply = unpack_reply(worker(client, pack_task(replace(task, kind=Kind.EVALUATE))), 0)
            if not reply.error:
                self.models[client] = tree.digest(worker.model.read())
            yield client, worker(client, packet)


def test_each_client_gets_the_rows_it_missed_and_reaches_the_servers_model(
    setup: Callable[..., Setting], tmp_path: Path
) -> None:
    """Who was asked in round r holds r - 1 rows; in round n it gets n - r, a newcomer n - 1."""
    setting = setup(cohort=2, **POOL)
    devices = {c: setting.device(tmp_path / c) for c in setting.federation.clients}
    state, held = setting.state, {}  # type: Payload, Mapping[str, frozenset[str]]
    asked: dict[str, int] = {}
    missed = set()
    for round in range(1, 10):
        server, network = setting.shown(state), Watching(devices)
        found = run_round(RoundCall(setting.federation, state, held, round), network)
        down = 0
        for client, log in network.logs.items():
            count = round - asked.get(client, 1)
            rows = list(seedlog.rows(state).values())[round - 1 - count :]
            assert log.number == round - 1
            assert [tree.digest(row) for row in log.rows] == [tree.digest(row) for row in rows]
            assert network.sent[client] == {}
            assert network.models[client] == server
            down += sum(scalar_groups.scalar_bytes(row) for row in rows)
            missed.add(count)
            asked[client] = round
        assert (found.traffic.down, found.dropped) == (down, {})
        state, held = found.state, found.held
    assert asked.keys() == setting.federation.clients.keys()
    assert {0, 1, 2} <= missed
    assert max(missed) >= 3


def test_who_is_not_believed_to_follow_gets_all_rows(
    setup: Callable[..., Setting], tmp_path: Path
) -> None:
    setting = setup(**POOL)
    devices = {c: setting.device(tmp_path / c) for c in setting.federation.clients}
    first = run_round(RoundCall(setting.federation, setting.state, {}, 1), Local(devices))
    second = run_round(
        RoundCall(setting.federation, first.state, first.held, 2),
        Local(devices, tamper={"ben": HOSTILE["silence"]}),
    )
    assert set(second.held) == {"ada", "cyd", "dot"}
    network = Watching(devices)
    third = run_round(RoundCall(setting.federation, second.state, second.held, 3), network)
    assert {c: len(log.rows) for c, log in network.logs.items()} == {
        "ada": 1,
        "ben": 2,
        "cyd": 1,
        "dot": 1,
    }
    assert third.dropped == {}


def dense_then_sparse(setting: Setting) -> tuple[Payload, list[str]]:
    """A log whose first row is larger than the adapter and whose second is small; versions."""
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few = torch.zeros(4096, dtype=torch.float64)
    few[100:103] = 0.01
    rows = [seedlog.row(0.001 * noise, torch.float16), seedlog.row(few, torch.float16)]
    state = {**setting.state, row_name(1): rows[0], row_name(2): rows[1]}
    return state, seedlog.versions(setting.federation.origin, rows)


def test_a_newcomer_gets_the_weights_where_these_are_fewer_bytes(
    setup: Callable[..., Setting], tmp_path: Path
) -> None:
    setting = setup(strategy="seed_pool", options={"size": 4096})
    state, versions = dense_then_sparse(setting)
    devices = {c: setting.device(tmp_path / c) for c in setting.federation.clients}
    followers = ("ada", "cyd", "dot")
    for client in followers:
        devices[client].memory.extend(versions[0], list(seedlog.rows(state).values())[:1])
    held = {c: frozenset([versions[1]]) for c in followers}
    server, network = setting.shown(state), Watching(devices)
    found = run_round(RoundCall(setting.federation, state, held, 3), network)
    assert (found.dropped, set(network.models.values())) == ({}, {server})
    assert {c: len(log.rows) for c, log in network.logs.items()} == {
        "ada": 1,
        "ben": 0,
        "cyd": 1,
        "dot": 1,
    }
    assert network.logs["ben"].since == network.logs["ben"].version == versions[2]
    assert {c: sorted(sent) for c, sent in network.sent.items() if sent} == {"ben": ["start"]}
    # Three values of 2 bytes, the first direction in 1 byte (100), the next two in 1, the step.
    assert found.traffic.down == A_BYTES + B_BYTES + 3 * (3 * 2 + 3 + 4)
    again = Watching(devices)
    server = setting.shown(found.state)
    then = run_round(RoundCall(setting.federation, found.state, found.held, 4), again)
    assert (then.dropped, set(again.models.values())) == ({}, {server})
    assert {len(log.rows) for log in again.logs.values()} == {1}
    assert all(not sent for sent in again.sent.values())


def test_rows_larger_than_the_weights_are_never_sent(setup: Callable[..., Setting]) -> None:
    """Also to who follows: one row of 4096 values is more than this adapter."""
    setting = setup(strategy="seed_pool", options={"size": 4096})
    state, versions = dense_then_sparse(setting)
    before: Payload = {g: p for g, p in state.items() if g != row_name(2)}
    held = {c: frozenset([versions[0]]) for c in setting.federation.clients}
    network = Watching(dict.fromkeys(setting.federation.clients, setting.worker))
    server = setting.shown(before)
    found = run_round(RoundCall(setting.federation, before, held, 2), network)
    assert found.traffic.down == 4 * (A_BYTES + B_BYTES)
    assert set(network.models.values()) == {server}


def test_a_client_that_lost_its_log_is_sent_everything(
    setup: Callable[..., Setting], tmp_path: Path
) -> None:
    setting = setup(**POOL)
    devices = {c: setting.device(tmp_path / c) for c in setting.federation.clients}
    state, held = setting.state, {}  # type: Payload, Mapping[str, frozenset[str]]
    for round in (1, 2):
        found = run_round(RoundCall(setting.federation, state, held, round), Local(devices))
        state, held = found.state, found.held
    devices["ben"] = setting.device(tmp_path / "new device")
    server, network = setting.shown(state), Watching(devices)
    third = run_round(RoundCall(setting.federation, state, held, 3), network)
    one, two = (scalar_groups.scalar_bytes(row) for row in seedlog.rows(state).values())
    assert third.dropped == {}
    assert third.traffic.down == 4 * two + (one + two)  # ben is asked twice, then with everything
    assert set(network.models.values()) == {server}
    fourth = run_round(RoundCall(setting.federation, third.state, third.held, 4), Watching(devices))
    last = list(seedlog.rows(third.state).values())[-1]
    assert (fourth.traffic.down, fourth.dropped) == (4 * scalar_groups.scalar_bytes(last), {})


def test_a_device_with_another_base_model_takes_no_part(
    setup: Callable[..., Setting], tmp_path: Path
) -> None:
    setting = setup(**POOL)
    other = LoraModel(pretrained.load(setting.federation.config))
    with torch.no_grad():
        other.base.model.get_output_embeddings().weight[5] += 0.1
    other.base = replace(other.base, fingerprint=pretrained.fingerprint(other.base.model))
    odd = Worker(setting.worker.config, other, setting.worker.data, Memory(tmp_path / "odd"))
    workers = {**dict.fromkeys(setting.federation.clients, setting.worker), "ben": odd}
    found = run_round(RoundCall(setting.federation, setting.state, {}, 1), Local(workers))
    assert set(found.num_examples) == {"ada", "cyd", "dot"}
    assert "another base model" in found.dropped["ben"]


# Broadcasts made for a rank, and what devices keep


@dataclass
class Spy(Local):
    """Notes the task and the settings of each client in the round."""

    tasks: dict[str, Task] = field(default_factory=dict)

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        self.tasks |= {client: unpack_task(packet) for client, packet in packets.items()}
        return super().ask(packets)

    def said(self, key: str) -> dict[str, Any]:
        return {client: json.loads(task.config)[key] for client, task in self.tasks.items()}


@pytest.mark.parametrize("strategy", ["flexlora", "hetlora"])
def test_each_client_receives_what_is_made_for_its_rank(
    setup: Callable[..., Setting], strategy: str
) -> None:
    """Bytes in proportion to the rank, up and down; the global adapter has the largest."""
    ranks = {"ada": 1, "ben": 4, "cyd": 2, "dot": 1}
    start = setup(strategy=strategy, ranks=[1, 4, 2], alphas=[3.0, 2.0, 8.0])
    clients = start.federation.clients
    spy = Spy(dict.fromkeys(clients, start.worker))
    result = run_round(RoundCall(start.federation, start.state, {}, 1), spy)
    assert result.dropped == {}
    one = (A_BYTES + B_BYTES) // 2
    for client, task in spy.tasks.items():
        adapter = codec.decode(task.payload)["adapter"]
        assert {min(tensor.shape) for tensor in adapter.values()} == {ranks[client]}
        assert codec.content_bytes({"adapter": adapter}) == one * ranks[client]
    assert result.traffic.down == result.traffic.up == one * sum(ranks.values())
    assert (result.cost.down, result.cost.up) == (result.traffic.down, result.traffic.up)
    assert start.federation.config.lora.rank == 4
    assert spy.said("lora")["cyd"] == {"rank": 2, "alpha": 8.0, "rslora": False}


SCAFFOLD = {"strategy": "scaffold", "optimizer": "sgd", "lr": 0.3}


def test_a_device_is_told_which_of_its_updates_was_accepted_last(
    setup: Callable[..., Setting],
) -> None:
    """Ben is hostile in round 2: what it staged then must not count in round 3."""
    start = setup(**SCAFFOLD)
    workers = dict.fromkeys(start.federation.clients, start.worker)
    state, accepted, kept = start.state, [], []
    held: Held = {}
    for round in (1, 2, 3, 4):
        spy = Spy(workers, {"ben": changed(num_examples=10**9)} if round == 2 else {})
        result = run_round(RoundCall(start.federation, state, held, round), spy)
        assert result.dropped.keys() == ({"ben"} if round == 2 else set())
        state, held = result.state, result.held
        accepted.append(spy.said("accepted"))
        memory = start.worker.memory
        own = {c: memory.kept(c, 1 if c == "ben" and round == 2 else round) for c in workers}
        kept.append({c: tree.digest(groups["control"]) for c, groups in own.items()})
        assert set(spy.said("population").values()) == {4}
    assert [told["ben"] for told in accepted] == [0, 1, 1, 3]
    assert [told["ada"] for told in accepted] == [0, 1, 2, 3]
    assert kept[1]["ben"] == kept[0]["ben"]
    assert len({own["ben"] for own in kept}) == 3
    assert len({own["ada"] for own in kept}) == 4


def test_a_device_that_lost_what_it_kept_is_dropped_and_says_so(
    setup: Callable[..., Setting],
) -> None:
    """Its control variate would no longer be in the server's."""
    start = setup(**SCAFFOLD)
    result = start.run(1)
    memory = start.worker.memory
    for path in memory.kept_folder("cyd").iterdir():
        path.unlink()
    after = run_round(RoundCall(start.federation, result.state, result.held, 2), start.network())
    assert after.dropped == {"cyd": "what this device kept of round 1 is lost"}
    assert after.held["cyd"] == {"accepted-1"}


def test_the_servers_memory_goes_through_a_round(setup: Callable[..., Setting]) -> None:
    start = setup()
    memory = {"weights": {"ada": torch.tensor([1.0])}}
    result = run_round(
        RoundCall(start.federation, start.state, {}, 1, memory=memory), start.network()
    )
    assert equal(result.memory, memory)
    assert start.run(1).memory == {}


# Classes of clients

PHONES: dict[str, Any] = {
    "strategy": "mixed",
    "options": {"size": 8},
    "classes": {
        "server": {"trainer": "first_order", "local_steps": 1, "batch_size": 2},
        "phone": {
            "trainer": "zeroth_order",
            **{"share": 2, "local_steps": 3, "queries": 2, "batch_size": 1},
        },
    },
}


def test_clients_take_classes_in_turn_by_their_shares(setup: Callable[..., Setting]) -> None:
    federation = setup(**PHONES).federation
    found = {c: federation.class_of(c) for c in ("ada", "ben", "cyd", "dot")}
    assert found == {"ada": "server", "ben": "phone", "cyd": "phone", "dot": "server"}
    assert setup().federation.class_of("ada") == ""


def test_size_and_examples_are_those_of_a_clients_class(setup: Callable[..., Setting]) -> None:
    federation = setup(**PHONES).federation
    a, b = A_BYTES // 4, B_BYTES // 4
    ada, ben = federation.size("ada", 2), federation.size("ben", 2)
    step = torch.tensor(-KINDS["lora"].zeroth_order.other / 2).item()  # of the class, over queries
    assert ben == Size(a, b, 0, 6, "zeroth_order", ben.seed, step, 2, rank=2, modules=7)
    own = Size(a, b, 0, 1, "first_order", ada.seed, torch.tensor(-0.01).item(), 2, 2, modules=7)
    assert ada == own
    seeded = [federation.size(c, round).seed for c in ("ada", "ben") for round in (1, 2)]
    assert len(set(seeded)) == 4
    assert [expectations.most_examples(federation, c) for c in federation.clients] == [2, 3, 3, 2]
    # without classes: two steps of three, of 4, 7, 10 and 5 examples
    plain = setup().federation
    assert [expectations.most_examples(plain, c) for c in plain.clients] == [4, 6, 6, 5]


def test_a_round_of_two_classes(setup: Callable[..., Setting]) -> None:
    setting = setup(**PHONES)
    sent: dict[str, Reply] = {}

    def keep(packet: Packet) -> Packet:
        reply = unpack_reply(packet, 1 << 30)
        sent[reply.client] = reply
        return packet

    found = setting.run(tamper=dict.fromkeys(setting.federation.clients, keep))
    assert found.num_examples == {"ada": 2, "ben": 3, "cyd": 3, "dot": 2}
    assert {c: r.metrics["local_steps"] for c, r in sent.items()} == {
        "ada": 1.0,
        "ben": 3.0,
        "cyd": 3.0,
        "dot": 1.0,
    }
    assert found.metrics["local_steps"] == 8.0
    assert found.metrics["scalars"] == 12.0
    # 6 scalars, the seed and the step of a phone; 16 bytes of key with each adapter
    assert found.traffic.up == 2 * (A_BYTES + B_BYTES) + 2 * (6 * 4 + 8)
    assert found.traffic.down == 4 * (A_BYTES + B_BYTES + 16)
    assert found.metrics["zeroth_order_share"] == pytest.approx(0.6)  # 6 of 10 examples


def test_a_client_cannot_answer_for_another_class(setup: Callable[..., Setting]) -> None:
    setting = setup(**PHONES)
    name, tensor = min(setting.state["adapter"].items())
    dense = codec.encode({"adapter": {name: tensor[:1]}})  # all of it would be too large to read
    tamper = {"ben": changed(scalars={}, payload=dense)}
    found = setting.run(tamper=tamper)
    assert set(found.dropped) == {"ben"}
    assert "update has groups ['adapter'], expected ['scalars']" in found.dropped["ben"]
    more = setting.run(tamper={"cyd": changed(num_examples=4), "dot": changed(num_examples=3)})
    assert set(more.dropped) == {"cyd", "dot"}
    assert all("more than it can have" in why for why in more.dropped.values())


# What a round costs


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "fedavg"},
        {"strategy": "ffa_lora"},
        {"strategy": "lisa", "options": {"layers": 1}},
        {"strategy": "flora", "ranks": [2, 4]},
        POOL,
        {"strategy": "fedkseed", "options": {"size": 8}},
        {"strategy": "fedkseed_pro", "options": {"size": 8}},
        {"strategy": "fedmezo"},
        {"strategy": "ferret", "options": {"size": 8}},
        PHONES,
    ],
    ids=lambda changes: str(changes["strategy"]),
)
def test_the_cost_of_a_round_is_its_traffic(
    setup: Callable[..., Setting], changes: dict[str, Any]
) -> None:
    """Once everybody has all that is sent once, and nobody missed a round."""
    setting = setup(**changes)
    first = setting.run()
    found = run_round(RoundCall(setting.federation, first.state, first.held, 2), setting.network())
    assert found.dropped == {}
    assert found.cost.up == found.traffic.up > 0
    if found.cost.at_most:
        assert 0 < found.traffic.down <= found.cost.down
    else:
        assert found.cost.down == found.traffic.down > 0


def test_the_cost_of_a_round_counts_who_answered(setup: Callable[..., Setting]) -> None:
    found = setup().run(tamper={"ben": HOSTILE["silence"]})
    assert (found.cost.up, found.traffic.up) == (3 * (A_BYTES + B_BYTES),) * 2


# Scalars from clients nobody trusts


def grouped(change: Callable[[dict[str, torch.Tensor]], None], *names: str) -> Tamper:
    """An honest answer whose scalar group is changed, under these names."""

    def tamper(packet: Packet) -> Packet:
        reply = unpack_reply(packet, 1 << 30)
        group = dict(reply.scalars["scalars"])
        change(group)
        return pack_reply(replace(reply, scalars=dict.fromkeys(names or ("scalars",), group)))

    return tamper


def scalars(**functions: Callable[[torch.Tensor], torch.Tensor]) -> Tamper:
    """An honest answer with functions of some tensors of its scalar group."""
    return grouped(lambda g: g.update({n: function(g[n]) for n, function in functions.items()}))


def resized(take: Callable[[torch.Tensor], torch.Tensor]) -> Tamper:
    """An honest answer with fewer or more scalars, and directions where there are any."""
    return grouped(lambda g: g.update({n: take(t) for n, t in g.items() if t.dim()}))


HOSTILE_SCALARS: dict[str, Tamper] = {
    "nan": scalars(scalars=lambda t: t * math.nan),
    "inf": scalars(scalars=lambda t: t * math.inf),
    "too few": resized(lambda t: t[:1]),
    "too many": resized(lambda t: torch.cat([t, t])),
    "none": resized(lambda t: t[:0]),
    "other type": scalars(scalars=lambda t: t.half() if t.dtype == torch.float32 else t.float()),
    "twice the step": scalars(step=lambda t: 2 * t),
    "against the step": scalars(step=lambda t: -t),
    "huge step": scalars(step=lambda t: torch.full_like(t, 1e30)),
    "no step": grouped(lambda g: g.__delitem__("step")),
    "other group": grouped(lambda g: None, "other"),
    "two groups": grouped(lambda g: None, "scalars", "more"),
    "no group": changed(scalars={}),
    "tensors instead": changed(scalars={}, payload=codec.encode({"scalars": {"x": torch.ones(2)}})),
    "both": changed(payload=codec.encode({"scalars": {"x": torch.ones(2)}})),
}
SEEDED = {
    **HOSTILE_SCALARS,
    "directions of its choice": scalars(seed=lambda t: t ^ 1),
    "no seed": grouped(lambda g: g.__delitem__("seed")),
    "directions too": grouped(lambda g: g.update(directions=torch.zeros(2, dtype=torch.int32))),
}
DIRECTED = {
    **HOSTILE_SCALARS,
    "huge": scalars(scalars=lambda t: torch.full_like(t, 3e38)),
    "no directions": grouped(lambda g: g.__delitem__("directions")),
    "direction beyond the pool": scalars(directions=lambda t: torch.full_like(t, 8)),
    "a seed": grouped(lambda g: g.update(seed=torch.tensor(3))),
}


@pytest.mark.parametrize(
    ("strategy", "attack"),
    [
        *(("seed_pool", attack) for attack in SEEDED),
        *(("fedkseed", attack) for attack in DIRECTED),
        *(("fedkseed_pro", attack) for attack in DIRECTED),
    ],
)
def test_hostile_scalars_cost_their_sender_the_round_and_nobody_else(
    setup: Callable[..., Setting], strategy: str, attack: str
) -> None:
    setting = setup(strategy=strategy, options={"size": 8})
    tamper = (SEEDED if strategy == "seed_pool" else DIRECTED)[attack]
    found = setting.run(tamper={"cyd": tamper})
    assert set(found.num_examples) == {"ada", "ben", "dot"}
    assert set(found.dropped) == {"cyd"}
    wanted = setting.run(tamper={"cyd": lambda packet: None})
    assert equal(found.state, wanted.state)
    assert found.metrics == wanted.metrics
    assert found.traffic.up == wanted.traffic.up


def test_evaluation_collects_what_clients_measure(setup: Callable[..., Setting]) -> None:
    setting = setup()
    found = evaluate_clients(RoundCall(setting.federation, setting.state, {}, 0), setting.network())
    assert set(found) == {"ada", "ben", "cyd", "dot"}
    assert all(scores["examples"] == 1 for scores in found.values())
    assert all(math.isfinite(scores["loss"]) for scores in found.values())


def test_evaluation_asks_no_more_than_it_may(setup: Callable[..., Setting]) -> None:
    for most in (0, 2):
        setting = setup(eval_clients=most)
        found = evaluate_clients(
            RoundCall(setting.federation, setting.state, {}, 0), setting.network()
        )
        assert len(found) == most


def test_a_hostile_reply_to_an_evaluation_costs_its_score_alone(
    setup: Callable[..., Setting],
) -> None:
    setting = setup()
    honest = evaluate_clients(
        RoundCall(setting.federation, setting.state, {}, 1), setting.network()
    )
    attacks = [
        a for a in HOSTILE if "payload" in a or "header" in a or a.startswith(("no", "other"))
    ]
    for attack in (*attacks, "silence", "error", "old round", "a thousand metrics"):
        network = setting.network(tamper={"cyd": HOSTILE[attack]})
        found = evaluate_clients(RoundCall(setting.federation, setting.state, {}, 1), network)
        for client in ("ada", "ben", "dot"):
            assert found[client] == honest[client], attack
