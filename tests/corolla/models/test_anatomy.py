"""What headers say is what the loaded model has."""

import json
import struct
from pathlib import Path

import pytest
import torch
import transformers

from corolla.config.run import RunConfig
from corolla.errors import ModelError
from corolla.models import anatomy, lora, pretrained
from corolla.types import LoraSpec


def loaded(name: str) -> pretrained.Base:
    return pretrained.load(RunConfig(model=name, device="cpu", max_length=64))


def test_the_embedded_model_as_transformers_has_it() -> None:
    found, base = anatomy.read("embedded"), loaded("embedded")
    config = base.model.config
    assert found.values == sum(p.numel() for p in base.model.parameters())
    assert (found.layers, found.hidden) == (config.num_hidden_layers, config.hidden_size)
    assert (found.heads, found.kv_heads) == (4, 2)
    assert found.vocabulary == config.vocab_size
    assert (found.norms, found.head_norms) == (2, False)
    model = lora.LoraModel(base)
    assert found.linear() == model.shapes
    fresh = model.init(LoraSpec(4, 8), 0)
    shapes = found.adapter(LoraSpec(4, 8))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in fresh.items()}


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bert"])
def test_other_families(tmp_path: Path, family: str) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    made: transformers.PreTrainedModel
    with torch.random.fork_rng(devices=[]):
        if family == "gpt2":
            made = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=50)
            )
        elif family == "gemma3":
            made = transformers.Gemma3ForCausalLM(
                transformers.Gemma3TextConfig(
                    **small, vocab_size=50, intermediate_size=24, head_dim=8, num_key_value_heads=1
                )
            )
        else:
            made = transformers.BertForMaskedLM(
                transformers.BertConfig(**small, vocab_size=50, intermediate_size=24)
            )
    made.save_pretrained(tmp_path)
    found = anatomy.read(str(tmp_path))
    assert found.values == sum(p.numel() for p in made.parameters())
    linear = {
        name: tuple(module.weight.shape[:: -1 if family == "gpt2" else 1])
        for name, module in made.named_modules()
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
    }
    in_blocks = {name: shape for name, shape in linear.items() if ".0." in name or ".1." in name}
    own = found.linear()
    assert {n: s for n, s in own.items() if ".0." in n or ".1." in n} == in_blocks
    assert found.layers == 2
    assert found.head_norms == (family == "gemma3")
    assert found.norms == (4 if family == "gemma3" else 2)


def gguf(path: Path) -> Path:
    """A header of a GGUF file, as its specification says, without the tensors' data."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def number(key: str, value: int) -> bytes:
        return text(f"llama.{key}") + struct.pack("<II", 4, value)

    tokens = struct.pack("<IIQ", 9, 8, 3) + text("a") + text("bc") + text("")
    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("tokenizer.ggml.tokens") + tokens,
        text("tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 3) + bytes(12),
        number("block_count", 2),
        number("embedding_length", 8),
        number("feed_forward_length", 12),
        number("attention.head_count", 4),
        number("attention.head_count_kv", 2),
    ]
    tensors: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (8, 3))]
    for i in (0, 1):
        tensors += [(f"blk.{i}.attn_q.weight", (8, 8)), (f"blk.{i}.attn_k.weight", (8, 4))]
        tensors += [(f"blk.{i}.attn_norm.weight", (8,)), (f"blk.{i}.ffn_down.weight", (12, 8))]
    about = b"".join(
        text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, 0)
        for name, dims in tensors
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    path.write_bytes(head + b"".join(entries) + about)
    return path


def test_a_gguf_header(tmp_path: Path) -> None:
    found = anatomy.read(str(gguf(tmp_path / "small.gguf")))
    assert (found.layers, found.hidden, found.intermediate) == (2, 8, 12)
    assert (found.heads, found.kv_heads, found.head_dim, found.vocabulary) == (4, 2, 2, 3)
    assert found.values == 24 + 2 * (64 + 32 + 8 + 96)
    assert found.linear(["k_proj"]) == {
        "model.layers.0.self_attn.k_proj": (4, 8),
        "model.layers.1.self_attn.k_proj": (4, 8),
    }
    assert found.linear(["down_proj"])["model.layers.0.mlp.down_proj"] == (8, 12)


@pytest.mark.parametrize(
    ("name", "why"),
    [("nobody/nothing", "not on this machine"), ("./nowhere", "not on this machine")],
)
def test_a_model_that_is_not_there(name: str, why: str) -> None:
    with pytest.raises(ModelError, match=why) as raised:
        anatomy.read(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"no model"])
def test_a_damaged_gguf_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot tell what"):
        anatomy.read(str(path))


@pytest.mark.parametrize("damage", ["config", "header", "weights"])
def test_a_damaged_folder(tmp_path: Path, tiny_model: Path, damage: str) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if damage == "config":
        (tmp_path / "config.json").write_text("{")
    elif damage == "header":
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 30)
    else:
        (tmp_path / "model.safetensors").unlink()
        told = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(told.replace('"llama"', '"opt"'))
    with pytest.raises(ModelError) as raised:
        anatomy.read(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_targets_and_ranks_that_a_model_cannot_have(tiny_model: Path) -> None:
    found = anatomy.read(str(tiny_model))
    with pytest.raises(ModelError, match="match nothing"):
        found.linear(["query"])
    with pytest.raises(ModelError, match="rank 17 is larger"):
        found.adapter(LoraSpec(17, 1))


def test_the_weights_are_not_read(tmp_path: Path, tiny_model: Path) -> None:
    """A file that ends after its header is enough."""
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(whole[:length])
    assert anatomy.read(str(tmp_path)).tensors == anatomy.read(str(tiny_model)).tensors
    assert json.loads(whole[8:length])
