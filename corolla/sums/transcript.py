"""Hashes and keys of secure sums, version 1: the only place with their tags.

Whole numbers are little-endian, of 16 or 32 bits. HKDF: Krawczyk and Eronen, RFC 5869.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_PREFIX = b"corolla-sum/1/"

Listed = tuple[int, bytes]
"""The number of a member that has deposited, and its public key of the attempt."""


def le16(number: int) -> bytes:
    """Two bytes, the lower one first."""
    return struct.pack("<H", number)


def le32(number: int) -> bytes:
    """Four bytes, the lowest one first."""
    return struct.pack("<I", number)


def digest(tag: str, *parts: bytes) -> bytes:
    """SHA-256 of a tag and of parts, each with its length before it: no two lists are alike."""
    name = _PREFIX + tag.encode()
    total = hashlib.sha256(bytes([len(name)]) + name)
    for part in parts:
        total.update(struct.pack("<Q", len(part)))
        total.update(part)
    return total.digest()


def derive(secret: bytes, salt: bytes, tag: str, *info: bytes) -> bytes:
    """A key of 32 bytes for one purpose, of a secret of high entropy."""
    return HKDF(SHA256(), 32, salt, _PREFIX + tag.encode() + b"\0" + b"".join(info)).derive(secret)


def roster(entries: Iterable[tuple[str, bytes]]) -> bytes:
    """The hash of names and identity keys, in their order: what every device pins."""
    return digest("roster", *(part for name, key in entries for part in (name.encode(), key)))


def session(run: bytes, roster_sha256: bytes, name: str, box_key: bytes) -> bytes:
    """The text that a member signs when its daemon has begun."""
    return digest("session", run, roster_sha256, name.encode(), box_key)


def prepare(fields: Sequence[bytes]) -> bytes:
    """The hash of an attempt, over every field of its PREPARE."""
    return digest("prepare", *fields)


def deposit(prep: bytes, key: bytes) -> bytes:
    """The text that a member signs with its deposit."""
    return digest("deposit", prep, key)


def task(
    config: bytes,
    model_sha256: bytes,
    base_version: bytes,
    groups: Iterable[tuple[str, bytes]],
    log: bytes,
) -> bytes:
    """The hash of what is trained from, computed by each member from what it has received.

    `groups` are names and full SHA-256 of contents: a short id could be that of two models.
    """
    named = (part for name, sha in sorted(groups) for part in (name.encode(), sha))
    return digest("task", config, model_sha256, base_version, *named, log)


def context(prep: bytes, task: bytes, listed: Iterable[Listed]) -> bytes:
    """The hash of an attempt, its task and its deposits: what every mask is bound to."""
    return digest("context", prep, task, *(le16(number) + key for number, key in listed))


def commitment(ctx: bytes, number: int, mask: bytes) -> bytes:
    """The hash by which a server knows a self mask that it has put together."""
    return digest("commit", ctx, le16(number), mask)


def attempt_secret(seed: bytes, prep: bytes) -> bytes:
    """The X25519 secret of one attempt; `seed` are the 32 bytes that are shared out."""
    return derive(seed, prep, "dh")


def self_key(mask: bytes, ctx: bytes, number: int) -> bytes:
    """The key of a member's self mask."""
    return derive(mask, ctx, "self", le16(number))


def pair_key(agreed: bytes, ctx: bytes, one: int, other: int) -> bytes:
    """The key of the mask of two members, the same for both."""
    return derive(agreed, ctx, "pair", le16(min(one, other)), le16(max(one, other)))


def envelope(kind: bytes, bind: bytes, sender: int, receiver: int) -> bytes:
    """The text that a box is bound to: its kind, what it belongs to, from whom and for whom."""
    return kind + bind + le16(sender) + le16(receiver)


def box_key(agreed: bytes, salt: bytes, text: bytes) -> bytes:
    """The key of one box, which is used once."""
    return derive(agreed, salt, "box", text)
