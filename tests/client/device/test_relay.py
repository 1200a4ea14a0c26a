import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.cli.flwr_clientapp import _parse_args_run_flwr_clientapp
from flwr.supernode.runtime import run_clientapp

from corolla.client.device import relay
from corolla.wire import rpc
from corolla.wire.messages import Kind, Reply, Task, pack_reply, pack_task, unpack_reply
from corolla.wire.packet import Packet, from_flower, to_flower
from corolla.wire.rpc import Wanted

RUN = "ab" * 16
TASK = Task(RUN, 3, "v", Kind.TRAIN, "{}", payload=b"p" * 100)


def reply_of(packet: Packet) -> Reply:
    return unpack_reply(packet, 1 << 20)


@pytest.fixture
def message() -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 2, 3
    found = Message(to_flower(pack_task(TASK)), 4, "train", ttl=20)
    found.metadata.__dict__["_message_id"] = "x"
    return found


def context(socket: Path) -> Context:
    return Context(
        run_id=1,
        node_id=4,
        node_config={"socket": str(socket), "name": "ada"},
        state=RecordDict(),
        run_config={},
    )


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the trainer is given, at each try; none takes longer than a moment."""
    seconds: list[float] = []
    ask = rpc.ask_trainer

    def asked(path: Path, packet: Packet, left: float) -> Packet:
        seconds.append(left)
        return ask(path, packet, min(left, 0.3))

    monkeypatch.setattr(rpc, "ask_trainer", asked)
    return seconds


def test_importing_it_loads_no_torch() -> None:
    """It is started for every message: torch or Flower's databases would cost it seconds."""
    heavy = {"torch", "transformers", "peft", "datasets", "pydantic"}
    databases = {"sqlalchemy", "alembic", "uvicorn"}
    code = (
        "import corolla.client.device.relay as relay, sys\n"
        f"print(sorted({heavy} & {{*sys.modules}}))\n"
        "try: relay.main()\n"
        f"except SystemExit: print(sorted({heavy - {'pydantic'} | databases} & {{*sys.modules}}))\n"
    )
    words = ["--insecure", "--token", " "]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n[]\n"


def test_it_takes_the_arguments_of_flowers_own_command() -> None:
    def options(parser: argparse.ArgumentParser) -> dict[str, tuple[object, ...]]:
        return {own.dest: (own.option_strings, own.default, own.const) for own in parser._actions}

    assert options(relay.parser()) == options(_parse_args_run_flwr_clientapp())


def test_a_message_goes_to_the_socket_and_its_answer_back(tmp_path: Path, message: Message) -> None:
    seen = []

    def answer(packet: Packet, wanted: Wanted) -> Packet:
        seen.append(packet)
        return pack_reply(Reply(RUN, 3, "v", Kind.TRAIN, "ada", 7, payload=b"u" * (5 << 20)))

    with rpc.private_socket(tmp_path) as path:
        server = rpc.serve_trainer(answer, path)
        try:
            back = relay.app(message, context(path))
        finally:
            server.stop(None).wait()
    assert seen == [pack_task(TASK)]
    reply = unpack_reply(from_flower(back.content, 6 << 20), 6 << 20)
    assert (reply.client, reply.num_examples, len(reply.payload)) == ("ada", 7, 5 << 20)
    assert back.metadata.dst_node_id == message.metadata.src_node_id


def test_no_trainer_is_a_reply_in_time_that_says_so(
    tmp_path: Path, message: Message, given: list[float]
) -> None:
    message.metadata.__dict__["_ttl"] = 200.0
    back = relay.app(message, context(tmp_path / "none.sock"))
    assert 150.0 < given[1] < given[0] <= 195.0
    reply = reply_of(from_flower(back.content, 1 << 20))
    assert "no trainer answers" in reply.error
    assert (reply.run_id, reply.round, reply.base_version) == (RUN, 3, "v")
    assert (reply.kind, reply.client, reply.payload) == (Kind.TRAIN, "ada", b"")


