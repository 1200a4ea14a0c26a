"""Small random models of the architectures that are written for llama.cpp, with tokenizers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from tests.corolla.artefacts import vocabularies

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
_STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _digits() -> PreTrainedTokenizerBase:
    """As SmolLM's, with merges of digits, which cutting each digit alone leaves unused."""
    pieces = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made = vocabularies.of_bytes(None, more=" 1234" * 500)
    made.backend_tokenizer.pre_tokenizer = pieces
    return made


Make = Callable[[], PreTrainedTokenizerBase]
KINDS: dict[str, tuple[type, dict[str, Any], Make]] = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}, _digits),
    "llama3": (
        transformers.LlamaConfig,
        {"rope_parameters": _STRETCHED, "attention_bias": True, "head_dim": 32},
        lambda: vocabularies.of_bytes(vocabularies.split(vocabularies.LLAMA3), True, True),
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "num_hidden_layers": 7,
            "initializer_range": 0.1,
        },
        vocabularies.of_sentencepiece,
    ),
    "qwen2": (
        transformers.Qwen2Config,
        {"tie_word_embeddings": True},
        lambda: vocabularies.of_bytes(vocabularies.split(vocabularies.QWEN2)),
    ),
    "qwen3": (
        transformers.Qwen3Config,
        {"head_dim": 32},
        lambda: vocabularies.of_bytes(vocabularies.split(vocabularies.QWEN2)),
    ),
}
"""Name → (configuration, its arguments, tokenizer)."""


def make(folder: Path, kind: str, **changes: Any) -> Path:
    """A folder with a random model, all its tensors too: biases and norms are no zeros or ones."""
    configuration, own, tokenizer_of = KINDS[kind]
    tokenizer = tokenizer_of()
    special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    config = configuration(
        **{**_SHAPE, "vocab_size": len(tokenizer) + 3, **special, **own, **changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):
                parameter.data += 0.3 * torch.randn_like(parameter)
        # llama.cpp tells no probabilities of a step whose text is no whole character.
        broken = [i for i in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([i])]
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            embeddings.weight.data[broken] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
