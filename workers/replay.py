"""What an instance's records say about its steps: the results to hand out again, and the steps that are still open.

Pure: reads records, changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from toque._payload import decode
from toque.errors import ChildFailed, DeterminismError, EventTimeout, StepError, StepFailed, StepTimeout
from toque.storage import records as r
from toque.storage.fold import INTERRUPTED_TYPE, step_key
from toque.storage.runs import step_of
from toque.workers.step_call import StepCall, StepDecorator

Outcome = r.StepDone | r.StepFailed | r.SleepDone | r.WaitDone | r.WaitTimedOut | r.ChildEnded

NAMES_SHOWN_MAX = 5


class Recorded(NamedTuple):
    """One outcome to hand out again."""

    key: str
    outcome: Outcome
    interruptions: int  # of the run, before this record
    event: r.EventReceived | None = None  # that the wait got


class Tries:
    """The failed attempts of a step without an outcome."""

    __slots__ = ("config", "failures", "last_attempt", "retry_at", "since")

    def __init__(self, failures: int, record: r.AttemptFailed, since: int) -> None:
        self.failures = failures
        self.last_attempt = record.attempt
        self.retry_at = record.retry_at
        self.config = record.config
        self.since = since  # interruptions of the run, before the last of them


class Replay:
    """The history of one run, taken apart once."""

    __slots__ = ("_received", "_seen", "admitted", "awaiting", "blocked_on", "called", "children", "event_ids",
                 "interruptions", "outcomes", "paused", "pausing", "resting", "run", "seq", "sleeping", "stuck", "tries")

    def __init__(self, history: Iterable[r.Record]) -> None:
        self.admitted: r.Admitted | None = None
        self.outcomes: list[Recorded] = []  # in the journal's order, the first one of each step
        self.tries: dict[str, Tries] = {}  # of steps without an outcome
        self.sleeping: dict[str, int] = {}  # step → due, ms; of steps without an outcome
        self.awaiting: dict[str, r.WaitStarted] = {}  # those of them that are waits for events
        self.children: dict[str, r.ChildBegun] = {}  # of steps without an outcome; in `sleeping`, too, once created
        self.event_ids: dict[str, int] = {}  # of all events → 0: their records are accepted
        self._received: dict[tuple[int, int], r.EventReceived] = {}  # (run, seq) → event that no wait has taken
        self.run = 0
        self.seq = 0
        self.pausing = False
        self.paused = False
        self.interruptions = 0
        self.stuck = False  # interrupted, and no progress since
        self.resting = False  # only far timers were left, so it holds no slot
        self.called = False  # … and the end of a child has come since
        self.blocked_on = ""
        self._seen: set[str] = set()
        for record in history:
            self.take(record)

    @property
    def buffered(self) -> Collection[r.EventReceived]:
        """The events that no wait has taken, in their order."""
        return self._received.values()

    def take(self, record: r.Record) -> None:
        """The next record of the history."""
        self.run, self.seq = record.run, record.seq
        match record:
            case r.Admitted():
                self.admitted = record
            case r.EventReceived():  # it came from outside: nothing of the instance has moved
                self.event_ids[record.event_id] = 0
                self._received[record.run, record.seq] = record
            case r.ChildEnded():  # so did this
                self.called = True
                self._conclude(record)
            case _:
                self._take(record)

    def _conclude(self, record: Outcome) -> None:
        key = step_of(record)
        self._forget(key)
        event = self._received.pop((record.run, record.event), None) if isinstance(record, r.WaitDone) else None
        if key not in self._seen:
            self._seen.add(key)
            self.outcomes.append(Recorded(key, record, self.interruptions, event))

    def _take(self, record: r.Record) -> None:
        self.resting = isinstance(record, r.Waiting) or getattr(record, "idle", False)
        self.called = False
        if isinstance(record, r.Blocked):
            self.blocked_on = record.reason
        elif not isinstance(record, r.Interrupted):
            self.blocked_on = ""
        match record:
            case r.StepDone() | r.StepFailed() | r.SleepDone() | r.WaitDone() | r.WaitTimedOut():
                self.stuck = False
                self._conclude(record)
            case r.ChildBegun():
                self.children[step_of(record)] = record
            case r.ChildCreated():
                self.sleeping[step_of(record)] = record.due
            case r.AttemptFailed():
                self.stuck = self.stuck and record.failure.type == INTERRUPTED_TYPE
                key = step_key(record.step, record.name, record.occurrence)
                before = self.tries.get(key)
                self.tries[key] = Tries(before.failures + 1 if before else 1, record, self.interruptions)
            case r.SleepStarted():
                self.sleeping[step_of(record)] = record.due
            case r.WaitStarted():
                self.sleeping[step_of(record)] = record.due
                self.awaiting[step_of(record)] = record
            case r.StepCancelled():
                self._forget(step_key(record.step, record.name, record.occurrence))
            case r.Interrupted():
                self.interruptions += 1
                self.stuck = True
            case r.PauseAsked():
                self.pausing = True
            case r.Paused():
                self.pausing = self.paused = True
            case r.Resumed():
                self.pausing = self.paused = False
                self._move_timers(record.shift_ms)
            case _:
                pass

    def _move_timers(self, shift_ms: int) -> None:
        for tries in self.tries.values():
            tries.retry_at += shift_ms
        self.sleeping = {key: due + shift_ms for key, due in self.sleeping.items()}

    def _forget(self, key: str) -> None:
        self.tries.pop(key, None)
        self.sleeping.pop(key, None)
        self.awaiting.pop(key, None)
        self.children.pop(key, None)

    @property
    def begun(self) -> list[str]:
        """The steps that have records, but no outcome."""
        return list(dict.fromkeys((*self.tries, *self.sleeping, *self.children)))


def mismatch(instance: str, expected: str, found: str) -> DeterminismError:
    """Replay met something else than the journal holds."""
    return DeterminismError(
        f"{instance}: the journal holds {expected}, but run() is at {found}. The code was changed under a live instance: "
        f"put the old code back, or terminate the instance", expected=expected, found=found)


def describe_calls(calls: Collection[StepCall | StepDecorator]) -> str:
    """Open steps for people, the first few by name."""
    names = [str(call) for call, _ in zip(calls, range(NAMES_SHOWN_MAX), strict=False)]
    more = f" and {len(calls) - len(names)} more" if len(calls) > len(names) else ""
    return ", ".join(names) + more


def describe_key(key: str) -> str:
    """A step's identity for people."""
    kind, occurrence, name = key.split(":", 2)
    return f"{r.StepKind(int(kind)).name.lower()}({name!r}, occurrence {occurrence})"


