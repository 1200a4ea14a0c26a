"""Options of strategies: the fields of their dataclasses, each with what it says of itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def option(
    default: Any, text: str, example: Any, beside: Mapping[str, object] | None = None
) -> Any:
    """A field of a strategy: what it is in a sentence, and a value other than the default.

    `beside` are options without which the example has no effect. An example that equals the default
    says that there is no other value.
    """
    known = {"text": text, "example": example, "beside": dict(beside or {})}
    return dataclasses.field(default=default, metadata=known)
