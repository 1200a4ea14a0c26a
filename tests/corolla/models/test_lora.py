import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from corolla.errors import ArtefactError, ModelError
from corolla.models.files import adapter_files
from corolla.models.lora import LoraModel
from corolla.models.pretrained import Base
from corolla.types import Adapter, LoraSpec, Params
from tests.strategies import tiny

SPEC = LoraSpec(4, 6.0)
STABLE = LoraSpec(4, 6.0, rslora=True)


@pytest.fixture(scope="module", params=tiny.KINDS)
def model(request: pytest.FixtureRequest) -> LoraModel:
    """Shared: every test writes what it needs, which is what `write` promises to allow."""
    return tiny.lora_model(request.param)


@pytest.fixture(scope="module")
def llama() -> LoraModel:
    return tiny.lora_model("llama")


@pytest.fixture(scope="module")
def bert() -> LoraModel:
    return tiny.lora_model("bert")


def layers(model: LoraModel) -> Iterator[tuple[str, Any]]:
    for name, module in model.model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def plain(model: LoraModel) -> transformers.PreTrainedModel:
    """A fresh copy of the base, no peft near it."""
    return tiny.base(model.base.name).model


def merged(model: LoraModel, deltas: Params) -> transformers.PreTrainedModel:
    """The base with dense deltas (out, in) added to its weights, and to its head."""
    fresh = plain(model)
    with torch.no_grad():
        for name, delta in deltas.items():
            if name.startswith("classifier"):
                fresh.get_parameter(name).add_(delta.float())
                continue
            module = fresh.get_submodule(name)
            added = delta.T if type(module).__name__ == "Conv1D" else delta
            module.weight.copy_((module.weight.double() + added).float())
    return fresh


def dense(params: Params, scaling: float = 1.0) -> dict[str, Tensor]:
    """s · B · A by name of the module."""
    modules = [n.removesuffix(".lora_A") for n in params if n.endswith(".lora_A")]
    return {
        n: scaling * (params[n + ".lora_B"].double() @ params[n + ".lora_A"].double())
        for n in modules
    }


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# Effective weights


@pytest.mark.parametrize("spec", [SPEC, STABLE, LoraSpec(8, 3.0), LoraSpec(1, 1.0)])
def test_effective_weights_are_pefts(model: LoraModel, spec: LoraSpec) -> None:
    model.write(tiny.adapter(model, spec, 1), spec)
    ours = model.deltas()
    checked = 0
    for name, layer in layers(model):
        theirs = layer.get_delta_weight("default").detach().double()
        theirs = theirs.T if layer.fan_in_fan_out else theirs
        assert ours[name].shape == model.shapes[name]
        assert tiny.relative({name: ours[name]}, {name: theirs}) < 1e-6
        checked += 1
    assert checked == len(model.shapes) > 0


def test_covers_grouped_queries_conv1d_and_tied_embeddings() -> None:
    models = {kind: tiny.lora_model(kind) for kind in tiny.KINDS}
    assert models["llama"].shapes["model.layers.0.self_attn.k_proj"] == (16, 32)
    assert models["gpt2"].shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert models["gpt2"].shapes["transformer.h.0.mlp.c_proj"] == (32, 128)
    tied = plain(models["llama"])
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert not any("lm_head" in name for m in models.values() for name in m.shapes)


def test_logits_are_those_of_the_merged_weights(model: LoraModel) -> None:
    params = tiny.adapter(model, STABLE, 1)
    model.write(params, STABLE)
    assert far(tiny.logits(model.model), tiny.logits(merged(model, model.deltas()))) < 1e-5
    assert far(tiny.logits(model.model), tiny.logits(plain(model))) > 1e-3


def test_frozen_blocks_are_a_dense_delta_on_the_base(model: LoraModel) -> None:
    blocks = [tiny.block(model, 3, 2), tiny.block(model, 7, 3)]
    model.write(model.init(SPEC, 0), SPEC, blocks)
    first, second = (dense(block) for block in blocks)
    wanted = tiny.logits(merged(model, {n: first[n] + second[n] for n in first}))
    assert far(tiny.logits(model.model), wanted) < 1e-5


