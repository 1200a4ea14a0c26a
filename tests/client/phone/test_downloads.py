"""Downloads that are cut, damaged or wrong: what is used is what was offered, byte for byte."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corolla.client.phone.downloads import fetch, fetch_model, verified
from corolla.errors import WireError
from corolla.phones import protocol
from corolla.proto import device_pb2 as pb
from corolla.server.gateway.blobs import Blobs, manifest
from corolla.storage.disk import DiskLimits, held

MIB = protocol.CHUNK


@dataclass
class Line:
    """A gateway's blobs at the end of a line that is cut after so many bytes."""

    blobs: Blobs
    bytes_left: float = float("inf")
    spoil: Callable[[pb.Chunk, int], None] = lambda chunk, number: None
    asked: list[int] = field(default_factory=list)

    def __call__(self, request: pb.DownloadRequest, size: int) -> pb.Chunk:
        chunk = self.blobs.chunk(request.sha256, request.offset)
        self.asked.append(request.offset)
        self.bytes_left -= len(chunk.content)
        if self.bytes_left < 0:
            raise ConnectionError("cut")
        self.spoil(chunk, len(self.asked))
        return chunk


def offered(model: Path, folder: Path) -> tuple[Line, pb.Blob]:
    blobs = Blobs(folder / "blobs")
    data, files = manifest(model)
    for name, path in files.items():
        blobs.share(name, path, path.stat().st_size)
    return Line(blobs), blobs.put(data)


def same(found: Path, model: Path) -> bool:
    files = [path for path in model.rglob("*") if path.is_file()]
    return all((found / p.relative_to(model)).read_bytes() == p.read_bytes() for p in files)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 3 * MIB + 1234), tail=st.binary(max_size=3))
def test_a_model_download_that_was_cut_at_any_byte_goes_on(
    cut: int, tail: bytes, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("phone")
    line, blob = offered(model, folder)
    part = folder / "models" / f"{blob.sha256}.part" / "model.safetensors"
    part.parent.mkdir(parents=True)
    weights = (model / "model.safetensors").read_bytes()
    part.write_bytes(weights[:cut] + tail)
    found = fetch_model(blob, folder / "models", line)
    assert same(found, model)
    assert verified(found)
    missing = [at for at in range(0, len(weights), MIB) if cut < min(at + MIB, len(weights))]
    kept = [at for at in missing if (weights[:cut] + tail)[at:][:MIB] == weights[at:][:MIB]]
    assert len(line.asked) == len(missing) - len(kept) + 2  # the empty file is asked for nowhere


def test_a_line_that_is_cut_again_and_again_costs_no_chunk_twice(
    model: Path, tmp_path: Path
) -> None:
    line, blob = offered(model, tmp_path)
    cuts = 0
    while True:
        line.bytes_left = 1.5 * MIB
        try:
            found = fetch_model(blob, tmp_path / "models", line)
            break
        except ConnectionError:
            cuts += 1
            assert not (tmp_path / "models" / blob.sha256).exists()
    assert same(found, model)
    assert cuts >= 2
    assert len(line.asked) <= 6 + cuts


def test_an_old_model_goes_first_where_the_disk_has_no_room_for_both(
    model: Path, tmp_path: Path
) -> None:
    line, blob = offered(model, tmp_path)
    models = tmp_path / "models"
    old = models / ("ab" * 32)
    old.mkdir(parents=True)
    (old / "model.safetensors").write_bytes(bytes(MIB))
    size = held(model)
    line.bytes_left = MIB
    with pytest.raises(ConnectionError):
        fetch_model(blob, models, line, DiskLimits(0, size + 2 * MIB))
    assert old.is_dir()
    with pytest.raises(ConnectionError):
        fetch_model(blob, models, line, DiskLimits(0, size + MIB // 2))
    assert not old.exists()
    line.bytes_left = float("inf")
    assert same(fetch_model(blob, models, line, DiskLimits(0, size + MIB // 2)), model)


def test_a_damaged_chunk_is_asked_for_again(model: Path, tmp_path: Path) -> None:
    line, blob = offered(model, tmp_path)

    def spoil(chunk: pb.Chunk, number: int) -> None:
        if number % 2:
            chunk.content = b"x" + chunk.content[1:]
        if number % 4 == 1:
            chunk.crc32 = protocol.chunk(chunk.content, 0, 1).crc32  # damaged before it was sent

    line.spoil = spoil
    assert same(fetch_model(blob, tmp_path / "models", line), model)


def test_a_chunk_that_is_wrong_for_ever_is_refused_and_nothing_is_loaded(
    model: Path, tmp_path: Path
) -> None:
    line, blob = offered(model, tmp_path)

    def spoil(chunk: pb.Chunk, number: int) -> None:
        content = b"x" + chunk.content[1:]
        chunk.CopyFrom(protocol.chunk(content, chunk.offset, chunk.size))

    line.spoil = spoil
    with pytest.raises(WireError, match="wrong chunk at 0"):
        fetch_model(blob, tmp_path / "models", line)
    assert not (tmp_path / "models" / blob.sha256).exists()
    assert len(line.asked) == 3


def test_bytes_that_are_not_those_announced_are_refused(tmp_path: Path) -> None:
    """A blob without checksums of its chunks is checked as a whole, and fetched anew."""
    blobs, data = Blobs(tmp_path / "blobs"), os.urandom(MIB + 5)
    line = Line(blobs)
    blob = blobs.put(data)
    part = tmp_path / f"{blob.sha256}.part"
    part.write_bytes(b"x" * MIB)
    with pytest.raises(WireError, match="does not match its checksum"):
        fetch(blob, tmp_path, line, 2 * MIB)
    assert not part.exists()
    assert fetch(blob, tmp_path, line, 2 * MIB) == data
    with pytest.raises(WireError, match="at most"):
        fetch(blob, tmp_path, line, MIB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blobs"]


def test_a_model_that_was_changed_on_disk_is_not_loaded_but_fetched_again(
    model: Path, tmp_path: Path
) -> None:
    line, blob = offered(model, tmp_path)
    found = fetch_model(blob, tmp_path / "models", line)
    before = len(line.asked)
    assert fetch_model(blob, tmp_path / "models", line) == found
    assert len(line.asked) == before
    with (found / "model.safetensors").open("r+b") as file:
        file.seek(MIB)
        file.write(b"x")
    assert not verified(found)
    assert same(fetch_model(blob, tmp_path / "models", line), model)


def test_a_new_model_takes_the_place_of_the_old(model: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / ("0" * 64)).mkdir(parents=True)
    (models / f"{'1' * 64}.part").mkdir()
    line, blob = offered(model, tmp_path)
    found = fetch_model(blob, models, line)
    assert list(models.iterdir()) == [found]
    assert same(found, model)
    assert {file.path for file in protocol.read_manifest(manifest(found)[0]).files} == {
        file.path for file in protocol.read_manifest(manifest(model)[0]).files
    }  # it can be passed on
