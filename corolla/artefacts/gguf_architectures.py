"""How llama.cpp writes the models that can be exported to it: hyperparameters, names and tensors.

What each architecture needs is said by llama.cpp's own loaders; a model whose computation they do
not cover is refused by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from transformers import PretrainedConfig

from corolla.errors import ArtefactError

Values = npt.NDArray[np.float32]
Check = tuple[Callable[[PretrainedConfig], bool], str]


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp that stands for a model type of transformers."""

    arch: gguf.MODEL_ARCH
    activation: str
    permuted: bool = False
    """True where rows of q and k are rotated in pairs (2 i, 2 i + 1); transformers has halves."""
    norm_offset: float = 0.0
    """Added to the weights of norms, which transformers keeps without it."""
    refused: tuple[Check, ...] = ()
    """Named checks of a config for what llama.cpp computes otherwise."""

    @property
    def name(self) -> str:
        """The name in the file."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


def _slides(config: PretrainedConfig) -> bool:
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())


_GEMMA3: tuple[Check, ...] = (
    (lambda c: c.query_pre_attn_scalar != c.head_dim, "a query_pre_attn_scalar of its own"),
    (lambda c: bool(c.attn_logit_softcapping or c.final_logit_softcapping), "soft caps"),
    (lambda c: bool(c.use_bidirectional_attention), "attention in both directions"),
    (lambda c: bool(c.attention_bias), "biases of attention"),
    (
        lambda c: any((t == "full_attention") != (i % 6 == 5) for i, t in enumerate(c.layer_types)),
        "other layers with full attention than each sixth",
    ),
    (lambda c: _rope(c, "sliding_attention")["rope_theta"] != 10_000, "another local rope_theta"),
)
_SLIDES: tuple[Check, ...] = ((_slides, "sliding windows"),)

ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, "silu", permuted=True),
    "gemma3_text": Architecture(
        gguf.MODEL_ARCH.GEMMA3, "gelu_pytorch_tanh", norm_offset=1.0, refused=_GEMMA3
    ),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, "silu", refused=_SLIDES),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, "silu", refused=_SLIDES),
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a model. Raises ArtefactError, by name, for one that is not known."""
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise ArtefactError(
            f"--to gguf knows llama, gemma3, qwen2 and qwen3, found a model of type {kind}: use "
            f"--to merged, and the converter of llama.cpp"
        )
    found = ARCHITECTURES[kind]
    told = [name for check, name in found.refused if check(config)]
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation != found.activation:
        told.append(f"activation {activation}")
    if _rope(config)["rope_type"] not in ("default", "linear", "llama3"):
        told.append(f"rope_type {_rope(config)['rope_type']}")
    if told:
        raise ArtefactError(f"llama.cpp computes {found.name} without {', '.join(told)}")
    return found


def add_hyperparameters(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Write what llama.cpp's loader asks of the architecture."""
    head = head_size(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if _slides(config):
        writer.add_sliding_window(config.sliding_window)


def rope_factors(config: PretrainedConfig) -> Values | None:
    """Returns the divisors of the frequencies of rotation, one a pair; None: nothing divides them.

    After Llama 3.1, as in transformers (modeling_rope_utils): long wavelengths are stretched by
    `factor`, short ones are kept, those between are mixed.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head, span = head_size(config), rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequency = rope["rope_theta"] ** -(np.arange(0, head, 2, dtype=np.float64) / head)
    turns = span * frequency / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    made: Values = factor.astype(np.float32)
    return made


def written(own: Architecture, config: PretrainedConfig, name: str, values: Values) -> Values:
    """A tensor of transformers as llama.cpp has it; also a factor B, which has the same rows."""
    if own.norm_offset and name.endswith("norm.weight"):
        return values + np.float32(own.norm_offset)
    if own.permuted and ".q_proj." in name:
        return _paired(values, config.num_attention_heads)
    if own.permuted and ".k_proj." in name:
        return _paired(values, config.num_key_value_heads)
    return values


def head_size(config: PretrainedConfig) -> int:
    """Values of a head of attention."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _paired(values: Values, heads: int) -> Values:
    """Rows of each head in the order 0, h/2, 1, h/2 + 1, …: a pair that rotates lies together."""
    half = values.shape[0] // heads // 2
    split = values.reshape(heads, 2, half, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def _rope(config: PretrainedConfig, layers: str = "full_attention") -> dict[str, Any]:
    """The parameters of rotation, of one kind of layers where kinds differ."""
    found: dict[str, Any] = config.rope_parameters
    own: dict[str, Any] = found.get(layers, found)
    return own
