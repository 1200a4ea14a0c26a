import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from corolla.errors import ConfigError, PeerError, WireError
from corolla.host import certificates
from corolla.proto import device_pb2, device_pb2_grpc
from corolla.wire import rpc
from corolla.wire.packet import Packet
from corolla.wire.rpc import Wanted


@contextmanager
def trainer(
    folder: Path, answer: Callable[[Packet, Wanted], Packet], workers: int = 1
) -> Iterator[Path]:
    with rpc.private_socket(folder) as path:
        server = rpc.serve_trainer(answer, path, workers)
        try:
            yield path
        finally:
            server.stop(None).wait()


def echo(packet: Packet, wanted: Wanted) -> Packet:
    return Packet(packet.payload, packet.header)


def test_a_packet_and_its_answer_travel_whole(tmp_path: Path) -> None:
    large = os.urandom(1 << 20) * 9  # more than twice the 4 MB that gRPC takes by default
    with trainer(tmp_path, echo) as path:
        assert rpc.ask_trainer(path, Packet(b"head", large), 30) == Packet(large, b"head")
        assert rpc.ask_trainer(path, Packet(b"", b""), 30) == Packet(b"", b"")


def test_nobody_else_can_open_the_socket(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with trainer(tmp_path, echo) as path:
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert not path.exists()


def test_a_folder_that_was_open_to_all_is_closed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    with rpc.private_socket(tmp_path) as path:
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_path_too_long_for_a_socket_becomes_a_short_one(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    with trainer(deep, echo) as path:
        assert len(os.fsencode(path)) <= 103
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert rpc.ask_trainer(path, Packet(b"a", b"b"), 30) == Packet(b"b", b"a")
    assert not path.parent.exists()


def test_no_short_path_at_all_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("t" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(ConfigError, match="TMPDIR"), rpc.private_socket(deep):
        raise AssertionError("no socket can be here")


def test_the_socket_of_one_that_was_killed_is_replaced(tmp_path: Path) -> None:
    with rpc.private_socket(tmp_path) as path:
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(path))
        stale.close()
        server = rpc.serve_trainer(echo, path)
        try:
            assert rpc.ask_trainer(path, Packet(b"a", b""), 30).payload == b"a"
        finally:
            server.stop(None).wait()


def test_a_trainer_that_starts_late_is_waited_for(tmp_path: Path) -> None:
    with rpc.private_socket(tmp_path) as path:
        servers = []
        timer = threading.Timer(1.5, lambda: servers.append(rpc.serve_trainer(echo, path)))
        timer.start()
        try:
            assert rpc.ask_trainer(path, Packet(b"a", b"b"), 30) == Packet(b"b", b"a")
        finally:
            timer.join()
            servers[0].stop(None).wait()


def test_no_trainer_is_said_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(PeerError, match="no trainer answers") as caught:
        rpc.ask_trainer(tmp_path / "none.sock", Packet(b"", b""), 0.5)
    assert caught.value.gone
    assert time.monotonic() - began < 60


def test_a_busy_trainer_is_told_that_nobody_waits(tmp_path: Path) -> None:
    gave_up = threading.Event()

    def slow(packet: Packet, wanted: Wanted) -> Packet:
        while wanted():
            time.sleep(0.02)
        gave_up.set()
        return packet

    with trainer(tmp_path, slow) as path:
        with pytest.raises(PeerError, match="busy") as caught:
            rpc.ask_trainer(path, Packet(b"", b""), 3)
        assert not caught.value.gone
        assert gave_up.wait(60)


def test_packets_are_answered_one_at_a_time(tmp_path: Path) -> None:
    at_work, most = 0, 0

    def counted(packet: Packet, wanted: Wanted) -> Packet:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        time.sleep(0.1)
        at_work -= 1
        return packet

    with trainer(tmp_path, counted) as path:
        packet = Packet(b"x", b"")
        threads = [
            threading.Thread(target=rpc.ask_trainer, args=(path, packet, 30)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1


def test_what_was_given_up_while_it_waited_is_never_begun(tmp_path: Path) -> None:
    """The three share a connection: the end of the second is told before that of the first."""
    begun, first_begun = list[bytes](), threading.Event()

    def slow(packet: Packet, wanted: Wanted) -> Packet:
        begun.append(packet.header)
        first_begun.set()
        while packet.header == b"1" and wanted():
            time.sleep(0.01)
        return packet

    with trainer(tmp_path, slow) as path, grpc.insecure_channel(f"unix:{path}") as channel:
        ask = device_pb2_grpc.TrainerStub(channel).Answer  # type: ignore[no-untyped-call]
        first = ask.future(device_pb2.Packet(header=b"1"))
        assert first_begun.wait(60)
        second = ask.future(device_pb2.Packet(header=b"2"))
        second.cancel()
        first.cancel()
        assert ask(device_pb2.Packet(header=b"3"), timeout=60).header == b"3"
    assert begun == [b"1", b"3"]


def test_an_error_with_a_message_reaches_the_caller(tmp_path: Path) -> None:
    def refuse(packet: Packet, wanted: Wanted) -> Packet:
        raise WireError("header cannot be parsed")

    with (
        trainer(tmp_path, refuse) as path,
        pytest.raises(PeerError, match=r"^header cannot be parsed$"),
    ):
        rpc.ask_trainer(path, Packet(b"", b""), 30)


def test_an_error_without_one_tells_nothing_of_the_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(packet: Packet, wanted: Wanted) -> Packet:
        raise RuntimeError("row 7 says secret")

    with trainer(tmp_path, fail) as path, pytest.raises(PeerError) as caught:
        rpc.ask_trainer(path, Packet(b"", b""), 30)
    assert "secret" not in str(caught.value)
    assert "the trainer failed" in str(caught.value)


DYING = """
import os, sys
from pathlib import Path
from corolla.wire import rpc
server = rpc.serve_trainer(lambda packet, wanted: os._exit(9), Path(sys.argv[1]))
print("ready", flush=True)
server.wait_for_termination()
"""


def test_a_trainer_that_dies_at_work_is_gone(tmp_path: Path) -> None:
    with rpc.private_socket(tmp_path) as path:
        command = [sys.executable, "-c", DYING, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            with pytest.raises(PeerError, match="ended before") as caught:
                rpc.ask_trainer(path, Packet(b"", b""), 30)
            assert caught.value.gone
            assert process.wait(60) == 9


def test_who_answers_knows_how_long_its_caller_waits(tmp_path: Path) -> None:
    left: list[float] = []

    def answer(packet: Packet, waits: rpc.Waits) -> Packet:
        left.append(waits.left())
        return packet

    with rpc.private_socket(tmp_path) as path:
        server = rpc.serve_trainer(answer, path)
        try:
            rpc.ask_trainer(path, Packet(b"a", b""), 3600)
        finally:
            server.stop(None).wait()
    assert left == [pytest.approx(3600, rel=0.1)]  # gRPC rounds, and asks a clock that is set


def test_tls_is_served_and_a_foreign_ca_is_refused(tmp_path: Path) -> None:
    import grpc

    certificates.make(tmp_path / "ours", [])
    certificates.make(tmp_path / "theirs", [])
    ours = tmp_path / "ours"

    def served(address: str) -> rpc.TlsServer:
        certificate, key = ours / "server.pem", ours / "server.key"
        return rpc.tls_server(
            address, certificate, key, most_bytes=1, connections=9, add=lambda *_: None
        )

    server = served("127.0.0.1:0")
    try:
        for folder, trusted in (("ours", True), ("theirs", False)):
            ca = tmp_path / folder / "ca.pem"
            with rpc.tls_channel(f"127.0.0.1:{server.port}", ca, most_bytes=1 << 20) as channel:
                ready = grpc.channel_ready_future(channel)
                if trusted:
                    ready.result(timeout=60)
                else:
                    with pytest.raises(grpc.FutureTimeoutError):
                        ready.result(timeout=1)
                    ready.cancel()
        with pytest.raises(ConfigError, match="taken"):
            served(f"127.0.0.1:{server.port}")
    finally:
        server.stop()


def test_missing_certificates_are_one_line(tmp_path: Path) -> None:
    none = tmp_path / "none.pem"
    with pytest.raises(ConfigError, match=r"cannot read .*none\.pem"):
        rpc.tls_server("127.0.0.1:0", none, none, most_bytes=1, connections=9, add=lambda *_: None)
    with pytest.raises(ConfigError, match=r"cannot read .*none\.pem"):
        rpc.tls_channel("127.0.0.1:1", none, most_bytes=1)


def test_neither_torch_nor_flower_is_imported() -> None:
    heavy = "{'torch', 'flwr', 'numpy'}"
    code = f"import corolla.wire.rpc, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
