"""Folding accepted groups: idempotent, order-safe, and the same in memory and on LMDB."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from toque._subjects import StationId
from toque.errors import SetupError
from toque.storage import fold
from toque.storage import records as r
from toque.storage.lmdb_store import LmdbStore
from toque.storage.memory_store import MemoryStore, MemoryTables
from toque.storage.ports import RowQuery

STATION = StationId(1, 3)


def group(number: int, *records: r.Record) -> r.Group:
    header = r.GroupHeader(1, "s", number, 0)
    return r.Group(STATION, r.Position(number * 10, header), list(records))


def admitted(serial: int = 1, instance_id: str = "one") -> r.Admitted:
    return r.Admitted(serial, 1, 1, 1000, "work", instance_id, "n", 5, 900, b"7", "application/json", "1")


def done(seq: int, name: str = "a", serial: int = 1) -> r.StepDone:
    return r.StepDone(serial, 1, seq, 2000, r.StepKind.DO, name, 1, 1, 1500, b"\x07")


HISTORY = [
    group(1, admitted(), admitted(2, "two")),
    group(2, done(2), r.SleepStarted(2, 1, 2, 1600, "nap", 1, 60_000, True)),
    group(3, r.Ended(1, 1, 3, 3000, r.Status.COMPLETE, b"\x07"), r.SleepDone(2, 1, 3, 61_000, "nap", 1)),
]


def folded(*groups: r.Group) -> MemoryTables:
    tables = MemoryTables()
    for one in groups:
        batch = fold.FoldBatch(tables)
        batch.apply(one)
        tables.write(batch.finish())
    return tables


def test_a_group_folded_twice_changes_nothing() -> None:
    """Rule 4: a group at or below the position is skipped."""
    once = folded(*HISTORY)

    assert folded(*HISTORY, HISTORY[0], HISTORY[2]).tables == once.tables


def test_one_batch_equals_many() -> None:
    """How groups are put into transactions does not show in the state."""
    tables = MemoryTables()
    batch = fold.FoldBatch(tables)
    for one in HISTORY:
        batch.apply(one)
    tables.write(batch.finish())

    assert tables.tables == folded(*HISTORY).tables


def test_records_after_the_end_or_of_the_past_are_ignored() -> None:
    """Rule 4: what follows the terminal record, or is not newer, is not applied."""
    once = folded(*HISTORY)

    again = folded(*HISTORY, group(4, done(4, "late"), done(2, "old")))

    rows, history = fold.ROWS, fold.HISTORY
    assert again.tables[rows] == once.tables[rows]
    assert again.tables[history] == once.tables[history]


def test_a_gap_halts_loudly() -> None:
    """Rule 4: a missing record of an instance is an error, not something to go on from."""
    with pytest.raises(fold.FoldError, match=r"record 1\.4 follows 1\.1"):
        folded(HISTORY[0], group(2, done(4)))
    with pytest.raises(fold.FoldError, match="nobody admitted"):
        folded(group(1, done(2)))


def test_the_readers_show_what_was_folded() -> None:
    """Index, history, timers, counts and committed position follow the records."""

    async def story() -> None:
        store = MemoryStore(folded(*HISTORY[:2]))
        assert store.find(STATION, "work", "two") == 2
        assert [type(record) for record in store.history(STATION, 1)] == [r.Admitted, r.StepDone]
        assert store.due(STATION, 60_000, 10) == [(60_000, 2)]
        assert store.due(STATION, 59_999, 10) == []
        assert store.counts(STATION)["work", "waiting"] == 1
        assert store.highest_serial(STATION) == 2
        assert store.queue_position(STATION, "work") == 5
        assert [serial for serial, _ in store.unended(STATION)] == [1, 2]

    asyncio.run(story())


def test_lmdb_holds_what_memory_holds(tmp_path: Path) -> None:
    """The two stores give the same answers, and LMDB's survive a clean close."""

    async def story() -> None:
        memory = MemoryStore(folded(*HISTORY))
        for _ in range(2):
            store = LmdbStore(tmp_path / "store", account="main", pod="p", on_damage=pytest.fail)
            for one in HISTORY:
                store.apply(one)
            await store.flush()
            assert store.position(STATION) == memory.position(STATION)
            assert store.history(STATION, 1) == memory.history(STATION, 1)
            assert store.page(STATION, RowQuery()) == memory.page(STATION, RowQuery())
            assert store.counts(STATION) == memory.counts(STATION)
            store.close()

    asyncio.run(story())


def test_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    """A store of another pod or account is not opened; the message says whose it is."""

    async def story() -> None:
        LmdbStore(tmp_path / "store", account="main", pod="p", on_damage=pytest.fail).close()
        with pytest.raises(SetupError, match="belongs to pod 'p' of account 'main'"):
            LmdbStore(tmp_path / "store", account="main", pod="q", on_damage=pytest.fail)

    asyncio.run(story())


def test_a_store_of_another_boot_without_a_clean_close_is_set_aside(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 3: after a power cut it may be torn, so it is rebuilt; after a kill -9 alone it is used."""

    async def story() -> None:
        killed = LmdbStore(tmp_path / "store", account="main", pod="p", on_damage=pytest.fail)
        killed.apply(HISTORY[0])
        await killed.flush()
        killed._queue.put(None)  # as after kill -9: nothing says that it was closed
        killed._thread.join()
        killed._environment.close()

        again = LmdbStore(tmp_path / "store", account="main", pod="p", on_damage=pytest.fail)
        assert again.set_aside_to is None
        assert again.find(STATION, "work", "one") == 1
        again._queue.put(None)
        again._thread.join()
        again._environment.close()
        monkeypatch.setattr("toque.storage.lmdb_store.boot_id", lambda: "another boot")

        fresh = LmdbStore(tmp_path / "store", account="main", pod="p", on_damage=pytest.fail)
        assert fresh.set_aside_to is not None
        assert fresh.position(STATION) is None
        fresh.close()

    asyncio.run(story())
