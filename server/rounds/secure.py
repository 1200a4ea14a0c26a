"""A round whose updates go to a secure sum: what it asks of its network, and what it learns."""

import torch

from corolla.aggregation.sums import summable
from corolla.directions import seedlog
from corolla.errors import ConfigError, RoundError
from corolla.models.sparse import carried
from corolla.server.rounds import expectations
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.fold import Fold
from corolla.server.rounds.network import Network
from corolla.server.rounds.spending import Spending
from corolla.server.rounds.tasks import Traffic, run_settings
from corolla.sums import task, vectors
from corolla.sums.quantise import FIRST_BOUND, Quantiser, next_bound, within
from corolla.sums.round import Summed, SumNetwork, SumPlan
from corolla.tensors import tree
from corolla.types import Metrics, Payload

_MEMORY = "secure-sum"


def begin(call: RoundCall, network: Network, spending: Spending) -> None:
    """Tell the network of the sum of this round. Raises ConfigError where it makes none."""
    if not call.federation.config.secure_sum:
        return
    if not isinstance(network, SumNetwork):
        raise ConfigError(
            "secure-sum=true is for simulations in one process: leave engine=flower out, and "
            "devices of others"
        )
    federation, values = call.federation, vectors.count(_form(call))
    if spending.level:
        like = expectations.first_like(federation, call.number)
        clip = spending.level.aggregator(federation.strategy.aggregator, call.memory, like).clip
        quantiser = Quantiser(within(clip, values), 1, values)
    else:
        bound = float(call.memory[_MEMORY]["bound"]) if _MEMORY in call.memory else FIRST_BOUND
        largest = max(expectations.most_examples(federation, c) for c in federation.clients)
        quantiser = Quantiser(bound, largest, values)
    network.expect(SumPlan(federation.run_id, call.number, call.attempt, _task(call), quantiser))


def end(call: RoundCall, network: Network, fold: Fold, traffic: Traffic) -> Summed | None:
    """Fold in the sum of a round; None without secure sums."""
    if not isinstance(network, SumNetwork) or not call.federation.config.secure_sum:
        return None
    found = network.summed()
    traffic.framing_up += found.up
    traffic.framing_down += found.down
    if fold.clipped is not None:
        fold.clipped.total = {
            group: dict(own)
            for group, own in vectors.unflatten(found.decoded.values, fold.clipped.total).items()
        }
        fold.clipped.clients = found.members
        fold.clipped.within = found.members - found.decoded.clipped
        return found
    like, partial = expectations.first_like(call.federation, call.number), summable(fold.aggregator)
    if partial is None:
        raise RoundError(f"round {call.number}: its updates are not added up")
    sums = vectors.unflatten(found.decoded.values, _form(call))
    partial.absorb(sums, float(found.decoded.weight), like)
    return found


def metrics(found: Summed | None, fold: Fold) -> Metrics:
    """The metrics that a sum tells: the mean loss, and what quantising has done to updates.

    None with dp=client: no noise covers them.
    """
    if found is None or fold.clipped is not None:
        return {}
    own = found.decoded
    return {
        "train_loss": own.loss / own.weight,
        "sum_members": float(found.members),
        "sum_clipped": float(own.clipped),
        "sum_norm": own.norm / own.weight,
    }


def memory(found: Summed | None, fold: Fold) -> Payload:
    """The bound of the next round, where it follows from this one's mean norm."""
    if found is None or fold.clipped is not None or not found.decoded.norm > 0:
        return {}
    bound = next_bound(found.decoded)
    return {_MEMORY: {"bound": torch.tensor(bound, dtype=torch.float64)}}


def _form(call: RoundCall) -> Payload:
    """The form of the sums of a round."""
    partial = summable(call.federation.strategy.aggregator())
    like = expectations.first_like(call.federation, call.number)
    return partial.sums_like(like) if partial else {}


def _task(call: RoundCall) -> bytes:
    """The hash of what members train from, as they compute it from what they have received."""
    federation, version = call.federation, tree.digest_all(call.state)
    own, support = carried.apart(call.state)
    sent, lora = federation.strategy.broadcast(own), federation.lora(next(iter(federation.clients)))
    fitted = sent.fitted(lora) if sent.fitted else {}
    groups = {**sent.cached, **sent.payload, **fitted, **support}
    if sent.log is not None:
        version = seedlog.versions(federation.origin, sent.log)[-1]
    run = run_settings(federation.config, federation.own_devices)
    common = task.Common(run, call.number, lora, federation.population)
    return task.digest(common, federation.model_sha256, version, groups)
