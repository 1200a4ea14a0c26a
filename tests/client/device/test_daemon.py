import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from corolla import seeds
from corolla.client.device import machine
from corolla.client.device.daemon import Trainer, _key_of_base, forget
from corolla.client.device.settings import Own
from corolla.client.training.worker import Worker
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.errors import ConfigError, DataError, ModelError, SchemaError, WireError
from corolla.estimates.footprint import Estimate
from corolla.host import logs
from corolla.models import pretrained, trainable
from corolla.privacy.accounting import Release, gaussian_epsilon
from corolla.privacy.ledger import Ledger
from corolla.proto import update_pb2
from corolla.storage.memory import Memory
from corolla.wire import codec, messages, rpc
from corolla.wire.messages import (
    Capabilities,
    Kind,
    Reply,
    Task,
    pack_task,
    unpack_reply,
    unpack_task,
)
from corolla.wire.packet import Packet

Settings = Callable[..., RunConfig]
RUN, OTHER = "ab" * 16, "cd" * 16
SERVERS_OWN = ("model", "data", "engine", "device", "threads", "availability", "public", "start")


@pytest.fixture
def own(tiny_model: Path, federation_file: Path, tmp_path: Path) -> Callable[..., Own]:
    """The settings of the device of client "cyd", which holds her rows and no others."""

    def make(**changes: Any) -> Own:
        path = tmp_path / "cyd.jsonl"
        lines = [s for s in federation_file.read_text().splitlines() if '"cyd"' in s]
        path.write_text("\n".join(lines) + "\n")
        values: dict[str, Any] = {"server": "localhost:1", "data": str(path), "threads": 1}
        values |= {"model": str(tiny_model), "state": tmp_path / "state", "device": "cpu"}
        return Own.model_validate({**values, **changes})

    return make


def told(config: RunConfig, accepted: int = 0, **run: Any) -> dict[str, Any]:
    """What a server says of its run: nothing of its own machine."""
    known = config.model_dump(mode="json")
    settings = {key: value for key, value in known.items() if key not in SERVERS_OWN}
    lora = {"lora": vars(config.lora), "class": "", "population": 4, "accepted": accepted}
    return {**lora, "run": {**settings, **run}}


def hello(config: RunConfig, run_id: str = RUN, **run: Any) -> Packet:
    return pack_task(Task(run_id, 0, "", Kind.HELLO, json.dumps(told(config, **run))))


def train(
    trainer: Worker, config: RunConfig, round: int = 1, accepted: int = 0, **changes: Any
) -> Packet:
    """A task of the first state; what a client gets of it is made by its own worker."""
    start = trainer.model.init(config.lora, seeds.derive(config.seed, "init"))
    broadcast = trainer.strategy.broadcast(trainer.strategy.init(start, config.seed))
    payload, scalars = messages.enclose({**broadcast.payload, **broadcast.cached})
    cached = {group: codec.content_id(params) for group, params in broadcast.cached.items()}
    text = json.dumps(told(config, accepted))
    values: dict[str, Any] = {"cached": cached, "payload": payload, "scalars": scalars}
    return pack_task(Task(RUN, round, "v", Kind.TRAIN, text, **{**values, **changes}))


@pytest.fixture
def simulated(settings: Settings, tmp_path: Path) -> Callable[..., Worker]:
    """What answers for all clients when the same run is simulated."""

    def make(**changes: Any) -> Worker:
        config = settings(**changes)
        model = trainable.build(config, pretrained.load(config))
        return Worker(config, model, federated.load(config), Memory(tmp_path / "simulated"))

    return make


def always() -> bool:
    return True


def read(packet: Packet) -> Reply:
    return unpack_reply(packet, 1 << 30)


def ask(trainer: Trainer, packet: Packet) -> Reply:
    return read(trainer(packet, always))


def test_a_device_answers_as_its_simulated_client(
    own: Callable[..., Own], simulated: Callable[..., Worker]
) -> None:
    worker = simulated(strategy="flora")
    trainer = Trainer(own(), "cyd")
    packet = train(worker, worker.config)
    assert trainer(packet, always) == worker("cyd", packet)
    assert ask(trainer, packet).error == ""


