"""A chosen set of tensors of a model, trained and averaged as they are: no factors, no ranks.

What FedPEFT (Sun et al., "Conquering the Communication Constraints to Enable Large Pre-Trained
Models in Federated Learning", arXiv 2210.01708) calls the choice of what travels:

bias     all bias vectors (BitFit: Ben Zaken et al., ACL 2022, arXiv 2106.10199)
sparse   values at places of weight matrices (corolla/models/sparse)
norm     all weights and biases of normalisations (Zhao et al., "Tuning LayerNorm in Attention",
         ICLR 2024, arXiv 2312.11420)
ia3      vectors that scale keys, values and feed-forward activations ((IA)³: Liu et al., NeurIPS
         2022, arXiv 2205.05638)
prompt   embeddings of virtual tokens before the text (Lester et al., EMNLP 2021, arXiv 2104.08691)
head     the output layer, or the head of a classifier
embeddings  the table of the embeddings of tokens, and with it an output layer that is tied to it
full     all parameters

A classifier's head is trained with each of them. Tensors keep their names in the base model; new
ones are `<module>.ia3` and `prompt.weight`. Behind a prompt the first token of a text is no target
either (it is one to peft): losses are those of the same tokens whatever is trained.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from peft.tuners.ia3 import IA3Layer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from corolla import seeds
from corolla.config.sections.kinds import KINDS, KindName
from corolla.directions import moving
from corolla.directions.space import Beside, Space, Unrounded
from corolla.models import devices, full, parts
from corolla.models.files import adapter_files
from corolla.models.pretrained import Base, heads_of
from corolla.types import Adapter, LoraSpec, Move, Params
from corolla.wire import codec

_NAME = "default"
_IA3, _PROMPT = ".ia3", "prompt.weight"


class DenseModel(Unrounded):
    """One resident model of which the tensors of one role are trained.

    They are views of one flat fp32 vector; a model in half precision computes with roundings of
    it. `write` sets all of them and every buffer, so nothing of the client before survives.
    """

    frozen: tuple[Params, ...] = ()

    def __init__(
        self,
        base: Base,
        role: KindName,
        targets: Sequence[str] | None = None,
        virtual_tokens: int = 20,
    ) -> None:
        """`targets` (ia3): suffixes of module names; None: what peft scales in such a model.

        Raises ModelError for a model that has no such tensors, or not apart from others.
        """
        self.base = base
        self.model: Any = base.model
        self.device, self._dtype = base.model.device, base.model.dtype
        self._leaves = {n: _leaf(base.model, p) for n, p in parts.chosen(base, role).items()}
        self._start = {n: leaf.detach().cpu().clone() for n, leaf in self._leaves.items()}
        part = parts.PARTS[role]
        self.targets = part.targets(base, targets)
        self._config = part.added(base, self.targets, virtual_tokens)
        self.artefact: str = KINDS[role].artefact
        if self._config:
            with torch.random.fork_rng(devices=[]), adapter_files.peft_speaks_to_transformers():
                model = get_peft_model(base.model, self._config, adapter_name=_NAME)
            self.model = adapter_files.quiet(model)
        self._leaves |= self._added()
        self.model.eval().requires_grad_(False)
        self._leaves = dict(sorted(self._leaves.items()))
        self._buffers = {n: b.detach().clone() for n, b in self.model.named_buffers()}
        sizes = [leaf.numel() for leaf in self._leaves.values()]
        # One vector for all of them: a zeroth-order step is one pass over it.
        self._flat = torch.zeros(sum(sizes), device=self.device)
        for leaf, own in zip(self._leaves.values(), torch.split(self._flat, sizes), strict=True):
            leaf.data = own.view(leaf.shape).copy_(leaf.detach())
        self._settle = moving.Settled()

    def _added(self) -> Mapping[str, nn.Parameter]:
        """The tensors that are new in the model, by our names."""
        return _of_peft(self.model) if self._config else {}

    def check_rank(self, spec: LoraSpec) -> None:
        """Any: there is no rank."""

    def init(self, spec: LoraSpec, seed: int) -> Params:
        """The base model's own tensors, scales of one, a prompt of tokens drawn by `seed`.

        Words of the vocabulary are a better start of a prompt than noise (Lester et al.).
        """
        new = {name: leaf for name, leaf in self._leaves.items() if name not in self._start}
        fresh = {name: tensor.clone() for name, tensor in self._start.items()}
        fresh |= {n: torch.ones(leaf.shape) for n, leaf in new.items() if n.endswith(_IA3)}
        if _PROMPT in new:
            embed = self.model.get_input_embeddings()
            known = min(len(self.base.tokenizer), embed.num_embeddings)
            draw = seeds.generator(seed, "prompt")
            ids = torch.randint(known, new[_PROMPT].shape[:1], generator=draw)
            fresh[_PROMPT] = embed(ids.to(self.device)).detach().float().cpu()
        return fresh

    def write(self, params: Params, spec: LoraSpec, frozen: Sequence[Params] = ()) -> None:
        """Set every trained tensor and every buffer; nothing is left as it was.

        Raises ValueError when a tensor is missing, unknown or of a wrong shape, and for frozen
        low-rank blocks, which have no place here.
        """
        if params.keys() != self._leaves.keys():
            odd = sorted(params.keys() ^ self._leaves.keys())
            raise ValueError(f"update differs from the model in {len(odd)} tensors, first {odd[0]}")
        if frozen:
            raise ValueError("frozen low-rank blocks go with parameters=lora")
        for name, leaf in self._leaves.items():
            if leaf.shape != params[name].shape:
                raise ValueError(f"tensor {name} has shape {tuple(params[name].shape)}")
        for name, leaf in self._leaves.items():
            leaf.requires_grad_(False)
            leaf.grad = None
            leaf.copy_(params[name])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self._buffers[name])

    def show(self, adapter: Adapter, spec: LoraSpec) -> None:
        """Write a global model; tensors that it does not have are as they were at first."""
        blocks = (*adapter.frozen, *adapter.residuals)
        lacks = adapter.trained.keys() != self._leaves.keys()
        start = {**self.init(spec, 0), **adapter.trained} if lacks else adapter.trained
        self.write(self._settle(start, adapter.moves), spec, blocks)

    def enter(self, start: Params, spec: LoraSpec, moves: Sequence[Move]) -> Space:
        """Write `start` after `moves`; the space of the trained tensors, standing there."""
        self.write(self._settle(start, moves), spec)
        return Beside(self._flat)

    def read(self) -> Params:
        """A copy of all trained tensors, on the CPU."""
        return {name: leaf.detach().cpu().clone() for name, leaf in self._leaves.items()}

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All trained tensors by name, in the order of names."""
        return iter(self._leaves.items())

    def save(self, folder: Path, adapter: Adapter, spec: LoraSpec) -> None:
        """Write a global model: a PEFT adapter (ia3, prompt), or the whole model in its type."""
        self.show(adapter, spec)
        if self._config is None:
            full.write_model(folder, self.model, self._shown())
        else:
            classify = self.base.task == "classify"
            saved = {
                **self._config.to_dict(),
                "task_type": TaskType.SEQ_CLS if classify else TaskType.CAUSAL_LM,
                "inference_mode": True,
                "auto_mapping": None,
                "base_model_name_or_path": adapter_files.portable(self.base.name, folder),
                **({"modules_to_save": heads_of(self.base)} if classify else {}),
            }
            adapter_files.write_adapter(folder, type(self._config)(**saved), self._shown())

    def distance_to(self, folder: Path, spec: LoraSpec) -> float:
        """‖saved - shown‖ / ‖shown‖ in fp64: of an adapter's tensors, or of the whole model."""
        shown = self._shown()
        if self.artefact == "model":
            return full.distance(folder, shown)
        saved, _ = codec.read(str(folder / "adapter_model.safetensors"))
        if saved.keys() != shown.keys():
            return math.inf
        lost = sum(float((saved[n].double() - t.double()).square().sum()) for n, t in shown.items())
        return math.sqrt(lost / sum(float(t.double().square().sum()) for t in shown.values()))

    def release(self) -> None:
        """Free the memory of all weights. Ends this object."""
        self._flat, self._leaves, self._start = torch.empty(0), {}, {}
        devices.free(self.model)

    def digest(self, folder: Path) -> str:
        """sha256 of the tensors of a saved adapter, or of the weight files of a saved model."""
        whole = self.artefact == "model"
        return full.digest(folder) if whole else adapter_files.adapter_hash(folder)

    def _shown(self) -> dict[str, Tensor]:
        """Returns shown tensors by the names of peft (trained tensors) or of transformers (all).

        As transformers loads it, a whole model is in its own type; tied tensors stay one.
        """
        if self._config is not None:
            return {_peft_name(name): tensor for name, tensor in self.read().items()}
        shown: dict[str, Tensor] = {}
        rounded: dict[int, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            plain = name.replace(".parametrizations.", ".").removesuffix(".original")
            if plain != name:
                tensor = rounded.setdefault(tensor.data_ptr(), tensor.to(self._dtype))
            shown[plain] = tensor
        return shown


class _Rounded(nn.Module):
    """A parametrization: the weight that is used is the fp32 one, rounded."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        return master.to(self.dtype)


def _leaf(model: PreTrainedModel, parameter: nn.Parameter) -> nn.Parameter:
    """The fp32 tensor that is trained in place of a parameter, wherever it is used."""
    if parameter.dtype == torch.float32:
        return parameter
    leaf = nn.Parameter(parameter.detach().float(), requires_grad=False)
    for module in list(model.modules()):
        for name, own in list(module._parameters.items()):
            if own is parameter:
                rounded = _Rounded(parameter.dtype)
                parametrize.register_parametrization(module, name, rounded, unsafe=True)
                module.parametrizations[name].original = leaf
    return leaf


def _of_peft(model: Any) -> Mapping[str, nn.Parameter]:
    """The tensors that peft has added, by our names."""
    if isinstance(model.active_peft_config, PromptTuningConfig):
        return {_PROMPT: model.prompt_encoder[_NAME].embedding.weight}
    layers = model.base_model.model.named_modules()
    return {name + _IA3: m.ia3_l[_NAME] for name, m in layers if isinstance(m, IA3Layer)}


def _peft_name(name: str) -> str:
    if name == _PROMPT:
        return "prompt_embeddings"
    return adapter_files.PREFIX + (name + "_l" if name.endswith(_IA3) else name)
