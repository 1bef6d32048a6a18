"""The only ways from the core to the world: clock, randomness, bus and store, as Protocols.

The real ones are `nats_bus`, `lmdb_store` and `system`; the in-memory ones (`memory_bus`, `memory_store`) obey the same
conformance tests and run in the simulator's virtual time. Timers and tasks of the core use the running asyncio loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from toque.errors import BrokerUnavailable, ToqueError

if TYPE_CHECKING:
    from toque._subjects import StationId
    from toque.storage.records import (
        Errand,
        Group,
        InstanceRow,
        LeaseRow,
        OutboxRow,
        Position,
        Record,
        SnapshotRow,
        Status,
        TombRow,
    )

Headers = Mapping[str, str]
BATCH_MESSAGES_MAX = 1_000  # of one atomic batch; the server's limit


# -- clock and randomness ----------------------------------------------------------------------------------------------

class Clock(Protocol):
    """The host's clock. Broker time (what is stored) is not here: see `toque.workers.broker_time`."""

    def boottime(self) -> float:
        """Seconds of CLOCK_BOOTTIME: monotonic, and it counts suspended time."""
        ...


class Randomness(Protocol):
    """A `random.Random` is one."""

    def random(self) -> float: ...

    def getrandbits(self, k: int, /) -> int: ...


# -- bus ---------------------------------------------------------------------------------------------------------------

class BusError(ToqueError):
    """The server refused: JetStream's error code and description. Nothing was stored."""

    WRONG_LAST_SEQUENCE = 10071
    IN_FLIGHT = 10164  # R3: an append of mine is still in flight
    STREAM_NOT_FOUND = 10059
    MESSAGE_NOT_FOUND = 10037
    SEQUENCE_NOT_FOUND = 10043  # nothing to delete: it is gone
    DELETE_FAILED = 10057  # also: there never was such a sequence
    MAXIMUM_MESSAGES = 10077  # also: per subject; the description tells which
    STREAM_NAME_IN_USE = 10058

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"{description} ({code})")
        self.code = code
        self.description = description

    @property
    def duplicate(self) -> bool:
        """A second message on a subject that takes one (protocol rule 14: only the description tells)."""
        return self.code == self.MAXIMUM_MESSAGES and "per subject" in self.description

    @property
    def full(self) -> bool:
        """The stream's message limit is reached."""
        return self.code == self.MAXIMUM_MESSAGES and "per subject" not in self.description


class BusTimeout(BrokerUnavailable):
    """No answer in time, or the connection was lost: a write may or may not have been stored."""


class NoResponders(ToqueError):
    """Nobody listens on the subject (for a JetStream publish: no stream takes it). Nothing was stored."""


class PubAck(NamedTuple):
    """A JetStream acknowledgement."""

    stream: str
    sequence: int


class Message:
    """A message as stored or delivered. `time_ms` and `sequence` are 0 for core messages."""

    __slots__ = ("data", "headers", "reply", "sequence", "subject", "time_ms")

    def __init__(self, subject: str, data: bytes, headers: Headers | None = None, *, sequence: int = 0,
                 time_ms: int = 0, reply: str = "") -> None:
        self.subject = subject
        self.data = data
        self.headers = headers
        self.sequence = sequence
        self.time_ms = time_ms
        self.reply = reply

    def header(self, name: str) -> str:
        return self.headers.get(name, "") if self.headers else ""


class StreamConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The part of a JetStream stream's configuration that Toque sets; field names are the server's.

    Durations are nanoseconds. Retention is always Limits, storage always file.
    """

    name: str
    subjects: list[str]
    description: str = ""
    num_replicas: int = 1
    max_msgs: int = -1
    max_msgs_per_subject: int = -1
    max_msg_size: int = -1
    max_bytes: int = -1
    max_age: int = 0
    discard: str = "old"
    discard_new_per_subject: bool = False
    subject_transform: dict[str, str] | None = None
    allow_msg_ttl: bool = False
    subject_delete_marker_ttl: int = 0
    allow_atomic: bool = False
    allow_direct: bool = True
    metadata: dict[str, str] = {}


class StreamInfo(NamedTuple):
    """A stream's state, and the server's own time when it answered."""

    created: str  # identity: another value means another stream under the same name
    messages: int
    first_sequence: int
    last_sequence: int
    server_time_ms: int
    config: Mapping[str, Any]  # as the server reports it
    subjects: Mapping[str, int]  # message counts, when a subjects filter was given
    stored_bytes: int = 0  # that its messages take on the server's disk


class FeedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a disposable consumer reads: one reader, memory storage, in stream order."""

    stream: str
    filters: tuple[str, ...]  # subject filters; never empty
    start_sequence: int = 1
    last_per_subject: bool = False  # begin with the newest message of each subject
    name: str = ""  # of the server's consumer, made unique by the bus; readable in NATS tools
    headers_only: bool = False  # messages come without their bodies, and with a SIZE_HEADER


class Feed(Protocol):
    """An open disposable consumer. It re-makes itself behind the last message delivered after any loss.

    Deliveries come in stream order; after a loss a message may come twice (never skipped).
    """

    def want(self, messages: int) -> None:
        """Allow so many more messages to be delivered. The bus pulls for them at once."""
        ...

    async def clear_to(self) -> int:
        """A stream sequence up to which the handler has had every message of the filters.

        Where nothing waits for credit it is the stream's last one at the time of the call, though no message of the
        filters may be near it. Raises BusError, BusTimeout, NoResponders.
        """
        ...

    async def close(self) -> None: ...


class Subscription(Protocol):
    """An open core subscription."""

    async def close(self) -> None: ...


class Bus(Protocol):
    """One connection to NATS."""

    @property
    def max_payload(self) -> int:
        """Bytes that the server takes in one message."""
        ...

    async def publish(self, subject: str, data: bytes, headers: Headers | None = None, *,
                      timeout_s: float = 5.0) -> PubAck:
        """Store through JetStream. Raises BusError (refused), NoResponders (no stream), BusTimeout (unknown)."""
        ...

    async def publish_batch(self, messages: Sequence[tuple[str, bytes, Headers | None]], *,
                            timeout_s: float = 10.0) -> PubAck:
        """Store 1 to BATCH_MESSAGES_MAX messages of one stream that has `allow_atomic`: all of them, or none.

        The answer carries the sequence of the last one; the others stand right before it. Raises as `publish` does; a
        refusal (BusError) does not tell which message was its reason (protocol rule 14), and nothing was stored.
        """
        ...

    def emit(self, subject: str, data: bytes, headers: Headers | None = None, *, reply: str = "") -> None:
        """Core publish, without waiting. Dropped while there is no connection. `reply`: where answers shall go."""
        ...

    async def request(self, subject: str, data: bytes, headers: Headers | None = None, *,
                      timeout_s: float = 5.0) -> Message:
        """Core request. Raises NoResponders, BusTimeout."""
        ...

    async def subscribe(self, subject: str, handler: Callable[[Message], None]) -> Subscription:
        """Call `handler` for each core message; `Message.reply` is set on requests. Active when it returns."""
        ...

    def respond(self, message: Message, data: bytes) -> None:
        """Answer a request."""
        ...

    async def last_message(self, stream: str, subject: str) -> Message | None:
        """The newest message of a subject (which may be a filter), read from the stream's leader."""
        ...

    async def message_at(self, stream: str, sequence: int) -> Message | None:
        """The message at a sequence, read from the stream's leader."""
        ...

    async def stream_info(self, stream: str, *, subjects_filter: str = "") -> StreamInfo:
        """Raises BusError(STREAM_NOT_FOUND)."""
        ...

    async def ensure_stream(self, config: StreamConfig) -> None:
        """Make the stream unless one of that name exists (which is left as it is)."""
        ...

    async def update_stream(self, config: StreamConfig) -> None: ...

    async def delete_stream(self, name: str) -> None: ...

    async def list_streams(self, prefix: str) -> list[str]:
        """Names of the streams that begin with the prefix."""
        ...

    async def purge(self, stream: str, subject_filter: str, below_sequence: int) -> int:
        """Delete the filter's messages with a lower sequence; the filter ">" means all of them. Returns how many.

        Deleting some subjects of a stretch and leaving others makes the server slow for every consumer that still has to
        cross it: 30,000 messages/s became 400.
        """
        ...

    async def delete_message(self, stream: str, sequence: int) -> bool:
        """Delete one message. False when there is none at the sequence (any more). Raises BusError, BusTimeout."""
        ...

    async def open_feed(self, spec: FeedSpec, handler: Callable[[Sequence[Message]], None]) -> Feed:
        """Open a disposable consumer; `handler` gets the messages in batches, after `Feed.want`."""
        ...

    async def close(self) -> None: ...


