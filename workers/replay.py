"""What an instance's records say about its steps: the results to hand out again, and the steps that are still open.

Pure: reads records, changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from toque._payload import decode
from toque.errors import DeterminismError, StepError, StepFailed, StepTimeout
from toque.storage import records as r
from toque.storage.fold import INTERRUPTED_TYPE, step_key
from toque.workers.step_call import StepCall, StepDecorator

Outcome = r.StepDone | r.StepFailed | r.SleepDone

NAMES_SHOWN_MAX = 5


class Recorded(NamedTuple):
    """One outcome to hand out again."""

    key: str
    outcome: Outcome
    interruptions: int  # of the run, before this record


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

    __slots__ = ("admitted", "blocked_on", "interruptions", "outcomes", "paused", "pausing", "resting", "run", "seq",
                 "sleeping", "stuck", "tries")

    def __init__(self, history: Iterable[r.Record]) -> None:
        self.admitted: r.Admitted | None = None
        self.outcomes: list[Recorded] = []  # in the journal's order, the first one of each step
        self.tries: dict[str, Tries] = {}  # of steps without an outcome
        self.sleeping: dict[str, int] = {}  # step → due, ms; of steps without an outcome
        self.run = 0
        self.seq = 0
        self.pausing = False
        self.paused = False
        self.interruptions = 0
        self.stuck = False  # interrupted, and no progress since
        self.resting = False  # only far timers were left, so it holds no slot
        self.blocked_on = ""
        seen: set[str] = set()
        for record in history:
            self.run, self.seq = record.run, record.seq
            if type(record) is r.Admitted:
                self.admitted = record
            else:
                self._take(record, seen)

    def _take(self, record: r.Record, seen: set[str]) -> None:
        self.resting = isinstance(record, r.Waiting) or getattr(record, "idle", False)
        if isinstance(record, r.Blocked):
            self.blocked_on = record.reason
        elif not isinstance(record, r.Interrupted):
            self.blocked_on = ""
        match record:
            case r.StepDone() | r.StepFailed() | r.SleepDone():
                self.stuck = False
                key = outcome_key(record)
                self._forget(key)
                if key not in seen:
                    seen.add(key)
                    self.outcomes.append(Recorded(key, record, self.interruptions))
            case r.AttemptFailed():
                self.stuck = self.stuck and record.failure.type == INTERRUPTED_TYPE
                key = step_key(record.step, record.name, record.occurrence)
                before = self.tries.get(key)
                self.tries[key] = Tries(before.failures + 1 if before else 1, record, self.interruptions)
            case r.SleepStarted():
                self.sleeping[step_key(r.StepKind.SLEEP, record.name, record.occurrence)] = record.due
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

    @property
    def begun(self) -> list[str]:
        """The steps that have records, but no outcome."""
        return [*self.tries, *self.sleeping]


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


def outcome_key(record: Outcome) -> str:
    if isinstance(record, r.SleepDone):
        return step_key(r.StepKind.SLEEP, record.name, record.occurrence)
    return step_key(record.step, record.name, record.occurrence)


def describe_key(key: str) -> str:
    """A step's identity for people."""
    kind, occurrence, name = key.split(":", 2)
    return f"{r.StepKind(int(kind)).name.lower()}({name!r}, occurrence {occurrence})"


def outcome_error(record: r.StepFailed) -> StepError:
    """The error that run() gets for a step that failed for good."""
    kind = StepTimeout if record.timed_out else StepFailed
    failure = record.failure
    attempts = f"{record.attempt} attempt{'s' if record.attempt != 1 else ''}"
    return kind(f"step {record.name!r} failed after {attempts}: {failure.type}: {failure.message}", step=record.name,
                error_type=failure.type, error_message=failure.message, attempts=record.attempt,
                traceback=failure.traceback)


def recorded_value(call: StepCall, outcome: Outcome) -> Any:
    """What run() gets for a recorded outcome. Raises DeterminismError when the result does not fit the code any more."""
    if not isinstance(outcome, r.StepDone):
        return None
    try:
        return decode(outcome.result, call.result_type, what=f"the recorded result of {call}")
    except Exception as error:  # decoders run user code: validators, __post_init__
        raise DeterminismError(
            f"{error}. The code was changed under a live instance: put the old annotation back, or terminate the "
            f"instance", expected=f"a result of {call} as it was recorded", found=type(error).__name__) from error
