"""The open waits of one instance: sleeps, and the pauses between attempts. One timer, for the soonest."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toque.workers.host import Host

UNKNOWN_TIME_S = 0.5  # broker time is not known well enough: look again so much later


class Waits:
    """Step key → due time in ms of broker time. `on_due` is called for each, soonest first, never early."""

    __slots__ = ("_armed", "_count", "_due", "_heap", "_host", "_on_due", "_timer")

    def __init__(self, host: Host, on_due: Callable[[str], None]) -> None:
        self._host = host
        self._on_due = on_due
        self._due: dict[str, int] = {}
        self._heap: list[tuple[int, int, str]] = []  # (due, order, key); entries that `_due` does not know are void
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._armed = 0  # the due time that the timer was set for

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, key: str) -> bool:
        return key in self._due

    @property
    def soonest(self) -> int:
        """When the first wait ends; 0 without one."""
        heap, due = self._heap, self._due
        while heap and due.get(heap[0][2]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else 0

    def add(self, key: str, due: int) -> None:
        """Wait, from the next `arm` on."""
        self._count += 1
        self._due[key] = due
        heapq.heappush(self._heap, (due, self._count, key))

    def drop(self, key: str) -> None:
        self._due.pop(key, None)

    def arm(self) -> None:
        """See that the timer stands for the soonest wait. To be called after each change, until `disarm`."""
        due = self.soonest
        if due == self._armed:
            return
        self.disarm()
        if due:
            self._armed = due
            self._set(max(0, due - self._host.now_ms()) / 1000)

    def disarm(self) -> None:
        """Fire nothing until the next `arm`."""
        self._armed = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Forget whom to call."""
        self.disarm()
        self._on_due = _nobody

    def _set(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._fire)

    def _fire(self) -> None:
        """End the soonest wait, if it is due by the broker's clock, whatever the pod's own says."""
        due = self.soonest
        early_ms = due - self._host.now_ms()
        if not due:
            self.disarm()  # the last one was dropped
        elif not self._host.may_fire():
            self._set(UNKNOWN_TIME_S)
        elif early_ms > 0:
            self._set(early_ms / 1000)
        else:
            self.disarm()
            key = self._heap[0][2]
            del self._due[key]
            self._on_due(key)


def _nobody(key: str) -> None:
    raise AssertionError(f"the wait {key!r} of an engine that has left memory came to its end")
