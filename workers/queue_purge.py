"""Removes from the queue streams and the event stream what every station has committed.

Each pod tells its stations' committed positions once a second. The owner of station 0 purges each stream, without a
filter, up to the lowest position of all its stations: one cut at the front. Purging each station's own subjects apart
would leave holes between the others' messages, and a consumer that crosses them becomes a hundred times slower
(docs/decisions/0008). A position stays true whoever owns the station later, for it counts accepted records only; it is
worth nothing in a stream that was made anew, so it names the stream's creation.

Killed anywhere: what was not purged is dropped by its id when it is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from toque import _subjects as subjects
from toque._logging import get_logger
from toque._subjects import StationId
from toque.storage.fold import EVENTS_KEY
from toque.storage.ports import Bus, BusError, BusTimeout, Message, NoResponders
from toque.workers.stream_reader import StreamReader

EVERY_S = 1.0
DEEP = 100_000  # messages: from here on a purge stalls the stream for longer, so it takes bigger lumps
DEEP_TICKS = 10
LUMP_MIN, LUMP_MAX = 1_000, 10_000
LUMP_OF_LIMIT = 0.05

_log = get_logger("toque.purge")


class Positions(msgspec.Struct):
    """What a pod tells: by workflow, the stream's creation and the committed position of each of its stations.

    The event stream's stand under EVENTS_KEY, which is no workflow's name.
    """

    workflows: dict[str, tuple[str, dict[str, int]]]


_decoder = msgspec.msgpack.Decoder(Positions)


def lump(queue_limit: int, stations: int) -> int:
    """How many handled messages of a station may lie in the stream: the queue limit keeps that reserve."""
    return int(min(LUMP_MAX, max(LUMP_MIN, queue_limit * LUMP_OF_LIMIT / max(1, stations))))


class QueuePurge:
    """One pod's part. `owns_first` tells whether this pod has station 0 now."""

    def __init__(self, bus: Bus, account: str, *, owns_first: Callable[[], bool]) -> None:
        self._bus = bus
        self._account = account
        self._owns_first = owns_first
        self._known: dict[str, tuple[str, dict[str, int]]] = {}
        self._purged: dict[str, int] = {}
        self._tick = 0

    def heard(self, message: Message) -> None:
        """Another pod, or this one, told its positions."""
        try:
            told = _decoder.decode(message.data)
        except msgspec.MsgspecError:
            return  # of a newer version: its stations hold the purge back until it speaks to its like
        for workflow, (created, positions) in told.workflows.items():
            known_created, known = self._known.get(workflow, ("", {}))
            if known_created != created:
                known = {}
                self._purged.pop(workflow, None)
            for station, position in positions.items():
                known[station] = max(position, known.get(station, 0))
            self._known[workflow] = (created, known)

    async def tick(self, readers: Iterable[StreamReader[Any]], stations: list[StationId], queue_limit: int) -> None:
        """Tell the own positions, and purge if it is this pod's turn. Call it each EVERY_S."""
        self._tick += 1
        told: dict[str, tuple[str, dict[str, int]]] = {}
        for reader in readers:
            try:
                positions = await reader.positions()
                if positions:
                    await reader.clear_backlog(2 * lump(queue_limit, len(stations)))
            except (BusTimeout, BusError, NoResponders) as error:
                _log.info("positions not known", workflow=reader.workflow, why=str(error))
                continue
            told[reader.workflow] = (reader.created, {str(station): at for station, at in positions.items()})
        self._bus.emit(subjects.queue_positions(self._account), msgspec.msgpack.encode(Positions(told)))
        if self._owns_first():
            for workflow in list(self._known):
                try:
                    await self._purge(workflow, [str(station) for station in stations])
                except (BusTimeout, BusError, NoResponders) as error:
                    _log.info("purge put off", workflow=workflow, why=str(error))

    async def _purge(self, workflow: str, stations: list[str]) -> None:
        created, known = self._known[workflow]
        position = min((known.get(station, 0) for station in stations), default=0)
        done = self._purged.get(workflow, 0)
        if position <= done:
            return
        events = workflow == EVENTS_KEY
        stream = subjects.event_stream(self._account) if events else subjects.queue_stream(self._account, workflow)
        info = await self._bus.stream_info(stream)
        if info.created != created:
            del self._known[workflow]
            return
        if info.first_sequence > position or (info.messages > DEEP and self._tick % DEEP_TICKS):
            return
        await self._bus.purge(stream, ">", position + 1)
        self._purged[workflow] = position
