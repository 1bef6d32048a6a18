"""Snapshots, trimming and restoring (protocol rule 5), and a broker restored from an older disk (rule 27)."""

from __future__ import annotations

import copy

import pytest
from msgspec.structs import replace

from toque import _subjects as subjects
from toque._subjects import StationId
from toque.sim.checks import check_all, check_chains, check_fold, replayed
from toque.sim.node import Disk
from toque.sim.world import World, account, play, sleeper_workflow, steps_workflow
from toque.storage import fold
from toque.storage import records as r
from toque.storage.memory_broker import DELAY, DROP_BEFORE, LOSE_ANSWER
from toque.storage.ports import Message
from toque.storage.snapshots import Name
from toque.workers.snapshot_taker import SnapshotRules

RULES = SnapshotRules(journal_bytes_min=3_000, held_back_bytes_min=20_000, chunk_bytes_max=700)
ONE = account(stations=1)
FIRST = StationId(1, 0)
JOURNAL = subjects.journal_stream("main")
SNAPSHOTS = subjects.snapshot_stream("main")


def objects(world: World, station: StationId = FIRST) -> list[str]:
    """Names of the snapshots that are stored, oldest first."""
    found = {Name.parse(subjects.parse_snapshot(message.subject)) for message in world.broker.stored(
        SNAPSHOTS, subjects.snapshots_of("main", station))}
    return [str(name) for name in sorted(found)]


def counting(world: World, station: StationId = FIRST) -> list[r.Snapshot]:
    return world.records(r.Snapshot, station)


def chunks(world: World, name: str, station: StationId = FIRST) -> list[Message]:
    return world.broker.stored(SNAPSHOTS, subjects.snapshot("main", station, name))


def lose_chunk(world: World, name: str, station: StationId = FIRST) -> None:
    """One chunk of an object is gone from the broker's disk."""
    world.broker.purge(SNAPSHOTS, chunks(world, name, station)[-1].subject, 10**9)


def flip_bit(world: World, name: str, station: StationId = FIRST) -> None:
    """One bit of an object is another one on the broker's disk."""
    stream, message = world.broker._streams[SNAPSHOTS], chunks(world, name, station)[-1]
    data = message.data[:-1] + bytes([message.data[-1] ^ 1])
    stream._messages[message.sequence] = Message(message.subject, data, message.headers, sequence=message.sequence,
                                                 time_ms=message.time_ms)


async def work(world: World, prefix: str, count: int = 15) -> list[str]:
    """Run that many instances of `work` to their end, one after the other, so that there are many groups."""
    ids = [f"{prefix}{number}" for number in range(count)]
    for instance in ids:
        await world.publish("work", instance)
        await world.passes(0.1)
    await world.until(lambda: set(ids) <= ended(world), f"all of {prefix} have ended")
    return ids


def ended(world: World) -> set[str]:
    names = {(station, record.serial): record.id for station in world.stations()
             for record in world.records(r.Admitted, station)}
    return {names[station, record.serial] for station in world.stations() for record in world.records(r.Ended, station)}


# -- taking and trimming -----------------------------------------------------------------------------------------------

def test_the_journal_is_trimmed_behind_the_second_newest_counting_snapshot():
    """Closes: the journal grows for ever; or it is trimmed behind the newest snapshot, which nobody has read back, and
    with that one damaged everything is lost. Here the front never passes the second newest's position, a station's last
    message stays, three objects are kept, and a pod without a disk has all that there was."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.01))
        a = await world.start_pod("a", app, snapshot_rules=RULES)
        await world.all_owned()
        ids: list[str] = []
        for batch in "abcdef":
            ids += await work(world, batch)
            await world.passes(3)
            front, taken = world.broker._streams[JOURNAL].first_sequence, counting(world)
            assert front <= max([1, *(record.position.sequence for record in taken[:-1])]) + 1
        assert len(counting(world)) > 3
        assert objects(world) == [record.name for record in counting(world)[-3:]]
        assert world.kept_messages(FIRST)[0].sequence > 1
        a.kill()
        b = await world.start_pod("b", app, snapshot_rules=RULES)
        await world.all_owned()
        await world.quiet()

        assert b.pod.ownership.stations[FIRST].restored.source == "snapshot"
        assert [(await world.client().handle("work", instance).status()).status for instance in ids] == \
            ["complete"] * len(ids)
        check_all(world, "work", ids)

    play(story, account=ONE)


def test_nothing_is_taken_while_nothing_is_due():
    """Closes: snapshots are taken by the clock, and an idle system is never idle."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world)), snapshot_rules=RULES)
        await world.all_owned()
        await world.passes(600)

        assert counting(world) == [] and objects(world) == []

    play(story, account=ONE)


