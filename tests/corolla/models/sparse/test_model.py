from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from corolla.client.training.first_order import FirstOrder
from corolla.errors import ModelError
from corolla.models.files import adapter_files
from corolla.models.sparse import places
from corolla.models.sparse_model import SparseModel
from corolla.types import Adapter
from tests.corolla.models import test_dense
from tests.corolla.models.sparse.federations import (
    RANK,
    SPEC,
    moved,
    scattered,
    settings,
    sparse,
    weights,
)
from tests.strategies import tiny

KINDS = ("llama", "gpt2", "bert")


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_values_of_each_module_are_trained_as_lora_has(kind: str) -> None:
    model, lora = sparse(kind), tiny.lora_model(kind)
    fresh = model.init(SPEC, 0)
    wanted = {f"{name}.delta": (RANK * sum(shape),) for name, shape in lora.shapes.items()}
    found = {n: tuple(t.shape) for n, t in fresh.items() if n.endswith(".delta")}
    assert found == wanted
    assert list(dict(model.parameters())) == sorted(fresh)
    heads = {n for n in fresh if not n.endswith(".delta")}
    assert heads == ({"classifier.weight", "classifier.bias"} if kind == "bert" else set())


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_base_and_what_is_not_trained_stays_it_bit_for_bit(kind: str) -> None:
    """B-T1 on the model."""
    wanted, base = (
        tiny.logits(tiny.base(kind).model),
        dict(tiny.base(kind).model.named_parameters()),
    )
    model = sparse(kind)
    params = moved(model)
    model.write(params, SPEC)
    tiny.logits(model.model)
    assert all(torch.equal(t, scattered(kind, model, params)[n]) for n, t in weights(model).items())
    for name, at in model.places.items():
        now = model.base.model.get_submodule(name).weight.detach().view(-1).clone()
        assert int((now[at] != base[f"{name}.weight"].view(-1)[at]).sum()) == len(at)
        now[at] = base[f"{name}.weight"].view(-1)[at]
        assert torch.equal(now, base[f"{name}.weight"].view(-1))
    model.write(model.init(SPEC, 0), SPEC)
    assert torch.equal(tiny.logits(model.model), wanted)


def test_other_places_leave_nothing_at_those_before() -> None:
    model = sparse("llama")
    model.write(moved(model), SPEC)
    tiny.logits(model.model)
    chosen = places.random(model.sizes, model.counts, 99)
    model.hold(places.packed(chosen, model.sizes))
    assert all(torch.equal(model.places[n], at) for n, at in chosen.items())
    params = moved(model, 2)
    model.write(params, SPEC)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, scattered("llama", model, params)[name])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_whole_matrices_at_the_places(kind: str) -> None:
    """B-T2: against plain autograd on a model whose weights are written out, bit for bit."""
    model = sparse(kind)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    start, batch = moved(model), test_dense.batch_of(kind)
    leaves = {n: t.requires_grad_() for n, t in scattered(kind, model, start).items()}
    plain = tiny.base(kind).model
    functional_call(plain, leaves, kwargs=test_dense.padded(batch)).loss.backward()
    model.write(start, SPEC)
    for _, parameter in model.parameters():
        parameter.requires_grad_(True)
    model.model(**test_dense.padded(batch)).loss.backward()
    for name, parameter in model.parameters():
        assert parameter.grad is not None
        module = name.removesuffix(".delta")
        if module in model.places:
            whole = leaves[f"{module}.weight"].grad
            assert whole is not None
            assert whole.abs().max() > 1e-4
            assert torch.equal(parameter.grad, whole.view(-1)[model.places[module]]), name
        else:
            head = leaves[name].grad
            assert head is not None
            assert torch.equal(parameter.grad, head), name
    assert not any(own.grad is not None for own in model.originals.values())


