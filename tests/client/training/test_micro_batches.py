"""Which sequences go through the model together, against every way to part them."""

from collections.abc import Iterator

import pytest
import torch

from corolla.client.training import micro_batches
from corolla.client.training.first_order import FirstOrder
from corolla.data.encoding import Encoded
from corolla.types import Fit
from tests.strategies import tiny

CPU = torch.device("cpu")


def ways(places: list[int]) -> Iterator[list[list[int]]]:
    """Every way to part places into sets."""
    if not places:
        yield []
        return
    for rest in ways(places[1:]):
        yield [[places[0]], *rest]
        for i, part in enumerate(rest):
            yield [*rest[:i], [places[0], *part], *rest[i + 1 :]]


def cost(parts: list[list[int]], lengths: list[int]) -> int:
    """Tokens with padding, and those that each pass costs beside them."""
    return sum(len(own) * max(lengths[i] for i in own) + 64 for own in parts)


@pytest.mark.parametrize("size", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "lengths",
    [[8], [9, 9, 9, 9], [200, 3, 190, 7, 80], [64, 1, 65], [400, 90, 80, 70, 60, 500]],
    ids=str,
)
def test_no_other_parts_cost_less(lengths: list[int], size: int | None) -> None:
    found = micro_batches.parts(lengths, size, CPU)
    every = list(range(len(lengths)))
    assert sorted(i for own in found for i in own) == every
    least = min(
        cost(way, lengths) for way in ways(every) if all(len(own) <= (size or 99) for own in way)
    )
    assert cost(found, lengths) == least


def test_what_is_like_is_together_and_small_batches_stay_whole() -> None:
    assert micro_batches.parts([300, 5, 290, 6], None, CPU) == [[1, 3], [0, 2]]
    assert micro_batches.parts([12, 5, 9], None, CPU) == [[0, 1, 2]]
    assert micro_batches.parts([300, 5, 290, 6], None, torch.device("cuda")) == [[0, 1, 2, 3]]


def test_a_batch_in_parts_is_trained_as_a_whole_with_less_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.lora_model("llama")
    draw = torch.Generator().manual_seed(0)
    lengths = [32, 4, 31, 5, 32, 4, 32, 4]
    ids = [torch.randint(1, 64, (n,), generator=draw).tolist() for n in lengths]
    data = [Encoded(row, row, i) for i, row in enumerate(ids)]
    config = tiny.config("fedavg", optimizer="sgd", lr=0.3, batch_size=8, local_steps=1)
    start = tiny.adapter(model, config.lora, 0)
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )

    def fit() -> Fit:
        seen.clear()
        return FirstOrder(model, config.lora, data, config, 0, 1).fit(start)

    parted = fit()
    assert sorted(seen) == [4 * 5, 4 * 32]
    monkeypatch.setattr(micro_batches, "_CALL", 1 << 20)
    whole = fit()
    assert seen == [8 * 32]
    assert abs(parted.metrics["train_loss"] / whole.metrics["train_loss"] - 1) <= 1e-6
    for name, tensor in whole.params.items():
        moved = tensor - start[name]
        assert (parted.params[name] - tensor).norm() <= 1e-5 * moved.norm(), name
