"""What the records of an instance tell, under Cloudflare's names, and the cursors of it."""

from __future__ import annotations

import msgspec
import pytest

from toque._protocol import WATCH_TYPES, ErrorView, WatchView
from toque.storage import records as r
from toque.workers.watch_events import Cursor, Narrator, Place, queued_view, weight

DO, SLEEP = r.StepKind.DO, r.StepKind.SLEEP
FAILURE = r.Failure("ValueError", "no lines")
CONFIG = r.RetryConfig(5, 1000, "constant", 1000, False, 60_000)


def admitted(**fields: object) -> r.Admitted:
    return r.Admitted(1, 1, 1, 110, "flow", "one", "n-1", 7, 100, b'{"a":1}', "application/json", **fields)


class Tale:
    """Records of one instance, numbered as they come, at 200, 210, 220 … ms."""

    def __init__(self) -> None:
        self.narrator = Narrator()
        self.run, self.seq, self.at = 1, 1, 190
        self.told = self.narrator.tell(admitted())

    def tell(self, kind: type[r.Record], *fields: object, **more: object) -> list[WatchView]:
        self.seq += 1
        self.at += 10
        events = self.narrator.tell(kind(1, self.run, self.seq, self.at, *fields, **more))
        self.told += events
        return events

    def types(self, kind: type[r.Record], *fields: object, **more: object) -> list[str]:
        return [event.type for event in self.tell(kind, *fields, **more)]


def test_a_creation_tells_when_it_was_queued_and_when_it_started_with_its_params():
    """The first event is the same whether the owner reads it from the queue or from the record."""
    queued, started = Tale().told

    assert queued == queued_view(100)
    assert (started.type, started.at, bytes(started.value)) == ("workflow_started", 110, msgspec.msgpack.encode({"a": 1}))


def test_params_that_cannot_be_read_are_told_as_none():
    """The instance errs on them; its watcher does not."""
    record = msgspec.structs.replace(admitted(), params=b"{")

    assert bytes(Narrator().tell(record)[1].value) == b"\xc0"


def test_a_step_tells_its_beginning_with_its_first_record():
    """A step that succeeds at once: begun when its callback was entered, completed when it was recorded."""
    events = Tale().tell(r.StepDone, DO, "count", 2, 1, 195, b"\x05")

    assert [(event.type, event.at, event.attempt) for event in events] == [
        ("step_started", 195, 0), ("attempt_started", 195, 1), ("attempt_completed", 200, 1), ("step_completed", 200, 0)]
    assert {(event.kind, event.step, event.count) for event in events} == {("do", "count", 2)}
    assert [bytes(event.value) for event in events] == [b"", b"", b"", b"\x05"]


def test_a_step_that_is_tried_again_begins_once():
    """Every attempt is told, with its error and the pause behind it; the last one says that there is none."""
    tale = Tale()
    first = tale.tell(r.AttemptFailed, DO, "a", 1, 1, 195, FAILURE, 1200, CONFIG, True)
    woken = tale.types(r.Woken)
    second = tale.tell(r.AttemptFailed, DO, "a", 1, 2, 215, FAILURE, 2220, CONFIG)
    last = tale.tell(r.StepFailed, DO, "a", 1, 3, 225, FAILURE)

    assert [event.type for event in first] == ["step_started", "attempt_started", "attempt_errored", "workflow_waiting"]
    assert woken == ["workflow_running"]
    assert [event.type for event in second] == ["attempt_started", "attempt_errored"]
    assert [event.type for event in last] == ["attempt_started", "attempt_errored", "step_errored"]
    assert [event.retry_delay_ms for event in (first[2], second[1], last[1])] == [1000, 2000, None]
    assert first[2].error == ErrorView("ValueError", "no lines")


def test_equal_names_are_told_apart_by_their_count():
    """The second step of a name begins though the first one is being tried again."""
    tale = Tale()
    tale.tell(r.AttemptFailed, DO, "a", 1, 1, 195, FAILURE, 1200, CONFIG)

    assert tale.types(r.StepDone, DO, "a", 2, 1, 195, b"\xc0")[0] == "step_started"


def test_sleeps_and_waits_tell_how_long_and_for_what():
    """Durations are counted from the record; a wait names the type of its event."""
    tale = Tale()
    (slept,) = tale.tell(r.SleepStarted, "nap", 1, 5200)
    assert tale.types(r.SleepDone, "nap", 1) == ["sleep_completed"]
    waits = tale.tell(r.WaitStarted, "ok", 1, "approve", 6220, True)
    assert tale.types(r.EventReceived, "approve", "e-1", b"\xc0", 0) == []
    assert tale.types(r.Woken) == ["workflow_running"]
    (got,) = tale.tell(r.WaitDone, "ok", 1, tale.seq - 1, 220)

    assert (slept.type, slept.duration_ms) == ("sleep_started", 5000)
    assert [event.type for event in waits] == ["wait_started", "workflow_waiting"]
    assert (waits[0].event_type, waits[0].duration_ms, got.event_type) == ("approve", 6000, "approve")


def test_a_wait_whose_event_was_there_already_begins_too():
    """It has no record of its beginning."""
    tale = Tale()
    tale.tell(r.EventReceived, "approve", "e-1", b"\xc0", 0)
    begun, done = tale.tell(r.WaitDone, "ok", 1, 2, 204)

    assert (begun.type, begun.at, begun.event_type) == ("wait_started", 204, "approve")
    assert (done.type, done.event_type) == ("wait_completed", "approve")
    assert tale.tell(r.WaitDone, "bad", 1, 9, 204, FAILURE)[-1].error == ErrorView("ValueError", "no lines")
    assert tale.types(r.WaitTimedOut, "late", 1, 205) == ["wait_started", "wait_timed_out"]


