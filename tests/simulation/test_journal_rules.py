"""Groups in the journal and what is folded of them (protocol rules 2, 3, 4, 17 and 26)."""

from __future__ import annotations

import random
from itertools import pairwise

import msgspec
import pytest

from toque import _subjects as subjects
from toque._subjects import StationId
from toque.client import NewInstance
from toque.sim.checks import check_all, check_chains, check_fold, check_steps, replayed
from toque.sim.world import World, account, play, sleeper_workflow, steps_workflow
from toque.storage import fold
from toque.storage import records as r
from toque.storage.memory_broker import DELAY, DROP_BEFORE, LOSE_ANSWER
from toque.storage.ports import Message

FIRST = StationId(1, 0)
JOURNAL = "toque.main.journal.>"
STREAM = subjects.journal_stream("main")


# -- rule 2: one group in flight, the same bytes again -----------------------------------------------------------------

@pytest.mark.parametrize("fault", [LOSE_ANSWER, DROP_BEFORE, DELAY, "refuse:10164"])
def test_an_append_without_an_answer_is_accepted_once(fault):
    """Closes: the answer to an append is lost, or the append itself; sent again under another expectation it would stand
    twice, not sent again it would be lost. Every record stands in the journal once, every callback is entered once."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=3, step_s=0.2)))
        await world.all_owned()
        world.broker.fail_next(JOURNAL, fault, times=6, delay_s=3.0)
        ids = [f"i{number}" for number in range(8)]
        for instance in ids:
            await world.publish("work", instance)
        await world.until(lambda: len(world.records(r.Ended)) == 8, "all have ended")

        assert [world.history.times(instance, f"s{step}") for instance in ids for step in (1, 2, 3)] == [1] * 24
        await world.quiet()
        check_all(world, "work", ids)

    play(story)


def test_one_group_of_a_station_is_in_flight():
    """Closes: a second group overtakes the first, and the first is refused. Appends are slow here, and much is committed."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=2, step_s=0.01)))
        await world.all_owned()
        world.broker.fail_next(JOURNAL, DELAY, times=10**6, delay_s=0.1)
        for number in range(60):
            await world.publish("work", f"i{number}")
        await world.until(lambda: len(world.records(r.Ended)) == 60, "all have ended")

        for station in world.stations():
            times = [message.time_ms for message in world.journal_messages(station) if message.time_ms > 0]
            gaps = [after - before for before, after in pairwise(times[1:])]
            assert min(gaps) >= 100
        check_chains(world)

    play(story)


def test_a_foreign_group_halts_the_station_loudly():
    """Closes: somebody else's message under the owner's epoch is built upon. The owner stops, says so, and the instance
    goes no step further."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world, steps=3, step_s=1)))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s1"), "it is inside s1")
        station = world.station_of("one")
        tail = world.journal(station)[-1].header
        body = r.join_records([])
        foreign = r.GroupHeader(tail.epoch, tail.session, tail.group + 7, r.crc_of(body))
        await world.bus().publish(subjects.journal("main", station), body, {subjects.GROUP_HEADER: foreign.text()})
        await world.passes(5)

        assert [entry.step for entry in world.history.entered("one")] == ["s1"]
        assert not world.records(r.StepDone)
        report = (await world.client().pods())[0]
        assert report.journal != "ok"
        assert not world.is_owned(station)
        a.kill()

    play(story)


def test_a_crash_between_append_and_answer_leaves_it_to_the_journal():
    """Closes: the next owner decides by what its own disk knows. The group was accepted, its owner never heard of it and
    folded nothing: the step it holds is not entered again."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s1"), "it is inside s1")
        world.broker.fail_next(subjects.journal("main", world.station_of("one")), LOSE_ANSWER, times=5)
        await world.until(lambda: world.records(r.StepDone), "the checkpoint is in the journal")
        a.kill()
        assert a.store.history(world.station_of("one"), 1)[-1].seq == 1, "the crash came before the fold"
        await world.start_pod("a", app)
        await world.until(lambda: world.records(r.Ended), "it has ended")

        assert [world.history.times("one", step) for step in ("s1", "s2")] == [1, 1]
        check_all(world, "work", ["one"])

    play(story)


