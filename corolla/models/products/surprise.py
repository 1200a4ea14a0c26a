"""Cross-entropy over a vocabulary without its logits: a few rows at a time, gradients at once.

With 262,144 tokens (Gemma 3) the logits of a batch, their softmax and its gradient are gigabytes.
Here a chunk of rows goes through the output layer and back before the next one does, so that only
the gradient of its inputs is kept, which is all that a frozen output layer passes on (as "Cut Your
Losses in Large-Vocabulary Language Models", Wijmans et al., ICLR 2025, arXiv 2411.09009, does it in
blocks on a GPU).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_VALUES = 1 << 25
"""Logits that exist at a time: 128 MB. With fewer rows the weight is read too often."""


def worth(rows: int, head: nn.Linear) -> bool:
    """Returns whether so many rows have more logits than exist at a time here: else torch's way."""
    return rows * head.weight.shape[0] > _VALUES


def summed(states: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The sum of -ln p(label) over rows of states (n, width) and labels (n,), in fp32: a scalar.

    Gradients are of `states` alone.
    """
    found: Tensor = _Sum.apply(states, head.weight, head.bias, labels)  # type: ignore[no-untyped-call]
    return found


def carried(head: Any) -> bool:
    """Returns whether an output layer is one that `summed` takes: plain, and frozen."""
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return False
    frozen = not any(parameter.requires_grad for parameter in head.parameters())
    return frozen and head.weight.is_floating_point()


class _Sum(torch.autograd.Function):
    """`summed`, and the gradient of its states."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        """Computes the gradient of `states` as well."""
        rows = max(1, min(_VALUES // len(weight), len(states)))
        buffer = states.new_empty(rows, len(weight))
        back = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        for at in range(0, len(states), rows):
            own, wanted = states[at : at + rows], labels[at : at + rows, None]
            logits = torch.mm(own, weight.t(), out=buffer[: len(own)])
            if bias is not None:
                logits += bias
            scores = logits.float()  # the same memory where it is fp32 already
            scores -= scores.amax(1, keepdim=True)
            picked = scores.gather(1, wanted)
            sums = scores.exp_().sum(1, keepdim=True)
            total += (sums.log() - picked).sum()
            if back is not None:  # (softmax - onehot) W
                mean = (scores.to(weight.dtype) @ weight).float().div_(sums)
                back[at : at + rows] = mean - weight[wanted[:, 0]].float()
        ctx.back = back
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Scales what `forward` has computed."""
        back = ctx.back
        return (None if back is None else back * gradients[0].to(back.dtype)), None, None, None
