"""The in-memory Bus: a connection to a `MemoryBroker`, with the small delays and the losses of a real one.

What one connection sends arrives in the order it was sent, and so do a feed's messages, a stream's acknowledgements
and core messages, each in a lane of their own; between lanes the order is a matter of seeded chance.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from toque._subjects import BATCH_COMMIT_HEADER, BATCH_ID_HEADER, BATCH_SEQUENCE_HEADER
from toque.errors import PayloadTooLarge
from toque.storage.memory_broker import (
    DELAY,
    DROP_BEFORE,
    DUPLICATE,
    INBOX,
    LOSE_ANSWER,
    NO_RESPONDERS,
    STATUS_HEADER,
    Consumer,
    MemoryBroker,
    Silence,
)
from toque.storage.memory_stream import header_bytes, matcher
from toque.storage.ports import (
    BATCH_MESSAGES_MAX,
    BusError,
    BusTimeout,
    FeedSpec,
    Headers,
    Message,
    NoResponders,
    PubAck,
    StreamConfig,
    StreamInfo,
)

__all__ = ["MemoryBroker", "MemoryBus"]

T = TypeVar("T")

CALL_TIMEOUT_S: Final = 10.0  # of management requests
REPEAT_CHANCE: Final = 0.3  # that a feed opened again repeats a little of what it had delivered
REPEATED_SEQUENCES_MAX: Final = 3


class _AckError(msgspec.Struct):
    err_code: int
    description: str


class _Ack(msgspec.Struct):
    stream: str = ""
    seq: int = 0
    error: _AckError | None = None


class _Lane:
    """One way in one direction: what is sent on it arrives in order, each a little later."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._under_way: deque[Callable[[], None]] = deque()

    def send(self, arrive: Callable[[], None]) -> None:
        """Each timer lets the oldest thing arrive: the order does not depend on the delays. Under way it is nobody's."""
        self._under_way.append(arrive)
        asyncio.get_running_loop().call_later(self._broker.draw_delay_s(), self._arrive, context=contextvars.Context())

    def _arrive(self) -> None:
        if self._under_way:  # else the connection was lost meanwhile
            self._under_way.popleft()()

    def cut(self, arriving: int = 0) -> None:
        """The connection is lost: the first `arriving` things had arrived, the others never will."""
        for _ in range(arriving):
            self._under_way.popleft()()
        self._under_way.clear()

    def __len__(self) -> int:
        return len(self._under_way)


class MemorySubscription:
    """An open core subscription; it outlives the loss of the connection."""

    def __init__(self, bus: MemoryBus, lane: _Lane, subject: str, handler: Callable[[Message], None]) -> None:
        self._bus = bus
        self._lane = lane
        self.matches = matcher(subject)
        self._handler = handler
        self._closed = False

    @property
    def online(self) -> bool:
        """Whether the server sends to this subscription now."""
        return self._bus.online

    def deliver(self, message: Message) -> None:
        """The server sends a message."""
        self._lane.send(lambda: self._receive(message))

    def _receive(self, message: Message) -> None:
        if not self._closed:
            self._handler(message)

    async def close(self) -> None:
        self._closed = True
        self._bus.forget_subscription(self)


