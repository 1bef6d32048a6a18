"""Answers what clients ask the owner of a station: status, describe, wait, watch, exists, list, report; others steer.

A negative answer comes only from here (protocol rule 16): index, then the queue by leader read, then the index again.
Every reply is gated by the session's deadline and carries the epoch (rule 24).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from toque import _subjects as subjects
from toque._logging import get_logger
from toque._payload import JSON, MSGPACK, msgpack_from, to_json, to_msgpack
from toque._protocol import (
    LONG_POLL_S_MAX,
    Answer,
    ChildEndRequest,
    CountsRequest,
    CountsView,
    DescribeView,
    ErrorView,
    EventRequest,
    InstanceRequest,
    InstanceView,
    ListPage,
    ListRequest,
    QueueView,
    RestoredView,
    SnapshotView,
    StationView,
    StepView,
    WatchRequest,
    encode,
    is_json,
)
from toque.errors import ToqueError, Unavailable, UsageError
from toque.storage import records as r
from toque.storage.family import Parent
from toque.storage.ports import BusError, Message, NoResponders, RowQuery, StoreDamaged, Subscription
from toque.storage.runs import newest_run
from toque.workers.child_intake import ChildIntake
from toque.workers.engine import Engine
from toque.workers.event_intake import EventIntake
from toque.workers.events import Event
from toque.workers.finder import Finder
from toque.workers.lifecycle import Lifecycle
from toque.workers.news import within
from toque.workers.station import Station
from toque.workers.watching import Watching

LIST_LIMIT_MAX = 500  # rows of a page, and instances looked at for it: about 5 ms

_log = get_logger("toque.answers")


class Answers:
    """The request subjects of one station."""

    def __init__(self, station: Station) -> None:
        self._station = station
        self._context = station.context
        self._subscription: Subscription | None = None
        self._tasks: dict[asyncio.Task[None], None] = {}  # in their order, so that runs can be repeated
        self._operations: dict[str, tuple[type[Any], Callable[[Any, bool], Awaitable[Answer]]]] = {
            "status": (InstanceRequest, self._status),
            "describe": (InstanceRequest, self._describe),
            "wait": (InstanceRequest, self._wait),
            "exists": (InstanceRequest, self._exists),
            "event": (EventRequest, self._event),
            "child_end": (ChildEndRequest, self._child_end),
            "list": (ListRequest, self._list),
            "counts": (CountsRequest, self._counts),
            "report": (ListRequest, self._report),
        }
        self._finder = Finder(station)
        self.watching = Watching(station, self._finder)
        self._operations["watch"] = (WatchRequest, self.watching.serve)
        self.lifecycle = Lifecycle(station, self._finder)
        for name, (shape, _) in self.lifecycle.operations.items():
            self._operations[name] = (shape, self._steering(name))

    async def open(self) -> None:
        subject = subjects.station_request(self._station.account, self._station.id, "*")
        self._subscription = await self._context.bus.subscribe(subject, self._asked)

    async def close(self) -> None:
        if self._subscription is not None:
            await self._subscription.close()
        for task in self._tasks:
            task.cancel()

    def _asked(self, message: Message) -> None:
        if message.reply:
            task = asyncio.get_running_loop().create_task(self._serve(message))
            self._tasks[task] = None
            task.add_done_callback(self._tasks.pop)

    async def _serve(self, message: Message) -> None:
        json = is_json(message.data)
        if self._station.closed:
            self._context.bus.respond(message, encode(Answer(self._epoch, "moved"), json=json))
            return
        try:
            answer = await self._answer(message, json)
        except (Unavailable, BusError, NoResponders, StoreDamaged) as error:  # of a damaged store the pod ends
            answer = Answer(self._epoch, "retry", str(error))
        except asyncio.CancelledError:
            if not self._station.closed:
                raise
            answer = Answer(self._epoch, "moved", "the station is being handed over")
        except ToqueError as error:
            answer = Answer(self._epoch, "refused", str(error))
        except Exception:  # the edge of the task: the caller must hear something  # noqa: BLE001
            _log.exception("a request failed", subject=message.subject)
            answer = Answer(self._epoch, "refused", "the owner failed on this request; its log says why")
        if self._station.in_time() or answer.code == "moved":
            self._context.bus.respond(message, self._fitting(answer, json))

    def _fitting(self, answer: Answer, json: bool) -> bytes:
        data = encode(answer, json=json)
        limit = self._context.bus.max_payload
        if len(data) <= limit:
            return data
        return encode(Answer(answer.epoch, "refused", f"the answer has {len(data)} bytes, and the server takes messages of "
                             f"{limit} (its max_payload)"), json=json)

    async def _answer(self, message: Message, json: bool) -> Answer:
        name = message.subject.rpartition(".")[2]
        operation = self._operations.get(name)
        if operation is None:
            return Answer(self._epoch, "refused", f"no operation {name!r}; there are {', '.join(self._operations)}")
        shape, serve = operation
        decode = msgspec.json.decode if json else msgspec.msgpack.decode
        try:
            request = decode(message.data or b"{}", type=shape)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            return Answer(self._epoch, "refused", f"the request cannot be read: {error}")
        if isinstance(request, InstanceRequest) and not self._is_at_home(request.id):
            return Answer(self._epoch, "moved", f"the id {request.id!r} does not belong to station {self._station.id}")
        return await serve(request, json)

    def _steering(self, name: str) -> Callable[[InstanceRequest, bool], Awaitable[Answer]]:
        async def serve(request: InstanceRequest, json: bool) -> Answer:
            return await self.lifecycle.serve(name, request)

        return serve

    def _is_at_home(self, instance_id: str) -> bool:
        """Whether the id belongs to this station; another one may not say "not found" of it (protocol rule 24)."""
        stations = dict(self._context.control.layout.generations)
        generation, number = self._station.id
        return number == subjects.station_number(instance_id, stations[generation])

    @property
    def _epoch(self) -> int:
        return self._station.epoch

    def _value(self, value: Any, json: bool) -> Answer:
        return Answer(self._epoch, value=msgspec.Raw(encode(value, json=json)))

    def _not_found(self, request: InstanceRequest) -> Answer:
        return Answer(self._epoch, "not_found", f"no instance {request.id!r} of workflow {request.workflow!r}")

    # -- one instance --------------------------------------------------------------------------------------------------

    async def _status(self, request: InstanceRequest, json: bool) -> Answer:
        view = self._known(request, json) or await self._queued(request) or self._known(request, json)
        return self._value(view, json) if view else self._not_found(request)

    async def _wait(self, request: InstanceRequest, json: bool) -> Answer:
        """Like status, but held back until the instance has ended, or `wait_s` is over."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters = self._station.waiters.setdefault((request.workflow, request.id), [])
        waiters.append(waiter)  # before looking, so that no end is missed
        try:
            answer = await self._status(request, json)
            view = self._known(request, json)
            if answer.code != "ok" or (view is not None and r.Status.of(view.status).ended):
                return answer
            await within(waiter, min(max(request.wait_s, 0.0), LONG_POLL_S_MAX))
            return await self._status(request, json)
        finally:
            if waiter in waiters:
                waiters.remove(waiter)
            if not waiters and self._station.waiters.get((request.workflow, request.id)) is waiters:
                del self._station.waiters[request.workflow, request.id]

    async def _exists(self, request: InstanceRequest, json: bool) -> Answer:
        """Whether the id belongs to the creation of this nonce (protocol rule 14)."""
        tomb = self._station.tombstone(request.workflow, request.id)
        if tomb is not None and tomb.nonce and tomb.nonce == request.nonce:
            return Answer(self._epoch)  # it was there, and somebody has deleted it since
        if (request.workflow, request.id) in self._station.deleting:
            raise Unavailable("the instance is being deleted")  # soon it is seen whether what came was refused
        nonce = self._nonce(request)
        if nonce is None:
            message = await self._finder.queue_message(request.workflow, request.id)
            nonce = message.header(subjects.NONCE_HEADER) if message else self._nonce(request)
        if nonce is None and self._station.tombstone(request.workflow, request.id) is not None:
            return Answer(self._epoch, "exists", f"instance {request.id!r} of {request.workflow!r} belonged to another "
                                                 f"creation, and was deleted since: create it again")
        if nonce is None:
            return self._not_found(request)
        if nonce == request.nonce:
            return Answer(self._epoch)
        return Answer(self._epoch, "exists", f"instance {request.id!r} of {request.workflow!r} belongs to another "
                                             f"creation")

    async def _describe(self, request: InstanceRequest, json: bool) -> Answer:
        serial = await self._folded(request)
        if serial is None:
            queued = await self._queued(request)
            if queued is not None:
                return self._value(DescribeView(queued, []), json)
            serial = await self._folded(request)  # it may have been admitted and purged meanwhile
        if serial is None:
            return self._not_found(request)
        instance = self._known(request, json)
        row = self._context.store.row(self._station.id, serial)
        if instance is None or row is None:
            return Answer(self._epoch, "retry", "the instance is being read back")
        history = newest_run(self._context.store.history(self._station.id, serial))
        view = DescribeView(instance, _steps(history, json), interruptions=row.interruptions)
        if isinstance(history[0], r.Admitted):
            view.params = _params(history[0], json)
        return self._value(view, json)

    async def _folded(self, request: InstanceRequest) -> int | None:
        """The serial by the index, when everything accepted so far is in it."""
        await self._context.store.flush()
        return self._context.store.find(self._station.id, request.workflow, request.id)

    async def _event(self, request: EventRequest, json: bool) -> Answer:
        try:
            payload = msgpack_from(bytes(request.payload), JSON if json else MSGPACK)
        except UsageError as error:
            return Answer(self._epoch, "refused", str(error))
        event_id = request.request or f"{self._context.rng.getrandbits(64):016x}"  # who gives none cannot repeat it
        event = Event(request.type, event_id, payload, self._station.now_ms())
        verdict = await EventIntake(self._station).take(request.workflow, request.id, event)
        return Answer(self._epoch, verdict.code, verdict.reason)

    async def _child_end(self, request: ChildEndRequest, json: bool) -> Answer:
        return await ChildIntake(self._station, self._finder).take(request)

    # -- many ----------------------------------------------------------------------------------------------------------

    async def _list(self, request: ListRequest, json: bool) -> Answer:
        try:
            query = _row_query(request)
        except KeyError as error:
            return Answer(self._epoch, "refused", f"no instance has the status {error}")
        page = self._context.store.page(self._station.id, query)
        views = [self._row_view(serial, row) for serial, row in page.rows]
        return self._value(ListPage(views, page.next, [serial for serial, _ in page.rows]), json)

    async def _counts(self, request: CountsRequest, json: bool) -> Answer:
        await self._context.store.flush()
        counts = self._counted()
        purgeable = {name: len(souschef.handled) for name, souschef in self._station.souschefs.items()}
        if request.workflow:
            counts = {request.workflow: counts.get(request.workflow, {})}
        return self._value(CountsView(counts, purgeable), json)

    def _counted(self) -> dict[str, dict[str, int]]:
        counts: dict[str, dict[str, int]] = {}
        for (workflow, status), count in self._context.store.counts(self._station.id).items():
            if count:
                counts.setdefault(workflow, {})[status] = count
        return counts

    async def _report(self, request: ListRequest, json: bool) -> Answer:
        station, context = self._station, self._context
        counts = self._counted()
        live = sum(count for by_status in counts.values() for status, count in by_status.items()
                   if not r.Status.of(status).ended)
        queues = [
            QueueView(name, max(souschef.committed(0), context.store.queue_position(station.id, name)), souschef.waiting,
                      counts.get(name, {}), len(souschef.handled))
            for name, souschef in station.souschefs.items()
        ]
        header = station.commits.tail.header
        view = StationView(str(station.id), context.pod, context.session.id, header.epoch, header.group, live,
                           len(station.engines), station.commits.tail.sequence, station.restored_ms, queues)
        self._add_journal(view)
        return self._value(view, json)

    def _add_journal(self, view: StationView) -> None:
        station, store = self._station, self._context.store
        taken = [row.record for row in store.snapshots(station.id)]
        needed = taken[-2] if len(taken) > 1 else None
        view.journal_groups = view.group - (needed.position.header.group if needed else 0)
        view.journal_bytes = store.journal_bytes(station.id) - (needed.journal_bytes if needed else 0)
        view.snapshots = [SnapshotView(record.name, record.position.header.group, record.position.sequence,
                                       record.size_bytes, record.rows, record.at) for record in taken]
        restored = station.restored
        view.restored = RestoredView(restored.source, restored.snapshot, restored.rows, restored.groups,
                                     station.restored_ms)

    # -- views ---------------------------------------------------------------------------------------------------------

    def _nonce(self, request: InstanceRequest) -> str | None:
        engine = self._station.by_id.get((request.workflow, request.id))
        if engine is not None:
            return engine.admitted.nonce
        serial = self._context.store.find(self._station.id, request.workflow, request.id)
        row = self._context.store.row(self._station.id, serial) if serial is not None else None
        return row.nonce if row is not None else None

    def _known(self, request: InstanceRequest, json: bool) -> InstanceView | None:
        """From the index: what is in memory first, for it is newer than what is folded."""
        engine = self._station.by_id.get((request.workflow, request.id))
        serial = self._context.store.find(self._station.id, request.workflow, request.id)
        row = self._context.store.row(self._station.id, serial) if serial is not None else None
        goes_on = engine is not None and engine.is_started and not engine.closed
        if engine is not None and (row is None or engine.admitting or engine.ended or goes_on):
            return self._engine_view(engine, json)
        if row is None or serial is None:
            return None
        view = self._row_view(serial, row)
        if row.status.ended:
            end = self._context.store.history(self._station.id, serial)[-1]
            if isinstance(end, r.Ended):
                _add_end(view, end, json)
        return view

    def _row_view(self, serial: int, row: r.InstanceRow) -> InstanceView:
        held = "" if row.status.ended else (self._station.missing(row) or row.blocked_on)
        blocked = held or self._slot_wanted(serial, row.status)
        return InstanceView(row.workflow, row.id, row.status.label, row.run, row.created_at, row.admitted_at,
                            row.ended_at, row.wake_at, str(self._station.id), self._context.pod, blocked,
                            awaits=list(dict.fromkeys(row.awaits.values())), buffered=row.buffered,
                            parent=_parent(row.parent))

    def _engine_view(self, engine: Engine, json: bool) -> InstanceView:
        """Only what is accepted is told (protocol rule 18): before that, the instance is what it was."""
        admitted = engine.admitted
        view = InstanceView(admitted.workflow, admitted.id, r.Status.RUNNING.label, engine.run, admitted.created_at,
                            station=str(self._station.id), pod=self._context.pod, parent=_parent(admitted.parent))
        if engine.admitting:
            view.status = r.Status.QUEUED.label
            return view
        view.admitted_at = admitted.at
        report = engine.progress.shown(engine.accepted_to) if engine.progress else None
        if report is not None and engine.end is None:
            view.progress = _raw(report.value, json)
        if engine.must_wait:
            view.status = engine.accepted_status.label
            return view
        if engine.end is not None:
            view.status = engine.end.status.label
            view.ended_at = engine.end.at
            _add_end(view, engine.end, json)
        else:
            status = _live_status(engine)
            view.status = status.label
            view.blocked_on = engine.blocked or self._slot_wanted(engine.serial, status)
            view.wake_at = engine.wake_at
            view.awaits, view.buffered = engine.events.awaited, engine.events.buffered
        return view

    async def _queued(self, request: InstanceRequest) -> InstanceView | None:
        message = await self._finder.queue_message(request.workflow, request.id)
        if message is None:
            return None
        return InstanceView(request.workflow, request.id, r.Status.QUEUED.label, created_at=message.time_ms,
                            station=str(self._station.id), pod=self._context.pod, blocked_on="slot")

    def _slot_wanted(self, serial: int, status: r.Status) -> str:
        """ "slot" for an instance that could go on and has none; "" for any other."""
        could_go_on = status in (r.Status.RUNNING, r.Status.WAITING)
        return "slot" if could_go_on and self._station.stands_in_line(serial) else ""