def test_an_idle_station_does_not_hold_the_journal_for_ever():
    """Closes: one of two stations does nothing, and its few messages at the front keep all of the other's from being
    trimmed. It takes two small snapshots, and its tail moves forward."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.01))
        await world.start_pod("a", app, snapshot_rules=RULES)
        await world.all_owned()
        busy, idle = world.stations()
        for round_ in range(12):
            for instance in world.ids_at(busy, 15, f"r{round_}x"):
                await world.publish("work", instance)
                await world.passes(0.05)
            await world.passes(3)

        assert len(counting(world, idle)) >= 2
        assert world.kept_messages(idle)[0].sequence > 20
        assert world.broker._streams[JOURNAL].first_sequence > 20
        check_chains(world)

    play(story, account=account(stations=2))


def test_a_station_without_an_owner_holds_the_journal():
    """Closes: the front is purged for the stations that are there, and the groups of one that nobody serves are gone."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.01))
        await world.start_pod("a", app, snapshot_rules=RULES)
        await world.all_owned()
        orphan = StationId(1, 1)
        foreign = r.GroupHeader(9, "nobody", 1, r.crc_of(r.join_records([])))
        tail = world.journal(orphan)[-1]
        await world.bus().publish(subjects.journal("main", orphan), r.join_records([]), {
            subjects.GROUP_HEADER: r.GroupHeader(9, "nobody", tail.header.group + 5, foreign.crc).text()})
        for round_ in range(6):
            for instance in world.ids_at(FIRST, 15, f"r{round_}x"):
                await world.publish("work", instance)
                await world.passes(0.05)
            await world.passes(3)
        assert len(counting(world)) >= 3
        assert world.broker._streams[JOURNAL].first_sequence == 1

    play(story, account=account(stations=2))


# -- killed, deposed, unanswered ---------------------------------------------------------------------------------------

CHUNK = "toque.main.snapshot.>"
PURGE_JOURNAL = f"$JS.API.STREAM.PURGE.{JOURNAL}"
PURGE_OBJECTS = f"$JS.API.STREAM.PURGE.{SNAPSHOTS}"


@pytest.mark.parametrize("how", [DROP_BEFORE, LOSE_ANSWER])
@pytest.mark.parametrize("place", ["first chunk", "a chunk", "the record", "after the record", "trim", "delete"])
def test_a_pod_killed_at_any_write_leaves_two_ways_back(place, how):
    """Closes: killed in the middle of a snapshot its half counts; killed between record and trimming nothing is ever
    trimmed; killed in the middle of trimming or deleting nothing leads back. Each is done twice, each time the next
    owner has no disk, and what was left behind is cleaned up."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.01))
        ids: list[str] = []
        for name in ("a", "b"):
            node = await world.start_pod(name, app, snapshot_rules=RULES)
            await world.all_owned()
            ids += await work(world, f"{name}0")
            before = len(counting(world))
            waits = arm(world, place, how, before)
            for round_ in range(1, 6):
                if waits():
                    break
                ids += await work(world, f"{name}{round_}")
                await world.passes(2)
            assert waits(), "the fault has struck"
            node.kill()
            world.broker._faults.clear()
        last = await world.start_pod("c", app, snapshot_rules=RULES)
        await world.all_owned()
        ids += await work(world, "end", 40)
        await world.passes(5)
        await world.quiet()

        assert objects(world) == [record.name for record in counting(world)[-3:]]
        check_all(world, "work", ids)
        check_fold(world, last)

    play(story, account=ONE)


def arm(world, place, how, before):
    """Order the fault; returns what tells that it has struck."""
    if place in ("the record", "after the record"):
        taken = len(objects(world))
        if place == "the record":
            return lambda: len(objects(world)) > taken or len(counting(world)) > before
        return lambda: len(counting(world)) > before
    pattern = {"first chunk": "toque.main.snapshot.*.*.*.0", "a chunk": "toque.main.snapshot.*.*.*.2",
               "trim": PURGE_JOURNAL, "delete": PURGE_OBJECTS}[place]
    world.broker.fail_next(pattern, how, times=1)
    return lambda: not world.broker._faults


@pytest.mark.parametrize("how", [DROP_BEFORE, LOSE_ANSWER])
def test_a_chunk_without_an_answer_is_stored_once(how):
    """Closes: the answer to a chunk is lost, the same chunk is refused as there already, and no snapshot is ever taken; or
    the chunk is lost, and a snapshot with a hole counts."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.01))
        await world.start_pod("a", app, snapshot_rules=RULES)
        await world.all_owned()
        world.broker.fail_next(CHUNK, how, times=3)
        ids = await work(world, "a", 30)
        await world.until(lambda: counting(world), "a snapshot counts, at the first try", timeout_s=25)

        record = counting(world)[0]
        assert not world.broker._faults
        assert len(chunks(world, record.name)) == record.chunks > 2
        assert sum(len(chunk.data) for chunk in chunks(world, record.name)) == record.size_bytes
        check_all(world, "work", ids)

    play(story, account=ONE)


