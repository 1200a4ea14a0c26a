"""Configs as commands get them, and what is said of those that are refused."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from corolla.config import load as loading
from corolla.config.run import RunConfig
from corolla.errors import ConfigError

BOTH = {trainer: {"trainer": trainer} for trainer in ("first_order", "zeroth_order")}
"""Classes of clients for strategies that need both ways to train."""


def load(
    tmp_path: Path,
    toml: str | None = None,
    settings: Sequence[str] = (),
    **overrides: object,
) -> RunConfig:
    """A config of a file with this text, of --set and of a command's own options."""
    file = None
    if toml is not None:
        file = tmp_path / "config.toml"
        file.write_text(toml)
    return loading.load(file, overrides, settings)


def refused(
    tmp_path: Path, toml: str | None = None, settings: Sequence[str] = (), **overrides: object
) -> str:
    """The message, which is one line, of a config that is refused."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml, settings, **overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message
