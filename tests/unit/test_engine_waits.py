"""Sleeping: a resting engine gives its slot back and leaves memory; timers survive everything and are never early (E5)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from example_flows import EXAMPLES, PARAMS, Example
from unit.engine_host import EngineHost, Recorder, play

from toque.storage import records as r
from toque.workers.engine import NEAR_MS
from toque.workers.waits import UNKNOWN_TIME_S, Waits
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]


def napping(*naps: str) -> type[Workflow[Any, Any]]:
    """Sleeps in parallel; returns their order of waking."""

    class Napping(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            woken: list[str] = []

            async def nap(duration: str) -> None:
                await step.sleep("nap", duration)
                woken.append(duration)

            await asyncio.gather(*(nap(duration) for duration in naps))
            return woken

    return Napping


def host_of(flow: type[Workflow[Any, Any]], **options: Any) -> EngineHost:
    host = EngineHost(flow, env=Recorder(), **options)
    host.create()
    return host


def test_a_far_sleep_gives_the_slot_back_and_leaves_memory() -> None:
    """After the acceptance of the record that says so."""

    async def story() -> None:
        host = host_of(napping("1 hour"))
        await host.settle()

        assert host.engine is None
        assert host.slots_given_back == 1
        assert host.row is not None
        assert host.row.status is r.Status.WAITING
        assert host.row.wake_at == 1_000_000 + 3_600_000 + 1
        assert await host.output() == ["1 hour"]

    play(story)


def test_a_near_sleep_keeps_the_slot() -> None:
    """A second or less is not worth leaving for."""

    async def story() -> None:
        host = host_of(napping(f"{NEAR_MS - 1} ms"))
        await host.settle()
        assert host.engine is not None

        assert await host.output() == [f"{NEAR_MS - 1} ms"]
        assert host.slots_given_back == 1
        assert host.of_kind(r.Woken) == []

    play(story)


def test_a_sleep_lasts_as_long_as_told_and_not_longer() -> None:
    """From the first call to the waking, by the broker's clock."""

    async def story() -> None:
        host = host_of(napping("90 minutes"))
        await host.ended()

        (started,), (done,) = host.of_kind(r.SleepStarted), host.of_kind(r.SleepDone)
        assert 5_400_000 <= done.at - started.at <= 5_400_010

    play(story)


def test_many_sleeps_wake_in_the_order_of_their_times() -> None:
    """Whatever order they were begun in, near and far mixed."""
    naps = [f"{(number * 37) % 101 + 0.5} seconds" for number in range(100)]

    async def story() -> None:
        host = host_of(napping(*naps))

        assert await host.output() == sorted(naps, key=lambda nap: float(nap.split()[0]))
        assert len(host.of_kind(r.SleepDone)) == 100

    play(story)


def test_equal_sleeps_wake_in_the_order_of_their_calls() -> None:
    """Two of one length are two timers."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            woken: list[int] = []

            async def nap(number: int) -> None:
                await step.sleep("nap", "1 hour")
                woken.append(number)

            await asyncio.gather(*(nap(number) for number in range(5)))
            return woken

    async def story() -> None:
        assert await host_of(Flow).output() == [0, 1, 2, 3, 4]

    play(story)


@pytest.mark.parametrize("until", [
    datetime(1970, 1, 1, tzinfo=UTC), datetime(1900, 1, 1, tzinfo=UTC),
    datetime(1970, 1, 1, 2, 0, tzinfo=UTC).astimezone(),
])
def test_a_time_that_is_past_or_in_any_zone_is_met(until: datetime) -> None:
    """The past returns at once, without a slot given back; a zone is only a way to write a time."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            await step.sleep_until("date", until)

    async def story() -> None:
        host = host_of(Flow)
        await host.ended()

        due = max(1, int(until.timestamp() * 1000))
        (started,), (done,) = host.of_kind(r.SleepStarted), host.of_kind(r.SleepDone)
        assert started.due == due
        assert done.at == max(due, 1_000_000)

    play(story)


def test_a_time_between_milliseconds_is_rounded_up() -> None:
    """So that it is never early, not even by half a millisecond."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            await step.sleep_until("date", datetime(1970, 1, 1, 1, tzinfo=UTC) + timedelta(microseconds=1))

    async def story() -> None:
        host = host_of(Flow)
        await host.ended()

        assert host.of_kind(r.SleepStarted)[0].due == 3_600_001

    play(story)


@pytest.mark.parametrize("rate", [0.5, 0.999, 1.001, 2.0])
@pytest.mark.parametrize("nap", ["700 ms", "10 minutes"])
def test_a_timer_waits_for_the_brokers_clock_not_the_pods(nap: str, rate: float) -> None:
    """The broker's clock runs slower or faster than the pod's: the wait is by the broker's."""

    async def story() -> None:
        began = asyncio.get_running_loop().time()
        host = host_of(napping(nap), clock=lambda: 1000 + (asyncio.get_running_loop().time() - began) * rate)
        await host.ended()

        (started,), (done,) = host.of_kind(r.SleepStarted), host.of_kind(r.SleepDone)
        assert done.at >= started.due

    play(story)


def test_a_sleep_is_not_short_by_what_the_clock_was_behind() -> None:
    """The pod knows broker time with a bound: the wait is counted from the latest it may be, and ends by the earliest."""

    async def story() -> None:
        host = EngineHost(napping("800 ms"))
        host.behind_ms = 300
        host.create()
        began = asyncio.get_running_loop().time()
        await host.settle()
        host.behind_ms = 0  # a better sample comes
        await host.ended()

        assert asyncio.get_running_loop().time() - began >= 0.8

    play(story)