def test_a_step_of_training_is_one_on_the_changes() -> None:
    model = sparse("llama")
    start, batch = moved(model), test_dense.batch_of("llama")
    config = settings(optimizer="sgd", lr=0.5, local_steps=2, batch_size=2, micro_batch_size=1)
    for checkpointing in (False, True):
        if checkpointing:
            model.model.activation_checkpointing_enable()
        fit = FirstOrder(model, SPEC, batch, config, 0, 1).fit(start)
        leaves = {n: t.requires_grad_() for n, t in scattered("llama", model, fit.params).items()}
        assert all(
            torch.equal(tensor, leaves[name].detach()) for name, tensor in weights(model).items()
        )
        if not checkpointing:
            first = fit.params
    assert all(torch.equal(first[n], t) for n, t in fit.params.items())
    assert max(float((t - start[n]).abs().max()) for n, t in first.items()) > 1e-4


def test_plain_peft_loads_the_adapter_with_the_same_logits(tmp_path: Path) -> None:
    """B-T4, and B-T1 in the artefact: on a base that this model has not touched."""
    for kind in ("llama", "bert"):
        model = sparse(kind)
        params = moved(model)
        model.save(tmp_path / kind, Adapter(params), SPEC)
        assert model.artefact == "adapter"
        assert model.distance_to(tmp_path / kind, SPEC) == 0.0
        wanted = tiny.logits(model.model)
        theirs = PeftModel.from_pretrained(tiny.base(kind).model, str(tmp_path / kind)).eval()
        with cast(Any, torch.sparse.check_sparse_tensor_invariants)():  # torch wants to be told
            assert torch.equal(tiny.logits(theirs), wanted)
            merged = theirs.merge_and_unload(safe_merge=True)
        whole = scattered(kind, model, params)
        found = dict(merged.named_parameters())
        assert all(torch.equal(found[f"{n}.weight"], whole[f"{n}.weight"]) for n in model.sizes)


def test_a_model_of_other_layers_is_saved_whole(tmp_path: Path) -> None:
    model = sparse("gpt2")
    params = moved(model)
    model.save(tmp_path / "model", Adapter(params), SPEC)
    assert model.artefact == "model"
    assert model.distance_to(tmp_path / "model", SPEC) == 0.0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(tiny.logits(theirs), tiny.logits(model.model))
    whole = scattered("gpt2", model, params)
    assert all(torch.equal(t, whole[n]) for n, t in theirs.named_parameters())


def test_a_saved_adapter_of_another_update_is_told_apart(tmp_path: Path) -> None:
    model = sparse("llama")
    model.save(tmp_path / "one", Adapter(moved(model)), SPEC)
    model.write(moved(model, 2), SPEC)
    assert model.distance_to(tmp_path / "one", SPEC) > 0.1
    model.write(moved(model), SPEC)
    assert model.distance_to(tmp_path / "one", SPEC) == 0.0
    other = sparse("llama", seed=1)
    other.write(moved(other), SPEC)
    assert other.distance_to(tmp_path / "one", SPEC) == float("inf")
    assert model.digest(tmp_path / "one") == adapter_files.adapter_hash(tmp_path / "one")


def test_blocks_and_targets_can_be_chosen() -> None:
    model = SparseModel(tiny.base("llama", blocks=3), RANK, ["q_proj", "down_proj"], "last:1")
    names = {"model.layers.2.self_attn.q_proj.delta", "model.layers.2.mlp.down_proj.delta"}
    assert model.init(SPEC, 0).keys() == names
    assert model.targets == ["q_proj", "down_proj"]


def test_bases_and_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="rank 11 asks for"):
        sparse("llama", 11)
    base = tiny.base("llama")
    base.model.bfloat16()
    with pytest.raises(ModelError, match=r"needs a base in float32, found torch\.bfloat16"):
        SparseModel(base, RANK)
    with pytest.raises(ValueError, match="update differs from the model in 1 tensors"):
        model = sparse("llama")
        model.write({**model.init(SPEC, 0), "more": torch.zeros(1)}, SPEC)
