"""The event stream's messages for one station: each becomes a record of its instance, or is parked.

Messages of one instance are seen to one after the other, those of different instances side by side: one that has to wait
(its instance is not known yet, or its workflow not here) holds up nobody else. What comes twice is known by its event id,
whoever owned the station before; positions serve the purge alone (protocol rule 11).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from toque import _subjects as subjects
from toque._names import is_instance_id, is_workflow
from toque._payload import msgpack_from
from toque._subjects import StationId
from toque.errors import Unavailable, UsageError
from toque.storage import records as r
from toque.storage.ports import BusError, Message, NoResponders
from toque.workers.event_intake import EventIntake, Verdict
from toque.workers.events import Event
from toque.workers.set_aside import set_aside
from toque.workers.stream_position import StreamPosition

if TYPE_CHECKING:
    from toque.workers.station import Station

UNKNOWN_MS = 5_000  # so long an event waits for its instance to be created, from its publication on (rule 16)
AGAIN_S = 0.5
GATE_POLL_S = 0.02
NO_WORKFLOW = "unknown"  # stands in a parked message's subject for what is no workflow's name

Key = tuple[str, str]  # workflow, instance id


class Arrived(NamedTuple):
    """A message, and what its subject says."""

    workflow: str
    instance_id: str
    type: str
    message: Message
    created: str  # which stream it came from


class EventInbox:
    """See the module. `on_room` is called when one more has been seen to."""

    def __init__(self, station: Station, *, on_room: Callable[[], None] = lambda: None) -> None:
        self._owner = station
        self.station: StationId = station.id
        self.on_room = on_room
        self.waiting = 0  # offered, and neither recorded nor parked
        self._intake = EventIntake(station)
        self._position = StreamPosition()
        self._offered_to = 0
        self._queues: dict[Key, deque[Arrived]] = {}
        self._drains: dict[Key, asyncio.Task[None]] = {}

    # -- for the reader ------------------------------------------------------------------------------------------------

    @property
    def handled(self) -> deque[int]:
        return self._position.handled

    @property
    def under_way(self) -> bool:
        return self._position.under_way

    def committed(self, clear_to: int) -> int:
        """The sequence up to which every message for this station is a record, accepted, or parked."""
        oldest = self._position.oldest
        return oldest - 1 if oldest else clear_to

    def purged(self, first_sequence: int) -> None:
        self._position.purged(first_sequence)

    def forget_buffer(self) -> None:
        """Nothing: what was offered is being seen to, and is not taken again when a fresh consumer brings it."""

    def forget_stream(self) -> None:
        self._position.forget_stream()
        self._offered_to = 0

    def may_purge(self) -> bool:
        return self._owner.in_time()

    def offer(self, arrived: Arrived) -> None:
        """A message of the stream, in stream order; it may have come before."""
        sequence = arrived.message.sequence
        if sequence <= self._offered_to:
            return
        self._offered_to = sequence
        self._position.begin(sequence)
        self.waiting += 1
        key = (arrived.workflow, arrived.instance_id)
        if key in self._queues:
            self._queues[key].append(arrived)
        else:
            self._queues[key] = deque((arrived,))
            self._drains[key] = self._owner.spawn(self._drain(key))

    # -- for time-outs -------------------------------------------------------------------------------------------------

    def has_passed(self, key: Key, sequence: int) -> bool:
        """Whether every message up to there that was offered for the instance is recorded or parked."""
        queue = self._queues.get(key)
        return not queue or queue[0].message.sequence > sequence

    # -- one after the other -------------------------------------------------------------------------------------------

    async def _drain(self, key: Key) -> None:
        queue = self._queues[key]
        while queue:
            await self._see_to(queue[0])
            queue.popleft()
            self.waiting -= 1
            self.on_room()
        del self._queues[key], self._drains[key]

    async def _see_to(self, arrived: Arrived) -> None:
        sequence = arrived.message.sequence
        event = _event(arrived)
        verdict = event if isinstance(event, Verdict) else await self._placed(arrived, event)
        if verdict.accepted is not None:
            verdict.accepted.add_done_callback(lambda _: self._position.accepted(sequence))
        elif verdict.code == "ok":
            self._position.accepted(sequence)  # a repeat of one that was recorded long ago
        else:
            await self._park(arrived, verdict.reason)
            self._position.accepted(sequence)

    async def _placed(self, arrived: Arrived, event: Event) -> Verdict:
        while True:
            while not self._owner.may_admit():  # the journal is full, or the station is being handed over
                await asyncio.sleep(GATE_POLL_S)
            try:
                verdict = await self._intake.place(arrived.workflow, arrived.instance_id, event)
            except (Unavailable, BusError, NoResponders):  # nothing is known: the broker is away, say
                await asyncio.sleep(AGAIN_S)
                continue
            if verdict.code != "not_found" or self._owner.now_ms() - event.sent_at >= UNKNOWN_MS:
                return verdict
            await asyncio.sleep(AGAIN_S)

    async def _park(self, arrived: Arrived, reason: str) -> None:
        message = arrived.message
        workflow = arrived.workflow if is_workflow(arrived.workflow) else NO_WORKFLOW
        record = r.EventParked(0, 0, 0, self._owner.now_ms(), message.sequence, message.subject, reason)
        await set_aside(self._owner, record, message, kind="event", workflow=workflow)


def _event(arrived: Arrived) -> Event | Verdict:
    """The event that a message brings, or why it can never be one."""
    message = arrived.message
    if not is_workflow(arrived.workflow) or not is_instance_id(arrived.instance_id):
        return Verdict("refused", "the workflow or the id has no legal form")
    try:
        payload = msgpack_from(message.data, message.header(subjects.CONTENT_TYPE_HEADER))
    except UsageError as error:
        return Verdict("refused", str(error))
    event_id = message.header(subjects.REQUEST_HEADER) or f"{arrived.created}-{message.sequence}"
    return Event(arrived.type, event_id, payload, message.time_ms, message.sequence)
