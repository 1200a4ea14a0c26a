"""Native phones of a gateway: they get programs that fit, and train as the class they can be of."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.client.phone.downloads import fetch
from corolla.client.training.worker import Worker
from corolla.config.run import RunConfig
from corolla.directions import seedlog
from corolla.errors import ConfigError
from corolla.host import logs
from corolla.phones import bundle, protocol
from corolla.phones.budget import Demand
from corolla.proto import device_pb2 as pb
from corolla.proto import update_pb2
from corolla.server.gateway.blobs import Blobs
from corolla.server.gateway.gateway import Gateway
from corolla.server.gateway.merging import prepare
from corolla.server.gateway.natives import Natives
from corolla.server.gateway.programs import Programs
from corolla.server.gateway.settings import GatewaySettings
from corolla.storage.memory import Memory
from corolla.strategies import offset
from corolla.tensors import tree
from corolla.wire import codec, messages
from corolla.wire.messages import Task
from corolla.wire.packet import Packet
from tests.server.gateway import gateways
from tests.server.gateway.callers import CONFIG, Caller, asked
from tests.server.gateway.gateways import Behind, Clock, Course, Flat, Shared, World
from tests.strategies import tiny

FRESH = {"m.lora_A": torch.zeros(1, 2), "m.lora_B": torch.zeros(2, 1)}
"""The adapter of gateways.a_task."""
MB = 10**6
CLASSES = {
    "strong": {"trainer": "first_order"},
    "weak": {"trainer": "zeroth_order", "local_steps": 3},
}


def able(memory: int = 4000) -> update_pb2.Capabilities:
    return update_pb2.Capabilities(charging=True, idle=True, memory_bytes=memory * MB)


def native(**changes: Any) -> pb.Native:
    usual: dict[str, Any] = {
        "methods": ["grad", "loss"],
        "strategies": ["fedavg", "mixed", "seed_pool"],
        "signs": 1,
        "runtime": "executorch 1.5.1",
    }
    return pb.Native(**{**usual, **changes})


@dataclass
class Native:
    """A native phone by hand. A Worker trains in place of programs."""

    caller: Caller
    folder: Path
    methods: str = "grad loss"
    memory: int = 4000
    files: list[str] = field(default_factory=list)
    manifest: str = ""
    version: str = ""
    groups: list[list[str]] = field(default_factory=list)
    """Of each lease, the cached groups beside it."""
    assigned: list[pb.Assignment] = field(default_factory=list)

    def check_in(self, **changes: Any) -> pb.CheckInResponse:
        return self.caller.check_in(
            **{
                "own_model": False,
                "num_examples": tiny.CLIENTS.get(self.caller.device, 5),
                "native": native(methods=self.methods.split()),
                "capabilities": able(self.memory),
                "manifest": self.manifest,
                "log_version": self.version,
                **changes,
            }
        )

    def download(self, request: pb.DownloadRequest, size: int) -> pb.Chunk:
        chunk: pb.Chunk = self.caller.call("Download", request)
        return chunk

    def get(self, refusal: pb.Refusal) -> None:
        """The files of its program, checked."""
        data = fetch(refusal.base_model, self.folder, self.download, protocol.MAX_MANIFEST)
        found = protocol.read_manifest(data, protocol.PROGRAM_FILES)
        self.files = [file.path for file in found.files]
        for file in found.files:
            content = fetch(file.blob, self.folder, self.download, 1 << 20)
            (self.folder / file.path).write_bytes(content)
        self.manifest = refusal.base_model.sha256

    def ready(self) -> pb.CheckInResponse:
        """What it is told when it has the files that it is asked to have."""
        found = self.check_in()
        if found.refusal.reason == pb.Refusal.REASON_MODEL:
            self.get(found.refusal)
            found = self.check_in()
        return found

    def task(self, lease: pb.Lease) -> tuple[update_pb2.Task, Packet]:
        header = fetch(lease.task, self.folder, self.download, protocol.MAX_TASK)
        task = protocol.read_task(header)
        self.groups.append([blob.group for blob in lease.cached])
        self.assigned.append(lease.assignment)
        payload = fetch(lease.payload, self.folder, self.download, 1 << 26)
        cached = [fetch(blob, self.folder, self.download, 1 << 26) for blob in lease.cached]
        return task, protocol.with_groups(task, payload, cached)

    def serve(self, train: Callable[[str, Packet], Packet], stop: threading.Event) -> None:
        while not stop.is_set():
            found = self.ready()
            if found.WhichOneof("answer") == "lease":
                task, packet = self.task(found.lease)
                told = self.caller.report(found.lease, train(found.lease.client, packet))
                if told.accepted and task.HasField("log"):
                    self.version = task.log.version
            stop.wait(0.05)


@pytest.fixture
def offering(tmp_path: Path) -> Iterator[World]:
    """A gateway with programs for the adapter of gateways.a_task."""
    gateways.a_bundle(tmp_path / "bundle", FRESH)
    with gateways.serving(tmp_path, Clock(), seats=4, share_bundle=tmp_path / "bundle") as world:
        yield world


@contextmanager
def phone(world: World, device: str = "p1", **changes: Any) -> Iterator[Native]:
    folder = world.folder / f"native-{device}"
    folder.mkdir(exist_ok=True)
    caller = Caller(world, device)
    with caller.channel:
        yield Native(caller, folder, **changes)


# --- programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "program", "method", "files"),
    [
        (4000, "fp32", "grad", ["fp32.pte", "base.ptd"]),
        (300, "q4", "loss", ["q4.pte"]),
    ],
)
def test_a_native_phone_gets_the_program_that_its_memory_is_enough_for(
    memory: int, program: str, method: str, files: list[str], offering: World
) -> None:
    with phone(offering, memory=memory) as own:
        found = own.check_in()
        assert found.refusal.reason == pb.Refusal.REASON_MODEL
        assert found.refusal.text == f"get program {program}"
        assigned = found.refusal.assignment
        assert (assigned.program, assigned.method, assigned.rank) == (program, method, 1)
        assert assigned.planned_bytes == gateways.PLANNED.get(program, 300) * MB
        assert found.policy == pb.Policy(charging=True, unmetered=True, idle=True)
        own.get(found.refusal)
        assert own.files == ["manifest.json", "manifest.sig", *files]
        read = bundle.read(own.folder, offering.folder / "bundle" / "publisher.pub")
        bundle.verify(own.folder, read, files)
        again = own.check_in()
        assert again.refusal.text == "no round"
        assert again.policy == found.policy


def test_a_gateway_without_a_bundle_says_so(tmp_path: Path) -> None:
    with gateways.serving(tmp_path, Clock(), seats=1) as world, phone(world) as own:
        found = own.check_in()
        assert found.refusal.reason == pb.Refusal.REASON_MODEL
        assert found.refusal.text == "this gateway has no programs for native devices"
        assert not found.refusal.HasField("base_model")
        with asked(world, gateways.a_task(CONFIG)):
            assert own.check_in().refusal.text == found.refusal.text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"signs": 9}, "sign streams of version 9"),
        ({"runtime": "executorch 1.4.0"}, "executorch 1.5.0 or later"),
        ({"methods": []}, "it can do none"),
        ({"strategies": ["x"] * 65}, "it reports more strategies"),
        ({"methods": ["x" * 65]}, "it reports more methods, or longer ones"),
        ({"timings": [pb.Timing(program="p" * 65)]}, "it reports more timings"),
    ],
)
def test_a_phone_that_no_program_is_for_is_not_eligible(
    changes: dict[str, Any], text: str, offering: World
) -> None:
    with phone(offering) as own:
        refusal = own.check_in(native=native(**changes)).refusal
    assert refusal.reason == pb.Refusal.REASON_NOT_ELIGIBLE
    assert text in refusal.text
    assert not offering.gateway.roster.seen["p1"].eligible


def test_seats_are_counted_of_phones_that_have_something_to_run(offering: World) -> None:
    with phone(offering, "p1", memory=10) as small, phone(offering, "p2") as large:
        assert "loss of q4 at 16 tokens needs 12 MB, found 6 MB" in small.check_in().refusal.text
        large.check_in()
    assert {name: own.eligible for name, own in offering.gateway.roster.seen.items()} == {
        "p1": False,
        "p2": True,
    }


@pytest.mark.parametrize(
    ("changes", "told", "text"),
    [
        ({}, {"model_sha256": "cd" * 32}, "the run is of base model cdcdcdcdcdcd"),
        ({"codec": ["int8"]}, {}, "native devices have no codec int8"),
        ({"codec_down": ["fp16"]}, {}, "native devices have no codec-down fp16"),
        ({"dropout": 0.1}, {}, "native devices have no dropout=0.1"),
        ({"keep_hardest": 0.5}, {}, "native devices have no keep-hardest"),
        (
            {},
            {
                "cached": {offset.GROUP: codec.content_id(FRESH)},
                "payload": messages.enclose({offset.GROUP: FRESH})[0],
            },
            "native devices have no constant block",
        ),
        (
            {"strategy": "ffa_lora", "options": {"train": "A"}},
            {},
            "native devices have no strategy.train=A",
        ),
    ],
)
def test_a_task_that_no_native_phone_can_do_is_not_offered_to_them(
    changes: dict[str, Any], told: dict[str, Any], text: str, offering: World
) -> None:
    config = CONFIG.model_copy(update=changes)
    with asked(offering, gateways.a_task(config, **told)), phone(offering) as own:
        refusal = own.check_in().refusal
        assert refusal.reason == pb.Refusal.REASON_NO_TASK
        assert text in refusal.text
        python = Caller(offering, "p2")
        with python.channel:
            assert python.check_in().WhichOneof("answer") == "lease"


@pytest.mark.parametrize(
    "adapter",
    [
        {"m.lora_A": torch.zeros(2, 2), "m.lora_B": torch.zeros(2, 2)},
        {**FRESH, "n.lora_A": torch.zeros(1, 2), "n.lora_B": torch.zeros(2, 1)},
    ],
)
def test_a_run_of_another_adapter_is_not_offered(
    adapter: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    gateways.a_bundle(tmp_path / "bundle", adapter)
    task = gateways.a_task(CONFIG)
    with (
        gateways.serving(tmp_path, Clock(), seats=1, share_bundle=tmp_path / "bundle") as world,
        asked(world, task),
        phone(world) as own,
    ):
        assert "the run trains another adapter" in own.check_in().refusal.text


def test_phones_with_and_without_a_runtime_get_each_their_own_files(tmp_path: Path) -> None:
    gateways.a_bundle(tmp_path / "bundle", FRESH)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    both: dict[str, Any] = {"share_bundle": tmp_path / "bundle", "share_model": tmp_path / "model"}
    with gateways.serving(tmp_path, seats=1, **both) as world, phone(world) as own:
        python = Caller(world, "p2")
        with python.channel:
            model = python.check_in(own_model=False).refusal
            program = own.check_in().refusal
            assert model.base_model.sha256 != program.base_model.sha256
            assert (model.text, program.text) == ("get the base model", "get program fp32")
            assert not model.HasField("assignment")
            told = python.check_in(own_model=False, manifest=program.base_model.sha256)
            assert told.refusal.text == "get the base model"
            found = python.check_in(own_model=False, manifest=model.base_model.sha256)
            assert found.refusal.text == "no round"


def damaged(folder: Path) -> None:
    (folder / "q4.pte").write_bytes(b"q5.pte")


def unsigned(folder: Path) -> None:
    (folder / "manifest.sig").unlink()


def of_another(folder: Path) -> None:
    (folder / "publisher.pub").unlink()
    (folder / "publisher.key").unlink()
    bundle.signing_key(folder / "publisher.key")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (damaged, "q4.pte has sha256"),
        (unsigned, "is not signed"),
        (of_another, "is not what the owner of"),
        (lambda folder: (folder / "manifest.json").unlink(), "is no bundle"),
    ],
)
def test_a_bundle_that_is_none_is_one_line(
    change: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    gateways.a_bundle(folder, FRESH)
    change(folder)
    publisher = folder / "publisher.pub"
    settings = GatewaySettings("gate", tmp_path, share_bundle=folder, publisher=publisher)
    with pytest.raises(ConfigError, match=text) as caught:
        Gateway(settings)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--share-bundle")


# --- leases ---------------------------------------------------------------------------------------


def test_a_lease_says_what_is_run_and_stays_the_same(offering: World) -> None:
    task = gateways.a_task(CONFIG, seats=1)
    with asked(offering, task) as reply, phone(offering) as own:
        lease = own.ready().lease
        assert lease.assignment.method == "grad"
        assert (lease.assignment.kind, lease.assignment.length) == ("", 64)
        own.memory = 1  # it has been started again, and others use its memory
        assert own.check_in().lease.id == lease.id
        assert own.check_in().lease.assignment == lease.assignment
        packet = gateways.update_of(task, "gate/p1", 2.0, 5)
        assert own.caller.report(lease, packet).accepted
        assert reply.result(10).clients == 1


def test_what_was_assigned_for_one_round_is_no_lease_of_the_next(
    offering: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round of zeroth order begins while a phone is told to backpropagate."""
    natives = offering.gateway._natives
    lacks = natives.lacks
    config = tiny.config("seed_pool", rank=1, alpha=1.0)
    with phone(offering) as own, ExitStack() as stack:
        assert own.ready().refusal.text == "no round"

        def slow(assigned: Any, manifest: str) -> Any:
            monkeypatch.setattr(natives, "lacks", lacks)
            stack.enter_context(asked(offering, gateways.a_task(config)))
            return lacks(assigned, manifest)

        monkeypatch.setattr(natives, "lacks", slow)
        assert own.check_in().refusal.reason == pb.Refusal.REASON_NO_TASK
        lease = own.ready().lease
        assert lease.assignment.method == "loss"


