"""LoRA adapters on a base model, by peft; read, write and save adapters.

Module names are those of the base model; tensors are `<module>.lora_A`, `<module>.lora_B` and
`<module>.<parameter>` for a trained head.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from corolla.directions import moving
from corolla.directions.space import Beside, Space, Unrounded
from corolla.errors import ModelError
from corolla.models import devices, layers
from corolla.models.experts.stacks import Experts, free
from corolla.models.files.adapter_files import (
    PREFIX,
    _inputs_in_fp32,
    adapter_hash,
    peft_speaks_to_transformers,
    portable,
    read_adapter,
    write_adapter,
)
from corolla.models.files.missing import within
from corolla.models.patterns import Patterns, means
from corolla.models.pretrained import Base, heads_of
from corolla.models.products import low_rank
from corolla.models.tokens import rows
from corolla.tensors import factors
from corolla.types import Adapter, LoraSpec, Move, Params

_NAME = "default"


class LoraModel(Unrounded):
    """One resident base model with one adapter of any rank, and frozen low-rank blocks beside it.

    `write` sets every trainable tensor, every buffer and the blocks, so nothing of the client
    before survives. Rank and scaling may change from call to call: memory is the base model
    once, whatever the number of clients.
    """

    artefact = "adapter"
    """The name of the folder of a saved global model."""
    dora: ClassVar[bool] = False
    """True where modules have magnitudes beside their factors."""

    def __init__(
        self,
        base: Base,
        targets: Sequence[str] | None = None,
        dropout: float = 0.0,
        blocks: str | None = None,
        experts: Sequence[str] = (),
        tokens: Sequence[int] = (),
        patterns: Patterns | None = None,
    ) -> None:
        """Adapters on `targets` (suffixes of module names; None: all linear layers but the output).

        `blocks`: in which blocks, as the key `layers` has them; None: in all. `experts`: tensors
        of fused experts that get adapters as well. `tokens`: ids whose rows are trained beside
        them. `patterns`: modules with a rank or a scaling of their own. Raises ModelError when
        targets or patterns match no linear layer, or no tensor, and for a block that there is not.
        """
        self.base, heads = base, heads_of(base)
        self._head_dtype = base.model.dtype
        self.targets = free(base.model, targets, _linear_suffixes(base.model, heads))
        self._experts = Experts(base.model, experts, partial(layers.kept, text=blocks))
        self.shapes = targeted(base, self.targets, blocks)
        self._patterns = patterns or Patterns()
        self._patterns.check(self.shapes, base.name)
        conv1d = any(isinstance(base.model.get_submodule(n), Conv1D) for n in self.shapes)
        self._config = LoraConfig(
            task_type=TaskType.SEQ_CLS if base.task == "classify" else TaskType.CAUSAL_LM,
            r=1,
            lora_alpha=1,
            lora_dropout=dropout,
            target_modules=self.targets,
            target_parameters=self._experts.targets or None,
            layers_to_transform=layers.chosen(_names(base, heads), blocks) if blocks else None,
            trainable_token_indices=rows.indices(base.model, tokens),
            modules_to_save=heads or None,
            exclude_modules=heads or None,
            fan_in_fan_out=conv1d,
            use_dora=self.dora,
        )
        # peft draws its own start from torch's global state; `write` replaces it before any use.
        with torch.random.fork_rng(devices=[]), peft_speaks_to_transformers():
            self.model = get_peft_model(base.model, self._config, adapter_name=_NAME)
        self.model.eval()  # peft adds its dropout layers in training mode
        self.device = next(self.model.parameters()).device
        wrapped = self.model.base_model.model
        self._layers: dict[str, Any] = {n: m for n, m in wrapped.named_modules() if _is_layer(m)}
        self._heads, self._rows = _heads(wrapped), self._beside_factors(wrapped)
        self._hooks: list[RemovableHandle] = []
        for head in self._heads.values():
            head.float()  # trained and averaged in fp32 whatever the base is
            self._hooks.append(head.register_forward_pre_hook(_inputs_in_fp32))
        self._buffers = {n: b.detach().clone() for n, b in self.model.named_buffers()}
        self._start_head = {n: p.detach().clone() for n, p in self._head_parameters()}
        self._frozen: dict[str, tuple[Tensor, Tensor]] = {}
        self._flat = torch.empty(0)
        self._settle = moving.Settled()
        low_rank.install(self._layers, _NAME, lambda name: self._frozen.get(name))
        self._layers |= self._experts.install(wrapped, _NAME, lambda name: self._frozen.get(name))
        self.shapes |= self._experts.shapes
        self.model.requires_grad_(False)

    def check_rank(self, spec: LoraSpec) -> None:
        """Raises ModelError for a rank larger than a module can have."""
        self._patterns.check_ranks(self.shapes, spec)

    def init(self, spec: LoraSpec, seed: int) -> Params:
        """A fresh adapter: factors as factors.fresh makes them, a head as it is."""
        params = self._patterns.fresh(self.shapes, spec, seed)
        return params | {name: tensor.cpu().clone() for name, tensor in self._start_head.items()}

    def write(self, params: Params, spec: LoraSpec, frozen: Sequence[Params] = ()) -> None:
        """Set factors, scaling, head, buffers and frozen blocks; nothing is left as it was.

        Raises ValueError when a tensor is missing, unknown or of a wrong shape.
        """
        expected = {n + role for n in self._layers for role in (factors.A, factors.B)}
        expected |= self._start_head.keys()
        if params.keys() != expected:
            odd = sorted(params.keys() ^ expected)
            raise ValueError(
                f"adapter differs from the model in {len(odd)} tensors, first {odd[0]!r}"
            )
        self._patterns.check_shapes(params, self.shapes, spec)
        for name, parameter in self._head_parameters():
            if parameter.shape != params[name].shape:
                raise ValueError(f"head tensor {name} has shape {tuple(params[name].shape)}")
        flat, layout = moving.flatten(params)
        # One vector for all of them: a zeroth-order step is one pass over it.
        self._flat = flat.to(self.device)
        views = moving.unflatten(self._flat, layout)
        for name, layer in self._layers.items():
            for factor, role in ((layer.lora_A, factors.A), (layer.lora_B, factors.B)):
                factor[_NAME].weight = nn.Parameter(views[name + role], requires_grad=False)
            own = self._patterns.spec(name, spec)
            layer.r[_NAME], layer.scaling[_NAME] = own.rank, own.scaling
        for name, parameter in self._head_parameters():
            parameter.data = views[name]
            parameter.requires_grad_(False)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self._buffers[name])
        self._frozen = _placed(frozen, self.device)

    def show(self, adapter: Adapter, spec: LoraSpec) -> None:
        """Write a global model; factors it does not have are a zero update."""
        zero = (
            self.init(spec, 0) if adapter.trained.keys() != dict(self.parameters()).keys() else {}
        )
        start = {**zero, **adapter.trained}
        self.write(self._settle(start, adapter.moves), spec, _blocks(adapter, spec))

    def enter(self, start: Params, spec: LoraSpec, moves: Sequence[Move]) -> Space:
        """Write `start` after `moves`; the space of the trainable tensors, standing there."""
        self.write(self._settle(start, moves), spec)
        return Beside(self._flat)

    def read(self) -> Params:
        """A copy of all trainable tensors, on the CPU."""
        return {n: p.detach().cpu().clone() for n, p in self.parameters()}

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All trainable tensors by name, in the order of names."""
        pairs = dict(self._head_parameters())
        for name, layer in self._layers.items():
            pairs[name + factors.A] = layer.lora_A[_NAME].weight
            pairs[name + factors.B] = layer.lora_B[_NAME].weight
        return iter(sorted(pairs.items()))

    @property
    def frozen(self) -> tuple[Params, ...]:
        """The frozen blocks in use, as one stack; empty without any."""
        stacked = {n + factors.A: a.cpu() for n, (a, _) in self._frozen.items()}
        stacked |= {n + factors.B: b.cpu() for n, (_, b) in self._frozen.items()}
        return (stacked,) if stacked else ()

    def deltas(self) -> Params:
        """The effective update of every module, relative to the base model, dense, in fp64.

        (out, in) for every layer type, from the factors and scaling that peft computes with, plus
        the frozen blocks; a head by parameter. For checks and tests.
        """
        dense: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            own = layer.lora_B[_NAME].weight.double() @ layer.lora_A[_NAME].weight.double()
            dense[name] = own * layer.scaling[_NAME]
            if name in self._frozen:
                a, b = self._frozen[name]
                dense[name] = dense[name] + b.double() @ a.double()
        for name, parameter in self._head_parameters():
            dense[name] = parameter.double() - self._start_head[name].double()
        return {name: tensor.detach().cpu() for name, tensor in dense.items()}

    def save(self, folder: Path, adapter: Adapter, spec: LoraSpec) -> None:
        """Write a global model as a PEFT adapter folder that `PeftModel.from_pretrained` loads.

        With frozen blocks, and with modules of ranks or scalings of their own, everything is
        stacked into one adapter of one rank and scaling 1 (smaller modules padded with zeros, so
        that tools without per-module ranks read it right); a stack beyond the full rank is
        compacted first, which loses nothing.
        """
        trained = self._settle(adapter.trained, adapter.moves)
        blocks = _blocks(adapter, spec)
        zero = self.init(spec, 0)  # for what the global model does not have
        heads = factors.select({**zero, **trained}, factors.is_head)
        own = factors.select(trained, factors.is_a, factors.is_b)
        if own or not blocks:
            own = {**factors.select(zero, factors.is_a, factors.is_b), **own}
        rank, alpha = spec.rank, spec.scaling * spec.rank if spec.rslora else spec.alpha
        if blocks or self._patterns:
            own = _stacked([*blocks, *([self._patterns.baked(own, spec)] if own else [])])
            rank = factors.rank(own)
            alpha = float(rank)
        tensors = {
            PREFIX + name + (".weight" if not factors.is_head(name) else ""): tensor
            for name, tensor in {**self._experts.packed(own), **heads}.items()
        }
        config = LoraConfig(
            **{
                **self._config.to_dict(),
                "r": rank,
                "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
                "use_rslora": False,  # not every server knows it: alpha / r is the same number
                "inference_mode": True,
                "base_model_name_or_path": portable(self.base.name, folder),
            }
        )
        write_adapter(folder, config, tensors)

    def detach(self) -> PreTrainedModel:
        """The plain base model, without adapter and hooks; this object is of no use afterwards."""
        for hook in self._hooks:
            hook.remove()
        plain: PreTrainedModel = self.model.unload()
        for module in self._heads:  # peft would leave the trained head in place
            for name, parameter in plain.get_submodule(module).named_parameters():
                tensor = self._start_head[f"{module}.{name}"]
                parameter.data = tensor.to(self._head_dtype, copy=True)
        return plain

    def distance_to(self, folder: Path, spec: LoraSpec) -> float:
        """How far a saved adapter is from the update in use: relative, in fp64.

        Infinite when a head differs in a bit.
        """
        own = self.read()
        update = self._patterns.baked(factors.select(own, factors.is_a, factors.is_b), spec)
        stored, heads = read_adapter(folder)
        if any(not torch.equal(own[name], heads[name]) for name in heads):
            return math.inf
        return factors.distance(
            factors.stack([update, *self.frozen]), self._experts.unpacked(stored)
        )

    def release(self) -> None:
        """Free the memory of all weights. Ends this object."""
        devices.free(self.model)

    def digest(self, folder: Path) -> str:
        """sha256 of the tensors of a saved adapter."""
        return adapter_hash(folder)

    def _beside_factors(self, wrapped: nn.Module) -> dict[str, nn.Parameter]:
        """Tensors that are trained beside the factors and a head, by name."""
        return rows.trained(wrapped, _NAME)

    def _head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for module, head in self._heads.items():
            for name, parameter in head.named_parameters():
                yield f"{module}.{name}", parameter
        yield from self._rows.items()


