"""The in-memory broker: the part of nats-server and JetStream that the Bus port uses, and faults to order.

It lives in the running loop, virtual or real, and takes all its chance from one random source. `MemoryBus` is a
connection to it. What it does when nothing is broken is held to the real server by the conformance suite.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

import msgspec

from toque.storage.memory_stream import MemoryStream, as_reported, matcher, overlap, without_body
from toque.storage.ports import BusError, FeedSpec, Message, StreamConfig, StreamInfo

EPOCH_MS: Final = 1_767_225_600_000  # broker time when the loop's clock shows 0
MAX_PAYLOAD: Final = 8 * 1024 * 1024  # as in the servers that we ship
EXPIRY_LATE_MS_MAX: Final = 250  # the server looks for expired messages no more often than this
RECONNECT_S_MAX: Final = 0.2
SLOW_SHARE: Final = 0.02  # of all deliveries, those that take SLOW_FACTOR times as long
SLOW_FACTOR: Final = 10
SUBJECTS_OVERLAP: Final = 10065
ROUTES_MAX: Final = 4_096  # subjects whose streams and subscriptions are remembered
INBOX: Final = "_INBOX.memory."  # then the connection's number and the request's
STATUS_HEADER: Final = "Status"
NO_RESPONDERS: Final = "503"

DROP_BEFORE: Final = "drop before"
LOSE_ANSWER: Final = "execute then lose the answer"
DELAY: Final = "delay"
DUPLICATE: Final = "duplicate"
REFUSE: Final = "refuse:"


class Silence(Exception):
    """Inside the broker: a request is not answered at all."""


@dataclass
class Fault:
    """What happens to the next `times` messages or requests whose subject matches."""

    pattern: str
    how: str
    times: int
    delay_s: float

    def __post_init__(self) -> None:
        refuses = self.how.startswith(REFUSE) and self.how.removeprefix(REFUSE).isdecimal()
        if self.how not in (DROP_BEFORE, LOSE_ANSWER, DELAY, DUPLICATE) and not refuses:
            raise ValueError(f"unknown fault {self.how!r}: use {DROP_BEFORE!r}, {LOSE_ANSWER!r}, {DELAY!r}, "
                             f"{DUPLICATE!r} or '{REFUSE}<code>'")

    @property
    def refusal(self) -> BusError | None:
        """The error that the server answers, if that is the fault."""
        if not self.how.startswith(REFUSE):
            return None
        return BusError(int(self.how.removeprefix(REFUSE)), "refused as the test ordered")


class Connection(Protocol):
    """What the broker needs of a `MemoryBus`."""

    number: int
    online: bool

    def take_answer(self, answer: Message, *, lane: str) -> None: ...

    def lose(self) -> None: ...

    def restore(self) -> None: ...

    def reopen_feeds(self, stream: str) -> None: ...


class Interest(Protocol):
    """A core subscription of a connection."""

    @property
    def online(self) -> bool: ...

    def matches(self, subject: str) -> bool: ...

    def deliver(self, message: Message) -> None: ...


class Consumer:
    """The server's side of a feed: sends what its filters match, in order, as far as the credit goes."""

    def __init__(self, connection: Connection, stream: MemoryStream, spec: FeedSpec,
                 deliver: Callable[[list[Message]], None]) -> None:
        self.connection = connection
        self.stream = stream
        self._filters = spec.filters
        self._headers_only = spec.headers_only
        self._deliver = deliver
        self._credit = 0
        self._position = spec.start_sequence - 1
        self._looked_at = self._position  # up to here there is nothing more to send
        self._first: deque[int] = deque()
        if spec.last_per_subject:
            self._first.extend(stream.last_sequences(spec.filters))
            self._position = self._looked_at = stream.last_sequence

    def grant(self, messages: int) -> None:
        """Allow so many more messages."""
        self._credit += messages
        self.pump()

    def pump(self) -> None:
        """Send what is there and allowed."""
        batch: list[Message] = []
        while len(batch) < self._credit:
            message = self._next()
            if message is None:
                break
            batch.append(message)
        if batch:
            self._credit -= len(batch)
            self._deliver([without_body(message) for message in batch] if self._headers_only else batch)

    def progress(self) -> tuple[bool, int, int]:
        """Whether everything that matches was sent, the last sequence sent, and the stream's last one."""
        waiting = bool(self._first) or next(self.stream.after(self._looked_at, self._filters), None) is not None
        return not waiting, self._position, self.stream.last_sequence

    def _next(self) -> Message | None:
        while self._first:
            message = self.stream.at(self._first.popleft())
            if message is not None:
                return message
        stream = self.stream
        if self._looked_at >= stream.last_sequence:
            return None
        message = next(stream.after(self._looked_at, self._filters), None)
        if message is None:
            self._looked_at = stream.last_sequence
        else:
            self._position = self._looked_at = message.sequence
        return message