def test_epochs_bound_the_examples_and_the_time_of_a_phone(tmp_path: Path) -> None:
    """3 epochs of 50 examples in batches of 8: 7 steps each, all 50 examples."""
    gateways.a_bundle(tmp_path / "bundle", FRESH)
    blobs = Blobs(tmp_path / "blobs")
    config = CONFIG.model_copy(update={"local_epochs": 3, "batch_size": 8, "local_steps": 1})
    merging = prepare(gateways.a_task(config))
    assert merging.expected("gate/p1", 50).most_examples == 50
    demand = Programs(tmp_path / "bundle", None, blobs, tmp_path).demand(merging)
    assert isinstance(demand, Demand)
    assert demand.passes["grad"](50) == 21


def test_a_lease_that_is_given_up_frees_its_seat_at_once(tmp_path: Path) -> None:
    gateways.a_bundle(tmp_path / "bundle", FRESH)
    task = gateways.a_task(CONFIG, seats=1)
    with (
        gateways.serving(
            tmp_path, Clock(), seats=1, over_select=1.0, share_bundle=tmp_path / "bundle"
        ) as world,
        asked(world, task) as reply,
        phone(world, "p1") as first,
        phone(world, "p2") as second,
    ):
        lease = first.ready().lease
        assert second.ready().refusal.text == "enough devices have been chosen"
        head, _ = first.task(lease)
        told = first.caller.report(lease, protocol.given_up(head, "gate/p1", "policy: too soon"))
        assert (told.accepted, told.why) == (False, "policy: too soon")
        assert told.retry.max_seconds < 1.0
        packet = gateways.update_of(task, "gate/p2")
        assert second.caller.report(second.ready().lease, packet).accepted
        assert reply.result(10).clients == 1