def test_no_timer_fires_while_broker_time_is_unknown() -> None:
    """A pod that cannot bound it fires nothing (protocol rule 10), and fires soon when it can again."""

    async def story() -> None:
        host = host_of(napping("500 ms"))
        host.time_known = False
        await asyncio.sleep(60)
        assert host.of_kind(r.SleepDone) == []

        host.time_known = True
        await asyncio.sleep(UNKNOWN_TIME_S)
        assert len(host.of_kind(r.SleepDone)) == 1

    play(story)


@pytest.mark.parametrize("crashes", [1, 5])
def test_a_sleep_survives_crashes_and_is_not_begun_again(crashes: int) -> None:
    """It ends when it was due at first, however often its pod died."""

    async def story() -> None:
        host = host_of(napping("1 hour"))
        for _ in range(crashes):
            await asyncio.sleep(300)
            host.crash()
            await asyncio.sleep(60)
            host.load()
        await host.ended()

        (started,), (done,) = host.of_kind(r.SleepStarted), host.of_kind(r.SleepDone)
        assert started.due <= done.at <= started.due + 10

    play(story)


def test_a_sleep_that_is_over_while_nobody_owns_it_ends_when_somebody_does() -> None:
    """Late is allowed, lost is not."""

    async def story() -> None:
        host = host_of(napping("1 hour"))
        await host.settle()
        host.crash()
        await asyncio.sleep(10_000)
        host.load()

        assert await host.output() == ["1 hour"]

    play(story)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_examples_come_to_the_same_end_without_leaving_memory(example: Example) -> None:
    """A resting engine that is woken before it has left memory goes on where it is."""

    async def story() -> None:
        host = EngineHost(example.flow, PARAMS, env=Recorder(), evicts=False)
        host.create()

        assert await host.output() == example.output

    play(story)


def test_a_callback_beside_a_sleep_keeps_the_slot_until_it_is_done() -> None:
    """Then the instance rests, and says so with a record of its own."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            await asyncio.gather(step.do("busy", self.env.work, 1, 100.0), step.sleep("nap", "1 hour"))

    async def story() -> None:
        host = host_of(Flow)
        await asyncio.sleep(99)
        assert host.slots_given_back == 0
        await asyncio.sleep(2)
        assert host.slots_given_back == 1
        assert len(host.of_kind(r.Waiting)) == 1
        await host.ended()

    play(story)


class CancelsSleep(Workflow[Any, Any]):
    """Cancels a sleep of an hour, then sleeps two."""

    async def run(self, event: Event, step: Step) -> Any:
        short = step.sleep("short", "1 hour")
        await step.do("a", self.env.work, 1, 5.0)
        short.cancel()
        await step.sleep("long", "2 hours")
        return "done"


def test_a_cancelled_sleep_wakes_nobody() -> None:
    """Neither in memory nor in the index is anything left of its timer."""

    async def story() -> None:
        host = host_of(CancelsSleep)
        await asyncio.sleep(10)
        assert host.row is not None
        assert list(host.row.timers) == ["2:1:long"]

        assert await host.output() == "done"
        assert len(host.of_kind(r.Woken)) == 1

    play(story)


def test_a_cancelled_retry_wakes_nobody() -> None:
    """The pause between attempts is a timer, too."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            trying = step.do("bad", self.env.fail, 99, retries=Retries(delay="1 hour"))
            await step.do("a", self.env.work, 1, 5.0)
            trying.cancel()
            await step.sleep("long", "2 hours")
            return "done"

    async def story() -> None:
        host = host_of(Flow)

        assert await host.output() == "done"
        assert [record.name for record in host.of_kind(r.StepCancelled)] == ["bad"]
        assert len(host.of_kind(r.Woken)) == 1

    play(story)


def test_a_cancellation_is_recorded_once() -> None:
    """Cut after it or before it, replayed as often as you like."""

    async def story(records: int) -> None:
        host = host_of(CancelsSleep)
        await host.cut_after(records)
        host.load()
        await host.settle()
        host.crash()
        host.load()

        assert await host.output() == "done"
        assert len(host.of_kind(r.StepCancelled)) == 1

    for records in range(1, 6):
        play(lambda records=records: story(records))


def test_a_cancelled_callback_that_waits_at_the_gate_does_not_keep_the_slot() -> None:
    """It is not entered any more, and nothing waits for it."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            never = step.do("never", self.env.work)
            await step.sleep("short", "500 ms")
            never.cancel()
            await step.sleep("long", "1 hour")

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder())
        host.gate_open = False
        host.create()
        await asyncio.sleep(1)
        assert host.slots_given_back == 1
        host.open_gate()
        await host.ended()

        assert host.env.entries == []

    play(story)


class Clock:
    """A Waits' host."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def now_ms(self) -> int:
        return int(asyncio.get_running_loop().time() * 1000) + self.ahead_ms

    def may_fire(self) -> bool:
        return True


def test_waits_keep_one_timer_for_the_soonest() -> None:
    """A thousand waits do not put a thousand timers into the pod's loop."""

    async def story() -> None:
        loop: Any = asyncio.get_running_loop()
        clock: Any = Clock()
        fired: list[str] = []
        on_due: Callable[[str], None] = lambda key: (fired.append(key), waits.arm())[1]  # noqa: E731
        waits = Waits(clock, on_due)
        before = len(loop.pending_timers())
        for number in range(1000):
            waits.add(f"w{number}", clock.now_ms() + 5000 - number)
            waits.arm()
        assert len(loop.pending_timers()) == before + 1
        waits.drop("w999")
        waits.arm()
        await asyncio.sleep(4.2)
        assert 197 <= len(fired) <= 199
        assert fired == [f"w{number}" for number in range(998, 998 - len(fired), -1)]

        waits.disarm()
        await asyncio.sleep(60)
        assert len(fired) + len(waits) == 999

    play(story)
