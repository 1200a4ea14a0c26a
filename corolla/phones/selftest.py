"""The self-test of an exported program before it is written: it must compute what torch does.

It also finds the steps at which central differences follow true gradients: models differ in them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from corolla.data.encoding import IGNORE
from corolla.errors import ModelError
from corolla.phones import lowering
from corolla.phones.lowering import Graph, Run, Say, readable, silence

FP32_LOSS, FP32_GRADIENT = 1e-5, 1e-5
"""How far two fp32 engines may be apart, relative to the loss and to the largest gradient: they sum
in different orders. Measured: 2e-7 and 1.3e-6."""
Q4_LOSS = 0.02
"""The same with 4 bits. Activations are rounded to 8 bits token by token; a value between two of
256 levels goes either way, and a sequence of two tokens averages little: measured 0.4 %."""
STEPS = (1e-4, 3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
SOUND = 0.8
"""Correlation of projected gradients with the true ones that makes a step a sound one: noise then
costs about a third of the directions, which is little beside what random directions cost."""
_DIRECTIONS = 24


class Case(NamedTuple):
    """Inputs of a program, and what torch makes of them in fp32."""

    inputs: tuple[Tensor, ...]
    loss: float
    gradients: tuple[Tensor, ...]


def cases(graph: Graph, vocabulary: int, length: int) -> list[Case]:
    """Random sequences, short to full length, some labels masked, and factors as after training.

    None is zero, and none so large that rounding errors grow from layer to layer.
    """
    generator = torch.Generator().manual_seed(0)
    factors = [
        torch.randn(tensor.shape, generator=generator) / (4 * tensor.shape[1] ** 0.5)
        for tensor in graph.factors.values()
    ]
    return [
        _case(graph, torch.randint(0, vocabulary, (1, tokens), generator=generator), factors)
        for tokens in sorted({2, 3, max(2, length // 2), length})
    ]


def first_steps(graph: Graph, ids: Tensor) -> Case:
    """A text, (1, T), with an adapter that has just left its start: where gradients are small."""
    generator = torch.Generator().manual_seed(2)
    near = [t + 0.02 * torch.randn(t.shape, generator=generator) for t in graph.factors.values()]
    return _case(graph, ids, near)


def _case(graph: Graph, ids: Tensor, factors: Sequence[Tensor]) -> Case:
    labels = ids.clone()
    masked = ids.shape[1] // 3
    labels[:, :masked] = IGNORE
    labels[:, 2 * masked + 1 : 2 * masked + 3] = IGNORE  # a hole, where there is room for one
    labels[:, -1] = ids[:, -1]
    inputs = (ids, labels, *factors)
    wanted = [tensor.clone().requires_grad_(True) for tensor in factors]
    loss = graph(ids, labels, *wanted)
    return Case(inputs, loss.item(), torch.autograd.grad(loss, wanted))


def check_fp32(folder: Path, wanted: Sequence[Case], say: Say) -> None:
    """Checks that the program computes what torch computes. Raises ModelError."""
    say("fp32: checking losses and gradients against torch")
    with readable("fp32"), silence():
        run = lowering.load(folder / "fp32.pte", folder / "base.ptd")
        for case in wanted:
            tokens = case.inputs[0].shape[1]
            loss, *gradients = run("grad", case.inputs)
            for method, found in (("loss", run("loss", case.inputs)[0]), ("grad", loss)):
                _compare(f"fp32 {method} of {tokens} tokens", float(found), case.loss, FP32_LOSS)
            largest = max(float(g.abs().max()) for g in case.gradients)
            off = max(
                float((a - b).abs().max()) for a, b in zip(gradients, case.gradients, strict=True)
            )
            if not off <= FP32_GRADIENT * largest:
                raise ModelError(
                    f"self-test failed: gradients of {tokens} tokens are {off / largest:.1e} of "
                    f"the largest from torch's, allowed {FP32_GRADIENT:.0e}"
                )


def check_q4(folder: Path, graph: Graph, wanted: Sequence[Case], say: Say) -> None:
    """Checks that the program computes what the rounded model does in torch. Raises ModelError."""
    say("q4: checking losses against torch")
    with readable("q4"), silence():
        run = lowering.load(folder / "q4.pte")
        for case in wanted:
            with torch.no_grad():
                own = float(graph(*case.inputs))
            found = float(run("loss", case.inputs)[0])
            _compare(f"q4 loss of {case.inputs[0].shape[1]} tokens", found, own, Q4_LOSS)


def sound_steps(base: str, run: Run, case: Case, say: Say) -> tuple[float, float]:
    """The smallest and the largest step at which projected gradients follow those of `case`.

    Smaller ones drown in rounding, larger ones leave the tangent. Raises ModelError without any.
    """
    say(f"{base}: finding the steps at which projected gradients are sound")
    with readable(base), silence():
        found = {eps: correlation(run, case, eps) for eps in STEPS}
    sound = [eps for eps, value in found.items() if value >= SOUND]
    if not sound:
        raise ModelError(
            f"self-test failed: projected gradients of {base} correlate at most "
            f"{max(found.values()):.2f} with the true ones, needed {SOUND}"
        )
    return sound[0], sound[-1]


def correlation(run: Run, case: Case, eps: float) -> float:
    """Of a program's central differences with exact derivatives, along random directions of ±1."""
    generator = torch.Generator().manual_seed(1)
    ids, labels, *factors = case.inputs
    found, exact = [], []
    for _ in range(_DIRECTIONS):
        signs = [torch.randint(0, 2, t.shape, generator=generator) * 2.0 - 1 for t in factors]
        above, below = (
            float(run("loss", (ids, labels, *map(torch.add, factors, (s * z for z in signs))))[0])
            for s in (eps, -eps)
        )
        found.append(above - below)
        exact.append(sum(float(p.sum()) for p in map(torch.mul, case.gradients, signs)))
    return float(torch.corrcoef(torch.tensor([found, exact], dtype=torch.float64))[0, 1])


def _compare(what: str, found: float, wanted: float, tolerance: float) -> None:
    if not abs(found - wanted) <= tolerance * abs(wanted):
        raise ModelError(
            f"self-test failed: {what} is {found:.6f}, torch says {wanted:.6f}, "
            f"allowed {tolerance:.0e} apart"
        )
