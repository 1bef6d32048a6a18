"""One suite over both stores: the in-memory one of the simulator obeys what the LMDB one does (port `Store`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from toque._subjects import StationId
from toque.storage import fold
from toque.storage import records as r
from toque.storage.lmdb_store import LmdbStore
from toque.storage.memory_store import MemoryStore
from toque.storage.ports import RowQuery, Store
from toque.storage.snapshot_format import ChunkReader

STATION, OTHER = StationId(1, 0), StationId(1, 1)
RUN_S_MAX = 20.0


def memory(_: Path) -> Store:
    return MemoryStore()


def lmdb(directory: Path) -> Store:
    def damaged(error: Exception) -> None:
        raise error

    return LmdbStore(directory / "store", account="main", pod="a", on_damage=damaged)


@pytest.fixture(params=[memory, lmdb], ids=["memory", "lmdb"])
def on_store(request: Any, tmp_path: Path) -> Callable[[Callable[[Store], Awaitable[None]]], None]:
    """`on_store(check)`: run a check on a fresh store."""

    def run(check: Callable[[Store], Awaitable[None]]) -> None:
        async def main() -> None:
            async with asyncio.timeout(RUN_S_MAX):
                store = request.param(tmp_path)
                try:
                    await check(store)
                finally:
                    store.close()

        asyncio.run(main())

    return run


def group(sequence, *records, station=STATION, epoch=1):
    return r.Group(station, r.Position(sequence, r.GroupHeader(epoch, "a-1", sequence, sequence)), list(records))


def admitted(serial, *, workflow="census", queue_sequence=0):
    return r.Admitted(serial, 1, 1, 10, workflow, f"i{serial}", "n", queue_sequence, 9, b"{}", "application/json")


def done(serial, seq, result=b"\x01"):
    return r.StepDone(serial, 1, seq, 20, r.StepKind.DO, f"s{seq}", 1, 1, 19, result)


def napping(serial, seq, due):
    return r.SleepStarted(serial, 1, seq, 20, "nap", 1, due, True)


def ended(serial, seq, status=r.Status.COMPLETE):
    return r.Ended(serial, 1, seq, 30, status, b"\xc0")


def test_a_fresh_store_knows_nothing(on_store):
    """None, empty, zero."""

    async def check(store):
        assert store.position(STATION) is None
        assert store.find(STATION, "census", "i1") is None
        assert store.row(STATION, 1) is None
        assert store.history(STATION, 1) == []
        assert list(store.unended(STATION)) == []
        assert store.due(STATION, 10**15, 10) == []
        assert store.page(STATION, RowQuery()) == ([], 0)
        assert store.counts(STATION) == {}
        assert store.highest_serial(STATION) == 0
        assert store.queue_position(STATION, "census") == 0
        assert store.leases(STATION) == {}
        assert store.lag_s == 0.0

    on_store(check)


def test_readers_see_a_group_when_it_is_folded(on_store):
    """`on_folded` comes in the caller's loop, in the order of the groups, when every reader sees them."""

    async def check(store):
        seen: list[Any] = []
        store.apply(group(1, admitted(1)), lambda: seen.append(store.find(STATION, "census", "i1")))
        store.apply(group(2, admitted(2), done(1, 2)), lambda: seen.append(len(store.history(STATION, 1))))
        await store.flush()
        while len(seen) < 2:
            await asyncio.sleep(0)

        assert seen == [1, 2]
        assert store.position(STATION) == group(2).position
        assert store.lag_s == 0.0

    on_store(check)


def test_flush_waits_for_everything_applied_so_far(on_store):
    """And for an empty store it comes at once."""

    async def check(store):
        await store.flush()
        for sequence in range(1, 301):
            store.apply(group(sequence, admitted(sequence)))
        assert store.lag_s >= 0.0
        await store.flush()

        assert store.highest_serial(STATION) == 300

    on_store(check)


def test_a_group_is_applied_once(on_store):
    """One at or below the position is skipped, as when a restore overlaps."""

    async def check(store):
        for _ in range(2):
            store.apply(group(1, admitted(1), done(1, 2)))
            await store.flush()

        assert store.history(STATION, 1) == [admitted(1), done(1, 2)]
        assert store.counts(STATION) == {("census", "running"): 1}

    on_store(check)


def test_history_is_one_instances_and_in_order(on_store):
    """Over many groups, and beside others."""

    async def check(store):
        store.apply(group(1, admitted(1), admitted(2), done(1, 2)))
        for seq in range(3, 40):
            store.apply(group(seq, done(1, seq), done(2, seq - 1)))
        await store.flush()

        assert [record.seq for record in store.history(STATION, 1)] == list(range(1, 40))
        assert {record.serial for record in store.history(STATION, 2)} == {2}

    on_store(check)


