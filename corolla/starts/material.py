"""Material of a start: the base and its weights, public rows, the settings of a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corolla import seeds
from corolla.config.run import RunConfig
from corolla.data import public
from corolla.data.encoding import Encoded
from corolla.models import pretrained
from corolla.models.lora import LoraModel
from corolla.types import LoraSpec, Params


@dataclass(frozen=True)
class Material:
    """The material that a start is made of. Modules have the names of `model.shapes`."""

    model: LoraModel
    fresh: Params
    """An adapter of the run's rank as it starts by itself: A random, B zero."""
    config: RunConfig
    labels: Sequence[str] = ()

    @property
    def spec(self) -> LoraSpec:
        """The rank and scaling of the adapter that is made."""
        return self.config.lora

    @cached_property
    def rows(self) -> Sequence[Encoded]:
        """The sequences of up to `public_examples` public rows.

        Raises DataError for rows that cannot be used or belong to a client.
        """
        wanted_by = f"start={self.config.start}"
        tokenizer = self.model.base.tokenizer
        return public.sequences(self.config, tokenizer, self.labels, wanted_by)

    def layer(self, module: str) -> nn.Module:
        """A linear layer of the base, without its adapter."""
        plain = self.model.model.base_model.model
        found: nn.Module = plain.get_submodule(module).get_base_layer()
        return found

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(module, its weight (out, in) in fp32) of all modules, one in memory at a time."""
        for module in self.model.shapes:
            yield module, oriented(self.layer(module))

    def generator(self, module: str) -> torch.Generator:
        """Random numbers of a module's own, which depend on the run's seed and on its name."""
        return seeds.generator(self.config.seed, "start", module)

    @cached_property
    def unquantised(self) -> nn.Module:
        """The base as its files have it, in fp32 on the CPU: 4 bytes a parameter."""
        plain = {"quantization": "none", "dtype": "float32", "device": "cpu"}
        found: nn.Module = pretrained.load(self.config.model_copy(update=plain), self.labels).model
        return found


def oriented(layer: nn.Module) -> Tensor:
    """The weight (out, in) of a linear layer of the base in fp32; Conv1D keeps it as (in, out)."""
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} is no linear layer")
    found = weight.detach().float()
    return found.T if isinstance(layer, Conv1D) else found
