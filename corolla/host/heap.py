"""The memory of this process: what it gives back to the system, and the most it has had."""

import ctypes
import sys

_SPARING = 256 << 10


def spare_memory() -> None:
    """Have freed activations go back to the system: less memory, exactly as counted, more time.

    Without it, the heap of glibc keeps so much of what gradient checkpointing frees that little is
    gained. Costs page faults: small models take notably longer. For the whole process; no effect
    without glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(-3, _SPARING)  # M_MMAP_THRESHOLD


def peak_rss() -> int:
    """The largest resident memory this process has had, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