def test_between_two_rounds_nobody_fetches_another_program(offering: World) -> None:
    """Phones of a run of zeroth order hold the program of 4 bits, also while there is no round."""
    config = tiny.config("seed_pool", rank=1, alpha=1.0)
    with phone(offering) as own:
        with asked(offering, gateways.a_task(config)) as reply:
            assert own.ready().lease.assignment.program == "q4"
            offering.end_round()
            assert reply.result(10).error
        assert own.check_in().refusal.text == "no round"
        assert own.check_in(manifest="").refusal.assignment.program == "q4"


def test_a_phone_whose_memory_changes_does_not_fetch_its_program_again(tmp_path: Path) -> None:
    gateways.a_bundle(tmp_path / "bundle", FRESH)
    with (
        gateways.serving(tmp_path, seats=1, share_bundle=tmp_path / "bundle") as world,
        phone(world, memory=2100) as own,
    ):
        assert own.check_in().refusal.assignment.program == "fp32"
        assert own.ready().refusal.text == "no round"
        for own.memory in (490, 2100, 490):  # of another class each time
            assert own.check_in().refusal.text == "no round"
        own.memory = 60
        assert own.check_in().refusal.assignment.program == "q4"


def test_the_log_says_who_runs_what(offering: World) -> None:
    """Neither memory nor timings are in it, nor anything else that a phone says of itself."""
    path = offering.folder / "gateway.jsonl"
    logs.configure(path)
    task = gateways.a_task(CONFIG, seats=1)
    try:
        with asked(offering, task) as reply, phone(offering) as own:
            lease = own.ready().lease
            assert own.caller.report(lease, gateways.update_of(task, "gate/p1")).accepted
            reply.result(10)
    finally:
        logs.unconfigure()
    lines = {own["event"]: own for own in map(json.loads, path.read_text().splitlines())}
    told = {"client": "gate/p1", "program": "fp32", "method": "grad", "kind": "", "length": 64}
    assert {**told, "budget": "A"}.items() <= lines["lease"].items()
    assert {"seats": 1, "valid": 1, "budget_A": 1}.items() <= lines["round over"].items()
    assert not any(word in path.read_text() for word in ("memory", "timings", "executorch"))