def _row_query(request: ListRequest) -> RowQuery:
    """Raises KeyError for a status that there is not."""
    statuses = [request.status] if isinstance(request.status, str) else request.status
    return RowQuery(
        workflow=request.workflow, statuses=tuple(r.Status.of(status) for status in statuses if status),
        id_prefix=request.id_prefix, created_after=request.created_after, created_before=request.created_before,
        ended_after=request.ended_after, ended_before=request.ended_before, newest=request.newest,
        after=max(0, request.after), limit=max(1, min(request.limit, LIST_LIMIT_MAX)), look_max=LIST_LIMIT_MAX)


def _live_status(engine: Engine) -> r.Status:
    if engine.pausing:
        return r.Status.PAUSED if engine.paused else r.Status.WAITING_FOR_PAUSE
    return r.Status.WAITING if engine.resting else r.Status.RUNNING


def _parent(text: str) -> str:
    parent = Parent.parse(text) if text else None
    return f"{parent.workflow}/{parent.id}" if parent else ""


def _error(failure: r.Failure) -> ErrorView:
    return ErrorView(failure.type, failure.message, failure.traceback)


def _raw(data: bytes, json: bool) -> msgspec.Raw:
    return msgspec.Raw(to_json(data) if json else data)


def _params(admitted: r.Admitted, json: bool) -> msgspec.Raw:
    is_msgpack = admitted.content_type == "application/msgpack"
    try:
        if is_msgpack:
            return _raw(admitted.params, json)
        return msgspec.Raw(admitted.params if json else to_msgpack(admitted.params))
    except (msgspec.MsgspecError, ToqueError, RecursionError, UnicodeDecodeError):
        return msgspec.Raw(b"null" if json else b"\xc0")  # params that cannot be read: the instance's error says so


