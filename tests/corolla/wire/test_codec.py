import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import WireError
from corolla.types import Payload
from corolla.wire import codec

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.uint8,
]
names = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=8)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bit pattern, also NaN, of 0 to 3 dimensions, some of them empty."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = dtype.itemsize
    for length in shape:
        size *= length
    data = draw(st.binary(min_size=size, max_size=size))
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


payloads = st.dictionaries(names, st.dictionaries(names, tensors(), max_size=3), max_size=3)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def sealed(header: object, data: bytes = b"") -> bytes:
    """A safetensors buffer with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(dtype: str, shape: list[int], end: int, data: bytes, **extra: Any) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    return sealed({"__metadata__": {"groups": '["a"]'}, "a/x": entry, **extra}, data)


@given(payloads)
def test_every_payload_comes_back_bit_for_bit(payload: Payload) -> None:
    found = codec.decode(codec.encode(payload))
    assert list(found) == list(payload)
    for group, params in payload.items():
        assert found[group].keys() == params.keys()
        for name, tensor in params.items():
            assert found[group][name].dtype == tensor.dtype
            assert found[group][name].shape == tensor.shape
            assert raw(found[group][name]) == raw(tensor)


def test_views_are_encoded_as_what_they_show() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    payload = {"a": {"transposed": tensor.T, "row": tensor[1], "every second": tensor[:, ::2]}}
    found = codec.decode(codec.encode(payload))["a"]
    assert found["transposed"].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert found["row"].tolist() == [4, 5, 6, 7]
    assert found["every second"].tolist() == [[0, 2], [4, 6], [8, 10]]


def test_a_tensor_under_two_names_is_encoded_twice() -> None:
    """Tied parameters of a head, or a strategy that sends one tensor in two groups."""
    tensor = torch.arange(6.0)
    found = codec.decode(codec.encode({"a": {"x": tensor, "y": tensor}, "b": {"x": tensor[:3]}}))
    assert found["a"]["x"].tolist() == found["a"]["y"].tolist() == tensor.tolist()
    assert found["b"]["x"].tolist() == [0, 1, 2]


def test_content_bytes_are_those_of_the_tensors_alone() -> None:
    payload = {
        "a": {"x": torch.zeros(3, 5), "y": torch.zeros(7, dtype=torch.bfloat16)},
        "b": {"z": torch.tensor(1, dtype=torch.int64)},
        "empty": {},
    }
    assert codec.content_bytes(payload) == 3 * 5 * 4 + 7 * 2 + 8


def test_the_content_id_is_of_names_types_shapes_and_values() -> None:
    params = {"x": torch.arange(4.0), "y": torch.zeros(2)}
    ids = [
        codec.content_id(params),
        codec.content_id({"x": torch.arange(4.0), "z": torch.zeros(2)}),
        codec.content_id({"x": torch.arange(4.0).reshape(2, 2), "y": torch.zeros(2)}),
        codec.content_id({"x": torch.arange(4.0), "y": torch.zeros(2, dtype=torch.int32)}),
        codec.content_id({"x": torch.arange(4.0), "y": torch.tensor([0.0, -0.0])}),
    ]
    assert len(set(ids)) == len(ids)
    assert all(len(i) == 32 and set(i) <= set("0123456789abcdef") for i in ids)
    turned = {"y": torch.zeros(4)[::2], "x": torch.arange(8.0)[:4]}
    assert codec.content_id(turned) == ids[0]


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        codec.decode(data)


def assert_sound(payload: Payload, most: int) -> None:
    """Tensors by name in groups, of no more bytes than there were."""
    tensors = [tensor for params in payload.values() for tensor in params.values()]
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) <= most


VALID = codec.encode({"a": {"x": torch.arange(6.0), "y": torch.tensor(1)}, "b": {}})


@given(st.integers(0, len(VALID) - 1))
def test_a_truncated_payload_is_refused(length: int) -> None:
    with pytest.raises(WireError):
        codec.decode(VALID[:length])


@given(st.sets(st.integers(0, 8 * len(VALID) - 1), min_size=1, max_size=4))
def test_flipped_bits_never_raise_anything_else(bits: set[int]) -> None:
    data = bytearray(VALID)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    with suppress(WireError):
        assert_sound(codec.decode(bytes(data)), len(data))


@given(
    st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F8_E8M0", "F4", "X"]),
    st.lists(st.integers(-1, 2**64), max_size=5),
    st.tuples(st.integers(-1, 2**64), st.integers(0, 64)),
    st.binary(max_size=16),
)
def test_lying_headers_never_raise_anything_else(
    dtype: str, shape: list[int], offsets: tuple[int, int], data: bytes
) -> None:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}
    with suppress(WireError):
        found = codec.decode(sealed({"__metadata__": {"groups": '["a"]'}, "a/x": entry}, data))
        assert_sound(found, len(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 8,
        b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93.",
        b"PK\x03\x04" + b"\x00" * 60,
        struct.pack("<Q", 1 << 62) + b"{}",
        sealed(b"[" * 100_000),
        sealed(b"\xff\xfe"),
        sealed([]),
        sealed({"__metadata__": {}}),
        sealed({"__metadata__": {"groups": "5"}}),
        sealed({"__metadata__": {"groups": '["a"'}}),
        sealed({"a/x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"abcd"),
        one("F32", [1 << 40], 1 << 42, b"abcd"),
        one("F32", [1 << 62], 4, b"abcd"),
        one("F32", [0, 1 << 62, 4], 0, b""),
        one("F32", [0, 1 << 63], 0, b""),
        one("F32", [2], 4, b"abcd"),
        one("F32", [1], 4, b"abcdefgh"),
        one("I16", [1], 2, b"ab"),
        one("C64", [1], 8, b"abcdefgh"),
        one("I8", [1], 1, b"a"),
        one("BOOL", [1], 1, b"\x07"),
        one("F32", [1], 4, b"abcd", b={"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}),
        one(
            "F32", [1], 4, b"abcd", **{"b/x": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]}}
        ),
    ],
    ids=lambda data: repr(data[:12]) + str(len(data)),
)
def test_what_is_no_payload_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        codec.decode(data)


def test_files_come_back_bit_for_bit(tmp_path: Path) -> None:
    params = {"x": torch.arange(4, dtype=torch.bfloat16), "y": torch.zeros(2, 3).T}
    codec.write(str(tmp_path / "f.safetensors"), params, {"format": "pt"})
    found, metadata = codec.read(str(tmp_path / "f.safetensors"))
    assert metadata == {"format": "pt"}
    assert {n: raw(t) for n, t in found.items()} == {n: raw(t) for n, t in params.items()}


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(b"junk")
    with pytest.raises(WireError, match="not a safetensors file"):
        codec.read(str(path))
