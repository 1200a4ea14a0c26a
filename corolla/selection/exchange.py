"""Places of a sparse set that are exchanged between rounds: pruned and grown, as many as before.

Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models" (SpIEL), 2024, arXiv
2401.16405. Its gradients are those of the training rows of one machine; here they are those of
public rows at the global model, so that no client sends single values and what is known of clients
is their sum alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from corolla.config.run import RunConfig
from corolla.data import public
from corolla.data.encoding import Encoded
from corolla.models.sparse import carried, places
from corolla.models.sparse_model import SparseModel
from corolla.models.trainable import Trainable
from corolla.selection import rows
from corolla.types import Adapter, Payload

FIRST = 0.2
"""The share of all places that would be exchanged before the first round; it falls to 0."""


def due(config: RunConfig, round: int) -> bool:
    """Returns whether places are exchanged after a round; never after the last one."""
    return bool(config.regrow) and not round % (config.regrow or 1) and round < config.rounds


def share(config: RunConfig, round: int) -> float:
    """The share of places that is exchanged after a round: 0.2 (1 - t / T)."""
    return FIRST * (1 - round / config.rounds)


def public_rows(model: Trainable, config: RunConfig, labels: Sequence[str] = ()) -> list[Encoded]:
    """The sequences whose gradients choose places. Raises DataError for rows of no use."""
    return public.sequences(config, model.base.tokenizer, labels, "regrow")


def exchanged(
    model: Trainable, config: RunConfig, state: Payload, round: int, labels: Sequence[str] = ()
) -> Payload:
    """The state with other places and their values, which the model holds from then on.

    Of each module the values that differ least from the base go, which is then the base again; as
    many places with the largest gradients of the mean loss over public rows come, at a value of 0.
    A place that goes is none of those that come. Raises DataError and ModelError as places_of does.
    """
    if not isinstance(model, SparseModel):
        return state
    own, _ = carried.apart(state)
    trained = dict(own["adapter"])
    carried.hold(model, state)
    model.show(Adapter(trained), config.lora)
    sequences = public_rows(model, config, labels)
    now, found = model.places, {}
    for name, gradient in rows.gradient(model, config, sequences):
        delta = trained[f"{name}.delta"]
        number = int(share(config, round) * len(delta))
        found[name], trained[f"{name}.delta"] = _moved(now[name], delta, gradient.cpu(), number)
    packed = places.packed(found, model.sizes)
    model.hold(packed)
    return {**own, "adapter": trained, carried.GROUP: packed}


def _moved(at: Tensor, delta: Tensor, gradient: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """(places, values) with `number` exchanged, or as many as there are other places.

    Of equal ones the first go, and the first come.
    """
    number = min(number, gradient.numel() - len(at))
    if not number:
        return at, delta
    order = torch.argsort(delta.abs(), stable=True)
    stay = order[number:]
    scores = gradient.flatten().float()
    free = torch.ones(len(scores), dtype=torch.bool)
    free[at] = False
    grown = free.nonzero().flatten()[places.top(scores[free], number)]
    together = torch.cat([at[stay], grown])
    values = torch.cat([delta[stay], delta.new_zeros(len(grown))])
    ascending = torch.argsort(together)
    return together[ascending], values[ascending]