def test_a_deposed_owner_neither_counts_nor_deletes():
    """Closes: a pod is stopped in the middle of a snapshot and comes back after another one took its station: its object
    counts, or it deletes those that the new owner's way back depends on. The new owner cleans up after it."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.01))
        a = await world.start_pod("a", app, snapshot_rules=RULES)
        await world.all_owned()
        world.broker.fail_next("toque.main.snapshot.*.*.*.1", DROP_BEFORE)
        ids = await work(world, "a", 20)
        await world.until(lambda: objects(world), "it is in the middle of a snapshot")
        assert not counting(world)
        a.pause()
        b = await world.start_pod("b", app, snapshot_rules=RULES)
        await world.until(lambda: world.held(FIRST) and world.owner(FIRST) is b and world.is_owned(FIRST), "b took over")
        for batch in "bcde":
            ids += await work(world, batch)
            await world.passes(2)
        mine = [record.name for record in counting(world)[-3:]]
        assert len(mine) == 3
        a.resume()
        await world.passes(20)

        assert all(record.position.header.epoch > 1 for record in counting(world))
        assert set(mine) <= set(objects(world))
        a.kill()
        ids += await work(world, "f")
        await world.passes(3)
        assert objects(world) == [record.name for record in counting(world)[-3:]]
        b.kill()
        c = await world.start_pod("c", app, snapshot_rules=RULES)
        await world.all_owned()
        await world.quiet()
        assert c.pod.ownership.stations[FIRST].restored.source == "snapshot"
        check_all(world, "work", ids)

    play(story, account=ONE)


# -- restoring ---------------------------------------------------------------------------------------------------------

async def trimmed_world(world: World):
    """An app, and ids that have ended, with a journal whose first groups are gone; nobody runs."""
    app = world.app(steps_workflow(world, steps=2, step_s=0.01))
    a = await world.start_pod("a", app, snapshot_rules=RULES)
    await world.all_owned()
    ids: list[str] = []
    for batch in "abcd":
        ids += await work(world, batch)
        await world.passes(3)
    assert world.kept_messages(FIRST)[0].sequence > 1
    a.kill()
    return app, ids


@pytest.mark.parametrize("harm", [lose_chunk, flip_bit])
def test_a_damaged_snapshot_is_passed_over_for_the_next_older_one(harm, caplog):
    """Closes: a bit of the newest snapshot's object has flipped, or a chunk is gone, and it is served; or nothing is."""

    async def story(world: World) -> None:
        app, ids = await trimmed_world(world)
        newest, second = counting(world)[-1].name, counting(world)[-2].name
        harm(world, newest)
        b = await world.start_pod("b", app, snapshot_rules=RULES)
        await world.all_owned()
        await world.quiet()

        assert b.pod.ownership.stations[FIRST].restored.snapshot == second
        assert any("snapshot passed over" in entry.getMessage() and newest in entry.getMessage()
                   for entry in caplog.records)
        check_all(world, "work", ids)

    play(story, account=ONE)


def test_an_object_without_a_record_does_not_count():
    """Closes: a killed pod's whole object, whose record never came to be, is taken for the newest snapshot. It may be of a
    chain that went on otherwise."""

    async def story(world: World) -> None:
        app, ids = await trimmed_world(world)
        newest = counting(world)[-1]
        orphan = Name(newest.position.header.epoch, newest.position.sequence + 1)
        for number, chunk in enumerate(chunks(world, newest.name)):
            await world.bus().publish(subjects.snapshot_chunk("main", FIRST, str(orphan), number), chunk.data)
        later = Name(9, 10**6)
        await world.bus().publish(subjects.snapshot_chunk("main", FIRST, str(later), 0), b"of an owner to come")
        b = await world.start_pod("b", app, snapshot_rules=RULES)
        await world.all_owned()
        await world.quiet()

        assert b.pod.ownership.stations[FIRST].restored.snapshot == newest.name
        await world.until(lambda: str(orphan) not in objects(world), "the orphan is deleted")
        assert str(later) in objects(world), "an owner touches nothing of those after it"
        check_all(world, "work", ids)

    play(story, account=ONE)


