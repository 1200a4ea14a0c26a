"""Operations of training: the formula against PyTorch's counter, and by hand."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from corolla.errors import ModelError
from corolla.estimates import flops
from corolla.estimates.footprint import Batch
from corolla.models import anatomy
from corolla.models.anatomy import Anatomy
from corolla.models.lora import LoraModel
from corolla.types import LoraSpec
from tests.strategies import tiny

COUNT, RANK = 3, 2
BATCH = Batch(tiny.IDS.shape[0], tiny.IDS.shape[1], tiny.IDS.numel())
PARTS = {
    "llama": [
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
}
STACK = {"llama": "model.layers", "gpt2": "transformer.h"}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sizes(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    folder = tmp_path_factory.mktemp(kind)
    tiny.base(kind, COUNT).model.save_pretrained(folder)
    return anatomy.read(str(folder))


def added(total: Sequence[int], a: Sequence[int], b: Sequence[int], **_: object) -> int:
    """Operations of a product that is added in place: two for each of its multiplications."""
    return 2 * a[0] * a[1] * b[1]


def counting() -> FlopCounterMode:
    """PyTorch's counter, told of the one product that it does not know."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})


def measured(kind: str, names: list[str]) -> tuple[int, int]:
    """(forward, backward) operations that PyTorch counts, without those of positions' angles."""
    base = tiny.base(kind, COUNT)
    base.model.set_attn_implementation("eager")
    model = base.model
    if names:
        own = LoraModel(base, names)
        own.write(tiny.adapter(own, LoraSpec(RANK, 4.0), 1), LoraSpec(RANK, 4.0))
        assert own.shapes.keys() == set(names)
        model = own.model
        for _, parameter in own.parameters():
            parameter.requires_grad_(True)
    with counting() as before:
        loss = model(input_ids=tiny.IDS).logits.square().mean()
    angles = sum(
        sum(found.values())
        for name, found in before.get_flop_counts().items()
        if name.endswith("rotary_emb")
    )
    with counting() as after:
        if names:
            loss.backward()
    return before.get_total_flops() - angles, after.get_total_flops()


def counted(sizes: Anatomy, names: list[str]) -> tuple[int, int]:
    found = flops.total(flops.count(sizes, BATCH, dict.fromkeys(names, RANK)))
    return found.forward, found.backward


def test_every_set_of_blocks_takes_what_pytorch_counts(kind: str, sizes: Anatomy) -> None:
    for chosen in itertools.product([False, True], repeat=COUNT):
        blocks = [number for number, taken in enumerate(chosen) if taken]
        names = [f"{STACK[kind]}.{number}.{part}" for number in blocks for part in PARTS[kind]]
        assert counted(sizes, names) == measured(kind, names), blocks


def test_sets_of_modules_of_a_block_take_what_pytorch_counts(kind: str, sizes: Anatomy) -> None:
    """The block in the middle: attention goes back to those of q, k and v alone that are asked."""
    attention = [part for part in PARTS[kind] if "attn" in part]
    for group in (attention, [part for part in PARTS[kind] if part not in attention]):
        for size in range(1, len(group) + 1):
            for chosen in itertools.combinations(group, size):
                names = [f"{STACK[kind]}.1.{part}" for part in chosen]
                assert counted(sizes, names) == measured(kind, names), names


def test_the_head_of_a_classifier_is_trained(sizes: Anatomy, kind: str) -> None:
    """Of Llama: its head reads all positions, and has gradients of its own."""
    if kind != "llama":
        return
    base = tiny.base(kind, COUNT)
    base.model.config.num_labels = 5
    model = transformers.LlamaForSequenceClassification(base.model.config).requires_grad_(False)
    model.set_attn_implementation("eager")
    model.score.weight.requires_grad_(True)
    for names in ([], [f"{STACK[kind]}.1.{part}" for part in PARTS[kind]]):
        wrapped = model
        if names:
            own = peft.LoraConfig(r=RANK, target_modules=names)
            wrapped = peft.get_peft_model(model, own)
            model.score.weight.requires_grad_(True)
        loss = wrapped(input_ids=tiny.IDS).logits.square().mean()
        with counting() as counter:
            loss.backward()
        found = flops.count(sizes, BATCH, dict.fromkeys(names, RANK), labels=5)
        assert flops.total(found).backward == counter.get_total_flops()


def test_an_adapted_layer_by_hand() -> None:
    """n 3, i 8, o 5, r 2: 2·3·40 + 2·3·2·13 forwards, 2·3·2·18 backwards, 2·3·(40 + 16) more."""
    batch, shape = Batch(1, 3, 3), (5, 8)
    assert flops.forward(batch, shape, 0) + flops.forward(batch, shape, 2) == 396
    assert flops.own_backward(batch, shape, 2) == 216
    assert flops.own_backward(batch, shape, 2) + flops.input_backward(batch, shape, 2) == 552


def test_blocks_below_the_deepest_trained_one_take_nothing_backwards(sizes: Anatomy) -> None:
    names = [name for name in sizes.linear() if ".1." in name]
    found = flops.by_block(flops.count(sizes, BATCH, dict.fromkeys(names, RANK)))
    assert list(found) == [0, 1, 2, None]
    assert found[0].backward == 0 < found[1].backward
    assert found[0].forward == found[2].forward < found[1].forward


def test_a_model_of_another_structure_is_refused(sizes: Anatomy, tmp_path: Path) -> None:
    tiny.base("bert", 1).model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"bert\.pooler\.dense is no linear layer of attention"):
        flops.count(anatomy.read(str(tmp_path)), BATCH, {})
    with pytest.raises(ModelError, match=r"has no linear layer lm_head in a block"):
        flops.count(sizes, BATCH, {"lm_head": 2})
