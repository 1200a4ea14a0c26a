"""A simulation whose updates go to secure sums: the members of a round and the server here."""

from collections.abc import Callable
from pathlib import Path

from corolla.client.training.sums import SumWorker
from corolla.client.training.worker import Worker
from corolla.config import sums
from corolla.config.run import RunConfig
from corolla.data.federated import FederatedData
from corolla.errors import ConfigError, SecureSumError
from corolla.models.trainable import Trainable
from corolla.server.rounds.network import Network
from corolla.server.sums.network import SecureNetwork
from corolla.storage.memory import Memory
from corolla.sums import thresholds


def worker(
    config: RunConfig,
    model: Trainable,
    data: FederatedData,
    memory: Memory,
    record: Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> SumWorker:
    """All clients of a simulation as members of secure sums.

    Raises ConfigError where a whole cohort makes no sum that is large enough.
    """
    smallest, cohort = config.smallest_sum, min(config.cohort or 8, len(data.clients))
    corrupt = sums.corrupt(config, len(data.clients))
    try:
        thresholds.most_missing(cohort, corrupt, smallest)
    except SecureSumError as error:
        raise ConfigError(f"secure-sum=true: of {len(data.clients)} clients, {error}") from error
    return SumWorker(smallest, corrupt, config, model, data, memory, record, on_step)


def joined(network: Network, worker: Worker) -> Network:
    """The network of a run: with secure sums one that opens nothing else."""
    if not isinstance(worker, SumWorker):
        return network
    owner = next(iter(worker.devices.values())).owner
    return SecureNetwork(network, worker, owner.smallest, owner.assumed)
