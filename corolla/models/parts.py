"""The parts of a model that are trained as they are: tensors of the base, and such that peft adds.

A row for each kind of trained parameters that corolla/models/dense.py can train. Estimates read
shapes from here: libraries that load models are imported where one is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corolla.config.run import RunConfig
from corolla.errors import ModelError
from corolla.models.anatomy import Anatomy, Shape
from corolla.models.sparse import places
from corolla.models.tokens import tables

if TYPE_CHECKING:
    from peft import IA3Config, PromptTuningConfig
    from torch import nn

    from corolla.models.pretrained import Base

Shapes = Callable[[Anatomy, RunConfig, int], Mapping[str, Shape]]
"""Shapes of the trained tensors by name, in a model with so many labels (0: it generates).
A classifier's head, which is trained with all kinds, is counted beside them."""


_NORM = re.compile(r"(^|\.)([^.]*norm[^.]*|ln(_[^.]*)?)\.(weight|bias)$", re.IGNORECASE)
"""Names of the tensors of normalisations: input_layernorm.weight, q_norm.weight, ln_1.bias, …"""


def _no_targets(base: Base, given: Sequence[str] | None) -> list[str]:
    """None: modules cannot be chosen."""
    return []


def _nothing(base: Base, targets: Sequence[str], virtual_tokens: int) -> None:
    """Nothing is added to the base."""


def _given(base: Base, given: Sequence[str] | None) -> list[str]:
    """The modules that are named."""
    return list(given or ())


@dataclass(frozen=True)
class Part:
    """The trained tensors of a model. All functions raise ModelError where there are none."""

    names: Callable[[Base], list[str]]
    """Parameters of the base model."""
    shapes: Shapes
    targets: Callable[[Base, Sequence[str] | None], list[str]] = _no_targets
    """Suffixes of the names of modules that get tensors of their own; given, or those that fit."""
    added: Callable[[Base, Sequence[str], int], IA3Config | PromptTuningConfig | None] = _nothing
    """The peft config for targets and a number of virtual tokens; None where peft adds nothing."""


def chosen(base: Base, role: str) -> dict[str, nn.Parameter]:
    """The parameters of the base model that are trained, by name. Raises ModelError."""
    named = dict(base.model.named_parameters())
    names = PARTS[role].names(base)
    odd = [name for name in names if not named[name].is_floating_point()]
    if odd:
        raise ModelError(f"parameters={role} needs a base that is not quantised: see {odd[0]}")
    return {name: named[name] for name in names}


def _names(base: Base) -> list[str]:
    return [name for name, _ in base.model.named_parameters()]


def _heads(base: Base) -> list[str]:
    """The head of a classifier and a new pooler, which are trained whatever else is."""
    from corolla.models.files.missing import within
    from corolla.models.pretrained import heads_of

    heads = heads_of(base)
    return [name for name in _names(base) if within(name, heads)]


