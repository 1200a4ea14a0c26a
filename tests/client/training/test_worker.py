import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from corolla import seeds
from corolla.client.training.worker import Device, LocalClient, Worker
from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.federated import FederatedData
from corolla.data.partition import Split
from corolla.data.rows import Example
from corolla.directions import moving, pools, seedlog
from corolla.errors import ConfigError
from corolla.models import pretrained, trainable
from corolla.storage.memory import Memory
from corolla.types import LoraSpec, Params, Payload, TrainerName, row_name
from corolla.wire import codec, messages
from corolla.wire.messages import Capabilities, Kind, Log, Reply, Task, pack_task, unpack_reply
from corolla.wire.packet import Packet
from corolla.wire.task_settings import TaskSettings

Settings = Callable[..., RunConfig]
RUN = "ab" * 16


@pytest.fixture
def make(settings: Settings, tmp_path: Path) -> Callable[..., Worker]:
    def worker(
        federation: FederatedData | None = None,
        record: Path | None = None,
        on_step: Callable[[int], None] | None = None,
        folder: str = "memory",
        **changes: Any,
    ) -> Worker:
        config = settings(**{"rounds": 9, **changes})
        model = trainable.build(config, pretrained.load(config))
        own = federation or federated.load(config)
        return Worker(config, model, own, Memory(tmp_path / folder), record, on_step)

    return worker


def first(worker: Worker) -> Payload:
    """The state before all rounds, as server and client make it."""
    config = worker.config
    start = worker.model.init(config.lora, seeds.derive(config.seed, "init"))
    return worker.strategy.init(start, config.seed)


def task(
    worker: Worker,
    kind: Kind = Kind.TRAIN,
    round: int = 1,
    lora: LoraSpec | None = None,
    class_name: str = "",
    state: Payload | None = None,
    **changes: Any,
) -> Packet:
    """A task as a server sends it to who has nothing; `changes` are of its fields."""
    start = first(worker)
    broadcast = worker.strategy.broadcast(start if state is None else state)
    payload, scalars = messages.enclose({**broadcast.payload, **broadcast.cached})
    log = None
    if broadcast.log is not None:
        versions = seedlog.versions(origin(worker), broadcast.log)
        log = Log(versions[0], versions[0], versions[-1], broadcast.log, len(broadcast.log))
    spec, run = lora or worker.config.lora, worker.config.model_dump(mode="json")
    values: dict[str, Any] = {
        "run_id": RUN,
        "round": round,
        "base_version": "v",
        "kind": kind,
        "config": TaskSettings(spec, class_name, 4, 0, run).to_json(),
        "cached": {group: codec.content_id(params) for group, params in broadcast.cached.items()},
        "payload": payload,
        "scalars": scalars,
        "log": log,
    }
    return pack_task(Task(**{**values, **changes}))


def origin(worker: Worker) -> str:
    return seedlog.origin(worker.model.base.fingerprint, first(worker))


def ask(worker: Worker, client: str, packet: Packet) -> Reply:
    return unpack_reply(worker(client, packet), 1 << 30)


def test_a_reply_echoes_its_task(make: Callable[..., Worker]) -> None:
    worker = make()
    for kind in (Kind.TRAIN, Kind.EVALUATE):
        reply = ask(worker, "ben", task(worker, kind, round=2))
        assert reply.error == ""
        assert (reply.run_id, reply.round, reply.base_version) == (RUN, 2, "v")
        assert (reply.kind, reply.client) == (kind, "ben")


def test_hello_says_how_many_examples_there_are(make: Callable[..., Worker]) -> None:
    worker = make()
    packet = pack_task(Task(RUN, 0, "", Kind.HELLO, ""))
    reply = ask(worker, "cyd", packet)
    # 12 rows, a tenth (at least one) held out globally, then a tenth of 11 for itself
    assert (reply.num_examples, reply.payload, reply.error) == (10, b"", "")


