"""Queue, admission and ids: nothing acknowledged is lost, nothing runs twice (protocol rules 11, 12, 14–17)."""

from __future__ import annotations

import asyncio

import pytest

from toque import _subjects as subjects
from toque._accounts import ensure_queue_stream
from toque._payload import PAYLOAD_MAX
from toque._subjects import StationId
from toque.client import NewInstance
from toque.errors import InstanceEnded, InstanceExists, InstanceNotFound, OwnerAway, PayloadTooLarge
from toque.sim.checks import check_all, check_chains, check_once
from toque.sim.node import PodNode
from toque.sim.world import TTL_S, World, account, play, sleeper_workflow, steps_workflow
from toque.storage import records as r
from toque.storage.memory_broker import DELAY, DROP_BEFORE, LOSE_ANSWER
from toque.storage.ports import BusError

QUEUE = subjects.queue_stream("main", "work")
STREAM_INFO = f"$JS.API.STREAM.INFO.{QUEUE}"
JOURNAL = "toque.main.journal.>"
FIRST, SECOND = StationId(1, 0), StationId(1, 1)
PURGED_S = 15.0  # so long a purge may take to come


async def busy_pod(world: World, *, step_s: float = 5.0, name: str = "a") -> PodNode:
    """A pod that has every station, and whose one slot is taken by instance `busy`."""
    pod = await world.start_pod(name, world.app(steps_workflow(world, step_s=step_s)))
    await world.all_owned()
    await world.publish("work", "busy")
    await world.until(lambda: world.history.entered("busy"), "the slot is taken")
    return pod


# -- rule 11: the server's consumer state proves nothing ---------------------------------------------------------------

def test_what_a_dead_owner_had_prefetched_is_admitted_by_the_next():
    """Closes: messages delivered to a pod that died before it admitted them are taken for handled."""

    async def story(world: World) -> None:
        a = await busy_pod(world)
        ids = [f"i{number}" for number in range(20)]
        for instance in ids:
            await world.publish("work", instance)
        await world.passes(1)
        assert sum(chef.waiting for station in a.pod.ownership.stations.values() for chef in station.souschefs.values())
        a.kill()
        await world.start_pod("b", a.app)
        await world.until(lambda: len(world.records(r.Ended)) == 21, "all have ended", timeout_s=200)

        await world.quiet()
        check_all(world, "work", ["busy", *ids])

    play(story, account=account(max_concurrent=1))


def test_the_queue_empties_behind_what_is_committed():
    """Closes: the stream fills up with messages that were admitted long ago, or loses some that were not. Nothing leaves
    before its record is accepted, everything after it, soon."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, step_s=0.2))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        ids = [f"i{number}" for number in range(60)]
        for instance in ids:
            await world.publish("work", instance)
        while len(world.records(r.Ended)) < 60:
            known = {record.id for record in world.records(r.Admitted)}
            queued = {subjects.parse_queue(message.subject).instance_id for message in world.queued("work")}
            assert known | queued >= set(ids), "a creation is neither queued nor admitted"
            await world.passes(0.1)

        await world.until(lambda: not world.queued("work"), "the queue is empty", timeout_s=PURGED_S)
        check_all(world, "work", ids)

    play(story, account=account(max_concurrent=3))


@pytest.mark.parametrize("seed", range(6))
def test_a_station_that_was_just_taken_is_not_purged_unread(seed):
    """Closes: a pod tells its committed positions while it takes a station: "read to the end" is true of the stations it
    had, and said of the new one too. Its queued messages are purged, and nobody ever runs them."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, step_s=6))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        taker, giver = (a, b) if world.owner(FIRST) is a else (b, a)
        await world.publish("work", world.ids_at(FIRST, 1, prefix="busy")[0])
        await world.until(lambda: world.history.entries, "the one slot is taken")
        waiting = world.ids_at(SECOND, 10)
        for instance in waiting:
            await world.publish("work", instance)
        await world.passes(0.2 + seed / 10)
        world.broker.fail_next(STREAM_INFO, DELAY, times=30, delay_s=0.9)
        await giver.stop()
        await world.passes(5)

        assert taker.alive
        admitted = {record.id for record in world.records(r.Admitted)}
        queued = {subjects.parse_queue(message.subject).instance_id for message in world.queued("work")}
        assert admitted | queued >= set(waiting)
        await world.until(lambda: len(world.records(r.Ended)) == 11, "all have ended", timeout_s=100)

    play(story, seed=seed, account=account(stations=2, max_concurrent=1))


