"""A linear layer with LoRA in as few passes over its activations as there are products.

y = x Wᵀ + s (x Aᵀ) Bᵀ (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
arXiv 2106.09685, equation 3). peft makes the second term in a tensor of its own, scales it in a
second and adds it in a third. Here it is added by the product itself, into the base's result, and
every product has the rank, its small side, in the rows: on a CPU, (out, n) by (n, r) takes ten
times as long as the same numbers as (r, n) by (n, out).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

Block = tuple[Tensor, Tensor] | None
"""The factors A (r, in) and B (out, r) of a frozen block, at scaling 1; None without any."""

_CARRIED = ("Linear", "Linear4bit", "Linear8bitLt")
"""Classes of peft for LoRA on a linear layer: of torch or Conv1D, and quantised ones."""

_WORTH = 1 << 14
"""Values of an input from which gradients of our own save more than calls to Python cost."""


class LowRank:
    """The forward pass of one of peft's LoRA layers, with a frozen block beside it.

    peft's own pass stands in where adapters are switched off or merged, or another one is active,
    under autocast, where torch compiles or exports, and where hooks on the factors are to see what
    goes through them, as those that tell the gradients of examples apart.
    """

    def __init__(self, layer: Any, name: str, block: Callable[[], Block]) -> None:
        self._layer, self._peft, self._block = layer, layer.forward, block
        self._name = name
        self._a, self._b = layer.lora_A[name], layer.lora_B[name]
        self._dropout = layer.lora_dropout[name]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._free:
            return self.beside(x, self._peft(x, *args, **kwargs))
        a, b, scaling = self._a.weight, self._b.weight, self._layer.scaling[self._name]
        rows, block = x.reshape(-1, x.shape[-1]), self._block()
        result = _result(self._layer.base_layer, rows)
        if self._dropout.training and type(self._dropout) is not nn.Identity:
            if block is not None:  # it is no part of the adapter: nothing of it is dropped
                result, block = _added(result, rows, *block, 1.0, None), None
            rows = self._dropout(rows.to(a.dtype))
        result = _added(result, rows, a, b, scaling, block)
        return result.view(*x.shape[:-1], result.shape[-1])

    @property
    def _free(self) -> bool:
        """True where nothing but the result of the layer is to be seen of its pass."""
        layer, a, b = self._layer, self._a, self._b
        hooked = (
            a._forward_hooks or a._forward_pre_hooks or b._forward_hooks or b._forward_pre_hooks
        )
        if hooked or layer._disable_adapters or layer.merged_adapters:
            return False
        if layer.active_adapters != [self._name]:
            return False
        if torch.compiler.is_compiling():  # which fuses on its own, and exports peft's operators
            return False
        return not torch.is_autocast_enabled(a.weight.device.type)

    def beside(self, x: Tensor, output: Tensor) -> Tensor:
        """Returns what peft computed, with x Aᵀ Bᵀ of the frozen block."""
        block = self._block()
        if block is None:
            return output
        a, b = block
        return output + F.linear(F.linear(x.to(a.dtype), a), b).to(output.dtype)


def install(layers: Mapping[str, Any], name: str, block: Callable[[str], Block]) -> None:
    """Puts our forward pass in the place of peft's in layers, for their adapter of this name.

    A layer with a variant of LoRA (DoRA and its like), with biases in it, or with more than one
    adapter keeps peft's pass, as one that is not of a linear layer does; a block is added to it.
    `block` is asked by a layer's name in each pass.
    """
    for key, layer in layers.items():
        own = LowRank(layer, name, partial(block, key))
        if _carried(layer, name):
            layer.forward = own
        else:
            layer.register_forward_hook(partial(_after, own))


def _carried(layer: Any, name: str) -> bool:
    kind = type(layer)
    plain = kind.__name__ in _CARRIED and kind.__module__.startswith("peft.tuners.lora")
    return plain and not layer.lora_variant and not layer.lora_bias[name] and len(layer.lora_A) == 1


def _after(own: LowRank, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return own.beside(inputs[0], output)


def _result(base: Any, rows: Tensor) -> Tensor:
    """The base's result (n, out) of rows (n, in), in memory that nobody else reads."""
    if not (base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)):
        if type(base) is nn.Linear:
            return F.linear(rows, base.weight, base.bias)
        if type(base) is Conv1D:
            return torch.addmm(base.bias, rows, base.weight)
    found: Tensor = base(rows)
    return found.clone()


def _added(
    result: Tensor, rows: Tensor, a: Tensor, b: Tensor, scaling: float, block: Block
) -> Tensor:
    """`result` (n, out) with s · rows Aᵀ Bᵀ and the product of a block, in the same memory."""
    if torch.is_grad_enabled() and rows.numel() >= _WORTH:
        found: Tensor = _Update.apply(result, rows, a, b, scaling, block)  # type: ignore[no-untyped-call]
        return found
    _add(result, rows, *_stacked(a, b, scaling, block))
    return result


def _stacked(a: Tensor, b: Tensor, scaling: float, block: Block) -> tuple[Tensor, Tensor, float]:
    """(A, B, scaling) of the adapter and a block as one."""
    if block is None:
        return a, b, scaling
    return torch.cat([a, block[0]]), torch.cat([b * scaling, block[1]], dim=1), 1.0


def _add(result: Tensor, rows: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Adds s · rows Aᵀ Bᵀ to `result` (n, out); the inner product A rowsᵀ (r, n) is returned."""
    inner = a @ rows.to(a.dtype).t()
    if result.dtype == a.dtype:
        result.addmm_(inner.t(), b.t(), alpha=scaling)
    else:  # of a base in half precision: rounded once, with what it is added to
        result.add_((inner.t() @ b.t()).mul_(scaling))
    return inner


class _Update(torch.autograd.Function):
    """`_add`, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        rows: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        block: Block,
    ) -> Tensor:
        """Changes `result` (n, out) in place."""
        whole_a, whole_b, ctx.scaling = _stacked(a, b, scaling, block)
        inner = _add(result, rows, whole_a, whole_b, ctx.scaling)
        ctx.own, ctx.rank = scaling, len(a)
        ctx.save_for_backward(rows, inner, whole_a, whole_b)
        ctx.mark_dirty(result)
        return result

    @staticmethod
    @once_differentiable  # `inner` is saved without what it depends on
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients of result, rows, A and B; of what is not asked for None."""
        (gradient,) = gradients
        rows, inner, a, b = ctx.saved_tensors
        _, of_rows, of_a, of_b, *_ = ctx.needs_input_grad
        g = gradient.to(a.dtype)
        gx = ga = gb = None
        if of_rows or of_a:
            back = (b.t() @ g.t()) * ctx.scaling
            gx = (back.t() @ a).to(rows.dtype) if of_rows else None
            ga = back[: ctx.rank] @ rows.to(a.dtype) if of_a else None
        if of_b:
            gb = ((inner[: ctx.rank] @ g) * ctx.own).t()
        return gradient, gx, ga, gb, None, None
