"""A gateway between a real server's rounds and real phones' calls, over TLS on loopback."""

import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import torch

from corolla.client.training.worker import Worker
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import device_pb2_grpc, update_pb2
from corolla.server.gateway import outbound
from corolla.server.gateway.access import Token
from corolla.server.gateway.gateway import Gateway
from corolla.server.gateway.gateway import Settings as GatewaySettings
from corolla.server.gateway.job import Job
from corolla.server.gateway.merging import prepare
from corolla.storage.memory import Memory
from corolla.tensors import tree
from corolla.wire import limits, messages
from corolla.wire.messages import Kind, Reply, Task
from corolla.wire.packet import Packet
from corolla.wire.rpc import Waits
from tests.server.gateway import gateways
from tests.server.gateway.gateways import Behind, Flat, Shared, World
from tests.strategies import tiny


@pytest.mark.parametrize("strategy", ["flora", "seed_pool", "fedavg", "fedkseed"])
def test_phones_behind_a_gateway_give_the_bits_of_clients_of_the_same_names(
    strategy: str, tmp_path: Path
) -> None:
    config = tiny.config(strategy, cohort=4, deadline=60.0)
    data = gateways.renamed("gate/")
    flat = gateways.course(
        config,
        Flat(Worker(config, tiny.lora_model("llama"), data, Memory(tmp_path / "flat")), data),
        {},
    )
    shared = Shared(config, data, tmp_path / "memories")
    with gateways.serving(tmp_path) as world:
        trainers = {name: shared.of(f"gate/{name}") for name in tiny.CLIENTS}
        behind = gateways.course(config, Behind(world), {"gate": 4})
        with gateways.phones(world, trainers):
            for _ in range(3):
                expected, found = flat.step(), behind.step()
                assert tree.digest_all(found.state) == tree.digest_all(expected.state)
                assert found.num_examples["gate"] if strategy != "flora" else True
    assert len(shared.asked) == 12


# --- one call after another -----------------------------------------------------------------------

CONFIG = tiny.config("fedavg", rank=1, alpha=1.0, deadline=30.0)
ABLE = update_pb2.Capabilities(charging=True, idle=True)


@dataclass
class Caller:
    """Calls of one device, by hand."""

    world: World
    device: str = "p1"
    token: str = gateways.TOKEN

    def __post_init__(self) -> None:
        self.channel = self.world.channel()
        self.stub: Any = device_pb2_grpc.PhonesStub(self.channel)  # type: ignore[no-untyped-call]

    def call(self, name: str, request: Any) -> Any:
        metadata = (("authorization", f"Bearer {self.token}"),)
        return getattr(self.stub, name)(request, metadata=metadata, timeout=10)

    def check_in(self, **changes: Any) -> pb.CheckInResponse:
        values: dict[str, Any] = {
            "protocol": 1,
            "device": self.device,
            "capabilities": ABLE,
            "num_examples": 5,
        }
        request = pb.CheckInRequest(**{**values, "own_model": True, **changes})
        return cast(pb.CheckInResponse, self.call("CheckIn", request))

    def lease(self, **changes: Any) -> pb.Lease:
        found = self.check_in(**changes)
        assert found.WhichOneof("answer") == "lease", found.refusal.text
        return found.lease

    def upload(self, lease: pb.Lease, payload: bytes, offset: int = 0) -> pb.UploadStatus:
        content = payload[offset : offset + protocol.CHUNK]
        chunk = protocol.chunk(content, offset, len(payload), lease.id)
        return cast(pb.UploadStatus, self.call("Upload", chunk))

    def report(self, lease: pb.Lease, packet: Packet) -> pb.Acknowledgement:
        if packet.payload:
            assert self.upload(lease, packet.payload).problem == ""
        request = pb.ReportRequest(lease=lease.id, reply=packet.header)
        return cast(pb.Acknowledgement, self.call("Report", request))

    def refused(self, name: str, request: Any) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            self.call(name, request)
        return caught.value.code()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with gateways.serving(tmp_path, seats=4) as found:
        yield found


