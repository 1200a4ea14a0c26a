import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from corolla import codec, data, models
from corolla.client.memory import Memory
from corolla.client.worker import Worker
from corolla.config import RunConfig
from corolla.data import Example, FederatedData, Split
from corolla.lora import LoraModel
from corolla.types import Payload
from corolla.wire import Kind, Packet, Reply, Task, pack_task, unpack_reply

Settings = Callable[..., RunConfig]
RUN = "ab" * 16


@pytest.fixture
def make(settings: Settings, tmp_path: Path) -> Callable[..., Worker]:
    def worker(
        dropout: float = 0.0,
        federation: FederatedData | None = None,
        record: Path | None = None,
        on_step: Callable[[int], None] | None = None,
        folder: str = "memory",
        **changes: Any,
    ) -> Worker:
        config = settings(**changes)
        model = LoraModel(models.load(config), dropout=dropout)
        own = federation or data.load(config)
        return Worker(config, model, own, Memory(tmp_path / folder), record, on_step)

    return worker


def task(worker: Worker, kind: Kind = Kind.TRAIN, round: int = 1, **changes: Any) -> Packet:
    config = worker.config
    state = worker.strategy.init(worker.model.init(config.lora, 0), 0)
    broadcast = worker.strategy.broadcast(state)
    values: dict[str, Any] = {
        "run_id": RUN,
        "round": round,
        "base_version": "v",
        "kind": kind,
        "config": json.dumps({"lora": vars(config.lora)}),
        "cached": {group: codec.content_id(params) for group, params in broadcast.cached.items()},
        "payload": codec.encode({**broadcast.payload, **broadcast.cached}),
    }
    return pack_task(Task(**{**values, **changes}))


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
    start = worker.model.init(worker.config.lora, 0)
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
        {"config": json.dumps({"lora": {"rank": 1000, "alpha": 1.0}})},
        {"config": json.dumps({"lora": {"rank": 3, "alpha": 1.0}})},
    ],
    ids=["junk", "no group", "other tensors", "no lora", "no json", "huge rank", "other rank"],
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
    state: Payload = worker.strategy.init(worker.model.init(worker.config.lora, 0), 0)
    bad = {n: t * float("inf") for n, t in state["adapter"].items()}
    reply = ask(worker, "ada", task(worker, payload=codec.encode({"adapter": bad})))
    assert "loss is nan" in reply.error
    assert worker("ben", task(worker)).payload == wanted


def test_cached_groups_are_asked_for_and_then_kept(make: Callable[..., Worker]) -> None:
    worker = make(strategy="ffa_lora")
    state = worker.strategy.init(worker.model.init(worker.config.lora, 0), 0)
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
    lora = json.dumps({"lora": {"rank": 3, "alpha": 6.0, "rslora": False}})
    update = codec.decode(ask(worker, "ben", task(worker, config=lora)).payload)
    assert {t.shape[0] for n, t in update["factors"].items() if n.endswith("lora_A")} == {3}