def test_the_update_is_what_training_changed(
    make: Callable[..., Worker], tmp_path: Path, tiny_model: Path
) -> None:
    worker = make()
    start = first(worker)["adapter"]
    update = codec.decode(ask(worker, "ada", task(worker)).payload)
    after = worker.model.read()
    assert update["adapter"].keys() == start.keys()
    for name, tensor in update["adapter"].items():
        assert torch.equal(tensor, after[name] - start[name])
    assert max(float(t.abs().max()) for t in update["adapter"].values()) > 0


@pytest.mark.parametrize("strategy", ["fedavg", "ffa_lora", "flora"])
def test_updates_do_not_depend_on_who_trained_before(
    make: Callable[..., Worker], strategy: str
) -> None:
    """Bit for bit, with dropout: neither order nor repetition nor evaluation leaves a trace."""
    changes = {"strategy": strategy, "dropout": 0.3, "lr": 0.1}
    forth, back = make(**changes), make(**changes, folder="other")
    packet = task(forth)
    first = {c: forth(c, packet).payload for c in ("ada", "ben", "cyd", "dot")}
    back("ben", task(back, Kind.EVALUATE))
    second = {c: back(c, packet).payload for c in ("dot", "cyd", "cyd", "ada", "ben")}
    assert second == first
    assert len(set(first.values())) == 4


def test_the_order_of_data_changes_from_round_to_round(
    make: Callable[..., Worker], settings: Settings
) -> None:
    rows = [Example("x" * n) for n in range(1, 11)]
    federation = FederatedData("test", {"ada": Split(rows, [])}, rows, [], "")
    seen: list[int] = []
    worker = make(federation=federation, on_step=seen.append, batch_size=1, local_epochs=1)
    orders = []
    for round in (1, 2, 3, 1):
        seen.clear()
        assert ask(worker, "ada", task(worker, round=round)).error == ""
        orders.append(tuple(seen))
    assert orders[3] == orders[0]
    assert len(set(orders)) == 3
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(2, 12))}  # with <eos>


def test_examples_without_a_target_are_counted(make: Callable[..., Worker]) -> None:
    long = Example("never seen", prompt="p" * 100)  # max_length is 48
    rows = [Example(f"yes {i}", prompt="ok?") for i in range(5)]
    mixed = Split([long, *rows, long], [])
    federation = FederatedData(
        "test", {"mixed": mixed, "hopeless": Split([long, long], [])}, rows, [], ""
    )
    worker = make(federation=federation, local_epochs=1)
    reply = ask(worker, "mixed", task(worker))
    assert (reply.num_examples, reply.metrics["skipped"]) == (5, 2.0)
    assert "no example with a target" in ask(worker, "hopeless", task(worker)).error


def test_windows_of_one_text_are_one_example(make: Callable[..., Worker]) -> None:
    """The weight of a client is the number of its examples, not of its sequences."""
    rows = [Example("a" * 400), Example("b" * 10)]
    federation = FederatedData("test", {"ada": Split(rows, [])}, rows, [], "")
    worker = make(federation=federation, local_epochs=1)
    assert ask(worker, "ada", task(worker)).num_examples == 2


def test_evaluation_scores_the_broadcast_on_the_clients_own_rows(
    make: Callable[..., Worker], tiny_model: Path
) -> None:
    held = [Example("abc", prompt="q"), Example("defgh", prompt="rs")]
    federation = FederatedData("test", {"ada": Split(held, held)}, held, [], "")
    worker = make(federation=federation)
    reply = ask(worker, "ada", task(worker, Kind.EVALUATE))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    total, targets = 0.0, 0
    for example in held:
        prompt = tokenizer(f"{example.prompt}\n")["input_ids"]
        answer = [*tokenizer(example.text)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            loss = plain(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        total, targets = total + float(loss) * len(answer), targets + len(answer)
    assert reply.metrics["loss"] == pytest.approx(total / targets, rel=1e-5)
    assert (reply.num_examples, reply.metrics["targets"], reply.payload) == (2, targets, b"")


@pytest.mark.parametrize("kind", list(Kind))
def test_an_unknown_client_gets_an_error_reply(make: Callable[..., Worker], kind: Kind) -> None:
    worker = make()
    assert "no such client" in ask(worker, "nobody", task(worker, kind)).error


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": b"junk"},
        {"payload": codec.encode({})},
        {"payload": codec.encode({"adapter": {"x": torch.zeros(1)}})},
        {"config": "{}"},
        {"config": "not json"},
        {"config": json.dumps({"lora": {"rank": 2, "alpha": 4.0}})},
        {"class_name": "phone"},
        {"lora": LoraSpec(1000, 1.0)},
        {"lora": LoraSpec(3, 1.0)},
    ],
    ids=[
        *("junk", "no group", "other tensors", "no lora", "no json", "no class", "other class"),
        *("huge rank", "other rank"),
    ],
)
def test_what_cannot_be_trained_on_gets_an_error_reply(
    make: Callable[..., Worker], changes: dict[str, Any]
) -> None:
    worker = make()
    reply = ask(worker, "ada", task(worker, **changes))
    assert reply.error
    assert reply.payload == b""
    assert ask(worker, "ada", task(worker)).error == ""


