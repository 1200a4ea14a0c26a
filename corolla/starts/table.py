"""The starts by name: how each is made, and the first state of a run that begins with one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from corolla.config.run import RunConfig
from corolla.errors import ConfigError, ModelError
from corolla.interfaces import Strategy
from corolla.models.lora import LoraModel
from corolla.models.trainable import Trainable
from corolla.starts import (
    channels,
    corda,
    eva,
    folder,
    gradient,
    loftq,
    lora_ga,
    mica,
    olora,
    orthogonal,
    pissa,
)
from corolla.starts.material import Material
from corolla.strategies import offset
from corolla.tensors import tree
from corolla.types import Params, Payload

MAKERS: Mapping[str, Callable[[Material], Params]] = {
    "random": lambda material: material.fresh,
    "gradient": gradient.adapter,
    "pissa": pissa.adapter,
    "olora": olora.adapter,
    "orthogonal": orthogonal.adapter,
    "mica": mica.adapter,
    "lora_ga": lora_ga.adapter,
    "corda_ipm": corda.adapter,
    "corda_kpm": corda.adapter,
    "eva": eva.adapter,
    "loftq": loftq.adapter,
    "channels": channels.adapter,
    "channels_large": channels.adapter,
    "channels_small": channels.adapter,
    "FOLDER": folder.adapter,
}
"""Name of a start (see corolla/config/sections/starts.py) → factors of all modules; a head may be
among them."""


@dataclass(frozen=True)
class Started:
    """The adapter that a run begins with, and what it takes out of the base."""

    trained: Params
    """The factors at the run's rank and scaling, and a classifier's head."""
    block: Params | None = None
    """The block that stays beside the base, at scaling 1; None: nothing is taken out."""

    def state(self, strategy: Strategy, seed: int) -> Payload:
        """The first state of a server."""
        own = strategy.init(self.trained, seed)
        return own if self.block is None else {**own, offset.GROUP: self.block}


def begin(
    model: Trainable, fresh: Params, config: RunConfig, labels: Sequence[str] = ()
) -> Started:
    """The start that a run asks for; `fresh` is an adapter that starts by itself.

    Tensors are in fp32 on the CPU. Raises ConfigError for a model without adapter, DataError for
    public rows that cannot be used, ArtefactError and ModelError for a folder or a base that the
    start cannot be made of.
    """
    if not isinstance(model, LoraModel):
        raise ConfigError(f"start={config.start} is for adapters: parameters={config.parameters}")
    made = MAKERS[config.begins.name](Material(model, fresh, config, labels))
    trained = {**fresh, **{n: t.detach().float().cpu().contiguous() for n, t in made.items()}}
    if not tree.finite(trained):
        raise ModelError(f"start={config.start} gives factors that are not finite: use float32")
    block = offset.block_of(trained, config.lora.scaling) if config.begins.offset else None
    return Started(trained, block)
