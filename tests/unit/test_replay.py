"""What records say about steps: a pure reading of one run's history."""

from __future__ import annotations

from typing import Any

import pytest

from toque._payload import encode
from toque.errors import DeterminismError, StepFailed, StepTimeout
from toque.storage import records as r
from toque.storage.fold import INTERRUPTED_TYPE
from toque.workers.replay import Recorded, Replay, describe_calls, describe_key, mismatch, outcome_error, recorded_value

CONFIG = r.RetryConfig(5, 10_000, "exponential", 3_600_000, True, 600_000)
DO = r.StepKind.DO


class History:
    """Records of one run, numbered as they come."""

    def __init__(self) -> None:
        self.records: list[r.Record] = []
        self.add(r.Admitted, "flow", "i1", "n", 1, 1, b"", "application/json")

    def add(self, kind: type[r.Record], *values: Any) -> History:
        self.records.append(kind(1, 1, len(self.records) + 1, 1000, *values))
        return self

    def done(self, name: str, occurrence: int = 1, *, attempt: int = 1, result: bytes = b"\x01") -> History:
        return self.add(r.StepDone, DO, name, occurrence, attempt, 0, result)

    def failed_attempt(self, name: str, attempt: int, *, type_: str = "ValueError", idle: bool = False) -> History:
        return self.add(r.AttemptFailed, DO, name, 1, attempt, 0, r.Failure(type_, ""), 5_000 + attempt, CONFIG, idle)

    def interrupted(self) -> History:
        return self.add(r.Interrupted, "session")

    def replay(self) -> Replay:
        return Replay(self.records)


def test_outcomes_come_in_the_journals_order() -> None:
    """Of every kind, with what was known before each."""
    history = History().done("b").add(r.SleepStarted, "nap", 1, 5).done("a").add(r.SleepDone, "nap", 1)
    history.add(r.StepFailed, DO, "c", 1, 3, 0, r.Failure("ValueError", "no"))

    assert [recorded.key for recorded in history.replay().outcomes] == ["1:1:b", "1:1:a", "2:1:nap", "1:1:c"]
    assert history.replay().begun == []


def test_the_first_outcome_of_a_step_wins() -> None:
    """A second record of the same step would be a late one."""
    replay = History().done("a", result=b"\x01").done("a", result=b"\x02").replay()

    assert [recorded.outcome for recorded in replay.outcomes] == [History().done("a", result=b"\x01").records[1]]


def test_a_step_without_an_outcome_keeps_its_tries() -> None:
    """How many, the last number, when it is tried again, and how it was configured."""
    replay = History().failed_attempt("a", 1).interrupted().failed_attempt("a", 3).replay()
    tries = replay.tries["1:1:a"]

    assert (tries.failures, tries.last_attempt, tries.retry_at, tries.config) == (2, 3, 5_003, CONFIG)
    assert tries.since == 1
    assert replay.begun == ["1:1:a"]


@pytest.mark.parametrize("end", ["done", "cancelled"])
def test_an_outcome_or_a_cancellation_ends_tries_and_timers(end: str) -> None:
    """Nothing of them is left to take up."""
    history = History().failed_attempt("a", 1).add(r.SleepStarted, "nap", 1, 5_000)
    if end == "done":
        history.done("a").add(r.SleepDone, "nap", 1)
    else:
        history.add(r.StepCancelled, DO, "a", 1).add(r.StepCancelled, r.StepKind.SLEEP, "nap", 1)

    assert history.replay().begun == []


def test_interruptions_are_counted_up_to_each_outcome() -> None:
    """So that a step opened later knows that they were not its own."""
    replay = History().interrupted().done("a").interrupted().interrupted().done("b").interrupted().replay()

    assert [recorded.interruptions for recorded in replay.outcomes] == [1, 3]
    assert replay.interruptions == 4


@pytest.mark.parametrize(("history", "stuck"), [
    (History(), False),
    (History().interrupted(), True),
    (History().interrupted().done("a"), False),
    (History().interrupted().failed_attempt("a", 2), False),
    (History().interrupted().failed_attempt("a", 5, type_=INTERRUPTED_TYPE), True),
    (History().interrupted().add(r.SleepDone, "nap", 1), False),
    (History().done("a").interrupted(), True),
])
def test_an_instance_is_stuck_from_an_interruption_to_the_next_progress(history: History, stuck: bool) -> None:
    """As the index counts it."""
    assert history.replay().stuck is stuck


