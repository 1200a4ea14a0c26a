"""Files that ship with Corolla: the embedded model and data, the report template."""

import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from corolla.errors import ArtefactError


def asset(name: str) -> Path:
    """The path of an embedded file or folder.

    It lies beside the code in a checkout and in a wheel. A Flower App Bundle carries code only;
    there the files of the installed distribution are used, or of $COROLLA_ASSETS. Raises
    ArtefactError when none has it.
    """
    for root in _roots():
        path = root / name
        if path.exists():
            return path
    raise ArtefactError(
        f"embedded file {name!r} is not here: install corolla in this Python environment "
        f"(pip install), or give --model and --data"
    )


def _roots() -> Iterator[Path]:
    if named := os.environ.get("COROLLA_ASSETS"):
        yield Path(named) / "embedded"
    yield Path(__file__).resolve().parent
    for distribution in importlib.metadata.distributions(name="corolla"):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            yield Path(url2pathname(urlsplit(origin["url"]).path)) / "corolla" / "embedded"
        yield Path(str(distribution.locate_file("corolla/embedded")))
