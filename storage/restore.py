"""Brings a pod's store up to a claim: from its own state, from a counting snapshot, or from the whole journal (rules 3, 5).

Nothing is believed that the journal does not bear out. The own state counts when the journal holds its last group, or
when that is the place of a counting snapshot. A snapshot counts when its record stands in the journal behind its
position; one that is damaged, or that the journal does not continue, is passed over for the next older one. When nothing
connects, the station halts: going on would mean forgetting.

Killed anywhere: the store has no position for the station, or that of a group that it holds with all before it.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import NamedTuple

from toque._logging import get_logger
from toque._subjects import StationId
from toque.storage.journal import Journal, JournalGap, JournalHalted
from toque.storage.ports import Store, StoreDamaged
from toque.storage.records import Position, Snapshot
from toque.storage.snapshot_format import SnapshotDamaged
from toque.storage.snapshots import Name, SnapshotObjects

APPLIED_BYTES_MAX = 32 * 1024 * 1024  # read and not folded yet

ANOTHER_HISTORY = "the journal does not hold its position: it is of another history"

LOCAL, SNAPSHOT, JOURNAL = "local", "snapshot", "journal"

_log = get_logger("toque.restore")


class Restored(NamedTuple):
    """What a station was read back from."""

    source: str  # LOCAL, SNAPSHOT or JOURNAL
    snapshot: str = ""  # its name
    rows: int = 0  # of the snapshot
    groups: int = 0  # of the journal


class Restore:
    """One station, up to and with the group of a claim that was accepted."""

    def __init__(self, store: Store, journal: Journal, objects: SnapshotObjects, station: StationId,
                 claim: Position) -> None:
        self._store = store
        self._journal = journal
        self._objects = objects
        self._station = station
        self._claim = claim

    async def run(self) -> Restored:
        """Raises JournalHalted when nothing connects, or for a damaged journal; BusError, BusTimeout, NoResponders."""
        await self._store.flush()
        restored = await self._from_local()
        if restored is None:
            await self._store.drop(self._station)
            restored = await self._from_snapshots() or await self._from_start()
        if not self._store.is_indexed(self._station):
            for rows in self._store.index_rows(self._station):
                await self._store.load(self._station, rows)
        position = self._store.position(self._station)
        if position != self._claim:
            raise JournalHalted(f"station {self._station}: read back up to {position}, and the claim is {self._claim}")
        return restored

    async def _from_local(self) -> Restored | None:
        position = self._store.position(self._station)
        if position is None:
            return None
        why = await self._doubt(position)
        if why == ANOTHER_HISTORY:
            place = await self._set_aside()
            _log.error("state of another history set aside", station=str(self._station), position=position.header.text(),
                       file=place, why="was the broker restored from an older copy, and have others gone on over the "
                                       "loss? What had been acknowledged before is in this file alone")
            return None
        if not why:
            try:
                return Restored(LOCAL, groups=await self._follow(position))
            except JournalGap as gap:
                why = str(gap)
        _log.warning("local state set aside", station=str(self._station), why=why)
        return None

    async def _doubt(self, position: Position) -> str:
        """Why the own state cannot be built upon, or ""."""
        if await self._journal.holds(position):
            return ""
        if not await self._journal.trimmed(position):
            return ANOTHER_HISTORY
        record = await self._counting(Name.of(position))
        if record is not None and record.position == position:
            return ""
        return "the journal was trimmed beyond its position"

    async def _set_aside(self) -> str:
        try:
            return await self._store.set_aside(self._station)
        except StoreDamaged as error:
            return f"none: {error}"

    async def _from_snapshots(self) -> Restored | None:
        for name in reversed(await self._objects.names(self._station)):
            record = await self._counting(name)
            if record is None:
                _log.info("snapshot passed over", station=str(self._station), snapshot=str(name),
                          why="it does not count: the journal holds no record of it")
                continue
            try:
                await self._load(record)
                groups = await self._follow(record.position)
            except (SnapshotDamaged, JournalGap) as error:
                _log.error("snapshot passed over", station=str(self._station), snapshot=str(name), why=str(error))
                await self._store.drop(self._station)
            else:
                return Restored(SNAPSHOT, str(name), record.rows, groups)
        return None

    async def _from_start(self) -> Restored:
        try:
            return Restored(JOURNAL, groups=await self._follow(None))
        except JournalGap as gap:
            raise JournalHalted(f"{gap}, and no counting snapshot leads there. See to the stream of snapshots: what the "
                                f"station had done before is in there, or lost") from gap

    async def _counting(self, name: Name) -> Snapshot | None:
        return await self._journal.counting(self._station, str(name), after=name.sequence, until=self._claim.sequence)

    async def _load(self, record: Snapshot) -> None:
        """The position comes last, when everything of the object has held."""
        async with aclosing(self._objects.read(self._station, record)) as chunks:
            async for rows in chunks:
                await self._store.load(self._station, rows)
        await self._store.load(self._station, (), record.position)

    async def _follow(self, after: Position | None) -> int:
        """Fold the journal from there up to the claim. Returns how many groups."""
        groups = waiting = 0
        async with aclosing(self._journal.read(self._station, after=after, until=self._claim.sequence)) as found:
            async for group in found:
                self._store.apply(group)
                groups += 1
                waiting += sum(map(len, group.encoded))
                if waiting > APPLIED_BYTES_MAX:
                    await self._store.flush()
                    waiting = 0
        await self._store.flush()
        return groups