def test_a_pause_tells_its_two_halves():
    """Asked for while a callback is inside, then there, then taken back."""
    tale = Tale()

    assert tale.types(r.PauseAsked, "q") == ["workflow_waiting_for_pause"]
    assert tale.types(r.StepDone, DO, "a", 1, 1, 195, b"\xc0")[-1] == "step_completed"
    assert tale.types(r.Paused, "") == ["workflow_paused"]
    assert tale.types(r.Resumed, "q2", 20) == ["workflow_running"]


@pytest.mark.parametrize(("end", "type_", "value", "error"), [
    ((r.Status.COMPLETE, b"\x07"), "workflow_completed", b"\x07", None),
    ((r.Status.ERRORED, b"", FAILURE), "workflow_errored", b"", ErrorView("ValueError", "no lines")),
    ((r.Status.TERMINATED,), "workflow_terminated", b"", None),
])
def test_an_end_tells_its_output_or_error(end, type_, value, error):
    """One event, the last one of the run."""
    (event,) = Tale().tell(r.Ended, *end)

    assert (event.type, bytes(event.value), event.error) == (type_, value, error)


def test_a_restart_begins_a_run_in_which_every_step_begins_anew():
    """Nothing that was open before is open in it; its events carry its run."""
    tale = Tale()
    tale.tell(r.AttemptFailed, DO, "a", 1, 1, 195, FAILURE, 1200, CONFIG)
    tale.run, tale.seq = 2, 0
    (started,) = tale.tell(r.Restarted, "q", "1")

    assert (started.type, started.run) == ("workflow_started", 2)
    assert tale.types(r.StepDone, DO, "a", 1, 1, 195, b"\xc0")[0] == "step_started"


def test_what_cloudflare_has_no_name_for_is_told_under_our_own():
    """A held instance, an interruption and a cancelled step are news, too."""
    tale = Tale()
    tale.tell(r.SleepStarted, "nap", 1, 5200)

    assert tale.types(r.Interrupted, "s-1") == ["workflow_interrupted"]
    assert tale.tell(r.Blocked, "code: changed")[0].reason == "code: changed"
    assert tale.types(r.StepCancelled, SLEEP, "nap", 1) == ["step_cancelled"]


def test_cursors_grow_and_are_read_back():
    """They order the events of an instance, over its runs, as they were told."""
    tale = Tale()
    tale.tell(r.StepDone, DO, "a", 1, 1, 195, b"\xc0")
    tale.run, tale.seq = 2, 0
    tale.tell(r.Restarted, "q", "1")
    cursors = [Cursor.parse(event.cursor) for event in tale.told]

    assert cursors == sorted(set(cursors))
    assert cursors[0] == Cursor(100, Place(1, 1, 0))
    assert [str(cursor) for cursor in cursors] == [event.cursor for event in tale.told]
    for text in ("", "x", "1.2.3", "1.2.3.4.5", "1.2.3.x"):
        with pytest.raises(ValueError):
            Cursor.parse(text)


def test_every_type_told_is_a_documented_one_and_each_payload_has_weight():
    """A page knows how large it becomes before a record is told."""
    assert weight(admitted()) > len(admitted().params)
    big = r.StepDone(1, 1, 2, 0, DO, "a", 1, 1, 0, b"x" * 5000)
    assert weight(big) > 5000
    assert weight(r.Ended(1, 1, 3, 0, r.Status.COMPLETE, b"x" * 5000)) > 5000
    tale = Tale()
    tale.tell(r.AttemptFailed, DO, "a", 1, 1, 195, FAILURE, 1200, CONFIG, True)
    tale.tell(r.Woken)
    assert {event.type for event in tale.told} <= set(WATCH_TYPES)


def test_a_child_tells_its_beginning_and_its_end_as_a_step():
    """Its value or its error; a wait that timed out has no attempt to tell of."""
    tale = Tale()
    (begun,) = tale.tell(r.ChildBegun, r.StepKind.CHILD, "part", 1, "leaf", "a-1")
    assert tale.types(r.ChildCreated, "part", 1, 5200) == []
    (done,) = tale.tell(r.ChildEnded, "part", 1, 1, r.Status.COMPLETE, b"\x07")
    (failed,) = tale.tell(r.ChildEnded, "part", 2, 1, r.Status.ERRORED, b"", FAILURE)
    (late,) = tale.tell(r.StepFailed, r.StepKind.CHILD, "part", 3, 0, 225, FAILURE, True)

    assert (begun.type, begun.kind, begun.step) == ("step_started", "child", "part")
    assert (done.type, done.kind, bytes(done.value)) == ("step_completed", "child", b"\x07")
    assert (failed.type, failed.error) == ("step_errored", ErrorView("ValueError", "no lines"))
    assert late.type == "step_errored"


def test_a_started_child_begins_once():
    """Its record tells so before its attempt does."""
    tale = Tale()
    assert tale.types(r.ChildBegun, r.StepKind.START, "go", 1, "leaf", "a-1") == ["step_started"]
    assert tale.types(r.StepDone, r.StepKind.START, "go", 1, 1, 195, b"\x80") == [
        "attempt_started", "attempt_completed", "step_completed"]