def test_no_cursor_outlives_its_stream():
    """Closes: the queue stream is lost and made anew, its sequences begin again below the committed positions: new
    creations are taken for handled, and purged."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, step_s=0.1)))
        await world.all_owned()
        for number in range(30):
            await world.publish("work", f"old{number}")
        await world.until(lambda: len(world.records(r.Ended)) == 30, "all have ended")
        await world.until(lambda: not world.queued("work"), "the queue is empty", timeout_s=PURGED_S)
        bus = world.bus()
        await bus.delete_stream(QUEUE)
        await ensure_queue_stream(bus, world.account, await world.ensure_account(), "work")
        for number in range(10):
            await world.publish("work", f"new{number}")
        await world.until(lambda: len(world.records(r.Ended)) == 40, "the new ones have ended too")

        await world.quiet()
        check_all(world, "work", [f"new{number}" for number in range(10)])

    play(story)


def test_a_sequence_set_aside_means_nothing_in_another_stream():
    """Closes: a message was parked, then its stream is made anew: the creation that gets its sequence there is taken for
    the parked one, passed over, and purged."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        bus = world.bus()
        await bus.publish(subjects.create("main", "work", "-illegal"), b"7")
        await world.until(lambda: world.records(r.Parked), "it is parked")
        await bus.delete_stream(QUEUE)
        await ensure_queue_stream(bus, world.account, await world.ensure_account(), "work")
        ids = [f"new{number}" for number in range(3)]
        for instance in ids:
            await world.publish("work", instance)
        await world.until(lambda: len(world.records(r.Ended)) == 3, "all have ended")

        await world.quiet()
        check_all(world, "work", ids)

    play(story, account=account(stations=1))


# -- rule 12: operations on queued instances ---------------------------------------------------------------------------

def test_a_terminated_queued_instance_never_runs():
    """Closes: the message is admitted later by somebody who knows nothing of it, after a restart too. It leaves the
    stream by the ordinary purge."""

    async def story(world: World) -> None:
        a = await busy_pod(world)
        client = world.client()
        handle = await client.create("work", 7, id="one")
        assert (await handle.status()).status == "queued"
        await handle.terminate()
        assert (await handle.status()).status == "terminated"
        await handle.terminate()  # a repeat gets the first answer

        await world.until(lambda: not world.queued("work"), "its message has left", timeout_s=PURGED_S)
        a.kill()
        await world.start_pod("a", a.app)
        await world.until(lambda: len(world.records(r.Ended)) == 2, "the other has ended", timeout_s=60)
        assert (await handle.status()).status == "terminated"
        assert world.history.times("one", "s1") == 0
        await world.quiet()
        check_once(world, "work", ["one", "busy"])

    play(story, account=account(max_concurrent=1))


def test_a_termination_that_is_not_accepted_loses_no_creation():
    """Closes: a queued instance is terminated, and its message dropped and purged as a known one, while the group that
    makes it known is still on its way to the journal. The pod dies, the group never lands: an acknowledged creation is
    gone without a trace."""

    async def story(world: World) -> None:
        a = await busy_pod(world, step_s=1.0)
        one = next(it for it in world.ids_at(FIRST, 1) + world.ids_at(SECOND, 1)
                   if world.station_of(it) != world.station_of("busy"))
        await world.publish("work", one)
        await world.passes(0.5)
        world.broker.fail_next(subjects.journal("main", world.station_of(one)), DROP_BEFORE, times=100)
        asking = asyncio.ensure_future(world.client().handle("work", one).terminate(timeout="5 seconds"))
        await world.passes(4.5)  # the slot was free, its message was offered again, and the positions were told
        assert not [record for record in world.records(r.Admitted) if record.id == one]
        assert [message for message in world.queued("work") if message.subject.endswith(one)]

        a.kill()
        world.broker._faults.clear()
        await world.start_pod("a", a.app)
        await world.until(lambda: any(it.id == one for it in world.records(r.Admitted)), "it is admitted")
        asking.cancel()

    for seed in range(4):
        play(story, seed=seed, account=account(max_concurrent=1, stations=2))