# -- rule 3: what is folded was accepted -------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_a_killed_pods_disk_holds_a_prefix_of_the_journal(seed):
    """Closes: a group that the journal never took is on the disk, and is served after the restart."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=5, step_s=0.05), sleeper_workflow(world, nap="3 seconds"))
        a = await world.start_pod("a", app)
        await world.all_owned()
        rng = random.Random(seed)
        for number in range(30):
            await world.publish("work" if number % 3 else "nap", f"i{number}")
        world.broker.fail_next(JOURNAL, rng.choice([DROP_BEFORE, LOSE_ANSWER]), times=3)
        await world.passes(rng.uniform(0.05, 3))
        a.kill()

        check_fold(world, a)
        for station in world.stations():
            position = a.store.position(station)
            assert position is None or (position.sequence, position.header) in [
                (group.sequence, group.header) for group in world.journal(station)]
        again = await world.start_pod("a", app)
        await world.until(lambda: len(world.records(r.Ended)) == 30, "all have ended")
        await world.quiet()
        check_all(world, "work", [f"i{number}" for number in range(30) if number % 3])
        check_fold(world, again)

    play(story, seed=seed)


def spoil_position(tables, station):
    """The disk is of another history: its position names a group that the journal does not hold."""
    key = fold.station_key(station)
    position = fold.decode_position(tables.tables[fold.POSITION][key])
    header = msgspec.structs.replace(position.header, crc=position.header.crc ^ 1)
    tables.write(tuple({key: msgspec.msgpack.encode(r.Position(position.sequence, header))} if table == fold.POSITION
                       else {} for table in range(len(fold.TABLES))))


def spoil_row(tables, station):
    """… and one of its instances has another status there."""
    key, data = next((key, data) for key, data in sorted(tables.tables[fold.ROWS].items())
                     if key.startswith(fold.station_key(station)))
    row = fold.decode_row(data)
    row.status = r.Status.TERMINATED
    tables.write(tuple({key: msgspec.msgpack.encode(row)} if table == fold.ROWS else {}
                       for table in range(len(fold.TABLES))))


def test_a_disk_of_another_history_is_rebuilt_from_the_journal():
    """Closes: a disk that was restored from elsewhere, or written by a fork of the past, is trusted for its sequence. A
    position whose epoch, group and CRC the journal does not hold there makes all of the station's state worth nothing."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        client = world.client()
        await client.create("work", 7, id="one")
        await client.handle("work", "one").result()
        await world.quiet()
        a.kill()
        station = world.station_of("one")
        spoil_position(a.disk.tables, station)
        spoil_row(a.disk.tables, station)
        again = await world.start_pod("a", app)
        await world.all_owned()

        assert (await client.handle("work", "one").status()).status == "complete"
        check_fold(world, again)
        [(place, rows)] = again.disk.tables.aside
        assert place == station, "what others may have lost is kept for people"
        assert any(row.table == fold.ROWS for row in rows)
        assert again.disk.tables.tables[fold.ROWS] == {
            key: value for place in world.stations()
            for key, value in replayed(world, place).tables[fold.ROWS].items()}

    play(story)


def test_a_disk_that_is_gone_is_rebuilt_from_the_journal():
    """Closes: D4: with the disk its checkpoints are lost."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=4, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s3"), "it is inside s3")
        a.kill()
        del world.disks["a"]
        await world.start_pod("b", app)
        await world.until(lambda: world.records(r.Ended), "it has ended")

        assert [world.history.times("one", f"s{step}") for step in range(1, 5)] == [1, 1, 2, 1]
        check_all(world, "work", ["one"])

    play(story)


def test_a_stale_disk_catches_up():
    """Closes: a pod that gets a station back goes on from its own old state. It reads what others wrote meanwhile."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=4, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s2"), "it is inside s2")
        a.kill()
        b = await world.start_pod("b", app)
        await world.until(lambda: world.history.entered("one", "s3"), "b is inside s3")
        b.kill()
        again = await world.start_pod("a", app)
        await world.until(lambda: world.records(r.Ended), "it has ended", timeout_s=30)

        assert [world.history.times("one", f"s{step}") for step in range(1, 5)] == [1, 2, 2, 1]
        await world.quiet()
        check_all(world, "work", ["one"])
        check_fold(world, again)

    play(story)


