"""Changed code under a live instance: it is held, not failed, with the step expected and the step found (invariant E4)."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from unit.engine_host import EngineHost, Recorder, play

from toque.storage import records as r
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]


class Original(Workflow[Any, list[Any]], name="flow"):
    """Two steps, a sleep, a step."""

    async def run(self, event: Event, step: Step) -> list[Any]:
        a = await step.do("a", self.env.work, 1)
        b = await step.do("b", self.env.work, 2)
        await step.sleep("nap", "1 hour")
        return [a, b, await step.do("c", self.env.work, 3)]


class Renamed(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        await step.do("a", self.env.work, 1)
        return await step.do("bee", self.env.work, 2)


class Removed(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        return await step.do("b", self.env.work, 2)


class Emptied(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        return 1


class Reordered(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        await step.do("b", self.env.work, 2)
        return await step.do("a", self.env.work, 1)


class OtherKind(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        await step.sleep("a", "1 second")


class Raising(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        await step.do("a", self.env.work, 1)
        raise ValueError("new and broken")


class NotEntered(Workflow[Any, Any], name="flow"):
    def __init__(self) -> None:
        raise KeyError("gone")

    async def run(self, event: Event, step: Step) -> Any:
        return 1


class Exiting(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        raise SystemExit(3)


class OtherParams(Workflow[list[str], Any], name="flow"):
    async def run(self, event: WorkflowEvent[list[str]], step: Step) -> Any:
        return await step.do("a", self.env.work, 1)


class Spinning(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        while True:
            await asyncio.sleep(0)


async def text_instead() -> str:
    return "1"


class NewAnnotation(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        return await step.do("a", text_instead)


async def in_the_sleep() -> EngineHost:
    """Original, asleep in the middle, out of memory."""
    host = EngineHost(Original, 1, env=Recorder())
    host.create()
    while host.engine is not None:
        await asyncio.sleep(0)
    return host


async def changed_to(flow: type[Workflow[Any, Any]]) -> EngineHost:
    """Original, taken up in the middle by other code, and held by it."""
    host = await in_the_sleep()
    host.crash()
    host.load(flow)
    await host.held()
    return host


@pytest.mark.parametrize(("flow", "expected", "found"), [
    (Renamed, "do('b', occurrence 1)", "do('bee', occurrence 1)"),
    (Removed, "do('a', occurrence 1)", "do('b', occurrence 1)"),
    (Emptied, "do('a', occurrence 1)", "the end of run()"),
    (Reordered, "do('a', occurrence 1)", "do('b', occurrence 1)"),
    (OtherKind, "do('a', occurrence 1)", "sleep('a', occurrence 1)"),
    (Raising, "do('b', occurrence 1)", "the end of run(), which raised ValueError"),
    (NotEntered, "do('a', occurrence 1)", "an error: KeyError"),
    (Exiting, "do('a', occurrence 1)", "an error: SystemExit"),
    (OtherParams, "do('a', occurrence 1)", "an error: InvalidPayload"),
    (Spinning, "do('a', occurrence 1)", "an error: MisuseError"),
    (NewAnnotation, "the recorded result of do('a', occurrence 1)", "`str`"),
], ids=lambda value: value.__name__ if isinstance(value, type) else None)
def test_changed_code_holds_the_instance(flow: type[Workflow[Any, Any]], expected: str, found: str) -> None:
    """Whatever the change is: `blocked_on` begins with "code:" and names the step expected and what was found."""

    async def story() -> None:
        host = await changed_to(flow)

        assert host.row is not None
        assert host.row.blocked_on.startswith("code: ")
        assert expected in host.row.blocked_on
        assert found in host.row.blocked_on
        assert "put the old" in host.row.blocked_on
        assert not host.row.status.ended
        assert host.slots_given_back == 2  # of the sleep, and of the hold

    play(story)


def test_a_held_instance_enters_nothing_and_leaves_memory() -> None:
    """No callback of the changed code runs."""

    async def story() -> None:
        host = await changed_to(Renamed)
        await asyncio.sleep(10_000)

        assert host.engine is None
        assert [entry[0] for entry in host.env.entries] == ["a", "b"]

    play(story)


def test_the_reason_is_recorded_once() -> None:
    """However often the instance is loaded, and whatever happens between."""

    async def story() -> None:
        host = await changed_to(Renamed)
        for _ in range(3):
            records = len(host.records)
            host.crash()
            host.load()
            await host.held()
            assert len(host.records) == records

        assert len(host.of_kind(r.Blocked)) == 1

    play(story)


def test_another_reason_is_recorded_too() -> None:
    """The index says what is wrong now."""

    async def story() -> None:
        host = await changed_to(Renamed)
        host.crash()
        host.load(Reordered)
        await host.held()

        assert host.row is not None
        assert len(host.of_kind(r.Blocked)) == 2
        assert "do('a', occurrence 1)" in host.row.blocked_on

    play(story)


def test_the_old_code_heals() -> None:
    """Put back, it goes on where it stood: no step is run again, nothing shows that it was held."""

    async def story() -> None:
        host = await changed_to(Renamed)
        host.crash()
        host.load(Original)
        await host.settle()
        assert host.row is not None
        assert host.row.blocked_on == ""

        assert await host.output() == [1, 2, 3]
        assert [entry[0] for entry in host.env.entries] == ["a", "b", "c"]

    play(story)


def test_a_healed_instance_can_be_held_again_for_the_same_reason() -> None:
    """And it is recorded again, because the index had forgotten it."""

    async def story() -> None:
        host = await changed_to(Renamed)
        host.crash()
        host.load(Original)
        await host.cut_after(len(host.records) + 2)  # it is woken, and its sleep is over
        assert host.outcomes[-1] == ("SleepDone", "nap", 1)
        host.load(Renamed)
        await host.held()

        assert len(host.of_kind(r.Blocked)) == 2

    play(story)


def test_no_interruption_counts_for_a_held_instance() -> None:
    """It held no slot when its pod died."""

    async def story() -> None:
        host = await changed_to(Renamed)
        for _ in range(12):
            host.crash()
            host.load()
            await host.held()
        host.crash()
        host.load(Original)

        assert await host.output() == [1, 2, 3]
        assert host.of_kind(r.Interrupted) == []

    play(story)


class Point(msgspec.Struct):
    x: int


class ThreeD(msgspec.Struct):
    x: int
    z: int


async def point() -> Point:
    return Point(1)


async def three_d() -> ThreeD:
    return ThreeD(1, 2)


class Measures(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        found = await step.do("measure", point)
        await step.sleep("nap", "1 hour")
        return found.x


class MeasuresMore(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        found = await step.do("measure", three_d)
        await step.sleep("nap", "1 hour")
        return found.z


def test_a_result_that_no_longer_fits_its_type_holds_the_instance() -> None:
    """A new field without a default: the recorded value has none."""

    async def story() -> None:
        host = EngineHost(Measures, env=Recorder())
        host.create()
        while host.engine is not None:
            await asyncio.sleep(0)
        host.crash()
        host.load(MeasuresMore)

        reason = await host.held()
        assert "the recorded result of do('measure', occurrence 1)" in reason
        assert "missing required field `z`" in reason
        host.crash()
        host.load(Measures)
        assert await host.output() == 1

    play(story)


class Trying(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        return await step.do("try", self.env.fail, 1, 5, retries=Retries(delay="1 hour"))


class TryingOther(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        return await step.do("try other", self.env.fail, 0, 5)


class Napping(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        await step.sleep("nap", "1 hour")


class NappingOther(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> Any:
        await step.sleep("snooze", "1 hour")


@pytest.mark.parametrize(("before", "after", "expected"), [
    (Trying, TryingOther, "do('try', occurrence 1)"),
    (Trying, Emptied, "do('try', occurrence 1)"),
    (Napping, NappingOther, "sleep('nap', occurrence 1)"),
    (Napping, NotEntered, "sleep('nap', occurrence 1)"),
], ids=["retry renamed", "retry removed", "sleep renamed", "not entered"])
def test_a_step_that_has_begun_must_still_be_there(before: type[Workflow[Any, Any]], after: type[Workflow[Any, Any]],
                                                   expected: str) -> None:
    """A timer or failed attempts are records of a step, too: without its step they would count for nobody."""

    async def story() -> None:
        host = EngineHost(before, env=Recorder())
        host.create()
        while host.engine is not None:
            await asyncio.sleep(0)
        host.crash()
        host.load(after)
        assert expected in await host.held()

        host.crash()
        host.load(before)
        assert (await host.ended()).status is r.Status.COMPLETE

    play(story)


class OneMore(Workflow[Any, Any], name="flow"):
    async def run(self, event: Event, step: Step) -> list[Any]:
        a = await step.do("a", self.env.work, 1)
        b, extra = await asyncio.gather(step.do("b", self.env.work, 2), step.do("extra", self.env.work, 7))
        await step.sleep("nap", "1 hour")
        return [a, b, extra]


def test_a_step_added_in_parallel_fits() -> None:
    """What the journal does not contradict is no mismatch."""

    async def story() -> None:
        host = EngineHost(Original, 1, env=Recorder())
        host.create()
        await host.cut_after(3)
        host.load(OneMore)

        assert await host.output() == [1, 2, 7]

    play(story)


@pytest.mark.parametrize("read_back", [True, False], ids=["read back", "still in memory"])
def test_a_held_instance_can_be_terminated(read_back: bool) -> None:
    """Whether it has left memory or not."""

    async def story() -> None:
        host = await in_the_sleep()
        host.crash()
        host.load(Renamed)
        host.by_hand = True
        await asyncio.sleep(4000)
        if read_back:
            host.accept()
            host.crash()
            host.read_back()
        assert host.engine is not None
        host.engine.terminate()
        host.accept()

        assert (await host.ended()).status is r.Status.TERMINATED

    play(story)