def outcome_error(call: StepCall, outcome: Outcome) -> StepError | None:
    """The error that run() gets for a recorded outcome; None for one that is a value."""
    match outcome:
        case r.StepFailed() if not outcome.attempt:  # the time-out of the wait for a child
            return StepTimeout(f"step {outcome.name!r}: {outcome.failure.message}", step=outcome.name,
                               error_type=outcome.failure.type, error_message=outcome.failure.message, attempts=0)
        case r.ChildEnded() if outcome.status is not r.Status.COMPLETE:
            return _child_failed(call, outcome)
        case r.StepFailed():
            kind = StepTimeout if outcome.timed_out else StepFailed
            attempts = f"{outcome.attempt} attempt{'s' if outcome.attempt != 1 else ''}"
            return _error(kind, outcome.name, f"failed after {attempts}", outcome.failure, outcome.attempt)
        case r.WaitDone() if outcome.failure is not None:
            return _error(StepFailed, outcome.name, "got an event that it cannot take", outcome.failure, 1)
        case r.WaitTimedOut():
            return EventTimeout(f"step {outcome.name!r}: no event of type {call.event_type!r} came in time",
                                step=outcome.name, error_type="EventTimeout", error_message="no event came in time",
                                attempts=0)
        case _:
            return None


def _child_failed(call: StepCall, outcome: r.ChildEnded) -> ChildFailed:
    assert call.child is not None, "the outcome of a child is for a step that has one"
    child = f"{call.child.workflow}/{call.child.id}"
    failure = outcome.failure or r.Failure("Terminated", "it was terminated")
    return ChildFailed(f"step {outcome.name!r}: the child {child} {outcome.status.label}: {failure.type}: "
                       f"{failure.message}", step=outcome.name, error_type=failure.type, error_message=failure.message,
                       attempts=1, traceback=failure.traceback, child=child)


def _error(kind: type[StepError], step: str, what: str, failure: r.Failure, attempts: int) -> StepError:
    return kind(f"step {step!r} {what}: {failure.type}: {failure.message}", step=step, error_type=failure.type,
                error_message=failure.message, attempts=attempts, traceback=failure.traceback)


def recorded_value(call: StepCall, recorded: Recorded) -> Any:
    """What run() gets for a recorded outcome. Raises DeterminismError when the result does not fit the code any more."""
    outcome, event = recorded.outcome, recorded.event
    try:
        if isinstance(outcome, r.StepDone):
            return decode(outcome.result, call.result_type, what=f"the recorded result of {call}")
        if isinstance(outcome, r.ChildEnded) and outcome.status is r.Status.COMPLETE:
            return decode(outcome.output, call.result_type, what=f"the output of the child of {call}")
        if event is not None and isinstance(outcome, r.WaitDone) and outcome.failure is None:
            return event_value(call, event)
    except Exception as error:  # decoders run user code: validators, __post_init__
        raise DeterminismError(
            f"{error}. The code was changed under a live instance: put the old annotation back, or terminate the "
            f"instance", expected=f"a result of {call} as it was recorded", found=type(error).__name__) from error
    return None


def event_value(call: StepCall, event: r.EventReceived) -> Any:
    """What run() gets for an event. Raises InvalidPayload, and whatever validators of the user's own raise."""
    value = decode(event.payload, call.result_type, what=f"the event {event.type!r} for {call}")
    return call.made_of(value, event.sent_at) if call.made_of is not None else value
