"""The events of one instance: those that no wait has taken, the waits that are open, and who still waits for an answer.

Events meet waits by type alone, first in, first out on both sides. The match is a record (protocol rule 23): what stands
here is what the records of the run say, so a crash forgets no event and gives none out twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from toque._payload import describe_exception
from toque.storage import records as r
from toque.workers.replay import Replay, event_value

if TYPE_CHECKING:
    from toque.workers.engine import Engine
    from toque.workers.step_call import StepCall

BUFFERED_MAX = 10_000  # events of one instance that no wait has taken; more are refused


class Event(NamedTuple):
    """An event on its way to an instance. `payload` is msgpack, checked; `sent_at` broker time in ms."""

    type: str
    id: str
    payload: bytes
    sent_at: int
    sequence: int = 0  # in the event stream; 0 = by request to the owner


class Events:
    """See the module."""

    __slots__ = ("_accepted_to", "_awaited_before", "_buffers", "_count", "_engine", "_told", "_waits", "buffered",
                 "ids", "overdue")

    def __init__(self, engine: Engine, replay: Replay) -> None:
        self._engine: Engine | None = engine
        self.ids = replay.event_ids  # of all events of the run → how many records its own was the last of
        self.buffered = 0
        self._accepted_to = 0
        self.overdue: set[str] = set()  # waits whose time is over, while it is seen whether an event came before
        self._count = 0
        self._buffers: dict[str, deque[tuple[int, r.EventReceived]]] = {}  # type → (order of arrival, event)
        self._waits: dict[str, dict[str, StepCall]] = {}  # type → step → its call, oldest first
        self._awaited_before = replay.awaiting  # until run() is entered: the waits that the journal knows as open
        self._told: deque[tuple[int, asyncio.Future[None]]] = deque()  # number of its record → who waits for it
        for event in replay.buffered:
            self._buffer(event)

    def close(self) -> None:
        """The engine has left memory; what it recorded may still be accepted."""
        self._engine = None

    # -- events --------------------------------------------------------------------------------------------------------

    @property
    def full(self) -> bool:
        return self.buffered >= BUFFERED_MAX

    @property
    def awaited(self) -> list[str]:
        """The types that open waits are for."""
        if self._engine is not None and not self._engine.is_started:
            return list(dict.fromkeys(wait.type for wait in self._awaited_before.values()))
        return list(self._waits)

    @property
    def matchable(self) -> bool:
        """Whether an event is there that an open wait can take."""
        return any(type_ in self._buffers for type_ in self.awaited)

    def receive(self, event: Event) -> None:
        """Record an event, and give it to the wait that is open for it; a resting instance needs a slot first.

        `ids` says whether it came before, `full` whether there is room for it.
        """
        engine = self._engine
        assert engine is not None, "an event for an engine that has left memory"
        record = r.EventReceived(engine.serial, engine.run, engine.seq + 1, engine.now_ms(), *event)
        engine.record(record)
        self.ids[event.id] = engine.recorded
        self._buffer(record)
        if not engine.may_go_on:
            return
        if not engine.called:
            self.go_on()
        elif engine.has_slot and engine.is_started:
            engine.wake()
        else:
            engine.host.engine_called(engine)

    def _buffer(self, event: r.EventReceived) -> None:
        self._count += 1
        self.buffered += 1
        self._buffers.setdefault(event.type, deque()).append((self._count, event))

    # -- waits ---------------------------------------------------------------------------------------------------------

    def wait(self, call: StepCall) -> None:
        """A wait is open; those of one type come in the order of these calls."""
        self._waits.setdefault(call.event_type, {})[call.key] = call

    def drop(self, call: StepCall) -> bool:
        """The wait is open no more. False when it was not."""
        waits = self._waits.get(call.event_type, {})
        if waits.pop(call.key, None) is None:
            return False
        self.overdue.discard(call.key)
        if not waits:
            del self._waits[call.event_type]
        return True

    def go_on(self) -> None:
        """An event may be there for a wait that is open."""
        engine = self._engine
        idle = engine is None or not engine.is_started or engine.resting or not engine.may_go_on
        if engine is not None and not idle and self.match() is not None:
            engine.turn()

    def match(self) -> StepCall | None:
        """Give one event to one wait: that which came first of those wanted, to the oldest wait for its type.

        One at a time, when run() has everything that was recorded before: it may cancel the other waits then.
        """
        engine = self._engine
        assert engine is not None
        found = None if engine.handing_out else self._next()
        if found is None:
            return None
        call, event = found
        self.drop(call)
        engine.waits.drop(call.key)
        value, failure = None, None
        try:
            value = event_value(call, event)
        except Exception as error:  # validators are user code, too  # noqa: BLE001
            failure = describe_exception(error)
        now = engine.now_ms()
        engine.conclude(call, r.WaitDone(engine.serial, engine.run, engine.seq + 1, now, call.name, call.occurrence,
                                         event.seq, call.started_at or now, failure), value)
        return call

    def _next(self) -> tuple[StepCall, r.EventReceived] | None:
        """Takes the event out of its buffer."""
        heads = [self._buffers[type_][0] for type_ in self._waits if type_ in self._buffers]
        if not heads:
            return None
        _, event = min(heads, key=lambda head: head[0])
        buffer = self._buffers[event.type]
        buffer.popleft()
        self.buffered -= 1
        if not buffer:
            del self._buffers[event.type]
        return next(iter(self._waits[event.type].values())), event

    def time_out(self, call: StepCall) -> None:
        """Every event that was acknowledged before the time-out is here by now (protocol rule 23)."""
        engine = self._engine
        if engine is not None and engine.pausing and call.key in self.overdue:  # it is decided anew after the pause
            self.overdue.discard(call.key)
            engine.waits.add(call.key, call.due)
        elif engine is not None and engine.may_go_on and self.drop(call):
            engine.conclude(call, r.WaitTimedOut(engine.serial, engine.run, engine.seq + 1, engine.now_ms(), call.name,
                                                 call.occurrence, call.started_at))
            engine.turn()

    # -- who has sent them ---------------------------------------------------------------------------------------------

    def when_accepted(self, event_id: str) -> asyncio.Future[None]:
        """Done when the record of this event is accepted."""
        return self.when_recorded(self.ids[event_id])

    def when_recorded(self, number: int) -> asyncio.Future[None]:
        """Done when so many records of the engine are accepted, and those that were asked for before."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if number <= self._accepted_to:
            future.set_result(None)
        else:
            self._told.append((number, future))
        return future

    def tell(self, accepted: int) -> None:
        """So many records of the engine are accepted."""
        self._accepted_to = accepted
        while self._told and self._told[0][0] <= accepted:
            _, future = self._told.popleft()
            if not future.done():
                future.set_result(None)
