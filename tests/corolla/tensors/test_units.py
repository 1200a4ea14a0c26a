"""What belongs together among trained tensors, by the names that transformers gives them."""

from collections import Counter

import pytest

from corolla import seeds
from corolla.tensors import units
from tests.strategies import tiny

OUTSIDE = {
    "llama": {"embed": {"model.embed_tokens.weight"}, "norm": {"model.norm.weight"}},
    "gpt2": {
        "embed": {"transformer.wte.weight", "transformer.wpe.weight"},
        "norm": {"transformer.ln_f.weight", "transformer.ln_f.bias"},
    },
    "bert": {
        "embed": {
            *(f"bert.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")),
            *(f"bert.embeddings.LayerNorm.{n}" for n in ("weight", "bias")),
        },
        "head": {
            f"{m}.{n}" for m in ("classifier", "bert.pooler.dense") for n in ("weight", "bias")
        },
    },
}
HALVES = {  # modules of attention, of the feed-forward and norms: half of each in a block
    "llama": (2, (1, 2), 1),
    "gpt2": (1, (1, 1), 1),
    "bert": (2, (1, 1), 1),
}


def names(kind: str, blocks: int = 3) -> list[str]:
    return [name for name, _ in tiny.base(kind, blocks).model.named_parameters()]


@pytest.mark.parametrize("kind", OUTSIDE)
def test_units_are_blocks_and_the_roles_outside_of_them(kind: str) -> None:
    own = names(kind)
    found = units.of(own)
    assert list(found)[:3] == ["layer-0000", "layer-0001", "layer-0002"] == units.blocks(found)
    assert {unit: set(found[unit]) for unit in list(found)[3:]} == OUTSIDE[kind]
    assert sorted(name for tensors in found.values() for name in tensors) == sorted(own)
    assert all(".1." in name for name in found["layer-0001"])


def test_factors_of_a_module_stay_together_and_blocks_keep_their_order() -> None:
    """Also where an adapter is in some blocks alone, and with more than nine of them."""
    own = [f"h.{n}.{m}.lora_{f}" for n in (2, 10) for m in ("q", "v") for f in "AB"]
    assert units.of([*own, "score.weight"]) == {
        "layer-0000": tuple(own[:4]),
        "layer-0001": tuple(own[4:]),
        "head": ("score.weight",),
    }
    assert units.of(own, modules=True) == {
        "layer-0000.00": tuple(own[:2]),
        "layer-0000.01": tuple(own[2:4]),
        "layer-0001.00": tuple(own[4:6]),
        "layer-0001.01": tuple(own[6:]),
    }


def test_a_tied_output_layer_is_trained_with_the_embeddings() -> None:
    found = units.of(names("llama"))
    assert units.always(found, ["head"]) == {"embed"}
    assert units.always(found, ["norm"]) == {"norm"}
    assert units.always({**found, "head": ("lm_head.weight",)}, ["head"]) == {"head"}
    assert units.always(found, units.OUTSIDE) == {"embed", "norm"}


@pytest.mark.parametrize("kind", HALVES)
def test_half_of_each_kind_of_module_is_drawn_in_each_block(kind: str) -> None:
    found = units.of(names(kind, 4), modules=True)
    drawn = units.half(found, seeds.generator(0, "half"))
    assert drawn != units.half(found, seeds.generator(1, "half"))
    attention, feed_forward, norms = HALVES[kind]
    for number in range(4):
        tensors = [found[unit][0] for unit in drawn if unit.startswith(f"layer-{number:04d}.")]
        kinds = Counter(
            "norm" if "norm" in n.lower() or "ln_" in n else "attn" if "att" in n else "mlp"
            for n in tensors
        )
        assert kinds == {"attn": attention, "mlp": feed_forward[number % 2], "norm": norms}
