"""Whatever the bytes are: no exception escapes, no bound is broken, memory is bounded.

experiments/bench/fuzz.py does the same a hundred thousand times.
"""

import math
import random
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.errors import WireError
from corolla.phones import protocol
from corolla.proto import device_pb2, update_pb2
from corolla.server.gateway.access import Token
from corolla.server.gateway.gateway import Gateway
from corolla.server.gateway.settings import GatewaySettings
from corolla.server.rounds import expectations
from corolla.server.rounds.federation import Federation
from corolla.server.rounds.gate import judge, most_bytes
from corolla.server.rounds.tasks import Traffic, make_tasks
from corolla.server.rounds.verdicts import Code
from corolla.wire import codec
from corolla.wire.messages import Kind, Reply, pack_reply, pack_task, unpack_task
from corolla.wire.packet import Packet
from experiments.bench import mutations
from experiments.bench.fuzz_targets import devices, mutate, readers, targets
from tests.server.rounds.lying import FRESH, HONEST, LENGTH, Server, update

TARGETS = {target.name: target for target in targets()}
READERS = readers()

Small = dict[str, Any]

randoms = st.randoms(use_true_random=False)


@pytest.mark.parametrize("name", TARGETS)
def test_an_unchanged_reply_is_accepted_within_the_bound(name: str) -> None:
    target = TARGETS[name]
    judged, moved = target.examine(target.honest)
    assert judged.verdict.accepted
    assert 0 < moved <= 1


@pytest.mark.parametrize("name", TARGETS)
@given(randoms)
def test_a_mutated_reply_has_a_verdict_and_moves_the_model_within_the_bound(
    name: str, rng: random.Random
) -> None:
    target = TARGETS[name]
    _, moved = target.examine(mutate(rng, target))
    assert moved <= 1 + 1e-5


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=50)
@given(st.binary(max_size=300), st.binary(max_size=300), st.booleans())
def test_any_bytes_have_a_verdict(name: str, header: bytes, body: bytes, sealed: bool) -> None:
    target = TARGETS[name]
    if sealed:
        header = mutations.sealed(header, body, mutations.REPLY)
    assert not target.examine(Packet(header, body))[0].verdict.accepted
    judged, _ = target.examine(Packet(target.honest.header, body))
    assert judged.verdict.accepted == (body == target.honest.payload)


def test_mutations_reach_every_verdict_that_bytes_can_have() -> None:
    """Or the tests above would prove little."""
    seen: set[Code] = set()
    for number in range(1500):
        rng = random.Random(f"verdicts {number}")
        target = rng.choice(list(TARGETS.values()))
        seen.add(target.examine(mutate(rng, target))[0].verdict.code)
    assert seen == set(Code) - {Code.NO_ANSWER, Code.LATE, Code.BUDGET}


def test_memory_is_bounded_by_what_an_honest_reply_needs() -> None:
    for name, target in TARGETS.items():
        packets = [mutate(random.Random(f"memory {n}"), target) for n in range(20)]
        tracemalloc.start()
        for packet in packets:
            target.examine(packet)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 12 * most_bytes(target.expect) + (8 << 20), name


@pytest.mark.parametrize("strategy", ["fedavg", "flora"])
@settings(max_examples=50)
@given(randoms)
def test_a_mutated_reply_neither_ends_a_round_nor_moves_it_beyond_its_bound(
    strategy: str, rng: random.Random
) -> None:
    server = Server(strategy, {"max_norm": LENGTH})
    before = server.state
    found = server.step(cyd=lambda packet: [mutations.reply(rng, packet)])
    assert {c for c in HONEST if found.verdicts[c].code == Code.ACCEPTED} == HONEST
    assert math.sqrt(sum(float(np.square(part).sum()) for part in server.dense())) <= LENGTH
    for group, params in before.items():
        after = server.state[group]
        assert {n: (t.shape, t.dtype) for n, t in after.items()} == {
            n: (t.shape, t.dtype) for n, t in params.items()
        }


@pytest.mark.parametrize("name", READERS)
@given(randoms)
def test_a_mutated_message_is_read_or_refused_in_one_line(name: str, rng: random.Random) -> None:
    data, change, read = READERS[name]
    for mutated in (change(rng, data), mutations.raw(rng, data)):
        try:
            read(mutated)
        except WireError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", READERS)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(name: str, data: bytes) -> None:
    with suppress(WireError):
        READERS[name][2](data)


@pytest.fixture
def small(settings: Callable[..., RunConfig]) -> Small:
    """Settings of devices on a tiny model."""
    return settings(local_steps=1).model_dump(exclude_unset=True)


