"""The privacy cost of a client's examples, on its own disk: what is spent stays spent.

A line of `ledger.jsonl`, sealed as corolla/host/sealed_lines.py says, for each round that the
client trained in with dp=example: time (UTC), run, round, noise_multiplier, sampling_probability,
count. It is on disk before training begins: a kill can make the ledger count what never left the
device, and never the other way round. A round that is done again is counted again. Nobody but its
device sees it.

It counts what its file says: an older copy forgets what was spent since, a file that was deleted
forgets all, and two of them for the same data (two clients, two state folders) know nothing of each
other.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from corolla.errors import ArtefactError
from corolla.host import sealed_lines
from corolla.host.sealed_lines import Chained, Content, Entry
from corolla.privacy import accounting
from corolla.privacy.accounting import Release

NAME = "ledger.jsonl"

_SPENT = [field.name for field in fields(Release)]

_REMEDY = (
    "put back the newest copy there is: an older one forgets what was spent since, and without any "
    "nobody knows what this device's examples have cost"
)


@dataclass(frozen=True)
class Limit:
    """A device owner's limit on what its examples cost in all runs together: (epsilon, delta)."""

    epsilon: float
    delta: float


class Ledger:
    """The ledger of one client. Its file is made by the first round that spends.

    Every method raises ArtefactError for a file that is damaged, or that cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def releases(self, run_id: str | None = None) -> list[Release]:
        """Returns the client's releases, oldest first: of one run, or (None) of all its life."""
        entries = self._entries(sealed_lines.read(self.path, _REMEDY))
        return [
            Release(*(entry[name] for name in _SPENT))
            for entry in entries
            if run_id in (None, entry["run"])
        ]

    def epsilon(
        self, delta: float, run_id: str | None = None, more: Iterable[Release] = ()
    ) -> float:
        """Returns the epsilon of `releases` and `more` together.

        At `delta`, to add or remove one example.
        """
        return accounting.epsilon([*self.releases(run_id), *more], delta)

    def spend(self, run_id: str, round: int, release: Release) -> None:
        """Write down what a round is about to spend; on disk when this returns."""
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        entry = {"time": now, "run": run_id, "round": round, **asdict(release)}
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ArtefactError(f"{self.path} cannot be written: {error.strerror}") from error
        with Chained(self.path, "training as this client", _REMEDY) as file:
            for kept in self._entries(file.content)[len(file.content.entries) :]:
                file.append(kept)
            file.append(entry)

    def _entries(self, content: Content) -> list[Entry]:
        """All lines, a torn last one among them if it can be read.

        It was torn before training began, or by damage long after.
        """
        torn = sealed_lines.facts(content.torn)
        entries = [*content.entries, torn] if torn else content.entries
        if not all(entry.keys() == {"time", "run", "round", *_SPENT} for entry in entries):
            raise ArtefactError(f"{self.path} is no ledger of this version: {_REMEDY}")
        return entries
