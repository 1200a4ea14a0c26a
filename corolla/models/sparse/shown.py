"""A weight matrix of which some values are trained, shown to the model in its own place.

The trained changes are written into the base weight itself, so that the model keeps no second
copy of any matrix. The gradient of the whole matrix exists while its module is passed; the trained
values take theirs from it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Shown(nn.Module):
    """A parametrization: the weight that is used is the base, moved by `delta` at some places."""

    delta: nn.Parameter
    """The trained changes, (k,) in fp32."""

    def __init__(self, weight: nn.Parameter, places: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(
            torch.zeros(len(places), device=weight.device), requires_grad=False
        )
        # Through .data a write is no change to autograd: what a pass has kept stays valid, as each
        # write of a pass writes the same values.
        self._flat = weight.data.view(-1)
        self.places = places.to(weight.device)
        self.kept = self._flat[self.places].clone()
        """The base's values at these places (k,)."""

    def move(self, places: Tensor) -> None:
        """Trains other places from now on; those before are the base's again, bit for bit."""
        self._flat.index_copy_(0, self.places, self.kept)
        self.places = places.to(self._flat.device)
        self.kept = self._flat[self.places].clone()

    def put(self) -> None:
        """Writes the trained changes into the weight."""
        self._flat.index_copy_(0, self.places, self.kept + self.delta.detach())

    def forward(self, original: Tensor) -> Tensor:
        found: Tensor = _Written.apply(self.delta, original, self)  # type: ignore[no-untyped-call]
        return found


class _Written(torch.autograd.Function):
    """(changes, base weight) → the weight with the changes in it."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, original: Tensor, shown: Shown) -> Tensor:
        ctx.places = shown.places
        shown.put()
        return original.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (whole,) = gradients
        delta = whole.reshape(-1)[ctx.places] if ctx.needs_input_grad[0] else None
        return delta, whole if ctx.needs_input_grad[1] else None, None


def shown(module: nn.Module, places: Tensor) -> Shown:
    """Makes the weight of a linear layer one that is shown."""
    made = Shown(module.weight, places)  # type: ignore[arg-type]
    parametrize.register_parametrization(module, "weight", made, unsafe=True)
    return made
