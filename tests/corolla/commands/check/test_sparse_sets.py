"""The row "sparse sets" of `corolla check` finds what goes wrong with places."""

from pathlib import Path
from typing import Any

import pytest

from corolla.commands.check import sparse_sets
from corolla.commands.check.findings import Finding
from corolla.commands.check.probe import Probe
from corolla.models.sparse import carried
from corolla.models.sparse.shown import Shown


def finding(folder: Path, name: str = "fedavg") -> Finding:
    ((check, made),) = sparse_sets.proofs(Probe(name, "llama", folder))
    assert check == "sparse sets"
    return made()


def test_a_strategy_of_factors_has_no_such_row(tmp_path: Path) -> None:
    assert list(sparse_sets.proofs(Probe("ffa_lora", "llama", tmp_path))) == []


def test_a_client_at_other_places_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finding(tmp_path).passed
    monkeypatch.setattr("corolla.client.training.worker.carried.hold", lambda model, payload: None)
    monkeypatch.setattr(sparse_sets, "carried", _Holding())
    found = finding(tmp_path)
    assert not found.passed
    assert "is another model" in found.note


class _Holding:
    """Of the server alone."""

    GROUP = carried.GROUP

    def hold(self, model: Any, payload: Any) -> None:
        model.hold(payload[carried.GROUP])


def test_a_model_that_leaves_its_base_changed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Shown.put

    def put(self: Shown) -> None:
        plain(self)
        free = next(i for i in range(self._flat.numel()) if i not in set(self.places.tolist()))
        self._flat[free] += 1.0

    monkeypatch.setattr(Shown, "put", put)
    assert not finding(tmp_path).passed
