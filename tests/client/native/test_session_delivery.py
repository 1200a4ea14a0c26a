"""A native phone's reply reaches its gateway: over lines that are cut, and after kills."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from tests.client.native.fake_gateway import Line
from tests.client.native.phones import World, a_task
from tests.server.gateway import gateways

MIB = protocol.CHUNK
LONG = {"passes": 100_000}


def a_payload(world: World, size: int = 2 * MIB + 77) -> Path:
    path = world.folder / "payload"
    path.write_bytes(os.urandom(size))
    return path


def test_an_update_of_several_chunks_arrives_as_it_was(offered: World) -> None:
    payload = a_payload(offered)
    offered.fake.tasks = [a_task()]
    phone = offered.start({"payload": str(payload)}, rounds=1)
    assert phone.finish() == 0, phone.errors
    assert offered.fake.uploaded == payload.read_bytes()
    ((lease, reply),) = offered.fake.reports
    assert lease == "0" * 32
    assert (reply.payload_bytes, reply.payload_sha256) == (
        payload.stat().st_size,
        protocol.sha256(payload.read_bytes()),
    )
    metrics = reply.metrics
    assert 2 * MIB < metrics["device_bytes_up"] < 2.1 * MIB
    assert metrics["device_bytes_down"] > 0
    assert (metrics["device_battery_spent"], metrics["device_thermal_max"]) == (0, 0)
    (line,) = [line for line in offered.history() if line["run"]]
    assert (line["run"], line["round"], line["accepted"]) == ("0" * 32, 1, True)
    of_lease = metrics["device_bytes_up"] + metrics["device_bytes_down"]
    assert of_lease + 256 < line["bytes"] < of_lease + 4096  # check-in, and calls beside the reply
    assert 0 < line["seconds"] < 60


def test_an_upload_that_is_cut_goes_on_where_it_was(offered: World) -> None:
    line = Line(int(offered.address.rpartition(":")[2]))
    assert offered.start(once=True).finish() == 0  # the bundle
    payload = a_payload(offered)
    offered.fake.tasks = [a_task()]
    line.allowance["up"] = 1.5 * MIB
    phone = offered.start({"payload": str(payload)}, rounds=1, gateway=f"localhost:{line.port}")
    gateways.until(lambda: line.down)
    phone.says("no answer, trying again: UNAVAILABLE")
    line.restore()
    assert phone.finish() == 0, phone.errors
    line.close()
    assert offered.fake.uploaded == payload.read_bytes()
    offsets = [r.offset for name, r in offered.fake.asked if name == "Upload"]
    assert offsets[0] == 0
    assert offsets.count(0) == 1
    assert len(offered.answers()) == 1


def test_a_slow_line_gets_smaller_chunks(offered: World) -> None:
    """The first chunk takes longer than a call may: what follows has half its size."""
    payload = a_payload(offered, MIB)
    offered.fake.tasks = [a_task()]

    def stall(name: str, context: grpc.ServicerContext) -> None:
        if name == "Upload" and offered.fake.count("Upload") == 1:
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "as if")

    offered.fake.before = stall
    phone = offered.start({"payload": str(payload)}, rounds=1)
    assert phone.finish() == 0, phone.errors
    sizes = [len(r.content) for name, r in offered.fake.asked if name == "Upload"]
    assert sizes == [MIB, MIB // 2, MIB // 2]
    assert offered.fake.uploaded == payload.read_bytes()


@pytest.mark.parametrize("call", ["Upload", "Report"])
def test_a_reply_outlives_a_kill_and_is_delivered_without_training_again(
    offered: World, call: str
) -> None:
    payload = a_payload(offered, 1000)
    offered.fake.tasks = [a_task()]

    def refuse(name: str, context: grpc.ServicerContext) -> None:
        if name == call:
            context.abort(grpc.StatusCode.UNAVAILABLE, "starting")

    offered.fake.before = refuse
    phone = offered.start({"payload": str(payload)}, rounds=1)
    gateways.until(lambda: offered.fake.count(call) >= 2)
    phone.kill()
    offered.fake.before = lambda name, context: None
    offered.fake.asked.clear()
    again = offered.start(rounds=1)
    assert again.finish() == 0, again.errors
    assert again.lines[1:] == ["round 1 as gate/p1: accepted"]
    assert len(offered.answers()) == 1
    assert offered.fake.uploaded == payload.read_bytes()
    assert not offered.fake.count("CheckIn")  # the reply does not wait for a new lease
    assert not (offered.state() / "reply").exists()
    (line,) = [line for line in offered.history() if line["run"]]
    assert line["accepted"]


def test_one_visit_does_not_wait_for_ever_and_keeps_what_it_has(offered: World) -> None:
    payload = a_payload(offered, 1000)
    offered.fake.tasks = [a_task()]

    def refuse(name: str, context: grpc.ServicerContext) -> None:
        if name == "Upload":
            context.abort(grpc.StatusCode.UNAVAILABLE, "starting")

    offered.fake.before = refuse
    phone = offered.start({"payload": str(payload)}, rounds=1)
    gateways.until(lambda: offered.fake.count("Upload") >= 2)
    phone.kill()
    with socket.create_server(("localhost", 0)) as nobody:
        address = f"localhost:{nobody.getsockname()[1]}"
    once = offered.start(once=True, gateway=address, retry_seconds="30,60")
    assert once.finish() == 1
    assert once.errors == (
        "error: the gateway does not answer: no connection before the deadline: UNAVAILABLE\n"
    )
    offered.fake.before = lambda name, context: None
    again = offered.start(rounds=1)
    assert again.finish() == 0, again.errors
    assert offered.fake.uploaded == payload.read_bytes()


def test_an_upload_that_is_asked_for_twice_is_counted_twice(offered: World) -> None:
    payload = a_payload(offered)
    offered.fake.tasks = [a_task()]
    said = iter([MIB, 0])  # the gateway has forgotten what it had

    def received() -> int:
        told = next(said)
        if not told:
            offered.fake.received = None
        return told

    offered.fake.received = received
    phone = offered.start({"payload": str(payload)}, rounds=1)
    assert phone.finish() == 0, phone.errors
    (line,) = [line for line in offered.history() if line["run"]]
    assert 4 * MIB < line["bytes"] < 4.1 * MIB


@pytest.mark.parametrize("name", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_a_gateway_on_loopback_is_asked_past_a_dead_proxy(
    offered: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for other in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    phone = offered.start(once=True, retry_seconds="30,60")
    assert phone.finish() == 0, phone.errors


def test_a_phone_that_was_killed_in_training_goes_on_with_the_same_lease(offered: World) -> None:
    offered.fake.tasks = [a_task()]
    phone = offered.start({"passes": 200, "seconds": 0.02}, rounds=1)
    checkpoint = offered.state() / "passes"
    gateways.until(lambda: checkpoint.exists() and int(checkpoint.read_text() or 0) > 5)
    phone.kill()
    again = offered.start({"passes": 200, "seconds": 0.0001}, rounds=1)
    assert again.finish() == 0, again.errors
    first, second = offered.answers()
    assert first["from"] == 0
    assert second["from"] > 5
    ((_, reply),) = offered.fake.reports
    assert not reply.error


def test_a_session_that_ended_with_its_process_is_reported_as_given_up(offered: World) -> None:
    """Its lease is over: the phone that starts again gets another one, and says what became of
    the first."""
    offered.fake.tasks = [a_task(), a_task(2)]
    phone = offered.start(LONG)
    gateways.until(lambda: offered.answers())
    phone.kill()
    offered.fake.next_lease()
    again = offered.start(rounds=1)
    assert again.finish() == 0, again.errors
    leases = [(lease, reply.error) for lease, reply in offered.fake.reports]
    assert leases[0] == (f"{0:032x}", "given up: the process ended before it was done")
    assert leases[1][1] == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_phone_that_is_told_to_stop_ends_within_a_pass_and_goes_on_later(
    offered: World, number: signal.Signals
) -> None:
    offered.fake.tasks = [a_task()]
    phone = offered.start({"passes": 100_000, "seconds": 0.01})
    gateways.until(lambda: (offered.state() / "passes").exists())
    phone.process.send_signal(number)
    began = time.monotonic()
    assert phone.finish() == 0
    assert time.monotonic() - began < 60
    assert phone.lines[-1] == "stopped"
    assert not phone.errors
    assert not offered.fake.reports
    done = int((offered.state() / "passes").read_text())
    again = offered.start({"passes": done + 1}, rounds=1)
    assert again.finish() == 0, again.errors
    assert offered.answers()[-1]["from"] == done
    assert [reply.error for _, reply in offered.fake.reports] == [""]


def test_a_phone_that_waits_stops_at_once(offered: World) -> None:
    phone = offered.start(gateway="localhost:1", retry_seconds="600,900")
    phone.says("no answer, trying again: UNAVAILABLE")
    phone.process.terminate()
    assert phone.finish() == 0
    assert phone.lines[-1] == "stopped"


def test_heartbeats_keep_a_lease_while_a_pass_takes_long(offered: World) -> None:
    offered.fake.tasks = [a_task()]
    offered.fake.lease_seconds = 1.5
    phone = offered.start({"passes": 1, "seconds": 3}, rounds=1)
    assert phone.finish() == 0, phone.errors
    assert 3 <= offered.fake.count("Heartbeat") <= 30  # three of a lease


def test_a_phone_stops_once_nobody_wants_its_result(offered: World) -> None:
    offered.fake.tasks = [a_task()]
    offered.fake.lease_seconds = 0.6
    offered.fake.wanted = False
    phone = offered.start(LONG)
    gateways.until(lambda: offered.fake.reports)
    ((_, reply),) = offered.fake.reports
    assert reply.error == "given up: not wanted any more"
    phone.says("round 1 as gate/p1: not accepted: given up: not wanted any more")


def test_a_phone_stops_at_the_end_of_the_round(offered: World) -> None:
    offered.fake.tasks = [a_task()]
    offered.fake.deadline = 1.5
    offered.start(LONG)
    gateways.until(lambda: offered.fake.reports)
    ((_, reply),) = offered.fake.reports
    assert reply.error == "given up: the round is over"


def test_an_update_that_is_too_large_is_not_sent(offered: World) -> None:
    offered.fake.tasks = [a_task()]
    offered.fake.most_upload = 999
    offered.start({"payload": str(a_payload(offered, 1000))})
    gateways.until(lambda: offered.fake.reports)
    ((_, reply),) = offered.fake.reports
    assert reply.error == "the update is larger than is taken"
    assert not offered.fake.count("Upload")


def test_what_a_trainer_throws_is_told_to_the_owner_alone(offered: World) -> None:
    offered.fake.tasks = [a_task()]
    phone = offered.start({"payload": "/home/eve/secret"})  # not there: its trainer throws
    gateways.until(lambda: offered.fake.reports)
    ((_, reply),) = offered.fake.reports
    assert reply.error == "this device fails"
    phone.says("this device fails: bad optional access")


def test_the_groups_that_a_phone_lacks_come_with_its_task(offered: World) -> None:
    fake = offered.fake
    small, large = fake.put(b"a"), fake.put(os.urandom(MIB - 5))
    fake.cached = [
        pb.Blob(sha256=small.sha256, size=1, group="A", content="1" * 32, inline=b"a"),
        pb.Blob(sha256=large.sha256, size=large.size, group="first", content="2" * 32),
    ]
    fake.tasks = [a_task(cached={"A": "1" * 32, "first": "2" * 32})]
    offered.state().mkdir(parents=True)
    (offered.state() / f"{'0' * 64}.part").write_text("of a task that is over")
    phone = offered.start(rounds=1)
    assert phone.finish() == 0, phone.errors
    (asked,) = offered.answers()
    assert asked["groups"] == 2
    assert not list(offered.state().glob("*.part"))


def test_a_blob_that_is_not_offered_any_more_ends_the_session(offered: World) -> None:
    fake = offered.fake
    fake.cached = [pb.Blob(sha256="ab" * 32, size=MIB, group="A", content="1" * 32)]
    fake.tasks = [a_task(cached={"A": "1" * 32})]
    offered.start()
    gateways.until(lambda: fake.reports)
    ((_, reply),) = fake.reports
    assert reply.error == "given up: this blob is not offered (any more)"
    assert not offered.answers()


@pytest.mark.parametrize("content", ["/home/owner/precious", "../../precious", "x" * 32])
def test_names_that_a_gateway_sends_are_no_paths(offered: World, content: str) -> None:
    fake = offered.fake
    fake.cached = [pb.Blob(sha256="ab" * 32, size=1, group="A", content=content)]
    fake.tasks = [a_task()]
    offered.start()
    gateways.until(lambda: fake.reports)
    ((_, reply),) = fake.reports
    assert reply.error == "an id has 32 hexadecimal characters"
    assert not offered.answers()


@pytest.mark.parametrize(
    ("size", "named", "words"),
    [
        (MIB, {}, "the task does not name the group A"),
        (MIB, {"A": "2" * 32}, "the task does not name the group A"),
        (2 * MIB, {"A": "1" * 32}, f"blob has {2 * MIB} bytes, at most {MIB + 128}"),
    ],
)
def test_a_gateway_sends_no_more_than_a_run_needs(
    offered: World, size: int, named: dict[str, str], words: str
) -> None:
    """128: eight times the adapter of four numbers."""
    fake = offered.fake
    fake.cached = [pb.Blob(sha256="ab" * 32, size=size, group="A", content="1" * 32)]
    fake.tasks = [a_task(cached=named)]
    offered.start()
    gateways.until(lambda: fake.reports)
    ((_, reply),) = fake.reports
    assert reply.error == words
    assert not [r for name, r in fake.asked if name == "Download" and r.sha256 == "ab" * 32]


def test_a_task_that_cannot_be_read_is_given_up(offered: World) -> None:
    offered.fake.tasks = [a_task()]
    offered.fake.header = lambda header: b"\xff" + header
    phone = offered.start()
    phone.says("not accepted: the task cannot be read: message cannot be parsed")
    assert len(offered.fake.reports) == 1
    assert not offered.answers()


@pytest.mark.parametrize(
    "received", [lambda count: count % 2, lambda count: count], ids=["to and fro", "byte by byte"]
)
def test_an_upload_ends_whatever_the_gateway_says_it_received(
    offered: World, received: Callable[[int], int]
) -> None:
    offered.fake.tasks = [a_task()]
    offered.fake.received = lambda: received(offered.fake.count("Upload"))
    phone = offered.start({"payload": str(a_payload(offered))})
    phone.says("dropped: the gateway does not take the update in")
    assert offered.fake.count("Upload") <= 30


def test_a_reply_that_cannot_be_kept_is_delivered_all_the_same(offered: World) -> None:
    (offered.state() / "reply.new").mkdir(parents=True)  # where a file should be
    payload = a_payload(offered, 1000)
    offered.fake.tasks = [a_task()]
    phone = offered.start({"payload": str(payload)}, rounds=1)
    assert phone.finish() == 0, phone.errors
    assert any(line.startswith("this device fails: cannot open ") for line in phone.lines)
    assert phone.lines[-1] == "round 1 as gate/p1: accepted"
    assert offered.fake.uploaded == payload.read_bytes()
    (line,) = [line for line in offered.history() if line["run"]]
    assert line["accepted"]


@pytest.mark.parametrize(("seconds", "most"), [(1e300, 0), (float("inf"), 0), (float("nan"), 15)])
def test_heartbeats_are_few_whatever_a_lease_says(
    offered: World, seconds: float, most: int
) -> None:
    offered.fake.tasks = [a_task()]
    offered.fake.lease_seconds = seconds
    phone = offered.start({"passes": 1, "seconds": 1}, rounds=1)
    assert phone.finish() == 0, phone.errors
    assert offered.fake.count("Heartbeat") <= most


def test_the_version_of_the_log_is_told_from_then_on(offered: World) -> None:
    from corolla.wire.messages import Log

    version = "cd" * 16
    log = Log("ab" * 16, "ab" * 16, version, (), 1)
    offered.fake.tasks = [a_task(log=log)]
    assert offered.start(rounds=1).finish() == 0
    offered.fake.accept = False
    offered.fake.tasks = [a_task(2, log=log)]
    phone = offered.start({"missing": ["first"], "error": "first: not held"})
    gateways.until(lambda: len(offered.fake.reports) == 2)
    offered.fake.asked.clear()
    gateways.until(lambda: offered.fake.count("CheckIn"))
    told = [r.log_version for name, r in offered.fake.asked if name == "CheckIn"]
    assert told[0] == ""  # it said that it has forgotten something
    phone.kill()
    before = [(lease, reply.error) for lease, reply in offered.fake.reports]
    assert before[0][1] == ""


def test_too_many_calls_are_made_again_later(offered: World) -> None:
    def busy(name: str, context: grpc.ServicerContext) -> None:
        if offered.fake.count(name) <= 2:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls: wait a second")

    offered.fake.before = busy
    offered.fake.tasks = [a_task()]
    phone = offered.start(rounds=1)
    assert phone.finish() == 0, phone.errors
    assert "no answer, trying again: RESOURCE_EXHAUSTED" in phone.lines


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND])
def test_a_report_that_breaks_a_rule_is_not_made_again(
    offered: World, code: grpc.StatusCode
) -> None:
    def refuse(name: str, context: grpc.ServicerContext) -> None:
        if name == "Report":
            offered.fake.tasks = []
            context.abort(code, "no such thing")

    offered.fake.before = refuse
    offered.fake.tasks = [a_task()]
    phone = offered.start()
    phone.says("dropped: no such thing")
    phone.says("waiting: no round")
    assert offered.fake.count("Report") == 1


def test_timings_are_told_to_the_gateway(offered: World) -> None:
    offered.fake.tasks = [a_task()]
    assert offered.start({"passes": 5, "seconds": 0.05}, rounds=1).finish() == 0
    assert offered.start(once=True).finish() == 0
    last = [r for name, r in offered.fake.asked if name == "CheckIn"][-1]
    (timing,) = last.native.timings
    assert (timing.program, timing.method, timing.length) == ("fp32", "grad", 32)
    assert 0.04 < timing.seconds < 60