class MemoryBroker:
    """One in-memory nats-server. Make it in a running loop or before; use it from one loop.

    `rng` decides delays and chances, `delay_s` bounds the way of a message in one direction, `epoch_ms` is broker time
    when the loop's clock shows 0: change it to make the server's clock jump.
    """

    def __init__(self, rng: random.Random, *, epoch_ms: int = EPOCH_MS, delay_s: tuple[float, float] = (0.0001, 0.002),
                 max_payload: int = MAX_PAYLOAD) -> None:
        self.rng = rng
        self.epoch_ms = epoch_ms
        self.max_payload = max_payload
        self.running = True
        self._delay_s = delay_s
        self._connections: dict[int, Connection] = {}
        self._connections_made = 0
        self._streams: dict[str, MemoryStream] = {}
        self._streams_made = 0
        self._frozen: set[str] = set()
        self._timers: dict[str, tuple[int, asyncio.TimerHandle]] = {}
        self._consumers: dict[str, list[Consumer]] = {}
        self._interests: list[Interest] = []
        self._routes: dict[str, tuple[list[MemoryStream], list[Interest]]] = {}  # by subject, of those seen lately
        self._faults: list[Fault] = []
        self.counts: Counter[str] = Counter()  # of what happened: faults, refusals by stream and code, expiries
        self.on_stored: Callable[[str, Message], None] = lambda stream, message: None  # after each single publish

    # -- time

    def now_ms(self) -> int:
        """Broker time."""
        return self.epoch_ms + int(asyncio.get_running_loop().time() * 1000)

    def draw_delay_s(self) -> float:
        """The time that the next message takes in one direction."""
        random, (low, high) = self.rng.random, self._delay_s
        delay_s = low + (high - low) * random()
        return delay_s * SLOW_FACTOR if random() < SLOW_SHARE else delay_s

    # -- faults, for tests

    def stop(self) -> None:
        """The server dies: what is stored stays, connections, staged batches and consumers are gone.

        Part of what was under way had arrived and is executed; nobody hears of it.
        """
        for connection in self._connections.values():
            connection.lose()
        self.running = False
        for stream in self._streams.values():
            stream.abandon_batches()

    def start(self) -> None:
        """The server comes back, its frozen streams heal, and connections return within RECONNECT_S_MAX."""
        self.running = True
        self._frozen.clear()
        for stream in self._streams.values():
            self._arm(stream)
        for connection in self._connections.values():
            asyncio.get_running_loop().call_later(self.rng.uniform(0, RECONNECT_S_MAX), connection.restore)

    def freeze_stream(self, name: str) -> None:
        """The stream is write-dead (disk full, EIO): writes are not answered until the next `start`."""
        self._frozen.add(name)

    def fail_next(self, subject_pattern: str, how: str, *, times: int = 1, delay_s: float = 1.0) -> None:
        """Let the next messages or requests on matching subjects fail.

        `how`: "drop before" (it never arrives), "execute then lose the answer", "delay" (it arrives `delay_s` later,
        even after the sender's time-out, and others overtake it), "duplicate" (it arrives, and once more `delay_s`
        later), or "refuse:<code>" (an error answer, nothing done).
        Management requests have the server's own subjects: `$JS.API.STREAM.MSG.GET.<stream>` for leader reads, and
        likewise STREAM.MSG.DELETE, STREAM.INFO, STREAM.CREATE, STREAM.UPDATE, STREAM.DELETE, STREAM.PURGE,
        CONSUMER.CREATE; without a stream STREAM.NAMES. Raises ValueError for an unknown fault.
        """
        self._faults.append(Fault(subject_pattern, how, times, delay_s))

    def forget_faults(self) -> None:
        """What was ordered by `fail_next` and did not happen yet never will."""
        self._faults.clear()

    def take_fault(self, subject: str) -> Fault | None:
        """The fault ordered for a message on the subject, if there is one; it is used up."""
        for fault in self._faults:
            if matcher(fault.pattern)(subject):
                fault.times -= 1
                self.counts[fault.how] += 1
                if fault.times <= 0:
                    self._faults.remove(fault)
                return fault
        return None

    def stored(self, stream: str, pattern: str = ">") -> list[Message]:
        """What a stream holds, read past every delay and fault: for a test's own assertions."""
        return list(self._stream(stream).after(0, [pattern]))

    # -- connections

    def attach(self, connection: Connection) -> int:
        """Returns the connection's number, which its inboxes carry."""
        self._connections_made += 1
        self._connections[self._connections_made] = connection
        return self._connections_made

    def detach(self, connection: Connection) -> None:
        """Forget a connection that was closed."""
        self.drop_consumers(connection)
        del self._connections[connection.number]

    def subscribe(self, interest: Interest) -> None:
        """From here on `route` gives the interest what it matches."""
        self._interests.append(interest)
        self._routes.clear()

    def unsubscribe(self, interest: Interest) -> None:
        """The end of it."""
        if interest in self._interests:
            self._interests.remove(interest)
            self._routes.clear()

    # -- messages

    def route(self, message: Message) -> None:
        """Give a message that has arrived to every stream and subscriber of its subject."""
        if message.subject.startswith(INBOX):
            self._give_to_inbox(message, lane="core")
            return
        streams, matching = self._routes.get(message.subject) or self._find_route(message.subject)
        interests = [interest for interest in matching if interest.online]
        for stream in streams:
            self._publish(stream, message)
        for interest in interests:
            interest.deliver(message)
        if not streams and not interests:
            self._answer(message.reply, b"", lane="core", headers={STATUS_HEADER: NO_RESPONDERS})

    def _find_route(self, subject: str) -> tuple[list[MemoryStream], list[Interest]]:
        if len(self._routes) >= ROUTES_MAX:
            self._routes.clear()
        route = self._routes[subject] = (
            [stream for stream in self._streams.values() if stream.takes(subject)],
            [interest for interest in self._interests if interest.matches(subject)])
        return route

    def _publish(self, stream: MemoryStream, message: Message) -> None:
        name = stream.config.name
        if name in self._frozen:
            return
        try:
            stored = stream.publish(message, self.now_ms())
        except BusError as refusal:
            self.answer_error(message.reply, refusal, stream=name)
            return
        if stored is None:
            self._answer(message.reply, b"", lane=name)
            return
        sequence, more = stored
        self.on_stored(name, stream.at(sequence) or message)
        self._answer(message.reply, msgspec.json.encode({"stream": name, "seq": sequence, **more}), lane=name)
        self._changed(stream)

    def answer_error(self, reply: str, refusal: BusError, *, stream: str = "") -> None:
        """An acknowledgement that says why not."""
        self.counts[f"refused {refusal.code} {stream}"] += 1
        error = {"code": 400, "err_code": refusal.code, "description": refusal.description}
        self._answer(reply, msgspec.json.encode({"error": error, "stream": stream, "seq": 0}), lane=stream or "core")

    def _answer(self, reply: str, data: bytes, *, lane: str, headers: dict[str, str] | None = None) -> None:
        if not reply:
            return
        message = Message(reply, data, headers)
        if reply.startswith(INBOX):
            self._give_to_inbox(message, lane=lane)
        else:
            self.route(message)

    def _give_to_inbox(self, message: Message, *, lane: str) -> None:
        connection = self._connections.get(int(message.subject.removeprefix(INBOX).split(".")[0]))
        if connection is not None and connection.online:
            connection.take_answer(message, lane=lane)

    # -- expiry and feeds

    def _changed(self, stream: MemoryStream) -> None:
        for consumer in self._consumers.get(stream.config.name, ()):
            consumer.pump()
        self._arm(stream)

    def _arm(self, stream: MemoryStream) -> None:
        name, deadline_ms = stream.config.name, stream.next_deadline_ms()
        armed_for_ms, timer = self._timers.get(name, (None, None))
        if armed_for_ms == deadline_ms:
            return
        if timer is not None:
            timer.cancel()
            del self._timers[name]
        if deadline_ms is not None:
            late_ms = self.rng.uniform(1, EXPIRY_LATE_MS_MAX)
            wait_s = max(0.0, deadline_ms + late_ms - self.now_ms()) / 1000
            self._timers[name] = (
                deadline_ms, asyncio.get_running_loop().call_later(wait_s, self._expire, stream))

    def _expire(self, stream: MemoryStream) -> None:
        self._timers.pop(stream.config.name, None)
        if self.running and self._streams.get(stream.config.name) is stream:
            self.counts[f"expired {stream.config.name}"] += stream.expire(self.now_ms())
            self._changed(stream)

    def add_consumer(self, connection: Connection, spec: FeedSpec,
                     deliver: Callable[[list[Message]], None]) -> Consumer:
        """Begin to send. Raises BusError(STREAM_NOT_FOUND)."""
        consumer = Consumer(connection, self._stream(spec.stream), spec, deliver)
        self._consumers.setdefault(spec.stream, []).append(consumer)
        return consumer

    def remove_consumer(self, consumer: Consumer) -> None:
        """The feed is closed."""
        consumers = self._consumers.get(consumer.stream.config.name, [])
        if consumer in consumers:
            consumers.remove(consumer)

    def drop_consumers(self, connection: Connection) -> None:
        """All of a connection that is gone."""
        for name, consumers in self._consumers.items():
            self._consumers[name] = [consumer for consumer in consumers if consumer.connection is not connection]

    # -- management

    def _stream(self, name: str, *, writes: bool = False) -> MemoryStream:
        if name not in self._streams:
            raise BusError(BusError.STREAM_NOT_FOUND, "stream not found")
        if writes and name in self._frozen:
            raise Silence
        return self._streams[name]

    def last_message(self, stream: str, pattern: str) -> Message | None:
        return self._stream(stream).last(pattern)

    def message_at(self, stream: str, sequence: int) -> Message | None:
        return self._stream(stream).at(sequence)

    def stream_info(self, name: str, subjects_filter: str) -> StreamInfo:
        """The stream's state now."""
        stream = self._stream(name)
        return StreamInfo(
            created=stream.created, messages=len(stream), first_sequence=stream.first_sequence,
            last_sequence=stream.last_sequence, server_time_ms=self.now_ms(), config=as_reported(stream.config),
            subjects=stream.counts(subjects_filter) if subjects_filter else {}, stored_bytes=stream.bytes)

    def create_stream(self, config: StreamConfig) -> None:
        """Raises BusError for another configuration under the name, and for subjects of another stream."""
        existing = self._streams.get(config.name)
        if existing is not None:
            if existing.config != config:
                raise BusError(BusError.STREAM_NAME_IN_USE, "stream name already in use with a different configuration")
            return
        self._check_overlap(config)
        self._streams_made += 1
        made_at = datetime.fromtimestamp(self.now_ms() / 1000, UTC).isoformat(timespec="milliseconds")
        created = made_at.replace("+00:00", f"{self._streams_made:06}Z")
        self._streams[config.name] = MemoryStream(config, created=created)
        self._routes.clear()
        for connection in self._connections.values():
            connection.reopen_feeds(config.name)

    def _check_overlap(self, config: StreamConfig) -> None:
        others: Iterable[Sequence[str]] = (
            it.config.subjects for it in self._streams.values() if it.config.name != config.name)
        if any(overlap(mine, theirs) for subjects in others for theirs in subjects for mine in config.subjects):
            raise BusError(SUBJECTS_OVERLAP, "subjects overlap with an existing stream")

    def update_stream(self, config: StreamConfig) -> None:
        """Raises BusError(STREAM_NOT_FOUND)."""
        stream = self._stream(config.name, writes=True)
        self._check_overlap(config)
        stream.update(config)
        self._routes.clear()
        self._arm(stream)

    def delete_stream(self, name: str) -> None:
        """With its messages and consumers."""
        del self._streams[self._stream(name).config.name]
        self._routes.clear()
        self._consumers.pop(name, None)

    def stream_names(self, prefix: str) -> list[str]:
        return sorted(name for name in self._streams if name.startswith(prefix))

    def purge(self, name: str, pattern: str, below_sequence: int) -> int:
        """Returns how many messages it deleted."""
        stream = self._stream(name, writes=True)
        purged = stream.purge(pattern, below_sequence)
        self._arm(stream)
        return purged

    def delete_message(self, name: str, sequence: int) -> bool:
        """False when there is none at the sequence."""
        stream = self._stream(name, writes=True)
        deleted = stream.delete(sequence)
        self._arm(stream)
        return deleted
