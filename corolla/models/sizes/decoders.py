"""The tensors of decoders of Llama's form, from the sizes in config.json alone."""

from collections.abc import Mapping
from typing import Any

Shape = tuple[int, ...]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""Families whose tensors are known here: as transformers names and shapes them."""

_NORMED = {"qwen3", "gemma3_text"}
"""Families whose queries and keys have norms of their own."""


def tensors(told: Mapping[str, Any]) -> dict[str, Shape]:
    """Name → shape of every tensor that such a model is saved with; {} for other families.

    Raises KeyError where config.json lacks a size.
    """
    family = told.get("model_type")
    if family not in FAMILIES:
        return {}
    hidden, heads = int(told["hidden_size"]), int(told["num_attention_heads"])
    width = int(told.get("head_dim") or hidden // heads)
    vocabulary = int(told["vocab_size"])
    found: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    block = _block(told, hidden, heads * width, width)
    for number in range(int(told["num_hidden_layers"])):
        found |= {f"model.layers.{number}.{name}": shape for name, shape in block.items()}
    found["model.norm.weight"] = (hidden,)
    if not told.get("tie_word_embeddings", family == "gemma3_text"):
        found["lm_head.weight"] = (vocabulary, hidden)
    return found


def _block(told: Mapping[str, Any], hidden: int, queries: int, width: int) -> dict[str, Shape]:
    family, inner = told["model_type"], int(told["intermediate_size"])
    keys = int(told.get("num_key_value_heads") or told["num_attention_heads"]) * width
    attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    linear = {f"self_attn.{name}_proj": shape for name, shape in attention.items()}
    linear |= {"self_attn.o_proj": (hidden, queries)}
    linear |= {f"mlp.{name}_proj": shape for name, shape in mlp.items()}
    found: dict[str, Shape] = {f"{name}.weight": shape for name, shape in linear.items()}
    biased = [name for name in linear if _biased(told, name)]
    found |= {f"{name}.bias": linear[name][:1] for name in biased}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "gemma3_text":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    found |= {f"{name}.weight": (hidden,) for name in norms}
    if family in _NORMED:
        found |= {f"self_attn.{name}_norm.weight": (width,) for name in "qk"}
    return found


def _biased(told: Mapping[str, Any], name: str) -> bool:
    if told["model_type"] == "qwen2":
        return name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return bool(told.get("mlp_bias" if name.startswith("mlp") else "attention_bias"))
