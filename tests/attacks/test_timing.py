"""How long an answer takes, with one long row among short ones and without it.

A test cannot lean on a clock: what it compares is every operation of torch with the shapes that it
is given. experiments/bench/private_step.py measures seconds of the CPU.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from corolla.client.training import dpsgd
from corolla.data.encoding import Encoded, collate
from corolla.models.trainable import Trainable
from tests.attacks.devices import Server, answer, device

Counted = Counter[tuple[object, ...]]
"""(operation, shapes and types) → how often."""

SHORT = {"prompt": "a", "response": "b c"}
ROWS = {
    "long": {"prompt": "x " * 200, "response": "y " * 200},
    "as long as may be": {"prompt": "p", "response": "y" * 29},
    "empty": {"prompt": "", "response": ""},
    "without a target": {"prompt": "p" * 300, "response": "y"},
    "another short one": {"prompt": "é\u0000", "response": "\U0001f600"},
}


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch says no types
    """Each operation with the shapes and types of the tensors that it is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: Counted = Counter()  # the tensors of a message have no order

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        given = _pytree.tree_leaves((args, kwargs or {}))
        tensors = [(*own.shape, own.dtype) for own in given if isinstance(own, torch.Tensor)]
        self.done[(str(func), *tensors)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def works(tiny_model: Path, tmp_path: Path) -> Callable[..., Counted]:
    """Returns a function that counts the operations of a second answer, given its last row.

    The first answer also encodes rows, and compares gradients.
    """
    count = iter(range(1000))

    def work(last: dict[str, str], **changes: Any) -> Counted:
        server = Server.of(tiny_model, **changes)
        trainer = device(tmp_path / str(next(count)), tiny_model, [SHORT] * 11 + [last])
        for round in (1, 2):
            seen = Work()
            with seen:
                assert answer(trainer, server.task(round)).error == ""
        return seen.done

    return work


def as_they_come(
    model: Trainable, part: Sequence[Encoded], length: int | None
) -> dict[str, torch.Tensor]:
    """Batches as they were: as long as the longest row."""
    return collate(part, model.base.pad_id, model.device)


WAYS: dict[str, dict[str, Any]] = {
    "one by one": {"micro_batch_size": 1},
    "in batches": {"micro_batch_size": 5},
    "in half precision": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("way", WAYS)
def test_without_defences_a_long_row_is_more_work(
    works: Callable[..., Counted], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(dpsgd, "padded", as_they_come)
    usual = works(SHORT, **WAYS[way])
    assert usual.total() > 500
    assert works(ROWS["long"], **WAYS[way]) != usual


@pytest.mark.parametrize("way", WAYS)
def test_the_work_of_an_answer_tells_nothing_of_a_row(
    works: Callable[..., Counted], way: str
) -> None:
    usual = works(SHORT, **WAYS[way])
    assert usual.total() > 500
    for name, row in ROWS.items():
        assert works(row, **WAYS[way]) == usual, name
