"""Records, groups and rows: what the journal and the store hold, and their encoding (msgpack arrays, format 1).

A record is a value (protocol rule 4): it names its instance by the station's serial, the run, and its place in the run.
New fields are only ever added at the end of a record, with a default, so that older records still decode.
"""

from __future__ import annotations

import zlib
from enum import IntEnum
from typing import ClassVar

import msgspec

from toque._subjects import StationId

FORMAT = 1
TOMBSTONE_MS = 24 * 3600 * 1000
GROUP_RECORDS_MAX = 512
GROUP_BYTES_MAX = 512 * 1024
MESSAGE_RESERVE = 16 * 1024  # of the server's max_payload: headers, and the record around a payload (protocol rule 17)


class Status(IntEnum):
    """Where an instance stands. Queued instances have no record yet, so QUEUED is never stored."""

    QUEUED = 0
    RUNNING = 1
    WAITING = 2
    COMPLETE = 3
    ERRORED = 4
    TERMINATED = 5
    PAUSED = 6
    WAITING_FOR_PAUSE = 7

    @property
    def ended(self) -> bool:
        return Status.COMPLETE <= self <= Status.TERMINATED

    @property
    def label(self) -> str:
        """As it is told to people and clients."""
        return "waitingForPause" if self is Status.WAITING_FOR_PAUSE else self.name.lower()

    @classmethod
    def of(cls, label: str) -> Status:
        """Raises KeyError for a text that is no label."""
        return _STATUSES[label]


_STATUSES = {status.label: status for status in Status}


class StepKind(IntEnum):
    """Part of a step's identity: (kind, name, occurrence)."""

    DO = 1
    SLEEP = 2
    EVENT = 3
    START = 4  # creates a child and goes on
    CHILD = 5  # creates a child and waits for its end


class Errand(IntEnum):
    """What an ended instance still has to tell others: an entry in the outbox."""

    END = 0  # its end, to its parent
    CHILDREN = 1  # that they are over, to its children


class Failure(msgspec.Struct, array_like=True, frozen=True):
    """What is kept of an exception: type name, message, and traceback text cut to a bound."""

    type: str
    message: str
    traceback: str = ""


class RetryConfig(msgspec.Struct, array_like=True, frozen=True):
    """A step's resolved options, kept with its first failed attempt; times in milliseconds."""

    limit: int
    delay_ms: int
    backoff: str
    cap_ms: int
    jitter: bool
    timeout_ms: int


class Record(msgspec.Struct, array_like=True, frozen=True, tag_field="kind"):
    """One durable fact of one instance. `serial` 0 marks a fact of the station itself; `at` is broker time in ms."""

    serial: int
    run: int
    seq: int
    at: int

    ends: ClassVar[bool] = False


class Admitted(Record, tag=1, frozen=True):
    """The instance exists. First record of its first run."""

    workflow: str
    id: str
    nonce: str
    queue_sequence: int  # 0: admitted by a control operation, the message is still queued
    created_at: int  # ms, the queue message's own time
    params: bytes
    content_type: str
    version: str = ""
    retention: list[int] = []  # ms that a success and an error are kept, as the creation asked; [] = as the workflow says
    parent: str = ""  # of a child: see `toque.storage.family`


class StepDone(Record, tag=2, frozen=True):
    """A callback's result: the checkpoint. First wins per (run, step)."""

    step: StepKind
    name: str
    occurrence: int
    attempt: int
    started_at: int
    result: bytes  # msgpack


class AttemptFailed(Record, tag=3, frozen=True):
    """An attempt failed and another will follow at `retry_at`. `idle`: nothing else of the instance is running."""

    step: StepKind
    name: str
    occurrence: int
    attempt: int
    started_at: int
    failure: Failure
    retry_at: int
    config: RetryConfig
    idle: bool = False


class StepFailed(Record, tag=4, frozen=True):
    """The step has failed for good: run() gets this error, on every replay too."""

    step: StepKind
    name: str
    occurrence: int
    attempt: int
    started_at: int
    failure: Failure
    timed_out: bool = False


class SleepStarted(Record, tag=5, frozen=True):
    """A timer is set. `idle`: nothing else of the instance is running, so it holds no slot from here on."""

    name: str
    occurrence: int
    due: int
    idle: bool = False


class SleepDone(Record, tag=6, frozen=True):
    """The timer fired."""

    name: str
    occurrence: int


class Waiting(Record, tag=7, frozen=True):
    """Nothing of the instance is running but timers set earlier: it holds no slot from here on."""


class Interrupted(Record, tag=8, frozen=True):
    """The instance held a slot when its session ended without releasing the station (protocol rule 20)."""

    session: str


class Woken(Record, tag=9, frozen=True):
    """A waiting or held instance took a slot again."""


