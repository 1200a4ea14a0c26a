"""Boxes: shares that one member seals for another, which the server only carries.

X25519 (RFC 7748), HKDF-SHA256 and ChaCha20-Poly1305 (RFC 8439) with one key for each box.
"""

from collections.abc import Sequence
from typing import Literal

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from corolla.errors import SecureSumError
from corolla.sums import transcript

BOX = 48
"""Bytes of a box: a share of 32, and a tag of 16."""

_NONCE = bytes(12)

BoxKind = Literal[b"k", b"m"]
"""A box with a share of an attempt's key, or with one of a self mask."""


def agree(secret: X25519PrivateKey, public: bytes) -> bytes:
    """The X25519 result of two keys. Raises SecureSumError for zeros, which anyone can cause."""
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SecureSumError("a public key gives an agreement of zeros: refused") from error


def public(secret: X25519PrivateKey) -> bytes:
    """The public key of a secret one, 32 bytes."""
    return secret.public_key().public_bytes_raw()


def signed(identity: bytes, signature: bytes, text: bytes) -> bool:
    """Whether a text has the Ed25519 signature of an identity key."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def seal_all(
    kind: BoxKind,
    bind: bytes,
    sender: int,
    agreed: Sequence[bytes],
    salt: bytes,
    shares: Sequence[bytes],
) -> tuple[bytes, ...]:
    """The boxes of one sender, one for each member; `agreed` are its agreements with them."""
    sealed = []
    for receiver, (shared, share) in enumerate(zip(agreed, shares, strict=True)):
        text = transcript.envelope(kind, bind, sender, receiver)
        key = transcript.box_key(shared, salt, text)
        sealed.append(ChaCha20Poly1305(key).encrypt(_NONCE, share, text))
    return tuple(sealed)


def opened(agreed: bytes, salt: bytes, text: bytes, box: bytes) -> bytes | None:
    """The share in a box that is bound to `text`; None where it is not such a box."""
    key = transcript.box_key(agreed, salt, text)
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, box, text)
    except InvalidTag:
        return None