def test_without_any_snapshot_that_leads_back_the_station_halts():
    """Closes: the journal's first groups are trimmed and no snapshot holds: what is left is folded as if it were all."""

    async def story(world: World) -> None:
        app, _ = await trimmed_world(world)
        for record in counting(world)[-3:]:
            lose_chunk(world, record.name)
        await world.start_pod("b", app, snapshot_rules=RULES)
        await world.until(lambda: world.records(r.Claim, FIRST)[-1].pod == "b", "b has claimed")
        await world.passes(30)

        assert not world.is_owned(FIRST)
        assert "no counting snapshot leads there" in (await world.client().pods())[0].journal

    play(story, account=ONE)


def test_a_disk_whose_place_was_trimmed_away_is_rebuilt_from_the_snapshot():
    """Closes: a pod comes back after the journal moved past its disk's position, reads on from the first group that is
    left, and everything between is missing. A gap in the group numbers: again from the newest counting snapshot."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.01))
        a = await world.start_pod("a", app, snapshot_rules=RULES)
        await world.all_owned()
        ids = await work(world, "a", 5)
        a.kill()
        b = await world.start_pod("b", app, snapshot_rules=RULES)
        await world.all_owned()
        for batch in "bcde":
            ids += await work(world, batch)
            await world.passes(3)
        assert a.store.position(FIRST).sequence < world.kept_messages(FIRST)[0].sequence
        b.kill()
        again = await world.start_pod("a", app, snapshot_rules=RULES)
        await world.all_owned()
        await world.quiet()

        assert again.pod.ownership.stations[FIRST].restored.source == "snapshot"
        check_all(world, "work", ids)

    play(story, account=ONE)


def test_a_disk_before_a_hole_in_the_journal_is_rebuilt_from_a_snapshot_behind_it():
    """Closes: the broker lost a message in the middle; the pod's own position is held, so it reads on over the hole, or
    halts for ever, though a counting snapshot stands behind it."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.01))
        a = await world.start_pod("a", app, snapshot_rules=RULES)
        await world.all_owned()
        ids = await work(world, "a", 2)
        await world.quiet()
        a.kill()
        b = await world.start_pod("b", app, snapshot_rules=RULES)
        await world.all_owned()
        while not counting(world):
            ids += await work(world, f"b{len(ids)}x", 1)
        await world.quiet()
        b.kill()
        stood = a.store.position(FIRST).sequence
        hole = next(message.sequence for message in world.kept_messages(FIRST) if message.sequence > stood)
        assert hole <= counting(world)[0].position.sequence
        world.broker._streams[JOURNAL]._remove(hole)
        again = await world.start_pod("a", app, snapshot_rules=RULES)
        await world.until(lambda: world.is_owned(FIRST), "it is served")

        assert again.pod.ownership.stations[FIRST].restored.source == "snapshot"
        assert [(await world.client().handle("work", instance).status()).status for instance in ids] == \
            ["complete"] * len(ids)

    play(story, account=ONE)


def test_a_pod_killed_while_it_loads_a_snapshot_begins_again():
    """Closes: half of a snapshot lies on the disk under its position, and the next start reads on from there."""

    async def story(world: World) -> None:
        app, ids = await trimmed_world(world)
        world.broker.fail_next(f"$JS.API.STREAM.MSG.GET.{SNAPSHOTS}", DELAY, times=10**6, delay_s=0.1)
        b = await world.start_pod("b", app, snapshot_rules=RULES)
        rows = b.disk.tables
        await world.until(lambda: len(rows.tables[fold.ROWS]) > 3, "part of it is loaded")
        b.kill()
        assert rows.get(fold.POSITION, fold.station_key(FIRST)) is None
        world.broker._faults.clear()
        again = await world.start_pod("b", app, snapshot_rules=RULES)
        await world.all_owned()
        await world.quiet()

        assert again.pod.ownership.stations[FIRST].restored.source == "snapshot"
        check_all(world, "work", ids)

    play(story, account=ONE)