@pytest.mark.parametrize(("history", "resting"), [
    (History(), False),
    (History().add(r.SleepStarted, "nap", 1, 5, True), True),
    (History().add(r.SleepStarted, "nap", 1, 5, False), False),
    (History().failed_attempt("a", 1, idle=True), True),
    (History().add(r.Waiting), True),
    (History().add(r.Waiting).add(r.Woken), False),
    (History().add(r.Waiting).add(r.Woken).add(r.SleepDone, "nap", 1), False),
])
def test_the_last_record_says_whether_it_rests(history: History, resting: bool) -> None:
    """And so whether it must record that it is woken."""
    assert history.replay().resting is resting


@pytest.mark.parametrize(("history", "blocked_on"), [
    (History().add(r.Blocked, "code: x"), "code: x"),
    (History().add(r.Blocked, "code: x").add(r.Blocked, "code: y"), "code: y"),
    (History().add(r.Blocked, "code: x").interrupted(), "code: x"),
    (History().add(r.Blocked, "code: x").add(r.Woken), ""),
    (History().add(r.Blocked, "code: x").add(r.Woken).done("a"), ""),
])
def test_a_hold_counts_until_the_instance_goes_on(history: History, blocked_on: str) -> None:
    """Then the same reason is news again."""
    assert history.replay().blocked_on == blocked_on


def test_the_sequence_goes_on_from_the_last_record() -> None:
    """Whatever that was."""
    assert History().done("a").interrupted().replay().seq == 3


def test_a_mismatch_names_what_was_expected_and_found() -> None:
    """In the message, and as attributes."""
    error = mismatch("flow/i1", f"the outcome of {describe_key('1:2:a step: b')}", "the end of run()")

    assert error.expected == "the outcome of do('a step: b', occurrence 2)"
    assert error.found == "the end of run()"
    assert "flow/i1" in str(error)
    assert "put the old code back, or terminate the instance" in str(error)


@pytest.mark.parametrize(("timed_out", "kind"), [(False, StepFailed), (True, StepTimeout)])
def test_a_failed_step_raises_what_was_recorded(timed_out: bool, kind: type[Exception]) -> None:
    """Type, message, traceback and attempts are data of the error."""
    failure = r.Failure("ValueError", "no", "trace")
    error = outcome_error(Call(Any), r.StepFailed(1, 1, 2, 0, DO, "a", 1, 3, 0, failure, timed_out))  # type: ignore[arg-type]  # of what it needs

    assert error is not None

    assert type(error) is kind
    assert (error.step, error.error_type, error.error_message, error.attempts, error.traceback) == (
        "a", "ValueError", "no", 3, "trace")
    assert str(error) == "step 'a' failed after 3 attempts: ValueError: no"


class Call:
    """As much of a StepCall as a recorded value needs."""

    def __init__(self, result_type: Any) -> None:
        self.result_type = result_type

    def __str__(self) -> str:
        return "do('a', occurrence 1)"


def test_a_recorded_result_is_decoded_to_its_type() -> None:
    """As live."""
    record = History().done("a", result=encode([1, 2], what="result")).records[1]
    call: Any = Call(tuple[int, int])

    assert recorded_value(call, Recorded("k", record, 0)) == (1, 2)  # type: ignore[arg-type]  # it is an outcome


def test_a_result_that_does_not_fit_any_more_is_a_determinism_error() -> None:
    """It names the step, and what to do; the value itself is not in it."""
    record = History().done("a", result=encode("secret", what="result")).records[1]
    call: Any = Call(int)

    with pytest.raises(DeterminismError) as caught:
        recorded_value(call, Recorded("k", record, 0))  # type: ignore[arg-type]  # it is an outcome
    assert "do('a', occurrence 1)" in str(caught.value)
    assert "put the old annotation back" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_many_calls_are_described_in_short() -> None:
    """The first five, and the number of the others."""
    calls: Any = [Call(int)] * 9

    assert describe_calls(calls).endswith(" and 4 more")
    assert describe_calls(calls[:1]) == "do('a', occurrence 1)"
