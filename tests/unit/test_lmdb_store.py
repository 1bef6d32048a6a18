"""The LMDB store as a cache that may be doubted: identity, boots, damage, and what a kill leaves (protocol rule 3)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import lmdb
import msgspec
import pytest

from toque._subjects import StationId
from toque.errors import SetupError
from toque.storage import fold, lmdb_store
from toque.storage import records as r
from toque.storage.lmdb_store import Identity, LmdbStore, StoreDamaged, open_environment
from toque.storage.snapshot_format import ChunkReader, Head

STATION = StationId(1, 0)
RUN_S_MAX = 20.0


def run(coroutine):
    async def bounded():
        async with asyncio.timeout(RUN_S_MAX):
            return await coroutine

    return asyncio.run(bounded())


def group(sequence, serial=None):
    record = r.Admitted(serial or sequence, 1, 1, 10, "census", f"i{serial or sequence}", "n", 0, 9, b"{}", "")
    return r.Group(STATION, r.Position(sequence, r.GroupHeader(1, "a-1", sequence, 0)), [record])


def opened(directory, *, account="main", pod="a", damage=None):
    return LmdbStore(directory, account=account, pod=pod, on_damage=(damage if damage is not None else []).append)


async def fill(directory, groups=3):
    """A store with so many groups, closed cleanly."""
    store = opened(directory)
    for sequence in range(1, groups + 1):
        store.apply(group(sequence))
    await store.flush()
    store.close()


def change_identity(directory, **changes):
    """Rewrite the identity record as another process, or another boot, would have left it."""
    environment = lmdb.open(str(directory), max_dbs=20)
    meta = environment.open_db(b"meta")
    with environment.begin(write=True, db=meta) as transaction:
        sealed = transaction.get(b"identity")
        found = msgspec.msgpack.decode(lmdb_store._unseal(b"identity", sealed), type=Identity)
        data = msgspec.msgpack.encode(msgspec.structs.replace(found, **changes))
        transaction.put(b"identity", lmdb_store._seal(b"identity", data))
    environment.close()


def test_what_was_folded_is_there_after_a_clean_close(tmp_path):
    """Position and rows."""

    async def check():
        await fill(tmp_path / "store")
        store = opened(tmp_path / "store")
        try:
            assert store.set_aside_to is None
            assert store.position(STATION) == group(3).position
            assert store.find(STATION, "census", "i3") == 3
        finally:
            store.close()

    run(check())


def test_closing_folds_what_was_applied(tmp_path):
    """Everything that was accepted before the close is on the disk."""

    async def check():
        store = opened(tmp_path / "store")
        for sequence in range(1, 501):
            store.apply(group(sequence))
        store.close()
        store = opened(tmp_path / "store")
        try:
            assert store.highest_serial(STATION) == 500
        finally:
            store.close()

    run(check())


KILLED = """
import asyncio, os, signal, sys
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from unit.test_lmdb_store import STATION, group, opened
from pathlib import Path

async def main():
    store = opened(Path(sys.argv[1]))
    for sequence in range(1, 101):
        store.apply(group(sequence))
    await store.flush()
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_kill_9_makes_nothing_suspect(tmp_path):
    """What the process had written is in the kernel's hands: it is used, not rebuilt."""
    tests = Path(__file__).parent.parent
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "store"), str(tests), str(tests.parent / "src")],
                           timeout=RUN_S_MAX, check=False, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert child.returncode == -signal.SIGKILL

    async def check():
        store = opened(tmp_path / "store")
        try:
            assert store.set_aside_to is None
            assert store.highest_serial(STATION) == 100
            assert store.position(STATION) == group(100).position
        finally:
            store.close()

    run(check())


@pytest.mark.parametrize(("clean", "suspect"), [(False, True), (True, False)])
def test_another_boot_without_a_clean_close_makes_it_suspect(tmp_path, clean, suspect):
    """After a power cut the environment, written without fsync, may be torn: set aside and kept for inspection."""

    async def check():
        await fill(tmp_path / "store")
        change_identity(tmp_path / "store", boot_id="another", clean=clean)
        store = opened(tmp_path / "store")
        try:
            assert (store.set_aside_to is not None) == suspect
            assert (store.position(STATION) is None) == suspect
            if store.set_aside_to is not None:
                assert (store.set_aside_to / "data.mdb").exists()
        finally:
            store.close()

    run(check())