class Ended(Record, tag=10, frozen=True):
    """The terminal record."""

    status: Status
    output: bytes = b""  # msgpack, for COMPLETE
    failure: Failure | None = None
    delete_at: int = 0  # when its retention is over, ms; 0 = it is kept
    request: str = ""  # of the control operation that ended it
    children: bool = False  # its children are to be terminated, too

    ends: ClassVar[bool] = True


class Blocked(Record, tag=11, frozen=True):
    """The instance is held, for `reason` (for example changed code), until it is loaded again."""

    reason: str


class StepCancelled(Record, tag=12, frozen=True):
    """run() has cancelled a step that had a timer or failed attempts: neither counts any more."""

    step: StepKind
    name: str
    occurrence: int


class EventReceived(Record, tag=13, frozen=True):
    """An event of `type` is the instance's now: buffered until a wait takes it, first in, first out."""

    type: str
    event_id: str  # of the caller's first attempt (protocol rule 22)
    payload: bytes  # msgpack
    sent_at: int
    sequence: int = 0  # in the event stream; 0 = by request to the owner


class WaitStarted(Record, tag=14, frozen=True):
    """A wait for an event began. `idle`: nothing else of the instance is running, so it holds no slot from here on."""

    name: str
    occurrence: int
    type: str
    due: int  # of its time-out
    idle: bool = False


class WaitDone(Record, tag=15, frozen=True):
    """The match: the wait got the event that the record `event` of this run brought. Never recomputed (rule 23)."""

    name: str
    occurrence: int
    event: int  # the seq of its EventReceived
    started_at: int
    failure: Failure | None = None  # its payload did not fit what run() waited for: run() got this error


class WaitTimedOut(Record, tag=16, frozen=True):
    """No event came in time: run() gets the error, on every replay too."""

    name: str
    occurrence: int
    started_at: int


class PauseAsked(Record, tag=17, frozen=True):
    """Callbacks that are inside finish; nothing new is entered. `Paused` follows when all have left."""

    request: str


class Paused(Record, tag=18, frozen=True):
    """Nothing of the instance runs, fires or holds a slot, until it is resumed. `request`: "" behind a PauseAsked."""

    request: str


class Resumed(Record, tag=19, frozen=True):
    """It goes on: every open timer is moved by `shift_ms`, the length of the pause."""

    request: str
    shift_ms: int


class Claim(Record, tag=20, frozen=True):
    """First record of an epoch: a session takes the station."""

    pod: str
    session: str


class Released(Record, tag=21, frozen=True):
    """Last record of an epoch: the station is free; `successor` (a session, or empty) may claim at once."""

    successor: str


class Lease(Record, tag=22, frozen=True):
    """Gatekeeper: the absolute number of slots that a session may use, by its request number."""

    session: str
    number: int
    slots: int


class LeaseEnded(Record, tag=23, frozen=True):
    """Gatekeeper: an ended session's slots are free again."""

    session: str


class Parked(Record, tag=24, frozen=True):
    """A queue message that cannot become an instance was set aside, for `reason`."""

    workflow: str
    queue_sequence: int
    subject: str
    reason: str


class GroupHeader(msgspec.Struct, frozen=True):
    """The chain of a station: who wrote this group, and which one it is. Text form: "epoch session group crc"."""

    epoch: int
    session: str
    group: int
    crc: int

    def text(self) -> str:
        return f"{self.epoch} {self.session} {self.group} {self.crc:08x}"

    @classmethod
    def parse(cls, text: str) -> GroupHeader:
        """Raises ValueError for any other text."""
        epoch, session, group, crc = text.split(" ")
        return cls(int(epoch), session, int(group), int(crc, 16))


class Position(msgspec.Struct, array_like=True, frozen=True):
    """A place in a station's journal: the message's sequence and its header."""

    sequence: int
    header: GroupHeader


class Snapshot(Record, tag=25, frozen=True):
    """The snapshot object `name` counts from here on: the station's state at `position`, whole in the object stream."""

    name: str
    position: Position
    crc: int  # of all its bytes
    size_bytes: int
    chunks: int
    rows: int
    journal_bytes: int  # of the station's journal up to its position


class Deleted(Record, tag=26, frozen=True):
    """Of the station: these instances are gone, but for a tombstone of id and nonce for a while (protocol rule 15)."""

    serials: list[int]
    request: str = ""  # of the control operation; "" = their retention was over
    tombstone_ms: int = TOMBSTONE_MS


class Restarted(Record, tag=27, frozen=True):
    """First record of a later run, of an instance that had ended or not. Nothing of earlier runs counts any more.

    With `from_key` the outcomes of the steps that began before that step are kept: see `toque.storage.runs`.
    """

    request: str
    version: str
    from_key: str = ""  # identity of the step to begin from; "" = from the start


class EventParked(Record, tag=28, frozen=True):
    """Of the station: a message of the event stream was set aside, for `reason`."""

    sequence: int
    subject: str
    reason: str


