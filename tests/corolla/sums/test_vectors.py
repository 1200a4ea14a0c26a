"""Every byte of secure sums against vectors that were published, and those of the reference."""

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from corolla.sums import boxes, keeper, ring, shamir, transcript
from corolla.sums.device import Device, Owner
from corolla.sums.messages import Deposit, Listing, Masked, Prepare, Question
from corolla.sums.opening import Opening
from corolla.sums.roster import Roster
from tests.corolla.sums import reference, write_vectors

VECTORS = json.loads(write_vectors.PATH.read_text())
SESSIONS = {session["name"]: session for session in VECTORS["sessions"]}
PUBLISHED = {
    name: {field: bytes.fromhex(text) for field, text in own.items()}
    for name, own in VECTORS["published"].items()
}


def test_the_file_is_what_the_reference_writes() -> None:
    assert json.loads(json.dumps(write_vectors.vectors())) == VECTORS


def test_keys_agree_as_published() -> None:
    own = PUBLISHED["RFC 7748, 6.1"]
    secret = X25519PrivateKey.from_private_bytes(own["secret"])
    assert boxes.agree(secret, own["public"]) == own["agreed"]


def test_keys_are_derived_as_published() -> None:
    """By the library that transcript.derive calls, and by the reference of the vectors."""
    own = PUBLISHED["RFC 5869, A.1"]
    derived = HKDF(SHA256(), 42, own["salt"], own["info"]).derive(own["secret"])
    assert derived == reference.hkdf(own["secret"], own["salt"], own["info"], 42) == own["key"]


def test_boxes_are_sealed_as_published() -> None:
    own = PUBLISHED["RFC 8439, 2.8.2"]
    assert (
        ChaCha20Poly1305(own["key"]).encrypt(own["nonce"], own["plain"], own["text"]) == own["box"]
    )


def test_signatures_are_as_published() -> None:
    own = PUBLISHED["RFC 8032, 7.1"]
    signed = Ed25519PrivateKey.from_private_bytes(own["secret"]).sign(own["text"])
    assert signed == own["signature"]
    assert boxes.signed(own["public"], signed, own["text"])
    assert not boxes.signed(own["public"], signed, b"another")


def test_streams_are_as_published() -> None:
    own = PUBLISHED["SP 800-38A, F.5.5"]
    cipher = Cipher(algorithms.AES256(own["key"]), modes.CTR(own["counter"])).encryptor()
    assert cipher.update(own["plain"]) == own["stream"]


@pytest.mark.parametrize("values", [1, 8])
def test_masks_are_the_stream(values: int) -> None:
    key = bytes.fromhex(VECTORS["stream"]["key"])
    total = np.zeros(values, np.uint32)
    ring.add_masks(total, [(key, 1)])
    assert total.tobytes().hex() == VECTORS["stream"]["of_values"][str(values)]
    ring.add_masks(total, [(key, -1)])
    assert not total.any()


def test_shares_are_those_of_the_reference() -> None:
    own = VECTORS["shamir"]
    secret, random = bytes.fromhex(own["secret"]), bytes.fromhex(own["coefficients"])
    assert [share.hex() for share in shamir.split(secret, 3, 5, random)] == own["shares"]
    assert own["shares"][0].startswith("6061626364656667")


class Replayed:
    """A member's random bytes, as the vectors have them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def __call__(self, size: int) -> bytes:
        self.place += size
        return self.data[self.place - size : self.place]


def shown(data: bytes) -> Any:
    return write_vectors.shown(data)


def devices_of(session: dict[str, Any]) -> dict[int, Device]:
    """The devices of a session, in the roster of its identities."""
    keys = bytes.fromhex(session["identities"])
    roster = Roster(
        tuple((f"member-{i}", keys[32 * i : 32 * i + 32]) for i in range(session["members"]))
    )
    found = {}
    for number, draws in session["draws"].items():
        random = Replayed(bytes.fromhex(draws))
        identity = Ed25519PrivateKey.from_private_bytes(random(32))
        owner = Owner(roster, int(number), smallest=1)
        found[int(number)] = Device(owner, identity, set(), random)
    return found


def task_of(session: dict[str, Any]) -> bytes:
    config, model, version, group, sha, log = map(bytes.fromhex, session["settings"]["task"])
    return transcript.task(config, model, version, [(group.decode(), sha)], log)


@pytest.mark.parametrize("name", SESSIONS)
def test_members_send_the_bytes_of_the_reference(name: str) -> None:
    session, devices = SESSIONS[name], devices_of(SESSIONS[name])
    call = Prepare.unpack(bytes.fromhex(session["prepare"]))
    listing, task = Listing.unpack(bytes.fromhex(session["listing"])), task_of(session)
    assert call.pack().hex() == session["prepare"]
    assert listing.pack().hex() == session["listing"]
    assert transcript.prepare(call.fields()).hex() == session["prep"]
    assert task.hex() == session["task"]
    for number, device in devices.items():
        if number in session["no_deposit"]:
            continue
        seat = call.seats[number]
        assert device.session(call.run).signature == seat.signature
        assert device.prepare(call).pack().hex() == session["deposits"][str(number)]
        if number in session["no_reply"]:
            continue
        device.begin(listing, task)
        assert device.accepted is not None
        assert device.accepted.context == bytes.fromhex(session["context"])
        masked = device.mask(reference.inputs(number, call.quantiser.size))
        assert shown(masked.pack()) == session["replies"][str(number)]


@pytest.mark.parametrize("name", ["five", "ten"])
def test_a_server_opens_the_sum_of_the_reference(name: str) -> None:
    session, devices = SESSIONS[name], devices_of(SESSIONS[name])
    call = Prepare.unpack(bytes.fromhex(session["prepare"]))
    opening, size = Opening(call, devices[0].owner.roster, 1), call.quantiser.size
    for number, data in session["deposits"].items():
        opening.deposit(int(number), Deposit.unpack(bytes.fromhex(data)))
    assert opening.announce(task_of(session)).pack().hex() == session["listing"]
    for number, data in session["replies"].items():
        opening.reply(int(number), Masked.unpack(bytes.fromhex(data), size))
    opening.close()
    question = opening.question(0)
    assert question.pack().hex() == session["question"]
    assert Question.unpack(question.pack()) == question
    for number in map(int, session["deposits"]):
        device = devices[number]
        device.prepare(call)
        answer = keeper.answer(device, opening.question(number))
        if number == 0:
            assert answer.pack().hex() == session["answer"]
        opening.answer(number, answer)
    opened = opening.open()
    assert opened.total.tobytes().hex() == session["sum"]
    assert opened.members == tuple(map(int, session["replies"]))


def test_a_long_vector_is_hashed() -> None:
    """The session of 2^18 + 1 values goes beyond one piece of a stream."""
    sizes = {name: session["values"] for name, session in SESSIONS.items()}
    assert sizes["long"] == 2**18 + 1
    assert (
        SESSIONS["long"]["sum"]
        == "sha256:"
        + hashlib.sha256(
            sum(reference.inputs(i, 2**18 + 5) for i in range(5)).astype(np.uint32).tobytes()  # type: ignore[union-attr]
        ).hexdigest()
    )
