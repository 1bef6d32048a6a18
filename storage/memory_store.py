"""An in-memory Store: folds a moment later, in the loop, as the LMDB writer thread does. For tests and simulations."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import msgspec

from toque._subjects import StationId
from toque.errors import ToqueError
from toque.storage import fold
from toque.storage.folded_store import FoldedReaders
from toque.storage.ports import StoreDamaged, StoredRow
from toque.storage.records import Group, Position
from toque.storage.snapshot_format import ChunkWriter


class MemoryTables:
    """Sorted tables in dicts. Faults can be ordered: `copy` for a stale disk, `rot` a row, `tear` a commit."""

    def __init__(self) -> None:
        self.tables: list[dict[bytes, bytes]] = [{} for _ in fold.TABLES]
        self._sorted: list[list[bytes] | None] = [None for _ in fold.TABLES]
        self.rotten: set[tuple[int, bytes]] = set()  # rows that nobody may read
        self._before: list[dict[bytes, bytes]] | None = None  # the last write
        self.aside: list[tuple[StationId, list[StoredRow]]] = []

    def copy(self) -> MemoryTables:
        """The tables as they are now."""
        copied = MemoryTables()
        copied.tables = [dict(rows) for rows in self.tables]
        copied.rotten = set(self.rotten)
        return copied

    def rot(self, table: int, key: bytes) -> None:
        """Flip a bit of a row. Whoever reads it meets the CRC's complaint; a new write of the row heals it."""
        value = self.tables[table][key]
        self.tables[table][key] = bytes((value[0] ^ 1,)) + value[1:] if value else b"\1"
        self.rotten.add((table, key))

    def tear(self, tables: int) -> None:
        """A power cut in the midst of the last write: only its first so many tables reached the disk."""
        if self._before is not None:
            self.tables[tables:] = self._before[tables:]
            self._sorted = [None for _ in fold.TABLES]

    def get(self, table: int, key: bytes) -> bytes | None:
        if self.rotten and (table, key) in self.rotten:
            raise StoreDamaged("a value of the local store fails its CRC")
        return self.tables[table].get(key)

    def scan(self, table: int, prefix: bytes, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        keys = self._in_order(table)
        rows = self.tables[table]
        found: list[tuple[bytes, bytes]] = []
        for index in range(bisect_left(keys, max(prefix, start)), len(keys)):
            key = keys[index]
            if len(found) == limit or not key.startswith(prefix):
                break
            if self.rotten and (table, key) in self.rotten:
                raise StoreDamaged("a value of the local store fails its CRC")
            found.append((key, rows[key]))
        return found

    def scan_back(self, table: int, prefix: bytes, below: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        keys = self._in_order(table)
        end = bisect_left(keys, below)
        wanted = list(takewhile(lambda key: key.startswith(prefix), keys[max(0, end - limit):end][::-1]))
        if self.rotten and any((table, key) in self.rotten for key in wanted):
            raise StoreDamaged("a value of the local store fails its CRC")
        return [(key, self.tables[table][key]) for key in wanted]

    def keys(self, table: int, prefix: bytes, start: bytes, limit: int) -> list[bytes]:
        keys = self._in_order(table)
        at = bisect_left(keys, max(prefix, start))
        return list(takewhile(lambda key: key.startswith(prefix), keys[at:at + limit]))

    def _in_order(self, table: int) -> list[bytes]:
        keys = self._sorted[table]
        if keys is None:
            keys = self._sorted[table] = sorted(self.tables[table])
        return keys

    def write(self, writes: fold.Writes) -> None:
        self._before = list(self.tables)
        for table, changes in enumerate(writes):
            if changes:
                self.rotten.difference_update([(table, key) for key in changes])
                self.tables[table] = fold.merge(self.tables[table], changes)
                self._sorted[table] = None

    def export(self, prefix: bytes) -> Iterator[StoredRow]:
        """Every row but the position, as they are now: writes replace a table as a whole."""
        tables = list(self.tables)
        if self.rotten:
            raise StoreDamaged("a value of the local store fails its CRC")
        return (StoredRow(number, key[len(prefix):], rows[key])
                for number, rows in enumerate(tables) if number != fold.POSITION
                for key in sorted(rows) if key.startswith(prefix))

    def drop(self, prefix: bytes) -> None:
        for table, rows in enumerate(self.tables):
            self.tables[table] = {key: value for key, value in rows.items() if not key.startswith(prefix)}
            self._sorted[table] = None


class MemoryExport:
    """See `toque.storage.ports.Export`."""

    def __init__(self, chunks: ChunkWriter, journal_bytes: int, delay_s: float) -> None:
        self.position = chunks.position
        self.journal_bytes = journal_bytes
        self._chunks = chunks
        self._delay_s = delay_s

    @property
    def rows(self) -> int:
        return self._chunks.rows

    async def next(self) -> bytes:
        await asyncio.sleep(self._delay_s)
        return self._chunks.next()

    def close(self) -> None:
        """There is nothing to end."""


class _WatchedTables:
    """The tables as the pod's loop reads them: it is told of damage, beside the error that the reader gets."""

    def __init__(self, tables: MemoryTables, failed: Callable[[Exception], None]) -> None:
        self._tables = tables
        self._failed = failed

    def get(self, table: int, key: bytes) -> bytes | None:
        try:
            return self._tables.get(table, key)
        except StoreDamaged as error:
            self._failed(error)
            raise

    def scan(self, table: int, prefix: bytes, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        try:
            return self._tables.scan(table, prefix, start, limit)
        except StoreDamaged as error:
            self._failed(error)
            raise

    def scan_back(self, table: int, prefix: bytes, below: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        try:
            return self._tables.scan_back(table, prefix, below, limit)
        except StoreDamaged as error:
            self._failed(error)
            raise

    def keys(self, table: int, prefix: bytes, start: bytes, limit: int) -> list[bytes]:
        try:
            return self._tables.keys(table, prefix, start, limit)
        except StoreDamaged as error:
            self._failed(error)
            raise


class MemoryStore(FoldedReaders):
    """See `toque.storage.ports.Store`. `tables` outlives the store, as a disk does.

    `on_damage` is called once, in the loop, when reading or folding met a damaged row; nothing is folded after that.
    """

    def __init__(self, tables: MemoryTables | None = None, *, fold_delay_s: float = 0.001,
                 on_damage: Callable[[Exception], None] = lambda error: None) -> None:
        self.tables = tables or MemoryTables()
        super().__init__(_WatchedTables(self.tables, self._fail))
        self._on_damage = on_damage
        self._damaged = False
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

    async def set_aside(self, station: StationId) -> str:
        prefix = fold.station_key(station)
        self.tables.aside.append((station, list(self.tables.export(prefix))))
        return f"aside {len(self.tables.aside)}"

    async def drop(self, station: StationId) -> None:
        self.tables.drop(fold.station_key(station))
        await asyncio.sleep(self._delay_s)

    def export(self, station: StationId, chunk_bytes: int) -> MemoryExport | None:
        position = self.position(station)
        if position is None:
            return None
        chunks = ChunkWriter(station, position, self.tables.export(fold.station_key(station)), chunk_bytes)
        return MemoryExport(chunks, self.journal_bytes(station), self._delay_s)

    async def load(self, station: StationId, rows: Sequence[StoredRow], position: Position | None = None) -> None:
        self.tables.write(fold.load_writes(station, rows, position))
        await asyncio.sleep(self._delay_s)

    def close(self) -> None:
        if self._waiting:
            self._fold()

    def _fail(self, error: Exception) -> None:
        if not self._damaged:
            self._damaged = True
            asyncio.get_running_loop().call_soon(self._on_damage, error)

    def _fold(self) -> None:
        if self._damaged:
            return
        done = list(self._waiting)
        batch = fold.FoldBatch(self.tables)
        try:
            for _, group, _ in done:
                batch.apply(group)
            writes = batch.finish()
        except (ToqueError, msgspec.MsgspecError) as error:
            self._fail(error)
            return
        self._waiting.clear()
        self.tables.write(writes)
        self._idle.set()
        for _, _, on_folded in done:
            if on_folded is not None:
                on_folded()
