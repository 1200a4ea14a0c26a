"""Calls of gRPC in bare frames of HTTP/2: of those that gRPC's own clients would not make."""

import socket
import ssl
import struct
from pathlib import Path

_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_HEADERS, _END_STREAM = 4, 1
_WINDOW = 4
"""The setting of how many bytes of an answer may come before the caller asks for more."""


class Connection:
    """A connection that takes `window` bytes of each answer."""

    def __init__(self, address: str, ca: Path, token: str, window: int = 0) -> None:
        host, port = address.rsplit(":", 1)
        tls = ssl.create_default_context(cafile=str(ca))
        tls.set_alpn_protocols(["h2"])
        plain = socket.create_connection((host, int(port)), 60)
        self.socket = tls.wrap_socket(plain, server_hostname=host)
        first = struct.pack(">HI", _WINDOW, window)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, first))
        self._token, self._next = token, 1

    def call(self, path: str, message: bytes) -> None:
        """One whole call, whose answer nobody waits for."""
        stream, self._next = self._next, self._next + 2
        body = b"\0" + struct.pack(">I", len(message)) + message
        self.socket.sendall(
            _frame(_HEADERS, _END_HEADERS, stream, self._headers(path))
            + _frame(_DATA, _END_STREAM, stream, body)
        )

    def ended(self, seconds: float) -> bool:
        """Returns whether the server ends the connection in this time."""
        self.socket.settimeout(seconds)
        try:
            while self.socket.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def _headers(self, path: str) -> bytes:
        told = {
            ":method": "POST",
            ":scheme": "https",
            ":path": path,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
            "authorization": f"Bearer {self._token}",
        }
        return b"".join(b"\0" + _text(name) + _text(value) for name, value in told.items())


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return (
        struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body
    )


def _text(value: str) -> bytes:
    assert len(value) < 127
    return bytes([len(value)]) + value.encode()