def test_it_says_who_it_is(own: Callable[..., Own], settings: Settings) -> None:
    can = Capabilities(memory_bytes=1 << 30, cores=2, runtime="corolla")
    trainer = Trainer(own(), "cyd", can)
    reply = ask(trainer, hello(settings()))
    assert (reply.client, reply.num_examples, reply.capabilities) == ("cyd", 10, can)
    assert reply.model_sha256 == trainer.model_sha256 == pretrained.load(settings()).fingerprint


def test_the_servers_machine_counts_for_nothing(
    own: Callable[..., Own], settings: Settings, tmp_path: Path
) -> None:
    """Paths, device and threads of a server do not reach the device, whatever it sends."""
    ours: dict[str, Any] = {
        "model": "/srv/model",
        "data": "/srv/data.jsonl",
        "device": "cuda",
        "threads": 99,
    }
    ours |= {"availability": "/srv/trace.jsonl", "engine": "flower"}
    ours |= {"quantization": "4bit", "gradient_checkpointing": True}
    ours |= {"columns": {"text": "diary"}, "splits": {"train": "all"}, "subset": "main"}
    trainer = Trainer(own(), "cyd")
    assert ask(trainer, hello(settings(), **ours)).error == ""
    config = trainer._worker[1].config if trainer._worker else settings()
    assert (config.threads, config.device, config.quantization) == (1, "cpu", "none")
    assert config.data == own().data
    assert (config.columns, config.splits, config.subset) == ({}, {}, None)
    start: dict[str, Any] = {"start": "gradient", "public": "/srv/public.jsonl"}
    assert ask(trainer, hello(settings(), **start)).error == ""


def test_its_own_columns_are_read(own: Callable[..., Own], tmp_path: Path) -> None:
    """A server's columns, splits and subset are not those of the device, see above."""
    path = tmp_path / "own.csv"
    path.write_text("body,kind\n" + "text,all\n" * 5 + "text,rest\n" * 2)
    trainer = Trainer(own(data=str(path), columns={"text": "body", "split": "kind"},
                          splits={"train": "all"}), "cyd")  # fmt: skip
    assert trainer.examples == 3  # one of five is kept for evaluation, and one held out


def test_its_own_micro_batch_is_used_and_fits_the_batch(
    own: Callable[..., Own], settings: Settings
) -> None:
    for mine, batch, used in ((2, 3, 2), (8, 3, 3), (None, 3, 1)):
        trainer = Trainer(own(micro_batch_size=mine), "cyd")
        ask(trainer, hello(settings(micro_batch_size=1, batch_size=batch)))
        assert trainer._worker is not None
        assert trainer._worker[1].config.micro_batch_size == used


