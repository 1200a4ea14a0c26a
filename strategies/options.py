"""Options of strategies: the fields of their dataclasses, each with what it says of itself."""

import dataclasses
from typing import Any


def option(default: Any, text: str, example: Any) -> Any:
    """A field of a strategy: what it is in a sentence, and a value other than the default."""
    return dataclasses.field(default=default, metadata={"text": text, "example": example})
