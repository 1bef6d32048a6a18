"""Turns the records of an instance into watch events, under Cloudflare's names. Pure: the same records, the same events.

Only records make events, so a cursor (which instance, run, record, event of the record) means the same at every owner,
and nothing that a crash could take back is ever told. Where a status changes, the fold's own table says so.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from toque._payload import to_msgpack
from toque._protocol import ErrorView, WatchView
from toque.errors import ToqueError
from toque.storage import records as r
from toque.storage.fold import advance_row, step_key

EVENT_WEIGHT = 300  # about: bytes of an event beside its payload

_STATUS_EVENTS = {
    r.Status.RUNNING: "workflow_running",
    r.Status.WAITING: "workflow_waiting",
    r.Status.WAITING_FOR_PAUSE: "workflow_waiting_for_pause",
    r.Status.PAUSED: "workflow_paused",
    r.Status.COMPLETE: "workflow_completed",
    r.Status.ERRORED: "workflow_errored",
    r.Status.TERMINATED: "workflow_terminated",
}


class Place(NamedTuple):
    """Where an event stands in the life of an instance. `part`: which event of those that the record makes."""

    run: int = 0
    seq: int = 0
    part: int = 0


class Cursor(NamedTuple):
    """Behind which event to go on. `created_at` tells the instance from a later one of the same id."""

    created_at: int
    place: Place

    def __str__(self) -> str:
        return ".".join(map(str, (self.created_at, *self.place)))

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Raises ValueError for a text that no event had as its cursor."""
        created_at, run, seq, index = map(int, text.split("."))
        return cls(created_at, Place(run, seq, index))


class Narrator:
    """Tells an instance's records as events, one record after the other, from the first on."""

    def __init__(self) -> None:
        self.row: r.InstanceRow | None = None  # as folded up to here
        self._types: dict[int, str] = {}  # events that no wait has taken: their record's seq → type

    def tell(self, record: r.Record) -> list[WatchView]:
        """What the record tells; its state is taken in."""
        if type(record) is r.Admitted:
            self.row = _admitted_row(record)
            events = [queued_view(record.created_at), _params_view(record)]
        else:
            row = self.row
            assert row is not None, "the first record of an instance is its Admitted"
            before = row.status
            events = self._facts(row, record)
            advance_row(row, record)
            if type(record) is r.Restarted:
                self._types.clear()
                events.append(WatchView("workflow_started", record.at))
            elif row.status is not before:
                events.append(_status_view(row.status, record))
        for index, event in enumerate(events):
            event.run = record.run
            event.cursor = self.cursor(Place(record.run, record.seq, index))
        return events

    def cursor(self, place: Place) -> str:
        assert self.row is not None
        return str(Cursor(self.row.created_at, place))

    def _facts(self, row: r.InstanceRow, record: r.Record) -> list[WatchView]:
        """Of steps, sleeps and waits; what the record says of the whole comes behind them."""
        match record:
            case r.StepDone() | r.StepFailed() | r.AttemptFailed():
                return _attempt_views(row, record)
            case r.StepCancelled():
                return [WatchView("step_cancelled", record.at, kind=record.step.name.lower(), step=record.name,
                                  count=record.occurrence)]
            case r.SleepStarted():
                return [_view("sleep_started", record.at, record, duration_ms=record.due - record.at)]
            case r.SleepDone():
                return [_view("sleep_completed", record.at, record)]
            case r.EventReceived():
                self._types[record.seq] = record.type
                return []
            case r.WaitStarted():
                return [_view("wait_started", record.at, record, event_type=record.type,
                              duration_ms=record.due - record.at)]
            case r.WaitDone():
                type_ = self._types.pop(record.event, "")
                done = _view("wait_completed", record.at, record, event_type=type_)
                done.error = error_view(record.failure) if record.failure else None
                return [*_wait_begins(row, record, type_), done]
            case r.WaitTimedOut():
                return [*_wait_begins(row, record, ""), _view("wait_timed_out", record.at, record)]
            case r.ChildBegun():
                return [_step_view("step_started", record.at, record)]
            case r.ChildEnded():
                return [_child_ended(record)]
            case r.Blocked():
                return [WatchView("workflow_blocked", record.at, reason=record.reason)]
            case r.Interrupted():
                return [WatchView("workflow_interrupted", record.at)]
            case _:
                return []


def weight(record: r.Record) -> int:
    """About how many bytes its events take."""
    match record:
        case r.Admitted():
            payload = len(record.params)
        case r.StepDone():
            payload = len(record.result)
        case r.Ended() | r.ChildEnded():
            payload = len(record.output) + _failure_weight(record.failure)
        case r.AttemptFailed() | r.StepFailed():
            payload = 2 * _failure_weight(record.failure)
        case _:
            payload = 0
    return payload + EVENT_WEIGHT


