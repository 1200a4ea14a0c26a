"""The key of a device: who it is in a federation."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from corolla.client.device.settings import state_of
from corolla.errors import ConfigError, CorollaError
from corolla.host.files import write_atomic


@dataclass(frozen=True)
class Identity:
    """A client's key: `private` for flower-supernode, `public` for the server's owner."""

    private: Path
    public: Path
    fingerprint: str
    """16 hexadecimal characters, as the server's logs show it."""

    @property
    def name(self) -> str:
        """The name of the client when its owner gives it none."""
        return f"client-{self.fingerprint}"


def make_key(file: Path | None, options: Mapping[str, object]) -> Identity:
    """The key of a client that need not have data or a server yet. Raises CorollaError."""
    return identity(state_of(file, options))[0]


def identity(state: Path) -> tuple[Identity, bool]:
    """(the key in a state folder, whether it has just been made).

    Raises ConfigError for a file that is no key, CorollaError for a disk that fails.

    P-384, in the format of OpenSSH: the one that flower-supernode reads. Whoever has the private
    key is this client: it is readable by its owner alone.
    """
    private, public = state / "client.key", state / "client.pub"
    made = not private.exists()
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if made:
            _make(private)
        key = serialization.load_ssh_private_key(private.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("a key of another kind")
        pem = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        found = Identity(private, public, hashlib.sha256(pem.strip()).hexdigest()[:16])
        line = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        content = line + f" {found.name}\n".encode()
        if not public.exists() or public.read_bytes() != content:  # a full disk stops no client
            write_atomic(public, content, private=True)
    except OSError as error:  # it may pass: no error of the settings, which would end a service
        raise CorollaError(f"cannot use {error.filename or state}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{private} is no private key of a client: move it away for a new one"
        ) from error
    return found, made


def _make(path: Path) -> None:
    """The whole key or none: a key cut short would lock the client out."""
    data = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    write_atomic(path, data, private=True)
