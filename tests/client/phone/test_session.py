"""A phone's half of the protocol: it needs no torch, and survives whatever ends a call."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corolla.client.device.settings import Own
from corolla.client.phone.downloads import fetch, fetch_model, verified
from corolla.client.phone.session import Phone, Settings, _read_packet, _write_packet
from corolla.client.phone.trainer import TorchTrainer
from corolla.errors import ConfigError, DataError, StoppedError, WireError
from corolla.host import certificates
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import update_pb2
from corolla.server.gateway.blobs import Blobs, manifest
from corolla.server.gateway.service import serve_phones
from corolla.wire import messages, rpc
from corolla.wire.messages import Reply, Task
from corolla.wire.packet import Packet
from tests.server.gateway import gateways
from tests.server.gateway.gateways import World
from tests.strategies import tiny

MIB = protocol.CHUNK
CONFIG = tiny.config("fedavg", rank=1, alpha=1.0, deadline=30.0)


# --- no torch -------------------------------------------------------------------------------------

CHECK_IN = """
import sys
from pathlib import Path
from corolla import calls, rpc
from corolla.client.phone.session import Phone, Settings

class Nothing:
    def examples(self): return 3
    def missing(self, run_id, groups): return []
    def answer(self, client, packet, model, wanted): return calls.given_up(
        calls.read_task(packet.header), client, "no runtime here")

state, address, ca, token = sys.argv[1:]
with rpc.tls_channel(address, Path(ca), most_bytes=calls.MAX_MESSAGE) as channel:
    phone = Phone(Settings("p1", token, Path(state)), channel, Nothing(), say=print)
    phone.run(once=True)
heavy = {"torch", "transformers", "flwr", "safetensors", "pydantic", "cryptography"}
print("heavy:", sorted(heavy & sys.modules.keys()))
"""


def test_a_phone_that_has_no_torch_checks_in_and_reports(tmp_path: Path) -> None:
    task = gateways.a_task(CONFIG.model_copy(update={"deadline": 12.0}), seats=1)
    with gateways.serving(tmp_path, seats=1) as world:
        answering = threading.Thread(target=lambda: world.gateway.answer(messages.pack_task(task)))
        answering.start()
        gateways.until(lambda: world.gateway.rounds.job)
        ca = tmp_path / "certs" / "ca.pem"
        arguments = [str(tmp_path / "state"), world.address, str(ca), gateways.TOKEN]
        done = subprocess.run(
            [sys.executable, "-c", CHECK_IN, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        answering.join()
    assert done.stdout.splitlines() == [
        "round 1 as gate/p1: not accepted: no runtime here",
        "heavy: []",
    ]


# --- downloads ------------------------------------------------------------------------------------


@dataclass
class Line:
    """A gateway's blobs at the end of a line that is cut after so many bytes."""

    blobs: Blobs
    bytes_left: float = float("inf")
    spoil: Callable[[pb.Chunk, int], None] = lambda chunk, number: None
    asked: list[int] = field(default_factory=list)

    def __call__(self, request: pb.DownloadRequest) -> pb.Chunk:
        chunk = self.blobs.chunk(request.sha256, request.offset)
        self.asked.append(request.offset)
        self.bytes_left -= len(chunk.content)
        if self.bytes_left < 0:
            raise ConnectionError("cut")
        self.spoil(chunk, len(self.asked))
        return chunk


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a model: an empty one, one of a few bytes, one of several chunks."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(os.urandom(3 * MIB + 1234))
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenizer.json").write_bytes(os.urandom(100_000))
    return folder


def offered(model: Path, folder: Path) -> tuple[Line, pb.Blob]:
    blobs = Blobs(folder / "blobs")
    data, files = manifest(model)
    for name, path in files.items():
        blobs.share(name, path, path.stat().st_size)
    return Line(blobs), blobs.put(data)


def same(found: Path, model: Path) -> bool:
    files = [path for path in model.rglob("*") if path.is_file()]
    return all((found / p.relative_to(model)).read_bytes() == p.read_bytes() for p in files)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 3 * MIB + 1234), tail=st.binary(max_size=3))
