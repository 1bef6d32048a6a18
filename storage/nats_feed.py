"""A feed: one disposable pull consumer that is made again whenever anything of it may have been lost.

Nothing is acknowledged, so what the consumer has sent is gone for it. Therefore nothing is repaired: a broken
connection, a gap in the consumer's own numbering, a missed heartbeat, an unknown status, a deleted consumer all lead to
a new consumer behind the last message that arrived. A message may come twice that way; it cannot be passed over.

    open ──made──► reading ──anything lost──► making ──made──► reading …          close() from any of them

Credit is what the owner still wants (`want`), asked is the part of it that pull requests on the server stand for.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from toque._logging import get_logger
from toque.storage.nats_streams import STATUS_HEADER
from toque.storage.ports import BusError, BusTimeout, FeedSpec, Message, NoResponders

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from toque.storage.nats_connection import Connection, Handle
    from toque.storage.nats_streams import Streams

PULL_MESSAGES_MAX = 2_000
PULL_BYTES_MAX = 32 * 1024 * 1024  # per pull, as the server counts; above any message it takes by default
ASKED_MAX = 2 * PULL_MESSAGES_MAX
PULL_EXPIRES_S = 20.0
HEARTBEAT_S = 5.0
SILENT_HEARTBEATS_MAX = 2
INACTIVE_S = 30  # the server deletes a consumer that nobody pulls from for so long
REMAKE_WAIT_S_MIN = 0.2
REMAKE_WAIT_S_MAX = 2.0
_NS = 1_000_000_000
_ACK_PREFIX = "$JS.ACK."
_ACK_TOKENS_V1 = 9  # $JS.ACK.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<ns>.<pending>
_STATUS_HEARTBEAT = "100"
_STATUS_EXPIRED = "408"
_ENDS_OF_A_PULL = ("Message Size Exceeds MaxBytes", "Batch Completed")  # 409 that say nothing against the consumer
_PENDING_HEADER = "Nats-Pending-Messages"
_LAST_CONSUMER_HEADER = "Nats-Last-Consumer"

_log = get_logger("toque.nats")


class _Consumer:
    """One incarnation of the feed's consumer on the server, and the inbox it delivers to."""

    def __init__(self, feed: NatsFeed, name: str, inbox: str) -> None:
        self.feed = feed
        self.name = name
        self.inbox = inbox
        self.handle: Handle | None = None
        self.received = 0  # the consumer's own number of the last message
        self.asked = 0
        self.silent_heartbeats = 0

    async def close(self) -> None:
        """Close the inbox: nothing of this incarnation arrives any more."""
        if self.handle is not None:
            await self.handle.close()

    async def on_message(self, message: Msg) -> None:
        self.silent_heartbeats = 0
        if not message.reply.startswith(_ACK_PREFIX):
            self._on_status(message)
            return
        tokens = message.reply.split(".")
        at = 5 if len(tokens) == _ACK_TOKENS_V1 else 7  # the longer form has domain and account in front
        if int(tokens[at + 1]) != self.received + 1:
            self.feed.broken(self, f"message {tokens[at + 1]} after {self.received}")
            return
        self.received += 1
        self.asked -= 1
        self.feed.arrived(self, Message(message.subject, message.data, message.headers, sequence=int(tokens[at]),
                                        time_ms=int(tokens[at + 2]) // 1_000_000))

    def _on_status(self, message: Msg) -> None:
        headers = message.headers or {}
        status, description = headers.get(STATUS_HEADER, ""), headers.get("Description", "")
        if status == _STATUS_HEARTBEAT:
            if int(headers.get(_LAST_CONSUMER_HEADER, self.received)) != self.received:
                self.feed.broken(self, "a heartbeat tells of a message that did not come")
            return
        pull_ended = status == _STATUS_EXPIRED or description in _ENDS_OF_A_PULL
        if pull_ended and _PENDING_HEADER in headers:
            self.asked -= int(headers[_PENDING_HEADER])
            self.feed.pull_soon()
        else:
            self.feed.broken(self, f"status {status} {description}")


class NatsFeed:
    """The Feed port; made by `NatsBus.open_feed`. `handler` gets what arrived in one turn of the loop as one list."""

    def __init__(self, connection: Connection, streams: Streams, spec: FeedSpec,
                 handler: Callable[[Sequence[Message]], None]) -> None:
        assert spec.filters, "a feed needs a subject filter"
        self._connection = connection
        self._streams = streams
        self._spec = spec
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._consumer: _Consumer | None = None
        self._created = ""  # of the stream, as read after the consumer was made
        self._cursor = max(spec.start_sequence, 1) - 1  # stream sequence of the last message that arrived
        self._credit = 0
        self._arrived: list[Message] = []
        self._pulling = False  # a pull is scheduled for this turn of the loop
        self._maker: asyncio.Task[None] | None = None
        self._try_now = asyncio.Event()
        self._heartbeat: asyncio.TimerHandle | None = None
        self._closed = False

    async def open(self) -> None:
        """Make the first consumer. Raises BusError, BusTimeout, NoResponders."""
        await self._make()
        self._connection.watch(self._on_connection)
        self._heartbeat = self._loop.call_later(HEARTBEAT_S, self._on_heartbeat)

    def want(self, messages: int) -> None:
        assert messages > 0
        self._credit += messages
        self.pull_soon()

    async def clear_to(self) -> int:
        last = (await self._streams.info(self._spec.stream)).last_sequence
        consumer = self._consumer
        if consumer is None:
            return self._handled()
        state = await self._streams.consumer_state(self._spec.stream, consumer.name)
        all_arrived = state.num_pending == 0 and state.delivered.consumer_seq == consumer.received
        if consumer is self._consumer and all_arrived and not self._arrived:
            return max(last, self._cursor)
        return self._handled()

    def _handled(self) -> int:
        """The cursor, less what the handler has not had yet."""
        return self._arrived[0].sequence - 1 if self._arrived else self._cursor

    async def close(self) -> None:
        """Nothing is delivered any more once it is called; the server forgets the consumer."""
        self._closed = True
        self._connection.unwatch(self._on_connection)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._maker is not None:
            self._maker.cancel()
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await self._discard(consumer)

    # -- arriving ------------------------------------------------------------------------------------------------------

    def arrived(self, consumer: _Consumer, message: Message) -> None:
        """A message of a consumer, in its order."""
        if consumer is not self._consumer:
            return
        self._cursor = message.sequence
        self._credit -= 1
        self._arrived.append(message)
        if len(self._arrived) == 1:
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        batch, self._arrived = self._arrived, []
        if self._closed:
            return
        self._pull()
        self._handler(batch)

    def broken(self, consumer: _Consumer, why: str) -> None:
        """Something of this consumer is lost or may be: make another one."""
        if consumer is not self._consumer:
            return
        _log.info("feed is made again", stream=self._spec.stream, consumer=consumer.name, cursor=self._cursor,
                  reason=why)
        self._consumer = None
        self._remake_soon(consumer)

    # -- pulling -------------------------------------------------------------------------------------------------------

    def pull_soon(self) -> None:
        """Ask for what is wanted, once for all that is wanted in this turn of the loop."""
        if not self._pulling:
            self._pulling = True
            self._loop.call_soon(self._pull)

    def _pull(self) -> None:
        self._pulling = False
        consumer = self._consumer
        if consumer is None:
            return
        while batch := pull_size(self._credit, consumer.asked):
            request = b'{"batch":%d,"max_bytes":%d,"expires":%d,"idle_heartbeat":%d}' % (
                batch, PULL_BYTES_MAX, int(PULL_EXPIRES_S * _NS), int(HEARTBEAT_S * _NS))
            try:
                self._connection.send(self._next_subject(consumer), request, reply=consumer.inbox)
            except BusTimeout:
                return  # the connection is gone: the consumer is made again when it is back
            consumer.asked += batch

    def _next_subject(self, consumer: _Consumer) -> str:
        return self._streams.subject(f"CONSUMER.MSG.NEXT.{self._spec.stream}.{consumer.name}")

    def _on_heartbeat(self) -> None:
        if self._connection.closed:
            return
        self._heartbeat = self._loop.call_later(HEARTBEAT_S, self._on_heartbeat)
        consumer = self._consumer
        if consumer is None or not consumer.asked:
            return
        consumer.silent_heartbeats += 1
        if consumer.silent_heartbeats > SILENT_HEARTBEATS_MAX:
            self.broken(consumer, "no heartbeat")

    # -- making --------------------------------------------------------------------------------------------------------

    def _on_connection(self, connected: bool) -> None:
        if connected:
            self._try_now.set()
        elif self._consumer is not None:
            self.broken(self._consumer, "the connection was lost")

    def _remake_soon(self, old: _Consumer) -> None:
        if self._maker is None and not self._closed:
            self._maker = self._loop.create_task(self._remake(old))

    async def _remake(self, old: _Consumer) -> None:
        wait_s = REMAKE_WAIT_S_MIN
        try:
            await old.close()  # the server drops the consumer itself after INACTIVE_S without a pull
            while not (self._connection.closed or await self._made()):
                self._try_now.clear()
                await self._wait_for_connection(wait_s)
                wait_s = min(wait_s * 2, REMAKE_WAIT_S_MAX)
        finally:
            self._maker = None

    async def _wait_for_connection(self, at_most_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._try_now.wait(), at_most_s)

    async def _made(self) -> bool:
        if not self._connection.connected:
            return False
        try:
            await self._make()
        except (BusError, BusTimeout, NoResponders) as error:
            _log.warning("feed could not be made", stream=self._spec.stream, reason=str(error))
            return False
        self.pull_soon()
        return True

    async def _make(self) -> None:
        """Make a consumer behind the cursor, then make sure that the cursor is one of this very stream."""
        consumer = await self._make_consumer(self._start())
        try:
            info = await self._streams.info(self._spec.stream)
        except BaseException:
            await consumer.close()
            raise
        begun = bool(self._created)
        another_stream = begun and info.created != self._created
        if another_stream or (begun and info.last_sequence < self._cursor):
            _log.warning("stream is not the one it was: reading it from its start", stream=self._spec.stream,
                         created=info.created, last=info.last_sequence, cursor=self._cursor)
            await self._discard(consumer)
            self._cursor = 0
            consumer = await self._make_consumer(self._start())
        self._created = info.created
        self._consumer = consumer

    def _start(self) -> dict[str, Any]:
        if self._spec.last_per_subject:
            return {"deliver_policy": "last_per_subject"}
        if self._cursor == 0:
            return {"deliver_policy": "all"}
        return {"deliver_policy": "by_start_sequence", "opt_start_seq": self._cursor + 1}

    async def _make_consumer(self, start: dict[str, Any]) -> _Consumer:
        name = f"{self._spec.name or 'feed'}-{os.urandom(6).hex()}"
        consumer = _Consumer(self, name, self._connection.new_inbox())
        consumer.handle = await self._connection.subscribe(consumer.inbox, consumer.on_message, unlimited=True)
        try:
            await self._streams.create_consumer(self._spec.stream, {
                "name": name, "ack_policy": "none", "mem_storage": True, "num_replicas": 1, "replay_policy": "instant",
                "inactive_threshold": INACTIVE_S * _NS, "filter_subjects": list(self._spec.filters),
                "headers_only": self._spec.headers_only, **start})
        except BaseException:
            await consumer.close()
            raise
        return consumer

    async def _discard(self, consumer: _Consumer) -> None:
        await consumer.close()
        if not self._connection.connected:
            return
        try:
            await self._streams.delete_consumer(self._spec.stream, consumer.name)
        except (BusError, BusTimeout, NoResponders) as error:  # it is gone, or the server will drop it when it is idle
            _log.debug("consumer was not deleted", consumer=consumer.name, reason=str(error))


def pull_size(credit: int, asked: int) -> int:
    """How many messages the next pull should ask for; 0 = none now.

    Small wishes wait until they are as many as what is asked for already: so few pulls are open however they come in,
    and the next one is under way before the last one is used up.
    """
    lacking = min(credit, ASKED_MAX) - asked
    return min(lacking, PULL_MESSAGES_MAX) if lacking > 0 and lacking >= asked else 0
