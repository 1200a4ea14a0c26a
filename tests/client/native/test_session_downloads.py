"""A native phone gets the programs of its gateway's bundle, whatever happens on the way."""

import hashlib
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from tests.client.native.fake_gateway import Line, make_bundle, public_half
from tests.client.native.phones import FILES, World, a_task
from tests.server.gateway import gateways

MIB = protocol.CHUNK
CHUNKS = [0, MIB, 2 * MIB, 3 * MIB]  # of base.ptd


def whole(world: World) -> bool:
    """Every file of the bundle is there and right; a phone that mends one removes it first."""
    try:
        return all(world.installed(name).read_bytes() == data for name, data in FILES.items())
    except FileNotFoundError:
        return False


def test_a_phone_gets_the_bundle_trains_and_reports(offered: World) -> None:
    offered.fake.tasks = [a_task()]
    phone = offered.start(rounds=1, methods="grad", memory="200MB")
    assert phone.finish() == 0, phone.errors
    assert phone.lines == [
        f"p1 has 9 examples, asks {offered.address}",
        f"bundle {offered.fake.model.sha256[:12]} of made-up is here",
        "round 1 as gate/p1: accepted",
    ]
    assert whole(offered)
    first, second = (request for name, request in offered.fake.asked if name == "CheckIn")
    assert (first.manifest, second.manifest) == ("", offered.fake.model.sha256)
    assert (first.protocol, first.device, first.num_examples, first.own_model) == (
        1,
        "p1",
        9,
        False,
    )
    assert list(first.native.methods) == ["grad"]
    assert (first.native.signs, first.native.runtime) == (1, "executorch 1.5.1")
    assert 0 < first.capabilities.memory_bytes <= 200_000_000
    assert first.capabilities.charging
    assert not first.capabilities.battery_percent  # nobody needs to know
    (asked,) = offered.answers()
    assert (asked["program"], asked["length"]) == ("fp32", 32)


def test_a_phone_that_starts_again_has_the_bundle_already(offered: World) -> None:
    for _ in range(2):
        phone = offered.start(once=True)
        assert phone.finish() == 0, phone.errors
    assert phone.lines[1:] == ["waiting: no round"]
    assert offered.fake.downloads(offered.bundle / "base.ptd") == CHUNKS


def test_a_line_that_is_cut_costs_the_chunk_on_its_way(offered: World) -> None:
    line = Line(int(offered.address.rpartition(":")[2]))
    line.allowance["down"] = 2.5 * MIB
    phone = offered.start(once=True, gateway=f"localhost:{line.port}")
    gateways.until(lambda: line.down)
    phone.says("no answer, trying again: UNAVAILABLE")
    line.restore()
    assert phone.finish() == 0, phone.errors
    line.close()
    assert whole(offered)
    asked = offered.fake.downloads(offered.bundle / "base.ptd")
    assert sorted(set(asked)) == CHUNKS
    assert len(asked) <= len(CHUNKS) + 2  # what was under way, and perhaps asked for once more


def test_a_phone_that_is_killed_goes_on_with_the_chunk_it_lacks(offered: World) -> None:
    asked, killed = offered.fake.downloads, threading.Event()
    base = offered.bundle / "base.ptd"

    def slow(name: str, context: grpc.ServicerContext) -> None:
        if name == "Download" and len(asked(base)) == 3:
            killed.wait(60)

    offered.fake.before = slow
    phone = offered.start(once=True)
    gateways.until(lambda: len(asked(base)) == 3)
    phone.kill()
    killed.set()
    again = offered.start(once=True)
    assert again.finish() == 0, again.errors
    assert whole(offered)
    assert asked(base) == [0, MIB, 2 * MIB, 2 * MIB, 3 * MIB]


def test_what_lies_there_is_checked_before_it_is_taken(offered: World) -> None:
    """Of a partial file the second chunk is wrong: it and what follows are fetched."""
    part = offered.state() / "bundles" / f"{offered.fake.model.sha256}.new"
    part.mkdir(parents=True)
    data = FILES["base.ptd"]
    (part / "base.ptd").write_bytes(data[:MIB] + os.urandom(MIB) + data[2 * MIB : 2 * MIB + 5])
    phone = offered.start(once=True)
    assert phone.finish() == 0, phone.errors
    assert whole(offered)
    assert offered.fake.downloads(offered.bundle / "base.ptd") == CHUNKS[1:]