def test_due_gives_the_soonest_first_up_to_a_time(on_store):
    """At most `limit`, and only those due by then."""

    async def check(store):
        for serial, due in enumerate([500, 100, 300, 200], 1):
            store.apply(group(serial, admitted(serial), napping(serial, 2, due)))
        await store.flush()

        assert store.due(STATION, 300, 10) == [(100, 2), (200, 4), (300, 3)]
        assert store.due(STATION, 300, 2) == [(100, 2), (200, 4)]
        assert store.due(STATION, 99, 10) == []

    on_store(check)


def listed(store, **query):
    return [serial for serial, _ in store.page(STATION, RowQuery(**query)).rows]


def test_pages_follow_the_order_of_admission(on_store):
    """`after` and `limit`, by workflow and by status, from both ends; a neighbour's instances are in none."""

    async def check(store):
        for serial in range(1, 11):
            flow = "census" if serial % 2 else "report"
            store.apply(group(serial, admitted(serial, workflow=flow), *([ended(serial, 2)] if serial > 6 else [])))
        for neighbour in (OTHER, StationId(0, 9)):
            store.apply(group(1, admitted(3), admitted(12), ended(3, 2), station=neighbour))
        await store.flush()

        assert listed(store, limit=3) == [1, 2, 3]
        assert listed(store, after=3, limit=3) == [4, 5, 6]
        assert listed(store, newest=True, limit=3) == [10, 9, 8]
        assert listed(store, newest=True, after=8) == [7, 6, 5, 4, 3, 2, 1]
        assert listed(store, workflow="report") == [2, 4, 6, 8, 10]
        assert listed(store, workflow="report", statuses=(r.Status.COMPLETE,), after=8) == [10]
        assert listed(store, statuses=(r.Status.RUNNING,), newest=True, after=6) == [5, 4, 3, 2, 1]
        assert listed(store, statuses=(r.Status.RUNNING, r.Status.COMPLETE), after=4, limit=4) == [5, 6, 7, 8]
        assert listed(store, statuses=(r.Status.ERRORED,)) == []
        assert listed(store, id_prefix="i1") == [1, 10]
        assert listed(store, id_prefix="i1", workflow="report", newest=True) == [10]
        assert store.counts(STATION)["report", "complete"] == 2

    on_store(check)


def test_instances_are_found_where_they_stand_now(on_store):
    """An instance stands under its present status alone, after each change, and under none when it is deleted."""

    async def check(store):
        def by_status():
            return {status.label: found for status in r.Status if (found := listed(store, statuses=(status,)))}

        store.apply(group(1, *(admitted(serial) for serial in range(1, 5))))
        store.apply(group(2, napping(1, 2, 50), napping(2, 2, 60), ended(3, 2)))
        await store.flush()
        assert by_status() == {"running": [4], "waiting": [1, 2], "complete": [3]}

        store.apply(group(3, r.Woken(1, 1, 3, 55), ended(4, 2, r.Status.ERRORED), r.Restarted(3, 2, 1, 60, "q", "1"),
                          r.PauseAsked(2, 1, 3, 60, "q")))
        await store.flush()
        assert by_status() == {"running": [1, 3], "waitingForPause": [2], "errored": [4]}

        store.apply(group(4, r.Deleted(0, 0, 0, 70, [2, 4])))
        await store.flush()
        assert by_status() == {"running": [1, 3]}
        assert listed(store) == [1, 3]
        places = [row async for row in exported(store) if row.table == fold.STATES]
        assert sorted(places) == sorted(row for some in store.index_rows(STATION) for row in some)

    on_store(check)


def test_a_page_looks_at_a_bounded_number_of_instances(on_store):
    """It says where it stopped, though it found nothing; from there the next one goes on, and the last one says so."""

    async def check(store):
        store.apply(group(1, *(admitted(serial) for serial in range(1, 1_201))))
        await store.flush()
        query = RowQuery(created_after=10, created_before=11, look_max=500)

        assert store.page(STATION, query) == ([], 500)
        assert store.page(STATION, replace(query, after=500)) == ([], 1000)
        assert store.page(STATION, replace(query, after=1000)) == ([], 0)
        assert store.page(STATION, replace(query, newest=True)) == ([], 701)
        assert store.page(STATION, replace(query, newest=True, workflow="census", after=701)) == ([], 201)
        assert len(listed(store, id_prefix="i", after=200, limit=900, look_max=900)) == 900

    on_store(check)