def test_training_stays_within_the_memory_that_the_owner_gives(
    own: Callable[..., Own], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it takes is told by client/device/machine.py; here, that its answer is followed."""
    asked: list[tuple[int, int]] = []

    def fit(config: RunConfig, model: str, budget: int, labels: int) -> tuple[Any, Estimate]:
        asked.append((budget, config.batch_size))
        return {"micro_batch_size": 1, "gradient_checkpointing": True}, Estimate({})

    monkeypatch.setattr(machine, "fit", fit)
    trainer = Trainer(own(memory=123), "cyd")
    assert ask(trainer, hello(settings(batch_size=3))).error == ""
    assert asked == [(123, 8), (123, 3)]  # at the start, for what a run is by default
    assert trainer._worker is not None
    config = trainer._worker[1].config
    assert (config.micro_batch_size, config.gradient_checkpointing) == (1, True)


def test_too_little_memory_is_said_at_once(own: Callable[..., Own]) -> None:
    with pytest.raises(ConfigError, match="too little"):
        Trainer(own(memory=1_000_000), "cyd")


MINE = """
from pathlib import Path
from corolla.strategies.fedavg import FedAvg
Path({trace!r}).touch()
class Mine(FedAvg):
    pass
"""


def test_a_strategy_in_a_file_runs_only_where_its_owner_allows_it(
    own: Callable[..., Own], settings: Settings, tmp_path: Path
) -> None:
    file, trace = tmp_path / "mine.py", tmp_path / "imported"
    file.write_text(MINE.format(trace=str(trace)))
    for named in (f"{file}:Mine", "mine.py:Mine", "os:Mine"):
        reply = ask(Trainer(own(), "cyd"), hello(settings(), strategy=named))
        assert "owner has not allowed" in reply.error
        assert not trace.exists()
    allowing = Trainer(own(allow=[f"{file}:Mine"]), "cyd")
    # The server's file of that name lies elsewhere; the device runs its own.
    assert ask(allowing, hello(settings(), strategy="mine.py:Mine")).error == ""
    assert trace.exists()
    assert "owner has not allowed" in ask(allowing, hello(settings(), strategy="x.py:Mine")).error


def test_another_base_model_is_refused_in_one_line(
    own: Callable[..., Own], settings: Settings
) -> None:
    trainer = Trainer(own(), "cyd")
    task = Task(RUN, 0, "", Kind.HELLO, json.dumps(told(settings())), model_sha256="0" * 64)
    error = ask(trainer, pack_task(task)).error
    assert trainer.model_sha256[:12] in error
    assert "0" * 12 in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("[1]", "not an object"),
        ("{", "not JSON"),
        ('{"run": [], "labels": []}', "settings are not an object"),
        ('{"run": {"of_the_future": 1}}', "unknown key 'of_the_future'"),
        ('{"run": {"lr": -1}}', "lr"),
        ('{"run": {"strategy": "nothing"}}', "nothing"),
    ],
)
def test_settings_that_are_none_are_one_line(
    own: Callable[..., Own], config: str, why: str
) -> None:
    reply = ask(Trainer(own(), "cyd"), pack_task(Task(RUN, 0, "", Kind.HELLO, config)))
    assert why in reply.error
    assert "\n" not in reply.error


def test_a_header_that_cannot_be_read_is_an_error_of_the_call(own: Callable[..., Own]) -> None:
    with pytest.raises(WireError):
        Trainer(own(), "cyd")(Packet(b"\xff", b""), always)


def test_the_owner_is_told_why_a_task_is_not_done(
    own: Callable[..., Own], settings: Settings
) -> None:
    said: list[str] = []
    trainer = Trainer(own(), "cyd", None, said.append)
    assert ask(trainer, hello(settings())).error == ""
    assert said == []
    reply = ask(trainer, hello(settings(), strategy="mine.py:Mine"))
    assert said == [reply.error]
    newer = update_pb2.Task(schema=messages.SCHEMA + 1, run_id=RUN)
    with pytest.raises(SchemaError, match="another version of corolla"):
        trainer(Packet(newer.SerializeToString(), b""), always)
    assert "another version of corolla" in said[1]


def test_wrong_data_and_wrong_models_are_said_at_once(
    own: Callable[..., Own], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(DataError, match="line 1"):
        Trainer(own(data=str(bad)), "cyd")
    with pytest.raises(ModelError, match="is no model"):
        Trainer(own(model=str(tmp_path)), "cyd")


def test_errors_never_tell_what_a_row_says(
    own: Callable[..., Own], settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(f'{{"text": "secret {i}", "label": "secret"}}\n' for i in range(5)))
    run = {**told(settings()), "labels": ["a", "b"]}
    said: list[str] = []
    trainer = Trainer(own(data=str(path)), "cyd", None, said.append)
    hello = pack_task(Task(RUN, 0, "", Kind.HELLO, json.dumps(run)))
    assert ask(trainer, hello).error == "this device's data cannot be used"
    path.write_text('{"text": "a", "split": "secret"}\n')  # changed since the start
    assert ask(trainer, hello).error == "this device's data cannot be used"
    assert said[0] == "5 of 5 rows have no label of this run's 2"
    assert "line 1" in said[1]


def test_labels_come_with_the_task(
    own: Callable[..., Own], settings: Settings, tmp_path: Path
) -> None:
    """A device that has seen two of four labels still builds the head of the run."""
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(f'{{"text": "t {i}", "label": "{"bd"[i % 2]}"}}\n' for i in range(6)))
    said: list[str] = []
    trainer = Trainer(own(data=str(path)), "cyd", None, said.append)
    run = {**told(settings()), "labels": ["a", "b", "c", "d"]}
    assert ask(trainer, pack_task(Task(RUN, 0, "", Kind.HELLO, json.dumps(run)))).error == ""
    assert trainer._worker is not None
    assert trainer._worker[1].model.base.model.config.id2label == dict(enumerate("abcd"))
    run["labels"] = ["a", "b", "c"]
    assert ask(trainer, pack_task(Task(RUN, 0, "", Kind.HELLO, json.dumps(run)))).error
    assert "3 of 6 rows" in said[0]


@pytest.mark.parametrize("dp", ["example", "none"])
@pytest.mark.parametrize("limit", [1000.0, None])
def test_labels_that_a_server_makes_up_tell_it_nothing_of_a_row(
    own: Callable[..., Own], settings: Settings, tmp_path: Path, dp: str, limit: float | None
) -> None:
    """Of eight rows one has a rare label: asked for it or for another, all that is told is equal.

    Without dp, and no limit of its owner, the device refuses as before.
    """
    path = tmp_path / "labels.jsonl"
    labels = ["common"] * 7 + ["rare"]
    path.write_text("".join(f'{{"text": "t {i}", "label": "{s}"}}\n' for i, s in enumerate(labels)))
    config = settings(dp=dp, noise_multiplier=4.0 if dp == "example" else None)
    logs.configure(tmp_path / "log.jsonl")
    facts = []
    try:
        trainer = Trainer(own(data=str(path), epsilon=limit), "cyd")
        for asked in (["common", "rare"], ["common", "other"]):
            order = json.dumps({**told(config), "labels": asked})
            greeted = ask(trainer, pack_task(Task(RUN, 0, "", Kind.HELLO, order)))
            if trainer._worker is None:
                assert greeted.error == "this device's data cannot be used"
                assert (dp, limit, asked[1]) == ("none", None, "other")
                return
            task = unpack_task(train(trainer._worker[1], config))
            update = ask(trainer, pack_task(replace(task, config=order)))
            sizes = len(update.payload), update.num_examples, update.metrics.get("local_steps")
            facts.append((greeted.error, greeted.num_examples, update.error, *sizes))
    finally:
        logs.unconfigure()
    assert facts[0] == facts[1]
    assert facts[0][:2] == ("", 8)
    assert facts[0][3] > 0 if dp == "example" else "dp=example alone" in facts[0][2]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    notes = [(line["rows"], line["of"]) for line in lines if "without a label" in line["event"]]
    assert notes == [(1, 8)]


def test_a_limit_without_the_ledger_of_earlier_runs_is_noted(
    own: Callable[..., Own], settings: Settings, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    logs.configure(log)
    try:
        trainer = Trainer(own(epsilon=1.0), "cyd")
        assert ask(trainer, hello(settings())).error == ""
        Trainer(own(), "cyd")
        assert "no ledger" not in log.read_text()
        Trainer(own(epsilon=1.0), "cyd")
        assert f'{own().state / "ledger.jsonl"}"' in log.read_text().splitlines()[-1]
        Ledger(own().state / "ledger.jsonl").spend(RUN, 1, Release(4.0))
        Trainer(own(epsilon=1.0), "cyd")
        assert log.read_text().count("no ledger") == 1
    finally:
        logs.unconfigure()


def test_the_model_stays_between_messages_and_runs(
    own: Callable[..., Own], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = pretrained.load

    def counted(config: RunConfig, labels: Sequence[str] = ()) -> pretrained.Base:
        loads.append(config.model)
        return load(config, labels)

    monkeypatch.setattr(pretrained, "load", counted)
    trainer = Trainer(own(), "cyd")
    config = settings()
    assert len(loads) == 1  # before any message
    for run_id in (RUN, RUN, OTHER, RUN):
        assert ask(trainer, hello(config, run_id)).error == ""
    assert len(loads) == 1
    assert ask(trainer, hello(settings(rank=4))).error == ""  # another adapter: built anew
    assert len(loads) == 2


def test_nobody_waits_and_the_task_is_given_up_at_the_next_step(
    own: Callable[..., Own], simulated: Callable[..., Worker]
) -> None:
    """Then the next task gives the bits of a trainer that has never given one up."""
    for strategy, parameters in (("fedavg", "lora"), ("fedkseed", "full")):
        worker = simulated(strategy=strategy, parameters=parameters, local_steps=4)
        trainer = Trainer(own(), "cyd")
        config = worker.config
        packet = task_of(worker) if parameters == "full" else train(worker, config)
        reply = read(trainer(packet, iter([True, False]).__next__))
        assert reply.error == "given up: the server no longer waits"
        assert reply.payload == b""
        assert reply.scalars == {}
        assert trainer(packet, always) == worker("cyd", packet)


def task_of(worker: Worker) -> Packet:
    """A first task with a log, as server.tasks makes it."""
    from corolla.directions import seedlog

    start = worker.strategy.init(worker.model.init(worker.config.lora, 0), worker.config.seed)
    broadcast = worker.strategy.broadcast(start)
    origin = seedlog.origin(worker.model.base.fingerprint, start)
    log = messages.Log(origin, origin, origin, (), 0)
    payload, scalars = messages.enclose(broadcast.payload)
    text = json.dumps(told(worker.config))
    task = Task(RUN, 1, "v", Kind.TRAIN, text, payload=payload, scalars=scalars, log=log)
    return pack_task(task)


def test_what_it_keeps_outlives_it(
    own: Callable[..., Own], simulated: Callable[..., Worker]
) -> None:
    """Killed between two rounds, a device goes on from its own half of the first."""
    worker = simulated(strategy="fedsa_lora")
    first, second = (train(worker, worker.config, r, r - 1) for r in (1, 2))
    wanted = [worker("cyd", packet) for packet in (first, second)]
    assert Trainer(own(), "cyd")(first, always) == wanted[0]
    assert Trainer(own(), "cyd")(second, always) == wanted[1]
    elsewhere = Trainer(own(state=own().state / "new"), "cyd")
    assert "lost" in ask(elsewhere, second).error


def test_runs_long_over_are_forgotten(tmp_path: Path) -> None:
    now = time.time()
    for number in range(20):
        (tmp_path / f"{number:02d}").mkdir()
        (tmp_path / f"{number:02d}" / "kept").touch()
        age = 40 * 86400 if number == 1 else number
        os.utime(tmp_path / f"{number:02d}", (now - age, now - age))
    forget(tmp_path, keep="19", most=1 << 30)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00",
        *(f"{n:02d}" for n in range(2, 16)),
        "19",
    ]


def test_an_owner_is_told_why_the_server_takes_the_device_in_for_nothing(
    own: Callable[..., Own],
) -> None:
    said: list[str] = []
    trainer = Trainer(own(), "cyd", None, said.append)
    why = "the name 'cyd' is registered for another key: give this client --name eve"
    task = Task(RUN, 0, "", Kind.HELLO, "{}", refusal=f"{why}\n\x1b[31m")
    reply = ask(trainer, pack_task(task))
    assert said == [f"the server refuses this client: {why} [31m"]
    assert reply.error == said[0]
    assert reply.num_examples == 0


def test_runs_that_are_over_make_room_the_oldest_first(tmp_path: Path) -> None:
    now = time.time()
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "kept").write_bytes(bytes(10_000))  # three blocks
        os.utime(tmp_path / str(number), (now - number, now - number))
    forget(tmp_path, keep="4", most=2 * 12_288)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "4"]
    forget(tmp_path, keep="4", most=-1)
    assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_what_its_examples_have_cost_outlives_runs_and_names(
    own: Callable[..., Own], simulated: Callable[..., Worker], tmp_path: Path
) -> None:
    """One ledger beside the runs, which are deleted when they are long over."""
    worker = simulated(dp="example", noise_multiplier=4.0, batch_size=16)
    mine = own(epsilon=10.0, delta=1e-4)
    for name, epsilons in (("cyd", 1), ("hub/cyd", 2)):
        reply = ask(Trainer(mine, name), train(worker, worker.config))
        assert reply.error == ""
        assert reply.metrics.keys() == {"local_steps", "epsilon"}
        expected = gaussian_epsilon(math.sqrt(2 * epsilons) / 4, 1e-5)
        assert reply.metrics["epsilon"] == pytest.approx(expected)
        shutil.rmtree(mine.state / "runs")
    path = mine.state / "ledger.jsonl"
    assert Ledger(path).releases() == [Release(4.0, 1.0, 2)] * 2
    before = Ledger(path).epsilon(1e-4)
    limited = own(epsilon=before * 1.01, delta=1e-4)
    said: list[str] = []
    reply = ask(Trainer(limited, "cyd", None, said.append), train(worker, worker.config))
    assert reply.error == "this round would exceed this device's own privacy limit"
    assert said == [reply.error]
    assert len(Ledger(path).releases()) == 2


def test_a_device_with_a_limit_is_not_measured_nor_trained_without_dp(
    own: Callable[..., Own], simulated: Callable[..., Worker]
) -> None:
    """Whatever the server says of its run."""
    worker = simulated()
    trainer = Trainer(own(epsilon=3.0), "cyd")
    for kind in (Kind.TRAIN, Kind.EVALUATE):
        text = json.dumps(told(worker.config))
        packet = pack_task(Task(RUN, 1, "v", kind, text))
        assert "it takes part in runs with dp=example alone" in ask(trainer, packet).error
    assert not (own().state / "ledger.jsonl").exists()


def test_a_log_line_says_run_round_and_client(
    own: Callable[..., Own], settings: Settings, tmp_path: Path
) -> None:
    logs.configure(tmp_path / "log.jsonl")
    try:
        ask(Trainer(own(), "cyd"), hello(settings()))
    finally:
        logs.unconfigure()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    answered = lines[-1]
    assert (answered["event"], answered["run"], answered["client"]) == ("answered", RUN, "cyd")
    assert (answered["round"], answered["kind"], answered["error"]) == (0, "HELLO", None)


@pytest.fixture
def daemon(own: Callable[..., Own]) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts `python -m corolla.client.device.daemon` as `corolla client` does."""
    started: list[subprocess.Popen[bytes]] = []

    def start(socket: Path, **changes: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "corolla.client.device.daemon", str(socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        (own().state).mkdir(exist_ok=True)
        order = {"own": own().model_dump(mode="json") | changes, "name": "cyd"}
        assert process.stdin is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def test_one_process_answers_all_messages_and_ends_with_its_parent(
    daemon: Callable[..., subprocess.Popen[bytes]], settings: Settings, tmp_path: Path
) -> None:
    with rpc.private_socket(tmp_path) as socket:
        process = daemon(socket)
        assert process.stdout is not None
        assert process.stdin is not None
        ready = json.loads(process.stdout.readline())
        assert ready["examples"] == 10
        spent = psutil.Process(process.pid).cpu_times().user
        replies = [read(rpc.ask_trainer(socket, hello(settings()), 60)) for _ in range(2)]
        assert [reply.num_examples for reply in replies] == [10, 10]
        # importing torch, transformers and peft again would cost seconds
        assert psutil.Process(process.pid).cpu_times().user - spent < 2
        assert not psutil.Process(process.pid).children()
        process.stdin.close()
        assert process.wait(10) == 0


def test_what_is_wrong_is_one_line_and_an_exit_code(
    daemon: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = daemon(tmp_path / "t.sock", data=str(tmp_path / "none.csv"))
    assert process.wait(60) == 1
    assert process.stderr is not None
    (line,) = process.stderr.read().decode().splitlines()
    assert line.startswith("error: ")
    assert "none.csv" in line


def test_a_base_model_is_loaded_anew_for_a_run_that_asks_for_a_new_head() -> None:
    """It has the labels of another run, and another head."""
    old, new = RunConfig(), RunConfig(new_head=True)
    assert _key_of_base(old, ["no", "yes"]) != _key_of_base(new, ["no", "yes"])
    assert _key_of_base(old, []) == _key_of_base(new, [])  # it has no head
