"""Slots over many pods: the limit holds across the loss of pods and of the Gatekeeper (protocol rule 9)."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

from toque import _subjects as subjects
from toque._protocol import LeaseAnswer
from toque._subjects import StationId
from toque.sim.checks import check_all, check_leases
from toque.sim.history import Visit
from toque.sim.process import work_in_thread
from toque.sim.world import TTL_S, World, account, play, sleeper_workflow, steps_workflow
from toque.storage import records as r
from toque.storage.memory_broker import DELAY, DROP_BEFORE
from toque.workflow import Step, StepContext, Workflow, WorkflowEvent

FIRST = StationId(1, 0)
SOON_S = 3.0  # for a changed limit to reach every pod


def most_inside(entries: list[Visit], now: float, *, dead_for: dict[str, float] | None = None) -> int:
    """The most instances inside callbacks at once. `dead_for`: a killed pod's callbacks count as inside until then."""
    changes = []
    for entry in entries:
        left = entry.left_at if entry.left_at is not None else now
        if entry.cut and dead_for:
            left = dead_for.get(entry.pod, left)
        changes += [(entry.entered_at, 1), (left, -1)]
    inside = most = 0
    for _, change in sorted(changes):
        inside += change
        most = max(most, inside)
    return most


async def create(world: World, count: int, workflow: str = "work") -> list[str]:
    ids = [f"{workflow}{number}" for number in range(count)]
    for instance in ids:
        await world.publish(workflow, instance)
    return ids


@pytest.mark.parametrize("seed", range(4))
def test_the_limit_holds_over_two_pods_and_the_loss_of_the_gatekeeper(seed):
    """Closes: L1: the next Gatekeeper does not know what the last one granted, or takes a dead pod's slots for free
    before its TTL is over, while the pod may still be inside callbacks. 3 slots, 2 pods, the owner of station 0 killed:
    never more than 3 inside, the killed pod's counted until its session was over."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.5))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        ids = await create(world, 24)
        await world.until(lambda: len(world.history.entries) >= 12, "they run")
        keeper = world.owner(FIRST)
        keeper.kill()
        killed = world.now
        held = world.session_key(keeper.session)
        assert held is not None
        await world.until(lambda: len(world.records(r.Ended)) == 24, "all have ended", timeout_s=120)

        over = next(it.at for it in world.records(r.LeaseEnded) if it.session == keeper.session) / 1000
        over -= world.broker.epoch_ms / 1000
        assert over >= killed + TTL_S * 0.8 - 0.1
        assert most_inside(world.history.entries, world.now, dead_for={keeper.name: over}) == 3
        check_leases(world, 3)
        await world.quiet()
        check_all(world, "work", ids, limit=3)

    play(story, seed=seed, account=account(max_concurrent=3))


def test_a_dead_pods_slots_come_back_after_the_ttl_and_not_before():
    """Closes: L1 and L2: granted again too early two work in one slot; never granted again the limit shrinks. The pod
    that is killed here is not the Gatekeeper's."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=0.5))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        await create(world, 80)
        await world.until(lambda: {entry.pod for entry in world.history.entries} == {"a", "b"}, "both work")
        victim, other = (a, b) if world.owner(FIRST) is b else (b, a)
        victim.kill()
        killed = world.now
        await world.until(lambda: len(world.records(r.Ended)) == 80, "all have ended", timeout_s=200)

        times = {entry.entered_at for entry in world.history.entered(pod=other.name, since=killed)}
        seen = {at: most_inside([it for it in world.history.entered(pod=other.name, since=killed)
                                 if it.entered_at <= at < (it.left_at or at)], world.now) for at in times}
        early = max(count for at, count in seen.items() if at < killed + TTL_S * 0.8 - 0.1)
        late = max(count for at, count in seen.items() if at > killed + TTL_S + 2)
        assert early <= 2
        assert late == 4
        check_leases(world, 4)

    play(story, account=account(max_concurrent=4))


