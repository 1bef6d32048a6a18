"""Reads one workflow's queue for all stations of a pod, through one disposable consumer (protocol rule 11).

The server's consumer state proves nothing: with each change of the pod's stations a fresh consumer sees everything that
is still in the stream, in stream order, and the SousChefs drop what their journal knows. What may leave the stream is
told as committed positions; `toque.workers.queue_purge` sees to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from toque import _subjects as subjects
from toque._logging import get_logger
from toque._subjects import StationId
from toque.storage.ports import Bus, BusError, BusTimeout, Feed, FeedSpec, Message, NoResponders
from toque.workers.slots import Slots
from toque.workers.souschef import SousChef

RETRY_S = 1.0
UNDER_WAY_POLL_S = 0.02

_log = get_logger("toque.queue")


class QueueReader:
    """One workflow's queue at one pod."""

    def __init__(self, bus: Bus, account: str, workflow: str, slots: Slots, *, session: str) -> None:
        self._bus = bus
        self._account = account
        self.workflow = workflow
        self._stream = subjects.queue_stream(account, workflow)
        self._slots = slots
        self._session = session
        self._souschefs: dict[StationId, SousChef] = {}
        self._untransformed: StationId | None = None  # who parks what the server's transform passes over
        self._feed: Feed | None = None
        self._outstanding = 0
        self.created = ""  # which stream it is: positions are worth nothing in another one
        self._changed = asyncio.Event()

    def add(self, souschef: SousChef) -> None:
        """Read for a station too, from the next consumer on."""
        self._souschefs[souschef.station] = souschef
        self._changed.set()

    def remove(self, station: StationId) -> None:
        """Messages for the station are ignored from here on."""
        self._souschefs.pop(station, None)

    async def run(self) -> None:
        """Follow the changes of the stations until cancelled."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                try:
                    await self._reopen()
                except (BusError, BusTimeout, NoResponders) as error:
                    _log.warning("queue not readable", workflow=self.workflow, error=str(error))
                    await asyncio.sleep(RETRY_S)
                    self._changed.set()
        finally:
            if self._feed is not None:
                await self._feed.close()

    async def _reopen(self) -> None:
        if self._feed is not None:
            feed, self._feed = self._feed, None
            await feed.close()
        for souschef in self._souschefs.values():
            souschef.forget_buffer()
        if not self._souschefs:
            return
        created = (await self._bus.stream_info(self._stream)).created
        if self.created not in ("", created):
            await self._forget_stream()
        self.created = created
        self._outstanding = 0
        filters = self._filters()
        if not filters:
            return  # the last station has left meanwhile
        self._feed = await self._bus.open_feed(
            FeedSpec(stream=self._stream, filters=filters, name=f"pod-{self._session}"), self._arrived)
        self.top_up()

    async def _forget_stream(self) -> None:
        """Sequences of the stream that was there before mean other messages in this one."""
        while any(souschef.under_way for souschef in self._souschefs.values()):
            await asyncio.sleep(UNDER_WAY_POLL_S)  # their records carry sequences of the other stream
        for souschef in self._souschefs.values():
            souschef.forget_stream()

    def _filters(self) -> tuple[str, ...]:
        """The subjects of our stations; with station 0 also creations whose id is a wildcard, `*` or `>`.

        The server acknowledges those too, but stores them as they came: no transform, so no station. Unread, they would
        vanish with the next purge.
        """
        filters = [f"{subjects.queue_prefix(self._account, self.workflow, station)}.*"
                   for station in sorted(self._souschefs)]
        self._untransformed = max((station for station in self._souschefs if station.number == 0), default=None)
        if self._untransformed is not None:
            filters.append(subjects.create(self._account, self.workflow, ">"))
        return tuple(filters)

    def _addressee(self, subject: str) -> tuple[StationId | None, str]:
        """The station of a message, and the id in its subject."""
        as_it_came = subjects.create(self._account, self.workflow, "")
        if subject.startswith(as_it_came):
            return self._untransformed, subject.removeprefix(as_it_came)
        token = subjects.parse_queue(subject)
        return token.station, token.instance_id

    def top_up(self) -> None:
        """Pull as many as there are slots for, and a bounded prefetch; one pull is always open."""
        if self._feed is None:
            return
        buffered = sum(souschef.waiting for souschef in self._souschefs.values())
        target = self._slots.free + self._slots.prefetch
        missing = target - buffered - self._outstanding
        if missing > 0 and (self._outstanding == 0 or missing >= target // 4):
            self._outstanding += missing
            self._feed.want(missing)

    def _arrived(self, messages: Sequence[Message]) -> None:
        self._outstanding = max(0, self._outstanding - len(messages))
        for message in messages:
            station, instance_id = self._addressee(message.subject)
            souschef = self._souschefs.get(station) if station is not None else None
            if souschef is not None:
                souschef.offer(instance_id, message)
        self._slots.kick()
        if self._outstanding == 0:
            self.top_up()

    async def positions(self) -> dict[StationId, int]:
        """The committed position of each station, and of what lies before it nothing is queued any more.

        Empty when the stream was made anew since: then it is read again from its start. Empty too when the consumer is
        another one by now, or will be: what was asked of this one is not true of a station that joined, nor of a buffer
        that was forgotten.
        """
        feed = self._feed
        if feed is None:
            return {}
        clear_to = await feed.clear_to()
        info = await self._bus.stream_info(self._stream)
        if self._feed is not feed or self._changed.is_set():
            return {}
        if info.created != self.created:
            self._changed.set()
            return {}
        for souschef in self._souschefs.values():
            souschef.purged(info.first_sequence)
        return {station: souschef.committed(clear_to) for station, souschef in self._souschefs.items()}

    async def clear_backlog(self, handled_max: int) -> None:
        """Purge a station's own subjects when too much of what it has handled waits for another, slower station.

        Only then: holes in the stream slow that station down even more (see `Bus.purge`). Call it right after `positions`
        has told some, so that the stream is surely the one that was read.
        """
        for souschef in list(self._souschefs.values()):
            if len(souschef.handled) > handled_max and souschef.may_purge():
                prefix = subjects.queue_prefix(self._account, self.workflow, souschef.station)
                below = souschef.committed(souschef.handled[-1]) + 1
                souschef.purged(below)
                await self._bus.purge(self._stream, f"{prefix}.*", below)