# -- store -------------------------------------------------------------------------------------------------------------

class StoreDamaged(ToqueError):
    """The store cannot be trusted or written any more. The pod sets it aside and reads the journal again."""


class StoredRow(NamedTuple):
    """One row of a table of the folded state; `key` without the station's part."""

    table: int
    key: bytes
    value: bytes


@dataclass(frozen=True, kw_only=True)
class RowQuery:
    """One page of a station's instances. Times are ms; 0 = any. `…_after` is from then on, `…_before` up to then."""

    workflow: str = ""
    statuses: tuple[Status, ...] = ()  # () = any
    id_prefix: str = ""
    created_after: int = 0
    created_before: int = 0
    ended_after: int = 0
    ended_before: int = 0
    newest: bool = False  # the newest first
    after: int = 0  # the serial behind which the page begins, in that order; 0 = at the start
    limit: int = 100
    look_max: int = 500  # instances looked at for it

    def wants(self, row: InstanceRow) -> bool:
        """Whether the instance is one of those asked for."""
        return (self.workflow in ("", row.workflow) and (not self.statuses or row.status in self.statuses)
                and row.id.startswith(self.id_prefix)
                and _within(row.created_at, self.created_after, self.created_before)
                and _within(row.ended_at, self.ended_after, self.ended_before))


def _within(time_ms: int, after: int, before: int) -> bool:
    """A time that is not yet (0) is within no bounds."""
    if not after and not before:
        return True
    return time_ms > 0 and after <= time_ms and (not before or time_ms < before)


class RowPage(NamedTuple):
    """Serials and rows, and the `after` of the next page: 0 = there is none. A page may be empty and have a next one."""

    rows: list[tuple[int, InstanceRow]]
    next: int


class Export(Protocol):
    """One station's folded state, read out of one read transaction; see `toque.storage.snapshot_format`."""

    @property
    def position(self) -> Position:
        """Where in the journal the state stands."""
        ...

    @property
    def journal_bytes(self) -> int:
        """Bytes of the station's journal up to there."""
        ...

    @property
    def rows(self) -> int:
        """Rows read so far."""
        ...

    async def next(self) -> bytes:
        """The next chunk, read in a worker thread; empty when there is no more."""
        ...

    def close(self) -> None:
        """End the transaction. Idempotent."""
        ...