class ChildBegun(Record, tag=29, frozen=True):
    """run() wants a child, which may be created from here on."""

    step: StepKind  # START or CHILD
    name: str
    occurrence: int
    workflow: str
    id: str


class ChildCreated(Record, tag=30, frozen=True):
    """The creation is acknowledged, and the wait for the child's end begins. `idle`: as of WaitStarted."""

    name: str
    occurrence: int
    due: int  # of its time-out
    idle: bool = False


class ChildEnded(Record, tag=31, frozen=True):
    """The child's end came: the outcome of its step, recorded whether run() is in memory or not. First wins."""

    name: str
    occurrence: int
    child_run: int
    status: Status
    output: bytes = b""  # msgpack, for COMPLETE
    failure: Failure | None = None


class Delivered(Record, tag=32, frozen=True):
    """Of the station: what the end of run `of_run` of the instance `of` had to tell others is told."""

    of: int
    of_run: int
    errand: Errand


AnyRecord = (
    Admitted | StepDone | AttemptFailed | StepFailed | SleepStarted | SleepDone | Waiting | Interrupted | Woken | Ended
    | Blocked | StepCancelled | EventReceived | WaitStarted | WaitDone | WaitTimedOut | PauseAsked | Paused | Resumed
    | Claim | Released | Lease | LeaseEnded | Parked | Snapshot | Deleted | Restarted | EventParked
    | ChildBegun | ChildCreated | ChildEnded | Delivered
)

_encoder = msgspec.msgpack.Encoder()
_records_decoder = msgspec.msgpack.Decoder(list[AnyRecord])
encode_record = _encoder.encode


def join_records(encoded: list[bytes]) -> bytes:
    """The msgpack array of records that are encoded already."""
    n = len(encoded)
    if n < 16:
        head = bytes((0x90 | n,))
    elif n < 65536:
        head = b"\xdc" + n.to_bytes(2, "big")
    else:
        head = b"\xdd" + n.to_bytes(4, "big")
    return head + b"".join(encoded)


def decode_records(body: bytes) -> list[Record]:
    """Raises msgspec.MsgspecError when the body is not a list of records of this format."""
    return _records_decoder.decode(body)  # type: ignore[return-value]  # each member of the union is a Record


def crc_of(body: bytes) -> int:
    return zlib.crc32(body)


class Group:
    """An accepted group: what one journal message holds. `encoded` are its records one by one, where known."""

    __slots__ = ("encoded", "position", "records", "station")

    def __init__(self, station: StationId, position: Position, records: list[Record],
                 encoded: list[bytes] | None = None) -> None:
        self.station = station
        self.position = position
        self.records = records
        self.encoded = encoded if encoded is not None else [encode_record(record) for record in records]


class InstanceRow(msgspec.Struct, array_like=True):
    """The folded header of one instance."""

    workflow: str
    id: str
    nonce: str
    run: int
    seq: int  # of the last record applied
    status: Status
    created_at: int
    admitted_at: int
    ended_at: int = 0
    version: str = ""
    timers: dict[str, int] = {}  # open waits: step key → due, ms
    interruptions: int = 0  # since the last progress
    blocked_on: str = ""
    armed: int = 0  # the due time under which the instance stands in the table of timers
    awaits: dict[str, str] = {}  # open waits for events: step key → event type
    called_at: int = 0  # an event came that an open wait can take; 0 = none
    buffered: int = 0  # events that no wait has taken
    paused_at: int = 0
    requests: list[str] = []  # ids of the last control operations (protocol rule 22)
    delete_at: int = 0  # under which the instance stands in the table of those to be deleted
    parent: str = ""  # of a child

    @property
    def wake_at(self) -> int:
        """When it is to go on: the end of the soonest open wait, or at once for an event; ms, 0 = not by itself."""
        due = min(self.timers.values(), default=0)
        return min(due, self.called_at) if due and self.called_at else due or self.called_at


class LeaseRow(msgspec.Struct, array_like=True, frozen=True):
    """The folded lease of one session."""

    number: int
    slots: int


class TombRow(msgspec.Struct, array_like=True, frozen=True):
    """What is left of a deleted instance, for a while."""

    nonce: str
    deleted_at: int
    request: str = ""  # of the control operation
    forget_at: int = 0


class OutboxRow(msgspec.Struct, array_like=True, frozen=True):
    """An errand of an ended instance."""

    run: int
    delete_at: int  # when the instance's retention is over: it is kept until its errands are done


class SnapshotRow(msgspec.Struct, array_like=True, frozen=True):
    """A counting snapshot, as folded from its record."""

    record: Snapshot
    recorded: Position  # of the group that holds the record
    covers: int  # the journal sequence up to which it stands for the station: at least its position


def next_covered(record: Snapshot, recorded: Position) -> int:
    """Nothing of the station lies between a group and the next one, so the stretch before that is covered too."""
    if record.position.header.group + 1 == recorded.header.group:
        return recorded.sequence - 1
    return record.position.sequence