def test_what_has_ended_cannot_be_terminated():
    """Closes: S1: a terminal status changes. The caller hears that it came too late."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        assert await handle.result() == 7
        with pytest.raises(InstanceEnded):
            await handle.terminate()
        assert (await handle.status()).status == "complete"

    play(story)


def test_no_callback_is_entered_after_a_termination_was_asked_for():
    """Closes: the step that follows is entered while the terminal record is on its way."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=20, step_s=0.1)))
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        await world.until(lambda: world.history.entered("one", "s3"), "it runs")
        world.broker.fail_next(JOURNAL, DELAY, times=1, delay_s=1.5)
        await handle.terminate()
        ended = world.records(r.Ended)[0]

        assert ended.status is r.Status.TERMINATED
        behind_ms = 5  # so far a pod may take its broker's time to be
        assert all(world.broker_ms(entry.entered_at) <= ended.at + behind_ms for entry in world.history.entries)
        await world.quiet()

    play(story)


# -- rules 14 and 15: one id, one run ----------------------------------------------------------------------------------

def test_a_second_creation_of_an_id_exists():
    """Closes: two callers choose one id, and both believe that theirs runs: while it is queued, while it runs, after it
    has ended and its message is purged, and after its owner has changed."""

    async def story(world: World) -> None:
        a = await busy_pod(world)
        first, second = world.client(), world.client()
        handle = await first.create("work", 7, id="one")
        with pytest.raises(InstanceExists):  # queued
            await second.create("work", 8, id="one")
        await world.until(lambda: world.history.entered("one"), "it runs", timeout_s=30)
        with pytest.raises(InstanceExists):
            await second.create("work", 8, id="one")
        assert await handle.result() == 7
        await world.until(lambda: not world.queued("work"), "the queue is empty", timeout_s=PURGED_S)
        with pytest.raises(InstanceExists):
            await second.create("work", 8, id="one")
        a.kill()
        del world.disks["a"]
        await world.start_pod("b", a.app)
        with pytest.raises(InstanceExists):
            await second.create("work", 8, id="one", timeout="30 seconds")
        await world.passes(3)

        assert world.history.times("one", "s1") == 1
        assert await handle.result() == 7
        check_once(world, "work", ["one"])

    play(story, account=account(max_concurrent=1))


@pytest.mark.parametrize("fault", [LOSE_ANSWER, DROP_BEFORE, DELAY])
def test_a_creation_of_unknown_outcome_is_ones_own(fault):
    """Closes: the ack is lost, the repeat is refused as a duplicate, and the caller hears "exists" of its own creation."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        client = world.client()
        world.broker.fail_next(subjects.create("main", "work", "one"), fault, delay_s=7.0)
        handle = await client.create("work", 7, id="one", timeout="30 seconds")
        assert await handle.result() == 7
        await world.passes(10)

        assert world.history.times("one", "s1") == 1
        check_once(world, "work", ["one"])

    play(story)


def test_duplicates_by_plain_nats_run_once():
    """Closes: C2: a plain publisher repeats itself: at once, after the end, after the purge, after a restart with and
    without the disk. For it the ack means "an instance of this id exists or will"."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        with pytest.raises(BusError, match="per subject"):
            await world.publish("work", "one")
        await world.until(lambda: world.records(r.Ended), "it has ended")
        for restart in ("none", "kill", "kill and lose the disk"):
            await world.until(lambda: not world.queued("work"), "the queue is empty", timeout_s=PURGED_S)
            if restart != "none":
                a.kill()
                if "disk" in restart:
                    del world.disks["a"]
                a = await world.start_pod("a", app)
                await world.all_owned()
            await world.publish("work", "one", nonce="another")
            await world.passes(3)

        assert world.history.times("one", "s1") == 1
        await world.until(lambda: not world.queued("work"), "the queue is empty", timeout_s=PURGED_S)
        await world.quiet()
        check_once(world, "work", ["one"])

    play(story)