def flipped(chunk: pb.Chunk, with_checksum: bool) -> None:
    content = bytes([chunk.content[0] ^ 1]) + chunk.content[1:]
    crc32 = protocol.chunk(content, 0, 1).crc32 if with_checksum else chunk.crc32
    chunk.content, chunk.crc32 = content, crc32


@pytest.mark.parametrize("with_checksum", [False, True], ids=["on the way", "at the gateway"])
def test_a_damaged_chunk_is_asked_for_again(offered: World, with_checksum: bool) -> None:
    seen: list[int] = []

    def spoil(chunk: pb.Chunk) -> None:
        seen.append(chunk.offset)
        if len(seen) % 3:
            flipped(chunk, with_checksum)

    offered.fake.spoil = spoil
    phone = offered.start(once=True)
    assert phone.finish() == 0, phone.errors
    assert whole(offered)


def test_a_chunk_that_is_wrong_for_ever_is_refused(offered: World) -> None:
    def spoil(chunk: pb.Chunk) -> None:
        if chunk.offset == MIB:
            flipped(chunk, with_checksum=True)

    offered.fake.spoil = spoil
    phone = offered.start(once=True)
    assert phone.finish() == 1
    assert phone.errors.startswith(
        f"error: the gateway's bundle is refused: the gateway sends a wrong chunk at {MIB} of "
    )
    assert phone.errors.count("\n") == 1
    assert not offered.installed("base.ptd").exists()
    assert offered.fake.downloads(offered.bundle / "base.ptd") == [0, MIB, MIB, MIB]
    offered.fake.spoil = lambda chunk: None
    again = offered.start(once=True)  # nothing that was right is asked for twice
    assert again.finish() == 0, again.errors
    assert offered.fake.downloads(offered.bundle / "base.ptd")[4:] == CHUNKS[1:]


@pytest.mark.parametrize("how", ["evicted", "damaged", "cut short"])
def test_a_base_that_is_not_whole_any_more_is_fetched_again(offered: World, how: str) -> None:
    """Also while the phone runs; what is still right of it is kept."""
    phone = offered.start()
    phone.says("is here")
    offered.fake.asked.clear()
    base = offered.installed("base.ptd")
    if how == "evicted":
        base.unlink()
    elif how == "damaged":
        with base.open("r+b") as file:  # in place: a file written anew is short for a moment
            file.seek(2 * MIB)
            byte = file.read(1)[0]
            file.seek(2 * MIB)
            file.write(bytes([byte ^ 1]))
    else:
        os.truncate(base, MIB + 7)
    gateways.until(lambda: len(phone.lines) > 1 and whole(offered))
    gateways.until(lambda: offered.fake.asked[-1][0] == "CheckIn")
    wanted = {"evicted": CHUNKS, "damaged": CHUNKS[2:], "cut short": CHUNKS[1:]}[how]
    assert offered.fake.downloads(offered.bundle / "base.ptd") == wanted
    assert not offered.fake.downloads(offered.bundle / "fp32.pte")


def test_a_new_bundle_reuses_the_files_it_shares_with_the_old_one(offered: World) -> None:
    assert offered.start(once=True).finish() == 0
    old = offered.installed("base.ptd")
    files = {**FILES, "fp32.pte": b"a newer program"}
    bundle = make_bundle(offered.folder / "newer", files, offered.key)
    offered.fake.bundle = bundle
    offered.fake.share(bundle)
    phone = offered.start(once=True)
    assert phone.finish() == 0, phone.errors
    assert offered.installed("fp32.pte").read_bytes() == b"a newer program"
    assert offered.installed("base.ptd").read_bytes() == FILES["base.ptd"]
    assert offered.fake.downloads(bundle / "base.ptd") == CHUNKS  # of the first time
    assert not old.exists()