@pytest.mark.parametrize(("foreign", "source"), [(False, "local"), (True, "snapshot")])
def test_a_disk_that_stands_at_a_counting_snapshot_is_used_though_its_place_was_trimmed(foreign, source):
    """Closes: a pod is killed between loading a snapshot and reading the journal behind it; the journal is trimmed up to
    that very place, and all that it loaded is thrown away. Or it is of another history, and only epoch and sequence, which
    make the snapshot's name, are the same."""

    async def story(world: World) -> None:
        app, ids = await trimmed_world(world)
        second = counting(world)[-2]
        assert world.kept_messages(FIRST)[0].sequence == second.position.sequence + 1
        store = world.disks["b"] = Disk()
        prefix = fold.station_key(FIRST)
        state = replayed(world, FIRST, until=second.position.sequence)
        store.tables.write(tuple(dict(table) for table in state.tables))
        assert fold.decode_position(store.tables.get(fold.POSITION, prefix)) == second.position
        if foreign:
            other = replace(second.position.header, crc=second.position.header.crc ^ 1)
            store.tables.write(fold.load_writes(FIRST, (), r.Position(second.position.sequence, other)))
        b = await world.start_pod("b", app, snapshot_rules=RULES)
        await world.all_owned()
        await world.quiet()

        assert b.pod.ownership.stations[FIRST].restored.source == source
        check_all(world, "work", ids)

    play(story, account=ONE)


def test_a_damaged_second_newest_snapshot_stops_the_trimming_until_others_count():
    """Closes: the journal is trimmed behind a snapshot that cannot be read: it is read back first, whole."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.01))
        await world.start_pod("a", app, snapshot_rules=RULES)
        await world.all_owned()
        ids = await work(world, "a")
        await world.until(lambda: counting(world), "one counts")
        bad = counting(world)[0]
        flip_bit(world, bad.name)
        while len(counting(world)) < 2:
            ids += await work(world, f"b{len(ids)}x", 1)
        world.broker.fail_next(CHUNK, "refuse:10023", times=10**6)
        await world.passes(20)
        assert world.kept_messages(FIRST)[0].sequence == 1
        world.broker._faults.clear()
        await world.until(lambda: len(counting(world)) == 3, "another one was taken for it")
        ids += await work(world, "c", 40)
        await world.until(lambda: world.kept_messages(FIRST)[0].sequence > 1, "the journal is trimmed behind a good one")
        check_all(world, "work", ids)

    play(story, account=ONE)


@pytest.mark.parametrize("seed", range(4))
def test_a_snapshot_holds_instances_of_every_kind(seed):
    """Closes: timers, waiting and running instances are lost with a restored disk, or wake twice. Folded state is that of
    the whole journal, and every instance ends once."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=0.4), sleeper_workflow(world, nap="20 seconds"))
        a = await world.start_pod("a", app, snapshot_rules=RULES)
        await world.all_owned()
        ids = [f"i{number}" for number in range(40)]
        for number, instance in enumerate(ids):
            await world.publish("work" if number % 2 else "nap", instance)
            await world.passes(0.1)
        await world.until(lambda: any(counting(world, station) for station in world.stations()), "one counts")
        await world.passes(world.rng.uniform(0, 3))
        a.kill()
        b = await world.start_pod("b", app, snapshot_rules=RULES)
        await world.until(lambda: len(world.records(r.Ended)) == 40, "all have ended", timeout_s=90)
        await world.quiet()
        check_all(world, "work", [ids[number] for number in range(1, 40, 2)])
        check_fold(world, b)

    play(story, seed=seed)


# -- rule 27 -----------------------------------------------------------------------------------------------------------

async def rolled_back(world: World, *, lost: str = "one", more: int = 0):
    """A world whose broker lost its last groups, those of `more` instances too: pod `a` is dead, and its disk knows them."""
    app = world.app(steps_workflow(world, steps=2, step_s=0.1))
    a = await world.start_pod("a", app, snapshot_rules=RULES)
    await world.all_owned()
    saved = copy.deepcopy(world.broker._streams[JOURNAL])
    newer = world.broker._streams[JOURNAL]
    await world.publish("work", lost)
    await world.until(lambda: lost in ended(world), "it has ended")
    await work(world, "more", more)
    await world.quiet()
    a.kill()
    world.broker._streams[JOURNAL] = saved
    world.reread_journal()
    return app, newer


