"""LoRA on fused experts: each expert of a tensor is a module of its own to strategies.

A tensor of three dimensions holds the weights of all experts of a layer. peft adapts it
(`target_parameters`, its ParamWrapper) with factors that hold all experts as well: A, of shape
(experts · r, in), expert by expert, and B (out, r · experts), rank by rank. Their product means
nothing, so a truncation of it would be wrong. Here the factors of expert e of a tensor `<name>` are
`<name>.<e>.lora_A` (r, in) and `<name>.<e>.lora_B` (out, r), an adapter as that of a linear layer:
what is derived for these holds for each expert. peft computes with them, and its files hold them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from corolla.errors import ModelError
from corolla.tensors import factors
from corolla.types import Params

Block = Callable[[str], tuple[Tensor, Tensor] | None]
"""Name of an expert → the factors A (rank, in) and B (out, rank) of a block beside its own."""


@dataclass(frozen=True)
class Place:
    """The factors of a tensor of experts in peft's files."""

    path: str
    """The name before `.lora_A` and `.lora_B`."""
    experts: int


Kept = Callable[[Collection[str]], Sequence[str]]
"""Names of tensors → those of the blocks that get adapters."""


def stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that have the weights of several experts, by name: not those of convolutions."""
    return {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.shape[0] > 1 and parameter.is_floating_point()
    }


def free(model: PreTrainedModel, given: Sequence[str] | None, linear: Sequence[str]) -> list[str]:
    """The target modules that are given, or those of all linear layers that peft knows as such.

    In a model whose experts it knows under the names that they had before they were fused, peft
    takes linear layers of these names (those of a dense block, say) for experts. Raises ModelError
    for a target of such a name.
    """
    wanted = list(given or linear)
    if not stacks(model):
        return wanted
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=sorted({*wanted, *linear}))
    convert_peft_config_for_transformers(config, model, None)
    taken = [target for target in wanted if target not in set(config.target_modules)]
    if given and taken:
        raise ModelError(
            f"target modules {', '.join(taken)} are names of experts to peft in a "
            f"{model.config.model_type} model: use target_parameters for its fused experts"
        )
    return [target for target in wanted if target not in taken]


class ExpertLayer:
    """The factors of one expert, with the attributes that peft's layers have."""

    def __init__(self, stack: ParamWrapper, name: str) -> None:
        self.lora_A = {name: _Factor()}
        self.lora_B = {name: _Factor()}
        self.r, self.scaling = stack.r, stack.scaling


class _Factor(nn.Module):
    """A factor of one expert; whoever writes a model sets its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class _Gathered(nn.Module):
    """All factors A, or all B, of a tensor, in the form that peft computes with.

    Blocks beside the adapter are of scaling 1: they stand below and right of its own factors, with
    its scaling taken out, and are multiplied as these are.
    """

    def __init__(self, own: Sequence[_Factor], blocks: Callable[[], list[Tensor]], b: bool) -> None:
        super().__init__()
        self.own = nn.ModuleList(own)
        self._blocks, self._b = blocks, b

    @property
    def weight(self) -> Tensor:
        """A (experts · rank, in), or B (out, rank · experts)."""
        each: list[Tensor] = [factor.weight for factor in self.own]  # type: ignore[misc]
        if beside := self._blocks():
            pairs = zip(each, beside, strict=True)
            each = [torch.cat(pair, dim=1 if self._b else 0) for pair in pairs]
        return torch.stack(each, dim=2).flatten(1) if self._b else torch.cat(each)


class Experts:
    """The fused experts of a model that get adapters; inert without any targets."""

    def __init__(self, model: nn.Module, targets: Sequence[str], kept: Kept) -> None:
        """`targets` are names of tensors, or the last parts of them; `kept` those of some blocks.

        Raises ModelError for a target that matches none.
        """
        known = stacks(model) if targets else {}
        meant = set(_all(known, targets))
        names = [name for name in (kept(known) if known else ()) if name in meant]
        if idle := [t for t in targets if not any(_matches(name, t) for name in names)]:
            ends = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in known})[:12])
            has = f"its fused experts are {ends}" if known else "it has no fused experts"
            raise ModelError(f"target parameters {', '.join(idle)} match nothing: {has}")
        # In all blocks as they are given: peft chooses blocks among modules alone.
        self.targets = list(targets) if len(names) == len(meant) else names
        self.shapes: dict[str, tuple[int, int]] = {}
        """(out, in) of each expert, by its name."""
        for name in names:
            experts, rows, columns = known[name].shape
            module = model.get_submodule(name.rpartition(".")[0])
            turned = getattr(module, "is_transposed", False)  # as peft asks
            shape = (columns, rows) if turned else (rows, columns)
            self.shapes |= {f"{name}.{expert}": shape for expert in range(experts)}
        self._places: dict[str, Place] = {}

    def install(self, wrapped: nn.Module, name: str, block: Block) -> dict[str, ExpertLayer]:
        """Puts factors of single experts in the place of peft's, for its adapter of this name.

        Returns the layers of all experts. `block` is asked in each pass.
        """
        found: dict[str, ExpertLayer] = {}
        for path, stack in list(wrapped.named_modules()):
            if not isinstance(stack, ParamWrapper):
                continue
            own = f"{path.replace('.base_layer', '')}.{stack.parameter_name}"
            self._places[own] = Place(path, stack.num_experts)
            layers = {f"{own}.{e}": ExpertLayer(stack, name) for e in range(stack.num_experts)}
            a, b = _beside(list(layers), stack, name, block)
            stack.lora_A[name] = _Gathered([e.lora_A[name] for e in layers.values()], a, False)
            stack.lora_B[name] = _Gathered([e.lora_B[name] for e in layers.values()], b, True)
            found |= layers
        return found

    def packed(self, params: Params) -> Params:
        """Factors as peft's files have them, of experts that have all one rank."""
        found = dict(params)
        for name, place in self._places.items():
            experts = range(place.experts if f"{name}.0{factors.A}" in found else 0)
            a = [found.pop(f"{name}.{e}{factors.A}") for e in experts]
            b = [found.pop(f"{name}.{e}{factors.B}") for e in experts]
            if a:
                found[place.path + factors.A] = torch.cat(a)
                found[place.path + factors.B] = torch.stack(b, dim=2).flatten(1)
        return found

    def unpacked(self, params: Params) -> Params:
        """Factors of single experts from those of peft's files: the inverse of `packed`."""
        found = dict(params)
        for name, place in self._places.items():
            a, b = found.pop(place.path + factors.A), found.pop(place.path + factors.B)
            each = b.reshape(len(b), -1, place.experts)
            for expert, own in enumerate(a.chunk(place.experts)):
                found[f"{name}.{expert}{factors.A}"] = own.contiguous()
                found[f"{name}.{expert}{factors.B}"] = each[:, :, expert].contiguous()
        return found


def _beside(
    experts: Sequence[str], stack: ParamWrapper, name: str, block: Block
) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    """The factors A and B of blocks of all experts, empty without any, when they are called."""

    def found() -> list[tuple[Tensor, Tensor]]:
        return [own for expert in experts if (own := block(expert))]

    return (
        lambda: [a / stack.scaling[name] for a, _ in found()],
        lambda: [b for _, b in found()],
    )


def _all(known: Mapping[str, nn.Parameter], targets: Sequence[str]) -> list[str]:
    """The tensors of all blocks that targets mean."""
    return [name for name in known if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    """Returns whether a target means a tensor, by its full name or the last parts of it."""
    return name == target or name.endswith("." + target)