class Store(Protocol):
    """The folded state of a pod's stations. Only accepted groups are ever applied.

    `apply` returns at once; a writer folds behind it, in order. Readers see what has been folded, so callers keep what
    they applied and has not been folded yet (`folded` tells). A store is a cache of the journal: any doubt about it ends
    with the station dropped and read again.
    """

    def apply(self, group: Group, on_folded: Callable[[], None] | None = None) -> None:
        """Fold one accepted group. `on_folded` is called in the caller's loop when readers can see it."""
        ...

    async def flush(self) -> None:
        """Wait until everything applied so far is folded."""
        ...

    @property
    def lag_s(self) -> float:
        """Age in seconds of the oldest group that is applied and not folded."""
        ...

    def position(self, station: StationId) -> Position | None:
        """Where in the journal the folded state of the station stands; None = nothing known."""
        ...

    async def drop(self, station: StationId) -> None:
        """Forget everything of a station, its position first. Call only with nothing of it left to fold."""
        ...

    async def set_aside(self, station: StationId) -> str:
        """Keep everything of a station for inspection, outside of the store. Returns where; call `drop` then."""
        ...

    def export(self, station: StationId, chunk_bytes: int) -> Export | None:
        """Begin to read out everything of a station, cut into chunks. None = nothing is known of it."""
        ...

    async def load(self, station: StationId, rows: Sequence[StoredRow], position: Position | None = None) -> None:
        """Put rows of a snapshot in place of a dropped station's.

        The last call gives the position. Killed before it, the station has none, so that nothing of it is believed.
        """
        ...

    def snapshots(self, station: StationId) -> list[SnapshotRow]:
        """The newest counting snapshots, oldest first."""
        ...

    def journal_bytes(self, station: StationId) -> int:
        """Bytes of the station's whole journal up to its position, trimmed ones too."""
        ...

    def find(self, station: StationId, workflow: str, instance_id: str) -> int | None:
        """The serial of an instance."""
        ...

    def row(self, station: StationId, serial: int) -> InstanceRow | None: ...

    def history(self, station: StationId, serial: int) -> list[Record]:
        """Every record of the instance's present run, in order."""
        ...

    def history_from(self, station: StationId, serial: int, run: int, seq: int, limit: int) -> list[list[Record]]:
        """At most `limit` pieces of the instance's kept records, in order: those that begin at (run, seq) or behind it.

        A piece is what one group brought of the instance. Cheaper than the whole history, and bounded.
        """
        ...

    def unended(self, station: StationId) -> Iterable[tuple[int, InstanceRow]]:
        """Every live instance, oldest first."""
        ...

    def due(self, station: StationId, until_ms: int, limit: int) -> list[tuple[int, int]]:
        """(due ms, serial) of waiting instances to be woken by then, soonest first."""
        ...

    def page(self, station: StationId, query: RowQuery) -> RowPage:
        """Instances in the order of their admission, or the newest first; looks at a bounded number of them."""
        ...

    def is_indexed(self, station: StationId) -> bool:
        """Whether the table of states is whole; it is not in a state that was begun by a version without it."""
        ...

    def index_rows(self, station: StationId) -> Iterable[list[StoredRow]]:
        """What is to be loaded for that, piece by piece, the mark that it is whole last."""
        ...

    def counts(self, station: StationId) -> dict[tuple[str, str], int]:
        """Instances per (workflow, status)."""
        ...

    def highest_serial(self, station: StationId) -> int:
        """Ever given at this station, to instances that were deleted too; 0 = none."""
        ...

    def tombstone(self, station: StationId, workflow: str, instance_id: str) -> TombRow | None:
        """What is left of a deleted instance of this id, if it was deleted not too long ago."""
        ...

    def to_delete(self, station: StationId, until_ms: int, limit: int) -> list[int]:
        """Serials of ended instances whose retention is over by then, those first whose it is over first."""
        ...

    def tombs_due(self, station: StationId, until_ms: int) -> bool:
        """Whether a tombstone is old enough to be forgotten."""
        ...

    def outbox(self, station: StationId, after: tuple[int, int], limit: int) -> list[tuple[int, Errand, OutboxRow]]:
        """What ended instances still have to tell others, by serial and errand, from behind `after` on."""
        ...

    def has_errand(self, station: StationId, serial: int) -> bool:
        """Whether it still has to tell others of its end."""
        ...

    def queue_position(self, station: StationId, workflow: str) -> int:
        """The committed position: the queue sequence up to which all is admitted, dropped or parked."""
        ...

    def leases(self, station: StationId) -> dict[str, LeaseRow]:
        """Gatekeeper's leases by session (station 0 only)."""
        ...

    def close(self) -> None:
        """Fold what is left, write it to disk, mark the directory as cleanly closed."""
        ...