def test_a_damaged_journal_is_not_served():
    """Closes: D5: a message whose CRC fails is folded, or skipped. The station halts; the others go on."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        bad, good = world.ids_at(FIRST, 1)[0], world.ids_at(StationId(1, 1), 1)[0]
        for instance in (bad, good):
            await world.publish("work", instance)
        await world.until(lambda: len(world.records(r.Ended)) == 2, "both have ended")
        a.kill()
        damage(world, FIRST)
        await world.start_pod("b", app)
        await world.until(lambda: world.is_owned(StationId(1, 1)), "the other station is served", timeout_s=30)
        await world.passes(3)

        assert not world.is_owned(FIRST)
        assert (await world.client().handle("work", good).status()).status == "complete"

    play(story)


def damage(world: World, station: StationId) -> None:
    """Flip a bit of the station's second journal message on the broker's disk."""
    stream = world.broker._streams[STREAM]
    message = world.journal_messages(station)[1]
    data = bytes([message.data[0], message.data[1] ^ 1]) + message.data[2:]
    stream._messages[message.sequence] = Message(message.subject, data, message.headers, sequence=message.sequence,
                                                 time_ms=message.time_ms)
    world._decoded.clear()


# -- rule 17: a record always fits -------------------------------------------------------------------------------------

def test_large_results_never_make_a_group_too_large():
    """Closes: results of almost 1 MiB collect into a group that the server refuses, and the station is stuck."""

    async def story(world: World) -> None:
        async def big() -> bytes:
            return b"x" * (1024 * 1024 - 100)

        app = world.app(steps_workflow(world), big_workflow(big))
        await world.start_pod("a", app)
        await world.all_owned()
        for number in range(12):
            await world.publish("big", f"i{number}")
        await world.until(lambda: len(world.records(r.Ended)) == 12, "all have ended")

        sizes = [len(message.data) for message in world.broker.stored(STREAM)]
        assert max(sizes) <= 1024 * 1024 + 16 * 1024
        for station in world.stations():
            for group, message in zip(world.journal(station), world.journal_messages(station), strict=True):
                assert len(message.data) <= r.GROUP_BYTES_MAX + 8 or len(group.records) == 1

    play(story, account=account(stations=1))


def big_workflow(callback):
    from toque.workflow import Step, Workflow, WorkflowEvent

    class Big(Workflow[int, int], name="big"):
        async def run(self, event: WorkflowEvent[int], step: Step) -> int:
            return len(await step.do("big", callback))

    return Big


# -- rule 26: write-dead -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["refused with 10023", "frozen"])
def test_no_callback_is_entered_while_the_journal_takes_no_writes(how):
    """Closes: a full disk: work goes on without checkpoints, or the pod gives its records up. The group is kept and sent
    again, nothing is entered meanwhile, and the report says what is wrong until it is not."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world, steps=5, step_s=0.5)))
        await world.all_owned()
        ids = [f"i{number}" for number in range(10)]
        for instance in ids:
            await world.publish("work", instance)
        await world.until(lambda: len(world.history.entered(step="s2")) == 10, "all are inside s2")
        if how == "frozen":
            world.broker.freeze_stream(STREAM)
        else:
            world.broker.fail_next(JOURNAL, "refuse:10023", times=10**6)
        await world.until(lambda: a.pod.context.journal.trouble, "the pod has noticed")
        noticed = world.now
        await world.passes(12)
        assert world.history.entered(since=noticed) == []
        report = (await world.client().pods())[0]
        assert "journal" in report.journal

        world.broker._faults.clear()
        world.broker.stop()
        world.broker.start()
        await world.until(lambda: len(world.records(r.Ended)) == 10, "all have ended")
        assert a.pod.context.journal.trouble == ""
        assert [world.history.times(instance, f"s{step}") for instance in ids for step in range(1, 6)] == [1] * 50
        await world.quiet()
        check_all(world, "work", ids)

    play(story)


def test_a_pod_that_loses_a_claim_while_writes_are_refused_goes_on():
    """Closes: a claim is refused once (10023), then won by another pod: the trouble of it, never cleared, stops
    everything at this pod for ever."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.2))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        c = await world.start_pod("c", app)
        world.broker.fail_next(JOURNAL, "refuse:10023", times=6)
        await world.spread_over(a, b, c)
        for number in range(20):
            await world.publish("work", f"i{number}")
        await world.until(lambda: len(world.records(r.Ended)) == 20, "all have ended", timeout_s=30)

        assert not any(node.pod.context.journal.trouble for node in world.living)
        check_all(world, "work", [f"i{number}" for number in range(20)])

    for seed in range(5):
        play(story, seed=seed)


def test_an_instance_at_the_gate_goes_on_when_another_stations_trouble_ends():
    """Closes: a callback that was held back by the trouble of another station waits for an acceptance at its own station,
    which has nothing to commit."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(sleeper_workflow(world, nap="0.9 seconds"), steps_workflow(world)))
        await world.all_owned()
        napping, troubled = world.ids_at(FIRST, 1)[0], world.ids_at(StationId(1, 1), 1)[0]
        await world.publish("nap", napping)
        await world.until(lambda: world.records(r.SleepStarted), "it naps, near enough to keep its slot")
        world.broker.fail_next(subjects.journal("main", StationId(1, 1)), "refuse:10023", times=8)
        await world.publish("work", troubled)
        await world.until(lambda: a.pod.context.journal.trouble, "station 1 is in trouble")
        await world.until(lambda: len(world.records(r.Ended)) == 2, "both have ended", timeout_s=30)
        await world.quiet()

    play(story)


def test_everything_at_once_ends_well():
    """A batch over all stations while answers are lost, writes refused and a pod killed: nothing lost, nothing twice."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=0.3))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        results = await world.client().create_batch("work", [NewInstance(number, id=f"i{number}") for number in range(40)])
        assert all(result.error is None for result in results)
        for fault in (LOSE_ANSWER, "refuse:10023", DELAY, DROP_BEFORE):
            world.broker.fail_next(JOURNAL, fault, times=3, delay_s=2.5)
        await world.passes(0.7)
        a.kill()
        await world.until(lambda: len(world.records(r.Ended)) == 40, "all have ended")
        await world.quiet()
        check_all(world, "work", [f"i{number}" for number in range(40)])
        check_steps(world)

    for seed in range(3):
        play(story, seed=seed)
