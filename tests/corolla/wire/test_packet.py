"""Entries are counted before they are parsed. Flower's records are tested with the wire format."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import WireError
from corolla.proto import update_pb2 as pb
from corolla.wire.packet import check_count


@given(st.lists(st.tuples(st.binary(max_size=200), st.binary(max_size=200)), max_size=20))
def test_as_many_entries_as_there_are_pass_and_one_less_does_not(
    entries: list[tuple[bytes, bytes]],
) -> None:
    made = [pb.Bundle.Entry(header=header, payload=payload) for header, payload in entries]
    data = pb.Bundle(entries=made).SerializeToString()
    check_count(data, len(entries))
    if entries:
        with pytest.raises(WireError, match=f"more than {len(entries) - 1} entries"):
            check_count(data, len(entries) - 1)


def test_fields_of_every_type_are_counted() -> None:
    task = pb.Task(schema=3, run_id="x" * 300, round=2**32 - 1, payload_bytes=2**64 - 1, seats=1)
    task.cached.add(group="a")
    data = task.SerializeToString() + b"\x79" + b"\x00" * 8 + b"\x7d" + b"\x00" * 4
    check_count(data, 8)
    with pytest.raises(WireError, match="more than 7"):
        check_count(data, 7)


@given(st.binary(max_size=60))
def test_no_count_below_that_of_the_parser_passes(data: bytes) -> None:
    """Another reading of the same bytes would let more of them through."""
    try:
        found = pb.Bundle.FromString(data)
    except DecodeError:
        return
    if len(found.entries) > 1:
        with pytest.raises(WireError):
            check_count(data, 1)


@pytest.mark.parametrize(
    "data", [b"\x0a", b"\x0a\xff", b"\xff" * 30, b"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"]
)
def test_what_is_no_message_is_left_to_the_parser_or_refused(data: bytes) -> None:
    try:
        check_count(data, 5)
    except WireError as error:
        assert "cannot be parsed" in str(error) or "more than" in str(error)


@pytest.mark.parametrize("data", [b"\x0b", b"\x0c", b"\x0f"])
def test_groups_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="cannot be parsed"):
        check_count(data, 5)
