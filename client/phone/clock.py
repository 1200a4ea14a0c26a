"""The time of a device, so that a test can give it another one."""

import time
from threading import Event


class Clock:
    """The clocks of this machine, and waits by them."""

    def date(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def now(self) -> float:
        """Seconds of a clock that nobody sets."""
        return time.monotonic()

    def wait(self, event: Event, seconds: float) -> bool:
        """Waits so long at most; whether the event came."""
        return event.wait(seconds)
