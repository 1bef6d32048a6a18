"""The bus on a real NATS server: the Bus port over one connection.

Hot calls go over nats-py's core API with acknowledgements to an inbox of our own (`nats_connection`); streams are
managed in `nats_streams`, disposable consumers live in `nats_feed`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import msgspec
from nats.aio.msg import Msg

from toque._logging import get_logger
from toque._subjects import BATCH_COMMIT_HEADER, BATCH_ID_HEADER, BATCH_SEQUENCE_HEADER
from toque.storage.nats_connection import Connection, Handle
from toque.storage.nats_feed import NatsFeed
from toque.storage.nats_options import NatsOptions
from toque.storage.nats_streams import NO_RESPONDERS_STATUS, STATUS_HEADER, Answer, Streams
from toque.storage.ports import (
    BATCH_MESSAGES_MAX,
    BusTimeout,
    FeedSpec,
    Headers,
    Message,
    NoResponders,
    PubAck,
    StreamConfig,
    StreamInfo,
)

_log = get_logger("toque.nats")


class _Ack(Answer):
    stream: str = ""
    seq: int = 0


_ack_decoder = msgspec.json.Decoder(_Ack)


class NatsBus:
    """One connection to NATS, made by `connect`; see the Bus port for what each call promises.

    Nothing is buffered: without a connection every call fails at once with BusTimeout, and questions that are open when
    the connection breaks end with BusTimeout too (their outcome is unknown). It reconnects by itself, for ever.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._streams = Streams(connection)

    @classmethod
    async def connect(cls, options: NatsOptions) -> NatsBus:
        """Connect. Raises BrokerUnavailable when nobody answers, SetupError when the login or TLS is refused."""
        return cls(await Connection.open(options))

    @property
    def connected(self) -> bool:
        """Whether there is a connection at this moment."""
        return self._connection.connected

    @property
    def max_payload(self) -> int:
        return self._connection.max_payload

    @property
    def server_version(self) -> str:
        """The version of the server that we are connected to, such as "2.15.1"."""
        return self._connection.server_version

    async def require_jetstream(self) -> None:
        """Raises SetupError, with what to do, when the server or the account has no JetStream."""
        await self._streams.require_jetstream()

    # -- messages ------------------------------------------------------------------------------------------------------

    async def publish(self, subject: str, data: bytes, headers: Headers | None = None, *,
                      timeout_s: float = 5.0) -> PubAck:
        """Store through JetStream. Raises also PayloadTooLarge, for what the server would not take."""
        connection = self._connection
        if connection.clogged:
            await connection.room(timeout_s)
        return _ack_of(await connection.ask(subject, data, headers, timeout_s), subject)

    async def publish_batch(self, messages: Sequence[tuple[str, bytes, Headers | None]], *,
                            timeout_s: float = 10.0) -> PubAck:
        assert 0 < len(messages) <= BATCH_MESSAGES_MAX, f"{len(messages)} messages in a batch"
        connection = self._connection
        if connection.clogged:
            await connection.room(timeout_s)
        for _, data, headers in messages:
            connection.require_fits(data, headers)
        batch_id = os.urandom(16).hex()
        last = len(messages)
        for number, (subject, data, headers) in enumerate(messages, 1):
            place = {BATCH_ID_HEADER: batch_id, BATCH_SEQUENCE_HEADER: str(number)}
            if number < last:
                connection.send(subject, data, {**headers, **place} if headers else place)
        subject, data, headers = messages[-1]
        commit = {**(headers or {}), **place, BATCH_COMMIT_HEADER: "1"}
        return _ack_of(await connection.ask(subject, data, commit, timeout_s), subject)

    def emit(self, subject: str, data: bytes, headers: Headers | None = None, *, reply: str = "") -> None:
        """Core publish, without waiting. Dropped while there is no connection, or while the server takes no data."""
        if self._connection.connected and not self._connection.clogged:
            self._connection.send(subject, data, headers, reply)

    async def request(self, subject: str, data: bytes, headers: Headers | None = None, *,
                      timeout_s: float = 5.0) -> Message:
        connection = self._connection
        if connection.clogged:
            await connection.room(timeout_s)
        answer = await connection.ask(subject, data, headers, timeout_s)
        if _nobody_listens(answer):
            raise NoResponders(f"nobody listens on {subject}")
        return _message(answer)

    async def subscribe(self, subject: str, handler: Callable[[Message], None]) -> Handle:
        """Call `handler` for each core message. What a handler raises is logged, and the next message is handled."""

        async def on_message(message: Msg) -> None:
            handler(_message(message))

        handle = await self._connection.subscribe(subject, on_message)
        try:
            await self._connection.flush()
        except BaseException:  # nobody will have the handle to close it by
            await handle.close()
            raise
        return handle

    def respond(self, message: Message, data: bytes) -> None:
        """Answer a request. Dropped while there is no connection; then the question ends with a time-out."""
        assert message.reply, "this message asks for no answer"
        self.emit(message.reply, data)

    # -- streams -------------------------------------------------------------------------------------------------------

    async def last_message(self, stream: str, subject: str) -> Message | None:
        return await self._streams.message(stream, {"last_by_subj": subject})

    async def message_at(self, stream: str, sequence: int) -> Message | None:
        return await self._streams.message(stream, {"seq": sequence})

    async def stream_info(self, stream: str, *, subjects_filter: str = "") -> StreamInfo:
        return await self._streams.info(stream, subjects_filter)

    async def ensure_stream(self, config: StreamConfig) -> None:
        await self._streams.ensure(config)

    async def update_stream(self, config: StreamConfig) -> None:
        """Set every field of the config; fields of the server's that StreamConfig lacks stay as they are."""
        await self._streams.update(config)

    async def delete_stream(self, name: str) -> None:
        await self._streams.delete(name)

    async def list_streams(self, prefix: str) -> list[str]:
        return await self._streams.names(prefix)

    async def purge(self, stream: str, subject_filter: str, below_sequence: int) -> int:
        return await self._streams.purge(stream, subject_filter, below_sequence)

    async def delete_message(self, stream: str, sequence: int) -> bool:
        return await self._streams.delete_message(stream, sequence)

    async def open_feed(self, spec: FeedSpec, handler: Callable[[Sequence[Message]], None]) -> NatsFeed:
        feed = NatsFeed(self._connection, self._streams, spec, handler)
        await feed.open()
        return feed

    async def close(self) -> None:
        """Disconnect; open questions end with BusTimeout. Feeds of this bus deliver nothing any more."""
        await self._connection.close()


def _nobody_listens(answer: Msg) -> bool:
    return answer.headers is not None and answer.headers.get(STATUS_HEADER) == NO_RESPONDERS_STATUS


def _message(message: Msg) -> Message:
    return Message(message.subject, message.data, message.headers, reply=message.reply)


def _ack_of(answer: Msg, subject: str) -> PubAck:
    if _nobody_listens(answer):
        raise NoResponders(f"no stream takes {subject}")
    try:
        ack = _ack_decoder.decode(answer.data)
    except msgspec.MsgspecError as error:
        raise BusTimeout(f"the answer on {subject} is not JetStream's: {error}; the outcome is unknown") from error
    if ack.error is not None:
        raise ack.error.raised()
    return PubAck(ack.stream, ack.seq)
