"""Stream management over raw JetStream API requests: nats-py's own classes lack fields that Toque sets."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec

from toque.errors import SetupError
from toque.storage.nats_connection import Connection
from toque.storage.ports import BusError, BusTimeout, Message, NoResponders, StreamConfig, StreamInfo

API_S = 10.0
DELETE_CONSUMER_S = 1.0  # a courtesy: the server drops an idle one by itself
JETSTREAM_NOT_ENABLED = 10076
JETSTREAM_NOT_ENABLED_FOR_ACCOUNT = 10039
NO_RESPONDERS_STATUS = "503"
STATUS_HEADER = "Status"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)
_FIXED = {"retention": "limits", "storage": "file"}

A = TypeVar("A", bound="Answer")


class ApiError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""

    def raised(self) -> BusError:
        return BusError(self.err_code or self.code, self.description)


class Answer(msgspec.Struct, kw_only=True):
    """What every JetStream answer may be: an error."""

    error: ApiError | None = None


class _State(msgspec.Struct):
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0
    subjects: dict[str, int] | None = None


class _Info(Answer):
    config: dict[str, Any] = {}
    created: str = ""
    ts: datetime = _EPOCH
    state: _State = msgspec.field(default_factory=_State)
    total: int = 0  # subjects, over all pages


class _Names(Answer):
    streams: list[str] | None = None
    total: int = 0


class _Purged(Answer):
    purged: int = 0


class _Delivered(msgspec.Struct):
    consumer_seq: int = 0


class ConsumerState(Answer):
    """A consumer's own numbering, and how many messages of its filters it has not sent yet."""

    delivered: _Delivered = msgspec.field(default_factory=_Delivered)
    num_pending: int = 0


class _Stored(msgspec.Struct):
    subject: str
    seq: int
    time: datetime
    data: str = ""
    hdrs: str = ""


class _Got(Answer):
    message: _Stored | None = None


