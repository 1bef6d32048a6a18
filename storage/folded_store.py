"""The readers of the Store port over sorted tables; the in-memory and the LMDB store differ only in their tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from toque._subjects import StationId
from toque.storage import fold
from toque.storage import records as r
from toque.storage.listing import Listing, Tables
from toque.storage.ports import RowPage, RowQuery, StoredRow

_lease_decoder = msgspec.msgpack.Decoder(r.LeaseRow)


class FoldedReaders:
    """Everything that is read from folded state."""

    PAGE = 1000

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._listing = Listing(tables)

    def position(self, station: StationId) -> r.Position | None:
        data = self._tables.get(fold.POSITION, fold.station_key(station))
        return fold.decode_position(data) if data else None

    def find(self, station: StationId, workflow: str, instance_id: str) -> int | None:
        data = self._tables.get(fold.IDS, fold.id_key(fold.station_key(station), workflow, instance_id))
        return int.from_bytes(data, "big") if data else None

    def row(self, station: StationId, serial: int) -> r.InstanceRow | None:
        data = self._tables.get(fold.ROWS, fold.serial_key(fold.station_key(station), serial))
        return fold.decode_row(data) if data else None

    def history(self, station: StationId, serial: int) -> list[r.Record]:
        prefix = fold.serial_key(fold.station_key(station), serial)
        records: list[r.Record] = []
        for _, data in self._pages(fold.HISTORY, prefix, prefix):
            records.extend(r.decode_records(data))
        return records

    def history_from(self, station: StationId, serial: int, run: int, seq: int, limit: int) -> list[list[r.Record]]:
        prefix = fold.station_key(station)
        start = fold.history_key(prefix, serial, run, seq)
        rows = self._tables.scan(fold.HISTORY, fold.serial_key(prefix, serial), start, limit)
        return [r.decode_records(data) for _, data in rows]

    def unended(self, station: StationId) -> Iterable[tuple[int, r.InstanceRow]]:
        prefix = fold.station_key(station)
        for key, _ in self._pages(fold.LIVE, prefix, prefix):
            data = self._tables.get(fold.ROWS, key)
            if data is not None:
                yield int.from_bytes(key[4:], "big"), fold.decode_row(data)

    def due(self, station: StationId, until_ms: int, limit: int) -> list[tuple[int, int]]:
        return self._due(fold.TIMERS, station, until_ms, limit)

    def _due(self, table: int, station: StationId, until_ms: int, limit: int) -> list[tuple[int, int]]:
        prefix = fold.station_key(station)
        found = [
            (int.from_bytes(key[4:12], "big"), int.from_bytes(key[12:], "big"))
            for key, _ in self._tables.scan(table, prefix, prefix, limit)
        ]
        return [(due, serial) for due, serial in found if due <= until_ms]

    def page(self, station: StationId, query: RowQuery) -> RowPage:
        return self._listing.page(station, query)

    def is_indexed(self, station: StationId) -> bool:
        return self._tables.get(fold.STATES, fold.station_key(station)) is not None

    def index_rows(self, station: StationId) -> Iterator[list[StoredRow]]:
        prefix = fold.station_key(station)
        start = prefix
        while page := self._tables.scan(fold.ROWS, prefix, start, self.PAGE):
            yield [StoredRow(fold.STATES, fold.state_key(b"", row.workflow, row.status, key[4:]), b"")
                   for key, row in ((key, fold.decode_row(data)) for key, data in page)
                   if row.status is not r.Status.RUNNING]
            start = page[-1][0] + b"\0"
        yield [StoredRow(fold.STATES, b"", b"")]

    def counts(self, station: StationId) -> dict[tuple[str, str], int]:
        prefix = fold.station_key(station)
        counts: dict[tuple[str, str], int] = {}
        for key, data in self._pages(fold.COUNTS, prefix, prefix):
            workflow, _, status = key[4:].partition(b"\0")
            counts[workflow.decode(), r.Status(status[0]).label] = int.from_bytes(data, "big")
        return counts

    def highest_serial(self, station: StationId) -> int:
        data = self._tables.get(fold.SERIALS, fold.station_key(station))
        return int.from_bytes(data, "big") if data else self._last_serial(fold.station_key(station))

    def tombstone(self, station: StationId, workflow: str, instance_id: str) -> r.TombRow | None:
        data = self._tables.get(fold.TOMBS, fold.tomb_key(fold.station_key(station), workflow, instance_id))
        return fold.decode_tomb(data) if data else None

    def to_delete(self, station: StationId, until_ms: int, limit: int) -> list[int]:
        return [serial for _, serial in self._due(fold.DELETIONS, station, until_ms, limit)]

    def tombs_due(self, station: StationId, until_ms: int) -> bool:
        return bool(self._due(fold.TOMB_DUE, station, until_ms, 1))

    def outbox(self, station: StationId, after: tuple[int, int], limit: int) -> list[tuple[int, r.Errand, r.OutboxRow]]:
        prefix = fold.station_key(station)
        serial, errand = after
        start = fold.serial_key(prefix, serial) + bytes((errand + 1,))
        return [(int.from_bytes(key[4:12], "big"), r.Errand(key[12]), fold.decode_outbox(data))
                for key, data in self._tables.scan(fold.OUTBOX, prefix, start, limit)]

    def has_errand(self, station: StationId, serial: int) -> bool:
        prefix = fold.serial_key(fold.station_key(station), serial)
        return bool(self._tables.keys(fold.OUTBOX, prefix, prefix, 1))

    def queue_position(self, station: StationId, workflow: str) -> int:
        data = self._tables.get(fold.QUEUE, fold.station_key(station) + workflow.encode())
        return int.from_bytes(data, "big") if data else 0

    def snapshots(self, station: StationId) -> list[r.SnapshotRow]:
        data = self._tables.get(fold.SNAPSHOTS, fold.station_key(station))
        return fold.decode_snapshots(data) if data else []

    def journal_bytes(self, station: StationId) -> int:
        data = self._tables.get(fold.SIZES, fold.station_key(station))
        return int.from_bytes(data, "big") if data else 0

    def leases(self, station: StationId) -> dict[str, r.LeaseRow]:
        prefix = fold.station_key(station)
        return {
            key[4:].decode(): _lease_decoder.decode(data)
            for key, data in self._pages(fold.LEASES, prefix, prefix)
        }

    def _last_serial(self, station: bytes) -> int:
        """Of a state from before that number was kept: binary search over the serials, which were dense then."""
        low, high = 0, 1 << 40
        while low < high:
            middle = (low + high + 1) // 2
            if self._tables.keys(fold.ROWS, station, fold.serial_key(station, middle), 1):
                low = middle
            else:
                high = middle - 1
        return low

    def _pages(self, table: int, prefix: bytes, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        while True:
            page = self._tables.scan(table, prefix, start, self.PAGE)
            yield from page
            if len(page) < self.PAGE:
                return
            start = page[-1][0] + b"\0"
