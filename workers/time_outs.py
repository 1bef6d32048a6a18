"""Decides when a wait's time-out may be recorded: when no event can have come before it any more (protocol rule 23).

After the deadline the event stream's last sequence for the station is read from the leader, and the time-out waits until
this pod's reader has passed it: an event that was acknowledged before the deadline wins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from toque import _subjects as subjects
from toque._logging import get_logger
from toque.errors import Unavailable
from toque.storage.ports import BusError, NoResponders

if TYPE_CHECKING:
    from toque.workers.event_inbox import Key
    from toque.workers.event_reader import EventReader
    from toque.workers.station import Station

AGAIN_S = 0.05
AWAY_S = 0.5

_log = get_logger("toque.events")


class TimeOuts:
    """The time-outs of one station. Many that are due at once share one look at the stream."""

    def __init__(self, station: Station) -> None:
        self._station = station
        self.reader: EventReader | None = None  # None: nobody reads the stream for the station just now
        self._asked: list[tuple[Key, Callable[[], None]]] = []
        self._running = False

    def ask(self, key: Key, decide: Callable[[], None]) -> None:
        """Call `decide` when every event for the instance that was acknowledged before now is recorded or parked."""
        self._asked.append((key, decide))
        if not self._running:
            self._running = True
            self._station.spawn(self._run())

    async def _run(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, []
            last = await self._passed()
            while asked:
                ready = [one for one in asked if self._station.events.has_passed(one[0], last)]
                for _, decide in ready:
                    asyncio.get_running_loop().call_soon(decide)  # it runs the instance: not inside a task
                asked = [one for one in asked if one not in ready]
                if asked:
                    await asyncio.sleep(AGAIN_S)
        self._running = False

    async def _passed(self) -> int:
        """The stream's last sequence for the station, after this pod has read up to there."""
        while True:
            try:
                last = await self._last()
                while last and not await self._is_read(last):
                    await asyncio.sleep(AGAIN_S)
                return last
            except (Unavailable, BusError, NoResponders) as error:
                _log.info("time-outs wait for the event stream", station=str(self._station.id), why=str(error))
                await asyncio.sleep(AWAY_S)

    async def _is_read(self, last: int) -> bool:
        """Not by a reader that the station was taken from: that passes over what comes for it."""
        reader, inbox = self.reader, self._station.events
        return reader is not None and await reader.clear_to() >= last and reader.reads(inbox)

    async def _last(self) -> int:
        bus, account = self._station.context.bus, self._station.account
        try:
            message = await bus.last_message(subjects.event_stream(account), subjects.events_of(account, self._station.id))
        except BusError as error:
            if error.code != BusError.STREAM_NOT_FOUND:
                raise
            return 0  # nobody can have published an event
        return message.sequence if message is not None else 0
