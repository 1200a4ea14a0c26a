"""The tiny model that the tests of both trainers share, a start for it, and it without our code."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from corolla.config.run import RunConfig
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.types import Params
from tests.client.training.dense import SPEC

Settings = Callable[..., RunConfig]


@pytest.fixture
def model(settings: Settings) -> LoraModel:
    return LoraModel(pretrained.load(settings()))


@pytest.fixture
def start(model: LoraModel) -> Params:
    """A start whose B is not zero: both factors have slopes."""
    fresh = model.init(SPEC, 0)
    noise = torch.Generator().manual_seed(1)
    return {n: t + 0.1 * torch.randn(t.shape, generator=noise) for n, t in fresh.items()}


@pytest.fixture
def plain(tiny_model: Path) -> transformers.PreTrainedModel:
    """The same model without peft and without any code of ours."""
    loaded: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model
    ).requires_grad_(False)
    return loaded
