"""Takes events for the instances of one station: by request to the owner, and from the event stream.

An event is the instance's when its record is accepted; until then nobody is told. A repeat of an id gets the first
answer and changes nothing (protocol rule 22).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from toque._names import is_event_type
from toque.errors import Unavailable
from toque.storage import records as r
from toque.storage.runs import newest_run
from toque.workers.engine import Engine
from toque.workers.events import BUFFERED_MAX, Event
from toque.workers.finder import Finder

if TYPE_CHECKING:
    from toque.workers.station import Station

WRONG_TYPE = "the event's type has no legal form: up to 100 letters, digits, '_' and '-', not beginning with '-'"


class Verdict(NamedTuple):
    """What becomes of an event: `code` as in an answer (ok | not_found | ended | refused), and why."""

    code: str
    reason: str = ""
    accepted: asyncio.Future[None] | None = None  # of "ok": done when its record is accepted, of a repeat too


class EventIntake:
    """See the module."""

    def __init__(self, station: Station) -> None:
        self._station = station
        self._finder = Finder(station)
        self._loop = asyncio.get_running_loop()

    async def take(self, workflow: str, instance_id: str, event: Event) -> Verdict:
        """Record the event, and wait until that is accepted: for ever when the station is lost meanwhile.

        Raises Unavailable, BusError: then nothing is known of the instance, and nothing was recorded.
        """
        verdict = await self.place(workflow, instance_id, event)
        if verdict.accepted is not None:
            await verdict.accepted
        return verdict

    async def place(self, workflow: str, instance_id: str, event: Event) -> Verdict:
        """Like `take`, but it does not wait for the acceptance: events placed one after the other keep their order."""
        station = self._station
        if not is_event_type(event.type):
            return Verdict("refused", WRONG_TYPE)
        if len(event.payload) > station.payload_max:
            return Verdict("refused", f"the event's payload takes {len(event.payload):,} bytes as msgpack, more than "
                                      f"{station.payload_max:,}")
        if station.frozen and not station.inside:
            raise Unavailable("the station is being handed over")  # with ever new records it could never be released
        found = await self._finder.engine(workflow, instance_id)
        if found is None:
            return Verdict("not_found", f"no instance {instance_id!r} of workflow {workflow!r}")
        if isinstance(found, r.Status):
            return await self._ended(workflow, instance_id, found, event.id)
        given: asyncio.Future[Verdict] = self._loop.create_future()
        self._loop.call_soon(self._give, found, event, given)  # it runs the instance, which must not be inside a task
        verdict = await given
        while verdict.code == "ended" and found.unaccepted:
            await station.commits.next_acceptance()  # its end is told when that is accepted
        return verdict

    def _give(self, engine: Engine, event: Event, given: asyncio.Future[Verdict]) -> None:
        if given.cancelled():
            return
        try:
            given.set_result(self._verdict(engine, event))
        except Unavailable as error:
            given.set_exception(error)

    def _verdict(self, engine: Engine, event: Event) -> Verdict:
        events = engine.events
        if event.id not in events.ids:
            if engine.ended and engine.end is not None:
                return _ended(engine.title, engine.end.status)
            if engine.closed:
                raise Unavailable("the instance is being read back")
            if events.full:
                self._station.leave_if_idle(engine)
                return Verdict("refused", f"{engine.title} holds {BUFFERED_MAX:,} events that it has not waited for")
            events.receive(event)
        else:
            self._station.leave_if_idle(engine)  # nothing is recorded, whose acceptance would bring it out of memory
        return Verdict("ok", accepted=events.when_accepted(event.id))

    async def _ended(self, workflow: str, instance_id: str, status: r.Status, event_id: str) -> Verdict:
        """A repeat of an event that came before the end gets its first answer."""
        store, station = self._station.context.store, self._station.id
        await store.flush()
        serial = store.find(station, workflow, instance_id)
        history = store.history(station, serial) if serial is not None else []
        if any(isinstance(record, r.EventReceived) and record.event_id == event_id for record in newest_run(history)):
            return Verdict("ok")
        return _ended(f"{workflow}/{instance_id}", status)


def _ended(title: str, status: r.Status) -> Verdict:
    return Verdict("ended", f"{title} is {status.label}")
