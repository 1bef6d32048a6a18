"""Takes snapshots of the stations that are here, and deletes those that nobody needs any more (protocol rule 5).

One is taken when the station's journal has grown by as much as the last one was large, so that all of them together
cost no more than the journal itself; and when a station that does little holds back the trimming for all the others.
A snapshot counts from its record on. The journal may go behind the second newest counting one, after that was read back
whole: so there are always two ways back.

Killed anywhere: an object without a record is an orphan, which the next owner deletes; a record without anything behind
it is a snapshot like any other. A pod that was deposed writes objects that nobody will ever count, and deletes none but
those of its own epoch and older ones that it knows to be superseded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from toque._logging import get_logger
from toque._subjects import StationId
from toque.errors import ToqueError
from toque.storage.ports import BusError, BusTimeout, NoResponders, StreamInfo
from toque.storage.records import SnapshotRow
from toque.storage.snapshot_format import SnapshotDamaged
from toque.storage.snapshots import CHUNK_BYTES_MAX, SnapshotFailed
from toque.workers.context import PodContext
from toque.workers.journal_trim import HELD_BACK_BYTES_MIN, JournalTrim, Kept
from toque.workers.station import Station

AGAIN_S = 30.0  # after one that could not be written

_log = get_logger("toque.snapshot")


@dataclass(frozen=True)
class SnapshotRules:
    """When snapshots are taken. Tests make them small."""

    journal_bytes_min: int = 16 * 1024 * 1024
    """So much of a station's journal at least lies between two of its snapshots."""
    held_back_bytes_min: int = HELD_BACK_BYTES_MIN
    """So much of the journal at least an idle station may hold back."""
    chunk_bytes_max: int = CHUNK_BYTES_MAX
    """Of one message of a snapshot."""


class SnapshotTaker:
    """Of one pod. `kept` is what each of its stations needs of the journal, as of the last `tick`."""

    def __init__(self, context: PodContext, trim: JournalTrim, rules: SnapshotRules) -> None:
        self._context = context
        self._trim = trim
        self._rules = rules
        self.kept: dict[StationId, Kept] = {}
        self._read_back: dict[StationId, str] = {}  # the last snapshot of a station that was read back, by name
        self._damaged: dict[StationId, str] = {}  # … and the last one that did not hold
        self._cleaned: dict[StationId, tuple[int, str]] = {}  # epoch and newest snapshot of the last cleaning
        self._not_before: dict[StationId, float] = {}

    async def tick(self, held: Iterable[Station], stations: list[StationId], info: StreamInfo) -> None:
        """Look after each station that is here, one by one. Call it once a second; `info` is of the journal."""
        here = list(held)
        self.kept = {station.id: self.kept[station.id] for station in here if station.id in self.kept}
        for station in here:
            if station.in_time() and not station.frozen:
                await asyncio.wait({station.spawn(self._look_after(station, stations, info))})

    async def _look_after(self, station: Station, stations: list[StationId], info: StreamInfo) -> None:
        """Ends with the station, at any await."""
        clock = self._context.clock
        if clock.boottime() < self._not_before.get(station.id, 0.0):
            return
        try:
            if why := self._why_now(station.id, stations, info):
                await self._take(station, why)
            await self._settle(station, info)
            await self._clean(station)
        except (BusTimeout, BusError, NoResponders, SnapshotFailed) as error:
            _log.warning("snapshot put off", station=str(station.id), why=str(error))
            self._not_before[station.id] = clock.boottime() + AGAIN_S
        except ToqueError as error:  # the session's deadline, or a store that says so itself
            _log.info("snapshot given up", station=str(station.id), why=str(error))

    def _why_now(self, station: StationId, stations: list[StationId], info: StreamInfo) -> str:
        """Why a snapshot is due, or ""."""
        store = self._context.store
        rows = store.snapshots(station)
        newest = rows[-1].record if rows else None
        grown = store.journal_bytes(station) - (newest.journal_bytes if newest else 0)
        if grown >= max(self._rules.journal_bytes_min, newest.size_bytes if newest else 0):
            return "its journal has grown"
        if len(rows) > 1 and rows[-2].record.name == self._damaged.get(station):
            return "an older one is damaged"
        if self._trim.holds_back(station, stations, info):
            return "it holds back the trimming of the journal"
        return ""

    async def _take(self, station: Station, why: str) -> None:
        objects = self._context.snapshots
        started = self._context.clock.boottime()
        export = self._context.store.export(station.id, objects.chunk_bytes)
        if export is None:
            return
        try:
            record = await objects.write(station.id, export, at=station.now_ms(), may_send=station.in_time)
        finally:
            export.close()
        await station.commits.commit(record)
        await self._context.store.flush()
        _log.info("snapshot taken", station=str(station.id), why=why, snapshot=record.name, rows=record.rows,
                  size_bytes=record.size_bytes, took_ms=int((self._context.clock.boottime() - started) * 1000))

    async def _settle(self, station: Station, info: StreamInfo) -> None:
        """Find out what the station needs of the journal."""
        store = self._context.store
        rows = store.snapshots(station.id)
        total = store.journal_bytes(station.id)
        newest_bytes = rows[-1].record.size_bytes if rows else 0
        kept = Kept(0, station.commits.tail, total, newest_bytes)
        if len(rows) > 1:
            second, newest = rows[-2:]
            if second.covers >= info.first_sequence and not await self._holds(station.id, second):
                return
            kept = Kept(second.covers, newest.recorded, total - second.record.journal_bytes, newest_bytes)
        self.kept[station.id] = kept

    async def _holds(self, station: StationId, row: SnapshotRow) -> bool:
        """Read it back whole, once: from then on the journal may go behind it."""
        name = row.record.name
        if name not in (self._read_back.get(station), self._damaged.get(station)):
            try:
                await self._context.snapshots.check(station, row.record)
                self._read_back[station] = name
            except SnapshotDamaged as error:
                _log.error("a snapshot is damaged", station=str(station), snapshot=name, why=str(error),
                           remedy="the journal is kept, and another one is taken; see to the broker's disk")
                self._damaged[station] = name
        return self._read_back.get(station) == name

    async def _clean(self, station: Station) -> None:
        """Delete what does not count, and what newer ones have superseded; nothing of a later epoch."""
        rows = self._context.store.snapshots(station.id)
        epoch = station.commits.tail.header.epoch
        now = (epoch, rows[-1].record.name if rows else "")
        if self._cleaned.get(station.id) == now:
            return
        counting = {row.record.name for row in rows}
        for name in await self._context.snapshots.names(station.id):
            if str(name) not in counting and name.epoch <= epoch and station.in_time():
                await self._context.snapshots.delete(station.id, name)
        self._cleaned[station.id] = now