@pytest.fixture
def caller(world: World) -> Iterator[Callable[..., Caller]]:
    with ExitStack() as stack:

        def make(device: str = "p1", token: str = gateways.TOKEN) -> Caller:
            made = Caller(world, device, token)
            stack.enter_context(made.channel)
            return made

        yield make


@contextmanager
def asked(world: World, task: Task) -> Iterator["Future[Reply]"]:
    """A task that is in progress; its reply."""
    packet = messages.pack_task(task)

    def answer() -> Reply:
        found = world.gateway.answer(packet)
        return messages.unpack_reply(found, len(found.payload))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(answer)
        gateways.until(lambda: world.gateway._job or future.done())
        yield future


def sums(reply: Reply) -> float:
    """The one value that all tensors of a partial aggregate hold."""
    found = messages.content(reply)["adapter"]
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}
    values = torch.cat([tensor.flatten() for tensor in found.values()])
    assert bool((values == values[0]).all())
    return float(values[0])


def test_a_partial_aggregate_is_the_weighted_sum_of_what_phones_sent(
    world: World, caller: Callable[..., Caller]
) -> None:
    task = gateways.a_task(CONFIG, seats=2)
    with asked(world, task) as reply:
        for device, value, examples in (("p2", 0.25, 3), ("p1", 2.0, 5)):
            own = caller(device)
            packet = gateways.update_of(task, f"gate/{device}", value, examples)
            assert own.report(own.lease(), packet).accepted
        found = reply.result(10)
    assert (found.clients, found.num_examples, found.error) == (2, 8, "")
    assert not found.bundle
    assert sums(found) == 3 * 0.25 + 5 * 2.0


def test_the_round_ends_with_what_there_is_at_its_deadline(
    world: World, caller: Callable[..., Caller]
) -> None:
    config = CONFIG.model_copy(update={"deadline": 1.5})
    task = gateways.a_task(config, seats=3)
    began = time.monotonic()
    with asked(world, task) as reply:
        own, silent = caller("p1"), caller("p2")
        assert own.report(own.lease(), gateways.update_of(task, "gate/p1")).accepted
        late = silent.lease()
        found = reply.result(10)
        assert 0.8 < time.monotonic() - began < 1.5
        told = silent.report(late, Packet(gateways.update_of(task, "gate/p2").header, b""))
    assert found.clients == 1
    assert not told.accepted
    assert told.why


def test_a_round_without_any_update_is_an_error(world: World) -> None:
    config = CONFIG.model_copy(update={"deadline": 0.6})
    with asked(world, gateways.a_task(config)) as reply:
        found = reply.result(10)
    assert found.error == "none of 0 phones gave a valid update in time"


def test_the_seat_of_a_phone_that_vanished_goes_to_another(
    tmp_path: Path,
) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    with gateways.serving(tmp_path, seats=1, lease=0.4, over_select=1.0) as world:
        first, second = Caller(world, "p1"), Caller(world, "p2")
        with first.channel, second.channel, asked(world, task) as reply:
            gone = first.lease()
            assert second.check_in().refusal.text == "enough devices have been chosen"
            gateways.until(lambda: second.check_in().WhichOneof("answer") == "lease", 2)
            packet = gateways.update_of(task, "gate/p2")
            assert second.report(second.lease(), packet).accepted
            assert reply.result(10).clients == 1
            told = first.report(gone, Packet(packet.header, b""))
            assert not told.accepted