def test_a_pod_without_stations_gives_its_slots_back_when_it_dies():
    """Closes: L2: nobody claims anything of a session that owned nothing, so nobody ends it, and its slots are lost."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=0.2))
        await world.start_pod("a", app)
        await world.all_owned()
        spare = await world.start_pod("spare", app)
        await world.until(lambda: any(it.session == spare.session for it in world.records(r.Lease)), "it has a lease")
        assert not spare.pod.ownership.stations
        spare.kill()
        await world.until(lambda: any(it.session == spare.session for it in world.records(r.LeaseEnded)),
                          "its slots are free", timeout_s=TTL_S + 3)

        assert world.session_key(spare.session).ended == "expired"

    play(story, account=account(stations=1, max_concurrent=100))


def test_a_lowered_limit_holds_soon():
    """Closes: L5: pods go on with what they were once granted. 6 → 2 while all slots are in use."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=0.3))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        ids = await create(world, 90)
        await world.until(lambda: most_inside(world.history.entries, world.now) == 6, "all slots are in use")
        await world.change_account(max_concurrent=2)
        changed = world.now
        await world.until(lambda: len(world.records(r.Ended)) == 90, "all have ended", timeout_s=120)

        late = world.history.entered(since=changed + SOON_S)
        assert most_inside(late, world.now) == 2
        await world.quiet()
        check_all(world, "work", ids, limit=6)

    play(story, account=account(max_concurrent=6))


def test_a_raised_limit_is_used_soon():
    """Closes: L3 and L5: the new slots lie idle while work waits. 1 → 5."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=0.3))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        ids = await create(world, 80)
        await world.passes(4)
        assert most_inside(world.history.entries, world.now) == 1
        await world.change_account(max_concurrent=5)
        changed = world.now
        await world.until(lambda: len(world.records(r.Ended)) == 80, "all have ended", timeout_s=120)

        assert most_inside(world.history.entered(since=changed), world.now) == 5
        assert most_inside([it for it in world.history.entered(since=changed) if it.entered_at < changed + SOON_S],
                           world.now) == 5
        check_all(world, "work", ids, limit=5)

    play(story, account=account(max_concurrent=1))


def test_waiting_instances_hold_no_slot():
    """Closes: L4: sleepers fill the limit. One slot, ten sleepers of a minute, and others get through meanwhile."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world), sleeper_workflow(world, nap="1 minute")))
        await world.all_owned()
        await create(world, 10, "nap")
        await world.until(lambda: len(world.records(r.SleepStarted)) == 10, "all sleep", timeout_s=20)
        await world.until(lambda: a.pod.context.slots.in_use == 0, "no slot is in use", timeout_s=2)
        await create(world, 10)
        await world.until(lambda: len(world.records(r.Ended)) == 10, "the others have ended", timeout_s=20)
        await world.until(lambda: len(world.records(r.Ended)) == 20, "all have ended", timeout_s=90)

        assert world.history.most_inside() == 1
        await world.quiet()

    play(story, account=account(max_concurrent=1))


