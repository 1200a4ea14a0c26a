"""The places of a sparse set on their way: a group beside those of the strategy.

A run's state has it, and each client is sent it once, as a cached group. No strategy sees it.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from corolla.errors import WireError
from corolla.tensors import tree
from corolla.types import Params, Payload

GROUP = "support"
"""The name of the group."""


@runtime_checkable
class Holder(Protocol):
    """A model with a sparse set."""

    def hold(self, given: Params) -> None:
        """Train values at these places from now on. Raises WireError for others than its own."""


def apart(payload: Payload) -> tuple[Payload, Payload]:
    """Returns (the strategy's groups, the group of places or none)."""
    own = {group: params for group, params in payload.items() if group != GROUP}
    return own, {group: params for group, params in payload.items() if group == GROUP}


def hold(model: object, payload: Payload) -> None:
    """Makes a model train values at the places of a state, or of what was received, if it has any.

    Raises WireError for places that are none of the model, or for a model that has no sparse set.
    """
    if GROUP not in payload:
        return
    if not isinstance(model, Holder):
        raise WireError("places of a sparse set are for parameters=sparse")
    model.hold(payload[GROUP])


def taken(model: object, payload: Payload) -> dict[str, Params]:
    """The strategy's groups of what was received; the model holds the places (see `hold`)."""
    hold(model, payload)
    return dict(apart(payload)[0])


def facts(payload: Payload) -> Mapping[str, Any]:
    """Facts of the places for run.json, where they travel."""
    return {"support_sha256": tree.digest(payload[GROUP])} if GROUP in payload else {}
