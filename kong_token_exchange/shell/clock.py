"""The system clock."""

from __future__ import annotations

import time


class SystemClock:
    """Implements `ports.Clock`."""

    def now(self) -> float:
        """Return the wall clock as NumericDate, seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Return the monotonic clock, seconds."""
        return time.monotonic()