def test_divergence_is_reported_and_harms_nobody_else(make: Callable[..., Worker]) -> None:
    worker = make()
    wanted = worker("ben", task(worker)).payload
    state = first(worker)
    bad = {n: torch.full_like(t, 1e12) for n, t in state["adapter"].items()}
    reply = ask(worker, "ada", task(worker, payload=codec.encode({"adapter": bad})))
    assert "loss is nan" in reply.error
    assert worker("ben", task(worker)).payload == wanted


def test_cached_groups_are_asked_for_and_then_kept(make: Callable[..., Worker]) -> None:
    worker = make(strategy="ffa_lora")
    state = first(worker)
    adapter = codec.encode({"adapter": state["adapter"]})
    reply = ask(worker, "ada", task(worker, payload=adapter))
    assert (list(reply.missing), reply.payload) == (["A"], b"")
    assert reply.error
    whole = ask(worker, "ada", task(worker))
    assert whole.error == ""
    assert ask(worker, "ada", task(worker, payload=adapter)).payload == whole.payload


def test_a_cached_group_with_other_content_is_refused(make: Callable[..., Worker]) -> None:
    worker = make(strategy="ffa_lora")
    reply = ask(worker, "ada", task(worker, cached={"A": "0" * 32}))
    assert "does not match its content id" in reply.error


def test_a_record_is_the_model_after_training(make: Callable[..., Worker], tmp_path: Path) -> None:
    worker = make(record=tmp_path / "updates")
    reply = ask(worker, "ada", task(worker, round=7))
    folder = tmp_path / "updates" / "round-007" / "ada"
    facts = json.loads((folder / "update.json").read_text())
    assert (facts["client"], facts["num_examples"]) == ("ada", reply.num_examples)
    saved = codec.read(str(folder / "adapter_model.safetensors"))[0]
    after = worker.model.read()
    assert {f"base_model.model.{n}.weight" for n in after} == saved.keys()
    for name, tensor in after.items():
        assert torch.equal(saved[f"base_model.model.{name}.weight"], tensor)


def test_each_clients_rank_comes_with_the_task(make: Callable[..., Worker]) -> None:
    worker = make(strategy="flora", ranks=[2, 3])
    packet = task(worker, lora=LoraSpec(3, 6.0))
    update = codec.decode(ask(worker, "ben", packet).payload)
    assert {t.shape[0] for n, t in update["factors"].items() if n.endswith("lora_A")} == {3}


# Logs of seeded steps

ZEROTH: dict[str, Any] = {"strategy": "seed_pool", "options": {"size": 8}}


def logged(worker: Worker, rounds: int) -> Payload:
    """A state after rounds whose rows move by known steps."""
    state = dict(first(worker))
    for number in range(1, rounds + 1):
        sums = 0.01 * torch.arange(1.0, 9.0, dtype=torch.float64) * (-1) ** number
        state[row_name(number)] = seedlog.row(sums, torch.float16)
    return state


def fingerprint(worker: Worker) -> str:
    """Of all weights of the resident model as they are: adapter, head and base."""
    return pretrained.fingerprint(worker.model.model)


