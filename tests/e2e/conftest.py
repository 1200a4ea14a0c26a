"""One process a worker of pytest that has imported Corolla, and is forked for each command."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import forked
from tests.e2e.forked import Commands


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """In a folder of a short name: the path of a socket has at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="corolla-"))
    try:
        with forked.serving(folder) as found:
            yield found
    finally:
        shutil.rmtree(folder)
