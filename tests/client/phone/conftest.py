"""What the tests of a phone share."""

import os
from pathlib import Path

import pytest

from corolla.phones import protocol
from tests.client.phone.standing import Standing


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a model: an empty one, one of a few bytes, one of several chunks."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(os.urandom(3 * protocol.CHUNK + 1234))
    (folder / "sub").mkdir()
    (folder / "sub" / "tokenizer.json").write_bytes(os.urandom(100_000))
    return folder


@pytest.fixture
def clock() -> Standing:
    return Standing()
