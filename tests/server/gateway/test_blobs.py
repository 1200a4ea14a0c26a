"""What a gateway offers: chunks by content, manifests of models."""

import hashlib
import os
import zlib
from pathlib import Path

import pytest

from corolla.errors import ConfigError
from corolla.phones import protocol
from corolla.server.gateway import blobs as module
from corolla.server.gateway.blobs import Blobs, manifest

MIB = 1 << 20


@pytest.mark.parametrize("size", [1, 1 << 16, (1 << 16) + 1, 3 * MIB, 3 * MIB + 5])
def test_a_blob_comes_back_in_chunks_whatever_its_size(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    blobs = Blobs(tmp_path)
    blob = blobs.put(data)
    assert (blob.sha256, blob.size) == (hashlib.sha256(data).hexdigest(), size)
    assert blob.inline == (data if size <= 1 << 16 else b"")
    found = b""
    while len(found) < size:
        chunk = blobs.chunk(blob.sha256, len(found))
        assert 0 < len(chunk.content) <= MIB
        assert (chunk.offset, chunk.size) == (len(found), size)
        assert chunk.crc32 == zlib.crc32(chunk.content)
        found += chunk.content
    assert found == data


@pytest.mark.parametrize("offset", [10, 11, 1 << 60])
def test_beyond_its_end_there_is_no_chunk(offset: int, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blob = blobs.put(b"0123456789")
    with pytest.raises(KeyError):
        blobs.chunk(blob.sha256, offset)


def test_of_blobs_for_few_phones_the_oldest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LENT", 3 * MIB)
    blobs = Blobs(tmp_path)
    kept = blobs.put(os.urandom(MIB))
    pieces = [os.urandom(MIB if n % 2 else 1 << 17) for n in range(8)]
    lent = [blobs.lend(data) for data in pieces]
    blobs.lend(pieces[6])  # asked for again
    offered = [name for own in lent if (name := own.sha256) in blobs._small or name in blobs._files]
    assert offered == [own.sha256 for own in lent[4:]]
    assert blobs.chunk(lent[7].sha256, 0).content == pieces[7]
    assert len(list(tmp_path.iterdir())) == 3
    blobs.keep([kept.sha256])
    assert [path.name for path in tmp_path.iterdir()] == [kept.sha256]
    assert blobs._lent == {}


@pytest.mark.parametrize("name", ["", "0" * 64, "../secret", "/etc/passwd"])
def test_only_what_was_announced_is_offered(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(KeyError):
        Blobs(tmp_path / "blobs").chunk(name, 0)


def test_blobs_of_an_old_task_go_and_shared_files_stay(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    old, new = blobs.put(b"a" * MIB), blobs.put(b"b" * MIB)
    small = blobs.put(b"c")
    (tmp_path / "file").write_bytes(b"shared")
    blobs.share("f" * 64, tmp_path / "file", 6)
    blobs.keep({new.sha256})
    for gone in (old, small):
        with pytest.raises(KeyError):
            blobs.chunk(gone.sha256, 0)
    assert blobs.chunk(new.sha256, 0).content == b"b" * MIB
    assert blobs.chunk("f" * 64, 0).content == b"shared"
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [new.sha256]


def test_what_a_killed_gateway_left_is_deleted(tmp_path: Path) -> None:
    Blobs(tmp_path).put(b"a" * MIB)
    Blobs(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_names_every_file_that_cannot_run_code(tmp_path: Path) -> None:
    weights = os.urandom(2 * MIB + 7)
    for name, data in {
        "config.json": b"{}",
        "model.safetensors": weights,
        "sub/tokenizer.json": b"{}",
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"print()",
        ".hidden/config.json": b"{}",
        "README.md": b"#",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    data, files = manifest(tmp_path)
    found = {file.path: file for file in protocol.read_manifest(data).files}
    assert found.keys() == {"config.json", "model.safetensors", "sub/tokenizer.json"}
    own = found["model.safetensors"]
    assert own.blob.sha256 == hashlib.sha256(weights).hexdigest()
    pieces = (weights[:MIB], weights[MIB : 2 * MIB], weights[2 * MIB :])
    assert own.chunks == b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    assert files[own.blob.sha256] == tmp_path / "model.safetensors"
    assert manifest(tmp_path)[0] == data


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no model: it has no config\.json"):
        manifest(tmp_path)
