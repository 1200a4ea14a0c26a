"""An answer of a device does not show what its rows are, but for what the noise is made for.

The noise is silenced here: what is left of a row in an answer is then within the bound that the
noise covers, and all else of the answer is equal.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corolla.client.training import private
from corolla.client.training.worker import Worker
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded, Encoder
from corolla.data.federated import FederatedData
from corolla.data.partition import Split
from corolla.data.rows import Example
from corolla.models import pretrained, trainable
from corolla.privacy import example_level
from corolla.privacy.example_level import ExampleLevel
from corolla.storage.memory import Memory
from corolla.types import Update
from corolla.wire.messages import Reply
from tests.client.training.test_worker import ask, task

Settings = Callable[..., RunConfig]
USUAL = [Example(f"row {i} of text") for i in range(6)]
"""The rows of a client; a neighbour has another last row."""

LAST = {
    "longer than may be": Example("z" * 100_000),
    "as long as may be": Example("z" * 47),
    "one character": Example("z"),
    "empty": Example(""),
    "no target": Example("z", prompt="p" * 200),
    "not a number": Example("~ ~ ~"),
    "not encoded": Example("\u0000"),
}
"""Rows among which one has a loss that is not finite, and one an error."""

RUNS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "one by one": {"micro_batch_size": 1},
    "half precision": {"dtype": "bfloat16"},
    "ffa_lora": {"strategy": "ffa_lora"},
    "seed_pool": {"strategy": "seed_pool", "queries": 2},
    "fedkseed": {"strategy": "fedkseed"},
    "int8": {"codec": ["int8"]},
}


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of nothing, and no row that happens not to be drawn."""
    real = example_level.example_level

    def quiet(config: RunConfig, examples: int, unit: Any) -> ExampleLevel:
        level = real(config, examples, unit)
        zeros = lambda shape: torch.zeros(tuple(shape), dtype=torch.float64)  # noqa: E731
        return dataclasses.replace(level, normal=zeros)

    monkeypatch.setattr(example_level, "example_level", quiet)


@pytest.fixture
def answered(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Reply, Worker]]:
    """The reply of a client with these rows, to a task that is the same for all."""
    number = iter(range(10_000))
    real = Encoder.__call__

    def encode(encoder: Encoder, row: Example) -> list[Encoded]:
        if "\u0000" in row.text:
            raise RuntimeError(f"no token for {row.text!r}")
        return real(encoder, row)

    monkeypatch.setattr(Encoder, "__call__", encode)

    def reply(rows: Sequence[Example], **changes: Any) -> tuple[Reply, Worker]:
        given = {"dp": "example", "noise_multiplier": 4.0, "batch_size": 16, "clip": 0.3, **changes}
        given = {"optimizer": "sgd", "lr": 1.0, "local_steps": 1, **given}
        config = settings(**given)
        model = trainable.build(config, pretrained.load(config))
        [poison] = model.base.tokenizer("~")["input_ids"]
        model.model.get_input_embeddings().register_forward_hook(
            lambda module, ids, found: found.masked_fill((ids[0] == poison)[..., None], math.nan)
        )
        data = FederatedData("test", {"ada": Split(list(rows), [])}, rows, [], "")
        worker = Worker(config, model, data, Memory(tmp_path / str(next(number))))
        return ask(worker, "ada", task(worker)), worker

    return reply


def values(reply: Reply, worker: Worker) -> dict[str, Tensor]:
    """Returns the tensors of the weights that a reply has, as GROUP/NAME → tensor."""
    like = None
    if worker.config.codec:
        like = {"adapter": worker.model.init(worker.config.lora, 0)}
    found = worker.uplink.open(reply, like)
    return {f"{g}/{n}": t for g, own in found.items() for n, t in own.items()}


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    squares = [(one[n].double() - t.double()).square().sum() for n, t in two.items()]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("run", RUNS)
def test_a_row_changes_values_within_its_bound_and_nothing_else(
    answered: Callable[..., tuple[Reply, Worker]], run: str
) -> None:
    """A row of which nothing is left moves the sum by C at most, another row by 2 C."""
    usual, worker = answered(USUAL, **RUNS[run])
    assert usual.error == ""
    known = values(usual, worker)
    bound = 2 * 0.3 / 6
    moved = []
    for name, last in LAST.items():
        reply, other = answered([*USUAL[:5], last], **RUNS[run])
        found = values(reply, other)
        assert dataclasses.replace(reply, payload=b"", scalars={}) == dataclasses.replace(
            usual, payload=b"", scalars={}
        ), name
        assert len(reply.payload) == len(usual.payload), name
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
            n: (t.shape, t.dtype) for n, t in known.items()
        }, name
        assert all(bool(t.isfinite().all()) for t in found.values()), name
        moved.append(apart(found, known))
    # Codes of eight bits, and scalars of sixteen, are off by a part of what they stand for.
    assert max(moved) <= bound * (1.02 if run in ("int8", "seed_pool") else 1 + 1e-5)
    assert max(moved) > 0.1 * bound  # rows do count


@pytest.mark.usefixtures("silent")
def test_without_defences_a_row_that_cannot_be_encoded_is_an_error(
    answered: Callable[..., tuple[Reply, Worker]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def strict(encoder: Encoder, rows: Sequence[Example]) -> list[Encoded]:
        return [sequence for row in rows for sequence in encoder(row)]

    def told(with_rows: Callable[[], Update], without: Callable[[], Update]) -> Update:
        with private.withheld():
            return with_rows()

    monkeypatch.setattr(private, "sequences", strict)
    monkeypatch.setattr(private, "answered", told)
    assert answered(USUAL)[0].error == ""
    assert "could not train" in answered([*USUAL[:5], LAST["not encoded"]])[0].error


@pytest.mark.parametrize("strategy", ["fedavg", "seed_pool"])
def test_memory_that_runs_out_at_a_row_is_no_error(
    answered: Callable[..., tuple[Reply, Worker]],
    monkeypatch: pytest.MonkeyPatch,
    silent: None,
    strategy: str,
) -> None:
    """The row adds nothing: as if it were empty; others count as before."""
    from corolla.client.training import dpsgd, padding, zeroth_order

    def scarce(model: Any, part: Sequence[Encoded], length: int | None) -> dict[str, Tensor]:
        if any(own.example == 5 for own in part):
            raise torch.OutOfMemoryError
        return padding.padded(model, part, length)

    wanted = values(*answered([*USUAL[:5], Example("")], strategy=strategy))
    for module in (dpsgd, zeroth_order):
        monkeypatch.setattr(module, "padded", scarce)
    reply, worker = answered(USUAL, strategy=strategy)
    assert reply.error == ""
    assert apart(values(reply, worker), wanted) <= 1e-5