def test_a_model_download_that_was_cut_at_any_byte_goes_on(
    cut: int, tail: bytes, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("phone")
    line, blob = offered(model, folder)
    part = folder / "models" / f"{blob.sha256}.part" / "model.safetensors"
    part.parent.mkdir(parents=True)
    weights = (model / "model.safetensors").read_bytes()
    part.write_bytes(weights[:cut] + tail)
    found = fetch_model(blob, folder / "models", line)
    assert same(found, model)
    assert verified(found)
    missing = [at for at in range(0, len(weights), MIB) if cut < min(at + MIB, len(weights))]
    kept = [at for at in missing if (weights[:cut] + tail)[at:][:MIB] == weights[at:][:MIB]]
    assert len(line.asked) == len(missing) - len(kept) + 2  # the empty file is asked for nowhere


def test_a_line_that_is_cut_again_and_again_costs_no_chunk_twice(
    model: Path, tmp_path: Path
) -> None:
    line, blob = offered(model, tmp_path)
    cuts = 0
    while True:
        line.bytes_left = 1.5 * MIB
        try:
            found = fetch_model(blob, tmp_path / "models", line)
            break
        except ConnectionError:
            cuts += 1
            assert not (tmp_path / "models" / blob.sha256).exists()
    assert same(found, model)
    assert cuts >= 2
    assert len(line.asked) <= 6 + cuts


def test_a_damaged_chunk_is_asked_for_again(model: Path, tmp_path: Path) -> None:
    line, blob = offered(model, tmp_path)

    def spoil(chunk: pb.Chunk, number: int) -> None:
        if number % 2:
            chunk.content = b"x" + chunk.content[1:]
        if number % 4 == 1:
            chunk.crc32 = protocol.chunk(chunk.content, 0, 1).crc32  # damaged before it was sent

    line.spoil = spoil
    assert same(fetch_model(blob, tmp_path / "models", line), model)


def test_a_chunk_that_is_wrong_for_ever_is_refused_and_nothing_is_loaded(
    model: Path, tmp_path: Path
) -> None:
    line, blob = offered(model, tmp_path)

    def spoil(chunk: pb.Chunk, number: int) -> None:
        content = b"x" + chunk.content[1:]
        chunk.CopyFrom(protocol.chunk(content, chunk.offset, chunk.size))

    line.spoil = spoil
    with pytest.raises(WireError, match="wrong chunk at 0"):
        fetch_model(blob, tmp_path / "models", line)
    assert not (tmp_path / "models" / blob.sha256).exists()
    assert len(line.asked) == 3


def test_bytes_that_are_not_those_announced_are_refused(tmp_path: Path) -> None:
    """A blob without checksums of its chunks is checked as a whole, and fetched anew."""
    blobs, data = Blobs(tmp_path / "blobs"), os.urandom(MIB + 5)
    line = Line(blobs)
    blob = blobs.put(data)
    part = tmp_path / f"{blob.sha256}.part"
    part.write_bytes(b"x" * MIB)
    with pytest.raises(WireError, match="does not match its checksum"):
        fetch(blob, tmp_path, line, 2 * MIB)
    assert not part.exists()
    assert fetch(blob, tmp_path, line, 2 * MIB) == data
    with pytest.raises(WireError, match="at most"):
        fetch(blob, tmp_path, line, MIB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blobs"]


def test_a_model_that_was_changed_on_disk_is_not_loaded_but_fetched_again(
    model: Path, tmp_path: Path
) -> None:
    line, blob = offered(model, tmp_path)
    found = fetch_model(blob, tmp_path / "models", line)
    before = len(line.asked)
    assert fetch_model(blob, tmp_path / "models", line) == found
    assert len(line.asked) == before
    with (found / "model.safetensors").open("r+b") as file:
        file.seek(MIB)
        file.write(b"x")
    assert not verified(found)
    assert same(fetch_model(blob, tmp_path / "models", line), model)


# --- sessions -------------------------------------------------------------------------------------


@dataclass
class Scripted:
    """A PhoneTrainer that does what the test says."""

    task: Task
    client: str = "gate/p1"
    value: float = 1.0
    during: Callable[[Callable[[], bool]], None] = lambda wanted: None
    models: list[Path | None] = field(default_factory=list)

    def examples(self) -> int:
        return 5

    def missing(self, run_id: str, groups: Mapping[str, str]) -> Sequence[str]:
        return list(groups)

    def answer(
        self, client: str, packet: Packet, model: Path | None, wanted: Callable[[], bool]
    ) -> Packet:
        assert client == self.client
        self.models.append(model)
        self.during(wanted)
        return gateways.update_of(self.task, client, self.value)


@dataclass
class Asked:
    """A task in progress, and its reply."""

    thread: threading.Thread
    replies: list[Reply]

    def result(self) -> Reply:
        self.thread.join(20)
        return self.replies[0]


def ask(world: World, task: Task) -> Asked:
    replies: list[Reply] = []

    def run() -> None:
        packet = world.gateway.answer(messages.pack_task(task))
        replies.append(messages.unpack_reply(packet, len(packet.payload)))

    thread = threading.Thread(target=run)
    thread.start()
    gateways.until(lambda: world.gateway.rounds.job or replies)
    return Asked(thread, replies)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with gateways.serving(tmp_path, seats=1, lease=0.6) as found:
        yield found


def a_phone(world: World, trainer: Any, device: str = "p1", **changes: Any) -> Phone:
    usual: dict[str, Any] = {"token": gateways.TOKEN, "pauses": (0.05, 0.2)}
    settings = Settings(device, state=world.folder / "phones" / device, **{**usual, **changes})
    return Phone(settings, world.channel(), trainer)


def test_a_phone_trains_for_as_long_as_it_takes_by_renewing_its_lease(world: World) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    trainer = Scripted(task, during=lambda wanted: time.sleep(2))
    asked, phone = ask(world, task), a_phone(world, trainer)
    with phone.channel:
        phone.run(rounds=1)
    assert asked.result().clients == 1
    assert len(trainer.models) == 1


def test_a_phone_stops_within_a_step_once_nobody_wants_its_result(world: World) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    ended = threading.Event()

    def long(wanted: Callable[[], bool]) -> None:
        asked_until = time.monotonic() + 10
        while wanted() and time.monotonic() < asked_until:
            time.sleep(0.01)
        ended.set()

    said: list[str] = []
    slow = a_phone(world, Scripted(task, during=long))
    slow.say = said.append
    fast = a_phone(world, Scripted(task, "gate/p2"), "p2")
    asked = ask(world, task)
    with slow.channel, fast.channel:
        threads = [threading.Thread(target=slow.visit)]
        threads[0].start()
        gateways.until(lambda: world.gateway.rounds.job and world.gateway.rounds.job.round.leases)
        fast.run(rounds=1)
        threads[0].join(5)
    assert ended.is_set()
    assert asked.result().clients == 1
    assert said[-1].startswith("round 1 as gate/p1: not accepted")


@pytest.mark.parametrize(
    ("lapsed", "why"),
    [
        ({"charging": False}, "given up: not charging any more"),
        ({"metered": True}, "given up: not on an unmetered network any more"),
        ({"idle": False}, "given up: not idle any more"),
    ],
)
def test_a_phone_whose_conditions_lapse_gives_up_and_says_so(
    lapsed: dict[str, bool], why: str, world: World
) -> None:
    task = gateways.a_task(CONFIG.model_copy(update={"deadline": 6.0}), seats=1)
    now = {"charging": True, "idle": True, "metered": False}

    def unplug(wanted: Callable[[], bool]) -> None:
        assert wanted()
        now.update(lapsed)
        gateways.until(lambda: not wanted(), 2)

    said: list[str] = []
    phone = a_phone(world, Scripted(task, during=unplug), conditions=lambda: now)
    phone.say = said.append
    asked = ask(world, task)
    with phone.channel:
        phone.run(once=True)
        job = world.gateway.rounds.job
        assert job
        (lease,) = job.round.leases.values()
        assert (lease.phase, lease.why) == ("given_up", why)
        phone.run(once=True)
    assert said[0] == f"round 1 as gate/p1: not accepted: {why}"
    held = why.removeprefix("given up: ").removesuffix(" any more")
    assert said[1] == f"waiting: {held}"  # it does not even check in
    assert asked.result().error


def test_a_reply_that_a_dead_phone_left_is_delivered_without_training_again(world: World) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    asked = ask(world, task)
    trainer = Scripted(task, value=0.5)
    first = a_phone(world, trainer)

    class Killed(Exception):  # noqa: N818 - it is no error
        pass

    def die(*_: Any) -> Any:
        raise Killed

    first._deliver = die  # type: ignore[method-assign,assignment]
    with first.channel, pytest.raises(Killed):
        first.visit()
    second = a_phone(world, trainer)
    with second.channel:
        second.run(rounds=1)
    assert len(trainer.models) == 1
    assert asked.result().clients == 1
    assert not list((world.folder / "phones" / "p1").glob("reply-*"))


def test_a_phone_outlives_a_gateway_that_starts_again(tmp_path: Path) -> None:
    """Killed while the phone trains: its round is lost, the phone serves the next one."""
    one, two = gateways.a_task(CONFIG, seats=1), gateways.a_task(CONFIG, seats=1, round=2)
    training, back = threading.Event(), threading.Event()

    def wait(wanted: Callable[[], bool]) -> None:
        training.set()
        back.wait(10)

    trainer = Scripted(one, during=wait)
    with gateways.serving(tmp_path, seats=1) as world:
        port = int(world.address.partition(":")[2])
        phone = a_phone(world, trainer)
        serving = threading.Thread(target=lambda: phone.run(rounds=1))
        packet = messages.pack_task(replace(one, config=one.config.replace("30.0", "3.0")))
        answering = threading.Thread(target=lambda: world.gateway.answer(packet))
        answering.start()
        serving.start()
        assert training.wait(10)
    trainer.task = two
    back.set()  # the phone delivers to nobody
    time.sleep(0.5)
    own = tmp_path / "certs"
    gateway = type(world.gateway)(replace(world.gateway.settings))
    server, _ = serve_phones(
        gateway,
        gateways.tokens(tmp_path),
        f"localhost:{port}",
        own / "gateway.pem",
        own / "gateway.key",
    )
    try:
        asked = ask(replace(world, gateway=gateway), two)
        found = asked.result()
        serving.join(10)
    finally:
        server.stop(None).wait()
        phone.channel.close()
        answering.join()
    assert (found.clients, found.round) == (1, 2)
    assert phone.done == 1


def test_a_phone_that_is_stopped_says_so_to_the_gateway(world: World) -> None:
    task = gateways.a_task(CONFIG.model_copy(update={"deadline": 6.0}), seats=1)
    asked = ask(world, task)
    phone = a_phone(world, Scripted(task))

    def stop(wanted: Callable[[], bool]) -> None:
        phone.stop.set()
        gateways.until(lambda: not wanted(), 2)

    phone.trainer = Scripted(task, during=stop)
    with phone.channel, suppress(StoppedError):
        phone.run()
    job = world.gateway.rounds.job
    assert job
    assert [own.why for own in job.round.leases.values()] == ["given up: the device was stopped"]
    asked.result()


def test_what_is_wrong_with_its_data_is_said_to_the_owner_alone(world: World) -> None:
    task = gateways.a_task(CONFIG.model_copy(update={"deadline": 6.0}), seats=1)
    why = "/home/eve/clinic.jsonl, line 3: unknown split 'secret'"

    def fail(wanted: Callable[[], bool]) -> None:
        raise DataError(why)

    said: list[str] = []
    asked, phone = ask(world, task), a_phone(world, Scripted(task, during=fail))
    phone.say = said.append
    with phone.channel:
        phone.run(once=True)
    job = world.gateway.rounds.job
    assert job
    (found,) = [own.why for own in job.round.leases.values()]
    assert found == "this device's data cannot be used"
    assert why in said
    asked.result()


def test_a_trainer_of_a_phone_tells_its_owner_why(
    tiny_model: Path, tmp_path: Path, federation_file: Path
) -> None:
    """Its data may change before its model is loaded, and after."""
    rows = tmp_path / "rows.jsonl"
    good, bad = federation_file.read_text(), '{"text": "a", "split": "secret"}\n'
    rows.write_text(good)
    own: dict[str, Any] = {"server": "localhost:1", "data": str(rows), "model": str(tiny_model)}
    mine = Own.model_validate({**own, "state": tmp_path / "state", "threads": 1, "device": "cpu"})
    said: list[str] = []
    trainer = TorchTrainer(mine, said.append)

    def answer(rank: int) -> str:
        told = json.dumps({"run": {"rank": rank, "max_length": 48}})
        packet = messages.pack_task(Task("ab" * 16, 0, "", messages.Kind.HELLO, told))
        return messages.unpack_reply(trainer.answer("g/p", packet, None, lambda: True), 0).error

    rows.write_text(bad)
    with pytest.raises(DataError, match="secret"):  # the phone tells its owner
        answer(2)
    rows.write_text(good)
    assert answer(2) == ""
    rows.write_text(bad)
    assert answer(3) == "this device's data cannot be used"
    assert "secret" in said[-1]


def test_a_phone_without_a_model_gets_the_gateways(model: Path, tmp_path: Path) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    with gateways.serving(tmp_path, seats=1, share_model=model) as world:
        trainer = Scripted(task)
        phone = a_phone(world, trainer, own_model=False)
        asked = ask(world, task)
        with phone.channel:
            phone.run(rounds=1)
        assert asked.result().clients == 1
        (folder,) = trainer.models
        assert folder
        assert same(folder, model)
        # A phone that starts again finds it, checks it, and does not ask for it.
        shutil.rmtree(tmp_path / "gate" / "blobs")
        again = a_phone(world, trainer, own_model=False)
        with again.channel:
            again.run(once=True)
        assert again._model() == folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": "nobody's-token-at-all"}, "the gateway does not know the token"),
        ({"device": "p9", "token": gateways.OTHER}, ""),
        ({"own_model": False}, "offers no base model: name one with --model"),
    ],
)
def test_what_only_the_owner_can_mend_ends_a_phone_with_one_line(
    changes: dict[str, Any], message: str, world: World
) -> None:
    phone = a_phone(world, Scripted(gateways.a_task(CONFIG)), **changes)
    with phone.channel:
        if not message:
            phone.run(once=True)
            return
        with pytest.raises(ConfigError) as caught:
            phone.run()
    assert message.replace("the gateway", "this gateway") in str(caught.value) or message in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("content", "/home/owner/precious"),
        ("content", "../../precious"),
        ("run_id", "../../.."),
        ("client", "gate/p2"),
        ("client", "gate/p1/../p2"),
    ],
)
def test_names_that_a_gateway_sends_are_no_paths(
    field: str, value: str, world: World, tmp_path: Path
) -> None:
    task = gateways.a_task(CONFIG)
    trainer = Scripted(task)
    trainer.missing = lambda run_id, groups: pytest.fail("asked with unchecked names")  # type: ignore[method-assign]
    phone = a_phone(world, trainer)
    head = protocol.read_task(messages.pack_task(task).header)
    if field == "run_id":
        head.run_id = value
    data = head.SerializeToString()
    blob = pb.Blob(sha256=protocol.sha256(data), size=len(data), inline=data)
    content = value if field == "content" else "0" * 32
    lease = pb.Lease(
        id="0" * 32,
        client=value if field == "client" else "gate/p1",
        task=blob,
        cached=[pb.Blob(group="g", content=content)],
        seconds=60,
        deadline_seconds=60,
    )
    with phone.channel:
        if field == "client":
            with pytest.raises(WireError, match="another device"):
                phone._session(lease)
        else:
            with pytest.raises(WireError, match="32 hexadecimal"):
                phone._assemble(lease, head, time.monotonic() + 5)
    assert not trainer.models