def _placed(blocks: Sequence[Params], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors A and B of all blocks as one, by module."""
    stacked = factors.stack(list(blocks)) if blocks else {}
    return {
        name: (stacked[name + factors.A].to(device), stacked[name + factors.B].to(device))
        for name in factors.modules(stacked)
    }


def _heads(wrapped: nn.Module) -> dict[str, nn.Module]:
    """The modules that peft trains as they are, by name."""
    return {
        name: module.modules_to_save[_NAME]
        for name, module in wrapped.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)


def _blocks(adapter: Adapter, spec: LoraSpec) -> tuple[Params, ...]:
    """All blocks of a global model, at scaling 1."""
    return (*adapter.frozen, *(factors.bake(r, spec.scaling) for r in adapter.residuals))


def _stacked(parts: Sequence[Params]) -> Params:
    """One adapter that does what all parts do, at scaling 1, every module of the same rank."""
    stacked = factors.stack(parts)
    if factors.rank(stacked) > factors.full_rank(stacked):
        stacked, _ = factors.compact(stacked)
    return factors.pad(stacked, factors.rank(stacked))


def targeted(
    base: Base, targets: Sequence[str], blocks: str | None = None
) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers that are meant by `targets`, in these blocks, by name.

    Raises ModelError for a target that matches none, and for a block that there is not.
    """
    heads = heads_of(base)
    within_blocks = layers.kept(_names(base, heads), blocks)
    shapes = _shapes(base.model, targets, heads)
    shapes = {name: shapes[name] for name in within_blocks if name in shapes}
    idle = [t for t in targets if not any(means(t, name) for name in shapes)]
    if idle:
        known = ", ".join(_linear_suffixes(base.model, heads)[:12])
        raise ModelError(
            f"target modules {', '.join(idle)} match nothing in {base.name}: "
            f"its linear layers are {known}"
        )
    return shapes


def _linear(model: PreTrainedModel, heads: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear | Conv1D) or "Linear" in type(module).__name__
        if is_linear and module is not output and not within(name, heads):
            yield name, module


def _names(base: Base, heads: Sequence[str]) -> list[str]:
    return [name for name, _ in _linear(base.model, heads)]


def linear_suffixes(base: Base) -> list[str]:
    """Suffixes of the names of all linear layers of a base, but its output."""
    return _linear_suffixes(base.model, heads_of(base))


def _linear_suffixes(model: PreTrainedModel, heads: Sequence[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, _ in _linear(model, heads)})


def _shapes(
    model: PreTrainedModel, targets: Sequence[str], heads: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """(out, in) of every targeted module; Conv1D keeps its weight as (in, out)."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in _linear(model, heads):
        if any(means(target, name) for target in targets):
            if isinstance(module, Conv1D):
                found[name] = (module.weight.shape[1], module.weight.shape[0])
            else:
                found[name] = (int(module.out_features), int(module.in_features))  # type: ignore
    return found
