"""Tensors from config.json alone: those of transformers' models of the same sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from corolla.errors import ModelError
from corolla.models import anatomy
from corolla.models.sizes import decoders

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_tensors_are_those_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    known = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    found = anatomy.read(str(tmp_path))
    assert found.tensors == known
    assert found.values == sum(tensor.numel() for tensor in model.parameters())


def test_biases_are_those_of_transformers() -> None:
    wanted = {**SIZES, "attention_bias": True, "mlp_bias": True}
    config = transformers.LlamaConfig(**wanted, tie_word_embeddings=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    known = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert decoders.tensors(config.to_dict()) == known


def test_other_families_need_their_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 9}))
    with pytest.raises(ModelError, match=r"no \.safetensors file, and config\.json alone says"):
        anatomy.read(str(tmp_path))
