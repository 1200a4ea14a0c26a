"""What a gateway passes on of a log."""

from pathlib import Path

import pytest
import torch

from corolla import seedlog
from corolla.memory import Memory
from corolla.server.blobs import Blobs
from corolla.server.outbound import Parcel, take_in
from corolla.wire import Log
from tests.server import gateways
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
