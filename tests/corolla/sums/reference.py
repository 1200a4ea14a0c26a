"""The protocol of secure sums once more, written straight down: the oracle of the vectors.

It has no objects and refuses nothing: from seeds it computes every byte that members and server
exchange. Field arithmetic is on Python's integers, masks come from OpenSSL at once. It shares no
code with corolla.sums.
"""

import hashlib
import hmac
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any, ClassVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

T = b"corolla-sum/1/"


def h(tag: bytes, *parts: bytes) -> bytes:
    name = T + tag
    text = bytes([len(name)]) + name
    return hashlib.sha256(
        text + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    ).digest()


def hkdf(secret: bytes, salt: bytes, info: bytes, size: int = 32) -> bytes:
    """RFC 5869, by its own words."""
    key = hmac.new(salt or bytes(32), secret, "sha256").digest()
    found, block, number = b"", b"", 0
    while len(found) < size:
        number += 1
        block = hmac.new(key, block + info + bytes([number]), "sha256").digest()
        found += block
    return found[:size]


def kdf(secret: bytes, salt: bytes, tag: bytes, info: bytes = b"") -> bytes:
    return hkdf(secret, salt, T + tag + b"\0" + info)


def le(number: int, size: int) -> bytes:
    return number.to_bytes(size, "little")


def times(a: int, b: int) -> int:
    """The product in GF(2^8), bit by bit."""
    product = 0
    for _ in range(8):
        product ^= a if b & 1 else 0
        a = (a << 1) ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


@cache
def by(x: int) -> bytes:
    """The products of a point with each byte, for bytes.translate."""
    return bytes(times(x, b) for b in range(256))


def xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).to_bytes(len(a), "big")


def split(secret: bytes, threshold: int, shares: int, random: bytes) -> list[bytes]:
    """The value of each byte's polynomial at 1, 2, …: Σ c_k x^k, term by term."""
    rows = [secret, *(random[32 * k : 32 * k + 32] for k in range(threshold - 1))]
    found = []
    for x in range(1, shares + 1):
        power, value = 1, bytes(32)
        for row in rows:
            value = xor(value, row.translate(by(power)))
            power = times(power, x)
        found.append(value)
    return found


def public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def exchange(secret: bytes, key: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).exchange(
        X25519PublicKey.from_public_bytes(key)
    )


def stream(key: bytes, values: int) -> NDArray[np.uint32]:
    cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(cipher.update(bytes(4 * values)), "<u4")


def inputs(member: int, size: int) -> NDArray[np.uint32]:
    """x[k] = (k + 1) (member + 1) 1000003 mod 2^32: the vector of a member in the cases."""
    k = np.arange(1, size + 1, dtype=np.uint64)
    return (k * (member + 1) * 1000003 % 2**32).astype(np.uint32)


@dataclass(frozen=True)
class Case:
    """A session: who takes part, who is lost when, and whose messages are written out."""

    name: str
    members: int
    missing: int
    values: int
    no_deposit: Sequence[int] = ()
    no_reply: Sequence[int] = ()
    whole: Sequence[int] = ()
    """The members whose messages are made; of the others nothing but keys and signatures."""

    RUN: ClassVar[bytes] = bytes(range(16))
    ROUND: ClassVar[int] = 3
    ATTEMPT: ClassVar[int] = 1
    TASK: ClassVar[tuple[bytes, ...]] = (b"settings", b"model", b"version", b"adapter", b"sha", b"")
    BOUND: ClassVar[float] = 16.0
    WEIGHT: ClassVar[int] = 40


class Draw:
    """Bytes of one member, in order: SHAKE-256 of "corolla-sum", a case and its number."""

    def __init__(self, case: Case, member: int) -> None:
        text = f"corolla-sum {case.name} {member}".encode()
        size = 64 + 2 * (48 + 32 * (case.members - case.missing - 1))
        self.all, self.place = hashlib.shake_256(text).digest(size), 0

    def __call__(self, size: int) -> bytes:
        self.place += size
        return self.all[self.place - size : self.place]


class Sent:
    """A member's secret, its salt, shares and boxes, in the order in which it draws them."""

    def __init__(self, draw: Draw, case: Case) -> None:
        threshold = case.members - case.missing
        self.secret, self.salt = draw(32), draw(16)
        self.random = draw(32 * (threshold - 1))
        self.case, self.boxes, self.shares = case, list[bytes](), list[bytes]()

    def seal(self, kind: bytes, bind: bytes, i: int, box: bytes, keys: Sequence[bytes]) -> None:
        self.shares = split(
            self.secret, self.case.members - self.case.missing, self.case.members, self.random
        )
        for j, key in enumerate(keys):
            text = kind + bind + le(i, 2) + le(j, 2)
            own = kdf(exchange(box, key), self.salt, b"box", text)
            sealed = ChaCha20Poly1305(own).encrypt(bytes(12), self.shares[j], text)
            self.boxes.append(sealed)

    @property
    def packed(self) -> bytes:
        return self.salt + le(len(self.boxes), 2) + b"".join(self.boxes)


