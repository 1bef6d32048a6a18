"""Finds the instance that an operation is meant for: in memory, in the index, or still in the queue (protocol rule 12).

What is found is an Engine to write records with: one that runs, one that rests, or one that was read back and not started.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from toque import _subjects as subjects
from toque.errors import Unavailable
from toque.storage import records as r
from toque.storage.ports import BusError, Message
from toque.workers.engine import Engine
from toque.workers.souschef import is_late, refusal

if TYPE_CHECKING:
    from toque.workers.station import Station

LEAVING_POLL_S = 0.01
LEAVING_S_MAX = 1.0


class Finder:
    """Of one station."""

    def __init__(self, station: Station) -> None:
        self._station = station
        self._context = station.context

    async def engine(self, workflow: str, instance_id: str) -> Engine | r.Status | None:
        """The engine of a live instance, read back or admitted if need be; the status of an ended one; None for none."""
        return (await self.loaded(workflow, instance_id) or await self.admitted(workflow, instance_id)
                or await self.loaded(workflow, instance_id))

    async def loaded(self, workflow: str, instance_id: str) -> Engine | r.Status | None:
        """Of an instance that was admitted; None if there is none. Raises Unavailable while one is on its way out,
        or is being deleted."""
        key = (workflow, instance_id)
        engine = await self._in_memory(key)
        if engine is not None:
            told = engine.end is not None and not engine.unaccepted
            return engine.end.status if told and engine.end is not None else engine
        serial = self._context.store.find(self._station.id, *key)
        row = self._context.store.row(self._station.id, serial) if serial is not None else None
        if row is not None and key in self._station.deleting:
            raise Unavailable("the instance is being deleted")  # not before that is accepted it is gone
        if row is None or serial is None:
            return None
        return row.status if row.status.ended else self._station.load_engine(serial)

    async def _in_memory(self, key: tuple[str, str]) -> Engine | None:
        give_up = asyncio.get_running_loop().time() + LEAVING_S_MAX
        engine = self._station.by_id.get(key)
        if engine is not None and engine.over and not engine.ended:
            await self._context.store.flush()  # it leaves memory when it is folded, to be loaded anew
            engine = self._station.by_id.get(key)
        while engine is not None and engine.over and not engine.ended:
            if asyncio.get_running_loop().time() > give_up:
                raise Unavailable("the instance is being read back: a callback of it is still inside")
            await asyncio.sleep(LEAVING_POLL_S)
            engine = self._station.by_id.get(key)
        return engine

    async def admitted(self, workflow: str, instance_id: str) -> Engine | None:
        """A queued creation, admitted by its id; its message is dropped when it comes."""
        message = await self.queue_message(workflow, instance_id)
        souschef = self._station.souschefs.get(workflow)
        if message is None or self._station.knows(workflow, instance_id):
            return None
        if souschef is None:
            raise Unavailable(f"pod {self._context.pod} does not have workflow {workflow!r}")
        if refusal(instance_id, message, self._station.payload_max):
            return None  # it will be parked
        return self._station.admit(souschef, souschef.admitted(instance_id, message, 0), into_slot=False)

    async def queue_message(self, workflow: str, instance_id: str) -> Message | None:
        """The creation as it lies in the queue, by leader read, unless it can never become an instance."""
        message = await self._stored(workflow, instance_id)
        if message is None or is_late(self._station.tombstone(workflow, instance_id), message):
            return None
        souschef = self._station.souschefs.get(workflow)
        is_parked = souschef is not None and souschef.is_parked(message.sequence)
        return None if is_parked else message

    async def clear_queue(self, workflow: str, instance_id: str) -> None:
        """Take the creation of a deleted instance out of the queue: it would keep others of its id out. Raises BusError,
        BrokerUnavailable. The hole that it leaves is one message long."""
        message = await self._stored(workflow, instance_id)
        if message is not None and is_late(self._station.tombstone(workflow, instance_id), message):
            await self._context.bus.purge(subjects.queue_stream(self._station.account, workflow), message.subject,
                                          message.sequence + 1)

    async def _stored(self, workflow: str, instance_id: str) -> Message | None:
        subject = subjects.queue(self._station.account, workflow, self._station.id, instance_id)
        try:
            return await self._context.bus.last_message(subjects.queue_stream(self._station.account, workflow), subject)
        except BusError as error:
            if error.code == BusError.STREAM_NOT_FOUND:
                return None
            raise
