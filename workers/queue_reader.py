"""Reads one workflow's queue for all stations of a pod, through one disposable consumer (protocol rule 11).

The server's consumer state proves nothing: with each change of the pod's stations a fresh consumer sees everything that
is still in the stream, in stream order, and the SousChefs drop what their journal knows. Messages leave the stream by
the owner's purge behind its committed position only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from toque import _subjects as subjects
from toque._subjects import StationId
from toque.storage.ports import Bus, BusError, BusTimeout, Feed, FeedSpec, Message, NoResponders
from toque.workers.slots import Slots
from toque.workers.souschef import SousChef

PURGE_EVERY_S = 1.0
LUMP_MIN, LUMP_MAX = 1_000, 10_000
LUMP_OF_LIMIT = 0.05
DEEP, DEEP_TICKS = 100_000, 10

_log = structlog.get_logger("toque.queue")


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
        self._feed: Feed | None = None
        self._outstanding = 0
        self._created = ""
        self._depth = 0
        self._changed = asyncio.Event()
        self._purged: dict[StationId, int] = {}

    def add(self, souschef: SousChef) -> None:
        """Read for a station too, from the next consumer on."""
        self._souschefs[souschef.station] = souschef
        self._changed.set()

    def remove(self, station: StationId) -> None:
        """Messages for the station are ignored from here on."""
        self._souschefs.pop(station, None)
        self._purged.pop(station, None)

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
                    await asyncio.sleep(PURGE_EVERY_S)
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
        info = await self._bus.stream_info(self._stream)
        if info.created != self._created:  # no cursor outlives its stream
            self._created = info.created
            for souschef in self._souschefs.values():
                souschef.committed = 0
            self._purged.clear()
        filters = tuple(f"{subjects.queue_prefix(self._account, self.workflow, station)}.*"
                        for station in sorted(self._souschefs))
        self._outstanding = 0
        self._feed = await self._bus.open_feed(
            FeedSpec(stream=self._stream, filters=filters, name=f"pod-{self._session}"), self._arrived)
        self.top_up()

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
            token = subjects.parse_queue(message.subject)
            souschef = self._souschefs.get(token.station)
            if souschef is not None:
                souschef.offer(token.instance_id, message)
        self._slots.kick()
        if self._outstanding == 0:
            self.top_up()

    async def purge(self, queue_limit: int, *, tick: int) -> None:
        """Remove what is committed: big lumps, or what there is (each second; each tenth when the queue is deep, for a
        purge there stalls the stream longer). A stream that was made anew is left alone."""
        lump = int(min(LUMP_MAX, max(LUMP_MIN, queue_limit * LUMP_OF_LIMIT / max(1, len(self._souschefs)))))
        all_of_it = self._depth < DEEP or tick % DEEP_TICKS == 0
        behind = [
            souschef for souschef in self._souschefs.values()
            if souschef.committed > self._purged.get(souschef.station, 0) and (all_of_it or souschef.uncleared >= lump)
        ]
        if not behind:
            return
        info = await self._bus.stream_info(self._stream)
        self._depth = info.messages
        if info.created != self._created:
            self._changed.set()
            return
        for souschef in behind:
            position = souschef.committed
            if not souschef.may_purge():
                continue
            souschef.uncleared = 0
            prefix = subjects.queue_prefix(self._account, self.workflow, souschef.station)
            await self._bus.purge(self._stream, f"{prefix}.*", position + 1)
            self._purged[souschef.station] = position
