"""Texts for people: one line, sizes in bytes, the nearest of known names."""

import difflib
import re
from collections.abc import Iterable

_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([kmgt]?)(i?)b?", re.IGNORECASE)


def one_line(text: str, most: int = 2000) -> str:
    """A peer's text made fit for a terminal and a log: printable, on one line, bounded."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:most]).split())


def human_bytes(count: float) -> str:
    """1536 → '1.5 KB'. Powers of 1000, as networks are billed."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def parse_bytes(text: str) -> int:
    """Bytes of "2GB", "512 MiB", "1.5g". Raises ValueError."""
    found = _BYTES.fullmatch(text.strip())
    if not found:
        raise ValueError("expected a size such as 2GB or 512MiB")
    step = 1024 if found[3] else 1000
    return int(float(found[1]) * step ** " kmgt".index(found[2].lower() or " "))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The question `did you mean 'NAME'?` with the most similar known name; "" if none is similar.

    `cutoff`: how similar it has to be, from 0 (anything) to 1 (the same).
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else ""