def test_a_log_is_replayed_on_the_first_state(make: Callable[..., Worker]) -> None:
    worker = make(**ZEROTH)
    state = logged(worker, 3)
    reply = ask(worker, "ada", task(worker, Kind.EVALUATE, state=state))
    assert reply.error == ""
    found = worker.model.read()
    flat, layout = moving.flatten(first(worker)["start"])
    key = int(state["key"]["seed"])
    for number, row in seedlog.rows(state).items():
        for k in range(8):  # one direction after the other, in fp64: no transform, no fusion
            z = torch.zeros(len(flat))
            pools.SignPool(8, (key, number)).add(z, 0, [(k, 1.0)])
            flat = flat.double() + float(row["scalars"][k]) * float(row["step"]) * z.double()
    wanted = moving.unflatten(flat.float(), layout)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_an_update_of_scalars_travels_in_the_header(make: Callable[..., Worker]) -> None:
    worker = make(**ZEROTH)
    packet = worker("ada", task(worker))
    reply = unpack_reply(packet, 0)
    assert (reply.error, packet.payload) == ("", b"")
    assert reply.scalars["scalars"]["scalars"].shape == (2,)  # local_steps
    assert reply.metrics["scalars"] == 2.0


def test_a_client_that_follows_needs_the_new_rows_alone(make: Callable[..., Worker]) -> None:
    one, other = make(**ZEROTH), make(**ZEROTH, folder="other")
    state = logged(one, 4)
    rows = list(seedlog.rows(state).values())
    versions = seedlog.versions(origin(one), rows)
    ask(one, "ada", task(one, Kind.EVALUATE, state=logged(one, 1)))
    late = Log(versions[0], versions[1], versions[4], rows[1:], 4)
    followed = one("ada", task(one, state=state, round=5, log=late))
    assert unpack_reply(followed, 0).error == ""
    assert other("ada", task(other, state=state, round=5)) == followed


def test_a_device_that_starts_elsewhere_says_so_in_one_line(make: Callable[..., Worker]) -> None:
    """Another base model, or another seed of the run: no row of the log would fit."""
    worker = make(**ZEROTH)
    before = fingerprint(worker)
    rows = list(seedlog.rows(logged(worker, 2)).values())
    foreign = seedlog.versions("0" * 32, rows)
    log = Log(foreign[0], foreign[0], foreign[-1], rows, 2)
    reply = ask(worker, "ada", task(worker, log=log))
    own = origin(worker)[:8]
    assert f"this device starts from version {own}, the server from 00000000" in reply.error
    assert "another base model" in reply.error
    assert "\n" not in reply.error
    assert (reply.scalars, list(reply.missing)) == ({}, [])
    assert fingerprint(worker) == before
    assert ask(worker, "ada", task(worker)).error == ""


@pytest.mark.parametrize("damage", ["gap", "order", "value", "foreign"])
def test_a_log_with_a_gap_is_refused_and_the_model_stays(
    make: Callable[..., Worker], damage: str
) -> None:
    worker = make(**ZEROTH)
    state = logged(worker, 3)
    rows = list(seedlog.rows(state).values())
    changed: Params = {**rows[1], "scalars": rows[1]["scalars"] + 1}
    sent = {
        "gap": [rows[0], rows[2]],
        "order": [rows[0], rows[2], rows[1]],
        "value": [rows[0], changed, rows[2]],
        "foreign": [*rows, rows[0]],
    }[damage]
    versions = seedlog.versions(origin(worker), rows)
    before = fingerprint(worker)
    log = Log(versions[0], versions[0], versions[3], sent, max(3, len(sent)))
    reply = ask(worker, "ada", task(worker, state=state, log=log))
    assert f"rows from version {versions[0][:8]} do not lead to {versions[3][:8]}" in reply.error
    assert "gap" in reply.error
    assert reply.scalars == {}
    assert fingerprint(worker) == before
    assert ask(worker, "ada", task(worker, state=state)).error == ""


