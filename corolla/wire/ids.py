"""Ids that peers send: they become names of files, so nothing but hexadecimal digits passes."""

import re


def is_hexadecimal(text: str, shortest: int, longest: int) -> bool:
    """Whether `text` is so many lower-case hexadecimal digits, and nothing else."""
    return re.fullmatch(rf"[0-9a-f]{{{shortest},{longest}}}", text) is not None
