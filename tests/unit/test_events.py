"""Events and waits of one instance: by type, first in, first out, each given out once, whatever is killed when (V1, V2)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from unit.engine_host import EngineHost, Recorder, play

from toque.errors import EventTimeout, StepFailed
from toque.storage import records as r
from toque.workers.events import BUFFERED_MAX
from toque.workflow import Approval, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]


class Collect(Workflow[Any, Any]):
    """Waits for as many events of type "a" as its params say, and returns their payloads."""

    async def run(self, event: Event, step: Step) -> Any:
        return [await step.wait_for_event("next", "a") for _ in range(event.payload)]


def collecting(count: int, **options: Any) -> EngineHost:
    host = EngineHost(Collect, count, env=Recorder(), **options)
    host.create()
    return host


async def rested(host: EngineHost) -> None:
    """Until it has left memory, or nothing more happens by itself."""
    await host.settle()


def test_a_wait_gives_its_slot_back_and_an_event_takes_it_again() -> None:
    """While it waits it is out of memory; the event's payload is what run() gets."""

    async def story() -> None:
        host = collecting(1)
        await rested(host)
        assert host.engine is None
        assert host.row is not None
        assert (host.row.status, list(host.row.awaits.values())) == (r.Status.WAITING, ["a"])
        assert host.row.wake_at == 1_000_000 + 24 * 3_600_000 + 1

        await host.send("a", {"paid": 5})

        assert await host.output() == [{"paid": 5}]
        assert host.slots_given_back == 2

    play(story)


def test_events_before_their_waits_are_kept_in_order() -> None:
    """Sent before run() was entered, and before each wait began."""

    async def story() -> None:
        host = collecting(5, by_hand=True)
        for number in range(5):
            host.send("a", number)
        host.accept()
        await host.settle()
        while host.pending:
            host.accept()
            await host.settle()

        assert await host.output() == [0, 1, 2, 3, 4]
        assert host.of_kind(r.WaitStarted) == []

    play(story)


def test_events_meet_waits_by_type_whatever_their_order() -> None:
    """Both sides first in, first out within a type; the names of the steps play no part."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            return await asyncio.gather(step.wait_for_event("x", "a"), step.wait_for_event("y", "b"),
                                        step.wait_for_event("x", "a"), step.wait_for_event("y", "b"))

    async def story() -> None:
        host = EngineHost(Flow)
        host.create()
        await rested(host)
        for type_, payload in [("b", 1), ("b", 2), ("other", 3), ("a", 4), ("a", 5)]:
            host.send(type_, payload)

        assert await host.output() == [4, 1, 5, 2]

    play(story)


def test_a_repeat_of_an_event_changes_nothing() -> None:
    """Known by its id, also when the first one was taken long ago, and after a crash."""

    async def story() -> None:
        host = collecting(2)
        await rested(host)
        await host.send("a", 1, event_id="same")
        await host.send("a", 2, event_id="same")
        await rested(host)
        host.crash()
        host.load()
        await host.send("a", 3, event_id="same")
        assert len(host.of_kind(r.EventReceived)) == 1

        await host.send("a", 4)

        assert await host.output() == [1, 4]

    play(story)


def test_a_repeat_is_acknowledged_only_with_the_first_one() -> None:
    """What is not accepted could still be lost."""

    async def story() -> None:
        host = collecting(1, by_hand=True)
        host.accept()
        await host.settle()
        first, repeat = host.send("a", 1, event_id="same"), host.send("a", 1, event_id="same")
        await host.settle()
        assert not first.done()
        assert not repeat.done()

        host.accept()
        await host.settle()
        assert first.done()
        assert repeat.done()

    play(story)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_crash_after_any_record_gives_each_event_out_once(cut: int) -> None:
    """Between an event's coming and its match too: the buffer is what the journal says it is."""

    async def story() -> None:
        host = collecting(3)
        acknowledged: list[int] = []

        async def sender() -> None:
            for number in range(3):
                await asyncio.sleep(1)
                event_id = f"n{number}"
                while True:
                    future = host.send("a", number, event_id=event_id)
                    done, _ = await asyncio.wait({future}, timeout=5)
                    if done:
                        break
                acknowledged.append(number)

        sending = asyncio.ensure_future(sender())
        await host.cut_after(cut)
        host.load()

        assert await host.output() == [0, 1, 2]
        sending.cancel()

    play(story)


