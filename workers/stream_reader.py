"""Reads one stream for all stations of a pod, through one disposable consumer (protocol rule 11).

The server's consumer state proves nothing: with each change of the pod's stations a fresh consumer sees everything that
is still in the stream, in stream order, and the stations drop what their journal knows. What may leave the stream is
told as committed positions; `toque.workers.queue_purge` sees to it. Queues and the event stream are read so.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from toque._logging import get_logger
from toque._subjects import StationId
from toque.storage.ports import Bus, BusError, BusTimeout, Feed, FeedSpec, Message, NoResponders

RETRY_S = 1.0
UNDER_WAY_POLL_S = 0.02

_log = get_logger("toque.queue")


class Inbox(Protocol):
    """What a station makes of the stream's messages for it."""

    station: StationId

    @property
    def handled(self) -> deque[int]:
        """Sequences that are committed and still in the stream."""
        ...

    @property
    def under_way(self) -> bool:
        """Whether a record that carries a sequence of the stream is not accepted yet."""
        ...

    def committed(self, clear_to: int) -> int:
        """The sequence up to which all is seen to; `clear_to`: up to there the reader has offered every message."""
        ...

    def purged(self, first_sequence: int) -> None: ...

    def forget_buffer(self) -> None:
        """A fresh consumer delivers all of it again."""
        ...

    def forget_stream(self) -> None:
        """The stream was made anew. Called with nothing under way."""
        ...

    def may_purge(self) -> bool:
        """Whether the station is surely still ours."""
        ...


InboxT = TypeVar("InboxT", bound=Inbox)


class StreamReader(Generic[InboxT]):
    """One stream at one pod. `workflow` is the key under which its positions are told."""

    def __init__(self, bus: Bus, account: str, workflow: str, stream: str, *, session: str) -> None:
        self._bus = bus
        self._account = account
        self.workflow = workflow
        self.stream = stream
        self._session = session
        self._inboxes: dict[StationId, InboxT] = {}
        self._feed: Feed | None = None
        self._outstanding = 0
        self.created = ""  # which stream it is: positions are worth nothing in another one
        self._changed = asyncio.Event()

    # -- of one kind of stream -----------------------------------------------------------------------------------------

    def _own(self, station: StationId) -> str:
        """Filter of a station's messages."""
        raise NotImplementedError

    def _filters(self) -> tuple[str, ...]:
        raise NotImplementedError

    def _offer(self, message: Message) -> None:
        raise NotImplementedError

    def _target(self) -> int:
        """So many messages may be on their way here, less those that wait here."""
        raise NotImplementedError

    def _waiting(self) -> int:
        raise NotImplementedError

    def _all_offered(self) -> None:
        """A batch has come."""

    # -- life ----------------------------------------------------------------------------------------------------------

    def add(self, inbox: InboxT) -> None:
        """Read for a station too, from the next consumer on."""
        self._inboxes[inbox.station] = inbox
        self._changed.set()

    def remove(self, station: StationId) -> None:
        """Messages for the station are ignored from here on."""
        self._inboxes.pop(station, None)

    def reads(self, inbox: InboxT) -> bool:
        """Whether what comes for the station is offered to this inbox."""
        return self._inboxes.get(inbox.station) is inbox

    async def run(self) -> None:
        """Follow the changes of the stations until cancelled."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                try:
                    await self._reopen()
                except (BusError, BusTimeout, NoResponders) as error:
                    _log.warning("queue not readable", stream=self.stream, error=str(error))
                    await asyncio.sleep(RETRY_S)
                    self._changed.set()
        finally:
            if self._feed is not None:
                await self._feed.close()

    async def _reopen(self) -> None:
        if self._feed is not None:
            feed, self._feed = self._feed, None
            await feed.close()
        for inbox in self._inboxes.values():
            inbox.forget_buffer()
        if not self._inboxes:
            return
        created = (await self._bus.stream_info(self.stream)).created
        if self.created not in ("", created):
            await self._forget_stream()
        self.created = created
        self._outstanding = 0
        filters = self._filters()
        if not filters:
            return  # the last station has left meanwhile
        self._feed = await self._bus.open_feed(
            FeedSpec(stream=self.stream, filters=filters, name=f"pod-{self._session}"), self._arrived)
        self.top_up()

    async def _forget_stream(self) -> None:
        """Sequences of the stream that was there before mean other messages in this one."""
        while any(inbox.under_way for inbox in self._inboxes.values()):
            await asyncio.sleep(UNDER_WAY_POLL_S)  # their records carry sequences of the other stream
        for inbox in self._inboxes.values():
            inbox.forget_stream()

    def top_up(self) -> None:
        """Pull as many as may come, not for each one alone; one pull is always open."""
        if self._feed is None:
            return
        target = self._target()
        missing = target - self._waiting() - self._outstanding
        if missing > 0 and (self._outstanding == 0 or missing >= target // 4):
            self._outstanding += missing
            self._feed.want(missing)

    def _arrived(self, messages: Sequence[Message]) -> None:
        self._outstanding = max(0, self._outstanding - len(messages))
        for message in messages:
            self._offer(message)
        self._all_offered()
        if self._outstanding == 0:
            self.top_up()

    # -- positions -----------------------------------------------------------------------------------------------------

    async def clear_to(self) -> int:
        """A sequence up to which every message of the pod's stations has been offered; 0 = not known just now."""
        feed = self._feed
        if feed is None or self._changed.is_set():
            return 0
        clear_to = await feed.clear_to()
        return clear_to if self._feed is feed and not self._changed.is_set() else 0

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
        info = await self._bus.stream_info(self.stream)
        if self._feed is not feed or self._changed.is_set():
            return {}
        if info.created != self.created:
            self._changed.set()
            return {}
        for inbox in self._inboxes.values():
            inbox.purged(info.first_sequence)
        return {station: inbox.committed(clear_to) for station, inbox in self._inboxes.items()}

    async def clear_backlog(self, handled_max: int) -> None:
        """Purge a station's own subjects when too much of what it has handled waits for another, slower station.

        Only then: holes in the stream slow that station down even more (see `Bus.purge`). Call it right after `positions`
        has told some, so that the stream is surely the one that was read.
        """
        for inbox in list(self._inboxes.values()):
            if len(inbox.handled) > handled_max and inbox.may_purge():
                below = inbox.committed(inbox.handled[-1]) + 1
                inbox.purged(below)
                await self._bus.purge(self.stream, self._own(inbox.station), below)