def session(case: Case) -> dict[str, Any]:
    """Every byte of a session. A member draws its identity, its box key, then twice a secret,

    a salt and coefficients: for its deposit and for its reply.
    """
    everyone, size = range(case.members), case.values + 4
    draws = [Draw(case, i) for i in everyone]
    identity = [Ed25519PrivateKey.from_private_bytes(draw(32)) for draw in draws]
    names = [f"member-{i}".encode() for i in everyone]
    box = [draw(32) for draw in draws]
    keys = [public(secret) for secret in box]
    identities = [own.public_key().public_bytes_raw() for own in identity]
    roster = h(b"roster", *chain.from_iterable(zip(names, identities, strict=True)))
    sessions = [
        identity[i].sign(h(b"session", case.RUN, roster, names[i], keys[i])) for i in everyone
    ]
    numbers = le(case.ROUND, 4) + le(case.ATTEMPT, 4)
    quantiser = struct.pack("<dIIH", case.BOUND, case.WEIGHT, case.values, 4)
    seats = [le(i, 2) + keys[i] + sessions[i] for i in everyone]
    fields = [case.RUN, numbers, roster, le(case.missing, 2), quantiser, *seats]
    prep = h(b"prepare", *fields)
    deposits = {i: Sent(draws[i], case) for i in everyone if i not in case.no_deposit}
    secret = {i: kdf(own.secret, prep, b"dh") for i, own in deposits.items()}
    listed = {i: public(own) for i, own in secret.items()}
    signed = {i: identity[i].sign(h(b"deposit", prep, key)) for i, key in listed.items()}
    task = h(b"task", *case.TASK)
    ctx = h(b"context", prep, task, *(le(i, 2) + key for i, key in listed.items()))
    replies = {i: Sent(draws[i], case) for i in deposits if i not in case.no_reply}
    masked = {}
    for i in (i for i in case.whole if i in deposits):
        deposits[i].seal(b"k", prep + listed[i], i, box[i], keys)
        if i not in replies:
            continue
        own = replies[i]
        own.seal(b"m", ctx, i, box[i], keys)
        y = inputs(i, size) + stream(kdf(own.secret, ctx, b"self", le(i, 2)), size)
        for j in (j for j in listed if j != i):
            info = le(min(i, j), 2) + le(max(i, j), 2)
            mask = stream(kdf(exchange(secret[i], listed[j]), ctx, b"pair", info), size)
            y = y + mask if i < j else y - mask
        masked[i] = h(b"commit", ctx, le(i, 2), own.secret) + own.packed + y.tobytes()
    found: dict[str, Any] = {
        "prepare": le(case.members, 2) + b"".join(fields),
        "prep": prep,
        "task": task,
        "context": ctx,
        "listing": case.RUN
        + numbers
        + le(len(listed), 2)
        + b"".join(le(i, 2) + key + signed[i] for i, key in listed.items()),
        "deposits": {
            i: listed[i] + signed[i] + deposits[i].packed for i in case.whole if i in deposits
        },
        "replies": masked,
        "draws": {i: draws[i].all for i in case.whole},
        "identities": b"".join(identities),
    }
    if len(case.whole) == case.members:
        found |= asked(case, listed, deposits, replies, numbers + task)
        found["sum"] = np.sum([inputs(i, size) for i in replies], axis=0, dtype=np.uint32).tobytes()
    return found


def asked(
    case: Case,
    listed: Mapping[int, bytes],
    deposits: Mapping[int, Sent],
    replies: Mapping[int, Sent],
    head: bytes,
) -> dict[str, bytes]:
    """The question for member 0, and its answer."""
    source = {j: replies.get(j, deposits[j]) for j in listed}
    entries = (le(j, 2) + listed[j] + own.salt + own.boxes[0] for j, own in source.items())
    question = case.RUN + head + le(len(listed), 2) + b"".join(entries)
    question += le(len(replies), 2) + b"".join(le(j, 2) for j in replies)
    shares = b"".join(own.shares[0] for own in source.values())
    return {
        "question": question,
        "answer": le(len(source), 2) + bytes([1]) * len(source) + shares,
    }