def test_frozen_blocks_and_an_adapter_add_up(model: LoraModel) -> None:
    block, params = tiny.block(model, 3, 2), tiny.adapter(model, SPEC, 1)
    model.write(params, SPEC, [block])
    own, frozen = dense(params, 6.0 / 4), dense(block)
    wanted: dict[str, Tensor] = {n: own[n] + frozen[n] for n in own}
    start = model.init(SPEC, 0)
    wanted |= {n: params[n] - start[n] for n in params if n.startswith("classifier")}
    assert tiny.relative(model.deltas(), wanted) < 1e-7
    assert far(tiny.logits(model.model), tiny.logits(merged(model, wanted))) < 1e-5


def test_a_fresh_adapter_changes_nothing(model: LoraModel) -> None:
    model.write(model.init(SPEC, 5), SPEC)
    assert torch.equal(tiny.logits(model.model), tiny.logits(plain(model)))


def test_frozen_blocks_in_use_are_reported_as_one(llama: LoraModel) -> None:
    blocks = [tiny.block(llama, 3, 2), tiny.block(llama, 2, 3)]
    llama.write(llama.init(SPEC, 0), SPEC, blocks)
    (stack,) = llama.frozen
    first, second = (dense(block) for block in blocks)
    assert tiny.relative(dense(stack), {n: first[n] + second[n] for n in first}) < 1e-12
    llama.write(llama.init(SPEC, 0), SPEC)
    assert llama.frozen == ()


