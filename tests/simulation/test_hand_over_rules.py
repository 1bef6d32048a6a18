"""Stations that move because somebody wants it: SIGTERM, and pods that come (protocol rule 6)."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from toque import _subjects as subjects
from toque._subjects import StationId
from toque.sim.checks import check_all, check_chains, check_steps
from toque.sim.process import work_in_thread
from toque.sim.world import TTL_S, World, account, play, steps_workflow
from toque.storage import records as r
from toque.storage.memory_broker import DROP_BEFORE
from toque.workers.ownership import MOVE_PATIENCE_S, RELEASED_ANYONE_S
from toque.workflow import Step, StepContext, Workflow, WorkflowEvent

FIRST = StationId(1, 0)


# -- rule 6: voluntary moves -------------------------------------------------------------------------------------------

def test_sigterm_repeats_no_completed_step():
    """Closes: the station goes while callbacks are inside, and what they finish is lost. Every callback of 12 instances
    is entered once, though the pod leaves in the middle; it exits with 0."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=4, step_s=0.7))
        a = await world.start_pod("a", app)
        b = await world.start_pod("b", app)
        await world.spread_over(a, b)
        ids = [f"i{number}" for number in range(12)]
        for instance in ids:
            await world.publish("work", instance)
        await world.until(lambda: len(world.history.entered(step="s2")) == 12, "all are inside s2")

        await a.stop()
        await world.until(lambda: len(world.records(r.Ended)) == 12, "all have ended")

        assert a.exit_code == 0
        assert [world.history.times(instance, f"s{step}") for instance in ids for step in range(1, 5)] == [1] * 48
        assert world.session_key(a.session).ended == "left"
        assert not world.records(r.Interrupted)
        await world.quiet()
        check_all(world, "work", ids)

    play(story)


def test_no_callback_is_entered_at_a_station_that_is_handed_over():
    """Closes: while the owner waits for the callbacks inside, it starts others, and never becomes quiet."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=20, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s2"), "it is inside s2")
        asked = world.now
        await a.stop()

        assert world.history.entered(since=asked) == []
        assert world.now - asked < 3

    play(story)


def test_the_named_successor_takes_a_released_station_at_once():
    """Closes: on SIGTERM of one of three pods the successor that the release names is not the pod that takes the
    station, so all of them wait until anyone may."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        pods = [await world.start_pod(name, app) for name in "abc"]
        await world.spread_over(*pods)
        left = world.now
        await pods[0].stop()
        await world.all_owned()

        assert world.now - left < RELEASED_ANYONE_S / 2
        for station in world.stations():
            released = [it for it in world.records(r.Released, station) if it.at >= world.broker_ms(left)]
            assert not released or world.owner(station).session == released[-1].successor
        check_chains(world)

    for seed in range(8):
        play(story, seed=seed, account=account(stations=8))


def test_a_pod_that_leaves_itself_is_named_by_nobody():
    """Closes: two of three pods get SIGTERM, one after the other. The second names the first as the successor of some
    stations: it will never claim them, but lives while its callbacks end, and the third waits for it."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, step_s=4))
        a, b, c = [await world.start_pod(name, app) for name in "abc"]
        await world.spread_over(a, b, c)
        await world.publish("work", world.ids_at(min(a.pod.ownership.stations), 1)[0])
        await world.until(lambda: world.history.entries, "a is inside")
        stopping = asyncio.ensure_future(a.stop())
        await world.passes(0.3)
        released, left = set(b.pod.ownership.stations), world.now
        await b.stop()
        await world.until(lambda: released <= set(c.pod.ownership.stations), "c has all of b's stations")

        assert world.now - left < RELEASED_ANYONE_S / 2
        await stopping
        check_chains(world)

    for seed in range(4):
        play(story, seed=seed, account=account(stations=8))


def test_others_wait_two_seconds_for_a_named_successor():
    """Closes: everybody jumps at a released station, and the successor's claim loses. The named one sleeps here, so
    another claims it; but not before two seconds are over."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        sleeper = await world.start_pod("sleeper", app)
        await world.passes(0.3)  # its session is known, it has no station yet
        station = a.pod.ownership.stations[FIRST]
        sleeper.pause()
        a.pod.ownership.leaving = True  # a itself moves nothing more: this release is the test's own
        released_at = world.now
        assert await station.hand_over(sleeper.session, patience_s=1, ending=False, before_release=lambda: None)
        await a.pod.ownership._forget(station)
        a.pod.ownership.leaving = False
        await world.until(lambda: world.held(FIRST), "somebody else has claimed it", timeout_s=30)

        assert world.owner(FIRST) is a
        assert RELEASED_ANYONE_S <= world.now - released_at < TTL_S / 2, "before the sleeper's session was over"
        sleeper.kill()

    play(story)


