"""A phone's half of the protocol: it needs no torch, and survives whatever ends a call."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from corolla.client.device.settings import Own
from corolla.client.phone import delivery, session
from corolla.client.phone.clock import Clock
from corolla.client.phone.session import Phone, Settings
from corolla.client.phone.trainer import TorchTrainer
from corolla.errors import ConfigError, DataError, PeerError, StoppedError, WireError
from corolla.host import certificates
from corolla.host.processes import free_port
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.proto import update_pb2
from corolla.server.gateway.access import TokenFile
from corolla.server.gateway.service import serve_phones
from corolla.wire import messages, rpc
from corolla.wire.messages import Reply, Task
from corolla.wire.packet import Packet
from tests.client.phone.standing import Standing, lease_of, method
from tests.server.gateway import gateways
from tests.server.gateway.gateways import World
from tests.strategies import tiny

CONFIG = tiny.config("fedavg", rank=1, alpha=1.0, deadline=30.0)
LONG = CONFIG.model_copy(update={"deadline": 1000.0})


# --- no torch -------------------------------------------------------------------------------------

CHECK_IN = """
import sys
from pathlib import Path
from corolla.client.phone.session import Phone, Settings
from corolla.phones import protocol
from corolla.wire import rpc

class Nothing:
    def examples(self): return 3
    def missing(self, run_id, groups): return []
    def answer(self, client, packet, model, wanted): return protocol.given_up(
        protocol.read_task(packet.header), client, "no runtime here")

state, address, ca, token = sys.argv[1:]
with rpc.tls_channel(address, Path(ca), most_bytes=protocol.MAX_MESSAGE) as channel:
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


@pytest.mark.parametrize("visits", [1, 2])
def test_a_single_check_in_ends_where_nobody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visits: int
) -> None:
    """On a port that nobody has; it was tried for ever."""
    monkeypatch.setattr(session, "_PATIENCE", 0.05)
    certificates.make(tmp_path / "certs", ("localhost",))
    address = f"localhost:{free_port()}"
    ca = tmp_path / "certs" / "ca.pem"
    with rpc.tls_channel(address, ca, most_bytes=protocol.MAX_MESSAGE) as channel:
        idle = Scripted(gateways.a_task(CONFIG, seats=1))
        phone = Phone(Settings("p1", "t" * 32, tmp_path, pauses=(0.01, 0.02)), channel, idle)
        for _ in range(visits):
            with pytest.raises(PeerError, match=r"the gateway does not answer: .*UNAVAILABLE"):
                phone.run(once=True)


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
        self.thread.join(60)
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
    clock = changes.pop("clock", Clock())
    usual: dict[str, Any] = {"token": gateways.TOKEN, "pauses": (0.05, 0.2)}
    settings = Settings(device, state=world.folder / "phones" / device, **{**usual, **changes})
    return Phone(settings, world.channel(), trainer, clock=clock)


@pytest.fixture
def standing(tmp_path: Path, clock: Standing) -> Iterator[World]:
    """A gateway whose leases last 30 s of a clock that stands."""
    with gateways.serving(tmp_path, clock.now, seats=1, lease=30.0) as found:
        yield found


def test_a_phone_trains_for_as_long_as_it_takes_by_renewing_its_lease(
    standing: World, clock: Standing
) -> None:
    task = gateways.a_task(LONG, seats=1)
    trainer = Scripted(task, during=lambda wanted: clock.outlast(standing, 3))
    asked, phone = ask(standing, task), a_phone(standing, trainer, clock=clock)
    with phone.channel:
        phone.run(rounds=1)
    assert asked.result().clients == 1
    assert len(trainer.models) == 1


