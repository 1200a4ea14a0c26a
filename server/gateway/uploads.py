"""Replies of phones on their way in: chunk by chunk, in memory while small, else on disk."""

import tempfile
import threading
from pathlib import Path

from corolla.errors import WireError
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.wire.packet import Packet

_IN_MEMORY = 1 << 16
"""Bytes of a reply that stay in memory: those of hundreds of phones wait for the round's end."""


class Upload:
    """The payload of one reply; chunks may come twice, after a gap, or again after a cut."""

    def __init__(self, folder: Path, most: int) -> None:
        self.received = 0
        self._most = most
        self._size: int | None = None
        self._lock = threading.Lock()
        self._file = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - see close()
            _IN_MEMORY, dir=str(folder)
        )

    def add(self, chunk: pb.Chunk) -> int:
        """Take a chunk in if it is the next one; the bytes there are now: where to go on.

        A chunk that is damaged, or not the next, changes nothing. Raises WireError for more than
        there may be and for a size that changes.
        """
        with self._lock:
            if chunk.size > self._most:
                raise WireError(f"upload has {chunk.size} bytes, at most {self._most}")
            if self._size not in (None, chunk.size):
                raise WireError(f"upload has {chunk.size} bytes now, {self._size} before")
            if chunk.offset != self.received:
                return self.received
            try:
                content = protocol.check_chunk(chunk, self.received, chunk.size)
            except WireError:
                return self.received
            self._size = chunk.size
            self._file.seek(self.received)
            self._file.write(content)
            self.received += len(content)
            return self.received

    def payload(self) -> bytes:
        """All bytes so far."""
        with self._lock:
            self._file.seek(0)
            return self._file.read(self.received)

    def packet(self, header: bytes) -> Packet:
        """The reply with this header."""
        return Packet(header, self.payload())

    def close(self) -> None:
        """Forget the bytes."""
        with self._lock:
            self._file.close()
