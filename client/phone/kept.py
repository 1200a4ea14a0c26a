"""Files on a phone's disk: its history, the gateway's last words, a reply on its way."""

from collections.abc import Iterable
from pathlib import Path

from corolla.client.phone import policies
from corolla.client.phone.policies import Limits
from corolla.errors import WireError
from corolla.host.files import write_atomic
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.storage.disk import DiskLimits, blocks, held
from corolla.wire.packet import Packet
from corolla.wire.parsing import parse

_LARGEST_POLICY = 1 << 16
_LARGEST_REPLY = 8 << 30


class Kept:
    """The files of one phone, in a folder of its own; what writes raises OSError on a full disk."""

    def __init__(self, folder: Path, limits: Limits, disk: DiskLimits) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._limits, self._disk = folder, limits, disk
        self._policy: bytes | None = None  # as written by this process

    # --- what is asked of this device, and what it has done ---------------------------------------

    def policy(self, told: pb.Policy | None = None) -> pb.Policy:
        """The gateway's policy, by default of its last answer, with the owner's limits."""
        known = told
        if known is None:
            try:
                data = (self.folder / "policy").read_bytes()
                known = parse(pb.Policy(), data, _LARGEST_POLICY)
            except (OSError, WireError):
                known = pb.Policy()
        return policies.stricter(known, self._limits)

    def keep_policy(self, policy: pb.Policy) -> None:
        data = policy.SerializeToString()
        if data == self._policy:  # it is asked for at each check-in
            return
        self._policy = data
        write_atomic(self.folder / "policy", data)

    def history(self, now: float) -> list[policies.Entry]:
        """Reads the entries of this device's history from the 30 days before `now`."""
        return policies.read(self.folder / "history.jsonl", now)

    def note(self, entry: policies.Entry) -> None:
        policies.add(self.folder / "history.jsonl", entry)

    def ask(self, run_id: str, coming: Iterable[int]) -> None:
        """Raises DiskLimitError where a run has no room for files of so many bytes beside its own.

        They may be of a task that has no run yet ("").
        """
        own = held(self.folder / "runs" / run_id) if run_id else 0
        self._disk.check_run(own + sum(map(blocks, coming)))

    # --- what is held here ------------------------------------------------------------------------

    def log_version(self) -> str:
        """The version of the log that this device can go on from; "" for none."""
        try:
            return protocol.check_id((self.folder / "log").read_text())
        except (OSError, WireError):
            return ""

    def keep_log_version(self, version: str) -> None:
        (self.folder / "log").write_text(protocol.check_id(version))

    def forget_log_version(self) -> None:
        (self.folder / "log").unlink(missing_ok=True)

    @property
    def models(self) -> Path:
        """The folder of base models that gateways have offered."""
        return self.folder / "models"

    def model(self) -> Path | None:
        """The folder of the last base model, which may not be whole."""
        try:
            return self.models / protocol.check_sha256((self.folder / "model").read_text())
        except (OSError, WireError):
            return None

    def keep_model(self, folder: Path) -> None:
        (self.folder / "model").write_text(folder.name)

    def drop_parts(self, offered: set[str]) -> None:
        """Deletes what is left of downloads that nobody offers any more."""
        for part in self.folder.glob("*.part"):
            if part.stem not in offered:
                part.unlink()

    # --- a reply that was not delivered yet -------------------------------------------------------

    def reply(self, lease: str) -> Packet | None:
        """The reply to a task of this lease, also of a process that has died since."""
        return read_packet(self._reply(lease))

    def keep_reply(self, lease: str, packet: Packet) -> None:
        """In the place of all others."""
        self.drop_replies()
        write_packet(self._reply(lease), packet)

    def drop_replies(self) -> None:
        for path in self.folder.glob("reply-*"):
            path.unlink(missing_ok=True)

    def _reply(self, lease: str) -> Path:
        return self.folder / f"reply-{lease}"


def write_packet(path: Path, packet: Packet) -> None:
    """Write all of a packet or nothing, readable by its owner alone."""
    message = pb.Packet(header=packet.header, payload=packet.payload)
    write_atomic(path, message.SerializeToString(), private=True)


def read_packet(path: Path) -> Packet | None:
    """The packet in a file; None where there is none, or no whole one."""
    try:
        found = parse(pb.Packet(), path.read_bytes(), _LARGEST_REPLY)
    except (OSError, WireError):
        return None
    return Packet(found.header, found.payload)