def test_a_client_that_lost_its_log_asks_for_it(make: Callable[..., Worker]) -> None:
    worker = make(**ZEROTH)
    state = logged(worker, 3)
    rows = list(seedlog.rows(state).values())
    versions = seedlog.versions(origin(worker), rows)
    before = fingerprint(worker)
    late = Log(versions[0], versions[2], versions[3], rows[2:], 3)
    reply = ask(worker, "ada", task(worker, state=state, log=late))
    assert list(reply.missing) == ["log"]
    assert (reply.error, reply.scalars) == ("log: not held here", {})
    assert fingerprint(worker) == before
    assert ask(worker, "ada", task(worker, state=state)).error == ""


def test_a_snapshot_stands_for_all_rows_before_it(make: Callable[..., Worker]) -> None:
    """Trained from it, the first round and the next, is what is trained from the rows."""
    follower, newcomer = make(**ZEROTH), make(**ZEROTH, folder="other")
    state, later = logged(follower, 3), logged(follower, 4)
    versions = seedlog.versions(origin(follower), list(seedlog.rows(later).values()))
    make_snapshot = follower.strategy.broadcast(state).snapshot
    assert make_snapshot is not None
    start = make_snapshot()
    whole = codec.encode({"start": start})
    log = Log(versions[0], versions[3], versions[3], (), 3, codec.content_id(start))
    sent = newcomer("ada", task(newcomer, state=state, round=4, log=log, payload=whole))
    assert unpack_reply(sent, 0).error == ""
    assert sent == follower("ada", task(follower, state=state, round=4))
    row = list(seedlog.rows(later).values())[3:]
    log = Log(versions[0], versions[3], versions[4], row, 4)
    sent = newcomer("ada", task(newcomer, state=later, round=5, log=log))
    assert unpack_reply(sent, 0).error == ""
    assert sent == follower("ada", task(follower, state=later, round=5))


@pytest.mark.parametrize("payload", [{}, {"start": {"x": torch.zeros(3)}}], ids=["none", "other"])
def test_a_snapshot_that_is_not_what_was_announced_is_refused(
    make: Callable[..., Worker], payload: Payload
) -> None:
    worker = make(**ZEROTH)
    state = logged(worker, 1)
    version = seedlog.versions(origin(worker), list(seedlog.rows(state).values()))[-1]
    log = Log(origin(worker), version, version, (), 1, "0" * 32)
    before = fingerprint(worker)
    reply = ask(worker, "ada", task(worker, state=state, log=log, payload=codec.encode(payload)))
    assert "snapshot does not match its content id" in reply.error
    assert reply.scalars == {}
    assert fingerprint(worker) == before
    assert ask(worker, "ada", task(worker, state=state)).error == ""


def test_a_group_of_that_name_is_no_snapshot_unless_announced(make: Callable[..., Worker]) -> None:
    worker = make(**ZEROTH)
    version = seedlog.versions(origin(worker), list(seedlog.rows(logged(worker, 1)).values()))[-1]
    log = Log(origin(worker), version, version, (), 1)
    start = codec.encode({"start": first(worker)["start"]})
    reply = ask(worker, "ada", task(worker, log=log, payload=start))
    assert list(reply.missing) == ["log"]


def test_a_log_that_counts_other_rows_is_refused(make: Callable[..., Worker]) -> None:
    """The number of a row decides its signs."""
    worker = make(**ZEROTH)
    state = logged(worker, 2)
    rows = list(seedlog.rows(state).values())
    versions = seedlog.versions(origin(worker), rows)
    log = Log(versions[0], versions[0], versions[-1], rows, 5)
    reply = ask(worker, "ada", task(worker, state=state, log=log))
    assert "log ends at row 5, here at 2" in reply.error


# Classes of clients


