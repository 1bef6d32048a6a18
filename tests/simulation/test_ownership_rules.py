"""Who owns a station: claims, deposed owners, released stations (protocol rules 1 and 2)."""

from __future__ import annotations

import asyncio

import pytest

from toque import _subjects as subjects
from toque._subjects import StationId
from toque.sim.checks import check_all, check_chains
from toque.sim.process import State
from toque.sim.world import TTL_S, World, account, play, steps_workflow
from toque.storage import records as r
from toque.storage.journal import JournalHalted
from toque.storage.memory_broker import DELAY, DROP_BEFORE
from toque.workers.keeper_thread import EXIT_FENCED

FIRST = StationId(1, 0)


# -- rule 1: the journal's last message is the ownership record --------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_two_pods_that_start_at_once_never_share_a_station(seed):
    """Closes: both read an empty tail and claim. One append is accepted, the other is refused (10071)."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        await world.start_pod("a", app)
        await world.start_pod("b", app)  # both at their first tick
        await world.all_owned()

        check_chains(world)
        for station in world.stations():
            assert len(world.held(station)) == 1

    play(story, seed=seed)


def test_the_station_of_a_living_session_is_never_claimed():
    """Closes: a pod that has not heard of the owner's stations (its key is not renewed yet) takes them for free ones."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, step_s=15))
        a = await world.start_pod("a", app)
        world.broker.fail_next(subjects.control_session("main", a.session), DROP_BEFORE, times=3)  # announcements
        await world.all_owned()
        for station in world.stations():  # a callback inside each keeps them where they are
            await world.publish("work", world.ids_at(station, 1)[0])
        await world.until(lambda: len(world.history.entries) == 4, "all are inside")
        b = await world.start_pod("b", app)
        assert world.session_key(a.session).stations == [], "the story needs an owner that could not tell its stations"
        await world.passes(5)

        assert all(claim.session == a.session for claim in world.records(r.Claim)), "b claimed from a living session"
        assert world.session_key(a.session).ended == ""
        await world.spread_over(a, b)
        check_chains(world)

    play(story)


def test_a_session_that_the_watch_has_not_seen_is_asked_for_at_its_key():
    """Closes: b's watch is behind and knows nothing of a's session: b takes a's stations for a dead one's and claims
    them. Before a claim the key itself is read from the leader, and a living one is not ended."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, step_s=15))
        a = await world.start_pod("a", app)
        await world.all_owned()
        for station in world.stations():  # a callback inside each keeps them where they are
            await world.publish("work", world.ids_at(station, 1)[0])
        await world.until(lambda: len(world.history.entries) == 4, "all are inside")
        b = await world.start_pod("b", app)
        for _ in range(100):
            b.pod.context.control.sessions.pop(a.session, None)
            b.pod.ownership._news.set()
            await world.passes(0.05)

        assert all(claim.session == a.session for claim in world.records(r.Claim)), "b claimed from a living session"
        assert world.session_key(a.session).ended == ""

    play(story)


def test_a_claim_that_a_late_group_of_the_last_owner_forestalls_is_made_again():
    """Closes: b reads the tail of a dead owner and claims; a group that the owner had sent lands in between. b's claim is
    refused (10071), and the tail's epoch is lower than its own: no foreign hand, b claims again above it, at once."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        b = await world.start_pod("b", app)
        await world.spread_over(a, b)
        station = min(a.pod.ownership.stations)
        a.kill()
        world.broker.fail_next(subjects.journal("main", station), DELAY, delay_s=0.5)  # b's claim
        await world.until(lambda: (key := world.session_key(a.session)) and key.ended, "b has ended the session of a")
        ended = world.now
        await world.passes(0.2)
        tail, body = world.journal(station)[-1], r.join_records([])
        late = r.GroupHeader(tail.header.epoch, a.session, tail.header.group + 1, r.crc_of(body))
        await world.bus().publish(subjects.journal("main", station), body, {
            subjects.GROUP_HEADER: late.text(), subjects.EXPECTED_LAST_HEADER: str(tail.sequence)})
        await world.until(lambda: world.is_owned(station), "b has claimed above it")

        assert world.now - ended < 2
        assert world.journal(station)[-1].header.session == b.session
        check_chains(world)

    play(story)


