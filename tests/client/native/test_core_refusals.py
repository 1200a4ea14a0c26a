"""What a native device cannot do is one line in its reply, and nothing else."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.proto import update_pb2 as pb
from corolla.wire import messages
from corolla.wire.messages import Kind, Task, pack_task
from tests import received
from tests.bundles import Exported
from tests.client.native import core_tasks
from tests.client.native.core_tasks import Case

Make = Callable[..., Case]


@pytest.fixture
def make(tmp_path: Path, native_build: Path, small_bundle: Exported) -> Make:
    def made(**changes: Any) -> Case:
        check = native_build / "corolla-native-check"
        return core_tasks.case(tmp_path, small_bundle, check, **changes)

    return made


def refused(case: Case, task: Task, method: str = "grad", **more: Any) -> str:
    """The line of a reply that holds nothing else."""
    reply = case.native(task, method, **more)
    assert (reply.payload, dict(reply.scalars), dict(reply.metrics)) == (b"", {}, {})
    assert reply.num_examples == 0
    assert (reply.run_id, reply.round, reply.client) == (task.run_id, task.round, case.client)
    assert reply.error and len(reply.error.splitlines()) == 1
    return reply.error


def changed(task: Task, **run: Any) -> Task:
    told = json.loads(task.config)
    told["run"].update(run)
    return replace(task, config=json.dumps(told))


RUNS: dict[str, dict[str, Any]] = {
    "dp=example": {"dp": "example"},
    "codec is not": {"codec": ["fp16"]},
    "codec_down is not": {"codec_down": ["fp16"]},
    "dropout": {"dropout": 0.1},
    "parameters=ia3": {"parameters": "ia3"},
    "strategy scaffold": {"strategy": "scaffold"},
    "unknown optimizer": {"optimizer": "lion"},
    "usable lr": {"lr": "high"},
    "usable local_steps": {"local_steps": 0},
    "usable batch_size": {"batch_size": 1 << 40},
    "usable seed": {"seed": -1},
    "too many steps": {"local_epochs": 100_000, "batch_size": 1},
}


@pytest.mark.parametrize("line", RUNS)
def test_settings_that_are_not_for_it(make: Make, line: str) -> None:
    case = make()
    assert line in refused(case, changed(case.task(), **RUNS[line]))


def test_settings_that_are_none(make: Make) -> None:
    case = make()
    for config in ("", "{", "[]", "{}", '{"run": 1}', "[" * 100_000, '{"lora": 3, "run": {}}'):
        refused(case, replace(case.task(), config=config))


def test_a_model_or_rank_or_trainer_that_is_not_its_own(make: Make) -> None:
    case = make()
    assert "base model" in refused(case, replace(case.task(), model_sha256="0" * 64))
    told = json.loads(case.task().config)
    told["lora"]["rank"] = 4
    assert "rank 4, the bundle 8" in refused(case, replace(case.task(), config=json.dumps(told)))
    assert "trains with first_order" in refused(case, case.task(), "loss")
    assert "no class other" in refused(case, case.task(), kind="other")
    assert "q5" in refused(case, case.task(), program="q5")


def test_a_message_of_another_version_or_content(make: Make) -> None:
    case = make()
    packet = pack_task(case.task())
    for change, line in (
        ({"schema": 4}, "schema 4"),
        ({"payload_bytes": 1}, "checksum"),
        ({"payload_sha256": "0" * 64}, "checksum"),
        ({"kind": pb.KIND_EVALUATE}, "only trains"),
    ):
        head = pb.Task.FromString(packet.header)
        for name, value in change.items():
            setattr(head, name, value)
        done = case.run(case.task(), "grad", header=head.SerializeToString())
        assert done.returncode == 0
        reply = pb.Reply.FromString((case.folder / "out.header").read_bytes())
        assert line in reply.error
        assert not (case.folder / "out.payload").read_bytes()


def test_a_greeting_is_answered(make: Make) -> None:
    case = make()
    reply = case.native(replace(case.task(), kind=Kind.HELLO), "grad")
    assert reply.error == ""
    assert reply.num_examples == len(case.worker.data.clients[case.client].train)
    assert reply.model_sha256 == case.worker.model.base.fingerprint


def test_an_adapter_that_is_not_the_bundles(make: Make) -> None:
    case = make()
    adapter = dict(case.first["adapter"])
    name = next(iter(adapter))
    wrong = {
        "lacks tensor": {**{n: t for n, t in adapter.items() if n != name}, "x": adapter[name]},
        "not as in the bundle": {**adapter, name: adapter[name].T.contiguous()},
        "has 1 tensors": {name: adapter[name]},
    }
    for line, params in wrong.items():
        payload, _ = messages.enclose({"adapter": params})
        assert line in refused(case, replace(case.task(), payload=payload))
    assert "lacks group adapter" in refused(case, replace(case.task(), payload=b""))
    assert "cannot be read" in refused(case, replace(case.task(), payload=b"\xff" * 100))


def test_numbers_that_a_server_may_choose(make: Make, tmp_path: Path) -> None:
    """The cases that Python's clients are held to as well."""
    case = make()
    config, name = case.task().config, next(iter(case.first["adapter"]))
    lines, wanted = [], []
    for one in received.cases("run", "lora", "class"):
        text = received.told(json.loads(config), one)
        lines.append(json.dumps({"config": text, "class": received.CLASS}) + "\n")
        wanted.append(f"no usable {one.key}: expected a " if one.refused else "")
    file = tmp_path / "settings.jsonl"
    file.write_text("".join(lines))
    done = subprocess.run(
        [case.check, "settings", file], capture_output=True, text=True, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for line, part, why in zip(lines, wanted, found, strict=True):
        beyond = "1e400" in line  # no double: the settings are no JSON
        assert bool(part) == bool(why), (line, why)
        assert part in why or beyond, (line, why)
    for one in received.cases("tensor"):
        wild = torch.full_like(case.first["adapter"][name], float(one.value))
        payload, _ = messages.enclose({"adapter": {**case.first["adapter"], name: wild}})
        if one.refused:
            why = refused(case, replace(case.task(), payload=payload))
            assert "not finite, or larger than 1e12" in why
    for number in (0, 10, 1 << 31):
        why = refused(case, replace(case.task(), round=number))
        assert (
            why
            == f"the task has no usable round: expected a whole number from 1 to 9, found {number}"
        )


def test_numbers_that_are_no_contribution(make: Make) -> None:
    """A device that diverges says so."""
    case = make(optimizer="sgd", lr=1e6, weight_decay=1e6, clip_norm=None)
    assert "lower lr" in refused(case, case.task())


def test_a_walk_that_diverges(make: Make) -> None:
    case = make(strategy="seed_pool", lr=1e6, alpha=1e6, eps=1e-2, local_steps=6)
    assert "lower lr" in refused(case, case.task(), "loss")


def test_a_client_without_a_target_within_its_length(make: Make) -> None:
    case = make()
    file = case.folder / "late.jsonl"
    row = {"input_ids": list(range(9)), "labels": [-100] * 8 + [8]}
    file.write_text(json.dumps(row) + "\n")
    assert "no example with a target" in refused(case, case.task(), length=4, tokens=file)


def test_a_damaged_program_is_one_line(make: Make, tmp_path: Path) -> None:
    case = make()
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in case.bundle.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:100] if file.suffix == ".pte" else content)
    assert "cannot load" in refused(case, case.task(), bundle=broken)


def test_scalars_that_a_message_does_not_take(make: Make) -> None:
    case = make(strategy="seed_pool")
    task = changed(case.task(), queries=60_000)
    assert "too many scalars" in refused(case, task, "loss")
