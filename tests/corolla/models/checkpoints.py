"""Tiny checkpoints on disk, whole and lacking something; each with a tokenizer of bytes."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.conftest import byte_tokenizer

_BERT = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}


def _written(make: Any, folder: Path, name: str) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        model: PreTrainedModel = make()
    model.save_pretrained(folder / name)
    byte_tokenizer().save_pretrained(folder / name)
    return folder / name


def bert(folder: Path) -> Path:
    """A classifier of three labels, whole; their order is not that of the alphabet."""
    names = {0: "yes", 1: "no", 2: "perhaps"}
    config = transformers.BertConfig(
        **_BERT, id2label=names, label2id={name: place for place, name in names.items()}
    )
    return _written(lambda: transformers.BertForSequenceClassification(config), folder, "bert")


def masked_bert(folder: Path) -> Path:
    """A masked language model: it has no pooler."""
    config = transformers.BertConfig(**_BERT)
    return _written(lambda: transformers.BertForMaskedLM(config), folder, "masked-bert")


def masked_albert(folder: Path) -> Path:
    """A masked language model: it has no pooler, which is one linear layer."""
    config = transformers.AlbertConfig(**_BERT, embedding_size=16)
    return _written(lambda: transformers.AlbertForMaskedLM(config), folder, "masked-albert")


def masked_roberta(folder: Path) -> Path:
    """A masked language model: the head of its classifier is two layers, and there is no pooler."""
    config = transformers.RobertaConfig(**_BERT)
    return _written(lambda: transformers.RobertaForMaskedLM(config), folder, "masked-roberta")


def gpt2(folder: Path) -> Path:
    """A language model with biases."""
    config = transformers.GPT2Config(
        vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=128, bos_token_id=0,
        eos_token_id=0, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    return _written(lambda: transformers.GPT2LMHeadModel(config), folder, "gpt2")


def llama(folder: Path, tied: bool = True, headless: bool = False) -> Path:
    """A language model; `headless`: its backbone alone was saved."""
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
        pad_token_id=1, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    make = transformers.LlamaModel if headless else transformers.LlamaForCausalLM
    return _written(lambda: make(config), folder, f"llama-{tied}-{headless}")


def of_another_class(folder: Path) -> Path:
    """The settings of a GPT-2 beside the weights of a Llama."""
    place = gpt2(folder)
    (llama(folder) / "model.safetensors").replace(place / "model.safetensors")
    return place


def renamed(folder: Path) -> Path:
    """A language model whose tensors have a prefix that nobody knows."""
    place = llama(folder, tied=False)
    weights = load_file(place / "model.safetensors")
    named = {f"student.{name}": tensor for name, tensor in weights.items()}
    save_file(named, place / "model.safetensors", {"format": "pt"})
    return place


def without(place: Path, *names: str) -> Path:
    """The checkpoint, robbed of tensors whose names end so."""
    weights = load_file(place / "model.safetensors")
    left = {name: tensor for name, tensor in weights.items() if not name.endswith(names)}
    assert len(left) < len(weights)
    save_file(left, place / "model.safetensors", {"format": "pt"})
    return place
