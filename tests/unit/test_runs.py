"""What a restart leaves of the runs before it."""

from __future__ import annotations

from toque.storage import records as r
from toque.storage.runs import newest_run

DO = r.StepKind.DO
ADMITTED = r.Admitted(1, 1, 1, 0, "census", "one", "n", 1, 0, b"{}", "application/json")


def done(seq: int, name: str, began: int, ended: int, run: int = 1) -> r.StepDone:
    return r.StepDone(1, run, seq, ended, DO, name, 1, 1, began, b"\x01")


def test_without_a_restart_everything_counts():
    """The history as it is."""
    history = [ADMITTED, done(2, "a", 1, 2)]

    assert newest_run(history) == history


def test_a_restart_from_the_start_leaves_the_creation_alone():
    """Results, events and the end of the run before count no more."""
    again = r.Restarted(1, 2, 1, 9, "q", "1")
    history = [ADMITTED, r.EventReceived(1, 1, 2, 1, "paid", "e", b"\x01", 1), done(3, "a", 1, 2),
               r.Ended(1, 1, 4, 3, r.Status.COMPLETE, b"\x01"), again, done(2, "a", 10, 11, run=2)]

    assert newest_run(history) == [ADMITTED, again, history[-1]]


def test_a_restart_from_a_step_keeps_what_began_before_it():
    """Not by the order in which they ended: b began after c, and ended before it."""
    a, b, c = done(2, "a", 1, 2), done(3, "b", 4, 5), done(4, "c", 3, 6)
    again = r.Restarted(1, 2, 1, 9, "q", "1", "1:1:c")

    assert newest_run([ADMITTED, a, b, c, again]) == [ADMITTED, a, again]


def test_an_attempt_tells_when_its_step_began():
    """A step that was tried three times began with the first of them."""
    config = r.RetryConfig(5, 1, "constant", 1, False, 1)
    failed = r.AttemptFailed(1, 1, 2, 2, DO, "b", 1, 1, 1, r.Failure("E", ""), 3, config)
    a, b = done(3, "a", 4, 5), r.StepDone(1, 1, 4, 9, DO, "b", 1, 2, 8, b"\x01")
    again = r.Restarted(1, 2, 1, 10, "q", "1", "1:1:b")

    assert newest_run([ADMITTED, failed, a, b, again]) == [ADMITTED, again]


def test_steps_of_one_moment_stand_in_the_order_of_their_records():
    """Milliseconds are coarse: parallel branches begin in the same one."""
    a, b = done(2, "a", 1, 2), done(3, "b", 1, 2)
    again = r.Restarted(1, 2, 1, 9, "q", "1", "1:1:b")

    assert newest_run([ADMITTED, a, b, again]) == [ADMITTED, a, again]


def test_the_events_of_kept_waits_are_kept_and_no_others():
    """A kept wait's result is in its event; an event that nobody took is gone, as with a restart from the start."""
    taken = r.EventReceived(1, 1, 2, 1, "paid", "e-1", b"\x01", 1)
    buffered = r.EventReceived(1, 1, 3, 1, "paid", "e-2", b"\x02", 1)
    wait = r.WaitDone(1, 1, 4, 2, "payment", 1, 2, 2)
    last = done(5, "ship", 3, 4)
    again = r.Restarted(1, 2, 1, 9, "q", "1", "1:1:ship")

    assert newest_run([ADMITTED, taken, buffered, wait, last, again]) == [ADMITTED, taken, wait, again]


def test_a_second_restart_counts_from_what_the_first_one_kept():
    """Kept outcomes of the first run are kept again, when they began before the step."""
    a, b = done(2, "a", 1, 2), done(3, "b", 3, 4)
    first, second = r.Restarted(1, 2, 1, 9, "q", "1", "1:1:b"), r.Restarted(1, 3, 1, 19, "q", "1", "1:1:c")
    b2, c2 = done(2, "b", 10, 11, run=2), done(3, "c", 12, 13, run=2)

    assert newest_run([ADMITTED, a, b, first, b2, c2, second]) == [ADMITTED, a, b2, second]
