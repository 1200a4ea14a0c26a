"""Tiny models with fused experts, of each form that transformers has."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from corolla.models import pretrained
from corolla.models.pretrained import Base
from tests.strategies import tiny

EXPERTS = 4
_SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
_MADE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    # (experts, out, in)
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, {}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {"moe_intermediate_size": 24, "head_dim": 8},
    ),
    # (experts, in, out), with biases
    "gpt_oss": (
        transformers.GptOssConfig,
        transformers.GptOssForCausalLM,
        {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}
KINDS = tuple(_MADE)
"""Names of the forms."""


def model(kind: str, **changes: Any) -> PreTrainedModel:
    """The same weights each time."""
    configured, made, own = _MADE[kind]
    count = "num_experts" if kind == "qwen3_moe" else "num_local_experts"
    config = configured(**{**_SIZE, **own, count: EXPERTS, "num_experts_per_tok": 2, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(7)
        built: PreTrainedModel = made(config).eval()
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.normal_(0, 0.2)
    return built.requires_grad_(False)


def base(kind: str, **changes: Any) -> Base:
    """The model with the tokenizer of the other tiny models."""
    built = model(kind, **changes)
    tokenizer = tiny.base("llama").tokenizer
    return Base(built, tokenizer, "causal", kind, kind, pretrained.fingerprint(built))