def test_gradients_pass_the_frozen_blocks_but_do_not_reach_them(llama: LoraModel) -> None:
    """The gradient of B equals that of a model whose base weights hold the block."""
    block, start = tiny.block(llama, 3, 2), llama.init(SPEC, 1)

    def gradients(model: LoraModel, frozen: list[Params]) -> Params:
        model.write(start, SPEC, frozen)
        parameters = dict(model.parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        model.model(input_ids=tiny.IDS).logits.square().mean().backward()
        return {n: p.grad for n, p in parameters.items() if p.grad is not None}

    ours = gradients(llama, [block])
    dense_base = Base(merged(llama, dense(block)), llama.base.tokenizer, "causal", "m", "m")
    dense_base.model.requires_grad_(False)
    theirs = gradients(LoraModel(dense_base), [])
    assert ours.keys() == theirs.keys()
    assert tiny.relative(ours, theirs) < 1e-5
    assert all(p.grad is None for n, p in llama.model.named_parameters() if "lora_" not in n)


# Write and read


def test_reads_what_was_written(model: LoraModel) -> None:
    params = tiny.adapter(model, SPEC, 1)
    model.write(params, SPEC)
    assert tiny.same(model.read(), params)
    assert [name for name, _ in model.parameters()] == sorted(params)


def test_reading_and_writing_copy(model: LoraModel) -> None:
    params = tiny.adapter(model, SPEC, 1)
    kept = {n: t.clone() for n, t in params.items()}
    model.write(params, SPEC)
    for tensor in model.read().values():
        tensor.zero_()
    assert tiny.same(model.read(), kept)
    for _, parameter in model.parameters():
        parameter.data.zero_()
    assert tiny.same(params, kept)


def test_rank_changes_on_the_resident_model(model: LoraModel) -> None:
    for spec in (LoraSpec(8, 2.0), LoraSpec(2, 16.0), LoraSpec(16, 16.0), SPEC):
        params = tiny.adapter(model, spec, spec.rank)
        model.write(params, spec)
        wanted = dense(params, spec.alpha / spec.rank)
        got = {n: model.deltas()[n] for n in wanted}
        assert tiny.relative(got, wanted) < 1e-7
        assert far(tiny.logits(model.model), tiny.logits(merged(model, model.deltas()))) < 1e-5


def test_nothing_of_the_client_before_is_left(model: LoraModel) -> None:
    params = tiny.adapter(model, SPEC, 1)
    model.write(params, SPEC)
    alone, weights = tiny.logits(model.model), model.deltas()
    other = LoraSpec(8, 32.0, rslora=True)
    model.write(tiny.adapter(model, other, 2), other, [tiny.block(model, 5, 3)])
    for _, buffer in model.model.named_buffers():
        buffer.add_(1)
    for _, parameter in model.parameters():
        parameter.data.add_(1.0)
    model.write(params, SPEC)
    assert torch.equal(tiny.logits(model.model), alone)
    assert tiny.same(model.deltas(), weights)


def test_buffers_are_restored() -> None:
    base = tiny.base("llama")
    base.model.register_buffer("seen", torch.arange(3.0))
    model = LoraModel(base)
    held = dict(model.model.named_buffers())
    before = {n: b.clone() for n, b in held.items()}
    assert any(name.endswith("seen") for name in held)
    for tensor in held.values():
        tensor.add_(1)
    model.write(model.init(SPEC, 0), SPEC)
    assert tiny.same(dict(model.model.named_buffers()), before)


def test_base_weights_stay_as_they_are(model: LoraModel) -> None:
    model.write(tiny.adapter(model, SPEC, 1), SPEC, [tiny.block(model, 5, 3)])
    tiny.logits(model.model)
    wanted = dict(plain(model).named_parameters())
    own = model.model.base_model.model.state_dict()
    seen = 0
    for name, tensor in own.items():
        original = name.replace(".base_layer", "").replace("original_module.", "")
        if original in wanted and "lora_" not in name:
            assert torch.equal(tensor, wanted[original]), name
            seen += 1
    assert seen >= len(wanted)


Change = Callable[[dict[str, Tensor]], object]
FIRST = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop(FIRST + ".lora_A"), r"1 tensors, first '.*down_proj.lora_A'"),
        (lambda p: p.update(typo=torch.zeros(1)), "1 tensors, first 'typo'"),
        (
            lambda p: p.update({FIRST + ".lora_A": torch.zeros(4, 47)}),
            "down_proj do not have rank 4",
        ),
        (
            lambda p: p.update({FIRST + ".lora_B": torch.zeros(31, 4)}),
            "down_proj do not have rank 4",
        ),
        (
            lambda p: p.update({FIRST + ".lora_A": torch.zeros(5, 48)}),
            "down_proj do not have rank 4",
        ),
    ],
)
def test_write_refuses_what_does_not_fit(llama: LoraModel, change: Change, message: str) -> None:
    params = dict(llama.init(SPEC, 0))
    change(params)
    with pytest.raises(ValueError, match=message):
        llama.write(params, SPEC)


