"""Rows of bytes and their numbers come back as they were written, from any place."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corolla.errors import DataError
from corolla.storage.shelf import Shelf, Shelving

NUMBERS = st.integers(-(2**63), 2**63 - 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(rows=st.lists(st.tuples(st.binary(), NUMBERS, st.integers(0, 300)), max_size=9))
def test_rows_come_back(
    rows: list[tuple[bytes, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shelf")
    shelving = Shelving(folder, ("a", "b"))
    for row, *numbers in rows:
        shelving.add(row, numbers)
    shelving.close()
    shelf = Shelf(folder)
    assert len(shelf) == len(rows)
    assert [shelf[i] for i in reversed(range(len(rows)))] == [row for row, *_ in reversed(rows)]
    assert shelf.columns["a"].tolist() == [own for _, own, _ in rows]
    assert shelf.columns["b"].tolist() == [own for *_, own in rows]
    assert shelf.columns["b"].dtype.itemsize <= 2


@pytest.mark.parametrize("name", ["rows", "numbers.npz"])
def test_half_a_shelf_is_none(name: str, tmp_path: Path) -> None:
    shelving = Shelving(tmp_path, ())
    shelving.add(b"row", ())
    shelving.close()
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(DataError, match="are damaged: delete it"):
        Shelf(tmp_path)
