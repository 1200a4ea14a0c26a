"""Warnings about what is sent and never changes, on names of a model of four blocks."""

from typing import Any

import pytest

from corolla.config.load import validate
from corolla.server.runs.setup import set_up
from corolla.warnings.frozen import of_classes

NAMES = [f"model.layers.{i}.mlp.up_proj.{part}" for i in (1, 2, 3) for part in ("lora_A", "lora_B")]
"""Those of a run with layers=1-3, and a head that is in no block."""
NAMES.append("score.weight")


@pytest.mark.parametrize(
    ("classes", "idle"),
    [
        ({}, ""),
        ({"a": {"layers": "last:1"}}, "1-2"),
        ({"a": {"layers": "last:1"}, "b": {"layers": "1"}}, "2"),
        ({"a": {"layers": "last:1"}, "b": {"layers": "first:2"}}, ""),
        ({"a": {"layers": "last:1"}, "b": {}}, ""),
    ],
)
def test_blocks_that_clients_of_no_class_train(classes: dict[str, Any], idle: str) -> None:
    found = of_classes(validate({"layers": "1-3", "classes": classes}), NAMES)
    assert [warning.id for warning in found] == ["layers"] * bool(idle)
    for warning in found:
        assert f"train blocks {idle} of the run" in warning.text and "\n" not in warning.text


def test_a_run_warns_of_them_when_it_begins() -> None:
    small = {"clients": 2, "cohort": 2, "eval_examples": 2, "max_length": 32, "layers": "1-3"}
    loaded = set_up(validate({**small, "classes": {"a": {"layers": "last:1"}}}), None)
    (own,) = [told["text"] for told in loaded.facts["warnings"] if told["id"] == "layers"]
    assert own == (
        "clients of no class train blocks 1-2 of the run (layers of classes: a=last:1), which are "
        "sent all the same and never change: set layers=3 for the run"
    )