def queued_view(created_at: int) -> WatchView:
    """The first event of every instance: the same whether it lies in the queue still or was admitted."""
    place = Place(run=1, seq=1)
    return WatchView("workflow_queued", created_at, cursor=str(Cursor(created_at, place)))


def params_as_msgpack(admitted: r.Admitted) -> bytes:
    """The params of a creation; nil when they cannot be read: the instance's error says so."""
    if admitted.content_type == "application/msgpack":
        return admitted.params
    try:
        return to_msgpack(admitted.params)
    except (msgspec.MsgspecError, ToqueError, RecursionError, UnicodeDecodeError):
        return b"\xc0"


def error_view(failure: r.Failure) -> ErrorView:
    return ErrorView(failure.type, failure.message, failure.traceback)


def _admitted_row(record: r.Admitted) -> r.InstanceRow:
    return r.InstanceRow(workflow=record.workflow, id=record.id, nonce=record.nonce, run=record.run, seq=record.seq,
                         status=r.Status.RUNNING, created_at=record.created_at, admitted_at=record.at)


def _params_view(record: r.Admitted) -> WatchView:
    return WatchView("workflow_started", record.at, value=msgspec.Raw(params_as_msgpack(record)))


def _status_view(status: r.Status, record: r.Record) -> WatchView:
    view = WatchView(_STATUS_EVENTS[status], record.at)
    if isinstance(record, r.Ended):
        if status is r.Status.COMPLETE:
            view.value = msgspec.Raw(record.output)
        if record.failure is not None:
            view.error = error_view(record.failure)
    return view


def _attempt_views(row: r.InstanceRow, record: r.StepDone | r.StepFailed | r.AttemptFailed) -> list[WatchView]:
    """What began is told with the first record that there is of it."""
    attempt = record.attempt
    if not attempt:  # the time-out of the wait for a child
        assert isinstance(record, r.StepFailed)
        return [_step_view("step_errored", record.at, record, error=error_view(record.failure))]
    views = [_step_view("attempt_started", record.started_at, record, attempt=attempt)]
    told = record.step in (r.StepKind.START, r.StepKind.CHILD)
    if not told and step_key(record.step, record.name, record.occurrence) not in row.timers:
        views.insert(0, _step_view("step_started", record.started_at, record))
    if isinstance(record, r.StepDone):
        views.append(_step_view("attempt_completed", record.at, record, attempt=attempt))
        views.append(_step_view("step_completed", record.at, record, value=msgspec.Raw(record.result)))
        return views
    failed = _step_view("attempt_errored", record.at, record, attempt=attempt, error=error_view(record.failure))
    views.append(failed)
    if isinstance(record, r.AttemptFailed):
        failed.retry_delay_ms = max(0, record.retry_at - record.at)
    else:
        views.append(_step_view("step_errored", record.at, record, error=error_view(record.failure)))
    return views


def _wait_begins(row: r.InstanceRow, record: r.WaitDone | r.WaitTimedOut, type_: str) -> list[WatchView]:
    """A wait whose event was there already has no record of its beginning."""
    if step_key(r.StepKind.EVENT, record.name, record.occurrence) in row.awaits:
        return []
    return [_view("wait_started", record.started_at, record, event_type=type_)]


def _view(type_: str, at: int, record: r.SleepStarted | r.SleepDone | r.WaitStarted | r.WaitDone | r.WaitTimedOut, *,
          event_type: str = "", duration_ms: int = 0) -> WatchView:
    kind = "sleep" if isinstance(record, r.SleepStarted | r.SleepDone) else "event"
    return WatchView(type_, at, kind=kind, step=record.name, count=record.occurrence, event_type=event_type,
                     duration_ms=duration_ms)


def _child_ended(record: r.ChildEnded) -> WatchView:
    view = WatchView("step_errored", record.at, kind="child", step=record.name, count=record.occurrence)
    if record.status is r.Status.COMPLETE:
        view.type, view.value = "step_completed", msgspec.Raw(record.output)
    elif record.failure is not None:
        view.error = error_view(record.failure)
    return view


def _step_view(type_: str, at: int, record: r.StepDone | r.StepFailed | r.AttemptFailed | r.ChildBegun, *, attempt: int = 0,
               error: ErrorView | None = None, value: msgspec.Raw | None = None) -> WatchView:
    view = WatchView(type_, at, kind=record.step.name.lower(), step=record.name, count=record.occurrence,
                     attempt=attempt, error=error)
    if value is not None:
        view.value = value
    return view


def _failure_weight(failure: r.Failure | None) -> int:
    return len(failure.message) + len(failure.traceback) if failure else 0
