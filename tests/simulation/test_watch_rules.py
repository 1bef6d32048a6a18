"""Watching: kept events, then live, without gap or repeat, and nothing before its acceptance (protocol rule 19)."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from toque import _subjects as subjects
from toque._protocol import Answer, WatchPage, WatchRequest, encode
from toque._subjects import StationId
from toque._watch import WatchEvent
from toque.client import Instance, StepRef
from toque.errors import InstanceNotFound, StepFailed, TooManyWatchers
from toque.sim.world import World, account, play, sleeper_workflow, steps_workflow
from toque.storage import records as r
from toque.storage.memory_broker import DROP_BEFORE
from toque.workers import watching
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

FIRST = StationId(1, 0)


class Watcher:
    """Watches an instance in a task, from its first event on or from a cursor."""

    def __init__(self, world: World, handle: Instance[object], cursor: str | None = None) -> None:
        self._world = world
        self.events: list[WatchEvent] = []
        self.seen_at: list[float] = []
        self.task = asyncio.ensure_future(self._watch(handle, cursor))

    async def _watch(self, handle: Instance[object], cursor: str | None) -> None:
        async for event in handle.watch(cursor):
            self.events.append(event)
            self.seen_at.append(self._world.now)

    @property
    def types(self) -> list[str]:
        return [event.type for event in self.events]

    @property
    def cursors(self) -> list[str]:
        return [event.cursor for event in self.events]


async def told(handle: Instance[object], cursor: str | None = None) -> list[WatchEvent]:
    """Everything behind the cursor, to the end."""
    return [event async for event in handle.watch(cursor)]


async def page(world: World, instance_id: str, cursor: str = "") -> WatchPage:
    """One answer to the same watcher's question."""
    subject = subjects.station_request("main", world.station_of(instance_id), "watch")
    request = WatchRequest("work", instance_id, request="q", cursor=cursor)
    reply = await world.bus().request(subject, encode(request, json=False), timeout_s=2.0)
    answer = msgspec.msgpack.decode(reply.data, type=Answer)
    return msgspec.msgpack.decode(answer.value, type=WatchPage)


async def kill(world: World) -> None:
    world.owner(FIRST).kill()
    await world.start_pod(f"p{len(world.nodes)}", world.nodes[0].app)


async def hand_over(world: World) -> None:
    old = world.owner(FIRST)
    await world.start_pod(f"p{len(world.nodes)}", world.nodes[0].app)
    await old.stop()


async def stop_and_go(world: World) -> None:
    node = world.owner(FIRST)
    node.pause()
    await world.passes(3)
    node.resume()


async def cut_off(world: World) -> None:
    node = world.owner(FIRST)
    node.bus.disconnect()
    await world.passes(4)
    node.bus.reconnect()


@pytest.mark.parametrize("fault", [kill, hand_over, stop_and_go, cut_off])
def test_a_watcher_sees_every_event_once_and_in_order(fault):
    """Closes: the owner dies, moves, stops or is cut off while an instance is watched live: the next one begins again, or
    behind what was not told yet. A second watcher from the start sees exactly the same afterwards."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=8, step_s=1.0)))
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        watcher = Watcher(world, handle)
        for after in ("s2", "s5"):
            await world.until(lambda after=after: world.history.entered("one", after), f"it is inside {after}")
            await fault(world)
        await asyncio.wait_for(watcher.task, 120)

        assert watcher.cursors == sorted(set(watcher.cursors), key=watcher.cursors.index)
        assert watcher.types[:2] == ["workflow_queued", "workflow_started"]
        assert watcher.types[-1] == "workflow_completed"
        done = [event.step for event in watcher.events if event.type == "step_completed"]
        assert done == [f"s{number}" for number in range(1, 9)]
        assert watcher.events == await told(handle)
        for index, event in enumerate(watcher.events):
            assert await told(handle, event.cursor) == watcher.events[index + 1:]

    play(story, account=account(stations=1))


def test_no_event_is_told_before_its_record_is_accepted():
    """Closes: a step is done, its group does not reach the journal, and a watcher hears of it; the pod dies then, and
    the step is done again by another owner, with another result."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=1.0))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        watcher = Watcher(world, handle)
        await world.until(lambda: world.history.entered("one", "s2"), "it is inside s2")
        world.broker.fail_next(subjects.journal("main", FIRST), DROP_BEFORE, times=50)
        await world.until(lambda: world.history.entries[-1].left_at is not None, "s2 is done")
        await world.passes(7)
        assert "s2" not in {event.step for event in watcher.events}
        a.kill()
        world.broker.forget_faults()
        await world.start_pod("b", app)
        await asyncio.wait_for(watcher.task, 120)

        accepted = {(record.step, record.name): record.at for record in world.records(r.StepDone)}
        for event, seen_at in zip(watcher.events, watcher.seen_at, strict=True):
            if event.type == "step_completed":
                assert world.broker_ms(seen_at) >= accepted[r.StepKind.DO, event.step]
        assert [event.step for event in watcher.events if event.type == "step_completed"] == ["s1", "s2", "s3"]

    play(story, account=account(stations=1))


