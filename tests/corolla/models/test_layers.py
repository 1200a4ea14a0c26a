"""Which blocks carry an adapter: the numbers meant, the model, and what plain peft makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from corolla.errors import ModelError
from corolla.models import layers
from corolla.models.lora import LoraModel
from corolla.tensors import factors, units
from corolla.types import Adapter, LoraSpec, Params
from tests.strategies import tiny

SPEC = LoraSpec(4, 6.0)
COUNT = 3


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model(kind: str, blocks: str | None = None) -> LoraModel:
    return LoraModel(tiny.base(kind, COUNT), blocks=blocks)


def gradients(own: LoraModel, params: Params) -> Params:
    own.write(params, SPEC)
    trained = dict(own.parameters())
    for parameter in trained.values():
        parameter.requires_grad_(True)
    loss = own.model(input_ids=tiny.IDS).logits.square().mean()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("last:1", [5]),
        ("last:6", [0, 1, 2, 3, 4, 5]),
        ("first:2,last:2", [0, 1, 4, 5]),
        ("5,0,2-3,3", [0, 2, 3, 5]),
        ("first:4,2-4", [0, 1, 2, 3, 4]),
    ],
)
def test_blocks_are_counted_from_the_input(text: str, expected: list[int]) -> None:
    assert layers.numbers(text, range(6)) == expected


@pytest.mark.parametrize("text", ["last:7", "first:7", "6", "0-6", "3-2", "0,9"])
def test_blocks_that_there_are_not_are_named(text: str) -> None:
    with pytest.raises(ModelError, match=f"layers={text}: .* asks for blocks that are not there"):
        layers.numbers(text, range(6))


def test_blocks_of_a_class_are_counted_among_those_of_the_run() -> None:
    params = {f"h.{n}.q{role}" for n in (0, 4, 5) for role in (factors.A, factors.B)} | {"score"}
    outside = {"project_in" + role for role in (factors.A, factors.B)}
    found = layers.trained(params | outside, "first:1,last:1")
    assert found == {name for name in params if ".4." not in name}
    assert layers.trained(params | outside, None) == params | outside
    assert layers.trained({"score"}, "last:1") == {"score"}
    with pytest.raises(ModelError, match="layers=3: 3 asks for blocks that are not there"):
        layers.trained(params, "3")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.11.mlp.up_proj", ("model.layers", 11)),
        ("transformer.h.0.attn.c_attn", ("transformer.h", 0)),
        ("model.layers.3.experts.7.up", ("model.layers", 3)),
        ("lm_head", None),
        ("model.norm.2", None),
    ],
)
def test_the_block_of_a_module(name: str, expected: tuple[str, int] | None) -> None:
    assert units.block(name) == expected


def test_a_model_of_two_stacks_is_refused() -> None:
    names = ["encoder.block.0.q", "decoder.block.0.q"]
    with pytest.raises(ModelError, match=r"found stacks decoder\.block, encoder\.block"):
        layers.kept(names, "last:1")
    with pytest.raises(ModelError, match="found no numbered blocks"):
        layers.kept(["proj"], "last:1")


def test_gradients_of_chosen_blocks_are_those_of_the_full_adapter(kind: str) -> None:
    whole = model(kind)
    full = tiny.adapter(whole, SPEC, 1)
    for blocks in ("last:1", "0,2"):
        own = model(kind, blocks)
        kept = {name: full[name] for name, _ in own.parameters()}
        zeroed = {n: t if n in kept or not factors.is_b(n) else 0 * t for n, t in full.items()}
        expected, found = gradients(whole, zeroed), gradients(own, kept)
        assert 0 < len(own.shapes) < len(whole.shapes)
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_all_blocks_are_all_modules_within_blocks(kind: str) -> None:
    whole, own = model(kind), model(kind, f"first:{COUNT}")
    assert own.shapes == {n: s for n, s in whole.shapes.items() if units.block(n)}
    fresh = whole.init(SPEC, 1)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in own.init(SPEC, 1).items())


def test_plain_peft_loads_an_adapter_of_some_blocks(kind: str, tmp_path: Path) -> None:
    own = model(kind, "last:2")
    params = tiny.adapter(own, SPEC, 1)
    own.write(params, SPEC)
    own.save(tmp_path / "adapter", Adapter(params), SPEC)
    theirs = PeftModel.from_pretrained(
        tiny.base(kind, COUNT).model, str(tmp_path / "adapter")
    ).eval()
    assert theirs.peft_config["default"].layers_to_transform == [1, 2]
    assert torch.allclose(tiny.logits(theirs), tiny.logits(own.model), atol=1e-6)
    assert tiny.peft_weights(theirs).keys() == tiny.peft_weights(own.model).keys()


def test_a_backward_pass_ends_at_the_deepest_chosen_block() -> None:
    own = model("llama", "last:1")
    own.write(tiny.adapter(own, SPEC, 1), SPEC)
    for _, parameter in own.parameters():
        parameter.requires_grad_(True)
    passed: list[int] = []
    blocks = own.model.base_model.model.model.layers
    for number, block in enumerate(blocks):

        def note(module: object, inputs: object, output: Any, number: int = number) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                passed.append(number)

        block.register_forward_hook(note)
    own.model(input_ids=tiny.IDS)
    assert passed == [COUNT - 1]