def test_a_phone_keeps_its_lease_while_it_uploads(
    standing: World, clock: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = gateways.a_task(LONG, seats=1)
    asked, phone = ask(standing, task), a_phone(standing, Scripted(task), clock=clock)
    deliver = delivery.deliver

    def slowly(*values: Any) -> Any:
        clock.outlast(standing, 3)
        return deliver(*values)

    monkeypatch.setattr(session, "deliver", slowly)
    with phone.channel:
        phone.visit()
    assert phone.done == 1
    assert asked.result().clients == 1


def test_a_phone_stops_within_a_step_once_nobody_wants_its_result(world: World) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    ended = threading.Event()

    def long(wanted: Callable[[], bool]) -> None:
        gateways.until(lambda: not wanted())
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
        threads[0].join(60)
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
    lapsed: dict[str, bool], why: str, standing: World, clock: Standing
) -> None:
    task = gateways.a_task(LONG, seats=1)
    now = {"charging": True, "idle": True, "metered": False}

    def unplug(wanted: Callable[[], bool]) -> None:
        assert wanted()
        now.update(lapsed)
        clock.at += 1.0
        assert not wanted()

    said: list[str] = []
    trainer = Scripted(task, during=unplug)
    phone = a_phone(standing, trainer, conditions=lambda: now, clock=clock)
    phone.say = said.append
    asked = ask(standing, task)
    with phone.channel:
        phone.run(once=True)
        lease = lease_of(standing)
        assert (lease.phase, lease.why) == ("given_up", why)
        phone.run(once=True)
    assert said[0] == f"round 1 as gate/p1: not accepted: {why}"
    held = why.removeprefix("given up: ").removesuffix(" any more")
    assert said[1] == f"waiting: {held}"  # it does not even check in
    clock.at += LONG.deadline
    assert asked.result().error


def test_a_reply_that_a_dead_phone_left_is_delivered_without_training_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    asked = ask(world, task)
    trainer = Scripted(task, value=0.5)
    first = a_phone(world, trainer)

    class Killed(Exception):  # noqa: N818 - it is no error
        pass

    def die(*_: Any) -> Any:
        raise Killed

    with first.channel, monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(session, "deliver", die)
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
        back.wait(60)

    trainer = Scripted(one, during=wait)
    with gateways.serving(tmp_path, seats=1) as world:
        port = int(world.address.partition(":")[2])
        phone, said = a_phone(world, trainer), list[str]()
        phone.say = said.append
        serving = threading.Thread(target=lambda: phone.run(rounds=1))
        packet = messages.pack_task(replace(one, config=one.config.replace("30.0", "3.0")))
        answering = threading.Thread(target=lambda: world.gateway.answer(packet))
        answering.start()
        serving.start()
        assert training.wait(60)
    trainer.task = two
    back.set()  # the phone delivers to nobody
    gateways.until(lambda: said and said[-1].startswith("no answer, trying again"))
    own = tmp_path / "certs"
    gateway = type(world.gateway)(replace(world.gateway.settings))
    server = serve_phones(
        gateway,
        TokenFile(gateways.tokens(tmp_path)),
        f"localhost:{port}",
        own / "gateway.pem",
        own / "gateway.key",
    )
    try:
        asked = ask(replace(world, gateway=gateway), two)
        found = asked.result()
        serving.join(60)
    finally:
        server.stop()
        phone.channel.close()
        answering.join()
    assert (found.clients, found.round) == (1, 2)
    assert phone.done == 1


def test_a_phone_that_is_stopped_says_so_to_the_gateway(standing: World, clock: Standing) -> None:
    task = gateways.a_task(LONG, seats=1)
    asked = ask(standing, task)
    phone = a_phone(standing, Scripted(task), clock=clock)

    def stop(wanted: Callable[[], bool]) -> None:
        phone.stop.set()
        assert not wanted()

    phone.trainer = Scripted(task, during=stop)
    with phone.channel, suppress(StoppedError):
        phone.run()
    assert lease_of(standing).why == "given up: the device was stopped"
    clock.at += LONG.deadline
    asked.result()