# --- rounds ---------------------------------------------------------------------------------------


@contextmanager
def serving(world: World, shared: Shared, natives: Mapping[str, Native]) -> Iterator[None]:
    """Native phones that serve in threads of their own until the end."""
    stop = threading.Event()

    def train(name: str) -> Callable[[str, Packet], Packet]:
        own = shared.of(f"gate/{name}")
        return lambda client, packet: own.answer(client, packet, None, lambda: True)

    threads = [
        threading.Thread(target=own.serve, args=(train(name), stop))
        for name, own in natives.items()
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def a_bundle_of(config: RunConfig, folder: Path) -> Path:
    """Programs of the tiny model, for the adapter of a run."""
    model = tiny.lora_model("llama")
    gateways.a_bundle(folder, model.init(config.lora, 0), model.base.fingerprint)
    return folder


def both(config: RunConfig, folder: Path, world: World) -> tuple[Course, Course, Shared]:
    """The same federation flat and behind a gateway, and what trains for phones."""
    data = gateways.renamed("gate/")
    memory = Memory(folder / "flat")
    flat = Flat(Worker(config, tiny.lora_model("llama"), data, memory), data)
    shared = Shared(config, data, folder / "memories")
    return (
        gateways.course(config, flat, {}),
        gateways.course(config, Behind(world), {"gate": 4}),
        shared,
    )


def test_phones_of_both_trainers_in_one_round_give_the_bits_of_clients_of_their_classes(
    tmp_path: Path,
) -> None:
    """Of four clients in turn: a and c are strong, b and d weak; the gateway's class is strong."""
    config = tiny.config("mixed", cohort=4, deadline=25.0, classes=CLASSES)
    where = a_bundle_of(config, tmp_path / "bundle")
    with (
        gateways.serving(tmp_path, share_bundle=where) as world,
        phone(world, "b", methods="loss") as b,
        phone(world, "c", methods="grad") as c,
        phone(world, "d", memory=300) as d,
    ):
        flat, behind, shared = both(config, tmp_path, world)
        with (
            gateways.phones(world, {"a": shared.of("gate/a")}),
            serving(world, shared, {"b": b, "c": c, "d": d}),
        ):
            for _ in range(2):
                expected, found = flat.step(), behind.step()
                assert tree.digest_all(found.state) == tree.digest_all(expected.state)
                assert found.updates == expected.updates == 4
                assert sum(found.num_examples.values()) == sum(expected.num_examples.values())
                assert found.cost.at_most
                assert found.traffic.up <= found.cost.up
                assert found.traffic.down == found.cost.down
    assert [own.program for own in (b.assigned[0], c.assigned[0], d.assigned[0])] == [
        *("q4", "fp32", "q4")
    ]
    assert [own.kind for own in (b.assigned[0], c.assigned[0], d.assigned[0])] == [
        *("weak", "strong", "weak")
    ]
    assert found.metrics["first_order_share"] == expected.metrics["first_order_share"]


@pytest.mark.parametrize("methods", ["grad", "loss"])
def test_a_round_of_mixed_may_hold_phones_of_one_trainer_alone(
    methods: str, tmp_path: Path
) -> None:
    config = tiny.config("mixed", cohort=2, deadline=25.0, classes=CLASSES)
    where = a_bundle_of(config, tmp_path / "bundle")
    with (
        gateways.serving(tmp_path, seats=2, share_bundle=where) as world,
        phone(world, "a", methods=methods) as a,
        phone(world, "b", methods=methods) as b,
    ):
        _, behind, shared = both(config, tmp_path, world)
        with serving(world, shared, {"a": a, "b": b}):
            found = behind.step()
    assert found.dropped == {}
    assert found.metrics["first_order_share"] == (1.0 if methods == "grad" else 0.0)
    assert found.updates == 2


def test_native_phones_get_the_first_state_of_a_log_once_and_then_rows(tmp_path: Path) -> None:
    config = tiny.config("seed_pool", cohort=4, deadline=25.0)
    where = a_bundle_of(config, tmp_path / "bundle")
    with gateways.serving(tmp_path, share_bundle=where) as world, ExitStack() as stack:
        natives = {name: stack.enter_context(phone(world, name)) for name in tiny.CLIENTS}
        flat, behind, shared = both(config, tmp_path, world)
        with serving(world, shared, natives):
            for _ in range(3):
                expected, found = flat.step(), behind.step()
                assert tree.digest_all(found.state) == tree.digest_all(expected.state)
    assert [own.groups for own in natives.values()] == [[["first"], [], []]] * 4


def a_logged_task(config: RunConfig, origin: str, sha256: str) -> Task:
    model = tiny.lora_model("llama")
    fresh = model.init(config.lora, 0)
    task = gateways.a_task(
        config, model_sha256=sha256, log=messages.Log(origin, origin, origin, [], 0)
    )
    form = {name: ("float32", list(tensor.shape)) for name, tensor in fresh.items()}
    told = {**json.loads(task.config), "fresh": {"adapter": form}}
    return replace(task, config=json.dumps(told))


def test_what_native_phones_get_is_the_first_state_itself(tmp_path: Path) -> None:
    config = tiny.config("seed_pool", seed=7)
    model = tiny.lora_model("llama")
    behind = gateways.course(config, Flat(None, gateways.renamed("gate/")), {})  # type: ignore[arg-type]
    origin, sha256 = behind.federation.origin, model.base.fingerprint
    where = a_bundle_of(config, tmp_path / "bundle")
    with (
        gateways.serving(tmp_path, Clock(), seats=1, share_bundle=where) as world,
        asked(world, a_logged_task(config, origin, sha256)),
        phone(world) as own,
    ):
        lease = own.ready().lease
        task, packet = own.task(lease)
        (first,) = lease.cached
        tensors = codec.decode(packet.payload)["first"]
        assert {own.group: own.id for own in task.cached} == {"first": first.content}
        assert codec.content_id(tensors) == first.content
        assert tree.digest(tensors) == tree.digest(behind.state["start"])
        assert seedlog.origin(sha256, {**behind.state, "start": tensors}) == task.log.origin


def test_the_first_state_of_a_run_is_built_once(tmp_path: Path) -> None:
    config = tiny.config("seed_pool", seed=7)
    behind = gateways.course(config, Flat(None, gateways.renamed("gate/")), {})  # type: ignore[arg-type]
    sha256 = tiny.lora_model("llama").base.fingerprint
    task = a_logged_task(config, behind.federation.origin, sha256)
    blobs = Blobs(tmp_path / "blobs")
    programs = Programs(a_bundle_of(config, tmp_path / "bundle"), None, blobs, tmp_path)
    built, natives = [], Natives(programs, blobs)
    first = programs.first
    programs.first = lambda *of: built.append(of) or first(*of)  # type: ignore[method-assign,func-returns-value]
    blob_of = [natives.begin(prepare(own), own)[1] for own in (task, replace(task, round=2))]
    assert blob_of[0] == blob_of[1] is not None
    assert len(built) == 1
    another = replace(task, run_id="cd" * 16)
    assert natives.begin(prepare(another), another)[1] == blob_of[0]
    assert len(built) == 2


def test_manifests_of_an_earlier_bundle_are_deleted(tmp_path: Path) -> None:
    for name in ("one", "two"):
        gateways.a_bundle(tmp_path / name, FRESH)  # each signed with a key of its own
        Programs(tmp_path / name, None, Blobs(tmp_path / "blobs"), tmp_path)
        assert len(list(tmp_path.glob("manifest-*"))) == 2  # of fp32 and of q4


def test_a_log_that_began_elsewhere_is_refused_in_one_line(tmp_path: Path) -> None:
    config = tiny.config("seed_pool")
    where = a_bundle_of(config, tmp_path / "bundle")
    sha256 = tiny.lora_model("llama").base.fingerprint
    with (
        gateways.serving(tmp_path, Clock(), seats=1, share_bundle=where) as world,
        asked(world, a_logged_task(config, "ef" * 16, sha256)),
        phone(world) as own,
    ):
        refusal = own.check_in().refusal
    assert refusal.reason == pb.Refusal.REASON_NO_TASK
    assert "the run from efefefef: another base model, or another adapter on it" in refusal.text


def test_an_upload_is_bounded_by_what_its_class_needs(tmp_path: Path) -> None:
    """Scalars travel in the header; 1.1 MiB of factors do not fit one chunk."""
    config = tiny.config("mixed", rank=1, alpha=1.0, classes=CLASSES)
    gateways.a_bundle(tmp_path / "bundle", FRESH)
    task = gateways.a_task(config)
    told = {**json.loads(task.config), "class": "strong"}
    task = replace(task, config=json.dumps(told))
    with (
        gateways.serving(tmp_path, Clock(), seats=2, share_bundle=tmp_path / "bundle") as world,
        asked(world, task),
        phone(world, "p1", methods="grad") as strong,
        phone(world, "p2", methods="loss") as weak,
    ):
        offers = [own.ready().lease for own in (strong, weak)]
        kinds = [
            json.loads(own.task(lease)[0].config)["class"]
            for own, lease in zip((strong, weak), offers, strict=True)
        ]
        assert kinds == ["strong", "weak"]
        limits = [lease.max_upload_bytes for lease in offers]
        assert weak.caller.upload(offers[1], b"x" * (limits[1] + 1)).problem
        wrong = gateways.update_of(task, "gate/p2")  # an update of the other class
        assert "groups" in weak.caller.report(offers[1], wrong).why
