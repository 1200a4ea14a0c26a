"""Each client alone: what a federation is worth is what it has over this.

No algorithm of a paper: the baseline that Li et al., "Ditto: Fair and Robust Federated Learning
Through Personalization", ICML 2021, arXiv 2012.04221, and others call local. `corolla compare
--with local` runs it; it is not in the registry, for nobody joins a federation for its result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from corolla.interfaces import Client, Observed
from corolla.strategies.fedavg import FedAvg
from corolla.tensors import tree
from corolla.types import (
    Adapter,
    Aggregates,
    Cost,
    Metrics,
    Params,
    Payload,
    Size,
    Update,
)


@dataclass(frozen=True)
class Local(FedAvg):
    """A client goes on from what it trained last, in the rounds in which it is drawn.

    All start from one adapter, and nothing that they train travels: an update is empty. With one
    client it is FedAvg, bit for bit: a mean of one.
    """

    name: ClassVar[str] = "local"
    aggregates: ClassVar[Aggregates] = "other"
    stale: ClassVar[bool] = False
    personal: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    when: ClassVar[str] = "to see what clients can do without each other"

    def local(self, client: Client, received: Payload) -> Update:
        start = client.kept.get("personal") or received["adapter"]
        fit = client.trainer.fit(start)
        # As FedAvg's server with an update of one, whose roundings this has to have.
        own = tree.add(start, tree.sub(fit.params, start))
        return Update({}, fit.num_examples, fit.metrics, {"personal": own})

    def update_like(self, fresh: Params, size: Size) -> Payload:
        return {}

    def apply(self, state: Payload, aggregate: Payload) -> tuple[Payload, Metrics]:
        return state, {}

    def adapter(self, state: Payload) -> Adapter:
        return Adapter(state.get("personal") or state["adapter"])

    def cost(self, cohort: Sequence[Size]) -> Sequence[Cost]:
        return [Cost(up=0, down=4 * n) for n in (s.A + s.B + s.head for s in cohort)]

    def expected(self, rounds: Sequence[Observed]) -> Params:
        """Returns the adapter that all started from, in fp64: nobody else changes it."""
        return {name: tensor.double() for name, tensor in rounds[0].start.items()}
