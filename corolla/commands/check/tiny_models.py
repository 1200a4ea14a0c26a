"""Random models of some ten thousand parameters, and their tokenizer of whole words.

They cover what goes wrong with adapters in practice: grouped-query attention and tied embeddings
(Llama), Conv1D (GPT-2), a trained head (BERT classifier).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel


@dataclass(frozen=True)
class Size:
    """How large a model is; four heads of attention in all of them."""

    vocabulary: int = 96
    hidden: int = 32
    intermediate: int = 56
    layers: int = 2
    positions: int = 64


def llama(size: Size, **changes: Any) -> transformers.LlamaForCausalLM:
    """Grouped-query attention (k and v are narrower than q), tied embeddings, no biases."""
    usual: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": size.positions,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**usual, **changes}))


def gpt2(size: Size) -> transformers.GPT2LMHeadModel:
    """Conv1D layers, whose weight is (in, out); dropout is on, as GPT-2 ships."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=size.vocabulary,
            n_embd=size.hidden,
            n_layer=size.layers,
            n_head=4,
            n_positions=size.positions,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def bert(size: Size, labels: int) -> transformers.BertForSequenceClassification:
    """A classifier: its head is trained and aggregated as it is; dropout is on."""
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            max_position_embeddings=size.positions,
            num_labels=labels,
            pad_token_id=0,
        )
    )


def word_tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerBase:
    """Words w0, w1, ... between spaces, from 1 on; what is no such word is 0, <eos>."""
    words = {"<eos>": 0, **{f"w{i}": i + 1 for i in range(vocabulary - 1)}}
    raw = Tokenizer(WordLevel(words, unk_token="<eos>"))  # noqa: S106
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<eos>",  # noqa: S106
        pad_token="<eos>",  # noqa: S106
    )


_BUILDERS: Mapping[str, Callable[[Size, int], transformers.PreTrainedModel]] = {
    "llama": lambda size, labels: llama(size),
    "gpt2": lambda size, labels: gpt2(size),
    "bert": bert,
}
KINDS = tuple(_BUILDERS)


def build(kind: str, size: Size, labels: int, seed: int) -> transformers.PreTrainedModel:
    """One of KINDS in evaluation mode, with the same weights for the same seed.

    `labels` counts what the classifier tells apart; no other kind reads it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)  # transformers draws from the global state only
        return _BUILDERS[kind](size, labels).eval()
