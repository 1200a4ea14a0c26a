"""Proof that a secure sum is the sum of whole numbers, bit for bit, with members that are lost."""

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from corolla.client.training.sums import SumWorker
from corolla.commands.check.findings import Finding, Proof
from corolla.commands.check.probe import Probe, Recorder, Resident
from corolla.commands.check.tables import CLIENTS
from corolla.config.run import RunConfig
from corolla.config.sums import not_summed
from corolla.server.rounds.call import RoundCall
from corolla.server.rounds.network import Network
from corolla.server.rounds.round import run_round
from corolla.server.sums.network import SecureNetwork
from corolla.storage.memory import Memory
from corolla.sums import thresholds
from corolla.sums.device import Device
from corolla.sums.quantise import LEVELS
from corolla.wire.messages import Reply, Task
from corolla.wire.packet import Packet

CHECK = "secure sum"
_SMALLEST, _CORRUPT = 2, 1
CHANGES = {
    "secure_sum": True,
    "smallest_sum": _SMALLEST,
    "sum_corrupt": _CORRUPT,
    "ranks": [],
    "alphas": [],
}
"""Keys of a run of the probe's seven clients whose updates go to secure sums."""


class _Recording(SumWorker):
    """A worker that remembers the whole numbers of each update before they are masked."""

    def _vector(self, device: Device, task: Task, reply: Reply) -> NDArray[np.uint32]:
        vector = super()._vector(device, task, reply)
        name = device.owner.roster.name(device.owner.index)
        self.seen = {**getattr(self, "seen", {}), name: vector}
        return vector


class MemberProbe(Probe):
    """A strategy on a tiny model whose clients are members of secure sums."""

    def network_on(
        self, folder: Path, model: Resident | None = None, config: RunConfig | None = None
    ) -> Recorder:
        folder.mkdir(parents=True, exist_ok=True)
        resident, own = model or self._model(), config or self.config
        self.worker = _Recording(_SMALLEST, _CORRUPT, own, resident, self.data, Memory(folder))
        return Recorder(self.worker, resident, self.added)


@dataclass(frozen=True)
class _Losing(Network):
    """A network on which the replies of some members are lost."""

    network: Network
    lost: frozenset[str]

    def clients(self) -> Mapping[str, int]:
        return self.network.clients()

    def ask(self, packets: Mapping[str, Packet]) -> Iterator[tuple[str, Packet | None]]:
        for name, packet in self.network.ask(packets):
            yield name, None if name in self.lost else packet


def proofs(probe: Probe) -> Iterator[Proof]:
    """The proof of a strategy whose updates can go to secure sums."""
    if not not_summed(probe.strategy):
        yield CHECK, lambda: _exact(probe)


def _exact(probe: Probe) -> Finding:
    """Counts the values of an opened sum that are others than in a sum of 64-bit integers."""
    with tempfile.TemporaryDirectory() as folder:
        own = MemberProbe(probe.name, probe.kind, Path(folder), probe.options, CHANGES)
        lost = thresholds.most_missing(len(CLIENTS), _CORRUPT, _SMALLEST)
        network = SecureNetwork(
            _Losing(own.network, frozenset(sorted(CLIENTS)[:lost])),
            own.worker,
            _SMALLEST,
            _CORRUPT,
        )
        everyone = dict.fromkeys(sorted(CLIENTS), 1)
        run_round(RoundCall(own.federation, own.fresh(), {}, 1, cohort=everyone), network)
        there = np.stack([own.worker.seen[name].view(np.int32) for name in sorted(CLIENTS)[lost:]])
        found = network.summed()
        whole = there.sum(0, dtype=np.int64)[: found.quantiser.values]
        wanted = whole * (found.quantiser.bound * found.quantiser.weight / LEVELS)
        off = int((found.decoded.values != wanted).sum())
        empty = not whole.any()
        note = "nothing was summed" if empty else f"{off} values are others" if off else ""
        return Finding(CHECK, probe.kind, math.inf if empty else float(off), 0.0, note)
