"""The clients of a simulated run: they create, terminate and await instances, and log what they are told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Final

import msgspec

from toque import _subjects as subjects
from toque.chaos.history import CREATE, RESULT, Op
from toque.client import Instance, NewInstance
from toque.errors import InstanceFailed, LostRace, ToqueError, Unavailable
from toque.sim.plan import Creation, Sending
from toque.sim.shapes import EVENT_TYPE
from toque.sim.world import World
from toque.storage.memory_bus import MemoryBus
from toque.storage.ports import BusError, BusTimeout, NoResponders

TERMINATE: Final = "terminate"
EVENT: Final = "event"
CLIENTS: Final = 2
CREATE_TIMEOUT: Final = "8 seconds"
RESULT_TIMEOUT: Final = "20 seconds"
SEND_TIMEOUT: Final = "4 seconds"
SEND_S_MAX: Final = 30.0  # so long an event is sent again, whatever was answered
AGAIN_S: Final = 0.5


class Clients:
    """All of them. `params` holds, for each op that creates, what it asked for."""

    def __init__(self, world: World, creations: Sequence[Creation]) -> None:
        self.params: dict[int, Any] = {}  # by the op's number
        self.events: dict[int, str] = {}  # ids of events, by the op's number
        self.buses = [MemoryBus(world.broker, f"client-{number}") for number in range(CLIENTS)]
        self._clients = [world.client(bus) for bus in self.buses]
        self._world = world
        self._ops = world.history.operations
        self._results: set[tuple[str, str]] = set()  # that somebody awaits
        self._over = False
        self.tasks: list[asyncio.Task[None]] = []
        for batch, items in groupby(creations, key=lambda creation: creation.batch):
            for group in [list(items)] if batch else [[creation] for creation in items]:
                self._begin(group)

    def _begin(self, group: list[Creation]) -> None:
        first = group[0]
        if first.how == "batch":
            self._spawn(self._batch(group))
        elif first.how == "plain":
            self._spawn(self._plain(first))
        else:
            for creator in range(2 if first.how == "twice" else 1):
                self._spawn(self._create(first, creator))
        for creation in group:
            if creation.terminate_at_s:
                self._spawn(self._terminate(creation))
            for sending in creation.events:
                self._spawn(self._send(creation, sending))

    def _spawn(self, coroutine: Any) -> None:
        self.tasks.append(asyncio.ensure_future(coroutine))

    def stop_asking(self) -> None:
        """The run is over: whoever still waits for a result gives up after its present attempt."""
        self._over = True

    # -- one creation --------------------------------------------------------------------------------------------------

    async def _create(self, creation: Creation, creator: int) -> None:
        await asyncio.sleep(creation.at_s)
        client = self._clients[creator]
        with contextlib.suppress(ToqueError), self._ops.recording(CREATE, creation.workflow, creation.id) as op:
            params = self._asks(op, creation, creator)
            await client.create(creation.workflow, params, id=creation.id, timeout=CREATE_TIMEOUT)
        if op.outcome == "ok":
            await self._result(client.handle(creation.workflow, creation.id))

    def _asks(self, op: Op, creation: Creation, creator: int) -> Any:
        self.params[op.number] = params = [creation.id, creator]
        return params

    async def _batch(self, group: list[Creation]) -> None:
        await asyncio.sleep(group[0].at_s)
        client, workflow = self._clients[0], group[0].workflow
        ops = [self._ops.invoke(CREATE, workflow, creation.id) for creation in group]
        items = [NewInstance(self._asks(op, creation, 0), id=creation.id)
                 for op, creation in zip(ops, group, strict=True)]
        try:
            results = await client.create_batch(workflow, items, timeout=CREATE_TIMEOUT)
            errors: list[ToqueError | None] = [result.error for result in results]
        except ToqueError as error:
            errors = [error] * len(ops)
        for op, outcome in zip(ops, errors, strict=True):
            if outcome is None:
                self._ops.ok(op)
            elif isinstance(outcome, Unavailable):
                self._ops.unknown(op, repr(outcome))
            else:
                self._ops.failed(op, repr(outcome))
        await asyncio.gather(*(self._result(client.handle(workflow, op.instance)) for op in ops if op.outcome == "ok"))

    async def _plain(self, creation: Creation) -> None:
        await asyncio.sleep(creation.at_s)
        op = self._ops.invoke(CREATE, creation.workflow, creation.id)
        body = msgspec.json.encode(self._asks(op, creation, 0))
        try:
            await self._world.publish(creation.workflow, creation.id, body, bus=self.buses[0])
        except BusTimeout as error:
            self._ops.unknown(op, repr(error))
        except (BusError, NoResponders) as error:
            self._ops.failed(op, repr(error))
        else:
            self._ops.ok(op)
            await self._result(self._clients[0].handle(creation.workflow, creation.id))

    # -- afterwards ----------------------------------------------------------------------------------------------------

    async def _terminate(self, creation: Creation) -> None:
        await asyncio.sleep(creation.terminate_at_s)
        handle = self._clients[1].handle(creation.workflow, creation.id)
        with contextlib.suppress(ToqueError), self._ops.recording(TERMINATE, creation.workflow, creation.id):
            await handle.terminate()

    async def _send(self, creation: Creation, sending: Sending) -> None:
        """Send an event; by request until it is known what became of it, always with the same id."""
        await asyncio.sleep(sending.at_s)
        handle = self._clients[1].handle(creation.workflow, creation.id)
        give_up = self._world.now + SEND_S_MAX
        while True:
            op = self._ops.invoke(EVENT, creation.workflow, creation.id)
            self.events[op.number] = sending.id
            try:
                if sending.how == "plain":
                    await self._publish_event(creation, sending)
                else:
                    await handle.send_event(EVENT_TYPE, sending.id, event_id=sending.id, timeout=SEND_TIMEOUT)
            except (LostRace, BusError, NoResponders) as error:
                self._ops.failed(op, repr(error))
            except Unavailable as error:
                self._ops.unknown(op, repr(error))
            else:
                return self._ops.ok(op)
            if sending.how == "plain" or "InstanceEnded" in op.value or self._world.now > give_up:
                return None
            await asyncio.sleep(AGAIN_S)

    async def _publish_event(self, creation: Creation, sending: Sending) -> None:
        subject = subjects.event("main", creation.workflow, creation.id, EVENT_TYPE)
        await self.buses[0].publish(subject, msgspec.json.encode(sending.id), {subjects.REQUEST_HEADER: sending.id})

    async def _result(self, handle: Instance[Any]) -> None:
        """Ask until somebody tells the end."""
        if (handle.workflow, handle.id) in self._results:
            return
        self._results.add((handle.workflow, handle.id))
        while not self._over:
            try:
                with self._ops.recording(RESULT, handle.workflow, handle.id) as op:
                    op.value = told(await handle.result(RESULT_TIMEOUT))
                    op.status = "complete"
                return
            except InstanceFailed:
                return
            except LostRace:
                if not any(stop.believes for stop in self._world.history.stops):
                    return  # for good; but an owner whose clock had stopped may have said so long after its time
                await asyncio.sleep(AGAIN_S)
            except Unavailable:
                await asyncio.sleep(AGAIN_S)


def told(output: Any) -> str:
    """An output as the log keeps it."""
    return msgspec.json.encode(output).decode()
