import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from corolla.config.run import RunConfig
from corolla.errors import ConfigError, ModelError
from corolla.models import devices, pretrained
from corolla.models.files import folders

Settings = Callable[..., RunConfig]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_folder_is_loaded_as_it_is(settings: Settings, tiny_model: Path) -> None:
    base = pretrained.load(settings())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    assert same(base.model.state_dict(), plain.state_dict())
    assert (base.task, base.name, base.path) == ("causal", str(tiny_model), str(tiny_model))
    assert base.pad_id == 1
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())


def test_a_relative_folder_is_named_absolutely(
    settings: Settings, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter of the run names its base model for tools that run elsewhere."""
    monkeypatch.chdir(tiny_model.parent)
    assert pretrained.load(settings(model=f"./{tiny_model.name}")).path == str(tiny_model)


def test_the_embedded_model_loads_and_speaks(settings: Settings) -> None:
    base = pretrained.load(settings(model="embedded"))
    ids = base.tokenizer("def f(x):", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(base.model(**ids).logits).all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "no config.json"),
        ("./nowhere", "neither a model folder nor"),
        ("~/corolla-test-nowhere", "neither a model folder nor"),
        ("/nowhere/at/all", "neither a model folder nor"),
        ("file.bin", "neither a model folder nor"),
        ("missing.gguf", "does not exist"),
    ],
)
def test_a_path_that_is_no_model_is_said(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=reason):
        pretrained.load(settings(model=name))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"not json"),
        ("config.json", b"{}"),
        ("model.safetensors", b"junk"),
        ("model.safetensors", None),
        ("tokenizer.json", b"junk"),
    ],
    ids=["config", "empty config", "weights", "no weights", "tokenizer"],
)
def test_a_damaged_folder_is_said_in_one_line(
    settings: Settings, tiny_model: Path, tmp_path: Path, file: str, content: bytes | None
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match="cannot load model") as caught:
        pretrained.load(settings(model=str(folder)))
    assert "\n" not in str(caught.value)


def test_code_that_a_model_brings_is_never_run(
    settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    """Nor is anybody asked: a terminal may be an owner's who has no idea what it is about."""
    folder, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_model, folder)
    (folder / "evil.py").write_text(f"open({str(run)!r}, 'w')\nclass Config: ...\n")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"}
    config |= {"model_type": "evil", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="brings code of its own, which is never run") as caught:
        pretrained.load(settings(model=str(folder)))
    assert "\n" not in str(caught.value)
    assert not run.exists()


def test_a_hub_name_without_network_is_said_in_one_line(settings: Settings) -> None:
    with pytest.raises(ModelError, match="cannot load model") as caught:
        pretrained.load(settings(model="corolla-tests/does-not-exist"))
    assert "\n" not in str(caught.value)


def test_a_classifier_head_depends_on_the_seed_alone(settings: Settings) -> None:
    labels = ["no", "perhaps", "yes"]
    heads = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        base = pretrained.load(settings(seed=seed), labels)
        assert torch.equal(torch.get_rng_state(), before)
        heads.append(base.model.get_parameter("score.weight"))
    assert base.task == "classify"
    assert heads[0].shape == (3, 16)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert base.model.config.id2label == dict(enumerate(labels))


def test_a_head_that_the_model_has_is_kept(settings: Settings, tmp_path: Path) -> None:
    labels = ["no", "yes"]
    first = pretrained.load(settings(seed=1), labels)
    first.model.save_pretrained(tmp_path)
    first.tokenizer.save_pretrained(tmp_path)
    again = pretrained.load(settings(seed=2, model=str(tmp_path)), labels)
    assert same(again.model.state_dict(), first.model.state_dict())


def test_classification_needs_labels(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="needs labels"):
        pretrained.load(settings(task="classify"))
    assert pretrained.load(settings(task="causal"), ["a", "b"]).task == "causal"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_base_has_the_type_that_was_asked_for(settings: Settings, dtype: str) -> None:
    base = pretrained.load(settings(dtype=dtype))
    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)}


