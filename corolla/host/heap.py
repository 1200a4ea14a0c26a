"""The memory of this process: what it gives back to the system, looks through, and has had."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SPARING = 256 << 10
_MANY = 500
"""Modules that come together where libraries are imported for the first time."""


def spare_memory() -> None:
    """Have freed activations go back to the system: less memory, exactly as counted, more time.

    Without it, the heap of glibc keeps so much of what gradient checkpointing frees that little is
    gained. Costs page faults: small models take notably longer. For the whole process; no effect
    without glibc.
    """
    if sys.platform == "linux":
        import ctypes  # not for commands that only print

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(-3, _SPARING)  # M_MMAP_THRESHOLD


@contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage among what libraries make when they are imported, then or later.

    They make hundreds of thousands of objects that all stay: to look through them again and again
    takes a tenth of the time. A process that has them already may hold garbage, and keeps looking.
    """
    before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before[1] + _MANY:
            gc.freeze()
        if before[0]:
            gc.enable()


def peak_rss() -> int:
    """The largest resident memory this process has had, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
