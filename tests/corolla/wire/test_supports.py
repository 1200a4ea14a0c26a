"""Supports by role: the largest factors A and the largest factors B, each apart."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from corolla.errors import WireError
from corolla.types import Payload
from corolla.wire import codec
from corolla.wire.compression import Pipeline, pipeline

A, B = "m.lora_A", "m.lora_B"


def by_role(*steps: str) -> Pipeline:
    return replace(pipeline(steps), roles=True)


def pair(a: list[float], b: list[float]) -> Payload:
    return {"adapter": {B: torch.tensor(b), A: torch.tensor(a)}}


def test_half_of_each_role_by_hand() -> None:
    """The largest by magnitude; B of the same, with its sign."""
    payload, steps = pair([3.0, -1.0, 2.0, 0.5], [0.0, 0.0, 4.0, -5.0]), by_role("top_k:0.5")
    found = steps.decode(steps.encode(payload, 0), payload)["adapter"]
    assert found[A].tolist() == [3.0, 0.0, 2.0, 0.0]
    assert found[B].tolist() == [0.0, 0.0, 4.0, -5.0]
    # Of all values together B would take two places and A the other two.
    small = pair([3.0, -1.0, 2.0, 0.5], [0.0, 0.0, 0.04, -0.05])
    assert steps.decode(steps.encode(small, 0), small)["adapter"][B].tolist() == pytest.approx(
        [0.0, 0.0, 0.04, -0.05]
    )
    together = pipeline(["top_k:0.5"])
    assert not together.decode(together.encode(small, 0), small)["adapter"][B].any()


def test_of_equal_values_the_first_are_sent() -> None:
    payload, steps = pair([1.0, -1.0, 1.0, 1.0], [0.0] * 4), by_role("top_k:0.5")
    data = steps.pack(payload, 0)[""]["content"]
    assert data[:2].tolist() == [0b0011, 0b0011]  # a bitmap of each role, A and then B
    found = steps.unpack(steps.pack(payload, 0), payload)["adapter"]
    assert found[A].tolist() == [1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("density", ["1", "0.5", "0.03", "0.002"])
@pytest.mark.parametrize("number", [None, "bf16", "int8"])
def test_several_tensors_of_a_role_share_its_places(density: str, number: str | None) -> None:
    """Against numpy, and bytes by the formula: k values and min(4 k, ⌈P / 8⌉) of each role."""
    draw = torch.Generator().manual_seed(0)
    adapter = {
        f"{name}{role}": torch.randn(shape, generator=draw)
        for name, role, shape in [
            ("q", ".lora_B", (40, 4)), ("q", ".lora_A", (4, 60)), ("k", ".lora_A", (4, 60)),
            ("k", ".lora_B", (30, 4)), ("", "score.weight", (3, 9)),
        ]
    }  # fmt: skip
    payload: Payload = {"adapter": adapter}
    steps = by_role(f"top_k:{density}", *([number] if number else []))
    found = steps.decode(steps.encode(payload, 0), payload)["adapter"]
    assert found.keys() == adapter.keys()
    kept, places = 27, 0
    for role in (".lora_A", ".lora_B"):
        names = sorted(n for n in adapter if n.endswith(role))
        values = torch.cat([adapter[n].flatten() for n in names]).numpy()
        k = max(1, int(Fraction(density) * len(values)))
        wanted = np.zeros(len(values), bool)
        wanted[np.argsort(-np.abs(values), kind="stable")[:k]] = True
        sent = torch.cat([found[n].flatten() for n in names]).numpy()
        assert not sent[~wanted].any()
        np.testing.assert_allclose(
            sent[wanted], values[wanted], atol=0 if number is None else 0.05, rtol=0
        )
        kept, places = kept + k, places + min(4 * k, -(-len(values) // 8)) * (k < len(values))
    each = {None: 4, "bf16": 2, "int8": 1}[number]
    scales = 4 * len(adapter) * (number == "int8")
    assert steps.content_bytes(payload) == (each * kept + places + scales, False)
    assert codec.content_bytes(steps.pack(payload, 0)) == each * kept + places + scales
    if number is None:
        assert torch.equal(found["score.weight"], adapter["score.weight"])


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("bits", [0b0001, 0b0111, 0b10001])
def test_a_support_of_another_size_is_refused_in_either_role(at: int, bits: int) -> None:
    payload, steps = pair([3.0, -1.0, 2.0, 0.5], [0.0, 0.0, 4.0, -5.0]), by_role("top_k:0.5")
    content = steps.pack(payload, 0)[""]["content"].clone()
    content[at] = bits
    with pytest.raises(WireError, match="support is not 2 ascending indices below 4"):
        steps.unpack({"": {"content": content}}, payload)
