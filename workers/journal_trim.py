"""Keeps the journal short: purges its front, behind what every station has in counting snapshots (protocol rule 5).

Each pod tells once a second, for each of its stations, up to which sequence the journal may go for that station's sake.
The owner of station 0 purges the whole stream, without a filter, up to the lowest of them: one cut at the front, for
holes inside make the server slow for whoever has to cross them (docs/decisions/0008). A station that told nothing holds
everything back.

What was told stays true whoever owns the station later, for it follows from accepted records; but a broker may lose
those (rule 27). So each station names a witness, its newest Snapshot record, and before a purge every witness must still
stand in the journal, behind the cut: a station's last message is never purged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from toque import _subjects as subjects
from toque._logging import get_logger
from toque._subjects import StationId
from toque.storage.journal import Journal
from toque.storage.ports import Bus, BusError, BusTimeout, Message, NoResponders, StreamInfo
from toque.storage.records import Position

HELD_BACK_BYTES_MIN = 64 * 1024 * 1024  # of the journal that only idle stations keep from being trimmed

_log = get_logger("toque.trim")


class Kept(msgspec.Struct, array_like=True, frozen=True):
    """What one station needs of the journal."""

    covered: int  # the journal may go up to and with this sequence; 0 = nothing of it
    witness: Position  # a group behind `covered`
    kept_bytes: int  # of the station's own journal, behind `covered`
    snapshot_bytes: int  # of its newest counting snapshot


class Told(msgspec.Struct):
    """What a pod tells: by station."""

    stations: dict[str, Kept]


_decoder = msgspec.msgpack.Decoder(Told)


class JournalTrim:
    """One pod's part. `owns_first` tells whether this pod has station 0 now."""

    def __init__(self, bus: Bus, journal: Journal, account: str, *, owns_first: Callable[[], bool],
                 held_back_bytes_min: int = HELD_BACK_BYTES_MIN) -> None:
        self._bus = bus
        self._journal = journal
        self._account = account
        self._owns_first = owns_first
        self._held_back_bytes_min = held_back_bytes_min
        self._known: dict[str, Kept] = {}

    def heard(self, message: Message) -> None:
        """Another pod, or this one, told what its stations need."""
        try:
            told = _decoder.decode(message.data)
        except msgspec.MsgspecError:
            return  # of a newer version: its stations hold the journal until it speaks to its like
        for station, kept in told.stations.items():
            known = self._known.get(station)
            if known is None or kept.covered >= known.covered:
                self._known[station] = kept

    def holds_back(self, station: StationId, stations: list[StationId], info: StreamInfo) -> bool:
        """Whether it is for this station's sake that the journal keeps much that no station needs."""
        known = [self._known[str(each)] for each in stations if str(each) in self._known]
        own = self._known.get(str(station))
        if own is None or len(known) < len(stations) or own.covered > min(kept.covered for kept in known):
            return False
        needed = sum(kept.kept_bytes for kept in known)
        snapshots = sum(kept.snapshot_bytes for kept in known)
        return info.stored_bytes - needed >= max(self._held_back_bytes_min, needed, snapshots)

    async def tick(self, own: Mapping[StationId, Kept], stations: list[StationId], info: StreamInfo) -> None:
        """Tell what the own stations need, and purge if it is this pod's turn. Call it once a second."""
        told = Told({str(station): kept for station, kept in own.items()})
        self._bus.emit(subjects.journal_positions(self._account), msgspec.msgpack.encode(told))
        if self._owns_first():
            try:
                await self._purge([str(station) for station in stations], info)
            except (BusTimeout, BusError, NoResponders) as error:
                _log.info("trimming put off", why=str(error))

    async def _purge(self, stations: list[str], info: StreamInfo) -> None:
        if not all(station in self._known for station in stations):
            return
        cut = min(self._known[station].covered for station in stations)
        if cut < info.first_sequence:
            return
        for station in stations:
            witness = self._known[station].witness
            if witness.sequence <= cut or not await self._journal.holds(witness):
                _log.warning("journal not trimmed", station=station, cut=cut,
                             why="it does not hold what the station told of")
                del self._known[station]
                return
        if self._owns_first():
            purged = await self._bus.purge(subjects.journal_stream(self._account), ">", cut + 1)
            _log.info("journal trimmed", up_to=cut, messages=purged)
