"""Values of columns that are ids and labels, and those that are none."""

from collections.abc import Sequence
from typing import Any

from corolla.errors import DataError

COLUMNS = frozenset(
    {
        *("text", "prompt", "response", "completion", "question", "answer", "choices", "label"),
        *("messages", "conversations", "instruction", "input", "output", "context", "system"),
        *("answers", "tools", "chosen", "rejected", "client_id", "user_id", "split"),
    }
)
"""Columns of rows that are read by their names."""

_MANY = 20
"""Labels that are never too many."""


def identity(value: Any, key: str, where: str) -> str | None:
    """An id as text; None for what names nobody: null, NaN (a gap in a table), blank text.

    Raises DataError for a value that is no id.
    """
    if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: {key} must be text or a whole number, found {_shown(value)}")
    return str(value)


def label(value: Any, where: str) -> str | None:
    """A label as text; None for null and NaN (a gap in a table).

    Raises DataError for a value that is no class, and for -1, which many sets give to rows whose
    label is kept secret.
    """
    if value is None or value != value:
        return None
    if not isinstance(value, str | int):  # True and False are integers too
        raise DataError(
            f"{where}: label must be text, a whole number, true or false, found {_shown(value)}"
        )
    if str(value).strip() == "-1":
        raise DataError(
            f"{where}: label -1 stands for no label: leave such rows out, or write what it means "
            f"as text"
        )
    return str(value)


def _shown(value: Any) -> str:
    kinds = {list: "a list", tuple: "a list", dict: "an object", bool: "true or false"}
    kind = kinds.get(type(value), type(value).__name__)
    return f"{value!r}, a number with a point" if isinstance(value, float) else kind


def labels(found: Sequence[str | None], name: str) -> tuple[list[str], str]:
    """(the classes of a data set, sorted; what is to be said of them).

    `found` are the labels of its rows, `name` is its own. Raises DataError where all rows have one
    label.
    """
    classes = sorted({own for own in found if own is not None})
    if len(classes) == 1:
        raise DataError(
            f"{name}: all {len(found)} rows have the label {classes[0]!r}, which leaves nothing to "
            f"tell apart: give rows with other labels, or --set task=causal"
        )
    if len(classes) > _MANY and 2 * len(classes) > len(found):
        return classes, (
            f"{len(classes)} labels of {len(found)} rows, as {classes[0]!r}: more than half as "
            f"many as rows, which are hardly classes"
        )
    return classes, ""