def test_a_device_survives_mutated_tasks(small: Small, tmp_path: Path) -> None:
    """It answers each, or refuses it, and then still does the true one bit for bit."""
    for name, device in devices(tmp_path, **small).items():
        said = {
            device.examine(mutations.task(random.Random(f"{name} {number}"), device.task))
            for number in range(60)
        }
        assert {"refused", "error", "done"} <= said
        assert device.worker(device.client, device.task) == device.reply


def test_nesting_and_numbers_that_no_server_sends_get_one_line(
    small: Small, tmp_path: Path
) -> None:
    device = devices(tmp_path, **small)["dense"]
    huge = '{"rank": 2, "alpha": 1' + "0" * 400 + ', "rslora": false}'
    for config in (
        "[" * 100_000,
        '{"lora":' * 5000,
        "1" * 5000,
        "5",
        "null",
        f'{{"lora": {huge}}}',
    ):
        head = mutations.TASK.FromString(device.task.header)
        head.config = config
        assert device.examine(Packet(head.SerializeToString(), device.task.payload)) == "error"


def test_mutated_calls_of_a_phone_end_neither_a_gateway_nor_its_round(tmp_path: Path) -> None:
    """What it sends up in the end passes the server's gate, whoever's update it is."""
    config = RunConfig(strategy="fedavg", rank=2, local_steps=1, batch_size=8, max_norm=LENGTH)
    fedavg, seats = build_strategy(config), {"gate": 1}
    federation = Federation("ab" * 16, config, fedavg, {"gate": 9}, lambda spec: FRESH, seats=seats)
    asked = make_tasks(federation, fedavg.init(FRESH, 0), {}, 1, Kind.TRAIN, seats, Traffic())
    gateway = Gateway(GatewaySettings("gate", tmp_path, retry=0.01, over_select=2.0))
    given: list[Packet] = []
    ask = pack_task(asked["gate"])
    serving = Thread(target=lambda: given.append(gateway.answer(ask)), daemon=True)
    serving.start()
    anyone = Token("all", "", "secret")

    def leased(phone: str) -> device_pb2.Lease:
        able = update_pb2.Capabilities(charging=True, idle=True, battery_percent=100)
        request = device_pb2.CheckInRequest(
            protocol=protocol.PROTOCOL,
            device=phone,
            num_examples=5,
            capabilities=able,
            own_model=True,
        )
        for _ in range(1000):
            answer = gateway.check_ins.answer(request, anyone)
            if answer.HasField("lease"):
                return answer.lease
            time.sleep(0.01)
        raise AssertionError(answer)

    def made(lease: device_pb2.Lease) -> Packet:
        task = unpack_task(Packet(lease.task.inline, asked["gate"].payload))
        echo = (task.run_id, task.round, task.base_version, task.kind)
        data = codec.encode(update("fedavg", "ada", 1))
        return pack_reply(Reply(*echo, lease.client, 5, {}, data))

    bad, good = leased("p1"), leased("p2")
    for number in range(300):
        rng = random.Random(f"gateway {number}")
        reply = mutations.reply(rng, made(bad))
        chunk = protocol.chunk(reply.payload, 0, len(reply.payload), bad.id)
        report = device_pb2.ReportRequest(lease=bad.id, reply=reply.header)
        beat = device_pb2.HeartbeatRequest(lease=bad.id)
        wish = device_pb2.DownloadRequest(sha256=bad.payload.sha256)
        hello = device_pb2.CheckInRequest(protocol=protocol.PROTOCOL, device="p1", num_examples=5)
        sent: list[tuple[Any, Callable[[Any, Token], object]]] = [
            (chunk, gateway.deliveries.upload),
            (report, gateway.deliveries.report),
            (beat, gateway.deliveries.heartbeat),
            (hello, gateway.check_ins.answer),
            (wish, lambda request, token: gateway.blobs.chunk(request.sha256, request.offset)),
        ]
        for message, call in sent:
            kind = type(message)
            data = mutations.message(rng, message.SerializeToString(), kind)
            with suppress(WireError, PermissionError, KeyError, DecodeError):
                call(kind.FromString(data), anyone)
        if given:
            break
    if not given:
        reply = made(good)
        chunk = protocol.chunk(reply.payload, 0, len(reply.payload), good.id)
        gateway.deliveries.upload(chunk, anyone)
        report = device_pb2.ReportRequest(lease=good.id, reply=reply.header)
        told = gateway.deliveries.report(report, anyone)
        assert told.accepted, told.why
    serving.join(60)
    expected = expectations.expected(federation, "gate", Kind.TRAIN, 1, 1)
    judged = judge(given[0], "gate", asked["gate"], expected)
    assert judged.verdict.accepted, judged.verdict
