"""S1 and S3 on doctored logs: each holds on the honest one, and breaks on the fault it is there for."""

from __future__ import annotations

import pytest

from toque.chaos.history import CREATE, FAILED, OK, RESULT, STATUS, UNKNOWN, Op
from toque.chaos.status_checks import check_s1, check_s3


class Log:
    """A client's log, one operation after the other unless times are given."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def op(self, op: str, status: str = "", value: str = "", *, outcome: str = OK, invoked: int = 0,
           returned: int = 0) -> None:
        at = 10 * len(self.ops) + 10
        self.ops.append(Op(len(self.ops) + 1, op, "census", "a", invoked or at, returned or at + 5, outcome, status, value))


@pytest.fixture
def log() -> Log:
    """Created, seen queued, running, waiting, running again, complete; its result read twice."""
    log = Log()
    log.op(CREATE)
    for status in ("queued", "running", "waiting", "running"):
        log.op(STATUS, status)
    log.op(RESULT, "complete", "42")
    log.op(STATUS, "complete", "42")
    log.op(RESULT, "complete", "42")
    return log


def test_an_honest_log_holds(log):
    """Every status counts; the instance whose result was read twice counts once."""
    assert check_s1(log.ops).holds
    assert check_s1(log.ops).checked == 7
    assert check_s3(log.ops).holds
    assert check_s3(log.ops).checked == 1


@pytest.mark.parametrize("status", ["queued", "running", "waiting", "terminated"])
def test_s1_breaks_when_an_end_is_not_the_end(log, status):
    """A terminal status absorbs."""
    log.op(STATUS, status)

    assert check_s1(log.ops).broken == 1


def test_s1_breaks_when_a_running_instance_is_queued_again(log):
    """Queued comes first, and never again."""
    log.ops = log.ops[:3]
    log.op(STATUS, "queued")

    assert check_s1(log.ops).broken == 1


def test_s1_breaks_on_a_status_that_there_is_not(log):
    """Only what the state page names."""
    log.op(STATUS, "exploded")

    assert check_s1(log.ops).broken == 1


def test_s1_allows_answers_to_questions_that_overlapped(log):
    """Asked before the end was told, answered after it: there is no order between the two."""
    end = next(op for op in log.ops if op.op == RESULT)
    log.op(STATUS, "running", invoked=end.invoked_ns, returned=end.returned_ns + 1)

    assert check_s1(log.ops).holds


def test_s1_breaks_when_an_acknowledged_instance_is_not_found(log):
    """A client reads its own writes."""
    log.op(STATUS, value="InstanceNotFound('there is none')", outcome=FAILED)

    assert check_s1(log.ops).broken == 1


def test_s1_allows_not_found_before_the_acknowledgement():
    """Nobody was told yet that it is there."""
    log = Log()
    log.op(STATUS, value="InstanceNotFound('there is none')", outcome=FAILED)
    log.op(CREATE)
    log.op(STATUS, "queued")

    assert check_s1(log.ops).holds


def test_an_unknown_answer_is_no_status(log):
    """A question without an answer breaks nothing."""
    log.op(STATUS, outcome=UNKNOWN)

    assert check_s1(log.ops).holds


def test_s3_breaks_when_a_result_changes(log):
    """Read a third time it is another one."""
    log.op(RESULT, "complete", "43")

    assert check_s3(log.ops).broken == 1


def test_checks_that_saw_nothing_do_not_hold():
    """Silence proves nothing."""
    assert not check_s1([]).holds
    assert not check_s3([]).holds
