"""Builds every subject, stream name and header name of Toque; `subjects.md` describes them, a test compares.

Names are checked before they get here (`toque._names`), so they are legal NATS tokens as they stand.
"""

from __future__ import annotations

from typing import NamedTuple

GROUP_HEADER = "Toque-Group"  # of a journal message: "<epoch> <session> <group> <crc32>"
NONCE_HEADER = "Toque-Nonce"  # of a creation: tells two creations of one id apart
CONTENT_TYPE_HEADER = "Content-Type"  # of a creation or an event: application/json (default) or application/msgpack
REQUEST_HEADER = "Toque-Request"  # of an event: its id, the same in every repeat of it
RETENTION_HEADER = "Toque-Retention"  # of a creation: "<ms that a success is kept> <ms that an error is kept>"
PARENT_HEADER = "Toque-Parent"  # of a child's creation: "<workflow> <id> <run> <start|child> <occurrence> <step>"
REASON_HEADER = "Toque-Reason"  # of a parked message: why
ORIGIN_HEADER = "Toque-Subject"  # of a parked message: the subject it was stored under
CUT_HEADER = "Toque-Cut"  # of a parked message that is not whole: what it lacks
PARKING_HEADERS = frozenset({REASON_HEADER, ORIGIN_HEADER, CUT_HEADER})
SERVER_HEADERS = "nats-"  # what begins so, in any case, the server obeys or sets
SIZE_HEADER = "Nats-Msg-Size"  # set by the server on a message that is read without its body
EXPECTED_LAST_HEADER = "Nats-Expected-Last-Subject-Sequence"
TTL_HEADER = "Nats-TTL"
MARKER_HEADER = "Nats-Marker-Reason"  # set by the server on an expiry marker
BATCH_ID_HEADER = "Nats-Batch-Id"
BATCH_SEQUENCE_HEADER = "Nats-Batch-Sequence"
BATCH_COMMIT_HEADER = "Nats-Batch-Commit"

FIRST_GENERATION = 1


class StationId(NamedTuple):
    """A station: its generation and its number in it, counted from 0."""

    generation: int
    number: int

    def __str__(self) -> str:
        return f"{self.generation}.{self.number}"

    @classmethod
    def parse(cls, text: str) -> StationId:
        generation, _, number = text.partition(".")
        return cls(int(generation), int(number))


def station_number(instance_id: str, stations: int) -> int:
    """The station of an id: FNV-1a 32 modulo the number of stations, as the server's `partition()` computes it."""
    h = 2166136261
    for byte in instance_id.encode():
        h = ((h ^ byte) * 16777619) & 0xFFFFFFFF
    return h % stations


# -- creation and queue ------------------------------------------------------------------------------------------------

def create(account: str, workflow: str, instance_id: str) -> str:
    return f"toque.{account}.create.{workflow}.{instance_id}"


def queue_prefix(account: str, workflow: str, station: StationId) -> str:
    return f"toque.{account}.queue.{workflow}.{station}"


def queue(account: str, workflow: str, station: StationId, instance_id: str) -> str:
    return f"toque.{account}.queue.{workflow}.{station}.{instance_id}"


class QueueToken(NamedTuple):
    """What a queue subject says."""

    workflow: str
    station: StationId
    instance_id: str


def parse_queue(subject: str) -> QueueToken:
    tokens = subject.split(".", 6)
    return QueueToken(tokens[3], StationId(int(tokens[4]), int(tokens[5])), tokens[6])


def queue_transform(account: str, workflow: str, generation: int, stations: int) -> dict[str, str]:
    """The stream's subject transform: what makes a plain publish land at the id's station."""
    return {
        "src": f"toque.{account}.create.{workflow}.*",
        "dest": f"toque.{account}.queue.{workflow}.{generation}.{{{{partition({stations},1)}}}}.{{{{wildcard(1)}}}}",
    }


# -- events ------------------------------------------------------------------------------------------------------------

def event(account: str, workflow: str, instance_id: str, type: str) -> str:
    return f"toque.{account}.event.{workflow}.{instance_id}.{type}"


def events_of(account: str, station: StationId) -> str:
    """Filter of the events for a station's instances."""
    return f"toque.{account}.events.{station}.>"


def stored_event(account: str, station: StationId, workflow: str, instance_id: str, type: str) -> str:
    return f"toque.{account}.events.{station}.{workflow}.{instance_id}.{type}"