def test_a_report_is_answered_alike_and_counted_once(
    world: World, caller: Callable[..., Caller]
) -> None:
    task = gateways.a_task(CONFIG, seats=2)
    own, other = caller("p1"), caller("p2")
    with asked(world, task) as reply:
        lease = own.lease()
        packet = gateways.update_of(task, "gate/p1", 1.0, 2)
        request = pb.ReportRequest(lease=lease.id, reply=packet.header)
        own.report(lease, packet)
        assert [own.call("Report", request).accepted for _ in range(3)] == [True] * 3
        assert own.check_in().refusal.text == "asked already in this round"
        bad = gateways.update_of(task, "gate/p2", math.inf)
        theirs = other.lease()
        first = other.report(theirs, bad)
        again = other.call("Report", pb.ReportRequest(lease=theirs.id, reply=bad.header))
        assert (first.accepted, first.why) == (again.accepted, again.why)
        third = caller("p3")
        assert third.report(third.lease(), gateways.update_of(task, "gate/p3", 3.0, 1)).accepted
        found = reply.result(10)
    assert (found.clients, found.num_examples, sums(found)) == (2, 3, 5.0)
    assert own.call("Report", request).accepted  # also when the round is over
    assert not other.call("Report", pb.ReportRequest(lease=theirs.id, reply=bad.header)).accepted