def test_a_full_disk_is_told_in_one_line_before_anything_is_fetched(offered: World) -> None:
    full = offered.script("full", [{"after": 0, "storage_bytes": 2_000_000}])
    phone = offered.start(once=True, platform=f"script:{full}")
    assert phone.finish() == 0
    assert phone.lines[1:] == ["this device fails: the bundle needs 3 MB more, 2 MB are free"]
    assert not offered.fake.downloads(offered.bundle / "base.ptd")


def test_a_disk_that_fails_midway_is_told_in_one_line(offered: World) -> None:
    blocked = offered.state() / "bundles" / f"{offered.fake.model.sha256}.new" / "base.ptd"
    blocked.mkdir(parents=True)  # where a file should be
    phone = offered.start(once=True)
    assert phone.finish() == 0
    assert phone.lines[1:] == [f"this device fails: cannot open {blocked}: Is a directory"]


# --- signatures and versions ----------------------------------------------------------------------


def reoffer(world: World, **changes: object) -> None:
    bundle = make_bundle(world.folder / "other", FILES, world.key, **changes)
    world.fake.bundle = bundle
    world.fake.share(bundle)


def refusal(world: World, **changes: object) -> str:
    phone = world.start(once=True, **changes)
    assert phone.finish() == 1, phone.lines
    assert phone.errors.count("\n") == 1
    assert not world.fake.downloads(world.bundle / "base.ptd"), "before the signature was checked"
    start = "error: the gateway's bundle is refused: "
    assert phone.errors.startswith(start)
    return phone.errors.removeprefix(start).strip()


def test_a_bundle_of_another_publisher_is_refused(offered: World) -> None:
    other = public_half(Ed25519PrivateKey.generate(), offered.folder / "other.pub")
    assert refusal(offered, publisher=other) == f"manifest.json is not signed by the key in {other}"
    assert not list((offered.state() / "bundles").iterdir())


@pytest.mark.parametrize(
    ("path", "size", "words"),
    [
        ("manifest.json", 17 * MIB, f"blob has {17 * MIB} bytes, at most {16 * MIB}"),
        ("manifest.sig", 65, "blob has 65 bytes, at most 64"),
        ("fp32.pte", 9000, "fp32.pte is not the one in the signed manifest.json"),
    ],
)
def test_a_size_that_nobody_signed_is_refused(
    offered: World, path: str, size: int, words: str
) -> None:
    made = pb.Manifest.FromString(offered.fake.blobs[offered.fake.model.sha256])
    (file,) = [file for file in made.files if file.path == path]
    file.blob.size = size
    file.chunks = bytes(32) * -(-size // MIB)
    offered.fake.model = offered.fake.put(made.SerializeToString())
    assert refusal(offered) == words
    asked = {r.sha256 for name, r in offered.fake.asked if name == "Download"}
    assert file.blob.sha256 not in asked


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_a_manifest_or_signature_that_was_touched_is_refused(offered: World, name: str) -> None:
    path = offered.bundle / name
    data = path.read_bytes()
    path.write_bytes(data.replace(b"made-up", b"mede-up") if b"made" in data else data[::-1])
    offered.fake.share(offered.bundle)
    assert refusal(offered).startswith("manifest.json is not signed by the key in ")


def test_files_that_are_not_those_of_the_signed_manifest_are_refused(offered: World) -> None:
    """The gateway announces its own program, with its own checksums, beside a signed manifest."""
    (offered.bundle / "fp32.pte").write_bytes(b"another program")
    offered.fake.share(offered.bundle)
    assert refusal(offered) == "fp32.pte is not the one in the signed manifest.json"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"signs": 2}, "the bundle asks for version 2 of the sign stream, this client has 1"),
        ({"version": 7}, "the bundle is of version 7, this client reads 1"),
        ({"rank": "eight"}, "manifest.json cannot be read: "),
        ({"adapter": []}, "manifest.json describes no adapter"),
    ],
)
def test_a_signed_manifest_that_cannot_be_used_is_refused(
    offered: World, changes: dict[str, object], words: str
) -> None:
    reoffer(offered, **changes)
    assert refusal(offered).startswith(words)


def serial(world: World, number: object) -> None:
    """Offers a bundle of the same publisher with another serial number."""
    shutil.rmtree(world.folder / "other", ignore_errors=True)
    reoffer(world, **({} if number is None else {"serial": number}))