@pytest.mark.parametrize(("changes", "says"), [
    ({"account": "other"}, "belongs to pod 'a' of account 'other'"), ({"pod": "b"}, "belongs to pod 'b'"),
    ({"format": r.FORMAT + 1}, "was written in format 2"),
])
def test_somebody_elses_directory_is_refused(tmp_path, changes, says):
    """Another account's or pod's, or a newer version's: named, and left as it is."""

    async def check():
        await fill(tmp_path / "store")
        change_identity(tmp_path / "store", **changes)
        with pytest.raises(SetupError, match=says):
            opened(tmp_path / "store")
        assert [path.name for path in tmp_path.iterdir()] == ["store"]

    run(check())


def test_a_file_that_is_no_environment_is_set_aside(tmp_path):
    """Whatever overwrote it: the store is made anew, and the journal fills it."""
    directory = tmp_path / "store"
    directory.mkdir()
    (directory / "data.mdb").write_bytes(os.urandom(64 * 1024))

    environment, moved = open_environment(directory, "main", "a")
    environment.close()

    assert moved is not None
    assert (moved / "data.mdb").exists()


def test_a_damaged_value_is_never_served(tmp_path):
    """D5: its CRC covers key and value, so a value under another's key is noticed too."""

    async def check():
        await fill(tmp_path / "store")
        environment = lmdb.open(str(tmp_path / "store"), max_dbs=20)
        rows = environment.open_db(fold.TABLES[fold.ROWS].encode())
        key, other = (fold.serial_key(fold.station_key(STATION), serial) for serial in (1, 2))
        with environment.begin(write=True, db=rows) as transaction:
            transaction.put(key, transaction.get(other))
        environment.close()

        damage = []
        store = opened(tmp_path / "store", damage=damage)
        try:
            for _ in range(2):
                with pytest.raises(StoreDamaged):
                    store.row(STATION, 1)
            assert store.row(STATION, 2) is not None
            await asyncio.sleep(0)
            assert len(damage) == 1, "the pod hears once, and sets the environment aside at its next start"
        finally:
            store.close()

    run(check())


def test_a_damaged_environment_is_not_closed_as_a_clean_one(tmp_path):
    """It was not synced: should the host go down too, the next start sets it aside."""

    async def check():
        damage = []
        store = opened(tmp_path / "store", damage=damage)
        store.apply(r.Group(STATION, r.Position(1, r.GroupHeader(1, "a-1", 1, 0)), [r.Waiting(99, 1, 7, 9)]))
        while not damage:
            await asyncio.sleep(0.001)
        store.close()
        change_identity(tmp_path / "store", boot_id="another")

        store = opened(tmp_path / "store")
        try:
            assert store.set_aside_to is not None
        finally:
            store.close()

    run(check())


def test_a_failed_write_is_reported_once_and_folds_nothing_more(tmp_path):
    """A group that cannot be folded is still accepted: the pod hears, and sets the environment aside at its next start."""

    async def check():
        damage = []
        store = opened(tmp_path / "store", damage=damage)
        folded = []
        store.apply(group(1), lambda: folded.append(1))
        await store.flush()
        gap = r.Group(STATION, r.Position(2, r.GroupHeader(1, "a-1", 2, 0)), [r.Waiting(99, 1, 7, 9)])
        store.apply(gap, lambda: folded.append(2))
        while not damage:
            await asyncio.sleep(0.001)
        store.apply(group(3), lambda: folded.append(3))
        store.close()

        assert folded == [1]
        assert [type(error) for error in damage] == [fold.FoldError]

        store = opened(tmp_path / "store")
        try:
            assert store.position(STATION) == group(1).position
        finally:
            store.close()

    run(check())


def test_a_station_that_is_set_aside_is_kept_in_a_file_as_a_snapshot_is(tmp_path):
    """Whoever has to find out what was lost can read it: its head tells the position, its rows are the folded state."""
    header = r.GroupHeader(1, "a-1", 1, 0)

    async def main() -> str:
        store = LmdbStore(tmp_path / "store", account="main", pod="a", on_damage=lambda error: None)
        admitted = r.Admitted(1, 1, 1, 9, "work", "one", "n", 1, 8, b"7", "application/json")
        store.apply(r.Group(STATION, r.Position(3, header), [admitted]))
        await store.flush()
        place = await store.set_aside(STATION)
        assert await store.set_aside(StationId(1, 1)) == ""
        await store.drop(STATION)
        store.close()
        return place

    reader = ChunkReader()
    rows = reader.feed(Path(run(main())).read_bytes())
    assert reader.head == Head("1.0", r.Position(3, header))
    assert {fold.ROWS, fold.HISTORY, fold.IDS} <= {row.table for row in rows}
