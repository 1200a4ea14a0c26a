"""What a gateway passes on of a log."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from corolla.directions import seedlog
from corolla.phones import protocol
from corolla.server.gateway.blobs import Blobs
from corolla.server.gateway.outbound import Parcel, take_in
from corolla.storage.memory import Memory
from corolla.types import LoraSpec
from corolla.wire.messages import Log
from corolla.wire.task_settings import TaskSettings
from tests.server.gateway import gateways
from tests.strategies import tiny


@pytest.mark.parametrize(("scalars", "whole"), [(1 << 10, True), (1 << 20, False)])
def test_instead_of_a_log_too_long_for_a_header_a_snapshot_is_asked_for(
    scalars: int, whole: bool, tmp_path: Path
) -> None:
    """Two rows of that many float32: 8 KiB fit, 8 MiB do not."""
    origin = "0" * 32
    rows = [{"s": torch.full((scalars,), float(number))} for number in (1, 2)]
    log = Log(origin, origin, seedlog.versions(origin, rows)[-1], rows, 2)
    task = gateways.a_task(tiny.config("fedavg"), log=log)
    found = take_in(task, Memory(tmp_path / "memory"), Blobs(tmp_path / "blobs"))
    assert isinstance(found, Parcel) if whole else found == ["log"]


@pytest.mark.parametrize(
    ("version", "snapshot", "groups"),
    [("", False, ["first"]), ("", True, ["start"]), ("1" * 32, False, []), ("1" * 32, True, [])],
)
def test_a_native_phone_gets_the_start_that_it_lacks(
    version: str, snapshot: bool, groups: list[str], tmp_path: Path
) -> None:
    """The first state, or the snapshot in its place; neither if it holds a version."""
    blobs, last = Blobs(tmp_path / "blobs"), "1" * 32
    log = Log("0" * 32, last, last, [], 3)
    told = TaskSettings(LoraSpec(1, 1.0), "strong", 9, 0, {}).to_json()
    parcel = Parcel(
        replace(gateways.a_task(tiny.config("fedavg"), log=log), config=told, seats=0),
        blobs,
        blobs.put(b""),
        [],
        [last],
        blobs.put(b"snapshot", "start", "a" * 32) if snapshot else None,
        blobs.put(b"adapter", "first", "b" * 32),
    )
    header, cached = parcel.native(version, "weak")
    task = protocol.read_task(header.inline)
    assert [blob.group for blob in cached] == groups
    assert [own.group for own in task.cached] == [group for group in groups if group == "first"]
    assert json.loads(task.config)["class"] == "weak"
    assert bool(task.log.start) == ("start" in groups)
    plain, beside = parcel.header(version)  # of a phone that makes the first state itself
    assert [blob.group for blob in beside] == [group for group in groups if group == "start"]
    assert json.loads(protocol.read_task(plain.inline).config)["class"] == "strong"
