"""A mapping that does not change, beside a dict that does."""

from hypothesis import given
from hypothesis import strategies as st

from corolla.server.gateway.shelf import Shelf


@given(st.lists(st.tuples(st.integers(-2000, 2000), st.integers()), max_size=300))
def test_a_shelf_holds_what_a_dict_holds_and_earlier_ones_stay_as_they_were(
    entries: list[tuple[int, int]],
) -> None:
    shelf, known = Shelf[int, int](), dict[int, int]()
    for key, value in entries:
        before, was = shelf, dict(known)
        shelf = shelf.put(key, value)
        known[key] = value
        assert dict(before) == was
    assert dict(shelf) == known
    assert len(shelf) == len(known)
    assert all((key in shelf) == (key in known) for key in range(-50, 50))


def test_one_more_entry_costs_one_part_of_many() -> None:
    """Where a mapping is copied whole, twelve thousand entries cost 72 million."""
    shelf, copied = Shelf[str, int](), 0
    for number in range(12_000):
        before, shelf = shelf, shelf.put(str(number), number)
        [changed] = [b for a, b in zip(before._parts, shelf._parts, strict=True) if a is not b]
        copied += len(changed)
    assert copied < 12_000 * 50
