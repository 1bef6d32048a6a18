"""The pod's side of its lease: what it holds itself to, what it reports, and which answers it believes (rule 9)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import msgspec

from toque import _subjects as subjects
from toque._protocol import LeaseAnswer, LeaseRequest, SessionRecord
from toque.sim.loop import run
from toque.storage.ports import BusTimeout, Message
from toque.workers.leasing import HUNGRY_PAUSE_S, PERIOD_S, Leasing
from toque.workers.session import Session
from toque.workers.slots import Slots


class Bench:
    """A Leasing whose Gatekeeper answers what the test says; its own clock is the session's."""

    def __init__(self) -> None:
        self.now_s = 100.0
        record = SessionRecord(pod="a", session="a-1", ttl_s=10.0)
        self.session = Session(SimpleNamespace(boottime=lambda: self.now_s), record)
        self.session.renewed(self.now_s)
        self.slots = Slots(may_start=lambda: False)
        self.requests: list[LeaseRequest] = []
        self.ceilings: list[int] = []  # of the slots, when each request was sent
        self.answer: LeaseAnswer | None = LeaseAnswer(1, 8, 8, 8)
        self.on_request: Callable[[], None] = lambda: None
        self.leasing = Leasing(self, "main", self.session, self.slots, slots_max=100)  # type: ignore[arg-type]

    async def subscribe(self, subject: str, handler: Callable[[Message], None]) -> SimpleNamespace:
        assert subject == subjects.gatekeeper_nudge("main")
        self.nudge = lambda: handler(Message(subject, b""))

        async def close() -> None:
            pass

        return SimpleNamespace(close=close)

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> Message:
        self.requests.append(msgspec.msgpack.decode(data, type=LeaseRequest))
        self.ceilings.append(self.slots.ceiling)
        self.on_request()
        if self.answer is None:
            raise BusTimeout("no answer")
        return Message("", msgspec.msgpack.encode(self.answer))

    async def next(self) -> LeaseRequest:
        """The next periodic request, answered."""
        count = len(self.requests)
        while len(self.requests) == count:
            await asyncio.sleep(PERIOD_S / 10)
        return self.requests[-1]