def _biases(base: Base) -> list[str]:
    biases = [name for name in _names(base) if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise ModelError(
            f"parameters=bias: {base.name} has no bias vectors; use lora, ia3 or prompt"
        )
    return sorted({*_heads(base), *biases})


def _norms(base: Base) -> list[str]:
    """The weights and biases of all normalisations: of blocks, of queries and keys, and the last.

    A scale of what a normalisation gives, and a shift of it, are its own weight and bias.
    """
    norms = [name for name in _names(base) if _NORM.search(name)]
    if not norms:
        raise ModelError(
            f"parameters=norm: {base.name} has no normalisation with weights; use lora or ia3"
        )
    return sorted({*_heads(base), *norms})


def _output(base: Base) -> list[str]:
    """The output layer of a model that generates, the head of a classifier."""
    if heads := _heads(base):
        return heads
    output = base.model.get_output_embeddings()
    if output.weight is base.model.get_input_embeddings().weight:
        raise ModelError(
            f"parameters=head: the output layer of {base.name} is tied to its input "
            f"embeddings and cannot be trained alone; use lora, ia3, prompt or full"
        )
    own = {id(parameter) for parameter in output.parameters()}
    return [name for name, parameter in base.model.named_parameters() if id(parameter) in own]


def _embeddings(base: Base) -> list[str]:
    """The table of the embeddings of tokens, and a classifier's head; tied layers stay tied."""
    table = base.model.get_input_embeddings().weight
    own = [name for name, parameter in base.model.named_parameters() if parameter is table]
    return sorted({*_heads(base), *own})


def _no_tensors(base: Base) -> list[str]:
    """None, of a model that generates."""
    if _heads(base):
        raise ModelError(
            f"parameters=prompt is for models that generate: {base.name} is a classifier, which "
            f"reads its answer where virtual tokens would stand; use ia3, bias or head"
        )
    return []


def _scaled(base: Base, given: Sequence[str] | None) -> list[str]:
    """The modules that (IA)³ scales in a model of this architecture. Raises ModelError."""
    from peft.utils import constants

    if given:
        return list(given)
    kind = base.model.config.get_text_config().model_type
    known = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    if kind not in known:
        raise ModelError(
            f"parameters=ia3: which layers to scale in a {kind} model is not known; name them "
            f"with --set target-modules=[...]"
        )
    return list(known[kind])


def _ia3(base: Base, targets: Sequence[str], virtual_tokens: int) -> IA3Config:
    """Scales of the inputs of what peft knows as feed-forward, of the outputs of all others."""
    from peft import IA3Config, TaskType
    from peft.utils import constants
    from transformers.pytorch_utils import Conv1D

    from corolla.models import lora
    from corolla.models.files.missing import within
    from corolla.models.pretrained import heads_of

    shapes, heads = lora.targeted(base, targets), heads_of(base)
    kind = base.model.config.get_text_config().model_type
    known = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    return IA3Config(
        # A classifier's head is trained where it is: told of the task, peft would copy it.
        task_type=TaskType.CAUSAL_LM if base.task == "causal" else None,
        target_modules=list(targets),
        feedforward_modules=[target for target in targets if target in known],
        exclude_modules=[n for n, _ in base.model.named_modules() if within(n, heads)] or None,
        fan_in_fan_out=any(isinstance(base.model.get_submodule(n), Conv1D) for n in shapes),
    )


def _prompt(base: Base, targets: Sequence[str], virtual_tokens: int) -> PromptTuningConfig:
    from peft import PromptTuningConfig, TaskType

    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=virtual_tokens,
        token_dim=base.model.get_input_embeddings().embedding_dim,
    )


def _ia3_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    found = anatomy.linear(config.target_modules or ("k_proj", "v_proj", "down_proj"))
    sides = {n: s[1] if n.endswith("down_proj") else s[0] for n, s in found.items()}
    return {f"{name}.ia3": (side,) for name, side in sides.items()}


def _prompt_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    return {"prompt.weight": (config.virtual_tokens, anatomy.hidden)}


def _bias_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    return {n: s for n, s in anatomy.tensors.items() if n.endswith("bias")}


def _norm_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    return {n: s for n, s in anatomy.tensors.items() if _NORM.search(n)}


def _head_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    output = {n: s for n, s in anatomy.tensors.items() if n.startswith("lm_head")}
    return {} if labels else output


def _embeddings_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    return tables.of_input(anatomy.tensors, anatomy.name)


def _sparse_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    found = anatomy.linear(config.target_modules, config.layers)
    return {f"{n}.delta": (places.count(n, s, config.rank),) for n, s in found.items()}


def _full_shapes(anatomy: Anatomy, config: RunConfig, labels: int) -> Mapping[str, Shape]:
    return anatomy.tensors


PARTS = {
    "ia3": Part(_heads, _ia3_shapes, _scaled, _ia3),
    "prompt": Part(_no_tensors, _prompt_shapes, added=_prompt),
    "bias": Part(_biases, _bias_shapes),
    "norm": Part(_norms, _norm_shapes),
    "head": Part(_output, _head_shapes),
    "embeddings": Part(_embeddings, _embeddings_shapes),
    "full": Part(_names, _full_shapes),
    "sparse": Part(_heads, _sparse_shapes, _given),
}
"""Name of a kind → its part."""