def test_an_instance_that_its_thread_outlives_leaves_memory():
    """Closes: its last group is folded when the thread comes out at last, so no fold makes it leave: it stays in memory
    until something else is committed at its station, if ever."""

    async def story(world: World) -> None:
        class Threaded(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                return await step.do("s1", blocking)

        def blocking(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                work_in_thread(5.0)
                return 7

        await world.start_pod("a", world.app(Threaded))
        await world.all_owned()
        handle = await world.client().create("work", 7, id=world.ids_at(StationId(1, 1), 1)[0])
        await world.until(lambda: world.history.entries, "it is inside")
        await handle.terminate()
        await world.passes(6)

        await world.quiet(timeout_s=1)

    play(story)


def test_woken_instances_go_before_new_ones():
    """Closes: L3: a deep queue starves those that have begun. One slot, a full queue: a sleeper goes on as soon as it is
    due and the slot is free."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, step_s=1), sleeper_workflow(world, nap="5 seconds"))
        await world.start_pod("a", app)
        await world.all_owned()
        await create(world, 1, "nap")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        await create(world, 30)
        await world.until(lambda: world.history.entered("nap0", "after"), "it goes on", timeout_s=20)

        due = world.records(r.SleepStarted)[0].due
        assert world.broker_ms(world.history.entered("nap0", "after")[0].entered_at) - due < 1_500

    play(story, account=account(max_concurrent=1))


def test_slots_follow_the_work():
    """Closes: L3: slots stay where they were first granted. The work lies at one pod's station, and it gets them all."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=0.5))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        idle, busy = world.owner(FIRST), world.owner(StationId(1, 1))
        if idle is busy:
            busy = world.owner(StationId(1, 2)) if world.owner(StationId(1, 2)) is not idle else world.owner(StationId(1, 3))
        station = next(it for it in world.stations() if world.owner(it) is busy)
        for instance in world.ids_at(station, 60):
            await world.publish("work", instance)
        await world.until(lambda: len(world.records(r.Ended)) == 60, "all have ended")

        assert most_inside(world.history.entries, world.now) == 8

    play(story, account=account(max_concurrent=8))


def test_lost_and_late_lease_messages_break_nothing():
    """Closes: an old request, delivered late, lowers or raises what a newer one had settled; a lost answer leaks what it
    granted."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.2))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        for fault in (DELAY, DROP_BEFORE, DELAY, "execute then lose the answer"):
            world.broker.fail_next(subjects.gatekeeper("main"), fault, times=4, delay_s=2.3)
        ids = await create(world, 60)
        await world.until(lambda: len(world.records(r.Ended)) == 60, "all have ended", timeout_s=120)

        assert most_inside(world.history.entries, world.now) == 4
        await world.quiet()
        check_all(world, "work", ids, limit=4)

    for seed in range(3):
        play(story, seed=seed, account=account(max_concurrent=4))


def test_an_answer_of_an_older_gatekeeper_is_not_believed():
    """Closes: L1: a Gatekeeper that was deposed, and has not heard of it, still answers: its holdings were granted to
    others since. Its epoch is lower than the one that the pod has heard."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=0.5))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.until(lambda: a.pod._leasing.leased == 2, "a holds the limit")
        impostor = world.bus()
        stale = msgspec.msgpack.encode(LeaseAnswer(0, 50, 50, 50))
        await impostor.subscribe(subjects.gatekeeper("main"), lambda message: impostor.respond(message, stale))
        ids = await create(world, 40)
        await world.until(lambda: len(world.records(r.Ended)) == 40, "all have ended")

        assert most_inside(world.history.entries, world.now) == 2
        check_all(world, "work", ids, limit=2)

    play(story, account=account(max_concurrent=2))


def test_lease_traffic_is_one_request_a_second_when_idle():
    """Closes: every pod asks all the time. Design: at most one periodic request per pod and second."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        await world.passes(5)
        before = a.pod._leasing.requests + b.pod._leasing.requests
        groups = len(world.journal(FIRST))
        await world.passes(20)

        assert a.pod._leasing.requests + b.pod._leasing.requests - before <= 2 * 20 + 2
        assert len(world.journal(FIRST)) == groups, "an idle account writes nothing"

    play(story)


def test_lease_traffic_stays_small_while_pods_wait_for_slots():
    """Closes: two pods that want more than the limit nudge each other without end while long callbacks hold it."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=30))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        await world.passes(1)
        for pod in (a, b):  # a takes every slot, then b wants its share
            station = min(pod.pod.ownership.stations)
            for instance in world.ids_at(station, 20, prefix=pod.name):
                await world.publish("work", instance)
            await world.passes(2)
        assert {entry.pod for entry in world.history.entries} == {"a"}
        before = a.pod._leasing.requests + b.pod._leasing.requests
        await world.passes(10)
        assert a.pod._leasing.requests + b.pod._leasing.requests - before <= 2 * 10 * 1.5

        await world.until(lambda: {entry.pod for entry in world.history.entries} == {"a", "b"}, "b gets its share")
        ended = max(entry.left_at for entry in world.history.entries if entry.left_at is not None)
        assert world.history.entered(pod="b")[0].entered_at - ended < 0.5

    play(story, account=account(max_concurrent=4))


def test_nothing_is_begun_while_more_than_a_group_is_pending():
    """Closes: the journal stalls, and until that shows as trouble callbacks are entered and creations admitted without
    end. With a group in flight and more than another one pending the station begins nothing."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        await world.until(lambda: a.pod.context.slots.free, "it has slots")
        held = a.pod.ownership.stations[FIRST]
        world.broker.freeze_stream(subjects.journal_stream("main"))
        for _ in range(2 * r.GROUP_RECORDS_MAX + 1):
            held.commits.submit(r.LeaseEnded(0, 0, 0, held.now_ms(), "nobody"))
        await world.publish("work", world.ids_at(FIRST, 1)[0])
        await world.passes(1)

        assert not a.pod.context.journal.trouble, "the story needs a journal whose stall does not show yet"
        assert not held.may_enter(SimpleNamespace(serial=1))
        assert not held.engines
        a.kill()

    play(story)