def test_the_settings_of_a_class_are_those_of_its_clients(make: Callable[..., Worker]) -> None:
    classes = {
        "phone": {"trainer": "zeroth_order", "local_steps": 5, "queries": 3, "lr": 0.5},
        "server": {"local_steps": 4},
    }
    worker = make(strategy="mixed", options={"size": 8}, classes=classes)
    phone = ask(worker, "ada", task(worker, class_name="phone"))
    assert (phone.error, phone.payload) == ("", b"")
    assert phone.scalars["scalars"]["scalars"].shape == (5 * 3,)
    assert phone.metrics["local_steps"] == 5.0
    assert float(phone.scalars["scalars"]["step"]) == torch.tensor(-0.5 / 3).item()
    server = ask(worker, "ada", task(worker, class_name="server"))
    assert (server.error, server.scalars) == ("", {})
    assert server.metrics["local_steps"] == 4.0
    assert codec.decode(server.payload).keys() == {"adapter"}


@pytest.mark.parametrize(("name", "kind"), [("a", "first_order"), ("b", "zeroth_order")])
def test_a_strategy_sees_how_a_client_trains(
    make: Callable[..., Worker], name: str, kind: TrainerName
) -> None:
    classes = {"a": {"trainer": "first_order"}, "b": {"trainer": "zeroth_order"}}
    config = make(strategy="mixed", classes=classes, local_steps=3, queries=2).config
    worker = make(strategy="mixed", classes=classes)
    lora = worker.config.lora
    client = LocalClient(
        worker.model, lora, [], config.of_class(name), 1, 1, config.trainer_of(name)
    )
    assert client.kind == kind
    assert client.forward.queries == 6
    assert client.trainer.init(3).keys() == worker.model.init(lora, 3).keys()


def test_all_parameters_have_no_first_order_trainer(make: Callable[..., Worker]) -> None:
    worker = make(**ZEROTH, parameters="full")
    config = worker.config
    client = LocalClient(worker.model, config.lora, [], config, 1, 1, "zeroth_order")
    with pytest.raises(ConfigError, match="first-order training of all parameters"):
        _ = client.trainer


def test_all_parameters_follow_a_log_and_train(make: Callable[..., Worker]) -> None:
    worker = make(**ZEROTH, parameters="full", lr=1e-4)
    reply = ask(worker, "ada", task(worker, state=logged(worker, 2)))
    assert reply.error == ""
    assert reply.scalars["scalars"]["scalars"].shape == (2,)


# What leaves a device when something fails


def test_evaluation_takes_no_more_at_once_than_training(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [Example("abc", prompt="q")] * 12
    federation = FederatedData("test", {"ada": Split(held, held)}, held, [], "")
    losses = {}
    for micro, most in ((None, 8), (2, 2), (20, 8)):
        worker = make(federation=federation, batch_size=20, micro_batch_size=micro)
        seen: list[int] = []
        worker.model.model.register_forward_pre_hook(
            lambda _, args, named, seen=seen: seen.append(len(named["input_ids"])),
            with_kwargs=True,
        )
        losses[micro] = ask(worker, "ada", task(worker, Kind.EVALUATE)).metrics["loss"]
        assert max(seen) == most
    assert losses[2] == pytest.approx(losses[None], rel=1e-6)
    assert losses[20] == losses[None]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("secret row"), "task cannot be done here: KeyError"),
        (IndexError("secret row"), "task cannot be done here: IndexError"),
        (RuntimeError("secret row"), "task cannot be done here: RuntimeError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "out of memory: "),
        (torch.OutOfMemoryError("CUDA"), "out of memory: "),
        (MemoryError(), "out of memory: "),
    ],
)
def test_of_an_unforeseen_error_only_the_type_is_told(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    worker = make()
    worker.device = Device(Capabilities())
    packet = task(worker)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(type(worker.strategy), "local", fail)
    found = ask(worker, "ada", packet).error
    assert found.startswith(told)
    assert "secret" not in found
    worker.device = Device()  # on one machine: to the author of the strategy
    assert ("secret" in ask(worker, "ada", packet).error) == ("secret" in str(error))


def test_torch_without_memory_on_the_cpu_is_told_as_such(
    make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch's own words: no type tells it."""
    worker = make()
    packet = task(worker)
    monkeypatch.setattr(type(worker.strategy), "local", lambda *_: torch.empty(1 << 46))
    assert ask(worker, "ada", packet).error.startswith("out of memory: ")
