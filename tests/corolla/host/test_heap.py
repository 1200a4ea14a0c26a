"""What a process leaves alone while libraries are imported."""

import gc
import subprocess
import sys

import pytest

from corolla.host import heap


@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_looked_for_again_after_an_import(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is frozen where nothing has come: a process of many runs would keep all garbage."""
    frozen = gc.get_freeze_count()
    (gc.enable if before else gc.disable)()
    try:
        with pytest.raises(KeyError), heap.importing():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == before
    finally:
        gc.enable()
    assert gc.get_freeze_count() == frozen


def test_what_libraries_leave_is_frozen() -> None:
    code = (
        "import gc, sys; from corolla.host import heap; heap._MANY = 1\n"
        "with heap.importing(): import xml.dom.minidom\n"
        "print(gc.get_freeze_count() > 1000, gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
