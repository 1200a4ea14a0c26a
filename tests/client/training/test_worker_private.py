"""What a device does under dp=example: it pays first, trains, and tells nothing else."""

import json
import logging
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from scipy.stats import norm

from corolla.client.training.worker import Device, Worker
from corolla.commands.simulate.in_process import simulate
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.encoding import Encoded, Encoder
from corolla.data.federated import FederatedData
from corolla.data.partition import Split
from corolla.data.rows import Example
from corolla.errors import CorollaError, DataError, DivergedError, ModelError, StoppedError
from corolla.interfaces import Client
from corolla.models import pretrained, trainable
from corolla.privacy.accounting import Release, epsilon, gaussian_epsilon
from corolla.privacy.ledger import Ledger, Limit
from corolla.storage.memory import Memory
from corolla.strategies.fedavg import FedAvg
from corolla.types import Payload, Update
from corolla.wire import messages
from corolla.wire.messages import Kind, Task, pack_task
from corolla.wire.task_settings import TaskSettings
from tests.client.training.test_worker import RUN, ask, task

Settings = Callable[..., RunConfig]
OTHER = "cd" * 16
ADA = 4
"""Her training examples."""
EVERYBODY = {"batch_size": 16}
"""Larger than any client: no chance decides, and epsilon has a closed form."""


@pytest.fixture
def make(settings: Settings, tmp_path: Path) -> Callable[..., Worker]:
    def worker(
        federation: FederatedData | None = None,
        limit: Limit | None = None,
        ledger: Path | None = None,
        record: Path | None = None,
        **changes: Any,
    ) -> Worker:
        given: dict[str, Any] = {"dp": "example", **changes}
        if given["dp"] != "none" and "epsilon" not in given:
            given = {"noise_multiplier": 4.0, **given}
        config = settings(**{"rounds": 9, **given})
        model = trainable.build(config, pretrained.load(config))
        own = federation or federated.load(config)
        memory = Memory(tmp_path / "memory")
        device = Device(ledger=ledger, limit=limit)
        return Worker(config, model, own, memory, record, device=device)

    return worker


def ledger(worker: Worker, client: str = "ada") -> Ledger:
    return Ledger(worker.memory.kept_folder(client) / "ledger.jsonl")


def delta_of(epsilon: float, mu: float) -> float:
    """Of a Gaussian mechanism: equation 6 of Balle and Wang (ICML 2018), written out."""
    low = norm.cdf(-mu / 2 - epsilon / mu)
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * low)


@pytest.mark.parametrize(
    "strategy", ["fedavg", "ffa_lora", "seed_pool", "fedkseed", "fedkseed_pro", "fedmezo"]
)
def test_a_reply_holds_an_update_and_public_numbers(
    make: Callable[..., Worker], strategy: str
) -> None:
    """Epsilon is that of two rounds of two releases with all examples in each."""
    worker = make(strategy=strategy, local_steps=2, **EVERYBODY)
    packets = [task(worker, round=round) for round in (1, 2)]
    for rounds, packet in enumerate(packets, start=1):
        reply = ask(worker, "ada", packet)
        assert reply.error == ""
        assert reply.metrics.keys() == {"local_steps", "epsilon"}
        assert reply.metrics["local_steps"] == 2.0
        found = delta_of(reply.metrics["epsilon"], math.sqrt(2 * rounds) / 4.0)
        assert found == pytest.approx(1e-5, rel=1e-6)
        assert reply.num_examples == ADA
        assert reply.scalars or reply.payload
    assert ledger(worker).releases(RUN) == [Release(4.0, 1.0, 2)] * 2


def test_both_classes_of_a_mixed_federation_pay_for_their_own_steps(
    make: Callable[..., Worker],
) -> None:
    classes = {
        "laptop": {"trainer": "first_order", "local_steps": 3, "batch_size": 2},
        "phone": {"trainer": "zeroth_order", "local_steps": 4, "batch_size": 5},
    }
    worker = make(strategy="mixed", classes=classes)
    for name, release in (
        ("laptop", Release(4.0, 2 / 4, 3)),
        ("phone", Release(4.0, 1.0, 4)),
    ):
        text = TaskSettings(worker.config.lora, name, 4, 0, {}).to_json()
        reply = ask(worker, "ada", task(worker, config=text))
        assert reply.error == ""
        assert reply.metrics.keys() == {"local_steps", "epsilon"}
        assert ledger(worker).releases()[-1] == release
        assert reply.num_examples == ADA
    assert reply.metrics["epsilon"] == pytest.approx(
        epsilon([Release(4.0, 2 / 4, 3), Release(4.0, 1.0, 4)], 1e-5)
    )


