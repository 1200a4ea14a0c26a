"""A server that wants a device's whole disk: ever other groups, ever other runs, a long log.

The owner's limits hold, and the device says so; with them taken out each task adds its megabytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from corolla.client.device import daemon
from corolla.client.device.daemon import Trainer
from corolla.storage.disk import DiskLimits, Room
from corolla.storage.memory import Memory
from corolla.types import Payload
from corolla.wire import codec
from corolla.wire.messages import Kind, Reply, Task
from tests.attacks.devices import answer, device

MIB = 1 << 20
ROWS = [{"text": f"row {i} of text"} for i in range(20)]
REFUSED = "the run would keep "


@pytest.fixture
def trainer(tmp_path: Path, tiny_model: Path) -> Trainer:
    limits = {"run_disk": 10 * MIB, "disk": 25 * MIB, "epsilon": None}
    return device(tmp_path / "device", tiny_model, ROWS, **limits)


def kept(trainer: Trainer) -> int:
    """MiB of all files in the device's state folder."""
    files = (path for path in trainer.own.state.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files) // MIB


def group(number: int) -> Payload:
    """A group of 4 MiB with values of its own."""
    return {"g": {"w": torch.full((MIB,), float(number))}}


def sent(trainer: Trainer, payload: Payload, cached: Mapping[str, str], run: str) -> Reply:
    run_settings = {"strategy": "fedavg", "rank": 1, "rounds": 100, "max_length": 32}
    told: dict[str, Any] = {"run": run_settings, "labels": [], "class": None, "accepted": 0}
    told["lora"] = {"rank": 1, "alpha": 16.0, "rslora": False}
    told["population"] = 2
    data = codec.encode(payload)
    return answer(trainer, Task(run, 1, "v", Kind.TRAIN, json.dumps(told), cached, data))


def other_groups(trainer: Trainer, tasks: int) -> list[Reply]:
    """Tasks of one run that name a new group each, and one that never comes."""
    named = [{"g": codec.content_id(group(i)["g"]), "h": "f" * 32} for i in range(tasks)]
    return [sent(trainer, group(i), names, "ab" * 16) for i, names in enumerate(named)]


def other_runs(trainer: Trainer, tasks: int) -> list[Reply]:
    """Tasks of a new run each, with one group."""
    return [
        sent(trainer, group(i), {"g": codec.content_id(group(i)["g"])}, f"{i:032x}")
        for i in range(tasks)
    ]


def many_groups(trainer: Trainer) -> Reply:
    """One task with more groups than a run may keep."""
    groups = {f"g{i}": group(i)["g"] for i in range(4)}
    cached = {name: codec.content_id(params) for name, params in groups.items()}
    return sent(trainer, groups, cached, "cd" * 16)


def test_without_limits_a_device_fills_up_task_by_task(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "prune", lambda *_: None)
    monkeypatch.setattr(Room, "ask", lambda *_: None)
    monkeypatch.setattr(daemon, "forget", lambda *_: None)
    other_groups(trainer, 4)
    assert kept(trainer) >= 16
    other_runs(trainer, 4)
    assert kept(trainer) >= 32
    many_groups(trainer)
    assert kept(trainer) >= 48


def test_no_server_takes_more_than_the_owner_allows(trainer: Trainer) -> None:
    said: list[str] = []
    trainer._say = said.append
    for reply in other_groups(trainer, 4):
        assert "not held here" in reply.error
        assert kept(trainer) <= 5
    for number in range(8):
        other_runs(trainer, number + 1)
        assert kept(trainer) <= 25
    assert kept(trainer) >= 12
    reply = many_groups(trainer)
    assert reply.error == (
        "the run would keep 12.6 MB on this device's disk, its owner allows 10.5 MB (--run-disk)"
    )
    assert said[-1] == reply.error
    assert kept(trainer) <= 25


def test_small_files_count_as_blocks_of_a_disk(tmp_path: Path) -> None:
    room = Room(tmp_path, DiskLimits(run=4096 * 3, whole=4096 * 3))
    for number in range(3):
        room.ask(1)
        (tmp_path / str(number)).write_bytes(b"x")
        room.wrote(tmp_path / str(number))
    with pytest.raises(Exception, match=REFUSED):
        room.ask(1)
    room.drop(tmp_path / "1")
    room.ask(1)