class Streams:
    """Requests to the JetStream API, on one connection. Every call raises BusError, BusTimeout or NoResponders."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._prefix = connection.options.api_prefix

    def subject(self, operation: str) -> str:
        """The subject of an API request."""
        return f"{self._prefix}.{operation}"

    async def call(self, operation: str, request: Any, type_: type[A], *, timeout_s: float = API_S) -> A:
        """One request and its decoded answer; a refusal is raised."""
        body = b"" if request is None else msgspec.json.encode(request)
        message = await self._connection.ask(self.subject(operation), body, None, timeout_s)
        if message.headers and message.headers.get(STATUS_HEADER) == NO_RESPONDERS_STATUS:
            raise NoResponders(f"JetStream does not answer on {self._prefix}")
        try:
            answer = msgspec.json.decode(message.data, type=type_)
        except msgspec.MsgspecError as error:
            raise BusTimeout(f"the answer to {operation} is not JetStream's: {error}") from error
        if answer.error is not None:
            raise answer.error.raised()
        return answer

    async def require_jetstream(self) -> None:
        """Raises SetupError when the server or the account has no JetStream."""
        try:
            await self.call("INFO", None, Answer)
        except NoResponders as error:
            raise SetupError(_no_jetstream(self._connection)) from error
        except BusError as error:
            if error.code in (JETSTREAM_NOT_ENABLED, JETSTREAM_NOT_ENABLED_FOR_ACCOUNT):
                raise SetupError(_no_jetstream(self._connection)) from error
            raise

    async def info(self, stream: str, subjects_filter: str = "") -> StreamInfo:
        """The stream's state; with a filter also its message counts by subject, all pages of them."""
        request = {"subjects_filter": subjects_filter, "offset": 0} if subjects_filter else None
        info = await self.call(f"STREAM.INFO.{stream}", request, _Info)
        subjects = dict(info.state.subjects or {})
        page = subjects
        while page and len(subjects) < info.total:
            request = {"subjects_filter": subjects_filter, "offset": len(subjects)}
            page = (await self.call(f"STREAM.INFO.{stream}", request, _Info)).state.subjects or {}
            subjects.update(page)
        state = info.state
        return StreamInfo(info.created, state.messages, state.first_seq, state.last_seq, to_ms(info.ts), info.config,
                          subjects, state.bytes)

    async def ensure(self, config: StreamConfig) -> None:
        """Make the stream unless one of that name exists."""
        wanted = {"max_consumers": -1, **_FIXED, **_fields(config)}
        try:
            await self.call(f"STREAM.CREATE.{config.name}", wanted, Answer)
        except BusError as error:
            if error.code != BusError.STREAM_NAME_IN_USE:
                raise

    async def update(self, config: StreamConfig) -> None:
        """Set every field of StreamConfig; the stream's other fields, and metadata of others, stay as they are."""
        present = (await self.info(config.name)).config
        wanted = {name: value for name, value in present.items() if name != "subject_transform"} | _fields(config)
        wanted["metadata"] = {**present.get("metadata", {}), **config.metadata}
        await self.call(f"STREAM.UPDATE.{config.name}", wanted, Answer)

    async def delete(self, stream: str) -> None:
        await self.call(f"STREAM.DELETE.{stream}", None, Answer)

    async def names(self, prefix: str) -> list[str]:
        """Names of the streams that begin with the prefix, sorted."""
        found: list[str] = []
        while True:
            page = await self.call("STREAM.NAMES", {"offset": len(found)}, _Names)
            found += page.streams or []
            if not page.streams or len(found) >= page.total:
                return sorted(name for name in found if name.startswith(prefix))

    async def purge(self, stream: str, subject_filter: str, below_sequence: int) -> int:
        """Delete the filter's messages with a lower sequence."""
        if below_sequence <= 1:
            return 0  # the server takes 0 for "all of them"
        request: dict[str, Any] = {"seq": below_sequence}
        if subject_filter != ">":
            request["filter"] = subject_filter
        return (await self.call(f"STREAM.PURGE.{stream}", request, _Purged)).purged

    async def message(self, stream: str, wanted: dict[str, Any]) -> Message | None:
        """A stored message, read from the stream's leader; None when there is none."""
        try:
            stored = (await self.call(f"STREAM.MSG.GET.{stream}", wanted, _Got)).message
        except BusError as error:
            if error.code == BusError.MESSAGE_NOT_FOUND:
                return None
            raise
        if stored is None:
            raise BusTimeout(f"the answer to STREAM.MSG.GET.{stream} holds no message")
        headers = parse_headers(base64.b64decode(stored.hdrs)) if stored.hdrs else None
        return Message(stored.subject, base64.b64decode(stored.data), headers, sequence=stored.seq,
                       time_ms=to_ms(stored.time))

    async def delete_message(self, stream: str, sequence: int) -> bool:
        """Delete one message, without writing over its bytes. False when there is none at the sequence."""
        try:
            await self.call(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence, "no_erase": True}, Answer)
        except BusError as error:
            if error.code == BusError.SEQUENCE_NOT_FOUND:
                return False
            if error.code == BusError.DELETE_FAILED and await self.message(stream, {"seq": sequence}) is None:
                return False
            raise
        return True

    async def create_consumer(self, stream: str, config: dict[str, Any]) -> None:
        request = {"stream_name": stream, "config": config, "action": "create"}
        await self.call(f"CONSUMER.CREATE.{stream}.{config['name']}", request, Answer)

    async def consumer_state(self, stream: str, name: str) -> ConsumerState:
        """How far the server has come with a consumer."""
        return await self.call(f"CONSUMER.INFO.{stream}.{name}", None, ConsumerState)

    async def delete_consumer(self, stream: str, name: str) -> None:
        await self.call(f"CONSUMER.DELETE.{stream}.{name}", None, Answer, timeout_s=DELETE_CONSUMER_S)


def _fields(config: StreamConfig) -> dict[str, Any]:
    """Every field, those at their default too, so that an update can set them back."""
    fields = msgspec.structs.asdict(config)
    if config.subject_transform is None:
        del fields["subject_transform"]
    return fields


def _no_jetstream(connection: Connection) -> str:
    return (f"JetStream is not enabled on NATS at {connection.options.shown}: start nats-server with -js (or a "
            "jetstream block in its configuration), and enable it for the account")


def to_ms(time: datetime) -> int:
    return (time - _EPOCH) // _MS


def parse_headers(block: bytes) -> dict[str, str]:
    """The headers of a stored message, from their form on the wire."""
    lines = block.decode(errors="replace").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip(): value.strip() for name, _, value in pairs}