@pytest.mark.parametrize("after_ms", range(0, 60, 5))
def test_sigterm_while_stations_are_claimed_releases_them_all(after_ms):
    """Closes: a claim is under way when SIGTERM comes, the pod owns the station from then on and nobody hands it over:
    its session ends without a release, which counts as an interruption and warns of callbacks that were cut."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world)))
        await world.passes(after_ms / 1000)
        await a.stop()

        assert a.exit_code == 0
        for station in world.stations():
            groups = world.journal(station)
            assert not groups or any(isinstance(record, r.Released) for record in groups[-1].records), groups[-1]

    play(story, seed=after_ms)


def test_async_callbacks_get_their_time_before_a_move():
    """Closes: a pod joins, and the callbacks of the stations that go to it are cut. Half a minute is granted."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=MOVE_PATIENCE_S * 0.8))
        a = await world.start_pod("a", app)
        await world.all_owned()
        ids = [f"i{number}" for number in range(8)]
        for instance in ids:
            await world.publish("work", instance)
        await world.until(lambda: len(world.history.entries) == 8, "all are inside s1")
        b = await world.start_pod("b", app)
        await world.spread_over(a, b)
        await world.until(lambda: len(world.records(r.Ended)) == 8, "all have ended")

        assert [world.history.times(instance, step) for instance in ids for step in ("s1", "s2")] == [1] * 16
        check_all(world, "work", ids)

    play(story)