def test_a_duplicate_that_waits_while_its_first_is_admitted_is_dropped():
    """Closes: the second message of an id comes while the record of the first is pending: known ids include every record
    not yet folded."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(sleeper_workflow(world, "work", nap="1 second")))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.records(r.Admitted), "it is admitted")
        world.broker.purge(QUEUE, ">", 10**9)  # as if its message had left at once
        await world.publish("work", "one")
        await world.until(lambda: world.records(r.Ended), "it has ended")
        await world.passes(3)

        assert world.history.times("one", "before") == 1
        assert a.pod.context.slots.in_use == 0
        check_once(world, "work", ["one"])

    play(story)


def test_an_id_is_known_while_its_records_wait_to_be_folded():
    """Closes: an instance has ended and left memory before its records are in the index: its id is known to nobody, and a
    second message of it runs again. The store is slow here."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        a.store._delay_s = 0.8
        await world.publish("work", "one")
        await world.until(lambda: world.records(r.Ended), "it has ended")
        assert a.store.find(world.station_of("one"), "work", "one") is None, "the story needs a store that lags"
        world.broker.purge(QUEUE, ">", 10**9)  # as if its message had left at once
        await world.publish("work", "one")
        await world.passes(5)

        assert world.history.times("one", "s1") == 1
        check_once(world, "work", ["one"])

    play(story)


def test_one_duplicate_in_a_batch_spoils_only_itself():
    """Closes: C4: one queued id refuses a whole atomic batch. Each item gets its own truth."""

    async def story(world: World) -> None:
        await busy_pod(world)
        await world.publish("work", "i3", nonce="somebody else's")
        results = await world.client().create_batch("work", [NewInstance(number, id=f"i{number}") for number in range(8)])
        await world.until(lambda: len(world.records(r.Ended)) == 9, "all have ended", timeout_s=100)

        assert [type(result.error).__name__ for result in results] == [
            "InstanceExists" if number == 3 else "NoneType" for number in range(8)]
        check_once(world, "work", [f"i{number}" for number in range(8)])

    play(story, account=account(max_concurrent=1))


# -- rule 16: a negative answer comes only from the owner --------------------------------------------------------------

def test_queued_is_a_status_of_its_own():
    """Closes: an acknowledged creation that has no slot yet is said not to exist."""

    async def story(world: World) -> None:
        await busy_pod(world)
        handle = await world.client().create("work", 7, id="one")
        status = await handle.status()

        assert (status.status, status.blocked_on) == ("queued", "slot")
        assert await handle.result() == 7

    play(story, account=account(max_concurrent=1))


def test_without_an_owner_nobody_says_not_found():
    """Closes: silence, or a half-restored owner, is taken for "there is no such instance". A live one and one that never
    was are asked for while the owner is away and while it comes back."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, step_s=30))
        a = await world.start_pod("a", app)
        await world.all_owned()
        client = world.client()
        handle = await client.create("work", 7, id="one")
        await world.until(lambda: world.history.entries, "it runs")
        a.kill()
        for name in ("one", "never"):
            with pytest.raises(OwnerAway):
                await client.handle("work", name).status(timeout="3 seconds")
        world.broker.fail_next("$JS.API.CONSUMER.CREATE.>", DELAY, times=50, delay_s=0.3)  # a slow restore
        starting = asyncio.ensure_future(world.start_pod("b", app))
        for _ in range(100):
            try:
                assert (await handle.status(timeout="200 milliseconds")).status in ("running", "waiting")
            except OwnerAway:
                await world.passes(0.1)
        await starting
        await world.all_owned()
        assert (await handle.status()).status == "running"
        with pytest.raises(InstanceNotFound):
            await client.handle("work", "never").status()

    play(story)


def test_an_instance_is_never_not_found_on_its_way_from_the_queue_to_the_index():
    """Closes: the owner looks into the index, then into the queue, and between the two the instance has moved. It is
    asked for without pause from its creation to its end."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, step_s=0.3)))
        await world.all_owned()
        client = world.client()
        seen = set()
        for number in range(15):
            handle = client.handle("work", f"i{number}")
            await world.publish("work", f"i{number}")
            while (status := await handle.status()).status != "complete":
                seen.add(status.status)
        assert seen <= {"queued", "running"}

    play(story, account=account(max_concurrent=2))


