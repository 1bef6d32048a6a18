"""The slots that a pod may use now, and who gets the next one: woken before new, older first, max-min over SousChefs."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Protocol

from toque._logging import get_logger

SPARE_SLOTS = 64  # asked for beyond the work in sight, so that an idle system starts at once
PREFETCH_MAX = 256
DISPATCH_BURST_MAX = 256  # starts in one turn of the loop

_log = get_logger("toque.slots")


class Waker(Protocol):
    """A station, as far as slots go."""

    closed: bool

    def start_woken(self, serial: int) -> bool:
        """Load a woken instance into the slot just taken. False: it needs none any more."""
        ...


class Source(Protocol):
    """A SousChef, as far as slots go."""

    slots_in_use: int

    @property
    def can_admit(self) -> bool:
        """Whether a queued creation waits here that could be admitted now."""
        ...

    @property
    def waiting(self) -> int: ...

    def admit_next(self) -> bool:
        """Admit one into the slot just taken. False: there was none after all."""
        ...


class Slots:
    """One pod's slots. `ceiling` is what it holds itself to, `admit` is how far it goes with new instances.

    Instances above a lowered ceiling run to their next wait.
    """

    def __init__(self, *, may_start: Callable[[], bool]) -> None:
        self._loop = asyncio.get_running_loop()
        self._may_start = may_start
        self.ceiling = 0
        self.admit = 0
        self.in_use = 0
        self.sources: list[Source] = []
        self._woken: list[tuple[int, int, Waker, int]] = []
        self._woken_count = 0
        self._scheduled = False
        self.on_start: Callable[[], None] = lambda: None  # after each dispatch: queues may pull again
        self.on_hunger: Callable[[], None] = lambda: None  # work waits and no slot is free

    @property
    def free(self) -> int:
        """Slots for new instances."""
        return max(0, self.admit - self.in_use)

    @property
    def begun(self) -> int:
        """Slots in use, and those that woken instances wait for."""
        return self.in_use + len(self._woken)

    @property
    def demand(self) -> int:
        """Slots for the work that the pod sees."""
        return self.begun + sum(source.waiting for source in self.sources)

    @property
    def prefetch(self) -> int:
        return max(1, min(PREFETCH_MAX, self.ceiling // 4))

    def set_ceiling(self, ceiling: int, admit: int | None = None) -> None:
        """`admit`: at most the ceiling, and the same unless it is given."""
        self.ceiling = ceiling
        self.admit = ceiling if admit is None else min(admit, ceiling)
        self.kick()

    def wake(self, due: int, waker: Waker, serial: int) -> None:
        """A waiting instance wants to go on; those due first go first."""
        self._woken_count += 1
        heapq.heappush(self._woken, (due, self._woken_count, waker, serial))
        self.kick()

    def give_back(self) -> None:
        self.in_use -= 1
        assert self.in_use >= 0, "a slot was given back twice"
        self.kick()

    def kick(self) -> None:
        """Dispatch soon."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._scheduled = False
        if not self._may_start():
            return
        for _ in range(DISPATCH_BURST_MAX):
            if self.in_use >= self.ceiling:
                break
            try:
                if not self._start_one():
                    break
            except Exception:  # the edge of a loop's callback: one that cannot be started must not stop the others  # noqa: BLE001
                _log.exception("an instance could not be started")
        else:
            self.kick()
        self.on_start()
        waiting = self.in_use >= self.admit and any(source.can_admit for source in self.sources)
        if waiting or (self.in_use >= self.ceiling and self._woken):
            self.on_hunger()

    def _start_one(self) -> bool:
        while self._woken:
            _, _, waker, serial = heapq.heappop(self._woken)
            if waker.closed:
                continue
            if self._with_slot(lambda: waker.start_woken(serial)):  # noqa: B023  # called at once
                return True
        if self.in_use >= self.admit:
            return False
        best: Source | None = None
        for source in self.sources:
            if source.can_admit and (best is None or source.slots_in_use < best.slots_in_use):
                best = source
        if best is None:
            return False
        self._with_slot(best.admit_next)
        return True

    def _with_slot(self, start: Callable[[], bool]) -> bool:
        """Start something in a slot, which is free again when nothing was started."""
        self.in_use += 1
        started = False
        try:
            started = start()
        finally:
            if not started:
                self.in_use -= 1
        return started