def test_a_time_out_raises_and_is_the_same_on_replay() -> None:
    """It can be caught; later waits of the type can still get events."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            try:
                await step.wait_for_event("first", "a", timeout="1 minute")
            except EventTimeout as error:
                said = str(error)
            return [said, await step.wait_for_event("second", "a")]

    async def story() -> None:
        host = EngineHost(Flow)
        host.create()
        await asyncio.sleep(61)
        (done,) = host.of_kind(r.WaitTimedOut)
        assert done.at >= 1_060_000
        host.crash()
        host.load()
        await host.send("a", 7)

        assert await host.output() == ["step 'first': no event of type 'a' came in time", 7]

    play(story)


def test_an_event_that_came_before_the_time_out_was_decided_wins() -> None:
    """The wait's time is over, but whether an event was acknowledged before that is not known yet (rule 23)."""

    async def story() -> None:
        host = collecting(1)
        host.holds_time_outs = True
        await asyncio.sleep(24 * 3600 + 10)
        assert host.time_outs
        assert host.of_kind(r.WaitTimedOut) == []
        host.send("a", "in time")
        host.decide_time_outs()

        assert await host.output() == ["in time"]
        assert host.of_kind(r.WaitTimedOut) == []

    play(story)


def test_an_event_recorded_before_a_crash_wins_though_the_time_is_over_after_it() -> None:
    """The pod died between the event and its match, and nobody owned the station when the time-out came (W10)."""

    async def story() -> None:
        host = collecting(1, by_hand=True)
        host.accept()
        await host.settle()
        host.accept()
        await host.settle()
        future = host.send("a", "kept")
        host.accept()
        await host.settle()
        assert future.done()
        host.crash(interrupted=False)
        await asyncio.sleep(48 * 3600)
        host.by_hand = False
        host.load()

        assert await host.output() == ["kept"]

    play(story)


def test_an_event_that_is_not_of_the_type_fails_the_wait_and_is_gone() -> None:
    """run() may catch it and wait on; the same on replay."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            try:
                await step.wait_for_event("n", "a", result_type=int)
            except StepFailed as error:
                said = error.error_type
            return [said, await step.wait_for_event("n", "a", result_type=int)]

    async def story() -> None:
        host = EngineHost(Flow)
        host.create()
        await rested(host)
        await host.send("a", "seven")
        await rested(host)
        host.crash()
        host.load()
        await host.send("a", 7)

        assert await host.output() == ["toque.errors.InvalidPayload", 7]

    play(story)


def test_other_waits_that_run_cancels_take_no_event() -> None:
    """Two events are there, and the first one makes run() cancel the second wait: its event is kept for a later one."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            await step.do("begin", self.env.work, 1, 5.0)
            one, two = step.wait_for_event("one", "a"), step.wait_for_event("two", "a")
            done, pending = await asyncio.wait({one, two}, return_when=asyncio.FIRST_COMPLETED)
            for other in pending:
                other.cancel()
            return [(await done.pop()), await step.wait_for_event("later", "a")]

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder())
        host.create()
        host.send("a", 1)
        host.send("a", 2)

        assert await host.output() == [1, 2]

    play(story)