def _add_end(view: InstanceView, end: r.Ended, json: bool) -> None:
    if end.status is r.Status.COMPLETE:
        view.output = _raw(end.output, json)
    if end.failure is not None:
        view.error = _error(end.failure)


def _ended_child(end: r.ChildEnded, begun: StepView, json: bool) -> StepView:
    view = StepView("child", end.name, end.occurrence, "failed", started_at=begun.started_at, ended_at=end.at)
    if end.status is r.Status.COMPLETE:
        view.status, view.output = "complete", _raw(end.output, json)
    elif end.failure is not None:
        view.error = _error(end.failure)
    return view


def _kind(step: r.StepKind) -> str:
    return step.name.lower()


def _steps(history: list[r.Record], json: bool) -> list[StepView]:
    steps: dict[tuple[str, str, int], StepView] = {}
    received: dict[tuple[int, int], r.EventReceived] = {}
    for record in history:
        match record:
            case r.StepDone():
                view = StepView(_kind(record.step), record.name, record.occurrence, "complete", record.attempt,
                                record.started_at, record.at, output=_raw(record.result, json))
            case r.StepFailed():
                status = "failed" if record.attempt else "timed_out"
                view = StepView(_kind(record.step), record.name, record.occurrence, status, record.attempt,
                                record.started_at, record.at, error=_error(record.failure))
            case r.AttemptFailed():
                view = StepView(_kind(record.step), record.name, record.occurrence, "retrying", record.attempt,
                                record.started_at, due=record.retry_at, error=_error(record.failure))
            case r.ChildBegun():
                view = StepView(_kind(record.step), record.name, record.occurrence, "starting", started_at=record.at,
                                child=f"{record.workflow}/{record.id}")
            case r.ChildCreated():
                view = steps["child", record.name, record.occurrence]
                view.status, view.due, view.error = "waiting", record.due, None
            case r.ChildEnded():
                view = _ended_child(record, steps["child", record.name, record.occurrence], json)
            case r.SleepStarted():
                view = StepView("sleep", record.name, record.occurrence, "sleeping", started_at=record.at,
                                due=record.due)
            case r.SleepDone():
                begun = steps.get(("sleep", record.name, record.occurrence))
                view = StepView("sleep", record.name, record.occurrence, "complete",
                                started_at=begun.started_at if begun else 0, ended_at=record.at,
                                due=begun.due if begun else 0)
            case r.WaitStarted():
                view = StepView("event", record.name, record.occurrence, "waiting", started_at=record.at,
                                due=record.due, event=record.type)
            case r.EventReceived():
                received[record.run, record.seq] = record
                continue
            case r.WaitDone():
                event = received[record.run, record.event]
                view = StepView("event", record.name, record.occurrence, "failed" if record.failure else "complete",
                                started_at=record.started_at, ended_at=record.at, event=event.type,
                                output=_raw(event.payload, json), error=_error(record.failure) if record.failure else None)
            case r.WaitTimedOut():
                begun = steps.get(("event", record.name, record.occurrence))
                view = StepView("event", record.name, record.occurrence, "timed_out", started_at=record.started_at,
                                ended_at=record.at, event=begun.event if begun else "")
            case r.StepCancelled():
                view = steps[_kind(record.step), record.name, record.occurrence]
                view.status, view.due, view.ended_at = "cancelled", 0, record.at
            case _:
                continue
        earlier = steps.get((view.kind, view.name, view.occurrence))
        view.child = view.child or (earlier.child if earlier else "")
        steps[view.kind, view.name, view.occurrence] = view
    return list(steps.values())
