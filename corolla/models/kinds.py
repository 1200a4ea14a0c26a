"""What each kind of trained parameters is in a model: shapes by formula, and the model itself.

Facts and defaults of a kind are in corolla/config/kinds.py. Libraries that load models are imported
by who builds one: estimates need none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.models.anatomy import Anatomy, Shape

if TYPE_CHECKING:
    from corolla.models.dense import DenseModel
    from corolla.models.full import FullModel
    from corolla.models.lora import LoraModel
    from corolla.models.pretrained import Base


@dataclass(frozen=True)
class Form:
    """How a kind of trained parameters is counted, and built."""

    shapes: Callable[[Anatomy, RunConfig, int], Mapping[str, Shape]]
    """Shapes of the trained tensors by name, in a model with so many labels (0: it generates).
    A classifier's head, which is trained with all kinds, is counted beside them."""
    build: Callable[[RunConfig, Base], LoraModel | FullModel | DenseModel]
    """The resident model of a run. Raises ModelError when the base cannot carry it."""


def _lora_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    return anatomy.adapter(config.lora, config.target_modules)


def _ia3_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    found = anatomy.linear(config.target_modules or ("k_proj", "v_proj", "down_proj"))
    sides = {n: s[1] if n.endswith("down_proj") else s[0] for n, s in found.items()}
    return {f"{name}.ia3": (side,) for name, side in sides.items()}


def _prompt_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    return {"prompt.weight": (config.virtual_tokens, anatomy.hidden)}


def _bias_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    return {n: s for n, s in anatomy.tensors.items() if n.endswith("bias")}


def _head_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    output = {n: s for n, s in anatomy.tensors.items() if n.startswith("lm_head")}
    return {} if labels else output


def _full_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    return anatomy.tensors


def _lora(config: RunConfig, base: Base) -> LoraModel:
    from corolla.models.lora import LoraModel

    return LoraModel(base, config.target_modules, config.dropout)


def _dense(config: RunConfig, base: Base) -> DenseModel:
    from corolla.models.dense import DenseModel

    return DenseModel(base, config.parameters, config.target_modules, config.virtual_tokens)


def _full(config: RunConfig, base: Base) -> FullModel | DenseModel:
    from corolla.models.full import FullModel

    if build_strategy(config).full:
        return FullModel(base)  # moved in place: no second copy, no gradients
    return _dense(config, base)


FORMS: Mapping[str, Form] = {
    "lora": Form(_lora_shapes, _lora),
    "ia3": Form(_ia3_shapes, _dense),
    "prompt": Form(_prompt_shapes, _dense),
    "bias": Form(_bias_shapes, _dense),
    "head": Form(_head_shapes, _dense),
    "full": Form(_full_shapes, _full),
}
"""Name of a kind → its form. Those with `_dense` have their tensors in corolla/models/parts.py."""


def of(config: RunConfig) -> Form:
    """The form of what a run trains."""
    return FORMS[config.parameters]
