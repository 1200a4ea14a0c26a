"""FedDPA: a global adapter that is averaged, and a local one that never leaves the device.

Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024,
arXiv 2403.19211.
"""

from dataclasses import dataclass
from typing import ClassVar

from corolla.interfaces import Client
from corolla.strategies.fedavg import FedAvg
from corolla.strategies.listing.mark import listed
from corolla.strategies.listing.options import option
from corolla.tensors import factors, tree
from corolla.types import Adapter, Metrics, Payload, Update


@listed
@dataclass(frozen=True)
class FedDpa(FedAvg):
    """A client's model is W + (1 - a) s B_g A_g + a s B_l A_l; only (B_g, A_g) and the head travel.

    In each round the local adapter is trained beside the global one it received, then the global
    one as in FedAvg (FedDPA-T trains them the other way round; so, what a client ends with is what
    it sends). `share` is a, the same for all inputs: the paper's weighting by the likeness of an
    input to the client's data is not here. With share = 0 it is FedAvg.
    """

    name: ClassVar[str] = "feddpa"
    personal: ClassVar[bool] = True
    keeps: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    stale: ClassVar[bool] = False
    when: ClassVar[str] = "a model for each client beside a global one, at twice the local steps"

    share: float = option(
        0.5, "The share of the local adapter in a client's model; 0 is FedAvg.", 0.3
    )

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share must be from 0 to below 1, found {self.share}")

    def local(self, client: Client, received: Payload) -> Update:
        start = received["adapter"]
        keep: Payload = {}
        metrics: Metrics = {}
        work: Metrics = {}
        if self.share:
            shared = factors.select(start, factors.is_a, factors.is_b)
            own = client.kept.get("personal") or client.trainer.init(client.seed)
            beside = factors.bake(shared, (1 - self.share) * client.lora.scaling)
            local = client.trainer.fit(
                {**start, **factors.select(own, factors.is_a, factors.is_b)},
                frozen=[beside],
                train=lambda name: not factors.is_head(name),
                strength=self.share,
            )
            keep = {"personal": {name: local.params[name] for name in shared}}
            work = {n: m for n, m in local.metrics.items() if n in ("target_tokens", "local_steps")}
            if "train_loss" in local.metrics:  # not where it is private
                metrics = {"personal_train_loss": local.metrics["train_loss"]}
        fit = client.trainer.fit(start)
        moved = tree.sub(fit.params, start)
        spent = {n: fit.metrics.get(n, 0.0) + more for n, more in work.items()}
        metrics = {**fit.metrics, **spent, **metrics}
        return Update({"adapter": moved}, fit.num_examples, metrics, keep)

    def adapter(self, state: Payload) -> Adapter:
        whole = state["adapter"]
        if "personal" not in state:
            return Adapter(whole)
        shared = factors.select(whole, factors.is_a, factors.is_b)
        own = factors.bake(state["personal"], self.share)
        head = factors.select(whole, factors.is_head)
        return Adapter({**own, **head}, residuals=(factors.bake(shared, 1 - self.share),))