def test_a_caller_that_waits_survives_a_hand_over():
    """Closes: `result()` hears "not found", or nothing, when the station moves while it waits."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=2))
        a = await world.start_pod("a", app)
        await world.all_owned()
        client = world.client()
        handles = [await client.create("work", number, id=f"i{number}") for number in range(8)]
        waiting = [asyncio.ensure_future(handle.result()) for handle in handles]
        await world.start_pod("b", app)
        await world.passes(3)
        await a.stop()

        assert await asyncio.gather(*waiting) == list(range(8))
        await world.quiet()

    play(story)


# -- rules 11 and 17: what cannot be accepted --------------------------------------------------------------------------

async def test_bodies(world: World) -> None:
    """Not a test of its own: creations that cannot become instances, among good ones."""
    await world.publish("work", "-begins-with-a-dash")
    await world.publish("work", "good1")
    await world.publish("work", "a$b")
    await world.publish("work", "x" * 101)
    await world.publish("work", "good2", b"7" * 3)
    await world.publish("work", "large", b"1" * (PAYLOAD_MAX + 1))


test_bodies.__test__ = False  # type: ignore[attr-defined]  # pytest looks for it


def test_what_has_no_legal_form_is_parked_with_its_reason():
    """Closes: R1: a message that can never be admitted blocks the queue behind it, or vanishes. It is published to the
    dead stream with the reason and where it came from, then recorded; the others go on."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        await test_bodies(world)
        await world.until(lambda: len(world.records(r.Parked)) == 4, "they are parked")
        await world.until(lambda: len(world.records(r.Ended)) == 2, "the good ones have ended")
        await world.until(lambda: not world.queued("work"), "the queue is empty", timeout_s=PURGED_S)

        found = {message.header(subjects.ORIGIN_HEADER).rpartition(".")[2]: message for message in world.parked()}
        assert set(found) == {"-begins-with-a-dash", "a$b", "x" * 101, "large"}
        assert "no legal form" in found["a$b"].header(subjects.REASON_HEADER)
        assert "1048577 bytes" in found["large"].header(subjects.REASON_HEADER)
        assert found["a$b"].data == b"7"
        await world.quiet()
        check_once(world, "work", ["good1", "good2"])

    play(story)


def test_a_parked_message_keeps_what_a_retry_needs_and_nothing_that_the_server_obeys():
    """Closes: R1: a creation of an atomic batch, or with an expected sequence, is parked with those headers; the dead
    stream refuses it for ever, and the station's head is stuck."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        bus = world.bus()
        sender = {subjects.CONTENT_TYPE_HEADER: "application/msgpack", subjects.NONCE_HEADER: "n1"}
        creations = [(subjects.create("main", "work", instance), b"7", sender) for instance in ("a$b", "good")]
        await bus.publish_batch(creations)
        await world.until(lambda: world.records(r.Parked), "it is parked")
        await world.until(lambda: world.records(r.Ended), "the one behind it has ended")

        [parked] = world.parked()
        kept = {name: text for name, text in parked.headers.items() if name not in subjects.PARKING_HEADERS}
        assert kept == sender

    play(story)


def test_a_retry_waits_for_the_purge_of_what_was_parked(monkeypatch):
    """Closes: a parked message still lies in the queue when it is retried: the server refuses the second of its id, our
    nonce lies in the queue, the retry counts as accepted, and the purge takes the only copy."""
    refusals = iter(["for now"])
    monkeypatch.setattr("toque.workers.souschef.refusal", lambda *_: next(refusals, ""))

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        await world.publish("work", "one", nonce="n1")
        await world.until(world.parked, "it is parked")
        await world.until(lambda: world.records(r.Parked), "it is recorded")
        [lying] = world.queued("work")
        assert lying.header(subjects.NONCE_HEADER) == "n1"

        client = world.client()
        await client.dead.retry(1)

        assert not world.parked()
        await client.handle("work", "one").result("1 minute")
        check_once(world, "work", ["one"])

    play(story)


def test_a_parked_message_is_no_instance_though_it_still_lies_in_the_queue():
    """Closes: R1: until the purge its id is told as queued, and then as unknown."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        client = world.client()
        await world.publish("work", "large", b'"' + b"x" * PAYLOAD_MAX + b'"')
        await world.until(lambda: world.records(r.Parked), "it is parked")

        with pytest.raises(InstanceNotFound):
            await client.handle("work", "large").status()
        assert world.queued("work")
        [report] = await client.queues()
        assert report.parked == 1

    play(story)


