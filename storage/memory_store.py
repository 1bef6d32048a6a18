"""An in-memory Store: folds a moment later, in the loop, as the LMDB writer thread does. For tests and simulations."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

from toque._subjects import StationId
from toque.storage import fold
from toque.storage.folded_store import FoldedReaders
from toque.storage.records import Group


class MemoryTables:
    """Sorted tables in dicts."""

    def __init__(self) -> None:
        self.tables: list[dict[bytes, bytes]] = [{} for _ in fold.TABLES]
        self._sorted: list[list[bytes] | None] = [None for _ in fold.TABLES]

    def get(self, table: int, key: bytes) -> bytes | None:
        return self.tables[table].get(key)

    def scan(self, table: int, prefix: bytes, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        keys = self._sorted[table]
        if keys is None:
            keys = self._sorted[table] = sorted(self.tables[table])
        rows = self.tables[table]
        found: list[tuple[bytes, bytes]] = []
        for index in range(bisect_left(keys, max(prefix, start)), len(keys)):
            key = keys[index]
            if len(found) == limit or not key.startswith(prefix):
                break
            found.append((key, rows[key]))
        return found

    def write(self, writes: fold.Writes) -> None:
        for table, changes in enumerate(writes):
            if changes:
                self.tables[table] = fold.merge(self.tables[table], changes)
                self._sorted[table] = None

    def drop(self, prefix: bytes) -> None:
        for table, rows in enumerate(self.tables):
            self.tables[table] = {key: value for key, value in rows.items() if not key.startswith(prefix)}
            self._sorted[table] = None


class MemoryStore(FoldedReaders):
    """See `toque.storage.ports.Store`. `tables` outlives the store, as a disk does."""

    def __init__(self, tables: MemoryTables | None = None, *, fold_delay_s: float = 0.001) -> None:
        self.tables = tables or MemoryTables()
        super().__init__(self.tables)
        self._delay_s = fold_delay_s
        self._waiting: deque[tuple[float, Group, Callable[[], None] | None]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    def apply(self, group: Group, on_folded: Callable[[], None] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._waiting.append((loop.time(), group, on_folded))
        if self._idle.is_set():
            self._idle.clear()
            loop.call_later(self._delay_s, self._fold)

    async def flush(self) -> None:
        await self._idle.wait()

    @property
    def lag_s(self) -> float:
        return asyncio.get_running_loop().time() - self._waiting[0][0] if self._waiting else 0.0

    def drop(self, station: StationId) -> None:
        self.tables.drop(fold.station_key(station))

    def close(self) -> None:
        if self._waiting:
            self._fold()

    def _fold(self) -> None:
        done = list(self._waiting)
        self._waiting.clear()
        batch = fold.FoldBatch(self.tables)
        for _, group, _ in done:
            batch.apply(group)
        self.tables.write(batch.finish())
        self._idle.set()
        for _, _, on_folded in done:
            if on_folded is not None:
                on_folded()