def test_write_refuses_a_head_of_another_shape(bert: LoraModel) -> None:
    params = {**bert.init(SPEC, 0), "classifier.bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"classifier.bias has shape \(4,\)"):
        bert.write(params, SPEC)
    without = {n: t for n, t in bert.init(SPEC, 0).items() if n != "classifier.bias"}
    with pytest.raises(ValueError, match=r"first 'classifier.bias'"):
        bert.write(without, SPEC)


def test_write_refuses_factors_of_another_rank(llama: LoraModel) -> None:
    with pytest.raises(ValueError, match="do not have rank 8"):
        llama.write(llama.init(SPEC, 0), LoraSpec(8, 8.0))


# Fresh adapters


def test_init_depends_on_its_seed_alone(model: LoraModel) -> None:
    torch.random.manual_seed(1)
    one = model.init(SPEC, 3)
    torch.random.manual_seed(2)
    assert tiny.same(one, tiny.lora_model(model.base.name).init(SPEC, 3))
    other = model.init(SPEC, 4)
    for name in one:
        assert torch.equal(one[name], other[name]) == (not name.endswith(".lora_A")), name


def test_global_random_state_is_left_alone() -> None:
    base = tiny.base("llama")
    before = torch.get_rng_state()
    model = LoraModel(base)
    model.write(model.init(SPEC, 0), SPEC)
    assert torch.equal(torch.get_rng_state(), before)


def test_init_is_pefts_distribution(llama: LoraModel) -> None:
    """Uniform in ±1 / √in (torch.nn.init.kaiming_uniform_ with a = √5), B zero."""
    spec = LoraSpec(16, 16.0)
    params = llama.init(spec, 0)
    reference = torch.empty(16, 48)
    nn.init.kaiming_uniform_(reference, a=5**0.5, generator=torch.Generator().manual_seed(0))
    a = params[FIRST + ".lora_A"]
    assert a.shape == reference.shape
    assert float(a.abs().max()) <= 48**-0.5
    assert float(a.std()) == pytest.approx(float(reference.std()), rel=0.1)
    assert abs(float(a.mean())) < 0.02
    assert all(not t.any() for n, t in params.items() if n.endswith(".lora_B"))
    drawn = [t.flatten()[:8] for n, t in params.items() if n.endswith(".lora_A")]
    assert len({tuple(t.tolist()) for t in drawn}) == len(drawn)  # modules do not share a stream


def test_init_holds_the_head_of_the_base(bert: LoraModel) -> None:
    bert.write(tiny.adapter(bert, SPEC, 1), SPEC)
    wanted = {n: p for n, p in plain(bert).named_parameters() if n.startswith("classifier")}
    found = {n: t for n, t in bert.init(SPEC, 0).items() if n.startswith("classifier")}
    assert len(wanted) == 2
    assert tiny.same(found, wanted)


# Targets and ranks


@pytest.mark.parametrize(("rank", "fits"), [(16, True), (17, False), (100, False)])
def test_a_rank_beyond_a_module_is_refused(llama: LoraModel, rank: int, fits: bool) -> None:
    if fits:
        llama.check_rank(LoraSpec(rank, 1.0))
        return
    with pytest.raises(ModelError, match=rf"rank {rank} is larger than module .* at most (16|32)"):
        llama.check_rank(LoraSpec(rank, 1.0))


def test_targets_are_suffixes_of_module_names() -> None:
    assert set(LoraModel(tiny.base("llama"), ["q_proj", "self_attn.v_proj"]).shapes) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
    }


def test_targets_that_match_nothing_name_what_there_is() -> None:
    with pytest.raises(ModelError, match=r"c_atn match nothing in gpt2: .* c_attn, c_fc, c_proj"):
        LoraModel(tiny.base("gpt2"), ["c_atn"])


def test_one_target_of_several_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"v_prj match"):
        LoraModel(tiny.base("llama"), ["q_proj", "v_prj"])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_target_that_cannot_carry_lora_is_an_error(target: str) -> None:
    base = tiny.base("llama")
    with pytest.raises(ModelError, match=target):
        LoraModel(base, ["q_proj", target])


def test_a_head_is_not_a_target_even_when_its_layers_have_the_names_of_others() -> None:
    """RoBERTa's head has a layer `dense`, as its blocks have."""
    config = transformers.RobertaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=40,
        num_labels=3,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        roberta = transformers.RobertaForSequenceClassification(config).eval()
    fresh = copy.deepcopy(roberta)
    model = LoraModel(Base(roberta, tiny.base("bert").tokenizer, "classify", "r", "r"))
    assert not any(name.startswith("classifier") for name in model.shapes)
    params = tiny.adapter(model, SPEC, 1)
    assert {n for n in params if n.startswith("classifier")} == {
        f"classifier.{layer}.{part}"
        for layer in ("dense", "out_proj")
        for part in ("weight", "bias")
    }
    model.write(params, SPEC)
    with torch.no_grad():
        for name, delta in model.deltas().items():
            target = name if name.startswith("classifier") else name + ".weight"
            fresh.get_parameter(target).add_(delta.float())
    assert far(tiny.logits(model.model), tiny.logits(fresh)) < 1e-5


# Saving


