"""Control operations on the instances of one station: terminate, pause, resume, restart, delete; and retention.

Each is a record, answered when that is accepted: so an acknowledged one holds. One at a time for each instance. An
operation carries an id from the caller's first attempt, which the record keeps: a repeat gets the first answer and does
nothing again (protocol rule 22). Killed anywhere: the record is there or it is not, and the next owner goes on from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from toque._protocol import Answer, InstanceRequest, RestartRequest, TerminateRequest
from toque.errors import Unavailable
from toque.storage import records as r
from toque.storage.family import Parent
from toque.storage.fold import step_key
from toque.storage.runs import newest_run, step_of
from toque.workers.engine import Engine
from toque.workers.finder import Finder
from toque.workflow import workflow_version

if TYPE_CHECKING:
    from toque.workers.station import Station

SWEEP_EVERY_S = 0.5
DELETED_PER_RECORD = 1_000
TOLD_WHEN_FOLDED = frozenset({"pause", "resume", "restart"})  # a status after them is read from the index
DONE_MAX = 10_000  # requests that are remembered in memory

Operation = Callable[[InstanceRequest], Awaitable[Answer]]


class Lifecycle:
    """See the module."""

    def __init__(self, station: Station, finder: Finder) -> None:
        self._station = station
        self._store = station.context.store
        self._finder = finder
        self._done: dict[tuple[str, str, str], None] = {}  # the last requests that were answered here, oldest first
        self._under_way: dict[tuple[str, str], asyncio.Lock] = {}
        self.operations: dict[str, tuple[type[InstanceRequest], Operation]] = {
            "terminate": (TerminateRequest, self._terminate),
            "pause": (InstanceRequest, self._pause),
            "resume": (InstanceRequest, self._resume),
            "restart": (RestartRequest, self._restart),
            "delete": (InstanceRequest, self._delete),
        }

    async def serve(self, name: str, request: InstanceRequest) -> Answer:
        """The answer to one operation."""
        async with self._alone(request):
            if request.request and self._was_done(request):
                if name == "delete":
                    await self._finder.clear_queue(request.workflow, request.id)
                return self._ok()
            answer = await self.operations[name][1](request)
            if name in TOLD_WHEN_FOLDED:
                await self._store.flush()
            if request.request and answer.code == "ok":
                self._done[request.workflow, request.id, request.request] = None
                while len(self._done) > DONE_MAX:
                    del self._done[next(iter(self._done))]
            return answer

    @asynccontextmanager
    async def _alone(self, request: InstanceRequest) -> AsyncIterator[None]:
        """Nobody else steers this instance meanwhile."""
        key = (request.workflow, request.id)
        while (lock := self._under_way.get(key)) is not None:
            async with lock:
                pass  # whoever held it takes it away
        self._under_way[key] = lock = asyncio.Lock()
        async with lock:
            try:
                yield
            finally:
                del self._under_way[key]

    def _was_done(self, request: InstanceRequest) -> bool:
        """By this owner, or by one before: what was accepted before this epoch is folded."""
        if (request.workflow, request.id, request.request) in self._done:
            return True
        tomb = self._store.tombstone(self._station.id, request.workflow, request.id)
        row = self._row(request)
        return (tomb is not None and tomb.request == request.request) or (
            row is not None and request.request in row.requests)

    # -- operations ----------------------------------------------------------------------------------------------------

    async def _terminate(self, request: InstanceRequest) -> Answer:
        assert isinstance(request, TerminateRequest)
        found = await self._finder.engine(request.workflow, request.id)
        if found is None:
            return self._not_found(request)
        if isinstance(found, r.Status):
            return self._ended(found, request)
        if request.nonce and request.nonce != found.admitted.nonce:
            self._station.leave_if_idle(found)
            return self._not_found(request)
        found.terminate(request.request, children=request.children)
        await self._accepted(found)
        return self._ended(found.end.status if found.end else r.Status.TERMINATED, request)

    async def _pause(self, request: InstanceRequest) -> Answer:
        found = await self._finder.engine(request.workflow, request.id)
        if found is None:
            return self._not_found(request)
        if isinstance(found, r.Status):
            return self._refused(request, found, "paused")
        if found.ended:
            await self._accepted(found)
            return self._refused(request, found.end.status if found.end else r.Status.COMPLETE, "paused")
        found.pause(request.request)
        await self._accepted(found)
        self._station.leave_if_idle(found)
        return self._ok()

    async def _resume(self, request: InstanceRequest) -> Answer:
        found = await self._finder.loaded(request.workflow, request.id)
        if found is None:
            queued = await self._finder.queue_message(request.workflow, request.id)
            return self._ok() if queued is not None else self._not_found(request)
        if isinstance(found, r.Status):
            return self._refused(request, found, "resumed")
        row = self._row(request)
        if found.paused and row is not None:
            found.resumed(request.request, max(0, self._station.now_ms() - row.paused_at))
            await self._begin_anew(found)
        elif found.pausing:
            found.resume(request.request)
            await self._accepted(found)
        else:
            self._station.leave_if_idle(found)
        return self._ok()

    async def _restart(self, request: InstanceRequest) -> Answer:
        assert isinstance(request, RestartRequest)
        found = await self._finder.loaded(request.workflow, request.id)
        if found is None:
            queued = await self._finder.queue_message(request.workflow, request.id)
            return self._ok() if queued is not None else self._not_found(request)
        flow = self._station.context.app.workflows.get(request.workflow)
        if flow is None:
            if isinstance(found, Engine):
                self._station.leave_if_idle(found)
            raise Unavailable(f"pod {self._station.context.pod} does not have workflow {request.workflow!r}")
        if not isinstance(found, Engine) or found.ended:
            await self._errands_done(request)
        from_key = await self._step_named(request)
        if from_key is None:
            if isinstance(found, Engine):
                self._station.leave_if_idle(found)
            return Answer(self._station.epoch, "no_step", f"step {request.from_name!r} (kind {request.from_kind}, number "
                          f"{request.from_count}) is not in the history of {request.workflow}/{request.id}")
        engine = found if isinstance(found, Engine) and not found.ended else await self._read_back(request)
        engine.restart(request.request, workflow_version(flow), from_key)
        await self._begin_anew(engine)
        return self._ok()

    async def _delete(self, request: InstanceRequest) -> Answer:
        found = await self._finder.engine(request.workflow, request.id)
        if found is None:
            return self._not_found(request)
        if isinstance(found, Engine) and not found.ended and awaited(found):
            found.terminate()  # the parent must hear of it
        await self._errands_done(request)
        engine = self._station.by_id.get((request.workflow, request.id))
        if engine is not None:
            serial = engine.serial
            engine.cut()
        else:
            known = self._store.find(self._station.id, request.workflow, request.id)
            assert known is not None, "an ended instance that is not in memory is in the index"
            serial = known
        await self._remove({(request.workflow, request.id): serial}, request.request)
        await self._finder.clear_queue(request.workflow, request.id)
        return self._ok()

    async def _errands_done(self, request: InstanceRequest) -> None:
        """Raises Unavailable while the instance has to tell others of its end: until then its history is needed."""
        engine = self._station.by_id.get((request.workflow, request.id))
        if engine is not None:
            await self._accepted(engine)
        await self._store.flush()
        serial = self._store.find(self._station.id, request.workflow, request.id)
        if serial is not None and self._store.has_errand(self._station.id, serial):
            self._station.outbox.kick()
            raise Unavailable("its end is on its way to its parent or its children; try again in a moment")

    async def _remove(self, doomed: dict[tuple[str, str], int], request: str = "") -> None:
        """Delete them, and answer for it: when this returns a creation of one of these ids is a new one."""
        station = self._station
        station.deleting.update(doomed)
        tombstone_ms = round(station.context.control.account.tombstones_s * 1000)
        try:
            await station.commits.commit(
                r.Deleted(0, 0, 0, station.now_ms(), list(doomed.values()), request, tombstone_ms))
            await self._store.flush()
        finally:
            for key in doomed:
                del station.deleting[key]
        for serial in doomed.values():
            station.forget(serial)
        station.context.slots.kick()  # creations of these ids may have waited

    # -- retention -----------------------------------------------------------------------------------------------------

    async def sweep(self) -> None:
        """Delete what has ended and whose retention is over, until cancelled; and forget old tombstones."""
        station, store = self._station, self._store
        while True:
            full = False
            if station.context.broker_time.ready and station.may_admit():
                now = station.now_ms()
                serials = store.to_delete(station.id, now, DELETED_PER_RECORD)
                full = len(serials) == DELETED_PER_RECORD
                doomed = self._to_remove(serials)
                if doomed or store.tombs_due(station.id, now):
                    await self._remove(doomed)
            await asyncio.sleep(0 if full else SWEEP_EVERY_S)

    def _to_remove(self, serials: list[int]) -> dict[tuple[str, str], int]:
        """Those that nobody is at work on."""
        doomed: dict[tuple[str, str], int] = {}
        for serial in serials:
            row = self._store.row(self._station.id, serial)
            key = (row.workflow, row.id) if row is not None and row.status.ended else None
            if key is not None and key not in self._under_way and key not in self._station.by_id:
                doomed[key] = serial
        return doomed

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _row(self, request: InstanceRequest) -> r.InstanceRow | None:
        serial = self._store.find(self._station.id, request.workflow, request.id)
        return self._store.row(self._station.id, serial) if serial is not None else None

    async def _step_named(self, request: RestartRequest) -> str | None:
        """The identity of the step to restart from; "" = from the start; None when the history has no such step."""
        if not request.from_name:
            return ""
        await self._store.flush()
        serial = self._store.find(self._station.id, request.workflow, request.id)
        kind = r.StepKind.__members__.get(request.from_kind.upper())
        if serial is None or kind is None:
            return None
        key = step_key(kind, request.from_name, request.from_count)
        history = newest_run(self._store.history(self._station.id, serial))
        return key if any(step_of(record) == key for record in history) else None

    async def _read_back(self, request: InstanceRequest) -> Engine:
        """The engine of an ended instance, as soon as the one that ended has left memory."""
        key = (request.workflow, request.id)
        while (engine := self._station.by_id.get(key)) is not None:
            await self._accepted(engine)
            await self._store.flush()
            self._station.leave_if_idle(engine)
            await asyncio.sleep(0)
        serial = self._store.find(self._station.id, *key)
        assert serial is not None, "the instance was found a moment ago, and nobody else steers it"
        return self._station.load_engine(serial)

    async def _begin_anew(self, engine: Engine) -> None:
        """Once its record is accepted: out of memory, and back for a slot, as soon as nothing of it is inside."""
        await self._accepted(engine)
        self._station.spawn(self._station.read_back(engine))

    async def _accepted(self, engine: Engine) -> None:
        """Wait until nothing of it is pending. The station's end cancels the caller."""
        while engine.unaccepted:
            await self._station.commits.next_acceptance()

    def _ok(self) -> Answer:
        return Answer(self._station.epoch)

    def _not_found(self, request: InstanceRequest) -> Answer:
        return Answer(self._station.epoch, "not_found", f"no instance {request.id!r} of workflow {request.workflow!r}")

    def _ended(self, status: r.Status, request: InstanceRequest) -> Answer:
        if status is r.Status.TERMINATED:
            return self._ok()  # a repeat gets the first answer
        return Answer(self._station.epoch, "ended", f"instance {request.id!r} of {request.workflow!r} is {status.label}")

    def _refused(self, request: InstanceRequest, status: r.Status, what: str) -> Answer:
        return Answer(self._station.epoch, "ended", f"instance {request.id!r} of {request.workflow!r} is {status.label}, "
                                                    f"so it cannot be {what}")


def awaited(engine: Engine) -> bool:
    """Whether a parent waits for its end."""
    parent = engine.admitted.parent
    return bool(parent) and Parent.parse(parent).waits
