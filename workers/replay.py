"""What an instance's records say about its steps: the results to hand out again, and the waits that are still open.

Pure: reads records, changes nothing.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from toque._payload import decode, return_type
from toque.errors import DeterminismError, InvalidPayload, StepError, StepFailed, StepTimeout
from toque.storage import records as r
from toque.storage.fold import step_key
from toque.workers.step_call import StepCall

Outcome = r.StepDone | r.StepFailed | r.SleepDone


class Replay:
    """The history of one run, taken apart once."""

    def __init__(self, history: list[r.Record]) -> None:
        self.admitted: r.Admitted | None = None
        self.outcomes: deque[tuple[str, Outcome]] = deque()  # in the journal's order, first one per step
        self.failed: dict[str, list[r.AttemptFailed]] = {}  # of steps without an outcome
        self.sleeping: dict[str, r.SleepStarted] = {}
        self.seq = 0
        self.interruptions = 0  # since the last progress
        self.resting = False  # only far timers were left, so it holds no slot
        self.blocked_on = ""
        seen: set[str] = set()
        for record in history:
            self.seq = record.seq
            self.resting = isinstance(record, r.Waiting) or getattr(record, "idle", False)
            match record:
                case r.Admitted():
                    self.admitted = record
                case r.StepDone() | r.StepFailed() | r.SleepDone():
                    self.interruptions = 0
                    key = outcome_key(record)
                    if key not in seen:
                        seen.add(key)
                        self.outcomes.append((key, record))
                case r.AttemptFailed():
                    self.failed.setdefault(step_key(record.step, record.name, record.occurrence), []).append(record)
                case r.SleepStarted():
                    self.sleeping[step_key(r.StepKind.SLEEP, record.name, record.occurrence)] = record
                case r.Interrupted():
                    self.interruptions += 1
                case r.Blocked():
                    self.blocked_on = record.reason
                case _:
                    pass
        for key in seen:
            self.failed.pop(key, None)
            self.sleeping.pop(key, None)


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


def hand_out(call: StepCall, outcome: Outcome) -> None:
    """Give run() a recorded outcome. Raises DeterminismError when the result does not fit the callback any more."""
    if call.done():
        return
    match outcome:
        case r.StepDone():
            call.set_result(decode_result(call, outcome.result))
        case r.StepFailed():
            call.set_exception(outcome_error(outcome))
        case r.SleepDone():
            call.set_result(None)


def decode_result(call: StepCall, data: bytes) -> Any:
    assert call.fn is not None
    try:
        return decode(data, return_type(call.fn), what=f"the result of step {call.name!r}")
    except InvalidPayload as error:
        raise DeterminismError(str(error), expected="a result of the recorded type", found=str(call)) from error