def test_a_filter_that_few_match_does_not_look_at_all(on_store):
    """Of many thousands the few are in the first page: by status, by workflow and by id."""

    async def check(store):
        many = range(1, 5_001)
        store.apply(group(1, *(admitted(serial, workflow="report" if serial == 4_000 else "census") for serial in many)))
        store.apply(group(2, *(ended(serial, 2, r.Status.ERRORED if serial == 2_500 else r.Status.COMPLETE)
                               for serial in many if serial != 3_000)))
        await store.flush()

        assert listed(store, statuses=(r.Status.ERRORED,)) == [2_500]
        assert listed(store, statuses=(r.Status.RUNNING,)) == [3_000]
        assert listed(store, workflow="report") == [4_000]
        assert listed(store, id_prefix="i499", newest=True) == [*range(4_999, 4_989, -1), 499]

    on_store(check)


def test_bounds_of_time_pass_over_what_was_admitted_far_outside(on_store):
    """Created and ended within them, `after` with its bound and `before` without; nothing before or behind is looked at."""

    async def check(store):
        minutes = range(1, 3_001)
        store.apply(group(1, *(replaced(admitted(minute), at=minute * 60_000, created_at=minute * 60_000)
                               for minute in minutes if minute % 50)))
        store.apply(group(2, *(replaced(ended(minute, 2), at=minute * 60_000 + 10) for minute in minutes if minute % 50)))
        await store.flush()

        late = RowQuery(created_after=2_997 * 60_000, created_before=2_999 * 60_000)
        assert store.page(STATION, late).rows == store.page(STATION, replace(late, newest=True)).rows[::-1]
        assert listed(store, created_after=2_997 * 60_000, created_before=2_999 * 60_000) == [2_997, 2_998]
        assert listed(store, ended_after=60_010, ended_before=120_010) == [1]
        assert listed(store, ended_before=120_011, newest=True) == [2, 1]
        assert listed(store, created_after=2_999 * 60_000 + 1) == []

    on_store(check)


def test_a_state_from_before_the_table_of_states_is_indexed(on_store):
    """What is loaded for it is what the fold would have kept; a fresh state has it from the start."""

    async def check(store):
        store.apply(group(1, admitted(1), admitted(2), admitted(3), ended(1, 2), napping(2, 2, 9)))
        await store.flush()
        assert store.is_indexed(STATION)
        rows = [row async for row in exported(store)]
        position = store.position(STATION)
        await store.drop(STATION)
        await store.load(STATION, [row for row in rows if row.table != fold.STATES], position)

        assert not store.is_indexed(STATION)
        indexed = [row for some in store.index_rows(STATION) for row in some]

        assert sorted(indexed) == sorted(row for row in rows if row.table == fold.STATES)

    on_store(check)


async def exported(store):
    export = store.export(STATION, 1 << 20)
    reader = ChunkReader()
    while chunk := await export.next():
        for row in reader.feed(chunk):
            yield row
    export.close()


def replaced(record, **fields):
    return msgspec.structs.replace(record, **fields)


def test_more_rows_than_a_page_are_all_read(on_store):
    """The readers page through long tables."""

    async def check(store):
        store.apply(group(1, *(admitted(serial) for serial in range(1, 2_501))))
        await store.flush()

        assert len(list(store.unended(STATION))) == 2_500
        assert store.highest_serial(STATION) == 2_500
        assert len(store.page(STATION, RowQuery(limit=2_400, look_max=2_400)).rows) == 2_400

    on_store(check)


def test_dropping_a_station_forgets_all_of_it_and_nothing_else(on_store):
    """Then it can be read again from the journal."""

    async def check(store):
        first = [group(1, admitted(1), napping(1, 2, 50), queue) for queue in [
            r.Parked(0, 0, 0, 9, "census", 3, "subject", "reason")]]
        store.apply(first[0])
        store.apply(group(2, admitted(1), r.Lease(0, 0, 0, 9, "a-1", 1, 5), station=OTHER))
        await store.flush()
        await store.drop(STATION)

        assert store.position(STATION) is None
        assert (store.row(STATION, 1), store.history(STATION, 1), store.due(STATION, 100, 9)) == (None, [], [])
        assert store.queue_position(STATION, "census") == 0
        assert store.leases(OTHER) == {"a-1": r.LeaseRow(1, 5)}

        store.apply(first[0])
        await store.flush()
        assert store.find(STATION, "census", "i1") == 1
        assert store.queue_position(STATION, "census") == 3

    on_store(check)


def test_queue_positions_only_grow(on_store):
    """The highest queue sequence that an Admitted or Parked record names."""

    async def check(store):
        store.apply(group(1, admitted(1, queue_sequence=7), admitted(2, queue_sequence=5)))
        store.apply(group(2, admitted(3, queue_sequence=0)))
        await store.flush()

        assert store.queue_position(STATION, "census") == 7

    on_store(check)


