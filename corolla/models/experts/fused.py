"""Fused experts by formula: what transformers makes of a checkpoint, what adapters of them hold."""

import re
from collections.abc import Mapping
from math import prod

from corolla.config.run import RunConfig
from corolla.errors import ModelError
from corolla.tensors import factors

Shape = tuple[int, ...]

_EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_FUSED = {
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj"),
    **dict.fromkeys(("down_proj", "w2"), "down_proj"),
}
ROUTER = re.compile(r"\.(gate|router)\.weight$")
"""Names of the weights that choose experts: no linear layers beside fused experts."""
TURNED = {"gpt_oss"}
"""Families whose tensors are (experts, in, out)."""


def tensors(stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """The tensors of a model whose checkpoint has these, by name: weights of experts are fused."""
    found: dict[str, Shape] = {}
    for name, shape in stored.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        if not (expert := _EXPERT.match(name)):
            found[name] = shape
            continue
        fused = f"{expert[1]}.{_FUSED[expert[3]]}"
        halves = 2 if _FUSED[expert[3]] == "gate_up_proj" else 1
        experts = max(int(expert[2]) + 1, found.get(fused, (0,))[0])
        found[fused] = (experts, halves * shape[0], shape[1])
    return found


def targeted(
    stacks: Mapping[str, Shape], config: RunConfig, model: str
) -> dict[str, tuple[int, int, int]]:
    """(experts, out, in) of the tensors that `target_parameters` means, of these of a model.

    Raises ModelError for a target that matches none.
    """
    found: dict[str, tuple[int, int, int]] = {}
    for target in config.target_parameters or ():
        meant = [name for name in stacks if name == target or name.endswith("." + target)]
        if not meant:
            raise ModelError(f"target parameters {target} match nothing in {model}")
        found |= {name: (stacks[name][0], stacks[name][1], stacks[name][2]) for name in meant}
    return found


def adapter(stacks: Mapping[str, Shape], config: RunConfig, model: str) -> dict[str, Shape]:
    """Shapes of the factors of all experts. Raises ModelError for a rank that is too large."""
    rank, shapes = config.lora.rank, dict[str, Shape]()
    for name, (experts, out, into) in targeted(stacks, config, model).items():
        if rank > min(out, into):
            raise ModelError(f"rank {rank} is larger than the experts of {name} ({out} x {into})")
        for expert in range(experts):
            shapes[f"{name}.{expert}{factors.A}"] = (rank, into)
            shapes[f"{name}.{expert}{factors.B}"] = (out, rank)
    return shapes


def adapted(stacks: Mapping[str, Shape], config: RunConfig, model: str) -> tuple[int, int]:
    """Values of the experts that have adapters: of all, and of the largest tensor.

    Their weights with the adapters added are kept from a forward pass to the backward pass.
    """
    each = [prod(shape) for shape in targeted(stacks, config, model).values()]
    return sum(each), max(each, default=0)


def used(stacks: Mapping[str, Shape], each: int) -> int:
    """Values of the experts that a token goes through, `each` of every tensor."""
    return sum(min(each, shape[0]) * prod(shape[1:]) for shape in stacks.values())
