"""The native reader of tensors takes what the library writes, and refuses everything else."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from corolla.tensors import tree
from corolla.wire import codec
from tests.client.native.core_tasks import call
from tests.client.native.test_core_signs import PARAMS


@pytest.fixture(scope="session")
def check(native_build: Path) -> Path:
    return native_build / "corolla-native-check"


def test_tensors_survive_reading_and_writing(check: Path, tmp_path: Path) -> None:
    codec.write(str(tmp_path / "in"), PARAMS, {"a": "1", "b": "é"})
    assert call(check, "copy", tmp_path / "in", tmp_path / "out").returncode == 0
    assert tree.digest(load_file(tmp_path / "out")) == tree.digest(PARAMS)
    assert codec.read(str(tmp_path / "out"))[1] == {"a": "1", "b": "é"}


def test_payloads_have_the_groups_of_python(check: Path, tmp_path: Path) -> None:
    payload = {"adapter": PARAMS, "empty": {}, "key": {"key": torch.tensor([1, 2])}}
    (tmp_path / "payload").write_bytes(codec.encode(payload))
    found = json.loads(call(check, "payload", tmp_path / "payload").stdout)
    assert found["groups"] == {name: tree.digest(params) for name, params in payload.items()}
    assert found["digest"] == tree.digest_all(payload)


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> Mapping[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


HOSTILE = {
    "nothing": b"",
    "half a length": b"\x01\x02",
    "a header beyond the end": raw({}, length=1 << 20),
    "a header of all memory": raw({}, length=(1 << 64) - 1),
    "a large header": raw(b" " * ((8 << 20) + 1)),
    "no JSON": raw(b"{,}"),
    "deep JSON": raw(b"[" * 100_000),
    "a list": raw([]),
    "no UTF-8": raw(b'{"\xff": 1}'),
    "a tensor that is a number": raw({"x": 1}),
    "no shape": raw({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "an unknown type": raw(entry(dtype="F8"), bytes(8)),
    "a truncated buffer": raw(entry(), bytes(7)),
    "bytes left over": raw(entry(), bytes(9)),
    "a gap before": raw(entry(data_offsets=[4, 12]), bytes(12)),
    "offsets that go back": raw(entry(data_offsets=[8, 0]), bytes(8)),
    "a shape that lies": raw(entry(shape=[3]), bytes(8)),
    "a negative extent": raw(entry(shape=[-2]), bytes(8)),
    "a shape that overflows": raw(entry(shape=[1 << 62, 1 << 62, 4]), bytes(8)),
    "an extent without end": raw(entry(shape=[(1 << 64) - 1]), bytes(8)),
    "overlapping tensors": raw({**entry(), "y": entry()["x"]}, bytes(8)),
    "facts that are no text": raw({"__metadata__": {"a": 1}}),
    "a fraction of an offset": raw(entry(data_offsets=[0, 8.5]), bytes(8)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_honest_file_is_one_line(check: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "bad").write_bytes(HOSTILE[name])
    done = call(check, "digest", tmp_path / "bad")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"{tmp_path / 'bad'}: "), done.stderr


@pytest.mark.parametrize(
    "facts",
    [{}, {"groups": "{"}, {"groups": "{}"}, {"groups": "[1]"}, {"groups": '["other"]'}],
)
def test_a_payload_without_its_groups_is_refused(
    check: Path, tmp_path: Path, facts: dict[str, str]
) -> None:
    codec.write(str(tmp_path / "bad"), {"adapter/x": torch.ones(2)}, facts)
    done = call(check, "payload", tmp_path / "bad")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_token_files_say_what_they_hold(check: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path / "t.jsonl",
        '{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "example": 0}',
        '{"input_ids": [3, 4], "example": 0}',
        "",
        '{"input_ids": [5, 6, 7]}',
        '{"input_ids": [5], "example": 9}',  # nothing to predict
    )
    found = json.loads(call(check, "tokens", file, 8).stdout)
    assert found == {"sequences": 3, "targets": 5, "examples": 2}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"input_ids": "a"}',
        '{"input_ids": [8, 1]}',
        '{"input_ids": [-1, 1]}',
        '{"input_ids": [-100, 1]}',
        '{"input_ids": [1.5, 1]}',
        '{"input_ids": [18446744073709551615, 1]}',
        '{"input_ids": [1, 2], "labels": [1]}',
        '{"input_ids": [1, 2], "labels": [1, -7]}',
    ],
)
def test_a_token_file_that_is_none_names_its_line(check: Path, tmp_path: Path, line: str) -> None:
    file = write(tmp_path / "t.jsonl", '{"input_ids": [1, 2]}', line)
    done = call(check, "tokens", file, 8)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{file} line 2: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_token_file_without_targets_is_refused(check: Path, tmp_path: Path) -> None:
    done = call(check, "tokens", write(tmp_path / "t.jsonl", '{"input_ids": [1]}'), 8)
    assert "no sequence with a target" in done.stderr
