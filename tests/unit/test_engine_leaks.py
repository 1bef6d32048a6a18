"""Nothing is left of an instance that has ended or left memory, and asyncio has nothing to complain of (invariant R6).

`play` fails when asyncio reports a pending task destroyed or an exception never retrieved.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from example_flows import EXAMPLES, PARAMS, Example
from unit.engine_host import EngineHost, Recorder, play

from toque.errors import StepFailed
from toque.workers.engine import Engine
from toque.workers.instance_loop import InstanceLoop
from toque.workers.step_call import StepCall
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]


def parts() -> list[Any]:
    """Whatever belongs to an instance, garbage collected; of tasks those that are named, as callbacks' are."""
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, Engine | InstanceLoop | StepCall)
            or (isinstance(thing, asyncio.Task) and not thing.get_name().startswith("Task-"))]


@pytest.fixture(autouse=True)
def others() -> Iterator[None]:
    """What failed tests of other modules have left counts for nothing here."""
    of_others.extend(parts())
    yield
    of_others.clear()


of_others: list[Any] = []


def left_in_memory() -> list[Any]:
    """What exists of this test's instances."""
    known = set(map(id, of_others))
    return [thing for thing in parts() if id(thing) not in known]


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_nothing_is_left_after_the_end(example: Example) -> None:
    """Engine, loop, steps and tasks are gone when the instance is."""

    async def story() -> None:
        host = EngineHost(example.flow, PARAMS, env=Recorder())
        host.create()
        await host.ended()
        await host.settle()

        assert host.engine is None
        assert left_in_memory() == []

    play(story)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_nothing_is_left_after_a_cut(example: Example) -> None:
    """Cut anywhere: tasks, generators and callbacks are ended, not dropped."""

    async def story(records: int) -> None:
        host = EngineHost(example.flow, PARAMS, env=Recorder())
        host.create()
        await host.cut_after(records)
        await host.settle()

        assert host.inside == host.callbacks.inside == host.callbacks.abandoned == 0
        assert left_in_memory() == []

    for records in (1, 2, 3, 5, 8):
        play(lambda records=records: story(records))


def test_an_ended_instance_needs_no_garbage_collection() -> None:
    """Ten thousand a second must not wait for the cycle collector: the plain case is freed by reference counts alone."""

    class Plain(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            return [await step.do("a", self.env.work, 1), await step.do("b", self.env.work, 2)]

    async def story() -> None:
        host = EngineHost(Plain, env=Recorder())
        gc.disable()
        try:
            engine = weakref.ref(host.create())
            await host.ended()
            await host.settle()
            assert engine() is None
        finally:
            gc.enable()

    play(story)


def test_objects_of_the_user_are_freed_with_their_instance() -> None:
    """The workflow object, params and results."""

    class Big:
        pass

    held: list[weakref.ref[Any]] = []

    class Flow(Workflow[Any, Any]):
        def __init__(self) -> None:
            self.big = Big()
            held.extend([weakref.ref(self), weakref.ref(self.big)])

        async def run(self, event: Event, step: Step) -> Any:
            try:
                await step.do("bad", self.env.fail, 1, retries=Retries(limit=0))
            except StepFailed as error:
                self.error = error
            raise ValueError("the end")

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder())
        host.create()
        await host.failure()
        await host.settle()
        gc.collect()

        assert [ref() for ref in held] == [None, None]

    play(story)


def test_unseen_exceptions_and_pending_tasks_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """run() that leaves failing and unfinished tasks behind, ended and cut: nothing on standard error."""

    async def fails(step: Step) -> None:
        await step.sleep("nap", "1 second")
        raise ValueError("nobody looks at this")

    class Untidy(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            self.tasks = [asyncio.create_task(fails(step)), asyncio.create_task(asyncio.Event().wait())]
            future = asyncio.get_running_loop().create_future()
            future.set_exception(ValueError("nor at this"))
            await step.sleep("long", "2 seconds")
            del future
            return 1

    async def story(cut_after: int) -> None:
        host = EngineHost(Untidy)
        host.create()
        if cut_after:
            await host.cut_after(cut_after)
        else:
            assert await host.output() == 1
        await host.settle()
        assert left_in_memory() == []

    for records in range(5):
        play(lambda records=records: story(records))
    assert capfd.readouterr().err == ""


def test_many_steps_and_tasks_do_not_grow_the_engine() -> None:
    """What is done is forgotten: steps, tasks, waits."""

    class Busy(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            for _ in range(200):
                first, second = step.do("a", self.env.work), step.do("b", self.env.work)
                await asyncio.create_task(asyncio.sleep(0))
                await asyncio.gather(first, second)
                await step.sleep("short", "1 ms")

    async def story() -> None:
        host = EngineHost(Busy, env=Recorder())
        engine = host.create()
        await host.ended()

        assert len(engine.loop._tasks) == len(engine._open) == len(engine._unawaited) == len(engine.waits) == 0
        assert len(engine.waits._heap) <= 1

    play(story)


def test_nothing_is_left_when_the_last_callback_of_a_dead_engine_is_out() -> None:
    """One that swallows its cancellation is inside longer than its engine."""

    class Forever(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            await step.do("a", self.env.stubborn)

    class Env:
        def __init__(self) -> None:
            self.release = asyncio.Event()

        async def stubborn(self) -> None:
            while not self.release.is_set():
                try:
                    await self.release.wait()
                except asyncio.CancelledError:
                    continue

    async def story() -> None:
        host = EngineHost(Forever, env=Env())
        host.create()
        await host.settle()
        host.crash()
        await host.settle()
        assert host.inside == 1

        host.env.release.set()
        await host.settle()
        assert host.inside == 0
        assert left_in_memory() == []

    play(story)


def test_the_frames_of_run_are_gone_with_its_failure() -> None:
    """A failure is kept as text: no traceback holds the locals of user code."""
    held: list[weakref.ref[Any]] = []

    class Local:
        pass

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            local = Local()
            held.append(weakref.ref(local))
            await step.do("bad", self.env.fail, 9, retries=Retries(limit=0))

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder())
        host.create()
        await host.failure()
        await host.settle()
        gc.collect()
        assert held[0]() is None
        assert sys.exc_info() == (None, None, None)

    play(story)