def test_ten_thousand_buffered_events_keep_their_order_over_a_crash() -> None:
    """As many as an instance may hold (W2); handed out in turns, so that the journal keeps up."""

    async def story() -> None:
        host = collecting(BUFFERED_MAX, by_hand=True)
        for number in range(BUFFERED_MAX):
            host.send("a", number)
        assert host.engine is not None
        assert host.engine.events.full
        host.accept()
        await host.settle()
        assert 0 < len(host.pending) <= 300
        host.accept()
        await host.settle()
        host.crash()
        host.by_hand = False
        host.load()

        assert await host.output() == list(range(BUFFERED_MAX))

    play(story)


def test_events_that_keep_coming_do_not_hold_up_callbacks() -> None:
    """There is always one whose record is not accepted, but no callback comes after it."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            return [await step.do("a", self.env.work, number, 0.0) for number in range(3)]

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder(), by_hand=True)
        host.create()
        for _ in range(3):
            records = len(host.pending)
            host.send("noise")
            host.accept(records)
            await host.settle()
            assert host.pending
        assert len(host.env.entries) == 3

    play(story)


def test_events_that_keep_coming_do_not_keep_the_slot_of_an_instance_that_rests() -> None:
    """Nor do they wake it, when they are of another type."""

    async def story() -> None:
        host = collecting(1, by_hand=True)
        host.accept()
        await host.settle()
        host.send("noise")
        host.accept(1)
        await host.settle()
        assert host.pending

        assert host.slots_given_back == 1

    play(story)


def test_an_instance_read_back_for_an_event_of_another_type_is_not_started() -> None:
    """The event is recorded, and the instance leaves memory again."""

    async def story() -> None:
        host = collecting(1)
        await rested(host)
        await host.send("noise", 1)
        await rested(host)

        assert host.engine is None
        assert host.of_kind(r.Woken) == []
        assert host.row is not None
        assert (host.row.buffered, host.row.status) == (1, r.Status.WAITING)

    play(story)


def test_an_approval_says_what_was_decided_by_whom_and_when() -> None:
    """An event of its own type underneath."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            decided: Approval = await step.wait_for_approval("refund")
            return [decided.approved, decided.by, decided.comment, decided.at.timestamp()]

    async def story() -> None:
        host = EngineHost(Flow)
        host.create()
        await rested(host)
        await host.send("approval-refund", {"approved": False, "by": "ann", "comment": "too much"})

        assert await host.output() == [False, "ann", "too much", 1000.0]

    play(story)


def test_changed_code_that_waits_for_another_type_is_held() -> None:
    """The journal says which events the open wait is for."""

    class Other(Workflow[Any, Any], name="Collect"):
        async def run(self, event: Event, step: Step) -> Any:
            return [await step.wait_for_event("next", "b")]

    async def story() -> None:
        host = collecting(1)
        await rested(host)
        host.flow = Other
        host.send("a", 1)

        assert "for events of type 'a'" in await host.held()

    play(story)


def test_an_event_is_not_matched_while_run_has_yet_to_see_the_one_before() -> None:
    """After an interruption outcomes wait for their acceptance: meanwhile the other wait, which run() will cancel, takes
    nothing."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            waits = {step.wait_for_event("one", "a", timeout="900 ms"), step.wait_for_event("two", "a", timeout="900 ms")}
            done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for other in pending:
                other.cancel()
            return [(await done.pop()), await step.wait_for_event("later", "a")]

    async def story() -> None:
        host = EngineHost(Flow)
        host.create()
        await host.settle()
        host.crash()
        host.by_hand = True
        host.load()
        await host.settle()
        host.send("a", 1)
        host.send("a", 2)
        while host.pending:
            host.accept()
            await host.settle()

        assert await host.output() == [1, 2]

    play(story)


def test_the_timer_of_a_wait_that_got_its_event_does_nothing() -> None:
    """No other wait is open when it fires, and a callback is inside."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            got = await step.wait_for_event("near", "a", timeout="900 ms")
            return [got, await step.do("long", self.env.work, 1, 5.0)]

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder())
        host.create()
        await host.settle()
        host.send("a", 7)

        assert (await host.output())[0] == 7

    play(story)
