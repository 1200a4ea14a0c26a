"""A failure of Flower's simulation engine itself is told to its user in one line."""

from pathlib import Path
from typing import Any, NoReturn

import flwr.simulation
import pytest

from corolla import RunConfig, simulate
from corolla.errors import RoundError


def test_an_engine_that_fails_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        try:
            raise Exception("The current node timed\nout.")
        except Exception as error:
            raise RuntimeError("Simulation Runtime crashed.") from error

    monkeypatch.setattr(flwr.simulation, "run_simulation", fail)
    with pytest.raises(RoundError) as caught:
        simulate(RunConfig(engine="flower", clients=2, rounds=1), tmp_path / "run")
    assert str(caught.value) == (
        "Flower's simulation engine failed: The current node timed out. Try again, or leave "
        "--engine flower out"
    )
    assert not (tmp_path / "run").exists()
