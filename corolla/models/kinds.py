"""The form of each kind of trained parameters: shapes by formula, and how the model is built.

Facts and defaults of a kind are in corolla/config/sections/kinds.py. Tensors that are trained as
they are have a row in corolla/models/parts.py, and need none here. Libraries that load models are
imported where one is built: estimates need none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corolla.config.build import build_strategy
from corolla.config.run import RunConfig
from corolla.models.anatomy import Anatomy, Shape
from corolla.models.experts import fused
from corolla.models.magnitudes import vectors
from corolla.models.parts import PARTS, Shapes
from corolla.models.patterns import Patterns
from corolla.models.tokens import tables

if TYPE_CHECKING:
    from corolla.models.dense import DenseModel
    from corolla.models.full import FullModel
    from corolla.models.lora import LoraModel
    from corolla.models.pretrained import Base
    from corolla.models.sparse_model import SparseModel


@dataclass(frozen=True)
class Form:
    """How a kind of trained parameters is counted, and built."""

    shapes: Shapes
    build: Callable[[RunConfig, Base], LoraModel | FullModel | DenseModel]
    """The resident model of a run. Raises ModelError when the base cannot carry it."""


def _lora_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    patterns = Patterns.of(config)
    linear = anatomy.adapter(config.lora, config.target_modules, config.layers, patterns)
    trained = tables.rows(anatomy.tensors, config.new_tokens, anatomy.name)
    experts = fused.adapter(anatomy.stacks(config.layers), config, anatomy.name)
    lengths = vectors.shapes(anatomy.linear(config.target_modules, config.layers))
    return {**linear, **(lengths if config.dora else {}), **experts, **trained}


def _lora(config: RunConfig, base: Base) -> LoraModel:
    from corolla.models.dora_model import DoraModel
    from corolla.models.lora import LoraModel
    from corolla.models.tokens import rows

    return (DoraModel if config.dora else LoraModel)(
        base,
        config.target_modules,
        config.dropout,
        config.layers,
        config.target_parameters or (),
        rows.ids(base.tokenizer, config.new_tokens, base.model),
        Patterns.of(config),
    )


def _dense(config: RunConfig, base: Base) -> DenseModel:
    from corolla.models.dense import DenseModel

    return DenseModel(base, config.parameters, config.target_modules, config.virtual_tokens)


def _full(config: RunConfig, base: Base) -> FullModel | DenseModel:
    from corolla.models.full import FullModel

    if build_strategy(config).full:
        return FullModel(base)  # moved in place: no second copy, no gradients
    return _dense(config, base)


def _sparse(config: RunConfig, base: Base) -> SparseModel:
    from corolla.models.sparse_model import SparseModel

    return SparseModel(base, config.rank, config.target_modules, config.layers, config.seed)


FORMS: Mapping[str, Form] = {
    **{name: Form(part.shapes, _dense) for name, part in PARTS.items()},
    "lora": Form(_lora_shapes, _lora),
    "full": Form(PARTS["full"].shapes, _full),
    "sparse": Form(PARTS["sparse"].shapes, _sparse),
}
"""Name of a kind → its form."""


def of(config: RunConfig) -> Form:
    """The form of what a run trains."""
    return FORMS[config.parameters]
