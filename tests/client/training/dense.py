"""What the tests of both trainers compare with: transformers alone, with dense weights."""

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor
from torch.func import functional_call

from corolla.data.encoding import Encoded
from corolla.types import LoraSpec, Params

SPEC = LoraSpec(2, 4.0)
SCALING = 2.0  # alpha 4 / rank 2

# Unequal numbers of target tokens: 3, 7, 1 and 4.
DATA = [
    Encoded([40, 41, 42, 43], [40, 41, 42, 43]),
    Encoded([50, 51, 52, 53, 54, 55, 56, 0], [50, 51, 52, 53, 54, 55, 56, 0]),
    Encoded([60, 61, 62, 0], [-100, -100, -100, 0]),
    Encoded([70, 71, 72, 73, 74, 0], [-100, -100, 72, 73, 74, 0]),
]


def padded(data: Sequence[Encoded]) -> dict[str, Tensor]:
    """A batch made by hand: right-padded, padding masked."""
    longest = max(len(s.input_ids) for s in data)

    def row(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (longest - len(values))]

    labels = [s.labels for s in data if not isinstance(s.labels, int)]
    return {
        "input_ids": torch.tensor([row(s.input_ids, 1) for s in data]),
        "attention_mask": torch.tensor([row([1] * len(s.input_ids), 0) for s in data]),
        "labels": torch.tensor([row(own, -100) for own in labels]),
    }


def plain_loss(
    plain: transformers.PreTrainedModel, params: Params, data: Sequence[Encoded]
) -> Tensor:
    """transformers' own loss of W + s B A, with dense weights."""
    weights: dict[str, Tensor] = dict(plain.named_parameters())
    for name in [n.removesuffix(".lora_A") for n in params if n.endswith(".lora_A")]:
        delta = SCALING * params[name + ".lora_B"] @ params[name + ".lora_A"]
        weights[name + ".weight"] = weights[name + ".weight"] + delta
    loss: Tensor = functional_call(plain, weights, kwargs=padded(data)).loss
    return loss