def test_what_is_wrong_with_its_data_is_said_to_the_owner_alone(
    standing: World, clock: Standing
) -> None:
    task = gateways.a_task(LONG, seats=1)
    why = "/home/eve/clinic.jsonl, line 3: unknown split 'secret'"

    def fail(wanted: Callable[[], bool]) -> None:
        raise DataError(why)

    said: list[str] = []
    asked = ask(standing, task)
    phone = a_phone(standing, Scripted(task, during=fail), clock=clock)
    phone.say = said.append
    with phone.channel:
        phone.run(once=True)
    assert lease_of(standing).why == "this device's data cannot be used"
    assert why in said
    clock.at += LONG.deadline
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
        assert (folder / "model.safetensors").read_bytes() == (
            model / "model.safetensors"
        ).read_bytes()
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
                phone._serve(lease)
        else:
            with pytest.raises(WireError, match="32 hexadecimal"):
                phone._work(lease).assembled(head)
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
            patch.setattr("corolla.client.phone.kept.write_packet", full)
            assert phone.visit() == phone.settings.pauses[1]
        assert said == ["this device fails: No space left on device"]
        phone.run(rounds=1)
    assert asked.result().clients == 1


def test_a_phone_that_is_stopped_while_it_downloads_ends(world: World) -> None:
    phone = a_phone(world, Scripted(gateways.a_task(CONFIG)))
    phone.stop.set()
    with phone.channel, pytest.raises(StoppedError):
        phone.caller.download(pb.DownloadRequest(sha256="0" * 64), 1)


def test_a_task_that_cannot_be_read_is_given_up(world: World) -> None:
    phone, reports = a_phone(world, Scripted(gateways.a_task(CONFIG))), list[pb.ReportRequest]()

    def report(request: pb.ReportRequest) -> pb.Acknowledgement:
        reports.append(request)
        return pb.Acknowledgement(why="given up")

    class Stub:
        Report = method(report, pb.Acknowledgement)

    phone.caller.stub = Stub()
    blob = pb.Blob(sha256=protocol.sha256(b"\xff"), size=1, inline=b"\xff")
    with phone.channel:
        phone._serve(pb.Lease(id="0" * 32, client="gate/p1", task=blob, seconds=60))
    (request,) = reports
    reply = update_pb2.Reply.FromString(request.reply)
    assert reply.error.startswith("the task cannot be read: ")
    assert not phone.done


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
    said, waits = list[str](), list[float]()

    class Short(Clock):
        def wait(self, event: threading.Event, seconds: float) -> bool:
            waits.append(seconds)
            return event.wait(0.001)

    with rpc.tls_channel("localhost:1", own / "ca.pem", most_bytes=protocol.MAX_MESSAGE) as channel:
        settings = Settings("p1", gateways.TOKEN, tmp_path / "p1", pauses=(1.0, 60.0))
        trainer = Scripted(gateways.a_task(CONFIG))
        phone = Phone(settings, channel, trainer, say=said.append, clock=Short())
        thread = threading.Thread(target=lambda: gateways.served(phone))
        thread.start()
        gateways.until(lambda: len(waits) >= 10)
        assert thread.is_alive()
        phone.stop.set()
        thread.join(60)
    assert said == ["no answer, trying again: UNAVAILABLE"]
    growing = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert all(0.5 <= wait / pause <= 1.5 for wait, pause in zip(waits, growing, strict=False))


def test_grpc_is_what_carries_it() -> None:
    """The names that a native client implements are those of the service."""
    names = {m.name for m in pb.DESCRIPTOR.services_by_name["Phones"].methods}
    assert names == {"CheckIn", "Download", "Upload", "Report", "Heartbeat"}
    assert grpc.StatusCode.UNAUTHENTICATED.value[0] == 16


@pytest.mark.parametrize(("limit", "wanted"), [({}, 7), ({"epsilon": 4.0, "delta": 1e-5}, 2)])
def test_a_limited_phone_tells_the_number_of_its_users_alone(
    tmp_path: Path, limit: dict[str, float], wanted: int
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"text": f"{i}", "user_id": "a" if i else "b"} for i in range(7)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {"server": "localhost:1", "data": str(rows), "model": "embedded", "state": tmp_path}
    assert TorchTrainer(Own.model_validate({**own, **limit})).examples() == wanted