def test_a_slow_fold_delays_events_and_loses_none():
    """Closes: the record is accepted and the watcher woken, it reads the store, which does not have it yet, and waits
    for a wake that came already."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world, steps=8, step_s=3.3)))
        await world.all_owned()
        a.store._delay_s = 0.7
        handle = await world.client().create("work", 7, id="one")
        watcher = Watcher(world, handle)
        await asyncio.wait_for(watcher.task, 60)

        ends = {record.name: record.at for record in world.records(r.StepDone)}
        for event, seen_at in zip(watcher.events, watcher.seen_at, strict=True):
            if event.type == "step_completed":
                assert world.broker_ms(seen_at) - ends[event.step] < 2_000, "not only with the next poll"
        assert watcher.events == await told(handle)

    play(story, account=account(stations=1))


def test_a_queued_instance_is_watched_from_its_creation_on():
    """Closes: there is no record of it yet, and its watcher is told that there is no such instance, or the event of its
    creation twice: from the queue, and from its record."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, step_s=8.0)))
        await world.all_owned()
        client = world.client()
        first = await client.create("work", 1, id="first")
        await world.until(lambda: world.history.entered("first"), "the only slot is taken")
        watcher = Watcher(world, await client.create("work", 2, id="one"))
        await world.passes(3)
        assert watcher.types == ["workflow_queued"]
        await first.result()
        await world.until(lambda: "workflow_started" in watcher.types, "it is told", timeout_s=1)
        await asyncio.wait_for(watcher.task, 60)

        assert watcher.types.count("workflow_queued") == 1
        assert watcher.events == await told(client.handle("work", "one"))

    play(story, account=account(max_concurrent=1))


def test_a_watch_outlasts_the_time_without_an_owner():
    """Closes: nobody owns the station for a while, and the watcher ends with an error, or with less than all."""

    async def story(world: World) -> None:
        app = world.app(sleeper_workflow(world, nap="20 seconds"))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("nap", 7, id="one")
        watcher = Watcher(world, handle)
        await world.until(lambda: "workflow_waiting" in watcher.types, "it sleeps")
        a.kill()
        await world.passes(60)
        assert not watcher.task.done()
        await world.start_pod("b", app)
        await asyncio.wait_for(watcher.task, 60)

        assert watcher.types[-1] == "workflow_completed"
        assert watcher.events == await told(handle)

    play(story)


@pytest.mark.parametrize("page_events", [1, 200])
def test_a_restart_goes_on_at_the_same_cursor(page_events, monkeypatch):
    """Closes: the events of the new run stand behind no cursor, or those of the run before are told again. Without a
    cursor the end of an earlier run does not end the watch, even if it is the last event of a page."""
    monkeypatch.setattr(watching, "PAGE_EVENTS_MAX", page_events)

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=0.5))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        first = await told(handle)
        await handle.restart(from_=StepRef("s2"))
        second = await told(handle, first[-1].cursor)
        a.kill()
        await world.start_pod("b", app)

        assert second[0].type == "workflow_started"
        assert {event.run for event in second} == {2}
        assert [event.step for event in second if event.type == "step_completed"] == ["s2", "s3"]
        assert await told(handle) == first + second
        assert await told(handle, second[-1].cursor) == []
        await handle.restart()
        third = await told(handle, second[-1].cursor)
        assert {event.run for event in third} == {3}
        assert [event.step for event in third if event.type == "step_completed"] == ["s1", "s2", "s3"]

    play(story)


def test_a_cursor_belongs_to_one_instance_not_to_its_id():
    """Closes: an instance is deleted and another one created under its id; a watcher of the first goes on in the middle
    of the second, and never hears of its beginning."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=2, step_s=3.0)))
        await world.all_owned()
        client = world.client()
        handle = await client.create("work", 7, id="one")
        watcher = Watcher(world, handle)
        await world.until(lambda: "step_completed" in watcher.types, "s1 is done")
        await handle.delete()
        again = await client.create("work", 8, id="one")
        with pytest.raises(InstanceNotFound):
            await watcher.task
        with pytest.raises(InstanceNotFound):
            await told(again, watcher.events[-1].cursor)

        assert [event.value for event in await told(again) if event.type == "workflow_started"] == [8]

    play(story)


def test_a_filter_hides_events_and_the_end_still_ends_the_watch():
    """Closes: the watcher waits for ever, because the one event that would end it is not among those it asked for."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=400, step_s=0.001)))
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        live = [event async for event in handle.watch(filter=["step_completed"])]
        before = world.now
        kept = [event async for event in handle.watch(filter=["workflow_waiting", "workflow_paused"])]
        assert world.now - before < 1, "pages without an event asked for are not waited for"

        assert [event.step for event in live] == [f"s{number}" for number in range(1, 401)]
        assert kept == []

    play(story)