class EventToken(NamedTuple):
    """What the subject of a stored event says."""

    station: StationId
    workflow: str
    instance_id: str
    type: str


def parse_event(subject: str) -> EventToken:
    tokens = subject.split(".", 7)
    return EventToken(StationId(int(tokens[3]), int(tokens[4])), tokens[5], tokens[6], tokens[7])


def event_transform(account: str, generation: int, stations: int) -> dict[str, str]:
    """The event stream's subject transform: a plain publish lands at its instance's station."""
    return {
        "src": f"toque.{account}.event.*.*.*",
        "dest": f"toque.{account}.events.{generation}.{{{{partition({stations},2)}}}}"
                ".{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}",
    }


# -- journal, control bucket, parked messages --------------------------------------------------------------------------

def journal(account: str, station: StationId) -> str:
    return f"toque.{account}.journal.{station}"


def control_account(account: str) -> str:
    return f"toque.{account}.control.account"


def control_layout(account: str) -> str:
    return f"toque.{account}.control.layout"


def control_session(account: str, session: str) -> str:
    return f"toque.{account}.control.session.{session}"


def snapshots_of(account: str, station: StationId) -> str:
    """Filter of everything that is kept of a station."""
    return f"toque.{account}.snapshot.{station}.>"


def snapshot(account: str, station: StationId, name: str) -> str:
    """Filter of one snapshot's chunks."""
    return f"toque.{account}.snapshot.{station}.{name}.*"


def snapshot_chunk(account: str, station: StationId, name: str, chunk: int) -> str:
    return f"toque.{account}.snapshot.{station}.{name}.{chunk}"


def parse_snapshot(subject: str) -> str:
    """The name of the snapshot that a chunk belongs to."""
    return subject.split(".")[5]


def dead(account: str, kind: str, workflow: str) -> str:
    return f"toque.{account}.dead.{kind}.{workflow}"


class DeadToken(NamedTuple):
    """What the subject of a parked message says."""

    kind: str
    workflow: str


def parse_dead(subject: str) -> DeadToken:
    tokens = subject.split(".", 4)
    return DeadToken(tokens[3], tokens[4])


class Origin(NamedTuple):
    """What the subject says under which a parked message was stored; `publish` is the one that it came by."""

    kind: str
    workflow: str
    instance_id: str
    publish: str


def parse_origin(subject: str) -> Origin | None:
    """None for a subject of neither a creation nor an event."""
    tokens = subject.split(".")
    place = tokens[2] if len(tokens) > 2 else ""
    match place, len(tokens):
        case "create", count if count > 4:  # a wildcard for an id: the server stored it as it came
            return Origin("create", tokens[3], ".".join(tokens[4:]), subject)
        case "queue", 7:
            return Origin("create", tokens[3], tokens[6], create(tokens[1], tokens[3], tokens[6]))
        case "event", 6:
            return Origin("event", tokens[3], tokens[4], subject)
        case "events", 8:
            return Origin("event", tokens[5], tokens[6], event(tokens[1], tokens[5], tokens[6], tokens[7]))
    return None


# -- requests ----------------------------------------------------------------------------------------------------------

def station_request(account: str, station: StationId, operation: str) -> str:
    return f"toque.{account}.station.{station}.{operation}"


def gatekeeper(account: str) -> str:
    return f"toque.{account}.gatekeeper.lease"


def gatekeeper_nudge(account: str) -> str:
    return f"toque.{account}.gatekeeper.nudge"


def pods(account: str) -> str:
    return f"toque.{account}.pods.report"


def queue_positions(account: str) -> str:
    return f"toque.{account}.pods.positions"


def journal_positions(account: str) -> str:
    return f"toque.{account}.pods.journal"


def released(account: str) -> str:
    return f"toque.{account}.pods.released"


# -- streams -----------------------------------------------------------------------------------------------------------
# '+' cannot occur in an account or workflow name, so the parts of a stream name never run into each other.

def queue_stream(account: str, workflow: str) -> str:
    return f"toque+{account}+queue+{workflow}"


def journal_stream(account: str) -> str:
    return f"toque+{account}+journal"


def event_stream(account: str) -> str:
    return f"toque+{account}+events"


def snapshot_stream(account: str) -> str:
    return f"toque+{account}+snapshots"


def control_stream(account: str) -> str:
    return f"toque+{account}+control"


def dead_stream(account: str) -> str:
    return f"toque+{account}+dead"
