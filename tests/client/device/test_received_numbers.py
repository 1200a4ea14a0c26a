"""Numbers that a server chooses are refused before a row is looked at, or a ledger is charged."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.client.device.daemon import Trainer
from corolla.client.device.settings import Own
from corolla.client.training.worker import Worker
from corolla.config.load import validate
from corolla.config.run import RunConfig
from corolla.errors import WireError
from corolla.models import pretrained, trainable
from corolla.types import Payload
from corolla.wire import messages, ranges
from corolla.wire.messages import Kind, Reply, Task, pack_task, unpack_reply
from corolla.wire.task_settings import RunSettings, TaskSettings
from tests import received
from tests.received import Number

Settings = Callable[..., RunConfig]
KINDS = ("run", "private", "class", "lora", "task")


def told(config: RunConfig) -> dict[str, Any]:
    """The settings of a task of a server with this config."""
    run = config.model_dump(mode="json")
    for own in ("model", "data", "engine", "device", "threads"):  # of the server
        del run[own]
    lora = dataclasses.asdict(config.lora)
    return {"lora": lora, "class": "", "population": 4, "accepted": 0, "run": run}


@pytest.fixture
def device(tiny_model: Path, tmp_path: Path) -> Trainer:
    """A device whose owner gives an epsilon, but not for looking at rows: that is an error."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(6)))
    values = {"server": "localhost:1", "data": str(data), "model": str(tiny_model), "threads": 1}
    own = Own.model_validate({**values, "state": tmp_path / "state", "device": "cpu", "epsilon": 9})
    return Trainer(own, "ada")


@pytest.fixture
def first(settings: Settings) -> Payload:
    """A server's first state."""
    config = settings()
    return {"adapter": trainable.build(config, pretrained.load(config)).init(config.lora, 0)}


def ask(device: Trainer, text: str, payload: Payload, round: int = 1) -> Reply:
    sent, scalars = messages.enclose(payload)
    task = Task("ab" * 16, round, "v", Kind.TRAIN, text, {}, sent, scalars)
    return unpack_reply(device(pack_task(task), lambda: True), 1 << 30)


def private(settings: Settings) -> RunConfig:
    return settings(dp="example", noise_multiplier=50.0, strategy="fedavg", batch_size=8, alpha=4.0)


def unlooked(*_: object) -> None:
    raise AssertionError("a row was looked at")


@pytest.fixture
def refused(
    device: Trainer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """The line with which a task is refused; nothing was looked at, and nothing charged."""
    monkeypatch.setattr(Worker, "_tokens", unlooked)

    def line(text: str, payload: Payload, round: int = 1) -> str:
        reply = ask(device, text, payload, round)
        assert (reply.payload, dict(reply.scalars), dict(reply.metrics)) == (b"", {}, {})
        assert len(reply.error.splitlines()) == 1
        assert not (device.own.state / "ledger.jsonl").exists()
        return reply.error

    return line


def test_what_is_out_of_range_is_refused(
    refused: Callable[..., str], settings: Settings, first: Payload
) -> None:
    base = told(private(settings))
    tried = [one for one in received.cases(*KINDS) if one.refused]
    assert len(tried) > 80
    for one in tried:
        why = refused(received.told(base, one), first)
        assert one.key in why.replace("-", "_"), (one, why)
        assert "found" in why, (one, why)
        if one.key in ranges.RANGES and one.value[0] != '"':
            assert str(ranges.RANGES[one.key]) in why, (one, why)


def test_what_is_in_range_is_taken(settings: Settings) -> None:
    """As far as settings go: a hundred thousand steps are not taken here."""
    base = told(private(settings))
    tried = [one for one in received.cases(*KINDS) if not one.refused]
    assert len(tried) > 40
    for one in tried:
        text = received.told(base, one)
        validate({**RunSettings.from_json(text).run})
        TaskSettings.from_json(text)


def test_tensors_are_within_a_bound(
    refused: Callable[..., str], settings: Settings, first: Payload
) -> None:
    text = json.dumps(told(private(settings)))
    name = min(first["adapter"])
    for one in received.cases("tensor"):
        wild = first["adapter"][name].clone()
        wild.view(-1)[-1] = float(one.value)
        sent = {"adapter": {**first["adapter"], name: wild}}
        if one.refused:
            why = refused(text, sent)
            assert why == (
                f"the task has no usable adapter/{name}: expected finite values up to 1e+12, "
                f"found {float(wild.view(-1)[-1]):g}"
            )
        else:
            ranges.check_tensors(sent)


def test_a_round_is_one_of_the_run(
    refused: Callable[..., str], settings: Settings, first: Payload
) -> None:
    text = json.dumps(told(private(settings)))
    for number in (0, 4, 1 << 31):
        assert refused(text, first, number) == (
            f"the task has no usable round: expected a whole number from 1 to 3, found {number}"
        )


def test_a_device_answers_within_the_ranges(
    device: Trainer, settings: Settings, first: Payload
) -> None:
    """At their ends, all together: whatever a server chooses of them, there is an update."""
    ends: dict[str, tuple[float, float]] = {
        name: (ranges.RANGES[name].least, ranges.RANGES[name].most)
        for name in ("lr", "alpha", "clip", "weight_decay")
    }
    for bits in range(1 << len(ends)):
        chosen = {name: pair[bits >> i & 1] for i, (name, pair) in enumerate(ends.items())}
        changes = {**chosen, "optimizer": ("sgd", "adamw")[bits % 3 % 2], "noise_multiplier": 1e6}
        config = private(settings).model_copy(update=changes)
        reply = ask(device, json.dumps(told(config)), first)
        assert reply.error == "", changes
        flat = [t for params in messages.content(reply).values() for t in params.values()]
        assert flat
        assert all(bool(t.isfinite().all()) for t in flat)


def test_numbers_of_another_kind_are_in_no_range() -> None:
    for value in (None, "1", True, math.nan, math.inf, [1], 0.5):
        with pytest.raises(WireError, match="no usable rank: expected a whole number from 1 to"):
            ranges.check("rank", value)
    ranges.check("alpha", 3)
    with pytest.raises(WireError, match="no usable alpha: expected a number from 1e-06 to 1e"):
        ranges.check("alpha", True)


def test_the_tensor_that_is_named_is_the_one(settings: Settings) -> None:
    fine, empty, whole = torch.ones(3), torch.zeros(0, 4), torch.full((2,), 1 << 50)
    ranges.check_tensors({"a": {"x": fine, "y": empty, "z": whole}})
    with pytest.raises(WireError, match=r"no usable b/y: .* found -2e"):
        ranges.check_tensors({"a": {"x": fine}, "b": {"x": fine, "y": -2e13 * fine}})


def test_every_number_of_the_cases_has_a_range() -> None:
    named: set[Number] = set(received.cases(*KINDS))
    assert {one.key for one in named} == ranges.RANGES.keys() - {"epsilon"}