def test_a_claim_whose_reading_back_failed_is_made_again():
    """Closes: a claim is accepted, then the journal cannot be read: the tail is the pod's own, nobody holds the station,
    and while the pod's session lives nobody else may take it. The pod claims above itself."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        a = await world.start_pod("a", app)
        world.broker.fail_next(f"$JS.API.CONSUMER.CREATE.{subjects.journal_stream('main')}", "refuse:10008", times=3)
        await world.all_owned(timeout_s=5)

        assert not world.broker._faults
        assert {claim.session for claim in world.records(r.Claim)} == {a.session}
        assert len(world.records(r.Claim)) == world.account.stations + 3
        check_chains(world)

    play(story)


def test_each_epoch_is_one_above_the_last():
    """Readers tell owners apart by their epoch alone, so it grows with each claim, over releases and deaths."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        b = await world.start_pod("b", app)
        await world.spread_over(a, b)
        a.kill()
        await world.all_owned()

        epochs = [group.header.epoch for group in world.journal(FIRST) if isinstance(group.records[0], r.Claim)]
        assert epochs == list(range(1, len(epochs) + 1))
        assert len(epochs) >= 2
        check_chains(world)

    play(story)


# -- rule 2: deposed ---------------------------------------------------------------------------------------------------

async def owner_with_a_stopped_clock(world: World):
    """`a` is inside step s1 of instance `one` and believes for ever that its session lives; `b` takes over meanwhile."""
    app = world.app(steps_workflow(world, steps=3, step_s=TTL_S * 1.5))
    a = await world.start_pod("a", app, rate=0.001)
    await world.all_owned()
    await world.publish("work", "one")
    await world.until(lambda: world.history.entered("one", "s1"), "step s1 was entered")
    a.keeper_bus.disconnect()
    b = await world.start_pod("b", app)
    await world.until(lambda: world.history.entered("one", "s1", pod="b"), "b has gone on with the instance")
    return a, b


def test_a_deposed_owners_group_is_refused_and_nothing_of_it_had_left():
    """Closes: an owner whose clock stands still goes on after its session ended. Its group gets 10071, its engines leave
    memory, and no callback was entered behind the refused record."""

    async def story(world: World) -> None:
        a, _b = await owner_with_a_stopped_clock(world)
        station = world.station_of("one")
        assert a.pod.ownership.stations[station].in_time(), "the story needs an owner that believes it lives"

        await world.until(lambda: station not in a.pod.ownership.stations, "a has heard that it is deposed")
        await world.until(lambda: world.records(r.Ended), "b has brought the instance to its end")

        assert [entry.step for entry in world.history.entered("one", pod="a")] == ["s1"]
        assert [(done.name, done.attempt) for done in world.records(r.StepDone)] == [("s1", 2), ("s2", 1), ("s3", 1)]
        check_chains(world)
        assert a.pod.context.slots.in_use == 0
        a.kill()

    play(story)


def test_a_deposed_owner_answers_nobody_who_has_heard_the_new_one():
    """Closes: the old owner, alive and connected, answers "running" after the new one said "complete" (rule 24)."""

    async def story(world: World) -> None:
        a, _b = await owner_with_a_stopped_clock(world)
        client = world.client()
        handle = client.handle("work", "one")
        epochs = set()
        while (status := await handle.status()).status != "complete":
            epochs.add(status.pod)
            await world.passes(0.5)
        assert "b" in epochs
        for _ in range(50):
            assert (await handle.status()).status == "complete"
        a.kill()

    play(story)


