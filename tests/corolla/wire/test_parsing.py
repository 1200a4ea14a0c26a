"""Entries are counted before they are parsed, whatever message they are in."""

from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from corolla.errors import WireError
from corolla.proto import device_pb2, update_pb2
from corolla.wire.limits import MAX_CACHED, MAX_ROWS
from corolla.wire.parsing import MOST, parse

FILES = (update_pb2.DESCRIPTOR, device_pb2.DESCRIPTOR)
MANY = 1 << 30


def every_message() -> Iterator[Descriptor]:
    """Every message of proto/, those within others too."""
    waiting = [found for file in FILES for found in file.message_types_by_name.values()]
    while waiting:
        found = waiting.pop()
        yield found
        waiting += found.nested_types


def test_every_repeated_field_has_a_limit_and_holds_none_of_its_own() -> None:
    repeated = [field for kind in every_message() for field in kind.fields if field.is_repeated]
    names = {".".join(field.full_name.split(".")[-2:]) for field in repeated}
    assert names == MOST.keys()
    assert [
        field.name
        for field in repeated
        if field.message_type and any(own.is_repeated for own in field.message_type.fields)
    ] == []


@given(st.lists(st.tuples(st.binary(max_size=200), st.binary(max_size=200)), max_size=20))
def test_as_many_entries_as_there_may_be_pass_and_one_more_does_not(
    entries: list[tuple[bytes, bytes]],
) -> None:
    made = [update_pb2.Bundle.Entry(header=header, payload=payload) for header, payload in entries]
    bundle = update_pb2.Bundle(entries=made)
    data = bundle.SerializeToString()
    few = {"Bundle.entries": len(entries)}
    assert parse(update_pb2.Bundle(), data, MANY, fewer=few) == bundle
    if entries:
        few = {"Bundle.entries": len(entries) - 1}
        with pytest.raises(WireError, match=f"more than {len(entries) - 1} entries of Bundle"):
            parse(update_pb2.Bundle(), data, MANY, fewer=few)


def test_entries_of_a_message_within_are_counted_also_where_it_comes_twice() -> None:
    """Parsers merge two messages of one field: the rows of both are there."""
    whole = update_pb2.Log(rows=[update_pb2.Scalars()] * (MAX_ROWS // 2 + 1))
    task = update_pb2.Task(log=whole).SerializeToString()
    assert len(parse(update_pb2.Task(), task, MANY).log.rows) == MAX_ROWS // 2 + 1
    assert len(update_pb2.Task.FromString(task + task).log.rows) == MAX_ROWS + 2
    with pytest.raises(WireError, match=rf"header has more than {MAX_ROWS} entries of Log\.rows"):
        parse(update_pb2.Task(), task + task, MANY, "header")


def test_fields_of_every_type_are_stepped_over() -> None:
    task = update_pb2.Task(schema=3, run_id="x" * 300, round=2**32 - 1, payload_bytes=2**64 - 1)
    task.cached.add(group="a")
    unknown = b"\x79" + b"\x00" * 8 + b"\x7d" + b"\x00" * 4
    assert parse(update_pb2.Task(), task.SerializeToString() + unknown, MANY).cached == task.cached
    with pytest.raises(WireError, match="more fields than Task may have"):
        parse(update_pb2.Task(), unknown * 100_000, MANY)
    data = task.SerializeToString() + unknown + b"\x4a\x00" * MAX_CACHED
    with pytest.raises(WireError, match=rf"more than {MAX_CACHED} entries of Task\.cached"):
        parse(update_pb2.Task(), data, MANY)


@given(st.binary(max_size=60))
def test_no_count_below_that_of_the_parser_passes(data: bytes) -> None:
    """Another reading of the same bytes would let more of them through."""
    for message, name in ((update_pb2.Bundle, "entries"), (update_pb2.Task, "cached")):
        try:
            found = len(getattr(message.FromString(data), name))
        except DecodeError:
            continue
        if found > 1:
            with pytest.raises(WireError):
                parse(message(), data, MANY, fewer={f"{message.__name__}.{name}": 1})


@pytest.mark.parametrize(
    "data", [b"\x0a", b"\x0a\xff", b"\xff" * 30, b"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"]
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="cannot be parsed"):
        parse(update_pb2.Bundle(), data, MANY)


@pytest.mark.parametrize("data", [b"\x0b", b"\x0c", b"\x0f"])
def test_groups_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="cannot be parsed"):
        parse(update_pb2.Bundle(), data, MANY)
