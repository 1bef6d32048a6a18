"""SousChef: the instances of one workflow at one station: admission, known ids, and the committed queue position."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from toque import _subjects as subjects
from toque._names import is_instance_id
from toque._subjects import StationId
from toque.errors import InvalidName
from toque.storage.family import Parent
from toque.storage.ports import Message
from toque.storage.records import Admitted, Parked, TombRow
from toque.workers.stream_position import StreamPosition
from toque.workflow import Workflow, workflow_version

if TYPE_CHECKING:
    from toque.workers.station import Station

JSON_TYPE = "application/json"


class SousChef:
    """See the module. `flow` is the workflow's class as this pod's app has it."""

    def __init__(self, station: Station, workflow: str, flow: type[Workflow[Any, Any]]) -> None:
        self._owner = station
        self.station: StationId = station.id
        self.workflow = workflow
        self.flow = flow
        self.slots_in_use = 0
        self._position = StreamPosition()
        self._buffer: deque[tuple[str, Message]] = deque()
        self._dropped: dict[str, int] = {}  # messages under way whose ids a control operation is admitting
        self._set_aside: set[int] = set()  # sequences of parked messages that are still in the stream

    @property
    def handled(self) -> deque[int]:
        """Sequences that are committed and still in the stream: no longer queued."""
        return self._position.handled

    @property
    def waiting(self) -> int:
        return len(self._buffer)

    @property
    def can_admit(self) -> bool:
        if not self._buffer or (self.workflow, self._buffer[0][0]) in self._owner.deleting:
            return False  # an id whose old instance is being deleted is known in a moment, or not any more
        return self._owner.may_admit()

    def committed(self, clear_to: int) -> int:
        """The queue sequence up to which every message of this SousChef is admitted, dropped or parked, and accepted.

        `clear_to`: the sequence up to which the reader has offered every message.
        """
        oldest = self._position.oldest or (self._buffer[0][1].sequence if self._buffer else 0)
        return oldest - 1 if oldest else clear_to

    def purged(self, first_sequence: int) -> None:
        """The stream begins at this sequence now."""
        self._position.purged(first_sequence)
        self._set_aside = {sequence for sequence in self._set_aside if sequence >= first_sequence}

    def offer(self, instance_id: str, message: Message) -> None:
        """A message of the queue, in stream order; it may have come before."""
        self._buffer.append((instance_id, message))

    def forget_buffer(self) -> None:
        """A fresh consumer delivers all of it again."""
        self._buffer.clear()

    @property
    def under_way(self) -> bool:
        """Whether an admission or a parking is not accepted yet."""
        return self._position.under_way

    def forget_stream(self) -> None:
        """The stream was made anew, and counts from its start again. Call it with nothing under way."""
        self._position.forget_stream()
        self._set_aside.clear()

    def admit_next(self) -> bool:
        """Admit the oldest waiting creation into the slot that was taken for it. False when none was left."""
        while self._buffer:
            instance_id, message = self._buffer.popleft()
            if message.sequence in self._set_aside or message.sequence in self._position:
                continue  # it was read again, and is being seen to
            if (self.workflow, instance_id) in self._owner.deleting:
                self._buffer.appendleft((instance_id, message))
                return False
            if self._owner.knows(self.workflow, instance_id) or is_late(
                    self._owner.tombstone(self.workflow, instance_id), message):
                self._drop(instance_id, message.sequence)
            elif reason := refusal(instance_id, message, self._owner.payload_max) or self._nameless(instance_id, message):
                self._park(message, reason)
            else:
                self._position.begin(message.sequence)
                self._owner.admit(self, self.admitted(instance_id, message, message.sequence), into_slot=True)
                return True
        return False

    def admitted(self, instance_id: str, message: Message, queue_sequence: int) -> Admitted:
        """The record of a creation. `queue_sequence` 0: its message stays queued and will be dropped."""
        return Admitted(
            self._owner.new_serial(), 1, 1, self._owner.now_ms(), self.workflow, instance_id,
            message.header(subjects.NONCE_HEADER), queue_sequence, message.time_ms, message.data,
            message.header(subjects.CONTENT_TYPE_HEADER) or JSON_TYPE, workflow_version(self.flow),
            parse_retention(message.header(subjects.RETENTION_HEADER)), message.header(subjects.PARENT_HEADER))

    def _nameless(self, instance_id: str, message: Message) -> str:
        """Why a creation without a nonce of an id that was deleted is parked; "" when it is none."""
        if message.header(subjects.NONCE_HEADER) or self._owner.tombstone(self.workflow, instance_id) is None:
            return ""
        return ("an instance of this id was deleted less than 24 hours ago, and the creation has no nonce: it may be a "
                "late attempt of the same one")

    def was_accepted(self, queue_sequence: int) -> None:
        """An Admitted or Parked record with this queue sequence stands in the journal."""
        self._position.accepted(queue_sequence)

    def was_admitted(self, instance_id: str) -> None:
        """The Admitted record of a control operation stands in the journal."""
        sequence = self._dropped.pop(instance_id, 0)
        if sequence:
            self.was_accepted(sequence)

    def _drop(self, instance_id: str, sequence: int) -> None:
        """A message of a known id: it is handled when the record that makes the id known is accepted."""
        if self._owner.is_admitting(self.workflow, instance_id):
            self._position.begin(sequence)
            self._dropped[instance_id] = sequence
        else:
            self.handled.append(sequence)

    def is_parked(self, queue_sequence: int) -> bool:
        """Whether this message can never become an instance, though it still lies in the stream."""
        return queue_sequence in self._set_aside

    def may_purge(self) -> bool:
        """Whether the station is surely still ours."""
        return self._owner.in_time()

    def _park(self, message: Message, reason: str) -> None:
        self._position.begin(message.sequence)
        self._set_aside.add(message.sequence)
        self._owner.park(Parked(0, 0, 0, self._owner.now_ms(), self.workflow, message.sequence, message.subject,
                                reason), message)


def is_late(tomb: TombRow | None, message: Message) -> bool:
    """Whether it is a late attempt of a creation whose instance was deleted (protocol rule 15), or was stored while that
    was there: then its creator may have heard that the id exists."""
    if tomb is None:
        return False
    nonce = message.header(subjects.NONCE_HEADER)
    again = bool(nonce) and nonce == tomb.nonce
    return again or message.time_ms <= tomb.deleted_at


def parse_retention(text: str) -> list[int]:
    """Of a creation's header; [] without one. Raises ValueError for any other text."""
    kept = [int(part) for part in text.split()]
    if len(kept) not in (0, 2) or any(ms < 0 for ms in kept):
        raise ValueError("two numbers, of a success and of an error")
    return kept


def refusal(instance_id: str, message: Message, payload_max: int) -> str:
    """Why a queued message can never become an instance; "" when it can."""
    if not is_instance_id(instance_id):
        return "the id has no legal form: up to 100 letters, digits, '_' and '-', not beginning with '-'"
    try:
        parse_retention(message.header(subjects.RETENTION_HEADER))
    except ValueError:
        return f"the header {subjects.RETENTION_HEADER} is not of the form '<ms of a success> <ms of an error>'"
    parent = message.header(subjects.PARENT_HEADER)
    try:
        if parent:
            Parent.parse(parent)
    except (ValueError, InvalidName):
        return f"the header {subjects.PARENT_HEADER} does not name a parent"
    if len(message.data) > payload_max:
        return f"the params have {len(message.data)} bytes, more than {payload_max}"
    return ""
