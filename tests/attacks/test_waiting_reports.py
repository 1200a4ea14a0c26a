"""A phone that reports again and again while its reply is examined.

One reply is examined at a time, and whoever reports meanwhile waits for it. Where those that wait
have the threads of all other calls, no other phone is heard until then.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from corolla.host.occupancy import Occupancy, Occupant
from corolla.proto import device_pb2 as pb
from corolla.server.gateway import service
from tests.server.gateway import gateways
from tests.server.gateway.callers import ABLE, Caller
from tests.server.gateway.gateways import Clock, World

TOKEN = (("authorization", f"Bearer {gateways.TOKEN}"),)
CHECK_IN = pb.CheckInRequest(
    protocol=1, device="honest", capabilities=ABLE, num_examples=5, own_model=True
)


@contextmanager
def reporting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A gateway whose threads are all asked for reports, while one reply is examined."""
    monkeypatch.setattr(service, "_WORKERS", 2)
    at_work, settle = threading.Semaphore(0), Occupancy.settle

    def noted(calls: Occupancy, call: Occupant) -> None:
        settle(calls, call)
        at_work.release()

    with ExitStack() as stack:
        world = stack.enter_context(gateways.serving(folder, Clock(), seats=4))
        monkeypatch.setattr(Occupancy, "settle", noted)
        evil = Caller(world, "evil")
        stack.enter_context(evil.channel)
        with world.gateway.deliveries._judging:  # a reply is examined
            request = pb.ReportRequest(lease="0" * 32)
            calls = [
                evil.stub.Report.future(request, metadata=TOKEN, timeout=120) for _ in range(8)
            ]
            for _ in calls:
                assert at_work.acquire(timeout=60)
            yield world
        assert {call.result().why for call in calls} == {"the round is over"}


def test_reports_that_wait_hold_up_no_other_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reporting(tmp_path, monkeypatch) as world:
        phone = Caller(world, "honest")
        with phone.channel:
            assert phone.check_in().refusal.text == "no round"


def test_where_reports_have_the_threads_of_all_calls_nobody_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_APART", {})
    with reporting(tmp_path, monkeypatch) as world:
        phone = Caller(world, "honest")
        with phone.channel:
            answer: Any = phone.stub.CheckIn.future(CHECK_IN, metadata=TOKEN, timeout=120)
            with pytest.raises(grpc.FutureTimeoutError):
                answer.result(timeout=2)