def test_a_message_whose_time_is_over_is_answered_at_once(
    tmp_path: Path, given: list[float]
) -> None:
    reply = reply_of(relay.carry(pack_task(TASK), tmp_path / "none.sock", -30.0, "ada"))
    assert set(given) == {0.1}
    assert reply.error


def test_a_busy_trainer_leaves_time_for_the_answer(tmp_path: Path, given: list[float]) -> None:
    def slow(packet: Packet, wanted: Wanted) -> Packet:
        while wanted():
            time.sleep(0.02)
        return packet

    with rpc.private_socket(tmp_path) as path:
        server = rpc.serve_trainer(slow, path)
        try:
            reply = reply_of(relay.carry(pack_task(TASK), path, 100.0, "ada"))
        finally:
            server.stop(None).wait()
    (seconds,) = given
    assert 50.0 < seconds <= 95.0
    assert "busy" in reply.error


DYING = """
import os, sys
from pathlib import Path
from corolla.wire import rpc
from corolla.wire.packet import Packet
def answer(packet, wanted):
    marks = Path(sys.argv[2])
    with marks.open("a") as file:
        file.write("x")
    if len(marks.read_text()) <= int(sys.argv[3]):
        os._exit(9)
    return Packet(b"answer", b"")
server = rpc.serve_trainer(answer, Path(sys.argv[1]))
server.wait_for_termination()
"""


@pytest.mark.parametrize(("deaths", "tries"), [(1, 2), (5, 2)])
def test_a_trainer_that_dies_is_waited_for_but_not_a_second_time(
    tmp_path: Path, deaths: int, tries: int
) -> None:
    """A task that kills the trainer each time must not keep it dying until the round is over."""
    marks = tmp_path / "marks"
    over = threading.Event()
    with rpc.private_socket(tmp_path) as path:

        def keep_alive() -> None:
            while not over.is_set():
                command = [sys.executable, "-c", DYING, str(path), str(marks), str(deaths)]
                with subprocess.Popen(command) as process:
                    while process.poll() is None and not over.wait(0.05):
                        pass
                    process.kill()

        supervisor = threading.Thread(target=keep_alive)
        supervisor.start()
        try:
            found = relay.carry(pack_task(TASK), path, 60.0, "ada")
        finally:
            over.set()
            supervisor.join()
    assert len(marks.read_text()) == tries
    if deaths < tries:
        assert found == Packet(b"answer", b"")
    else:
        assert "ended before it had answered" in reply_of(found).error


def test_an_error_reply_is_what_the_servers_reader_takes() -> None:
    task = pack_task(TASK)
    made = relay.error_reply(task, "why", "ada")
    assert made == pack_reply(Reply(RUN, 3, "v", Kind.TRAIN, "ada", error="why"))
    assert len(reply_of(relay.error_reply(task, "x" * 9999, "ada")).error) <= 2000
    assert relay.error_reply(Packet(b"\xff", b""), "why", "ada").payload == b""


def test_what_is_no_packet_is_answered(tmp_path: Path, message: Message) -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 2, 3
    foreign = Message(RecordDict(), 4, "train", ttl=20)
    foreign.metadata.__dict__["_message_id"] = "x"
    back = relay.app(foreign, context(tmp_path / "none.sock"))
    assert not back.has_error()
    assert b"not a packet" in from_flower(back.content, 100).header


def test_flower_still_has_the_names_that_are_replaced() -> None:
    """`main` puts this app in the place of a bundle's: these names are Flower's own."""
    assert callable(run_clientapp.install_from_fab)  # type: ignore[attr-defined]
    assert callable(run_clientapp.get_load_client_app_fn)  # type: ignore[attr-defined]
    source = Path(run_clientapp.__file__).read_text()
    assert source.count("install_from_fab(") == 1
    assert source.count("get_load_client_app_fn(") == 1