def test_a_journal_that_ends_before_what_a_pod_knows_is_not_built_upon():
    """Closes: the broker is restored from an older disk, the pod takes its own for the wrong one, rebuilds it from the
    journal, and a completed instance runs again. The station halts and says what is missing; the others go on; with the
    newer disk back it goes on by itself."""

    async def story(world: World) -> None:
        app, _ = await rolled_back(world)
        lost = world.station_of("one")
        assert lost != FIRST
        await world.start_pod("a", app, snapshot_rules=RULES)
        others = [station for station in world.stations() if station not in (lost, FIRST)]  # FIRST lost leases
        await world.until(lambda: all(world.is_owned(station) for station in others), "the others are served")
        await world.passes(30)

        assert not world.is_owned(lost)
        assert len(world.records(r.Claim, lost)) == 1, "nothing was written over the loss"
        trouble = (await world.client().pods())[0].journal
        assert "the journal ends at group" in trouble and "are missing" in trouble
        assert world.history.times("one", "s1") == 1

    play(story)


def test_a_rolled_back_station_goes_on_when_the_journal_is_whole_again():
    """Closes: the operator gives the newer disk back, and the station stays halted until somebody restarts the pods."""

    async def story(world: World) -> None:
        app, newer = await rolled_back(world)
        node = await world.start_pod("a", app, snapshot_rules=RULES)
        await world.passes(15)
        assert not world.is_owned(FIRST)
        world.broker._streams[JOURNAL] = newer
        world.reread_journal()
        await world.all_owned()

        await world.until(lambda: node.pod._trouble() == "", "nothing is wrong any more", timeout_s=1)
        assert (await world.client().handle("work", "one").status()).status == "complete"
        assert world.history.times("one", "s1") == 1

    play(story, account=ONE)


def test_a_pod_that_knows_of_a_loss_does_not_take_over_what_others_built_on_it():
    """Closes: another pod, without a disk, claims the station before anybody can object, and goes on beyond the group
    numbers that were lost: then the journal looks longer than the pod's own state, and its witness is dropped in silence."""

    async def story(world: World) -> None:
        app, _ = await rolled_back(world)
        a = await world.start_pod("a", app, snapshot_rules=RULES)
        await world.passes(5)
        b = await world.start_pod("b", app, snapshot_rules=RULES)
        await world.passes(5)
        assert not world.is_owned(FIRST) or world.owner(FIRST) is b
        tail = world.kept_messages(FIRST)[-1]
        header = r.GroupHeader(7, "other", 40, r.crc_of(r.join_records([])))
        stream = world.broker._streams[JOURNAL]
        for _ in range(30):
            stream.publish(Message(tail.subject, r.join_records([]), {subjects.GROUP_HEADER: header.text()}),
                           world.broker.now_ms())
        await world.passes(30)

        assert FIRST not in a.pod.ownership.stations
        assert "are missing" in a.pod._trouble()

    play(story, account=ONE)


@pytest.mark.parametrize("unanswered", [0, 1])
def test_a_pod_tells_of_a_loss_at_a_station_that_others_have(unanswered):
    """Closes: pod b, without a disk, claims the station right after the broker went back, a comes later, owns nothing
    there, and never looks: the only one who knows of the loss says nothing. So it does when its look is not answered, once:
    it looks again."""

    async def story(world: World) -> None:
        app, _ = await rolled_back(world, more=10)
        await world.start_pod("b", app, snapshot_rules=RULES)
        await world.all_owned()
        known = world.disks["a"].tables.get(fold.POSITION, fold.station_key(FIRST))
        assert known is not None
        assert world.journal(FIRST)[-1].header.group < fold.decode_position(known).header.group
        if unanswered:
            world.broker.fail_next(f"$JS.API.STREAM.MSG.GET.{JOURNAL}", DROP_BEFORE, times=1)
        a = await world.start_pod("a", app, snapshot_rules=RULES)
        await world.until(lambda: "are missing" in a.pod._trouble(), "it tells of the loss", timeout_s=15)

        assert world.owner(FIRST) is not a
        assert not world.broker._faults

    play(story, account=ONE)


def test_an_empty_journal_is_a_loss_too():
    """Closes: the broker's disk is gone altogether, the pods make their streams anew, and all that was done is forgotten."""

    async def story(world: World) -> None:
        app, _ = await rolled_back(world)
        world.broker._streams[JOURNAL].purge(">", 10**9)
        world.broker._streams[JOURNAL].last_sequence = 0
        await world.start_pod("a", app, snapshot_rules=RULES)
        await world.passes(30)

        assert not world.is_owned(FIRST)
        assert "groups 1 to" in (await world.client().pods())[0].journal

    play(story, account=ONE)
