"""Words for people."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The question `did you mean 'NAME'?` with the most similar known name; "" if none is similar.

    `cutoff`: how similar it has to be, from 0 (anything) to 1 (the same).
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else ""