def test_a_stopped_process_that_goes_on_harms_nobody():
    """Closes: SIGSTOP past the TTL, then SIGCONT: the pod's late result and its callbacks would count beside the new
    owner's. Its results are refused, nothing is entered, and since callbacks are inside it ends itself."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        for number in range(8):
            await world.publish("work", f"i{number}")
        await world.until(lambda: world.history.entered(step="s2"), "some are inside s2")
        b = await world.start_pod("b", app)
        old = a.session
        a.pause()
        await world.passes(TTL_S + 3)
        a.resume()
        resumed = world.now
        await world.until(lambda: len(world.records(r.Ended)) == 8, "all have ended")
        await world.until(lambda: not a.alive, "a has ended itself")

        assert a.exit_code == EXIT_FENCED
        assert world.history.entered(pod="a", since=resumed) == []
        assert world.session_key(old).ended
        assert b.process.state is State.RUNNING
        await world.quiet()
        check_all(world, "work", [f"i{number}" for number in range(8)])

    play(story)


def test_a_dead_owners_last_group_only_delays_a_claim():
    """Closes: it was still under way when its pod was killed, and lands between the look at the tail and the claim. The
    claim is refused, its pod takes the journal for damaged, and lets the station lie for ten seconds."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=0.5))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered(step="s2"), "it is inside s2")
        world.broker.fail_next(subjects.journal("main", FIRST), DELAY, times=2, delay_s=0.8)
        await world.until(lambda: world.history.entered(step="s2")[0].left_at, "it has left s2")
        await world.passes(0.1)
        a.kill()
        died = world.now
        await world.start_pod("a", app)
        await world.until(lambda: world.records(r.Ended), "it has ended")

        assert world.now - died < 5
        check_all(world, "work", ["one"])

    play(story, account=account(stations=1))


# -- a claim that is accepted is served, or given up -------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(1, 6))
def test_a_connection_lost_behind_a_claim_leaves_no_station_half_open(seed):
    """Closes: the claim is accepted, then the connection breaks while the station is opened. Its owner has it in memory
    and never claims it again, but reads no queue and answers nobody, for as long as its session lives."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world)))
        session = a.session
        await world.until(lambda: world.records(r.Claim), "the claim stands in the journal")
        a.bus.disconnect()
        await world.passes(1)
        a.bus.reconnect()
        await world.publish("work", "one")
        await world.until(lambda: world.records(r.Ended), "it has ended", timeout_s=10)

        assert a.session == session
        await world.all_owned()
        await world.quiet()
        check_all(world, "work", ["one"])

    play(story, seed=seed, account=account(stations=1))


def test_a_released_station_that_is_claimed_twice_was_not_interrupted():
    """Closes: the successor's connection breaks between its claim and the opening, so it claims above its own claim; the
    instances that were handed over in order count as interrupted by it."""
    claims: list[int] = []

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=6, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s2"), "it is on its way")
        b = await world.start_pod("b", app)
        stopping = asyncio.ensure_future(a.stop())
        while b not in (node for node, _ in world.held(FIRST)):
            await world.passes(0.0002)
        b.bus.disconnect()
        await world.passes(1)
        b.bus.reconnect()
        await stopping
        await world.until(lambda: world.records(r.Ended), "it has ended", timeout_s=30)

        claims.append(len(world.records(r.Claim)))
        assert not world.records(r.Interrupted)
        check_all(world, "work", ["one"])

    for seed in range(10):
        play(story, seed=seed, account=account(stations=1))
    assert max(claims) == 3, "the connection was never lost between a claim and the opening"


def test_a_station_lost_while_it_is_opened_keeps_nobody_from_the_others():
    """Closes: the record of the interruption is refused, so its acceptance never comes; the pod waits for it for ever,
    and claims none of the dead pod's other stations."""

    async def story(world: World) -> None:
        world.expected = (JournalHalted,)
        app = world.app(steps_workflow(world, steps=1, step_s=60))
        a = await world.start_pod("a", app)
        await world.all_owned()
        first, second = world.stations()
        instance = world.ids_at(first, 1)[0]
        await world.publish("work", instance)
        await world.until(lambda: world.history.entries, "it is inside")
        subject = subjects.journal("main", first)
        a.kill()
        world.broker.fail_next(subject, DELAY, times=2, delay_s=0.5)
        claims = len(world.records(r.Claim, first))
        b = await world.start_pod("b", app)
        await world.until(lambda: len(world.records(r.Claim, first)) > claims, "b has claimed the first station")
        await world.passes(0.2)  # the record of the interruption is under way
        tail = world.journal(first)[-1].header
        body = r.join_records([])
        foreign = r.GroupHeader(tail.epoch, tail.session, tail.group + 7, r.crc_of(body))
        await world.bus().publish(subject, body, {subjects.GROUP_HEADER: foreign.text()})
        await world.until(lambda: world.is_owned(second), "b serves the other one", timeout_s=10)

        assert not world.is_owned(first)
        b.kill()

    play(story, account=account(stations=2))
