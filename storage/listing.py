"""Pages of a station's instances, in the order of their serials: what is looked at, and what of that is wanted.

A filter by workflow or status reads the table of states, one by id the table of ids, so that few among many are found
without looking at all. Each page looks at a bounded number of instances and says where it stopped, which is a serial:
it means the same in every store that holds the station's state, so lists go on wherever the station is owned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, Protocol

from toque._subjects import StationId
from toque.storage import fold
from toque.storage import records as r
from toque.storage.ports import RowPage, RowQuery

ROWS_PER_SCAN: Final = 100
ID_MATCHES_MAX: Final = 1000  # with more ids of a prefix than this, instances are looked at one by one
CLOCK_SLACK_MS: Final = 60_000  # by which times of admission may be out of the order of serials
SERIALS_END: Final = 1 << 63


class Tables(fold.Lookup, Protocol):
    """Sorted tables of bytes."""

    def scan(self, table: int, prefix: bytes, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """At most `limit` rows whose key begins with `prefix` and is not below `start`, in order."""
        ...

    def scan_back(self, table: int, prefix: bytes, below: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """At most `limit` rows whose key begins with `prefix` and is below `below`, the last one first."""
        ...


class Listing:
    """Of all stations whose state is in the tables."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def page(self, station: StationId, query: RowQuery) -> RowPage:
        """See `toque.storage.ports.Store`."""
        rows: list[tuple[int, r.InstanceRow]] = []
        if _is_exact(query):
            query = replace(query, look_max=min(query.limit, query.look_max))
        for looked, (serial, row) in enumerate(self._candidates(fold.station_key(station), query), 1):
            if row is not None and query.wants(row):
                rows.append((serial, row))
            if len(rows) == query.limit or looked == query.look_max:
                return RowPage(rows, serial)
        return RowPage(rows, 0)

    def _candidates(self, station: bytes, query: RowQuery) -> Iterator[tuple[int, r.InstanceRow | None]]:
        span = self._span(station, query)
        serials = self._by_id(station, query) if query.id_prefix else None
        if serials is None and (query.workflow or query.statuses):
            serials = self._by_state(station, query, span)
        if serials is None:
            return self._rows(station, query, span)
        within = sorted((serial for serial in set(serials) if serial in span), reverse=query.newest)
        return ((serial, self._row(station, serial)) for serial in within)

    def _row(self, station: bytes, serial: int) -> r.InstanceRow | None:
        data = self._tables.get(fold.ROWS, fold.serial_key(station, serial))
        return fold.decode_row(data) if data else None

    def _rows(self, station: bytes, query: RowQuery, span: range) -> Iterator[tuple[int, r.InstanceRow]]:
        while found := self._scan(fold.ROWS, station, span, min(ROWS_PER_SCAN, query.look_max), newest=query.newest):
            for serial, data in found:
                yield serial, fold.decode_row(data)
            span = range(span.start, serial) if query.newest else range(serial + 1, span.stop)

    def _scan(self, table: int, prefix: bytes, span: range, limit: int, *, newest: bool) -> list[tuple[int, bytes]]:
        """Serials in the span that stand behind the prefix, with their values, in the wanted order."""
        if newest:
            found = self._tables.scan_back(table, prefix, fold.serial_key(prefix, span.stop), limit)
        else:
            found = self._tables.scan(table, prefix, fold.serial_key(prefix, span.start), limit)
        serials = ((int.from_bytes(key[len(prefix):], "big"), value) for key, value in found)
        return [(serial, value) for serial, value in serials if serial in span]

    # -- by id and by state ------------------------------------------------------------------------------------------

    def _by_id(self, station: bytes, query: RowQuery) -> list[int] | None:
        """Every serial whose id begins so; None when there are too many."""
        serials: list[int] = []
        for workflow in {workflow for workflow, _ in self._counted(station, query)}:
            prefix = fold.id_key(station, workflow, query.id_prefix)
            found = self._tables.scan(fold.IDS, prefix, prefix, ID_MATCHES_MAX + 1)
            serials += [int.from_bytes(value, "big") for _, value in found]
            if len(serials) > ID_MATCHES_MAX:
                return None
        return serials

    def _by_state(self, station: bytes, query: RowQuery, span: range) -> list[int]:
        """The first so many serials of each state, as many as are looked at in all.

        The live ones are read first: one that ends meanwhile is seen in both places rather than in neither.
        """
        states = [(workflow, status) for workflow, status in self._counted(station, query)
                  if query.workflow in ("", workflow) and (not query.statuses or status in query.statuses)]
        serials: list[int] = []
        running = any(status is r.Status.RUNNING for _, status in states)
        if running:
            serials += [serial for serial, _ in self._scan(fold.LIVE, station, span, query.look_max, newest=query.newest)]
        for workflow, status in states:
            if status.ended or not running:
                prefix = fold.count_key(station, workflow, status)
                found = self._scan(fold.STATES, prefix, span, query.look_max, newest=query.newest)
                serials += [serial for serial, _ in found]
        return serials

    def _counted(self, station: bytes, query: RowQuery) -> list[tuple[str, r.Status]]:
        """Every workflow and status that instances have, or had; only of the wanted workflow, if it is said."""
        prefix = station + query.workflow.encode() + b"\0" if query.workflow else station
        found: list[tuple[str, r.Status]] = []
        start = prefix
        while page := self._tables.scan(fold.COUNTS, prefix, start, ROWS_PER_SCAN):
            for key, _ in page:
                workflow, _, status = key[len(station):].partition(b"\0")
                found.append((workflow.decode(), r.Status(status[0])))
            start = page[-1][0] + b"\0"
        return found

    # -- by time -----------------------------------------------------------------------------------------------------

    def _span(self, station: bytes, query: RowQuery) -> range:
        """The serials that may be wanted: an instance is admitted after its creation, and before its end."""
        start, stop = 1, SERIALS_END
        if query.created_after:
            start = self._admitted_from(station, query.created_after - CLOCK_SLACK_MS)
        if query.ended_before:
            stop = self._admitted_from(station, query.ended_before + CLOCK_SLACK_MS)
        if query.after:
            start, stop = (start, min(stop, query.after)) if query.newest else (max(start, query.after + 1), stop)
        return range(start, max(start, stop))

    def _admitted_from(self, station: bytes, time_ms: int) -> int:
        """A serial below which all were admitted before that time; those from it on at that time or later."""
        newest = self._tables.scan_back(fold.ROWS, station, fold.serial_key(station, SERIALS_END), 1)
        low, high = 1, int.from_bytes(newest[0][0][len(station):], "big") + 1 if newest else 1
        while low < high:
            middle = (low + high) // 2
            [(key, data)] = self._tables.scan(fold.ROWS, station, fold.serial_key(station, middle), 1)
            if fold.decode_row(data).admitted_at >= time_ms:
                high = middle
            else:
                low = int.from_bytes(key[len(station):], "big") + 1
        return low


def _is_exact(query: RowQuery) -> bool:
    """Whether the table of states has those that are wanted and no others: then nothing is looked at in vain."""
    bounded = query.created_after or query.created_before or query.ended_after or query.ended_before
    stated = bool(query.statuses) and r.Status.RUNNING not in query.statuses
    return stated and not query.id_prefix and not bounded
