"""Ids that peers send: they become names of files, so nothing but hexadecimal digits passes."""

import re


def is_hexadecimal(text: str, shortest: int, longest: int) -> bool:
    """Returns whether `text` is `shortest` to `longest` lower-case hexadecimal digits alone."""
    return re.fullmatch(rf"[0-9a-f]{{{shortest},{longest}}}", text) is not None