async def read_out(export, chunk_bytes=300):
    reader = ChunkReader()
    rows = []
    while chunk := await export.next():
        assert len(chunk) <= chunk_bytes
        rows += reader.feed(chunk)
    return reader, rows


def some_work(store):
    store.apply(group(1, *(admitted(serial, queue_sequence=serial) for serial in range(1, 30))))
    store.apply(group(2, done(1, 2), ended(1, 3), napping(2, 2, 500), r.Lease(0, 0, 0, 9, "a-1", 1, 5)))
    store.apply(group(3, admitted(1), station=OTHER))


def test_an_export_is_of_one_moment(on_store):
    """What is folded while it is read out is not in it; other stations never are."""

    async def check(store):
        assert store.export(STATION, 300) is None
        some_work(store)
        await store.flush()
        before = store.export(STATION, 300)
        _, as_they_were = await read_out(before)
        before.close()
        export = store.export(STATION, 300)
        size = store.journal_bytes(STATION)
        first = await export.next()
        store.apply(group(4, admitted(30), ended(2, 3)))
        await store.flush()
        reader = ChunkReader()
        rows = reader.feed(first)
        while chunk := await export.next():
            rows += reader.feed(chunk)
        export.close()
        export.close()

        assert export.position == reader.head.position == group(2).position
        assert (export.rows, export.journal_bytes) == (len(rows), size)
        assert rows == as_they_were
        assert sum(row.table == fold.ROWS for row in rows) == 29
        assert sum(row.table == fold.LIVE for row in rows) == 28

    on_store(check)


def test_an_export_that_was_closed_ends(on_store):
    """Also one that nobody closed before the store."""

    async def check(store):
        some_work(store)
        await store.flush()
        export = store.export(STATION, 300)
        assert await export.next()
        left_open = store.export(STATION, 300)
        assert await left_open.next()
        export.close()

    on_store(check)


def test_what_is_loaded_is_what_was_exported(on_store):
    """By any store, into any store, beside other stations; the position comes with the last call."""

    async def check(store):
        some_work(store)
        await store.flush()
        other = MemoryStore()
        export = store.export(STATION, 300)
        _, rows = await read_out(export)
        export.close()
        await other.load(STATION, rows)
        assert other.position(STATION) is None
        await other.load(STATION, (), export.position)
        await store.drop(STATION)
        for at in range(0, len(rows), 7):
            await store.load(STATION, rows[at:at + 7])
        assert store.position(STATION) is None
        await store.load(STATION, (), export.position)

        for loaded in (store, other):
            assert loaded.position(STATION) == group(2).position
            assert [record.seq for record in loaded.history(STATION, 1)] == [1, 2, 3]
            assert loaded.due(STATION, 1000, 10) == [(500, 2)]
            assert loaded.queue_position(STATION, "census") == 29
            assert loaded.leases(STATION) == {"a-1": r.LeaseRow(1, 5)}
            loaded.apply(group(4, ended(2, 3)))
            await loaded.flush()
            assert loaded.row(STATION, 2).status is r.Status.COMPLETE
        assert store.find(OTHER, "census", "i1") == 1

    on_store(check)


def snapshot(sequence, *, size_bytes=5):
    position = group(sequence).position
    return r.Snapshot(0, 0, 0, 40, f"1-{sequence}", position, 1, size_bytes, 1, 3, 1_000 * sequence)


def test_the_newest_counting_snapshots_are_known(on_store):
    """Three of them. One whose record follows right behind its position covers the journal up to the record."""

    async def check(store):
        store.apply(group(1, admitted(1)))
        await store.flush()
        before = store.journal_bytes(STATION)
        store.apply(group(2, snapshot(1)))
        store.apply(group(3, admitted(2)))
        store.apply(group(4, admitted(3)))
        for sequence in (5, 6, 7):
            store.apply(group(sequence, snapshot(sequence - 2 if sequence == 5 else sequence - 1)))
        await store.flush()

        rows = store.snapshots(STATION)
        assert [row.record.name for row in rows] == ["1-3", "1-5", "1-6"]
        assert [row.covers for row in rows] == [3, 5, 6]
        assert rows[-1].recorded == group(7).position
        assert store.journal_bytes(STATION) > before > 0
        assert store.snapshots(OTHER) == []

    on_store(check)


def test_a_snapshot_covers_up_to_the_next_group_of_its_station(on_store):
    """Others' messages may lie between: they are nothing to this station."""

    async def check(store):
        store.apply(group(1, admitted(1)))
        far = r.Group(STATION, r.Position(50, r.GroupHeader(1, "a-1", 2, 2)), [snapshot(1)])
        store.apply(far)
        await store.flush()

        assert [row.covers for row in store.snapshots(STATION)] == [49]

    on_store(check)
