"""The kinds of parameters that a run can train, one row each, asked by `config.kind`.

Rows hold facts and defaults. How many values a kind trains, and the model that trains them, are in
corolla/models/kinds.py, with a row for each kind as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

KindName = Literal["lora", "ia3", "prompt", "bias", "norm", "head", "embeddings", "full", "sparse"]


@dataclass(frozen=True)
class Rates:
    """Default learning rates: the embedded model, a hundred times smaller, wants a higher one."""

    embedded: float
    other: float

    def of(self, embedded: bool) -> float:
        """The rate for the embedded model, or for any other."""
        return self.embedded if embedded else self.other


@dataclass(frozen=True)
class Kind:
    """A kind of trained parameters: the facts and defaults that everybody asks for."""

    name: KindName
    artefact: Literal["adapter", "model"]
    """The folder that a run ends in: an adapter beside the base, or a whole model."""
    first_order: Rates = Rates(embedded=3e-3, other=3e-4)
    """Default learning rates of clients that backpropagate."""
    zeroth_order: Rates = Rates(embedded=3e-3, other=1e-4)
    """Default learning rates of clients that measure losses along directions: a step is as noisy
    as there are parameters."""
    factors: bool = False
    """All that is trained, but for a classifier's head, are LoRA factors: with a rank, a scaling
    and a start by an SVD, and for strategies that are derived for products of factors."""
    whole: bool = False
    """All parameters of the base: backpropagation has gradients of all weights, and a strategy may
    move them in place."""
    output: bool = False
    """The output layer of a model that generates is trained, where it is not tied."""
    target_modules: bool = False
    """Modules of the base can be chosen."""
    blocks: bool = False
    """Blocks of the base can be chosen."""
    sparse: bool = False
    """Values at places that are chosen within weight matrices, as many as `rank` says."""
    virtual_tokens: bool = False
    """Embeddings of virtual tokens stand before each text."""
    quantised: bool = False
    """The base may be quantised."""
    not_private: str = ""
    """The effect on gradients of examples for which dp=example is refused, as the end of a
    sentence; "" where dp=example goes with it."""
    hooked: bool = False
    """Hooks tell the gradients of a batch's examples apart; else examples go one at a time."""
    native: bool = False
    """Native clients (corolla-phone) can train it."""


_ADDED_UP = "adds up before anything can clip it"

_ROWS = (
    Kind(
        "lora",
        artefact="adapter",
        factors=True,
        target_modules=True,
        blocks=True,
        quantised=True,
        hooked=True,
        native=True,
    ),
    Kind(
        "ia3",
        artefact="adapter",
        first_order=Rates(embedded=3e-2, other=3e-3),
        target_modules=True,
        not_private=_ADDED_UP,
    ),
    Kind(
        "prompt",
        artefact="adapter",
        first_order=Rates(embedded=3e-2, other=3e-3),
        virtual_tokens=True,
        quantised=True,
        not_private=_ADDED_UP,
    ),
    Kind("bias", artefact="model", hooked=True),
    Kind("norm", artefact="model"),
    Kind("head", artefact="model", output=True, hooked=True),
    Kind("embeddings", artefact="model"),  # no hook tells the rows of a batch apart
    Kind(
        "full",
        artefact="model",
        # A million parameters are no more than an adapter of other models has.
        first_order=Rates(embedded=3e-3, other=3e-5),
        zeroth_order=Rates(embedded=3e-4, other=1e-6),
        whole=True,
        output=True,
    ),
    Kind("sparse", artefact="adapter", target_modules=True, blocks=True, sparse=True),
)

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _ROWS}
"""Name, as the key `parameters` says it → the kind."""
DEFAULT = KINDS["lora"]
"""The kind that is trained unless a run says otherwise."""