def test_the_weight_is_what_the_server_can_know(make: Callable[..., Worker]) -> None:
    """It would otherwise tell how many examples were drawn, or have no target."""
    rows = [Example("x" * 20, prompt="p" * (60 if i < 4 else 3)) for i in range(9)]
    federation = FederatedData("test", {"ada": Split(rows, [])}, rows, [], "")
    for steps, batch, weight in ((2, 3, 6), (4, 3, 9)):
        worker = make(federation=federation, local_steps=steps, batch_size=batch)
        assert len(worker._tokens("ada")[0]) == 5  # of nine
        reply = ask(worker, "ada", task(worker, round=steps))
        assert reply.error == ""
        assert reply.num_examples == weight
        assert ledger(worker).releases()[-1].sampling_probability == batch / 9


def test_a_round_that_is_done_again_has_fresh_noise_and_is_paid_again(
    make: Callable[..., Worker],
) -> None:
    worker = make(**EVERYBODY)
    packet = task(worker)
    one, two = (ask(worker, "ada", packet) for _ in range(2))
    assert one.payload != two.payload
    assert two.metrics["epsilon"] > one.metrics["epsilon"]
    assert len(ledger(worker).releases()) == 2


def test_without_dp_nothing_is_written(make: Callable[..., Worker]) -> None:
    worker = make(dp="none")
    reply = ask(worker, "ada", task(worker))
    assert {"train_loss", "skipped"} <= reply.metrics.keys()
    assert "epsilon" not in reply.metrics
    assert not ledger(worker).path.exists()


