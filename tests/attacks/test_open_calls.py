"""A phone with a valid token that opens calls and sends no request.

Each call costs it a few bytes. Where a call without a request holds one of the gateway's threads,
forty such calls hold all of them, and no other phone is heard.
"""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from corolla.host.occupancy import Occupancy, Occupant
from corolla.proto import device_pb2 as pb
from corolla.server.gateway import service
from tests.server.gateway import gateways
from tests.server.gateway.callers import Caller
from tests.server.gateway.gateways import Clock, World

TOKEN = (("authorization", f"Bearer {gateways.TOKEN}"),)
CHECK_IN = pb.CheckInRequest(protocol=1, device="honest", num_examples=5, own_model=True)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with gateways.serving(tmp_path, Clock(), seats=4) as found:
        yield found


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """One for each call that has reached the gateway."""
    came, enter = threading.Semaphore(0), Occupancy.enter

    def noted(calls: Occupancy, call: Occupant) -> bool:
        found = enter(calls, call)
        came.release()
        return found

    monkeypatch.setattr(Occupancy, "enter", noted)
    return came


@contextmanager
def silent_calls(world: World, number: int, connections: int) -> Iterator[None]:
    """Calls with the token that all phones have, whose request does not come until the end."""
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait(120)
        yield from ()

    ca = (world.folder / "certs" / "ca.pem").read_bytes()
    options = (("grpc.use_local_subchannel_pool", 1),)  # a connection of its own
    with ExitStack() as stack:
        methods: list[Any] = []
        for _ in range(connections):
            credentials = grpc.ssl_channel_credentials(ca)
            channel = grpc.secure_channel(world.address, credentials, options=options)
            methods.append(stack.enter_context(channel).stream_unary("/corolla.v1.Phones/CheckIn"))
        stack.callback(over.set)
        calls = [  # one that nobody holds is cancelled
            methods[place % connections].future(nothing(), metadata=TOKEN, timeout=120)
            for place in range(number)
        ]
        yield
        del calls


def count(came: threading.Semaphore, number: int) -> None:
    for _ in range(number):
        assert came.acquire(timeout=60), "it has not come"


@pytest.mark.parametrize(("number", "connections"), [(40, 3), (300, 30)])
def test_an_honest_phone_is_heard_while_others_say_nothing(
    world: World, entered: threading.Semaphore, number: int, connections: int
) -> None:
    """Also where they are more than the calls that a token may have open."""
    phone = Caller(world, "honest")
    with silent_calls(world, number, connections), phone.channel:
        count(entered, number)
        assert phone.check_in().refusal.text == "no round"


def test_where_silent_calls_hold_threads_nobody_is_heard_until_they_end(
    world: World, entered: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding, real = threading.Semaphore(0), service.Phones._heard

    async def in_a_thread(phones: Any, call: Any, requests: Any) -> Any:
        loop = asyncio.get_running_loop()

        def wait() -> Any:
            holding.release()
            return asyncio.run_coroutine_threadsafe(real(phones, call, requests), loop).result()

        return await loop.run_in_executor(threads, wait)

    monkeypatch.setattr(service.Phones, "_heard", in_a_thread)
    monkeypatch.setitem(service.SECONDS, "CheckIn", 1000.0)
    phone = Caller(world, "honest")
    with ThreadPoolExecutor(service._WORKERS) as threads, phone.channel:
        with silent_calls(world, 40, connections=3):
            count(holding, service._WORKERS)
            answer: Any = phone.stub.CheckIn.future(CHECK_IN, metadata=TOKEN, timeout=120)
            with pytest.raises(grpc.FutureTimeoutError):
                answer.result(timeout=2)
        assert answer.result(timeout=60).refusal.text == "it is not charging, idle"
