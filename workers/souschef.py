"""SousChef: the instances of one workflow at one station: admission, known ids, and the committed queue position."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from toque import _subjects as subjects
from toque._names import is_instance_id
from toque._payload import PAYLOAD_MAX
from toque._subjects import StationId
from toque.storage.ports import Message
from toque.storage.records import Admitted, Parked
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
        self.committed = 0  # queue sequence up to which every message is admitted, dropped or parked, and accepted
        self.uncleared = 0  # messages behind `committed` that may still be in the stream
        self.parked = 0
        self._buffer: deque[tuple[str, Message]] = deque()
        self._unaccepted = 0  # admissions and parkings under way
        self._dropped = 0  # sequence of a dropped message behind admissions that are under way

    @property
    def waiting(self) -> int:
        return len(self._buffer)

    @property
    def can_admit(self) -> bool:
        return bool(self._buffer) and self._owner.may_admit()

    def offer(self, instance_id: str, message: Message) -> None:
        """A message of the queue, in stream order; it may have come before."""
        self._buffer.append((instance_id, message))

    def forget_buffer(self) -> None:
        """A fresh consumer delivers all of it again."""
        self._buffer.clear()

    def admit_next(self) -> bool:
        """Admit the oldest waiting creation into the slot that was taken for it. False when none was left."""
        while self._buffer:
            instance_id, message = self._buffer.popleft()
            if message.sequence <= self.committed or self._owner.knows(self.workflow, instance_id):
                self._drop(message.sequence)
            elif reason := refusal(instance_id, message):
                self._park(message, reason)
            else:
                self._unaccepted += 1
                self._owner.admit(self, self.admitted(instance_id, message, message.sequence), into_slot=True)
                return True
        return False

    def admitted(self, instance_id: str, message: Message, queue_sequence: int) -> Admitted:
        """The record of a creation. `queue_sequence` 0: its message stays queued and will be dropped."""
        return Admitted(
            self._owner.new_serial(), 1, 1, self._owner.now_ms(), self.workflow, instance_id,
            message.header(subjects.NONCE_HEADER), queue_sequence, message.time_ms, message.data,
            message.header(subjects.CONTENT_TYPE_HEADER) or JSON_TYPE, workflow_version(self.flow))

    def was_accepted(self, queue_sequence: int) -> None:
        """An Admitted or Parked record with this queue sequence stands in the journal."""
        self._unaccepted -= 1
        self._advance(queue_sequence)
        if self._unaccepted == 0 and self._dropped:
            self._advance(self._dropped)
            self._dropped = 0

    def may_purge(self) -> bool:
        return self._owner.in_time()

    def _drop(self, sequence: int) -> None:
        if self._unaccepted:
            self._dropped = max(self._dropped, sequence)
        else:
            self._advance(sequence)

    def _advance(self, sequence: int) -> None:
        if sequence > self.committed:
            self.committed = sequence
            self.uncleared += 1

    def _park(self, message: Message, reason: str) -> None:
        self._unaccepted += 1
        self.parked += 1
        self._owner.park(Parked(0, 0, 0, self._owner.now_ms(), self.workflow, message.sequence, message.subject,
                                reason), message)


def refusal(instance_id: str, message: Message) -> str:
    """Why a queued message can never become an instance; "" when it can."""
    if not is_instance_id(instance_id):
        return "the id has no legal form: up to 100 letters, digits, '_' and '-', not beginning with '-'"
    if len(message.data) > PAYLOAD_MAX:
        return f"the params have {len(message.data)} bytes, more than {PAYLOAD_MAX}"
    return ""