def test_a_message_is_parked_before_it_is_recorded():
    """Closes: the pod records that it has set a message aside, dies, and nobody has it. While the dead stream takes
    nothing no record says "parked", and the message stays queued, over the death of the pod too."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        world.broker.freeze_stream(subjects.dead_stream("main"))
        await world.publish("work", "a$b")
        await world.publish("work", "good")
        await world.until(lambda: world.records(r.Ended), "the good one has ended")
        await world.passes(5)
        assert not world.records(r.Parked)
        assert [message for message in world.queued("work") if message.subject.endswith("a$b")]

        a.kill()
        world.broker.stop()
        world.broker.start()
        await world.passes(1)
        await world.start_pod("a", app)
        await world.until(lambda: world.records(r.Parked), "it is parked")
        assert len(world.parked()) == 1

    play(story)


def test_a_message_is_parked_once_though_it_is_read_again():
    """Closes: a station joins or leaves, the queue is read anew, and what is parked already is parked again."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, step_s=20))
        a = await world.start_pod("a", app)
        await world.all_owned()
        for station in world.stations():
            await world.publish("work", world.ids_at(station, 1)[0])
        await world.publish("work", "a$b")
        await world.until(lambda: world.records(r.Parked), "it is parked")
        for reader in a.pod._readers.values():
            reader._changed.set()  # as when a station joins: a fresh consumer
        await world.passes(0.5)

        assert len(world.records(r.Parked)) == 1
        assert len(world.parked()) == 1

    play(story)


def test_what_does_not_fit_the_type_becomes_an_errored_instance():
    """Closes: an acknowledged creation with a legal id and a bad body vanishes. Its owner tells the reason for ever."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        for instance, body in (("garbage", b"{"), ("text", b'"seven"'), ("empty", b"")):
            await world.publish("work", instance, body)
        await world.until(lambda: len(world.records(r.Ended)) == 3, "all have ended")

        client = world.client()
        for instance in ("garbage", "text", "empty"):
            status = await client.handle("work", instance).status()
            assert status.status == "errored"
            assert instance in status.error.message
        assert not world.history.entries
        await world.quiet()

    play(story)


def test_params_too_large_are_refused_where_they_are_made():
    """Closes: rule 17: the client takes what no record can hold."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world)))
        with pytest.raises(PayloadTooLarge):
            await world.client().create("work", "x" * PAYLOAD_MAX, id="one")
        assert not world.queued("work")
        with pytest.raises(BusError):  # by plain NATS: more than the stream's max_msg_size
            await world.publish("work", "two", b"1" * (PAYLOAD_MAX + 17 * 1024))

    play(story)


def test_creations_survive_everything_between_publish_and_admission():
    """C1 and C3 over a rough time: the broker restarts, pods come and go, and the client's log is compared at the end."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.2))
        a = await world.start_pod("a", app)
        await world.all_owned()
        client = world.client()
        acknowledged: list[str] = []

        async def create() -> None:
            for number in range(60):
                await client.create("work", number, id=f"i{number}", timeout="2 minutes")
                acknowledged.append(f"i{number}")
                await world.passes(0.15)

        creating = asyncio.ensure_future(create())
        await world.passes(1)
        b = await world.start_pod("b", app)
        await world.passes(1)
        a.kill()
        await world.passes(2)
        world.broker.stop()
        await world.passes(1)
        world.broker.start()
        await world.passes(2)
        await world.start_pod("a", app)
        await world.passes(2)
        await b.stop()
        await creating
        await world.until(lambda: len(world.records(r.Ended)) == 60, "all have ended", timeout_s=TTL_S * 6)

        assert len(acknowledged) == 60
        await world.quiet()
        await world.until(lambda: not world.queued("work"), "the queue is empty", timeout_s=PURGED_S)
        check_all(world, "work", acknowledged)
        check_chains(world)

    for seed in range(3):
        play(story, seed=seed, account=account(max_concurrent=8))
