"""A model with adapters of DoRA, by peft: factors, and a vector of magnitudes for each module."""

from typing import ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corolla.models.lora import LoraModel
from corolla.models.magnitudes import vectors
from corolla.types import Params


class DoraModel(LoraModel):
    """One resident base model with one adapter of DoRA.

    Magnitudes begin as the norms of the rows of the base's weights, so that a start with B A = 0 is
    the base. As in the paper (section 4.3) no gradient goes through ‖W + s B A‖.
    """

    dora: ClassVar[bool] = True

    def _beside_factors(self, wrapped: nn.Module) -> dict[str, nn.Parameter]:
        found = super()._beside_factors(wrapped)
        for name, layer in self._layers.items():
            (own,) = layer.lora_magnitude_vector.values()
            weight = layer.get_base_layer().weight.detach().float()
            out, into = self.shapes[name]
            # By peft's own code, of an update in its layout: else the last bits are others, and in
            # half precision peft would begin with norms that are rounded to it.
            zero = weight.new_zeros(into, out).T
            length = own.get_weight_norm(weight, zero, 1.0)
            own.weight = nn.Parameter(length, requires_grad=False)
            found[name + vectors.SUFFIX] = own.weight
        return found

    def deltas(self) -> Params:
        """The effective update of every module, dense, in fp64: what W' has more than W.

        The magnitudes are in it. For checks and tests.
        """
        found: dict[str, Tensor] = dict(super().deltas())
        magnitudes = dict(self.parameters())
        for name, layer in self._layers.items():
            base = layer.get_base_layer()
            weight = base.weight.T if isinstance(base, Conv1D) else base.weight
            del found[name + vectors.SUFFIX]
            magnitude = magnitudes[name + vectors.SUFFIX].detach().cpu()
            found[name] = vectors.change(weight.detach().cpu(), found[name], magnitude)
        return found