def test_a_long_history_is_told_in_pages_without_reading_it_anew(monkeypatch):
    """Closes: each page reads the history from its beginning, so that watching 10,000 steps takes 10,000 times as long as
    one. Pages join without gap or repeat, whatever groups the records came in."""

    async def story(world: World) -> None:
        reads = 0
        a = await world.start_pod("a", world.app(steps_workflow(world, steps=500, step_s=0.001)))
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        await handle.result()
        history_from = a.store.history_from

        def counted(*args):  # type: ignore[no-untyped-def]  # as the store's own
            nonlocal reads
            pieces = history_from(*args)
            reads += len(pieces)
            return pieces

        monkeypatch.setattr(a.store, "history_from", counted)
        events = await told(handle)

        assert [event.step for event in events if event.type == "step_completed"] == [f"s{n}" for n in range(1, 501)]
        assert len(set(event.cursor for event in events)) == len(events) > 2_000
        assert reads < 1_000

    play(story)


def test_a_page_whose_answer_is_lost_is_told_again():
    """Closes: the owner remembers how far a watcher is, its answer is lost, and the repeat of the question gets what lies
    behind the page that nobody has seen. The same question gets the same page."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=100, step_s=0.001)))
        await world.all_owned()
        await (await world.client().create("work", 7, id="one")).result()
        first, again = await page(world, "one"), await page(world, "one")
        behind = await page(world, "one", first.cursor)

        assert [event.cursor for event in again.events] == [event.cursor for event in first.events]
        assert watching.PAGE_EVENTS_MAX <= len(first.events) < watching.PAGE_EVENTS_MAX + 5
        assert len(behind.events) > 100
        assert not {event.cursor for event in behind.events} & {event.cursor for event in first.events}

    play(story)


def test_a_page_fits_into_a_message():
    """Closes: large results collect in a page that no message can carry, and the watcher never gets behind it."""

    async def story(world: World) -> None:
        class Large(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                for _ in range(6):
                    await step.do("large", large)
                return 1

        async def large() -> bytes:
            return bytes(100_000)

        world.broker.max_payload = 256 * 1024
        await world.start_pod("a", world.app(Large))
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        await handle.result()

        assert [len(event.value) for event in await told(handle) if event.type == "step_completed"] == [100_000] * 6

    play(story)


def test_too_many_watchers_are_told_so(monkeypatch):
    """Closes: watchers without end hold answers back without end. Those that have something to read are answered."""
    monkeypatch.setattr(watching, "HELD_MAX", 2)

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(sleeper_workflow(world, nap="1 hour")))
        await world.all_owned()
        handle = await world.client().create("nap", 7, id="one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        watchers = [Watcher(world, handle) for _ in range(2)]
        await world.passes(1)
        third = Watcher(world, handle)
        with pytest.raises(TooManyWatchers, match="2 watchers"):
            await third.task
        assert third.types == watchers[0].types
        for watcher in watchers:
            assert not watcher.task.done()
            watcher.task.cancel()
        await world.passes(10)
        again = Watcher(world, handle, third.cursors[-1])
        await handle.terminate()
        await again.task
        assert again.types == ["workflow_terminated"]
        held = world.held(world.station_of("one"))[0][0].pod.ownership._answers[world.station_of("one")]
        await world.passes(6)
        assert held.watching.idle

    play(story)


def test_many_instances_are_watched_as_one():
    """Closes: a subscription loses events of one instance behind those of another, or never ends."""

    async def story(world: World) -> None:
        class Flaky(Workflow[int, int], name="flaky"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                try:
                    await step.do("never", failing, retries=Retries(limit=1, delay="1 second"))
                except StepFailed:
                    await step.sleep("nap", "3 seconds")
                return event.payload

        async def failing() -> None:
            raise ValueError("no")

        app = world.app(Flaky, steps_workflow(world, steps=3, step_s=0.7))
        a = await world.start_pod("a", app)
        await world.all_owned()
        client = world.client()
        handles = [await client.create(name, number, id=f"{name}-{number}")
                   for name in ("flaky", "work") for number in range(10)]
        events: list[WatchEvent] = []

        async def watch() -> None:
            async for event in client.subscribe(handles):
                events.append(event)

        watching_all = asyncio.ensure_future(watch())
        await world.passes(2)
        a.kill()
        await world.start_pod("b", app)
        await asyncio.wait_for(watching_all, 60)

        for handle in handles:
            mine = [event for event in events if (event.workflow, event.id) == (handle.workflow, handle.id)]
            assert mine == await told(handle)
            cursors = {(handle.workflow, handle.id): mine[-2].cursor}
            assert [event async for event in client.subscribe([handle], cursors=cursors)] == mine[-1:]

    play(story)

