"""GGUF files against transformers and peft: llama.cpp reads them and says the same."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from corolla.commands.export.order import Order, export
from corolla.embedded.assets import asset
from corolla.errors import ArtefactError
from corolla.models import pretrained
from corolla.types import LoraSpec
from tests.corolla.artefacts import tiny_models

gguf: Any = pytest.importorskip("gguf", reason="an extra: pip install 'corolla[gguf]'")
pytest.importorskip("xllamacpp", reason="in the dev extra, where it has a wheel")

from corolla.artefacts import gguf_architectures  # noqa: E402 - they import gguf
from experiments.bench.llama_cpp import (  # noqa: E402
    HARD,
    PROMPTS,
    STEPS,
    LlamaCpp,
    agree,
    greedy,
    make_adapter,
    write_base,
)

pytestmark = pytest.mark.command

AUTHOR = "somebody else"


@dataclass(frozen=True)
class Trained:
    """A base and an adapter on it; what transformers and peft, and nothing of Corolla, say."""

    base: Path
    model: str
    """The base as a run names it."""
    adapter: Path
    tokenizer: Any
    prompts: Sequence[list[int]]
    steps: Sequence[Sequence[Tensor]]
    """The log probabilities of each greedy step, up to the end of a text."""


def with_author(path: Path, target: Path) -> Path:
    """The same file with a line of metadata more, by the reader and writer of llama.cpp."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_author(AUTHOR)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module", params=["embedded", *tiny_models.KINDS, "gguf"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    kind = str(request.param)
    folder = tmp_path_factory.mktemp(kind)
    base, model = asset("model"), "embedded"
    if kind != "embedded":
        base = tiny_models.make(folder / "base", "llama" if kind == "gguf" else kind)
        model = str(base)
    with pytest.MonkeyPatch.context() as patch:
        if kind == "gguf":
            patch.setenv("COROLLA_CACHE", str(folder / "cache"))
            plain = write_base(base, folder / "bare.gguf")
            model = str(with_author(plain, folder / "theirs.gguf"))
        adapter = make_adapter(folder / "adapter", model, LoraSpec(8, 12.0, rslora=True), 0.05)
        tokenizer = pretrained.load_tokenizer(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(loaded, str(adapter)).eval()
    lines = asset("data.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    prompts = [list(tokenizer(line[20 : 60 + i])["input_ids"]) for i, line in enumerate(lines)]
    steps = [greedy(tuned, prompt) for prompt in prompts]
    return Trained(base, model, adapter, tokenizer, prompts, steps)


def test_llama_cpp_says_what_peft_says(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "gguf"
    lines = export(Order(trained.adapter, "gguf", trained.model, out, "f32"))
    files = [out / "adapter-f32.gguf", out / "model-f32.gguf"]
    assert [line.partition(":")[0] for line in lines] == [str(path) for path in files]
    assert sorted(out.iterdir()) == files
    every = sum(len(steps) for steps in trained.steps)
    merged = LlamaCpp(files[1])
    for text in HARD:
        assert merged.tokens(text) == trained.tokenizer(text)["input_ids"]
    beside = LlamaCpp(write_base(trained.base, tmp_path / "base.gguf"), files[0])
    for reader in (merged, beside):
        found = agree(reader, trained.prompts, trained.steps)
        assert found.met, found
        assert found.equal + found.near * STEPS >= every > STEPS * PROMPTS / 2, (found, every)
        assert found.near <= PROMPTS / 4
    fields = gguf.GGUFReader(files[1]).fields
    assert ("general.author" in fields) == trained.model.endswith(".gguf")


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.1), ("q8_0", 1.0)])
def test_smaller_types_are_near(
    kind: str, tolerance: float, trained: Trained, tmp_path: Path
) -> None:
    export(Order(trained.adapter, "gguf", trained.model, tmp_path / "out", kind))
    first = [steps[:1] for steps in trained.steps[:3]]
    reader = LlamaCpp(tmp_path / "out" / f"model-{kind}.gguf")
    assert agree(reader, trained.prompts[:3], first).apart <= tolerance
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(reader.model).tensors}
    assert stored["blk.0.attn_q.weight"] == kind.upper()
    assert stored["output_norm.weight"] == "F32"


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
def test_rows_in_another_order_would_be_found(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gguf_architectures.ARCHITECTURES["llama"]
    monkeypatch.setitem(
        gguf_architectures.ARCHITECTURES, "llama", dataclasses.replace(right, permuted=False)
    )
    export(Order(trained.adapter, "gguf", trained.model, tmp_path / "out", "f32"))
    reader = LlamaCpp(tmp_path / "out" / "model-f32.gguf")
    assert not agree(reader, trained.prompts, trained.steps).met


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("gemma3", {"query_pre_attn_scalar": 64}, "gemma3 without a query_pre_attn_scalar"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "without soft caps"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "full attention than each sixth"),
        ("qwen2", {"hidden_act": "relu"}, "qwen2 without activation relu"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, "without sliding windows"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type yarn"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    kind: str, changes: dict[str, Any], told: str
) -> None:
    configuration, own, _ = tiny_models.KINDS[kind]
    config = configuration(**{**own, **changes})
    with pytest.raises(ArtefactError, match=told):
        gguf_architectures.architecture_of(config)


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(ArtefactError, match="qwen2 and qwen3, found a model of type gpt2"):
        gguf_architectures.architecture_of(transformers.GPT2Config())