def on_bench(check: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        bench = Bench()
        asking = asyncio.create_task(bench.leasing.run())
        await bench.next()
        await check(bench)
        asking.cancel()

    run(main(), seed=1)


def test_a_pod_holds_itself_to_what_it_was_granted():
    """The holding, or less where the Gatekeeper's target is lower."""

    async def check(bench: Bench) -> None:
        assert (bench.leasing.leased, bench.slots.ceiling) == (8, 8)

        bench.answer = LeaseAnswer(1, 8, 5, 5)
        await bench.next()

        assert (bench.leasing.leased, bench.slots.ceiling) == (8, 5)

    on_bench(check)


def test_a_pod_lowers_its_ceiling_first_and_reports_after():
    """What a request says is free is used by nobody here any more."""

    async def check(bench: Bench) -> None:
        bench.answer = LeaseAnswer(1, 8, 5, 5)
        await bench.next()
        bench.slots.ceiling = 8  # as if the answer had not lowered it

        request = await bench.next()

        assert request.ceiling == 5
        assert bench.ceilings[-1] == 5

    on_bench(check)


def test_slots_in_use_are_not_reported_as_free():
    """Instances above a lowered ceiling run on to their next wait, and count so long."""

    async def check(bench: Bench) -> None:
        bench.slots.in_use = 7
        bench.answer = LeaseAnswer(1, 8, 2, 2)
        await bench.next()

        request = await bench.next()

        assert request.ceiling == 7
        bench.slots.in_use = 0

    on_bench(check)


def test_new_instances_go_no_further_than_the_fair_share():
    """What had begun may hold more; when it needs less, the ceiling follows, and the Gatekeeper hears it."""

    async def check(bench: Bench) -> None:
        bench.slots.in_use = 6
        bench.answer = LeaseAnswer(1, 8, 6, 4)
        await bench.next()
        await asyncio.sleep(0)
        assert (bench.slots.ceiling, bench.slots.admit, bench.slots.free) == (6, 4, 0)

        admitted: list[int] = []
        bench.on_request = lambda: admitted.append(bench.slots.admit)
        await bench.next()
        assert admitted == [4], "while an answer is awaited, too"

        bench.slots.in_use = 5
        bench.leasing.lower_soon()
        request = await bench.next()

        assert (request.ceiling, request.begun) == (5, 5)
        assert bench.slots.ceiling >= 5
        bench.slots.in_use = 0

    on_bench(check)


def test_what_was_reported_as_free_is_not_taken_back_when_the_answer_is_lost():
    """Closes: L1: what had begun needs 4 of 8 slots, the pod reports 4 and lowers its ceiling; the Gatekeeper grants the
    other 4 to another pod, and its answer is lost. Then instances wake here: 8 are needed again, and 8 were "leased"."""

    async def check(bench: Bench) -> None:
        bench.slots.in_use = 8
        bench.answer = LeaseAnswer(1, 8, 8, 2)
        await bench.next()
        await asyncio.sleep(0)
        assert (bench.leasing.leased, bench.slots.ceiling) == (8, 8)

        bench.slots.in_use, bench.answer = 4, None
        request = await bench.next()
        assert (request.ceiling, bench.slots.ceiling) == (4, 4)
        bench.slots.in_use = 3
        for serial in range(5):
            bench.slots.wake(0, SimpleNamespace(closed=False), serial)
        request = await bench.next()

        assert request.begun == 8
        assert (request.ceiling, bench.slots.ceiling) == (4, 4)
        bench.slots.in_use = 0

    on_bench(check)


def test_a_pod_above_its_target_asks_once_a_second_while_it_can_give_nothing_back():
    """Closes: a lower limit, or a dead pod's woken instances elsewhere: callbacks hold more than the target. Each request
    sets the ceiling, each ceiling starts a dispatch, and each dispatch asked for another request, 50 times a second."""

    async def check(bench: Bench) -> None:
        bench.slots.on_start = bench.leasing.lower_soon
        bench.slots._may_start = lambda: True
        bench.slots.in_use = 8
        bench.answer = LeaseAnswer(1, 8, 5, 5)
        await bench.next()
        before = len(bench.requests)
        await asyncio.sleep(5.0)
        assert len(bench.requests) - before == 5

        bench.slots.give_back()
        await asyncio.sleep(2 * HUNGRY_PAUSE_S)

        assert bench.requests[-1].ceiling == 7
        bench.slots.in_use = 0

    on_bench(check)


def test_a_woken_instance_without_a_slot_is_told_at_once():
    """Though the demand was told to be more: a queue is asked for twice, and waits behind it (decision 0010)."""

    async def check(bench: Bench) -> None:
        bench.slots.sources.append(SimpleNamespace(waiting=40, can_admit=False, slots_in_use=0))
        await bench.next()
        await asyncio.sleep(0)
        bench.slots.in_use = 8
        before = len(bench.requests)

        bench.slots.wake(0, SimpleNamespace(closed=False), 1)
        bench.leasing.ask_soon()
        await asyncio.sleep(2 * HUNGRY_PAUSE_S)

        assert [request.begun for request in bench.requests[before:]] == [9]
        bench.slots.in_use = 0

    on_bench(check)


def test_a_pod_that_is_full_by_its_own_slots_asks_once_a_second():
    """Closes: work waits beyond `--slots`, which no request can ask for; every dispatch took it for news, fifty times a
    second."""

    async def check(bench: Bench) -> None:
        bench.slots.on_hunger = bench.leasing.ask_soon
        bench.slots._may_start = lambda: True
        bench.slots.sources.append(SimpleNamespace(waiting=5, can_admit=True, slots_in_use=100))
        bench.slots.in_use = 100
        bench.slots.wake(0, SimpleNamespace(closed=False), 1)
        bench.answer = LeaseAnswer(1, 100, 100, 100)
        await bench.next()
        before = len(bench.requests)
        await asyncio.sleep(5.0)

        assert len(bench.requests) - before == 5
        bench.slots.in_use = 0

    on_bench(check)


def test_a_grant_that_comes_after_the_deadline_is_not_used():
    """The process was stopped: the slots may be another session's by now (protocol rule 7)."""

    async def check(bench: Bench) -> None:
        def stop() -> None:
            bench.now_s += 20

        bench.on_request, bench.answer = stop, LeaseAnswer(1, 50, 50, 50)
        await bench.next()
        await asyncio.sleep(0)

        assert (bench.leasing.leased, bench.slots.ceiling) == (8, 8)

    on_bench(check)


def test_an_older_gatekeepers_answer_is_ignored():
    """It was deposed, and has not heard of it."""

    async def check(bench: Bench) -> None:
        bench.answer = LeaseAnswer(0, 50, 50, 50)
        await bench.next()

        assert (bench.leasing.leased, bench.slots.ceiling) == (8, 8)

    on_bench(check)


def test_what_is_leased_stays_leased_without_a_gatekeeper():
    """Nothing is given up for want of an answer, and it is asked again soon."""

    async def check(bench: Bench) -> None:
        bench.answer = None
        await bench.next()
        await bench.next()

        assert (bench.leasing.leased, bench.slots.ceiling) == (8, 8)

    on_bench(check)


def test_numbers_grow_with_each_request():
    """So that the Gatekeeper can tell an old one that was delivered late."""

    async def check(bench: Bench) -> None:
        await bench.next()
        await bench.next()

        assert [request.number for request in bench.requests] == [1, 2, 3]

    on_bench(check)


def test_one_request_a_second_and_one_at_once_when_nudged():
    """The Gatekeeper nudges when it has slots, or wants some back."""

    async def check(bench: Bench) -> None:
        before = len(bench.requests)
        await asyncio.sleep(5.0)
        assert len(bench.requests) - before == 5

        bench.nudge()
        await asyncio.sleep(2 * HUNGRY_PAUSE_S)

        assert len(bench.requests) - before == 6

    on_bench(check)


def test_the_ceiling_falls_with_the_session():
    """The lease is over, whoever holds the slots now."""

    async def main() -> None:
        bench = Bench()
        asking = asyncio.create_task(bench.leasing.run())
        await bench.next()
        await asyncio.sleep(0)
        assert bench.slots.ceiling == 8

        asking.cancel()
        await asyncio.wait({asking})

        assert bench.slots.ceiling == 0

    run(main(), seed=1)
