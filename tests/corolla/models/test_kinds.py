"""Every kind has its rows in models, and its formula counts what is built."""

import math
from pathlib import Path

import pytest
import transformers

from corolla.config.run import RunConfig
from corolla.config.sections.kinds import KINDS
from corolla.estimates import footprint
from corolla.models import anatomy, kinds, pretrained, trainable
from corolla.models.full import FullModel
from corolla.models.parts import PARTS


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can be trained in any way: with biases, and an output layer of its own."""
    made = tmp_path_factory.mktemp("any") / "model"
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    config.attention_bias, config.tie_word_embeddings = True, False
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(made)
    return made


def test_every_kind_has_a_form() -> None:
    assert kinds.FORMS.keys() == KINDS.keys()
    assert PARTS.keys() == {name for name, kind in KINDS.items() if not kind.factors}


@pytest.mark.parametrize("name", KINDS)
def test_the_formula_counts_the_tensors_that_are_trained(folder: Path, name: str) -> None:
    config = RunConfig(
        model=str(folder), parameters=KINDS[name].name, rank=2, max_length=16, device="cpu"
    )
    model = trainable.build(config, pretrained.load(config))
    shapes = footprint.trained_shapes(anatomy.read(str(folder)), config)
    built = {n: tensor.numel() for n, tensor in model.init(config.lora, 0).items()}
    assert built
    assert {n: math.prod(shape) for n, shape in shapes.items()} == built
    assert model.artefact == config.kind.artefact


def test_all_parameters_are_moved_in_place_where_the_strategy_can(folder: Path) -> None:
    config = RunConfig(
        model=str(folder), strategy="seed_pool", parameters="full", max_length=16, device="cpu"
    )
    model = trainable.build(config, pretrained.load(config))
    assert isinstance(model, FullModel)
    assert model.artefact == config.kind.artefact