def test_updates_are_recorded_and_compressed_as_they_are_sent(
    make: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = make(record=tmp_path / "updates", codec=["top_k:0.5", "fp16"], **EVERYBODY)
    reply = ask(worker, "ada", task(worker))
    assert reply.error == ""
    assert list((tmp_path / "updates").rglob("adapter_model.safetensors"))
    like = {"adapter": worker.model.init(worker.config.lora, 0)}
    assert worker.config.uplink.unpack(messages.content(reply), like)["adapter"].keys()


# Who pays, and when


class Killed(BaseException):
    """Ends a process wherever it is."""


def test_what_a_round_costs_is_on_disk_before_training_begins(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill then: counted, though nothing was sent."""
    worker = make(**EVERYBODY)
    seen: list[list[Release]] = []

    def kill(strategy: FedAvg, client: Client, received: Payload) -> Update:
        seen.append(ledger(worker).releases())
        raise Killed

    monkeypatch.setattr(FedAvg, "local", kill)
    with pytest.raises(Killed):
        worker("ada", task(worker))
    assert seen == [[Release(4.0, 1.0, 2)]] == [ledger(worker).releases()]
    monkeypatch.undo()
    reply = ask(make(**EVERYBODY), "ada", task(worker))
    assert reply.metrics["epsilon"] == pytest.approx(gaussian_epsilon(2 / 4, 1e-5))


def test_a_task_that_cannot_begin_costs_nothing(make: Callable[..., Worker]) -> None:
    worker = make(**EVERYBODY)
    packet = task(worker, cached={"A": "ab" * 16})
    assert ask(worker, "ada", packet).missing == ["A"]
    assert ask(worker, "eve", task(worker)).error == "this device has no such client"
    assert not ledger(worker).path.exists()


def test_clients_pay_for_themselves(make: Callable[..., Worker]) -> None:
    worker = make(**EVERYBODY)
    for client in ("ada", "ben", "ben"):
        assert ask(worker, client, task(worker)).error == ""
    assert [len(ledger(worker, c).releases()) for c in ("ada", "ben", "cyd")] == [1, 2, 0]


def test_a_run_ends_for_a_client_where_its_budget_ends(make: Callable[..., Worker]) -> None:
    """Noise for two rounds of three: the third is refused, by another process as well."""
    given = {"epsilon": 3.0, "rounds": 3, "participations": 2, **EVERYBODY}
    worker = make(**given)
    told = [ask(worker, "ada", task(worker, round=r)).metrics["epsilon"] for r in (1, 2)]
    assert told[0] < told[1] <= 3.0
    assert told[1] == pytest.approx(3.0, rel=2e-3)
    whole = ledger(worker).path.read_bytes()
    for again in (worker, make(**given)):
        reply = ask(again, "ada", task(again, round=3))
        assert "privacy budget: this round would bring the run to epsilon 3." in reply.error
        assert reply.error.endswith("of 3 at delta 1e-05 for this client's examples")
        assert (reply.payload, reply.scalars, reply.metrics) == (b"", {}, {})
    assert ledger(worker).path.read_bytes() == whole
    assert ask(worker, "ben", task(worker, round=3)).error == ""
    another = task(worker, round=3, run_id=OTHER)
    assert ask(worker, "ada", another).error == ""  # a run has its own budget


def test_a_device_has_a_limit_of_its_own_over_all_runs(
    make: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    """Each run asks for little; at the device's own delta. What others had is told to nobody."""
    most = gaussian_epsilon(math.sqrt(2 * 2) / 4, 1e-6) * (1 + 1e-9)
    worker = make(limit=Limit(most, 1e-6), **EVERYBODY)
    for number in (1, 2):
        packet = task(worker, run_id=f"{number:032x}")
        assert ask(worker, "ada", packet).error == ""
    with caplog.at_level(logging.ERROR, "corolla"):
        reply = ask(worker, "ada", task(worker, run_id=OTHER))
    assert reply.error == "this round would exceed this device's own privacy limit"
    assert len(ledger(worker).releases()) == 2
    facts = [getattr(record, "facts", {}) for record in caplog.records]
    assert [own["epsilon"] for own in facts] == [
        pytest.approx(gaussian_epsilon(math.sqrt(3 * 2) / 4, 1e-6))
    ]


def test_an_owners_delta_that_protects_nobody_is_refused_before_it_costs(
    make: Callable[..., Worker],
) -> None:
    rows = [Example("x" * (i + 1)) for i in range(12)]
    federation = FederatedData("test", {"ada": Split(rows, [])}, rows, [], "")
    for delta, refused in ((1 / 12, True), (0.09, True), (0.08, False)):
        worker = make(limit=Limit(50.0, delta), federation=federation, **EVERYBODY)
        why = ask(worker, "ada", task(worker)).error
        assert ("its owner has to set one below 1 / examples" in why) == refused
        assert (why != "") == refused
        assert ledger(worker).path.exists() != refused


def test_a_device_keeps_one_ledger_for_all_its_names(
    make: Callable[..., Worker], tmp_path: Path
) -> None:
    path = tmp_path / "state" / "ledger.jsonl"
    worker = make(ledger=path, **EVERYBODY)
    for client in ("ada", "ben"):
        ask(worker, client, task(worker))
    assert len(Ledger(path).releases()) == 2
    assert not ledger(worker).path.exists()


# What is refused


@pytest.mark.parametrize("dp", ["none", "client"])
def test_a_device_with_a_limit_takes_part_in_nothing_else(
    make: Callable[..., Worker], dp: str
) -> None:
    worker = make(limit=Limit(3.0, 1e-5), dp=dp)
    for kind in (Kind.TRAIN, Kind.EVALUATE):
        assert ask(worker, "ada", task(worker, kind)).error == (
            "this device gives at most epsilon 3 of its examples: it takes part in runs with "
            f"dp=example alone, found dp={dp}"
        )
    hello = ask(worker, "ada", pack_task(Task(RUN, 0, "", Kind.HELLO, "")))
    assert (hello.error, hello.num_examples) == ("", ADA)


@pytest.mark.parametrize("dp", ["example", "client"])
def test_nothing_is_measured_on_private_examples(make: Callable[..., Worker], dp: str) -> None:
    reply = ask(worker := make(dp=dp), "ada", task(worker, Kind.EVALUATE))
    assert reply.error == f"dp={dp}: nothing is measured on this device's examples"
    assert reply.metrics == {}


def test_a_delta_that_protects_nobody_is_refused_before_it_costs(
    make: Callable[..., Worker],
) -> None:
    rows = [Example("x" * (i + 1)) for i in range(12)]
    federation = FederatedData("test", {"ada": Split(rows, [])}, rows, [], "")
    worker = make(delta=0.09, federation=federation, **EVERYBODY)
    why = ask(worker, "ada", task(worker)).error
    assert "delta=0.09 is no protection among 12 training examples" in why
    assert not ledger(worker).path.exists()


def test_a_damaged_ledger_refuses_in_one_line_and_tells_its_owner_why(
    make: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = make(**EVERYBODY)
    for round in (1, 2):
        ask(worker, "ada", task(worker, round=round))
    path = ledger(worker).path
    damaged = path.read_bytes().replace(b'"count": 2', b'"count": 1', 1)
    path.write_bytes(damaged)
    with caplog.at_level(logging.ERROR, "corolla"):
        reply = ask(worker, "ada", task(worker, round=3))
    assert reply.error == "this device's privacy ledger cannot be used; its own log says why"
    assert reply.payload == b""
    assert path.read_bytes() == damaged
    facts = [getattr(record, "facts", {}).get("why", "") for record in caplog.records]
    assert any(f"{path} is damaged in line 1 of 2: put back" in why for why in facts)


# What goes wrong


@pytest.mark.parametrize(
    "error",
    [
        DivergedError("loss is nan at local step 3: lower lr"),
        DataError("row 7 has no label"),
        ModelError("gradients of row 7 cannot be told apart"),
        RuntimeError("value 3.14"),
        MemoryError(),
        KeyError("secret"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_goes_wrong_in_training_is_told_in_public_words(
    make: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """One text for all of them, where it fails without rows too; the owner's log has the error."""
    worker = make(**EVERYBODY)
    monkeypatch.setattr(FedAvg, "local", lambda *args: (_ for _ in ()).throw(error))
    with caplog.at_level(logging.ERROR, "corolla"):
        reply = ask(worker, "ada", task(worker))
    assert reply.error == "this device could not train; its own log says why"
    assert len(ledger(worker).releases()) == 1
    whys = [getattr(record, "facts", {}).get("why", "") for record in caplog.records]
    known = str(error) if isinstance(error, CorollaError) else type(error).__name__
    assert whys == [known, known]


@pytest.mark.parametrize("strategy", ["fedavg", "seed_pool"])
def test_what_goes_wrong_because_of_rows_is_an_update_of_noise(
    make: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    strategy: str,
) -> None:
    """Whoever was charged gets an answer: an error would tell of the rows."""
    worker = make(strategy=strategy, **EVERYBODY)
    usual = ask(worker, "ada", task(worker))
    cls = type(worker.strategy)
    real, failed = cls.local, list[bool]()

    def fail_once(strategy: Any, client: Client, received: Payload) -> Update:
        update: Update = real(strategy, client, received)
        if not failed:
            failed.append(True)
            raise MemoryError
        return update

    monkeypatch.setattr(cls, "local", fail_once)
    with caplog.at_level(logging.ERROR, "corolla"):
        reply = ask(worker, "ada", task(worker, round=2))
    assert reply.error == ""
    assert reply.metrics.keys() == usual.metrics.keys()
    assert reply.num_examples == usual.num_examples
    assert len(reply.payload) == len(usual.payload)
    assert len(ledger(worker).releases()) == 2
    facts = [getattr(record, "facts", {}) for record in caplog.records]
    assert [own["why"] for own in facts] == ["MemoryError"]


def test_what_is_not_finite_after_the_noise_is_sent_as_nothing(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FedAvg.local

    def wild(strategy: FedAvg, client: Client, received: Payload) -> Update:
        update = real(strategy, client, received)
        wrong = {n: t.clone().fill_(math.nan) for n, t in update.payload["adapter"].items()}
        return replace(update, payload={"adapter": wrong}, keep={"own": wrong})

    monkeypatch.setattr(FedAvg, "local", wild)
    worker = make(codec=["int8"], **EVERYBODY)  # which takes finite values alone
    assert ask(worker, "ada", task(worker)).error == ""


def test_why_a_model_cannot_be_trained_in_batches_is_told(make: Callable[..., Worker]) -> None:
    """It was found without any example, and who set up the run has to know."""
    worker = make(micro_batch_size=2, **EVERYBODY)
    name = next(n for n, m in worker.model.model.named_modules() if type(m).__name__ == "LoraModel")
    layer = worker.model.model.get_submodule(name).get_submodule("model.model.layers.0")
    layer.register_forward_hook(lambda module, args, out: out + 0.1 * out.mean(dim=(0, 1)))
    error = ask(worker, "ada", task(worker)).error
    assert error.startswith("dp=example: in a batch, the gradients of examples are not")


def test_a_row_that_cannot_be_encoded_is_told_to_its_owner_alone(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = make(**EVERYBODY)
    real, called = Encoder.__call__, list[Example]()

    def fail(encoder: Encoder, row: Example) -> list[Encoded]:
        called.append(row)
        if len(called) == 2:
            raise DataError("an example has a label that the model was not built for")
        return real(encoder, row)

    monkeypatch.setattr(Encoder, "__call__", fail)
    with caplog.at_level(logging.WARNING, "corolla"):
        reply = ask(worker, "ada", task(worker))
    assert (reply.error, reply.num_examples) == ("", ADA)
    assert [own.example for own in worker._tokens("ada")[0]] == [0, 2, 3]
    facts = [getattr(record, "facts", {}) for record in caplog.records]
    assert facts == [{"of": ADA, "not_encoded": 1, "cut": 0}]


def test_a_row_is_one_sequence_of_what_may_fill_it(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of a long one is not even looked at; without privacy it is trained on."""
    rows = [Example("x" * 20), Example("y" * 1_000_000), Example("z", prompt="p" * 1_000_000)]
    federation = FederatedData("test", {"ada": Split(rows, [])}, rows, [], "")
    assert len(make(federation=federation, dp="none")._tokens("ada")[0]) > 1000
    seen: list[int] = []
    worker = make(federation=federation, max_length=48, **EVERYBODY)
    real = Encoder.__call__

    def spy(encoder: Encoder, row: Example) -> list[Encoded]:
        seen.append(len(row.text) + len(row.prompt or ""))
        return real(encoder, row)

    monkeypatch.setattr(Encoder, "__call__", spy)
    found = worker._tokens("ada")[0]
    assert [own.example for own in found] == [0, 1]
    assert len(found[1].input_ids) == 48
    assert max(seen) <= 32 * 48 + 1


@dataclass(frozen=True)
class Careless(FedAvg):
    """Trains twice, or tells what it should not."""

    name: ClassVar[str] = "careless"
    times: int = 1

    def local(self, client: Client, received: Payload) -> Update:
        for _ in range(self.times):
            update = super().local(client, received)
        return replace(update, num_examples=2, metrics={"local_steps": 2.0, "loss": 1.5, "x": 3.0})


def test_a_strategy_that_trains_twice_is_stopped(make: Callable[..., Worker]) -> None:
    worker = make(**EVERYBODY)
    worker.strategy = Careless(times=2)
    assert ask(worker, "ada", task(worker)).error == (
        "dp=example: the strategy takes more than the 2 steps of a round"
    )


@pytest.mark.parametrize("reach", ["data", "trainer.data", "forward.data", "private", "model"])
def test_a_strategy_does_not_come_across_examples(
    make: Callable[..., Worker], caplog: pytest.LogCaptureFixture, reach: str
) -> None:
    """They are there without privacy, and what `Client` promises always is."""

    class Curious(FedAvg):
        def local(self, client: Client, received: Payload) -> Update:
            operator.attrgetter(reach)(client)
            return super().local(client, received)

    for dp, refused in (("none", False), ("example", True)):
        worker = make(dp=dp, **EVERYBODY)
        worker.strategy = Curious()
        with caplog.at_level(logging.ERROR, "corolla"):
            assert bool(ask(worker, "ada", task(worker)).error) == refused
    whys = [getattr(record, "facts", {})["why"] for record in caplog.records]
    assert whys == ["AttributeError"] * 2  # with rows, and without


def test_a_strategy_cannot_take_privacy_off_a_client(make: Callable[..., Worker]) -> None:
    class Plain(FedAvg):
        def local(self, client: Client, received: Payload) -> Update:
            return super().local(replace(client, private=None), received)  # type: ignore[type-var]

    worker = make(**EVERYBODY)
    worker.strategy = Plain()
    assert "could not train" in ask(worker, "ada", task(worker)).error


def test_a_strategy_sees_all_that_a_client_promises(make: Callable[..., Worker]) -> None:
    """As a strategy without privacy sees it."""
    seen: list[Mapping[str, Any]] = []

    class Looking(FedAvg):
        def local(self, client: Client, received: Payload) -> Update:
            names = ("seed", "lora", "population", "kept", "kind")
            found = {name: getattr(client, name) for name in names}
            fresh = client.trainer.init(3)
            total = sum(float(tensor.double().sum()) for tensor in fresh.values())
            seen.append({**found, "fresh": total, "queries": client.forward.queries})
            return super().local(client, received)

    for dp in ("none", "example"):
        worker = make(dp=dp, local_steps=2, **EVERYBODY)
        worker.strategy = Looking()
        assert ask(worker, "ada", task(worker)).error == ""
    assert seen[0] == seen[1]


def test_what_a_strategy_measures_beside_is_not_sent(make: Callable[..., Worker]) -> None:
    worker = make(**EVERYBODY)
    worker.strategy = Careless()
    reply = ask(worker, "ada", task(worker))
    assert reply.metrics.keys() == {"local_steps", "epsilon"}
    assert reply.num_examples == ADA


# A whole run


@pytest.mark.parametrize("strategy", ["ffa_lora", "seed_pool"])
def test_a_simulated_run_ends_with_an_artefact_and_its_ledgers(
    settings: Settings, tmp_path: Path, strategy: str
) -> None:
    private = {"dp": "example", "noise_multiplier": 4.0, **EVERYBODY}
    config = settings(strategy=strategy, rounds=2, cohort=2, **private)
    simulate(config, tmp_path / "run")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    ledgers = [Ledger(path) for path in (tmp_path / "run" / "clients").rglob("ledger.jsonl")]
    assert sum(len(own.releases()) for own in ledgers) == 4
    run_id = json.loads((tmp_path / "run" / "run.json").read_text())["run_id"]
    assert all(own.releases(run_id) == own.releases() for own in ledgers)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        measured = [entry.get(name) for name in ("train_loss", "skipped", "target_tokens")]
        assert measured == [None, None, None]


def test_a_run_that_was_stopped_goes_on_with_what_it_has_spent(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was at work when it was stopped pays for that round twice."""
    private = {"dp": "example", "noise_multiplier": 4.0, **EVERYBODY}
    config = settings(rounds=2, **private)
    real = FedAvg.local

    trained: list[int] = []

    def stop(strategy: FedAvg, client: Client, received: Payload) -> Update:
        trained.append(client.seed)
        if len(trained) == 5:  # the first of the second round
            raise KeyboardInterrupt
        return real(strategy, client, received)

    with monkeypatch.context() as patch:
        patch.setattr(FedAvg, "local", stop)
        with pytest.raises(StoppedError):
            simulate(config, tmp_path / "run")
    simulate(config, tmp_path / "run", resume=True)
    paths = (tmp_path / "run" / "clients").rglob("ledger.jsonl")
    rounds = [[json.loads(line)["round"] for line in p.read_text().splitlines()] for p in paths]
    assert sorted(rounds) == [[1, 2], [1, 2], [1, 2], [1, 2, 2]]


@pytest.mark.parametrize("noise", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("batch", [3, 16])
def test_a_server_that_asks_for_hardly_any_noise_is_refused_by_the_limit(
    make: Callable[..., Worker], noise: float, batch: int
) -> None:
    worker = make(limit=Limit(8.0, 1e-5), noise_multiplier=noise, batch_size=batch)
    error = ask(worker, "cyd", task(worker)).error
    assert error == "this round would exceed this device's own privacy limit"
    assert not ledger(worker, "cyd").path.exists()
