"""The host's own clock, as a port."""

from __future__ import annotations

import time


class SystemClock:
    """See `toque.storage.ports.Clock`."""

    def boottime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