def test_a_pad_id_is_found_without_a_pad_token(
    settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    model.config.pad_token_id = None
    tokenizer.pad_token = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = pretrained.load(settings(model=str(tmp_path)), ["no", "yes"])
    assert base.pad_id == 0  # <eos>
    assert base.model.config.pad_token_id == 0


def test_a_device_that_is_not_here_is_said(settings: Settings) -> None:
    for name in ("cuda:77", "no such device"):
        with pytest.raises(ConfigError, match="not available"):
            devices.pick_device(name)
    assert devices.pick_device("cpu") == torch.device("cpu")


def test_the_fingerprint_is_of_the_weights(settings: Settings) -> None:
    base = pretrained.load(settings())
    first = pretrained.fingerprint(base.model)
    assert first == pretrained.fingerprint(pretrained.load(settings(seed=5)).model)
    with torch.no_grad():
        next(base.model.parameters()).view(-1)[0] += 1
    assert pretrained.fingerprint(base.model) != first


def test_a_base_carries_the_fingerprint_of_its_weights(
    settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    """By which server and device can tell that they start from the same model."""
    base = pretrained.load(settings())
    assert base.fingerprint == pretrained.fingerprint(base.model)
    assert len(base.fingerprint) == 64
    assert pretrained.load(settings(seed=5, rank=3)).fingerprint == base.fingerprint
    copied = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, copied)
    assert pretrained.load(settings(model=str(copied))).fingerprint == base.fingerprint
    other = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.get_input_embeddings().weight[7, 3] += 2**-20
    other.save_pretrained(copied)
    assert pretrained.load(settings(model=str(copied))).fingerprint != base.fingerprint


def test_a_base_in_another_type_has_another_fingerprint(settings: Settings) -> None:
    """Rounded weights are other weights: a log of steps would not lead to the same model."""
    found = {
        pretrained.load(settings(dtype=d)).fingerprint for d in ("float32", "bfloat16", "float16")
    }
    assert len(found) == 3


def test_a_classifiers_fingerprint_is_also_of_its_new_head(settings: Settings) -> None:
    labels = ["no", "yes"]
    one, again, other = (pretrained.load(settings(seed=s), labels).fingerprint for s in (1, 1, 2))
    assert one == again
    assert one != other


def test_quantization_needs_its_package(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="bitsandbytes"):
        pretrained.load(settings(quantization="4bit"))


def test_a_packaged_model_names_what_to_install(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = folders.Package("no_such_package_of_corolla", "pip install 'corolla[llm]'")
    monkeypatch.setitem(folders.PACKAGED, "packaged", package)
    with pytest.raises(ModelError, match=r"pip install 'corolla\[llm\]'"):
        pretrained.load(settings(model="packaged"))


def test_the_file_of_a_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "carrier_of_a_model").mkdir()
    (tmp_path / "carrier_of_a_model" / "__init__.py").write_text("raise ImportError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    package = folders.Package("carrier_of_a_model", "pip install it", "model.gguf")
    monkeypatch.setitem(folders.PACKAGED, "packaged", package)
    with pytest.raises(ModelError, match=r"has no model\.gguf: pip install it"):
        folders.packaged("packaged")
    (tmp_path / "carrier_of_a_model" / "model.gguf").touch()
    assert pretrained.gguf_of("packaged") == tmp_path / "carrier_of_a_model" / "model.gguf"


def test_a_file_that_is_no_gguf_is_said(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF junk")
    with pytest.raises(ModelError, match="cannot convert") as caught:
        pretrained.load(settings(model=str(tmp_path / "model.gguf")))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_gguf_file_is_converted_once(
    settings: Settings, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf", reason="an extra: pip install 'corolla[llm]'")
    monkeypatch.setenv("COROLLA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    _write_gguf(gguf, path, plain)
    base = pretrained.load(settings(model=str(path)))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(base.model(input_ids=ids).logits, plain(input_ids=ids).logits)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    assert stamps
    pretrained.load(settings(model=str(path)))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == stamps


def _write_gguf(gguf: Any, path: Path, model: Any) -> None:
    """The tiny Llama as GGUF in fp32, by the writer of llama.cpp."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<eos>", "<pad>", *(f"<0x{i:02X}>" for i in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3, 3, *[6] * 256])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_pad_token_id(1)
    own = {n: t.numpy() for n, t in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", own["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", own["model.norm.weight"])
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(config.num_hidden_layers):
        for there, here in parts.items():
            name = f"model.layers.{layer}.{here}.weight"
            writer.add_tensor(f"blk.{layer}.{there}.weight", own[name])
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for letter, number in heads.items():
            # llama.cpp interleaves the two halves of each head's rotary dimensions
            weight = own[f"model.layers.{layer}.self_attn.{letter}_proj.weight"]
            out, into = weight.shape
            halves = weight.reshape(number, 2, out // number // 2, into)
            permuted = halves.swapaxes(1, 2).reshape(out, into)
            writer.add_tensor(f"blk.{layer}.attn_{letter}.weight", permuted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