def reloaded(model: LoraModel, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(plain(model), str(folder)).eval()


@pytest.mark.parametrize("spec", [SPEC, STABLE, LoraSpec(3, 2.5)])
def test_peft_loads_a_saved_adapter(model: LoraModel, spec: LoraSpec, tmp_path: Path) -> None:
    params = tiny.adapter(model, spec, 1)
    model.write(params, spec)
    model.save(tmp_path / "adapter", Adapter(params), spec)
    theirs = reloaded(model, tmp_path / "adapter")
    assert far(tiny.logits(theirs), tiny.logits(model.model)) < 1e-6
    for name, delta in tiny.peft_weights(theirs).items():
        assert far(delta, tiny.peft_weights(model.model)[name]) == 0.0


@pytest.mark.parametrize("ranks", [(3,), (5, 9), (40, 30)])
def test_peft_loads_frozen_blocks_and_an_adapter(
    model: LoraModel, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    """(40, 30) is beyond the full rank, so it is compacted."""
    params = tiny.adapter(model, STABLE, 1)
    blocks = tuple(tiny.block(model, rank, rank) for rank in ranks)
    model.write(params, STABLE, blocks)
    model.save(tmp_path / "adapter", Adapter(params, blocks), STABLE)
    assert far(tiny.logits(reloaded(model, tmp_path / "adapter")), tiny.logits(model.model)) < 1e-5


def test_peft_loads_frozen_blocks_without_an_adapter(model: LoraModel, tmp_path: Path) -> None:
    head = {n: t for n, t in tiny.adapter(model, SPEC, 1).items() if n.startswith("classifier")}
    blocks = (tiny.block(model, 5, 1),)
    model.show(Adapter(head, blocks), SPEC)
    model.save(tmp_path / "adapter", Adapter(head, blocks), SPEC)
    assert far(tiny.logits(reloaded(model, tmp_path / "adapter")), tiny.logits(model.model)) < 1e-5


@pytest.mark.parametrize("spec", [SPEC, STABLE])
@pytest.mark.parametrize("trained", [True, False])
def test_peft_loads_residuals_at_the_scaling_of_the_adapter(
    model: LoraModel, spec: LoraSpec, trained: bool, tmp_path: Path
) -> None:
    """W + F + s (B A + R₁ + R₂); with more rank in all than the modules have."""
    own = tiny.adapter(model, spec, 1) if trained else {}
    residuals = (tiny.block(model, 3, 2), tiny.block(model, 17, 3))
    frozen = tiny.block(model, 16, 4)
    whole = Adapter(own, (frozen,), residuals=residuals)
    deltas = dense(own, spec.scaling)
    for params, scaling in ((frozen, 1.0), *((r, spec.scaling) for r in residuals)):
        for name, product in dense(params, scaling).items():
            deltas[name] = deltas.get(name, 0) + product
    start = model.init(spec, 0)
    deltas |= {n: own[n] - start[n] for n in own if n.startswith("classifier")}
    model.show(whole, spec)
    wanted = tiny.logits(merged(model, deltas))
    assert far(tiny.logits(model.model), wanted) < 1e-4
    model.save(tmp_path / "adapter", whole, spec)
    assert far(tiny.logits(reloaded(model, tmp_path / "adapter")), wanted) < 1e-4
    assert model.distance_to(tmp_path / "adapter", spec) < 1e-6


def test_an_empty_adapter_is_saved_as_the_base_model(model: LoraModel, tmp_path: Path) -> None:
    start = {n: t for n, t in model.init(SPEC, 0).items() if n.startswith("classifier")}
    model.save(tmp_path / "adapter", Adapter(start), SPEC)
    theirs = tiny.logits(reloaded(model, tmp_path / "adapter"))
    assert torch.equal(theirs, tiny.logits(plain(model)))


def test_the_head_is_saved_and_loaded(bert: LoraModel, tmp_path: Path) -> None:
    params = tiny.adapter(bert, SPEC, 1)
    bert.save(tmp_path / "adapter", Adapter(params), SPEC)
    head = reloaded(bert, tmp_path / "adapter").base_model.model.classifier.modules_to_save.default
    assert torch.equal(head.weight, params["classifier.weight"])
    assert torch.equal(head.bias, params["classifier.bias"])


def test_a_saved_adapter_has_one_rank_and_names_its_base(llama: LoraModel, tmp_path: Path) -> None:
    """Modules below the full rank are padded: tools without per-module ranks read it right."""
    blocks = (tiny.block(llama, 40, 1),)
    llama.save(tmp_path / "adapter", Adapter({}, blocks), SPEC)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (32, 32, False)
    assert not settings.get("rank_pattern")
    assert not settings.get("alpha_pattern")
    assert adapter_files.base_of(tmp_path / "adapter") == "llama"
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {t.shape[0 if "lora_A" in n else 1] for n, t in tensors.items()}
    assert ranks == {32}


def test_saving_replaces_what_was_there(llama: LoraModel, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    for seed in (1, 2):
        llama.save(folder, Adapter(tiny.adapter(llama, SPEC, seed)), SPEC)
        (folder / "stray").touch()
    llama.save(folder, Adapter(tiny.adapter(llama, SPEC, 1)), SPEC)
    assert not (folder / "stray").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    again = tmp_path / "again"
    llama.save(again, Adapter(tiny.adapter(llama, SPEC, 1)), SPEC)
    assert adapter_files.adapter_hash(folder) == adapter_files.adapter_hash(again)
    llama.save(again, Adapter(tiny.adapter(llama, SPEC, 2)), SPEC)
    assert adapter_files.adapter_hash(folder) != adapter_files.adapter_hash(again)


def test_saving_leaves_the_model_as_it_was(llama: LoraModel, tmp_path: Path) -> None:
    llama.write(tiny.adapter(llama, SPEC, 1), SPEC, [tiny.block(llama, 3, 1)])
    before = tiny.logits(llama.model)
    llama.save(tmp_path / "adapter", Adapter(tiny.adapter(llama, SPEC, 2)), SPEC)
    assert torch.equal(tiny.logits(llama.model), before)


def test_load_adapter_and_merge_give_the_same_logits(model: LoraModel, tmp_path: Path) -> None:
    params = tiny.adapter(model, SPEC, 1)
    model.write(params, SPEC)
    model.save(tmp_path / "adapter", Adapter(params), SPEC)
    loaded = adapter_files.load_adapter(plain(model), tmp_path / "adapter")
    assert far(tiny.logits(loaded), tiny.logits(model.model)) < 1e-6
    assert far(tiny.logits(adapter_files.merge(loaded)), tiny.logits(model.model)) < 1e-5


def test_detach_gives_the_plain_base_back(model: LoraModel) -> None:
    own = tiny.lora_model(model.base.name)
    own.write(tiny.adapter(own, SPEC, 1), SPEC, [tiny.block(own, 3, 1)])
    detached = own.detach()
    assert torch.equal(tiny.logits(detached), tiny.logits(plain(model)))
    assert {n for n, _ in detached.named_parameters()} == {
        n for n, _ in plain(model).named_parameters()
    }


def test_a_folder_that_is_no_adapter_is_an_error(llama: LoraModel, tmp_path: Path) -> None:
    for load in (adapter_files.adapter_hash, adapter_files.base_of):
        with pytest.raises(ArtefactError, match="is no adapter"):
            load(tmp_path)
    with pytest.raises(ArtefactError, match="is no adapter"):
        adapter_files.load_adapter(plain(llama), tmp_path)


def test_an_adapter_of_another_model_is_an_error(llama: LoraModel, tmp_path: Path) -> None:
    llama.save(tmp_path / "adapter", Adapter(tiny.adapter(llama, SPEC, 1)), SPEC)
    with pytest.raises(ArtefactError, match="cannot load adapter"):
        adapter_files.load_adapter(tiny.base("gpt2").model, tmp_path / "adapter")


def test_dropout_acts_in_training_alone() -> None:
    model = tiny.lora_model("llama", dropout=0.5)
    params = tiny.adapter(model, SPEC, 1)
    model.write(params, SPEC)
    assert torch.equal(tiny.logits(model.model), tiny.logits(model.model))
    model.model.train()
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(tiny.logits(model.model), tiny.logits(model.model))