class MemoryFeed:
    """An open disposable consumer (the Feed port). It is opened again behind the last message after any loss.

    As with the real one `last_per_subject` begins again with the newest of each subject, and a stream that is not the
    one it was is read from its start.
    """

    def __init__(self, bus: MemoryBus, broker: MemoryBroker, spec: FeedSpec,
                 handler: Callable[[Sequence[Message]], None]) -> None:
        assert spec.filters, "a feed needs a subject filter"
        self.spec = spec
        self._bus = bus
        self._broker = broker
        self._handler = handler
        self._lane = _Lane(broker)
        self._consumer: Consumer | None = None
        self._created = ""  # of the stream
        self._credit = 0  # wanted and not delivered yet
        self._delivered = 0  # sequence of the last message delivered
        self._closed = False

    def open(self) -> None:
        """Runs at the server. Raises BusError(STREAM_NOT_FOUND)."""
        if self._closed:
            return
        info = self._broker.stream_info(self.spec.stream, "")
        if self._created and (info.created != self._created or info.last_sequence < self._delivered):
            start = 1
        else:
            start = self._start_sequence()
        self._created = info.created
        spec = msgspec.structs.replace(self.spec, start_sequence=start)
        self._consumer = self._broker.add_consumer(self._bus, spec, self._send)
        self._consumer.grant(self._credit)

    def _start_sequence(self) -> int:
        if not self._delivered:
            return self.spec.start_sequence
        rng, start = self._broker.rng, self._delivered + 1
        back = rng.randint(1, REPEATED_SEQUENCES_MAX) if rng.random() < REPEAT_CHANCE else 0
        return max(self.spec.start_sequence, start - back)

    def reopen(self) -> None:
        """Like `open`, without anybody who waits for it; a stream that is gone opens its feeds when it comes back."""
        if self._consumer is None and self.spec.stream in self._broker.stream_names(self.spec.stream):
            self.open()

    def lose(self) -> None:
        """The connection is lost, and the consumer with it; or the stream is another one now."""
        self._lane.cut()
        self._consumer = None

    def want(self, messages: int) -> None:
        assert messages > 0, "a feed can only be asked for more"
        self._credit += messages
        self._bus.send_upstream(partial(self._grant, self._consumer, messages))

    def _grant(self, consumer: Consumer | None, messages: int) -> None:
        if consumer is not None and consumer is self._consumer:  # a consumer made since then knows the whole credit
            consumer.grant(messages)

    async def clear_to(self) -> int:
        consumer = self._consumer
        if consumer is None:
            return self._delivered
        all_sent, sent, last = await self._bus._call("CONSUMER.INFO", self.spec.stream, consumer.progress)
        arrived = sent <= max(self._delivered, self.spec.start_sequence - 1)
        return max(last, self._delivered) if all_sent and arrived and consumer is self._consumer else self._delivered

    async def close(self) -> None:
        self._closed = True
        self._lane.cut()
        if self._consumer is not None:
            self._broker.remove_consumer(self._consumer)
            self._consumer = None  # a `want` may be on its way still
        self._bus.forget_feed(self)

    def _send(self, messages: list[Message]) -> None:
        """What the server sends at once arrives in parts."""
        while messages:
            count = self._broker.rng.randint(1, len(messages))
            part, messages = messages[:count], messages[count:]
            self._lane.send(partial(self._receive, part))

    def _receive(self, messages: list[Message]) -> None:
        self._credit -= len(messages)
        self._delivered = messages[-1].sequence
        self._handler(messages)


