"""GGUF files of llama.cpp: a model with an adapter merged in, or the adapter alone.

Written tensor by tensor: memory is that of the largest one, in fp32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from corolla.artefacts.gguf_architectures import (
    Architecture,
    add_hyperparameters,
    architecture_of,
    rope_factors,
    written,
)
from corolla.artefacts.gguf_vocabulary import vocabulary_of
from corolla.artefacts.weights import Weights
from corolla.errors import ArtefactError
from corolla.tensors import factors
from corolla.types import LoraSpec, Params

GgufType = Literal["f32", "f16", "q8_0"]
TYPES: dict[GgufType, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_BLOCK = 32
"""Values of a row that q8_0 gives a scale of their own."""
_OWN = ("GGUF.", "split.", "general.architecture", "general.file_type", "general.quantization")
"""Beginnings of the metadata keys by which a GGUF file describes itself."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GgufModel:
    """A model that llama.cpp may know. `source` is the GGUF file that it came from."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: Path | None = None

    @property
    def architecture(self) -> Architecture:
        """Raises ArtefactError for one that is not known."""
        return architecture_of(self.config)

    def stored_name(self, name: str) -> str:
        """The name of a tensor of transformers in a file. Raises ArtefactError without one."""
        names = gguf.get_tensor_name_map(self.architecture.arch, self.config.num_hidden_layers)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ArtefactError(f"llama.cpp's {self.architecture.name} has no place for {name}")
        return str(found)


def write_model(path: Path, model: GgufModel, weights: Weights, kind: GgufType) -> int:
    """Write a whole model; the number of matrices that had to stay in f16, of rows that q8_0 lacks.

    Raises ArtefactError for a model that llama.cpp computes otherwise.
    """
    own, config = model.architecture, model.config
    writer = GGUFWriter(path, own.name, dry_run=False)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if model.source is None:
        writer.add_name(model.name)
        add_hyperparameters(writer, config)
        vocabulary_of(model.tokenizer, config.vocab_size).add_to(writer, model.tokenizer)
    else:
        _copy_metadata(writer, model.source, own.name)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    tied = config.tie_word_embeddings
    kept = sorted(n for n in shapes if not n.endswith("inv_freq") and not (tied and "lm_head" in n))
    made = [
        _Tensor(
            model.stored_name(n),
            shapes[n],
            _type(shapes[n], kind),
            lambda n=n: written(own, config, n, weights.whole(n).numpy()),  # type: ignore[misc]
        )
        for n in kept
    ]
    if (rotated := rope_factors(config)) is not None:
        made.append(_Tensor("rope_freqs.weight", rotated.shape, TYPES["f32"][0], lambda: rotated))
    _write(writer, made)
    return _unlike(made, kind)


def write_lora(path: Path, model: GgufModel, update: Params, spec: LoraSpec, kind: GgufType) -> int:
    """Write an adapter, whose factors have the scaling of `spec`; see write_model.

    llama.cpp scales by alpha / rank, the rank being that of each factor.
    """
    own, config = model.architecture, model.config
    writer = GGUFWriter(path, own.name, dry_run=False)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, spec.scaling * spec.rank)
    writer.add_name(model.name)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    made = []
    for module in factors.modules(update):
        name, a, b = f"{module}.weight", update[module + factors.A], update[module + factors.B]
        rows = written(own, config, name, b.float().numpy())
        for suffix, values in ((".lora_a", a.float().numpy()), (".lora_b", rows)):
            kept = _type(values.shape, kind)
            held = model.stored_name(name) + suffix
            made.append(_Tensor(held, values.shape, kept, lambda v=values: v))  # type: ignore[misc]
    _write(writer, made)
    return _unlike(made, kind)


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    values: Callable[[], Array]


def _type(shape: tuple[int, ...], kind: GgufType) -> GGMLQuantizationType:
    """Vectors stay in f32, as llama.cpp needs them; rows that are no blocks in f16."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return TYPES[kind][0]


def _unlike(made: list[_Tensor], kind: GgufType) -> int:
    return sum(len(t.shape) > 1 and t.kind is not TYPES[kind][0] for t in made)


def _write(writer: GGUFWriter, made: list[_Tensor]) -> None:
    for tensor in made:
        shape = tensor.shape
        element: np.dtype[Any] = np.dtype(np.float32)
        if tensor.kind is GGMLQuantizationType.F16:
            element = np.dtype(np.float16)
        elif tensor.kind is GGMLQuantizationType.Q8_0:
            element = np.dtype(np.uint8)
            shape = gguf.quant_shape_to_byte_shape(shape, tensor.kind)
        size = int(np.prod(shape, dtype=np.int64)) * element.itemsize
        writer.add_tensor_info(tensor.name, shape, element, size, raw_dtype=tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in made:
            writer.write_tensor_data(_encoded(tensor))
    finally:
        writer.close()


def _encoded(tensor: _Tensor) -> npt.NDArray[np.generic]:
    """The values in their type. Raises ArtefactError where f16 has no number for them."""
    values = tensor.values()
    if tensor.kind is not GGMLQuantizationType.F32 and float(np.abs(values).max(initial=0)) > 65504:
        raise ArtefactError(f"{tensor.name} has values beyond those of f16: use --dtype f32")
    if tensor.kind is GGMLQuantizationType.F16:
        return values.astype(np.float16)
    if tensor.kind is GGMLQuantizationType.Q8_0:
        found: npt.NDArray[np.generic] = gguf.quants.quantize(values, tensor.kind)
        return found
    return np.ascontiguousarray(values)


def _copy_metadata(writer: GGUFWriter, source: Path, architecture: str) -> None:
    """Write what the file of a base says of it, tokenizer and chat template included."""
    for key, field in _fields(source):
        if key == "general.architecture" and field.contents() != architecture:
            raise ArtefactError(f"{source.name} is of {field.contents()}, not of {architecture}")
        if not key.startswith(_OWN):
            kinds = field.types
            inner = kinds[-1] if len(kinds) > 1 else None
            writer.add_key_value(key, field.contents(), kinds[0], inner)


def _fields(source: Path) -> Iterator[tuple[str, gguf.ReaderField]]:
    yield from gguf.GGUFReader(source).fields.items()
