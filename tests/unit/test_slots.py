"""Slots of one pod: never above the ceiling, woken before new, older first, max-min over SousChefs (rule 9)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from toque.sim.loop import run
from toque.workers.slots import DISPATCH_BURST_MAX, PREFETCH_MAX, Slots


class Chef:
    """A SousChef with so many creations waiting."""

    def __init__(self, name, waiting, log):
        self.name, self.waiting, self.log = name, waiting, log
        self.slots_in_use = 0
        self.open = True

    @property
    def can_admit(self):
        return self.waiting > 0 and self.open

    def admit_next(self):
        if not self.waiting:
            return False
        self.waiting -= 1
        self.slots_in_use += 1
        self.log.append(self.name)
        return True


class Station:
    """Wakes instances; those in `gone` need no slot any more."""

    def __init__(self, log):
        self.closed = False
        self.log, self.gone, self.broken = log, set(), set()

    def start_woken(self, serial):
        if serial in self.broken:
            raise ValueError("its rows cannot be read")
        if serial in self.gone:
            return False
        self.log.append(serial)
        return True


class Bench:
    def __init__(self):
        self.may_start = True
        self.slots = Slots(may_start=lambda: self.may_start)
        self.log = []
        self.station = Station(self.log)
        self.hunger = 0
        self.slots.on_hunger = self._hungry

    def _hungry(self):
        self.hunger += 1

    def chef(self, name, waiting):
        chef = Chef(name, waiting, self.log)
        self.slots.sources.append(chef)
        return chef

    async def dispatched(self):
        for _ in range(20):
            await asyncio.sleep(0)


def on_bench(check: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        await check(Bench())

    run(main(), seed=1)


def test_no_more_start_than_the_ceiling_allows():
    """L1 at the pod: what was granted, and not one more."""

    async def check(bench):
        bench.chef("a", 10)
        bench.slots.set_ceiling(3)
        await bench.dispatched()

        assert bench.log == ["a"] * 3
        assert (bench.slots.in_use, bench.slots.free, bench.slots.demand) == (3, 0, 10)
        assert bench.hunger > 0

    on_bench(check)


def test_a_woken_instance_without_a_slot_is_hunger_though_nothing_is_queued():
    """What had begun waits for a slot: it must not wait for the next periodic request."""

    async def check(bench):
        bench.slots.set_ceiling(1)
        for serial in (1, 2):
            bench.slots.wake(0, bench.station, serial)
        await bench.dispatched()

        assert (bench.log, bench.slots.begun) == ([1], 2)
        assert bench.hunger > 0

    on_bench(check)


def test_a_slot_given_back_is_used_again():
    """L2, L3: at once, while work waits."""

    async def check(bench):
        bench.chef("a", 2)
        bench.slots.set_ceiling(1)
        await bench.dispatched()
        bench.slots.give_back()
        await bench.dispatched()

        assert bench.log == ["a", "a"]
        assert bench.slots.in_use == 1

    on_bench(check)


def test_a_lowered_ceiling_starts_nothing_until_enough_have_ended():
    """L5: those above it run on; none is started in their place."""

    async def check(bench):
        bench.chef("a", 10)
        bench.slots.set_ceiling(3)
        await bench.dispatched()
        bench.slots.set_ceiling(1)
        bench.slots.give_back()
        bench.slots.give_back()
        await bench.dispatched()
        assert len(bench.log) == 3

        bench.slots.give_back()
        await bench.dispatched()
        assert len(bench.log) == 4

    on_bench(check)


def test_woken_go_before_new_and_the_longest_due_first():
    """L3: whoever waited gets the next slot before any new instance."""

    async def check(bench):
        bench.chef("a", 1)
        bench.slots.wake(30, bench.station, 3)
        bench.slots.wake(10, bench.station, 1)
        bench.slots.wake(10, bench.station, 2)
        bench.slots.set_ceiling(10)
        await bench.dispatched()

        assert bench.log == [1, 2, 3, "a"]

    on_bench(check)


def test_one_that_needs_its_slot_no_more_takes_none():
    """It ended meanwhile, or its station has left: its place in the row costs nothing."""

    async def check(bench):
        other = Station(bench.log)
        other.closed = True
        bench.station.gone = {1}
        bench.slots.wake(1, bench.station, 1)
        bench.slots.wake(2, other, 2)
        bench.slots.wake(3, bench.station, 3)
        bench.slots.set_ceiling(10)
        await bench.dispatched()

        assert bench.log == [3]
        assert (bench.slots.in_use, bench.slots.demand) == (1, 1)

    on_bench(check)


def test_the_sousChef_with_the_fewest_slots_is_next():
    """Max-min: a deep queue does not starve a short one."""

    async def check(bench):
        first, second, third = bench.chef("a", 10), bench.chef("b", 2), bench.chef("c", 10)
        bench.slots.set_ceiling(8)
        await bench.dispatched()

        assert (first.slots_in_use, second.slots_in_use, third.slots_in_use) == (3, 2, 3)

    on_bench(check)


def test_nothing_starts_while_the_pod_may_not():
    """Past the deadline, without broker time, or with a write-dead journal."""

    async def check(bench):
        bench.may_start = False
        bench.chef("a", 1)
        bench.slots.set_ceiling(1)
        await bench.dispatched()
        assert bench.log == []

        bench.may_start = True
        bench.slots.kick()
        await bench.dispatched()
        assert bench.log == ["a"]

    on_bench(check)


def test_a_closed_sousChef_blocks_nobody():
    """One that may not admit just now is passed over."""

    async def check(bench):
        bench.chef("a", 5).open = False
        bench.chef("b", 1)
        bench.slots.set_ceiling(3)
        await bench.dispatched()

        assert bench.log == ["b"]

    on_bench(check)


def test_many_starts_leave_the_loop_its_turns():
    """A burst is bounded; the rest follows in the next turns."""

    async def check(bench):
        bench.chef("a", 10 * DISPATCH_BURST_MAX)
        bench.slots.set_ceiling(10 * DISPATCH_BURST_MAX)
        await asyncio.sleep(0)
        assert len(bench.log) == DISPATCH_BURST_MAX

        await bench.dispatched()
        assert len(bench.log) == 10 * DISPATCH_BURST_MAX

    on_bench(check)


def test_the_prefetch_is_bounded_and_never_nothing():
    """1 without any slot, so that an idle system has no cycle latency; 256 at most."""

    async def check(bench):
        assert bench.slots.prefetch == 1
        bench.slots.set_ceiling(100_000)
        assert bench.slots.prefetch == PREFETCH_MAX

    on_bench(check)


def test_what_cannot_be_started_costs_no_slot_and_stops_nobody():
    """R1 and L2: an instance whose start raises is told in the log; its slot is free again and the next ones start."""

    async def check(bench):
        bench.station.broken = {1}
        for serial in (1, 2):
            bench.slots.wake(serial, bench.station, serial)
        bench.slots.set_ceiling(1)
        await bench.dispatched()

        assert bench.log == [2]
        assert bench.slots.in_use == 1

    on_bench(check)