class MemoryBus:
    """One connection to a `MemoryBroker` (the Bus port). Make it in the loop that uses it.

    Nothing is buffered: without a connection requests fail soon with BusTimeout and emitted messages are dropped, and
    when the connection is lost every open request ends with BusTimeout.
    """

    def __init__(self, broker: MemoryBroker, name: str = "") -> None:
        self.broker = broker
        self.name = name
        self.online = broker.running
        self.number = broker.attach(self)
        self._cut = False  # by `disconnect`
        self._closed = False
        self._upstream = _Lane(broker)
        self._downstream: dict[str, _Lane] = {}
        self._answers: dict[str, asyncio.Future[Any]] = {}
        self._feeds: list[MemoryFeed] = []
        self._subscriptions: list[MemorySubscription] = []
        self._inboxes_made = 0

    # -- faults, for tests

    def disconnect(self) -> None:
        """Lose the connection. Part of what was under way had arrived and is executed; nobody hears of it."""
        self._cut = True
        self.lose()

    def reconnect(self) -> None:
        """Get the connection back: subscriptions are there again, feeds go on."""
        self._cut = False
        self.restore()

    # -- the connection, as the broker and the feeds see it

    def lose(self) -> None:
        """The connection breaks: every open request ends with BusTimeout."""
        if not self.online:
            return
        self._upstream.cut(arriving=self.broker.rng.randint(0, len(self._upstream)))
        self._go_offline()

    def _go_offline(self) -> None:
        self.online = False
        for lane in self._downstream.values():
            lane.cut()
        self.broker.drop_consumers(self)
        for feed in self._feeds:
            feed.lose()
        self._fail_open("the connection was lost; the outcome is unknown")

    def _fail_open(self, why: str) -> None:
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(BusTimeout(why))

    def restore(self) -> None:
        """Be connected again, unless the test has cut this connection or the server is away."""
        if self.online or self._cut or self._closed or not self.broker.running:
            return
        self.online = True
        for feed in self._feeds:
            self._upstream.send(feed.reopen)

    def reopen_feeds(self, stream: str) -> None:
        """A stream of this name was made: feeds that read another one of the name read this one."""
        for feed in self._feeds:
            if feed.spec.stream == stream:
                feed.lose()
                self.send_upstream(feed.reopen)

    def send_upstream(self, arrive: Callable[[], None]) -> None:
        """Run something at the server, in the order of everything that this connection sends."""
        if self.online:
            self._upstream.send(arrive)

    def forget_feed(self, feed: MemoryFeed) -> None:
        if feed in self._feeds:
            self._feeds.remove(feed)

    def forget_subscription(self, subscription: MemorySubscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
            self.broker.unsubscribe(subscription)

    def take_answer(self, answer: Message, *, lane: str) -> None:
        self._lane(lane).send(lambda: self._settle(answer.subject, answer))

    async def close(self) -> None:
        """Send what was handed over, end every open request with BusTimeout, and disconnect."""
        if self._closed:
            return
        self._closed = True
        self._upstream.cut(arriving=len(self._upstream))
        self._go_offline()
        for subscription in list(self._subscriptions):
            await subscription.close()
        for feed in list(self._feeds):
            await feed.close()
        self.broker.detach(self)

    # -- core messages and JetStream publishes

    @property
    def max_payload(self) -> int:
        return self.broker.max_payload

    async def publish(self, subject: str, data: bytes, headers: Headers | None = None, *,
                      timeout_s: float = 5.0) -> PubAck:
        answer = await self.request(subject, data, headers, timeout_s=timeout_s)
        try:
            ack = msgspec.json.decode(answer.data, type=_Ack)
        except msgspec.MsgspecError as error:
            raise BusTimeout(f"the answer on {subject} is not JetStream's: {error}; the outcome is unknown") from error
        if ack.error is not None:
            raise BusError(ack.error.err_code, ack.error.description)
        return PubAck(ack.stream, ack.seq)

    async def publish_batch(self, messages: Sequence[tuple[str, bytes, Headers | None]], *,
                            timeout_s: float = 10.0) -> PubAck:
        assert 0 < len(messages) <= BATCH_MESSAGES_MAX, f"{len(messages)} messages in a batch"
        batch_id = f"{self.number}-{self._new_inbox()}"
        for number, (subject, data, headers) in enumerate(messages, 1):
            place = {**(headers or {}), BATCH_ID_HEADER: batch_id, BATCH_SEQUENCE_HEADER: str(number)}
            if number < len(messages):
                self.emit(subject, data, place)
        return await self.publish(subject, data, {**place, BATCH_COMMIT_HEADER: "1"}, timeout_s=timeout_s)

    def emit(self, subject: str, data: bytes, headers: Headers | None = None, *, reply: str = "") -> None:
        message = self._message(subject, data, headers, reply)
        if self.online:
            self._send_message(message)

    async def request(self, subject: str, data: bytes, headers: Headers | None = None, *,
                      timeout_s: float = 5.0) -> Message:
        reply = self._new_inbox()
        message = self._message(subject, data, headers, reply)
        answer: Message = await self._ask(subject, reply, partial(self._send_message, message), timeout_s)
        if answer.header(STATUS_HEADER) == NO_RESPONDERS:
            raise NoResponders(f"nobody listens on {subject}, and no stream takes it")
        return answer

    async def subscribe(self, subject: str, handler: Callable[[Message], None]) -> MemorySubscription:
        await self._reach_server(subject)
        subscription = MemorySubscription(self, self._lane("core"), subject, handler)
        self._subscriptions.append(subscription)
        self.broker.subscribe(subscription)
        return subscription

    def respond(self, message: Message, data: bytes) -> None:
        assert message.reply, "this message asks for no answer"
        self.emit(message.reply, data)

    def _message(self, subject: str, data: bytes, headers: Headers | None, reply: str = "") -> Message:
        size = header_bytes(headers) + len(data)
        if size > self.max_payload:
            raise PayloadTooLarge(f"a message of {size} bytes on {subject}; the server takes {self.max_payload}",
                                  size=size, limit=self.max_payload)
        return Message(subject, data, dict(headers) if headers else None, reply=reply)

    def _send_message(self, message: Message) -> None:
        def arrive(answered: bool) -> None:
            self.broker.route(message if answered else Message(message.subject, message.data, message.headers))

        self._transmit(message.subject, arrive, partial(self.broker.answer_error, message.reply))

    # -- streams

    async def last_message(self, stream: str, subject: str) -> Message | None:
        return await self._call("STREAM.MSG.GET", stream, lambda: self.broker.last_message(stream, subject))

    async def message_at(self, stream: str, sequence: int) -> Message | None:
        return await self._call("STREAM.MSG.GET", stream, lambda: self.broker.message_at(stream, sequence))

    async def stream_info(self, stream: str, *, subjects_filter: str = "") -> StreamInfo:
        return await self._call("STREAM.INFO", stream, lambda: self.broker.stream_info(stream, subjects_filter))

    async def ensure_stream(self, config: StreamConfig) -> None:
        try:
            await self._call("STREAM.CREATE", config.name, lambda: self.broker.create_stream(config))
        except BusError as refusal:
            if refusal.code != BusError.STREAM_NAME_IN_USE:
                raise

    async def update_stream(self, config: StreamConfig) -> None:
        await self._call("STREAM.UPDATE", config.name, lambda: self.broker.update_stream(config))

    async def delete_stream(self, name: str) -> None:
        await self._call("STREAM.DELETE", name, lambda: self.broker.delete_stream(name))

    async def list_streams(self, prefix: str) -> list[str]:
        return await self._call("STREAM.NAMES", "", lambda: self.broker.stream_names(prefix))

    async def purge(self, stream: str, subject_filter: str, below_sequence: int) -> int:
        return await self._call("STREAM.PURGE", stream, lambda: self.broker.purge(stream, subject_filter, below_sequence))

    async def delete_message(self, stream: str, sequence: int) -> bool:
        return await self._call("STREAM.MSG.DELETE", stream, lambda: self.broker.delete_message(stream, sequence))

    async def open_feed(self, spec: FeedSpec, handler: Callable[[Sequence[Message]], None]) -> MemoryFeed:
        feed = MemoryFeed(self, self.broker, spec, handler)
        self._feeds.append(feed)  # at once: the connection may be lost between the answer and whoever waits for it
        try:
            await self._call("CONSUMER.CREATE", spec.stream, feed.open)
        except BaseException:
            await feed.close()
            raise
        return feed

    # -- requests and answers

    def _new_inbox(self) -> str:
        self._inboxes_made += 1
        return f"{INBOX}{self.number}.{self._inboxes_made}"

    async def _call(self, operation: str, stream: str, act: Callable[[], T]) -> T:
        """Let the server do something, and bring what it returns or raises."""
        reply = self._new_inbox()

        def arrive(answered: bool) -> None:
            try:
                result = act()
            except BusError as refusal:
                refuse(refusal)
                return
            except Silence:
                return
            if answered and self.online:
                self._lane("api").send(lambda: self._settle(reply, result))

        def refuse(refusal: BusError) -> None:
            self._lane("api").send(lambda: self._settle(reply, refusal))

        subject = f"$JS.API.{operation}.{stream}".removesuffix(".")
        result: T = await self._ask(subject, reply, lambda: self._transmit(subject, arrive, refuse), CALL_TIMEOUT_S)
        return result

    async def _ask(self, subject: str, reply: str, send: Callable[[], None], timeout_s: float) -> Any:
        """Send, and wait for the answer."""
        if not self.online:
            await self._reach_server(subject)
        loop = asyncio.get_running_loop()
        answer = self._answers[reply] = loop.create_future()
        send()
        over = loop.call_later(timeout_s, _give_up, answer, subject, timeout_s)
        try:
            return await answer
        finally:
            over.cancel()
            del self._answers[reply]

    async def _reach_server(self, subject: str) -> None:
        """The time it takes. Raises BusTimeout without a connection."""
        await asyncio.sleep(self.broker.draw_delay_s())
        if not self.online:
            raise BusTimeout(f"no connection; nothing was sent on {subject}")

    def _transmit(self, subject: str, arrive: Callable[[bool], None], refuse: Callable[[BusError], None]) -> None:
        """Send towards the server, as far as the faults let it. `arrive` is told whether an answer may come back."""
        fault = self.broker.take_fault(subject)
        if fault is None:
            self._upstream.send(lambda: arrive(True))
        elif fault.refusal is not None:
            self._upstream.send(partial(refuse, fault.refusal))
        elif fault.how == LOSE_ANSWER:
            self._upstream.send(lambda: arrive(False))
        elif fault.how in (DELAY, DUPLICATE):
            if fault.how == DUPLICATE:
                self._upstream.send(lambda: arrive(True))
            asyncio.get_running_loop().call_later(fault.delay_s, self._arrive_late, arrive, context=contextvars.Context())
        else:
            assert fault.how == DROP_BEFORE

    def _arrive_late(self, arrive: Callable[[bool], None]) -> None:
        if self.broker.running:
            arrive(True)

    def _lane(self, name: str) -> _Lane:
        lane = self._downstream.get(name)
        return self._downstream.setdefault(name, _Lane(self.broker)) if lane is None else lane

    def _settle(self, reply: str, result: object) -> None:
        answer = self._answers.get(reply)
        if answer is None or answer.done():
            return
        if isinstance(result, BusError):
            answer.set_exception(result)
        else:
            answer.set_result(result)


def _give_up(answer: asyncio.Future[Any], subject: str, timeout_s: float) -> None:
    if not answer.done():
        answer.set_exception(BusTimeout(f"no answer on {subject} within {timeout_s:g} s; the outcome is unknown"))