HOSTILE: dict[str, tuple[Callable[[Task], Packet], str]] = {
    "garbage": (lambda task: Packet(b"\xff" * 50, b""), "parsed"),
    "nothing": (lambda task: Packet(b"", b""), "schema"),
    "not finite": (lambda task: gateways.update_of(task, "gate/p1", math.nan), "finite"),
    "huge": (lambda task: gateways.update_of(task, "gate/p1", 1e30), "beyond"),
    "too heavy": (lambda task: gateways.update_of(task, "gate/p1", examples=6), "examples"),
    "weightless": (lambda task: gateways.update_of(task, "gate/p1", examples=0), "examples"),
    "another phone's": (lambda task: gateways.update_of(task, "gate/p2"), "client"),
    "of another round": (
        lambda task: gateways.update_of(replace(task, round=7), "gate/p1"),
        "stale",
    ),
    "cut short": (
        lambda task: Packet(gateways.update_of(task, "gate/p1").header, b"12345678"),
        "bytes",
    ),
    "a gateway's own": (
        lambda task: messages.pack_reply(
            Reply(
                *(task.run_id, task.round, task.base_version, task.kind, "gate/p1"),
                num_examples=3,
                clients=3,
                payload=gateways.update_of(task, "gate/p1").payload,
            )
        ),
        "gateway",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_is_refused_and_does_not_touch_the_sum(
    name: str, world: World, caller: Callable[..., Caller]
) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    bad, good = caller("p1"), caller("p2")
    with asked(world, task) as reply:
        told = bad.report(bad.lease(), HOSTILE[name][0](task))
        assert not told.accepted
        assert HOSTILE[name][1] in told.why
        assert told.retry.min_seconds > 0
        assert good.report(good.lease(), gateways.update_of(task, "gate/p2", 0.5, 4)).accepted
        found = reply.result(10)
    assert (found.clients, sums(found)) == (1, 2.0)


def test_an_upload_goes_on_where_it_was_and_takes_no_chunk_twice_or_damaged(
    world: World, caller: Callable[..., Caller]
) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    own, payload = caller(), gateways.update_of(task, "gate/p1").payload
    with asked(world, task) as reply:
        lease = own.lease()

        def piece(start: int, end: int, **changes: Any) -> int:
            chunk = protocol.chunk(payload[start:end], start, len(payload), lease.id)
            for key, value in changes.items():
                setattr(chunk, key, value)
            return int(own.call("Upload", chunk).received)

        assert piece(0, 50) == 50
        assert piece(0, 50) == 50  # its answer was lost
        assert piece(60, 90) == 50  # a gap
        assert piece(50, 90, crc32=1) == 50  # damaged
        assert piece(50, 90) == 90
        assert piece(90, len(payload)) == len(payload)
        header = gateways.update_of(task, "gate/p1").header
        assert own.call("Report", pb.ReportRequest(lease=lease.id, reply=header)).accepted
        assert reply.result(10).clients == 1


def test_an_upload_is_bounded_by_what_an_honest_one_needs(
    world: World, caller: Callable[..., Caller]
) -> None:
    own = caller()
    with asked(world, gateways.a_task(CONFIG.model_copy(update={"deadline": 1.5}))):
        lease = own.lease()
        assert lease.max_upload_bytes < 1 << 20
        large = b"x" * (lease.max_upload_bytes + 1)
        assert "at most" in own.upload(lease, large).problem
        assert own.upload(lease, b"y" * 200).received == 200
        chunk = protocol.chunk(b"z" * 10, 200, 300, lease.id)
        assert "before" in own.call("Upload", chunk).problem


def test_nobody_speaks_for_another_device(world: World, caller: Callable[..., Caller]) -> None:
    own, thief = caller("p1"), caller("p9", gateways.OTHER)
    config = CONFIG.model_copy(update={"deadline": 3.0})
    with asked(world, gateways.a_task(config)):
        lease = own.lease()
        chunk = protocol.chunk(b"abc", 0, 3, lease.id)
        denied = grpc.StatusCode.UNAUTHENTICATED
        assert thief.refused("Upload", chunk) == denied
        assert thief.refused("Report", pb.ReportRequest(lease=lease.id)) == denied
        assert thief.refused("Heartbeat", pb.HeartbeatRequest(lease=lease.id)) == denied
        assert own.upload(lease, b"abc").received == 3
        assert thief.check_in(device="p1").refusal.reason == pb.Refusal.REASON_NAME
        assert thief.check_in().WhichOneof("answer") == "lease"
        namesake = own.check_in(device="p9")
        assert namesake.refusal.text == "another device is called 'p9'"


@pytest.mark.parametrize("token", ["", "wrong", gateways.TOKEN[:-1], gateways.TOKEN + "x"])
def test_a_wrong_token_gets_one_line_and_nothing_else(
    token: str, world: World, caller: Callable[..., Caller]
) -> None:
    stranger = caller(token=token)
    for name, request in (
        ("CheckIn", pb.CheckInRequest()),
        ("Download", pb.DownloadRequest()),
        ("Upload", pb.Chunk()),
        ("Report", pb.ReportRequest()),
        ("Heartbeat", pb.HeartbeatRequest()),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stranger.call(name, request)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert caught.value.details() == "this gateway does not know the token"


@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        ({"protocol": 2}, pb.Refusal.REASON_PROTOCOL, "speaks version 1, not 2"),
        ({"device": "../p"}, pb.Refusal.REASON_NAME, "A-Z"),
        ({"device": "x" * 65}, pb.Refusal.REASON_NAME, "1 to 64"),
        ({"num_examples": 0}, pb.Refusal.REASON_NOT_ELIGIBLE, "no examples"),
        (
            {"capabilities": update_pb2.Capabilities(charging=True)},
            pb.Refusal.REASON_NOT_ELIGIBLE,
            "it is not idle",
        ),
        (
            {"capabilities": update_pb2.Capabilities(idle=True, charging=True, metered=True)},
            pb.Refusal.REASON_NOT_ELIGIBLE,
            "unmetered",
        ),
        ({"own_model": False}, pb.Refusal.REASON_MODEL, "offers no base model"),
        ({}, pb.Refusal.REASON_NO_TASK, "no round"),
    ],
)
def test_who_gets_no_task_is_told_why_and_when_to_come_back(
    changes: dict[str, Any],
    reason: "pb.Refusal.Reason",
    text: str,
    caller: Callable[..., Caller],
) -> None:
    found = caller().check_in(**changes)
    assert found.refusal.reason == reason
    assert text in found.refusal.text
    assert 0 < found.retry.min_seconds < found.retry.max_seconds


def test_too_many_calls_of_one_phone_are_put_off(caller: Callable[..., Caller]) -> None:
    own, other = caller("p1"), caller("p2")
    request, codes = pb.HeartbeatRequest(lease="0" * 32), set()
    for _ in range(400):
        try:
            own.call("Heartbeat", request)
        except grpc.RpcError as error:
            codes.add(error.code())
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert not other.call("Heartbeat", request).wanted


def test_hello_tells_the_seats_and_needs_a_phone(tmp_path: Path) -> None:
    packet = messages.pack_task(Task("0" * 32, 0, "", Kind.HELLO, ""))
    with gateways.serving(tmp_path) as world:
        nobody = messages.unpack_reply(world.gateway.answer(packet), 0)
        assert nobody.error == "no eligible phone has checked in yet"
        with ExitStack() as stack:
            for device in ("p1", "p2", "p3"):
                own = Caller(world, device)
                stack.enter_context(own.channel)
                idle = device != "p3"
                can = update_pb2.Capabilities(charging=True, idle=idle)
                own.check_in(capabilities=can, num_examples=limits.MAX_EXAMPLES)
        found = messages.unpack_reply(world.gateway.answer(packet), 0)
    assert (found.client, found.seats, found.num_examples, found.error) == ("gate", 2, 2, "")


def test_seats_can_be_promised_and_evaluation_is_refused(world: World) -> None:
    hello = world.gateway.answer(messages.pack_task(Task("0" * 32, 0, "", Kind.HELLO, "")))
    assert messages.unpack_reply(hello, 0).seats == 4
    task = replace(gateways.a_task(CONFIG), kind=Kind.EVALUATE)
    found = messages.unpack_reply(world.gateway.answer(messages.pack_task(task)), 0)
    assert "no examples of its own" in found.error


def test_a_strategy_from_a_file_is_refused_unless_its_owner_allowed_it(
    world: World, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    file = tmp_path / "own.py"
    file.write_text(f"open({str(marker)!r}, 'w')\n")
    task = gateways.a_task(CONFIG)
    config = json.loads(task.config)
    config["run"]["strategy"] = f"{file}:Own"
    packet = messages.pack_task(replace(task, config=json.dumps(config)))
    found = messages.unpack_reply(world.gateway.answer(packet), 0)
    assert "its owner has not allowed it" in found.error
    assert not marker.exists()


def test_a_strategy_that_its_owner_allowed_is_known_by_its_files_name(
    tmp_path: Path,
) -> None:
    """The server names the file by a path of its own machine, or without one."""
    file = tmp_path / "own.py"
    file.write_text("from corolla.strategies.fedavg import FedAvg\nclass Own(FedAvg): pass\n")
    task = gateways.a_task(CONFIG, seats=1)
    config = json.loads(task.config)
    with gateways.serving(tmp_path, seats=1, allow=[f"{file}:Own"]) as world:
        for round, told in enumerate(("own.py:Own", "/on/the/server/own.py:Own"), 1):
            config["run"]["strategy"] = told
            asked_for = replace(task, config=json.dumps(config), round=round)
            own = Caller(world)
            with own.channel, asked(world, asked_for) as reply:
                lease = own.lease()
                assert own.report(lease, gateways.update_of(asked_for, "gate/p1")).accepted
                assert reply.result(10).clients == 1
            assert lease.strategy == "own.py:Own"


@pytest.mark.parametrize(
    "config", ["", "{}", "[]", '{"run": {}}', '{"run": {"strategy": "fedavg"}, "lora": {}}']
)
def test_a_task_that_cannot_be_read_is_an_error_reply(config: str, world: World) -> None:
    task = replace(gateways.a_task(CONFIG), config=config)
    found = messages.unpack_reply(world.gateway.answer(messages.pack_task(task)), 0)
    assert "settings cannot be read" in found.error


def test_a_task_asked_twice_is_done_once_and_a_new_one_takes_its_place(
    world: World, caller: Callable[..., Caller]
) -> None:
    own, task = caller(), gateways.a_task(CONFIG, seats=1)
    with asked(world, task) as first, asked(world, task) as second:
        assert own.report(own.lease(), gateways.update_of(task, "gate/p1")).accepted
        assert first.result(10) == second.result(10)
        assert messages.unpack_reply(
            world.gateway.answer(messages.pack_task(task)), 1 << 20
        ) == first.result(10)
    old, new = gateways.a_task(CONFIG, round=2), gateways.a_task(CONFIG, seats=1, round=3)
    with asked(world, old) as dropped:
        lease = own.lease()
        assert own.call("Heartbeat", pb.HeartbeatRequest(lease=lease.id)).wanted
        with asked(world, new) as reply:
            assert "another task" in dropped.result(10).error
            assert not own.call("Heartbeat", pb.HeartbeatRequest(lease=lease.id)).wanted
            stale = own.call("Upload", protocol.chunk(b"abc", 0, 3, lease.id))
            assert stale.problem == "the lease is of an earlier round"
            assert own.report(own.lease(), gateways.update_of(new, "gate/p1")).accepted
            assert reply.result(10).round == 3


def test_a_late_joiner_gets_what_it_missed_and_a_lost_gateway_starts_from_a_snapshot(
    tmp_path: Path,
) -> None:
    config = tiny.config(
        "seed_pool", cohort=2, deadline=60.0, options={"size": 4096, "scalars": "fp32"}
    )
    shared = Shared(config, gateways.renamed("gate/"), tmp_path / "memories")

    def trainers(names: str) -> dict[str, Any]:
        return {name: shared.of(f"gate/{name}") for name in names}

    with gateways.serving(tmp_path) as world:
        run = gateways.course(config, Behind(world), {"gate": 2})
        with gateways.phones(world, trainers("ab")):
            for _ in range(4):
                run.step()
        with gateways.phones(world, trainers("bc")):  # c has seen nothing
            run.step()
        assert set(shared.asked[-2:]) == {"gate/b", "gate/c"}
    shutil.rmtree(tmp_path / "gate")
    with gateways.serving(tmp_path) as world:
        run.network = Behind(world)
        with gateways.phones(world, trainers("ad")):  # a is behind, d is new
            run.step()
            result = run.step()  # rows after the snapshot
        assert set(shared.asked[-2:]) == {"gate/a", "gate/d"}
    assert result.num_examples
    assert len(run.done) == 7


def test_groups_the_gateway_has_lost_are_asked_for_again(tmp_path: Path) -> None:
    config = tiny.config("flora", cohort=2, deadline=60.0)
    shared = Shared(config, gateways.renamed("gate/"), tmp_path / "memories")
    trainers = {name: shared.of(f"gate/{name}") for name in "ab"}
    with gateways.serving(tmp_path) as world:
        run = gateways.course(config, Behind(world), {"gate": 2})
        with gateways.phones(world, trainers):
            run.step()
            run.step()
    shutil.rmtree(tmp_path / "gate")
    shutil.rmtree(tmp_path / "memories")  # nor do phones have them any more
    with gateways.serving(tmp_path) as world:
        run.network = Behind(world)
        with gateways.phones(world, trainers):
            assert len(run.step().num_examples) == 2


# --- who means harm -------------------------------------------------------------------------------


def test_strangers_whose_calls_never_end_do_not_hold_up_the_phones(
    world: World, caller: Callable[..., Caller]
) -> None:
    over = threading.Event()

    def silent() -> Iterator[bytes]:
        over.wait(20)
        yield from ()

    with world.channel() as channel:
        call: Any = channel.stream_unary("/corolla.v1.Phones/Upload")
        held = [call.future(silent(), timeout=20) for _ in range(64)]
        try:
            time.sleep(0.5)
            assert caller().check_in().refusal.text == "no round"
            codes = {future.code() for future in held}
        finally:
            over.set()
    assert codes == {grpc.StatusCode.UNAUTHENTICATED}


def test_one_phones_own_metrics_do_not_spoil_the_gateways_reply(
    world: World, caller: Callable[..., Caller]
) -> None:
    task = gateways.a_task(CONFIG, seats=3)
    many = {f"own{number}": 1.0 for number in range(limits.MAX_METRICS)}
    with asked(world, task) as reply:
        for device, metrics in (("p1", many), ("p2", {"loss": 2.0}), ("p3", {"loss": 4.0})):
            own, plain = caller(device), gateways.update_of(task, f"gate/{device}", 1.0, 1)
            told = messages.unpack_reply(plain, len(plain.payload))
            assert own.report(
                own.lease(), messages.pack_reply(replace(told, metrics=metrics))
            ).accepted
        found = reply.result(10)
    assert (found.clients, found.error) == (3, "")
    assert found.metrics == {"loss": 3.0}


@pytest.mark.parametrize("robust", ["none", "median"])
def test_a_reply_that_was_damaged_since_it_was_judged_is_left_out(robust: str) -> None:
    """Also of a bundle, which would be refused as a whole."""
    task = gateways.a_task(CONFIG.model_copy(update={"robust": robust}), seats=2)
    good = gateways.update_of(task, "gate/p1")
    bad = gateways.update_of(task, "gate/p2")
    bad = Packet(bad.header, bad.payload[:-1] + b"x")
    packet = prepare(task).merge("gate", [("gate/p1", 5, None, good), ("gate/p2", 5, None, bad)])
    found = messages.unpack_reply(packet, len(packet.payload))
    assert (found.clients, found.num_examples) == (1, 3)


def test_a_name_goes_to_the_token_that_is_of_it_and_is_free_when_its_token_is_gone(
    tmp_path: Path,
) -> None:
    known = {"a", "b", "c"}
    gateway = Gateway(GatewaySettings("gate", tmp_path), known=known.__contains__)

    def text(owner: str, device: str = "", name: str = "p9") -> str:
        values: dict[str, Any] = {
            "protocol": 1,
            "capabilities": ABLE,
            "num_examples": 5,
            "own_model": True,
        }
        request = pb.CheckInRequest(device=name, **values)
        return gateway.check_in(request, Token(owner, device, "")).refusal.text

    taken = "another device is called 'p9'"
    assert [text("a"), text("b"), text("c", "p9"), text("a")] == ["no round", taken] * 2
    known.remove("c")
    assert text("b") == "no round"


def test_a_job_is_closed_while_reports_take_their_uploads_away(tmp_path: Path) -> None:
    closed: list[str] = []
    job = cast(Any, Job)("", None, None, None)

    @dataclass
    class Taken:
        name: str

        def close(self) -> None:
            closed.append(self.name)
            job.uploads.pop("b" if self.name == "a" else "a", None)

    job.uploads.update({name: Taken(name) for name in "abc"})
    job.close()
    assert closed == ["a", "b", "c"]
    assert not job.uploads


def test_a_round_ends_before_its_server_has_stopped_waiting(world: World) -> None:
    began = time.monotonic()
    packet = messages.pack_task(gateways.a_task(CONFIG))
    found = world.gateway.answer(packet, Waits(deadline=began + 0.9))
    assert 0.3 < time.monotonic() - began < 0.9
    assert "none of 0 phones" in messages.unpack_reply(found, 0).error


def test_the_upload_of_a_phone_that_vanished_is_dropped(tmp_path: Path) -> None:
    task = gateways.a_task(CONFIG.model_copy(update={"deadline": 3.0}), seats=1)
    with gateways.serving(tmp_path, seats=1, lease=0.2) as world:
        first, second = Caller(world, "p1"), Caller(world, "p2")
        with first.channel, second.channel, asked(world, task):
            assert first.upload(first.lease(), b"abc").received == 3
            job = world.gateway._job
            assert job
            (upload,) = job.uploads.values()
            time.sleep(0.3)
            second.lease()
            assert not job.uploads
            assert upload._file.closed


def test_a_task_that_cannot_be_told_to_a_phone_takes_no_seat(
    world: World, caller: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_long(*_: Any) -> Any:
        raise ValueError("header has 9 MiB")

    config = CONFIG.model_copy(update={"deadline": 2.0})
    with asked(world, gateways.a_task(config)):
        monkeypatch.setattr(outbound.Parcel, "header", too_long)
        refusal = caller().check_in().refusal
        job = world.gateway._job
        assert job
        assert not job.round.leases
    assert refusal.reason == pb.Refusal.REASON_NO_TASK
    assert refusal.text == "the task cannot be told: header has 9 MiB"
