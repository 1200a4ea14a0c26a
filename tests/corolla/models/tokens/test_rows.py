"""Rows of tokens of a run's own are those of plain peft, and of a table in which they are put."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from corolla.artefacts.adapters import read_lora
from corolla.client.training.first_order import FirstOrder
from corolla.commands import artefacts
from corolla.commands.export.merged import export_merged
from corolla.commands.simulate.in_process import simulate
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded
from corolla.errors import ArtefactError, ConfigError, ModelError
from corolla.estimates import footprint
from corolla.models import anatomy, pretrained, trainable
from corolla.models.files import adapter_files
from corolla.models.lora import LoraModel
from corolla.models.tokens import rows
from corolla.types import Adapter, LoraSpec, Params
from tests.conftest import byte_tokenizer
from tests.strategies import tiny

SPEC = LoraSpec(2, 3.0)
TOKENS = [60, 5]
DELTA = "token_adapter.trainable_tokens_delta"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = [Encoded((5, 9, 60, 7 + i, 8), (5, 9, 60, 7 + i, 8)) for i in range(3)]


def plain(tied: bool) -> PreTrainedModel:
    """The tiny Llama, with an output layer of its own unless it is tied."""
    model = tiny.base("llama").model
    if tied:
        return model
    model.config.tie_word_embeddings = False
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(8)
        return transformers.LlamaForCausalLM(model.config).eval().requires_grad_(False)


def built(tied: bool, tokens: Sequence[int] = TOKENS) -> LoraModel:
    return LoraModel(replace(tiny.base("llama"), model=plain(tied)), tokens=tokens)


def moved(model: LoraModel) -> Params:
    draw = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in model.init(SPEC, 0).items()
    }


def by_peft(tied: bool, params: Params) -> Any:
    """The model as a user of peft alone would make it."""
    tables = {"embed_tokens": TOKENS} | ({} if tied else {"lm_head": TOKENS})
    config = LoraConfig(
        r=2, lora_alpha=3.0, target_modules=LINEAR, trainable_token_indices=tables,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), adapter_files.peft_speaks_to_transformers():
        made = get_peft_model(plain(tied), config).eval()
    with torch.no_grad():
        for name, parameter in trained(made).items():
            parameter.copy_(params[name])
    return made


def trained(made: Any) -> dict[str, torch.nn.Parameter]:
    named = made.base_model.model.named_parameters()
    short = {n.replace(".default", "").removesuffix(".weight"): p for n, p in named}
    return {name: p for name, p in short.items() if ".lora_" in name or DELTA in name}


@pytest.mark.parametrize("tied", [True, False])
def test_rows_take_the_place_of_those_of_the_tables(tied: bool, tmp_path: Path) -> None:
    model = built(tied)
    untouched = tiny.logits(plain(tied))
    model.write(model.init(SPEC, 0), SPEC)
    assert torch.equal(tiny.logits(model.model), untouched)
    params = moved(model)
    wanted = {f"model.embed_tokens.{DELTA}"} | (set() if tied else {f"lm_head.{DELTA}"})
    assert {name for name in params if ".lora_" not in name} == wanted
    model.write(params, SPEC)
    found = tiny.logits(model.model)
    torch.testing.assert_close(found, tiny.logits(by_peft(tied, params)), rtol=0, atol=1e-5)
    # By hand: the same factors on a model in which the rows are put.
    other = plain(tied)
    with torch.no_grad():
        for name in wanted:
            module = other.get_submodule(name.removesuffix(f".{DELTA}"))
            module.weight[TOKENS] = params[name]
    without = LoraModel(replace(tiny.base("llama"), model=other))
    without.write({n: t for n, t in params.items() if n not in wanted}, SPEC)
    torch.testing.assert_close(tiny.logits(without.model), found, rtol=0, atol=1e-5)
    assert float((found - untouched).abs().max()) > 0.1
    model.save(tmp_path / "adapter", Adapter(params), SPEC)
    assert model.distance_to(tmp_path / "adapter", SPEC) < 1e-7
    loaded = adapter_files.load_adapter(plain(tied), tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(loaded), found, rtol=0, atol=1e-5)
    merged = adapter_files.merge(loaded)
    torch.testing.assert_close(tiny.logits(merged), found, rtol=0, atol=1e-5)
    detached = model.detach()
    assert torch.equal(tiny.logits(detached), untouched)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_plain_peft(tied: bool) -> None:
    """One step of SGD at rate 1 is the gradient; that of a tied row comes from both its uses."""
    model = built(tied)
    start = moved(model)
    config = tiny.config(
        "fedavg", optimizer="sgd", lr=1.0, local_steps=1, batch_size=3, clip_norm=None
    )
    fit = FirstOrder(model, SPEC, BATCH, config, 0, 1).fit(start)
    oracle = by_peft(tied, start)
    ids = torch.tensor([own.input_ids for own in BATCH])
    oracle(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in trained(oracle).items():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 1e-4 or "lora" in name
        found = start[name] - fit.params[name]
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=2e-6)


def test_rows_are_trained_in_fp32_whatever_the_base_is() -> None:
    base = tiny.base("llama")
    base.model.bfloat16()
    model = LoraModel(base, tokens=TOKENS)
    params = {n: t + 1e-6 for n, t in model.init(SPEC, 0).items()}
    model.write(params, SPEC)
    assert all(t.dtype == torch.float32 for t in model.read().values())
    assert torch.equal(
        model.read()[f"model.embed_tokens.{DELTA}"], params[f"model.embed_tokens.{DELTA}"]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with rows for more tokens than its tokenizer has."""
    from corolla.commands.check import tiny_models
    from corolla.commands.check.tiny_models import Size

    made = tmp_path_factory.mktemp("spare") / "model"
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        size = Size(vocabulary=264, hidden=16, intermediate=24, layers=1, positions=128)
        tiny_models.llama(size, initializer_range=0.2, pad_token_id=1).save_pretrained(made)
    byte_tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    made = [
        {"client_id": name, "prompt": f"{name} {i}?", "response": f"<tool>{'ab' * (i % 5)}</tool>"}
        for name in ("ada", "ben", "cyd")
        for i in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_the_formula_counts_the_rows(folder: Path) -> None:
    config = RunConfig(
        model=str(folder), new_tokens=["<tool>", "</tool>"], rank=2, max_length=16, device="cpu"
    )
    base = pretrained.load(config)
    assert base.tokenizer("<tool>")["input_ids"] == [258]
    model = trainable.build(config, base)
    shapes = footprint.trained_shapes(anatomy.read(str(folder)), config)
    assert shapes == {n: tuple(t.shape) for n, t in model.init(config.lora, 0).items()}
    assert (2, 16) in shapes.values()
    assert len(pretrained.load_tokenizer(str(folder), added=["<tool>"])) == 259


def test_a_model_without_rows_for_them_is_refused(folder: Path) -> None:
    many = [f"<{i}>" for i in range(7)]
    config = RunConfig(model=str(folder), new_tokens=many, max_length=16, device="cpu")
    with pytest.raises(ModelError, match="265 tokens with them, the model rows for 264") as caught:
        trainable.build(config, pretrained.load(config))
    assert "resize_token_embeddings(265)" in str(caught.value)
    known = ["<eos>", "<pad>"]  # of the tokenizer's own: nothing is added
    found = pretrained.load(config.model_copy(update={"new_tokens": known}))
    assert rows.ids(found.tokenizer, known, found.model) == [0, 1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strategy": "fedsa_lora"}, "has no mean of rows of new-tokens"),
        ({"parameters": "bias"}, "trained beside LoRA adapters"),
        ({"quantization": "4bit"}, "a base in full, found 4bit"),
        ({"new_tokens": ["<a>", "<a>"]}, "names a token twice"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], says: str) -> None:
    from corolla.config import rules
    from corolla.config.build import build_strategy

    with pytest.raises(ConfigError, match=says) as caught:
        config = RunConfig(**{"new_tokens": ["<a>"], **settings})
        rules.refuse(config, build_strategy(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "fedavg"},
        {"dp": "example", "epsilon": 8.0},
    ],
    ids=str,
)
def test_a_run_ends_in_an_adapter_with_its_tokenizer(
    folder: Path, data: Path, settings: Callable[..., RunConfig], tmp_path: Path, changes: Any
) -> None:
    tokens = ["<tool>", "</tool>"]
    config = settings(
        model=str(folder), data=str(data), new_tokens=tokens, rounds=1, cohort=2, local_steps=1,
        max_length=24, **changes,
    )  # fmt: skip
    summary = simulate(config, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.convert_tokens_to_ids(tokens) == [258, 259]
    saved = adapter_files.read_adapter(adapter)[1]
    found = saved[f"model.embed_tokens.{DELTA}"]
    start = pretrained.load(config).model.get_input_embeddings().weight[[258, 259]]
    assert float((found - start).abs().max()) > 0
    scores = artefacts.evaluate_adapter(adapter, None, None)
    assert scores["adapter"]["loss"] == pytest.approx(summary.final["loss"], abs=1e-5)
    if changes == {"strategy": "fedavg"}:
        assert export_merged(adapter, None, tmp_path / "merged") < 1e-4
        own = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert own.convert_tokens_to_ids(tokens) == [258, 259]
        with pytest.raises(ArtefactError, match="only plain LoRA is known"):
            read_lora(adapter)
        card = (adapter / "README.md").read_text()
        assert 'tokenizer = AutoTokenizer.from_pretrained(".")' in card
        assert "plain LoRA alone: this adapter has rows of new tokens beside its factors." in card
        assert "import AutoModelForCausalLM, AutoTokenizer\n" in card
        assert "With PEFT, in this folder" in card
