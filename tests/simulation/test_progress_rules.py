"""Progress: the newest value to watchers at once, nothing before what it rests on holds (protocol rules 18 and 19)."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from toque import _subjects as subjects
from toque._subjects import StationId
from toque._watch import WatchEvent
from toque.client import Instance
from toque.errors import PayloadTooLarge, StepError
from toque.sim.process import work_in_thread
from toque.sim.world import World, account, play
from toque.storage import records as r
from toque.storage.memory_broker import DROP_BEFORE
from toque.workflow import Retries, Step, StepContext, Workflow, WorkflowEvent

FIRST = StationId(1, 0)


def reporting_workflow(world: World, *, threaded: bool = False) -> type[Workflow[int, int]]:
    """Two steps that report 0 … 4 of their name, a second apart; run() says which one comes next."""

    class Reporting(Workflow[int, int], name="work"):
        async def run(self, event: WorkflowEvent[int], step: Step) -> int:
            for name in ("s1", "s2"):
                self.report_progress(f"next: {name}")
                await step.do(name, in_thread if threaded else in_loop)
            return event.payload

    async def in_loop(ctx: StepContext) -> None:
        with world.history.inside(ctx):
            for number in range(5):
                ctx.report_progress({ctx.name: number})
                await asyncio.sleep(1)

    def in_thread(ctx: StepContext) -> None:
        with world.history.inside(ctx):
            for number in range(5):
                ctx.report_progress({ctx.name: number})
                work_in_thread(1.0)

    return Reporting


class Watcher:
    """Collects events, and when they were told."""

    def __init__(self, world: World, handle: Instance[object]) -> None:
        self._world = world
        self.events: list[tuple[float, WatchEvent]] = []
        self.task = asyncio.ensure_future(self._watch(handle))

    async def _watch(self, handle: Instance[object]) -> None:
        async for event in handle.watch():
            self.events.append((self._world.now, event))

    @property
    def reported(self) -> list[object]:
        return [event.value for _, event in self.events if event.type == "progress"]


def test_every_report_is_told_as_it_comes():
    """Closes: a watcher sees progress with the next poll, or with the next record only."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(reporting_workflow(world)))
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        watcher = Watcher(world, handle)
        await world.until(lambda: watcher.reported[-1:] == [{"s1": 3}], "it is told")
        assert world.now - world.history.entered("one", "s1")[0].entered_at < 3.2
        assert (await handle.status()).progress == {"s1": 3}
        await asyncio.wait_for(watcher.task, 60)

        steps = [value for value in watcher.reported if isinstance(value, dict)]
        assert steps == [{name: number} for name in ("s1", "s2") for number in range(5)]
        assert [event for _, event in watcher.events if event.type != "progress"] == [
            event async for event in handle.watch()]
        assert (await handle.status()).progress is None
        cursors = [event.cursor for _, event in watcher.events if event.type == "progress"]
        assert [event.type async for event in handle.watch(cursors[-1])][-1] == "workflow_completed"

    play(story)


def test_threads_report_too():
    """Closes: a thread touches what belongs to the loop, or its reports come when it is over."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(reporting_workflow(world, threaded=True)))
        await world.all_owned()
        watcher = Watcher(world, await world.client().create("work", 7, id="one"))
        await asyncio.wait_for(watcher.task, 60)

        assert {"s2": 4} in watcher.reported

    play(story)


def test_no_report_overtakes_the_records_it_rests_on():
    """Closes: s1 is done, its group does not reach the journal, run() goes on and reports that s2 is next: the pod dies,
    and s1 is entered again after somebody was told that it was over."""

    async def story(world: World) -> None:
        app = world.app(reporting_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        watcher = Watcher(world, handle)
        await world.until(lambda: watcher.reported[-1:] == [{"s1": 4}], "s1 is all but over")
        world.broker.fail_next(subjects.journal("main", FIRST), DROP_BEFORE, times=50)
        await world.passes(7)
        assert world.history.entries[-1].left_at is not None
        assert watcher.reported[-1] == {"s1": 4}
        assert (await handle.status()).progress == {"s1": 4}
        a.kill()
        world.broker.forget_faults()
        await world.start_pod("b", app)
        await asyncio.wait_for(watcher.task, 90)

        accepted = world.records(r.StepDone)[0].at
        told = [at for at, event in watcher.events if event.value == "next: s2"]
        assert all(world.broker_ms(at) >= accepted for at in told)

    play(story, account=account(stations=1))


def test_progress_is_told_by_the_next_owner_from_its_first_report_on():
    """Closes: after a take-over watchers see nothing more, because the reports are counted anew; or what run() reported
    long ago, because it is replayed."""

    async def story(world: World) -> None:
        app = world.app(reporting_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        watcher = Watcher(world, handle)
        await world.until(lambda: watcher.reported[-1:] == [{"s2": 2}], "it is inside s2")
        before = len(watcher.reported)
        a.kill()
        await world.start_pod("b", app)
        await asyncio.wait_for(watcher.task, 90)

        again = watcher.reported[before:]
        assert again[-5:] == [{"s2": number} for number in range(5)]
        assert "next: s1" not in again

    play(story)


def test_the_first_report_to_the_next_owner_is_news():
    """Closes: it has the number that the last report to the owner before had, and the watcher takes it for that one."""

    async def story(world: World) -> None:
        class Once(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                return await step.do("s1", once)

        async def once(ctx: StepContext) -> int:
            ctx.report_progress(ctx.attempt)
            await asyncio.sleep(20)
            return ctx.attempt

        app = world.app(Once)
        a = await world.start_pod("a", app)
        await world.all_owned()
        watcher = Watcher(world, await world.client().create("work", 7, id="one"))
        await world.until(lambda: watcher.reported == [1], "it is told")
        a.kill()
        await world.start_pod("b", app)
        await asyncio.wait_for(watcher.task, 90)

        assert watcher.reported == [1, 2]

    play(story, account=account(stations=1))


def test_an_attempt_whose_time_is_over_reports_nothing_more():
    """Closes: a thread that cannot be stopped goes on reporting beside the next attempt."""

    async def story(world: World) -> None:
        class Late(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                with suppress(StepError):
                    await step.do("s1", late, timeout="2 seconds", retries=Retries(limit=0))
                return await step.do("s2", asyncio.sleep, 10, 1)

        def late(ctx: StepContext) -> None:
            for number in range(8):
                ctx.report_progress(number)
                work_in_thread(1.0)

        await world.start_pod("a", world.app(Late))
        await world.all_owned()
        watcher = Watcher(world, await world.client().create("work", 7, id="one"))
        await asyncio.wait_for(watcher.task, 60)

        assert watcher.reported
        assert max(value for value in watcher.reported if isinstance(value, int)) <= 2

    play(story)


def test_a_report_that_is_too_large_is_an_error_where_it_is_made():
    """Closes: a page that no message carries, or a value that silently is not shown."""

    async def story(world: World) -> None:
        class Large(Workflow[int, str], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> str:
                with pytest.raises(PayloadTooLarge, match="the progress"):
                    self.report_progress("x" * 20_000)
                return await step.do("s1", large)

        async def large(ctx: StepContext) -> str:
            with pytest.raises(PayloadTooLarge, match="the progress"):
                ctx.report_progress("x" * 20_000)
            return "told"

        await world.start_pod("a", world.app(Large))
        await world.all_owned()
        assert await (await world.client().create("work", 7, id="one")).result() == "told"

    play(story)
