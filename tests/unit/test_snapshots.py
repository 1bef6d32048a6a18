"""Snapshot objects in their stream: never overwritten, found by name, deleted whole."""

from __future__ import annotations

import random

import pytest

from toque import _subjects as subjects
from toque._accounts import ensure_account
from toque._subjects import StationId
from toque.sim import loop as sim
from toque.storage import records as r
from toque.storage.journal import Abandoned
from toque.storage.memory_broker import DROP_BEFORE
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.storage.memory_store import MemoryStore
from toque.storage.snapshots import Name, SnapshotFailed, SnapshotObjects

STATION, OTHER = StationId(1, 0), StationId(1, 1)


def group(sequence, *records):
    return r.Group(STATION, r.Position(sequence, r.GroupHeader(1, "a-1", sequence, sequence)), list(records))


def admitted(serial):
    return r.Admitted(serial, 1, 1, 10, "census", f"i{serial}", "n", 0, 9, b"{}", "application/json")


async def setting(instances=40):
    broker = MemoryBroker(random.Random(1))
    bus = MemoryBus(broker, "test")
    await ensure_account(bus, "main")
    store = MemoryStore()
    store.apply(group(1, *(admitted(serial) for serial in range(1, instances + 1))))
    await store.flush()
    return broker, store, SnapshotObjects(bus, "main", chunk_bytes_max=500)


async def write(store, objects, *, may_send=lambda: True):
    return await objects.write(STATION, store.export(STATION, objects.chunk_bytes), at=5, may_send=may_send)


def test_names_sort_by_age():
    """By epoch, then by sequence, as numbers."""
    texts = ["2-9", "10-3", "2-10"]

    assert [str(name) for name in sorted(map(Name.parse, texts))] == ["2-9", "2-10", "10-3"]


@pytest.mark.parametrize("text", ["", "1", "1-2-3", "a-1", "1-"])
def test_other_texts_are_no_names(text):
    """Whatever else somebody stores there is left alone."""
    with pytest.raises(ValueError, match=r"values to unpack|invalid literal"):
        Name.parse(text)


def test_an_object_is_read_as_it_was_written():
    """Its record tells everything that a reader needs."""

    async def main():
        _, store, objects = await setting()
        record = await write(store, objects)
        rows = [row async for chunk in objects.read(STATION, record) for row in chunk]

        assert record.name == "1-1" and record.chunks > 3 and record.rows == len(rows)
        assert await objects.names(STATION) == [Name(1, 1)]
        assert await objects.names(OTHER) == []

    sim.run(main(), seed=1)


def test_the_same_snapshot_again_takes_up_what_is_there():
    """A writer that gave up and comes back to the same position stores each chunk once."""

    async def main():
        broker, store, objects = await setting()
        first = await write(store, objects)
        again = await write(store, objects)

        assert again == first
        assert len(broker.stored(subjects.snapshot_stream("main"))) == first.chunks

    sim.run(main(), seed=1)


def test_an_object_with_other_bytes_is_never_overwritten():
    """A name is of one state: whoever finds another there has to give up."""

    async def main():
        broker, store, objects = await setting()
        await MemoryBus(broker, "other").publish(subjects.snapshot_chunk("main", STATION, "1-1", 1), b"other")

        with pytest.raises(SnapshotFailed):
            await write(store, objects)

    sim.run(main(), seed=1)


def test_writing_gives_up_when_nothing_is_answered_and_at_the_deadline():
    """SnapshotFailed after some tries; Abandoned without a further one."""

    async def main():
        broker, store, objects = await setting()
        broker.fail_next("toque.main.snapshot.>", DROP_BEFORE, times=10**6)
        with pytest.raises(SnapshotFailed):
            await write(store, objects)
        with pytest.raises(Abandoned):
            await write(store, objects, may_send=lambda: False)
        assert await objects.names(STATION) == []

    sim.run(main(), seed=1)


def test_deleting_an_object_leaves_the_others():
    """All chunks of the name, and of no name that begins like it."""

    async def main():
        _, store, objects = await setting()
        await write(store, objects)
        store.apply(group(12, admitted(100)))
        await store.flush()
        record = await write(store, objects)
        await objects.delete(STATION, Name(1, 1))

        assert await objects.names(STATION) == [Name(1, 12)]
        await objects.check(STATION, record)

    sim.run(main(), seed=1)