def test_a_name_that_is_taken_is_asked_for_again_later(world: World) -> None:
    said: list[str] = []
    phone = a_phone(world, Scripted(gateways.a_task(CONFIG)), token=gateways.OTHER)
    phone.say = said.append
    with phone.channel:
        assert phone.visit() == phone.settings.pauses[1]
    assert said == ["waiting: this token is of device 'p9'"]


def test_a_full_disk_is_said_and_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    asked, phone, said = ask(world, task), a_phone(world, Scripted(task)), list[str]()
    phone.say = said.append

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with phone.channel:
        with monkeypatch.context() as patch:
            patch.setattr("corolla.client.phone.session._write_packet", full)
            assert phone.visit() == phone.settings.pauses[1]
        assert said == ["this device fails: No space left on device"]
        phone.run(rounds=1)
    assert asked.result().clients == 1


def test_a_phone_that_is_stopped_while_it_downloads_ends(world: World) -> None:
    phone = a_phone(world, Scripted(gateways.a_task(CONFIG)))
    phone.stop.set()
    with phone.channel, pytest.raises(StoppedError):
        phone._download(pb.DownloadRequest(sha256="0" * 64))


def test_a_reply_on_the_disk_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "reply"
    _write_packet(path, Packet(b"a", b"b"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert _read_packet(path) == Packet(b"a", b"b")


class TooSlow(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.DEADLINE_EXCEEDED

    def details(self) -> str:
        return ""


def test_on_a_slow_line_an_update_goes_up_in_smaller_chunks_and_the_lease_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone = a_phone(world, Scripted(gateways.a_task(CONFIG)))
    payload, taken, sizes = os.urandom(MIB + 1000), bytearray(), list[int]()

    def upload(chunk: pb.Chunk, **_: Any) -> pb.UploadStatus:
        sizes.append(len(chunk.content))
        if sizes[-1] > 1 << 18:
            raise TooSlow
        taken.extend(chunk.content)
        return pb.UploadStatus(received=len(taken))

    class Stub:
        Upload = staticmethod(upload)
        Report = staticmethod(lambda request, **_: pb.Acknowledgement(accepted=True))

    phone._stub = Stub()
    with phone.channel:
        lease = pb.Lease(id="0" * 32)
        found = phone._deliver(lease, Packet(b"", payload), time.monotonic() + 5)
    assert found.accepted
    assert taken == payload
    assert sizes[:3] == [MIB, MIB >> 1, MIB >> 2]


@pytest.mark.parametrize(
    ("steps", "most"),
    [([1, 0], 25), ([1], 30)],
    ids=["back and forth", "byte by byte"],
)
def test_an_upload_ends_whatever_the_gateway_says_it_received(
    world: World, steps: list[int], most: int
) -> None:
    phone, calls_made = a_phone(world, Scripted(gateways.a_task(CONFIG))), 0

    def upload(chunk: pb.Chunk, **_: Any) -> pb.UploadStatus:
        nonlocal calls_made
        received = calls_made + 1 if steps == [1] else steps[calls_made % 2]
        calls_made += 1
        return pb.UploadStatus(received=received)

    class Stub:
        Upload = staticmethod(upload)

    phone._stub = Stub()
    packet = Packet(b"", bytes(2 * MIB))
    with phone.channel, pytest.raises(Exception, match="does not take the update in"):
        phone._deliver(pb.Lease(id="0" * 32), packet, time.monotonic() + 60)
    assert calls_made <= most


def test_an_upload_ends_with_its_round(world: World) -> None:
    phone = a_phone(world, Scripted(gateways.a_task(CONFIG)))
    with phone.channel, pytest.raises(Exception, match="the round is over"):
        phone._deliver(pb.Lease(id="0" * 32), Packet(b"", b"x"), time.monotonic() - 1)


def test_a_task_that_cannot_be_read_is_given_up(world: World) -> None:
    phone, reports = a_phone(world, Scripted(gateways.a_task(CONFIG))), list[pb.ReportRequest]()

    def report(request: pb.ReportRequest, **_: Any) -> pb.Acknowledgement:
        reports.append(request)
        return pb.Acknowledgement(why="given up")

    class Stub:
        Report = staticmethod(report)

    phone._stub = Stub()
    blob = pb.Blob(sha256=protocol.sha256(b"\xff"), size=1, inline=b"\xff")
    with phone.channel:
        phone._session(pb.Lease(id="0" * 32, client="gate/p1", task=blob, seconds=60))
    (request,) = reports
    reply = update_pb2.Reply.FromString(request.reply)
    assert reply.error.startswith("the task cannot be read: ")
    assert not phone.done


def test_a_phone_keeps_its_lease_while_it_uploads(world: World) -> None:
    """The lease lasts 0.6 s, the upload longer."""
    task = gateways.a_task(CONFIG, seats=1)
    asked, phone = ask(world, task), a_phone(world, Scripted(task))
    deliver = phone._deliver

    def slowly(*values: Any) -> Any:
        time.sleep(1.5)
        return deliver(*values)

    phone._deliver = slowly  # type: ignore[method-assign,assignment]
    with phone.channel:
        phone.visit()
    assert phone.done == 1
    assert asked.result().clients == 1


def test_a_new_model_takes_the_place_of_the_old(model: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / ("0" * 64)).mkdir(parents=True)
    (models / f"{'1' * 64}.part").mkdir()
    line, blob = offered(model, tmp_path)
    found = fetch_model(blob, models, line)
    assert list(models.iterdir()) == [found]
    assert same(found, model)
    assert {file.path for file in protocol.read_manifest(manifest(found)[0]).files} == {
        file.path for file in protocol.read_manifest(manifest(model)[0]).files
    }  # it can be passed on


def test_a_gateway_with_a_certificate_of_somebody_else_is_not_spoken_to(
    world: World, tmp_path: Path
) -> None:
    certificates.make(tmp_path / "others", ["localhost"])
    phone = a_phone(world, Scripted(gateways.a_task(CONFIG)))
    phone.channel.close()
    with rpc.tls_channel(
        world.address, tmp_path / "others" / "ca.pem", most_bytes=protocol.MAX_MESSAGE
    ) as channel:
        stranger = Phone(phone.settings, channel, phone.trainer)
        with pytest.raises(ConfigError, match="certificate is not signed by --root-certificates"):
            stranger.run(once=True)


def test_while_nobody_answers_a_phone_tries_for_ever_and_says_so_once(tmp_path: Path) -> None:
    own = gateways.certificates(tmp_path / "certs")
    said: list[str] = []
    with rpc.tls_channel("localhost:1", own / "ca.pem", most_bytes=protocol.MAX_MESSAGE) as channel:
        settings = Settings("p1", gateways.TOKEN, tmp_path / "p1", pauses=(0.01, 0.05))
        phone = Phone(settings, channel, Scripted(gateways.a_task(CONFIG)), say=said.append)
        thread = threading.Thread(target=lambda: gateways.served(phone))
        thread.start()
        time.sleep(1.0)
        assert thread.is_alive()
        phone.stop.set()
        thread.join(5)
    assert said == ["no answer, trying again: UNAVAILABLE"]


def test_grpc_is_what_carries_it() -> None:
    """The names that a native client implements are those of the service."""
    names = {m.name for m in pb.DESCRIPTOR.services_by_name["Phones"].methods}
    assert names == {"CheckIn", "Download", "Upload", "Report", "Heartbeat"}
    assert grpc.StatusCode.UNAUTHENTICATED.value[0] == 16
