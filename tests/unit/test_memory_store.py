"""The faults of the in-memory store: copies, rotten rows, torn commits. The rest: the conformance suite."""

from __future__ import annotations

import pytest

from toque._subjects import StationId
from toque.sim.loop import run
from toque.storage import fold
from toque.storage import records as r
from toque.storage.memory_store import MemoryStore
from toque.storage.ports import RowQuery, StoreDamaged

STATION = StationId(1, 0)


def group(sequence: int) -> r.Group:
    admitted = r.Admitted(sequence, 1, 1, 10, "census", f"i{sequence}", "n", sequence, 9, b"{}", "application/json")
    return r.Group(STATION, r.Position(sequence, r.GroupHeader(1, "a-1", sequence, sequence)), [admitted])


async def folded(store: MemoryStore, *sequences: int) -> None:
    for sequence in sequences:
        store.apply(group(sequence))
        await store.flush()


def test_a_copy_keeps_what_was_there() -> None:
    """A stale disk: later folds do not change it."""

    async def main() -> None:
        store = MemoryStore()
        await folded(store, 1)
        copied = store.tables.copy()
        await folded(store, 2)

        assert MemoryStore(copied).highest_serial(STATION) == 1
        assert store.highest_serial(STATION) == 2

    run(main(), seed=1)


def test_a_rotten_row_is_never_served() -> None:
    """Neither by its key nor in a scan; the damage is told once, and nothing is folded after it."""

    async def main() -> None:
        damages: list[Exception] = []
        store = MemoryStore(on_damage=damages.append)
        await folded(store, 1)
        store.tables.rot(fold.ROWS, fold.serial_key(fold.station_key(STATION), 1))

        with pytest.raises(StoreDamaged):
            store.row(STATION, 1)
        with pytest.raises(StoreDamaged):
            store.page(STATION, RowQuery())
        store.apply(group(2))
        store.close()

        assert len(damages) <= 1
        assert store.find(STATION, "census", "i2") is None

    run(main(), seed=1)


def test_a_torn_commit_is_half_there() -> None:
    """The first tables have the last write, the others do not."""

    async def main() -> None:
        store = MemoryStore()
        await folded(store, 1, 2)
        store.tables.tear(fold.IDS)

        torn = MemoryStore(store.tables)
        assert torn.position(STATION) is not None
        assert torn.position(STATION).sequence == 2  # type: ignore[union-attr]  # asserted above
        assert torn.find(STATION, "census", "i2") is None
        assert torn.find(STATION, "census", "i1") == 1

    run(main(), seed=1)