def test_while_a_station_is_frozen_its_idle_instances_hold_no_slot():
    """Closes: an instance between two steps keeps its slot while another one's long callback holds up the move, and
    nobody can use it (L3). When the move comes to nothing, because a thread is inside, it takes one again."""

    async def story(world: World) -> None:
        class Mixed(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                if event.instance_id in threaded:
                    return await step.do("s1", blocking)
                await step.do("s1", short)
                return await step.do("s2", short)

        def blocking(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                work_in_thread(60.0)
                return 7

        async def short(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                await asyncio.sleep(2.0)
                return 7

        app = world.app(Mixed)
        a = await world.start_pod("a", app)
        await world.all_owned()
        pairs = {station: world.ids_at(station, 2) for station in world.stations()}
        threaded = {pair[0] for pair in pairs.values()}
        others = {pair[1] for pair in pairs.values()}
        for instance in threaded | others:
            await world.publish("work", instance)
        await world.until(lambda: len(world.history.entries) == 8, "all are inside")
        slots = a.pod.context.slots
        assert slots.in_use == 8

        await world.start_pod("b", app)
        moving = [held for held in a.pod.ownership.stations.values()]
        await world.until(lambda: sum(held.frozen for held in moving) == 2, "two of four are to go")
        await world.passes(4.0)
        assert slots.in_use == 8 - 4  # two have ended, two are between their steps
        frozen = {pairs[held.id][1] for held in moving if held.frozen}
        assert all(world.history.times(instance, "s2") == 0 for instance in frozen)

        await world.until(lambda: not any(held.frozen for held in moving), "the move came to nothing", timeout_s=40)
        await world.until(lambda: all(world.history.times(instance, "s2") for instance in frozen), "they go on here",
                          timeout_s=2)
        assert {world.history.entered(instance, "s2")[0].pod for instance in frozen} == {"a"}
        assert slots.in_use == 6  # with those in threads
        await world.until(lambda: len(world.records(r.Ended)) == 8, "all have ended", timeout_s=200)
        assert all(world.history.times(instance, "s2") == 1 for instance in others)
        check_all(world, "work", sorted(threaded | others))

    play(story)


def test_an_instance_whose_station_serves_on_enters_nothing_before_it_has_a_slot_again():
    """Closes: L1: while the station was frozen its instance gave the slot back, and another one has it; the move comes to
    nothing, the gate opens, and the instance goes on with no slot at all. Two slots for three."""

    async def story(world: World) -> None:
        class Mixed(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                if event.instance_id == threaded:
                    return await step.do("s1", blocking)
                await step.do("s1", short)
                return await step.do("s2", short if event.instance_id == idle else long)

        def blocking(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                work_in_thread(60.0)
                return 7

        async def short(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                await asyncio.sleep(2.0)
                return 7

        async def long(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                await asyncio.sleep(60.0)
                return 7

        app = world.app(Mixed)
        a = await world.start_pod("a", app)
        await world.all_owned()
        stays, goes = world.stations()
        threaded, idle = world.ids_at(goes, 2)
        for instance in (threaded, idle):
            await world.publish("work", instance)
        await world.until(lambda: len(world.history.entries) == 2, "both are inside")
        held = a.pod.ownership.stations[goes]
        moving = a.process.spawn(held.hand_over("nobody", patience_s=10.0, ending=False, before_release=lambda: None))
        await world.until(lambda: a.pod.context.slots.in_use == 1, "its slot is free")
        other = world.ids_at(stays, 1)[0]
        await world.publish("work", other)
        await world.until(lambda: world.history.entered(other, "s2"), "another one has it")

        assert not await moving
        await world.passes(5.0)
        assert not world.history.entered(idle, "s2")
        assert a.pod.context.slots.in_use == 2

        await world.until(lambda: len(world.records(r.Ended)) == 3, "all have ended", timeout_s=200)
        assert world.history.most_inside() == 2
        check_all(world, "work", [threaded, idle, other], limit=2)

    play(story, account=account(stations=2, max_concurrent=2))


def test_after_half_a_minute_async_callbacks_are_cut_by_a_move():
    """Closes: one endless callback keeps a station where it is for ever. It is an interruption, not a failed attempt."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=120))
        a = await world.start_pod("a", app)
        await world.all_owned()
        ids = [world.ids_at(station, 1)[0] for station in world.stations()]
        for instance in ids:
            await world.publish("work", instance)
        await world.until(lambda: len(world.history.entries) == 4, "all are inside")
        joined = world.now
        b = await world.start_pod("b", app)
        await world.spread_over(a, b, timeout_s=MOVE_PATIENCE_S + 5)
        assert world.now - joined >= MOVE_PATIENCE_S

        await world.until(lambda: len(world.records(r.Ended)) == 4, "all have ended", timeout_s=300)
        assert not world.records(r.AttemptFailed)
        assert sorted(world.history.times(instance, "s1") for instance in ids) == [1, 1, 2, 2]
        check_steps(world)

    play(story)


def test_a_station_with_a_thread_inside_is_not_moved():
    """Closes: a thread cannot be cut, so its callback would go on here while the new owner enters it too."""

    async def story(world: World) -> None:
        class Threaded(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                return await step.do("s1", blocking)

        def blocking(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                work_in_thread(70.0)
                return 7

        app = world.app(Threaded)
        a = await world.start_pod("a", app)
        await world.all_owned()
        ids = [world.ids_at(station, 1)[0] for station in world.stations()]
        for instance in ids:
            await world.publish("work", instance)
        await world.until(lambda: len(world.history.entries) == 4, "all are inside")
        b = await world.start_pod("b", app)
        await world.passes(MOVE_PATIENCE_S + 15)
        assert len(b.pod.ownership.stations) == 0

        await world.until(lambda: len(world.records(r.Ended)) == 4, "all have ended", timeout_s=100)
        await world.spread_over(a, b)
        assert [world.history.times(instance, "s1") for instance in ids] == [1] * 4
        check_all(world, "work", ids)

    play(story)


def test_a_callback_that_cannot_be_cut_does_not_stop_its_station():
    """Closes: an async callback swallows its cancellation, so the move waits for it for ever, and the station is frozen so
    long: nothing is admitted, woken or entered there. The move is given up; the instance goes on when it is out."""

    async def story(world: World) -> None:
        class Stubborn(Workflow[int, int], name="stubborn"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                return await step.do("s1", stubborn, timeout="1 hour")

        again: set[str] = set()  # instances whose callback was entered before

        async def stubborn(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                until = world.now + (120 if ctx.instance_id not in again else 1)
                again.add(ctx.instance_id)
                while world.now < until:
                    with suppress(asyncio.CancelledError):
                        await asyncio.sleep(until - world.now)
            return 7

        app = world.app(Stubborn, steps_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        ids = {station: world.ids_at(station, 1)[0] for station in world.stations()}
        for instance in ids.values():
            await world.publish("stubborn", instance)
        await world.until(lambda: len(world.history.entries) == len(ids), "all are inside")
        await world.start_pod("b", app)
        await world.passes(MOVE_PATIENCE_S + 20)
        for station in world.stations():
            await world.publish("work", world.ids_at(station, 1, "other")[0])
        await world.until(lambda: len(world.records(r.Ended)) == len(ids), "others are done meanwhile", timeout_s=30)

        assert a.pod.context.callbacks.inside
        await world.until(lambda: len(world.records(r.Ended)) == 2 * len(ids), "these end too", timeout_s=200)
        await world.quiet()
        check_all(world, "stubborn", ids.values())

    play(story)


def test_a_station_that_could_not_be_moved_serves_on():
    """Closes: a move is given up because of a thread inside, and the station stays frozen: the instances beside it wait
    for as long as the thread runs."""

    async def story(world: World) -> None:
        class Threaded(Workflow[int, int], name="threaded"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                return await step.do("s1", blocking)

        def blocking(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                work_in_thread(50.0)
                return 7

        app = world.app(Threaded, steps_workflow(world, steps=2))
        await world.start_pod("a", app)
        await world.all_owned()
        for station in world.stations():
            await world.publish("threaded", world.ids_at(station, 1, prefix="t")[0])
        await world.until(lambda: len(world.history.entries) == 2, "all are inside")
        await world.start_pod("b", app)
        await world.passes(MOVE_PATIENCE_S + 2)
        ids = [world.ids_at(station, 1)[0] for station in world.stations()]
        for instance in ids:
            await world.publish("work", instance)
        await world.until(lambda: len(world.records(r.Ended)) == 2, "the others have ended", timeout_s=5)

        assert {entry.pod for entry in world.history.entered(step="s2")} == {"a"}
        await world.until(lambda: len(world.records(r.Ended)) == 4, "the threads have ended")
        check_all(world, "work", ids)

    play(story, account=account(stations=2))


def test_the_end_of_the_grace_time_is_an_interruption():
    """Closes: an endless callback keeps SIGTERM waiting, or is counted as a failed attempt. The pod exits with 0 when
    the time is over; the next owner enters the step again, as attempt 2."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=60))
        a = await world.start_pod("a", app, grace_s=5.0)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entries, "it is inside")
        b = await world.start_pod("b", app)
        asked = world.now
        await a.stop()
        assert 5 <= world.now - asked < 7
        assert a.exit_code == 0

        await world.until(lambda: world.history.entered("one", "s1", pod="b"), "b goes on", timeout_s=3)
        assert world.history.entries[-1].attempt == 2
        assert [it.session for it in world.records(r.Interrupted)] == [a.session]
        assert not world.records(r.AttemptFailed)
        assert b.alive

    play(story)


@pytest.mark.parametrize("when", ["before", "after"])
def test_sigterm_ends_in_time_though_the_journal_is_dead(when):
    """Closes: SIGTERM waits for an acceptance that never comes; the supervisor's SIGKILL, and a TTL, follow."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=1))
        a = await world.start_pod("a", app, grace_s=5.0)
        await world.all_owned()
        if when == "before":
            await world.publish("work", "one")
            await world.until(lambda: world.history.entries, "it is inside")
        world.broker.freeze_stream(subjects.journal_stream("main"))
        asked = world.now
        await a.stop()

        assert a.exit_code == 0
        assert world.now - asked < 5 + 2
        assert world.session_key(a.session).ended == "left"

    play(story)


def test_a_session_is_not_ended_while_a_thread_is_inside():
    """Closes: SIGTERM, and a sync callback outlasts the grace time: its pod ends its session at once, so another pod enters
    the same callback while the thread is still inside; and the pod stays until the thread is out or its TTL over."""

    async def story(world: World) -> None:
        class Threaded(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                return await step.do("s1", blocking)

        def blocking(ctx: StepContext) -> int:
            with world.history.inside(ctx) as visit:
                work_in_thread(300.0 if visit.pod == "a" else 0.0)
                return 7

        app = world.app(Threaded)
        a = await world.start_pod("a", app, grace_s=2.0)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entries, "it is inside")
        session = a.session
        await world.start_pod("b", app)
        asked = world.now
        await a.stop()

        assert world.now - asked <= 2.0 + 0.5
        assert not world.session_key(session).ended, "it was ended while the thread was inside"
        await world.until(lambda: world.records(r.Ended), "b goes on", timeout_s=TTL_S + 5)
        assert world.session_key(session).ended == "expired"
        check_all(world, "work", ["one"])

    play(story, account=account(stations=1))


def test_sigterm_during_a_move_ends_in_time():
    """Closes: the move's release is under way when SIGTERM comes, and the hand-over waits for a second one that the
    sealed epoch never takes."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        a = await world.start_pod("a", app, grace_s=10.0)
        await world.all_owned()
        world.broker.fail_next("toque.main.journal.>", DROP_BEFORE, times=8)
        await world.start_pod("b", app)
        await world.until(lambda: a.pod.ownership._moving and any(
            it.commits._sealed is not None for it in a.pod.ownership.stations.values()), "a release is under way")
        asked = world.now
        await a.stop()

        assert a.exit_code == 0
        assert world.now - asked < 10
        await world.all_owned()
        check_chains(world)

    play(story)