def test_an_older_bundle_of_the_same_publisher_is_refused(offered: World) -> None:
    serial(offered, 5)
    assert offered.start(once=True).finish() == 0
    raw = offered.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    known = offered.state() / "serials.json"
    assert json.loads(known.read_text()) == {hashlib.sha256(raw).hexdigest(): 5}
    for older in (4, None):  # one without a number is of before there were any
        serial(offered, older)
        offered.fake.asked.clear()
        assert refusal(offered) == (
            f"its serial number is {older or 0}, this device has seen 5 of the same publisher: "
            "ask for the newer one"
        )
    for newer in (5, 6):
        serial(offered, newer)
        phone = offered.start(once=True)
        assert phone.finish() == 0, phone.errors
    assert list(json.loads(known.read_text()).values()) == [6]


def test_an_older_bundle_that_is_here_already_is_refused_as_well(offered: World) -> None:
    serial(offered, 5)
    assert offered.start(once=True).finish() == 0
    raw = offered.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    known = {hashlib.sha256(raw).hexdigest(): 6}
    (offered.state() / "serials.json").write_text(json.dumps(known))
    (offered.state() / "bundles" / "current").unlink()
    offered.fake.asked.clear()
    assert refusal(offered).startswith("its serial number is 5, this device has seen 6 of ")


def test_a_bundle_of_another_publisher_has_serial_numbers_of_its_own(offered: World) -> None:
    serial(offered, 5)
    assert offered.start(once=True).finish() == 0
    offered.key = Ed25519PrivateKey.generate()
    other = public_half(offered.key, offered.folder / "other.pub")
    serial(offered, 1)
    phone = offered.start(once=True, publisher=other)
    assert phone.finish() == 0, phone.errors
    known = json.loads((offered.state() / "serials.json").read_text())
    assert sorted(known.values()) == [1, 5]


@pytest.mark.parametrize("text", ["", "[]", "3", "{"])
def test_a_damaged_note_of_serial_numbers_lets_no_bundle_in(offered: World, text: str) -> None:
    offered.state().mkdir(parents=True)
    (offered.state() / "serials.json").write_text(text)
    assert refusal(offered).startswith("serials.json is no ")


@pytest.mark.parametrize("number", [-1, 1 << 53, 1.5, "5", True])
def test_a_serial_number_that_is_none_is_refused(offered: World, number: object) -> None:
    serial(offered, number)
    assert refusal(offered) == (
        "manifest.json has no usable serial: expected a whole number from 0 to 2^53-1"
    )


def test_a_phone_that_refused_a_bundle_takes_a_better_one(offered: World) -> None:
    good = offered.bundle
    reoffer(offered, signs=2)
    phone = offered.start()
    phone.says("refused")
    offered.fake.share(good)
    phone.says("is here")
    assert phone.process.poll() is None


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", ".files", "a/../b", "a//b", "C:x", ""])
def test_a_gateway_names_no_path_outside_of_the_bundle(offered: World, path: str) -> None:
    made = pb.Manifest()
    blob = offered.fake.put(b"x")
    digest = bytes.fromhex(blob.sha256)
    made.files.append(pb.Manifest.File(path=path, blob=blob, chunks=digest))
    offered.fake.model = offered.fake.put(made.SerializeToString())
    assert refusal(offered) == f"'{path}' is no file of a bundle"


def test_a_bundle_is_verified_file_by_file(offered: World) -> None:
    def verify() -> "subprocess.CompletedProcess[str]":
        tool = offered.build / "corolla-phone-stub"
        publisher = offered.folder / "publisher.pub"
        command = [str(tool), "bundle", str(offered.bundle), str(publisher)]
        return subprocess.run(command, capture_output=True, text=True)

    found = json.loads(verify().stdout)
    assert found["parameters"] == 4
    assert found["files"] == sorted(FILES)
    base: Path = offered.bundle / "base.ptd"
    data = bytearray(base.read_bytes())
    data[-1] ^= 1
    base.write_bytes(data)
    done = verify()
    assert (done.returncode, done.stderr) == (
        1,
        "error: base.ptd does not match its sha256 in manifest.json\n",
    )
