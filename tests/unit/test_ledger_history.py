"""The client's own log."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from toque.chaos.history import CREATE, FAILED, OK, RESULT, UNKNOWN, History, read_history
from toque.errors import BrokerUnavailable, InstanceErrored, InstanceExists


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log" / "ops.jsonl"


def history(path: Path) -> History:
    return History(path, clock=count(1).__next__)


def test_an_operation_is_read_back_with_both_times(path: Path) -> None:
    """What was invoked and acknowledged is in the log, in order of invocation."""
    with history(path) as log:
        first = log.invoke(CREATE, "census")
        with log.recording(RESULT, "census", "b") as second:
            second.status, second.value = "complete", "42"
        log.ok(first, instance="a")

    create, result = read_history(path)

    assert (create.op, create.instance, create.outcome) == (CREATE, "a", OK)
    assert (create.invoked_ns, create.returned_ns) == (1, 4)
    assert (result.op, result.status, result.value, result.returned_ns) == (RESULT, "complete", "42", 3)


def test_an_operation_that_never_returned_is_unknown(path: Path) -> None:
    """The client died waiting: it may have happened or not."""
    with history(path) as log:
        log.invoke(CREATE, "census", "a")

    [op] = read_history(path)

    assert (op.outcome, op.returned_ns) == (UNKNOWN, 0)


@pytest.mark.parametrize(("error", "outcome", "status"), [
    (InstanceExists("there is one"), FAILED, ""),
    (BrokerUnavailable("no answer"), UNKNOWN, ""),
    (InstanceErrored("ValueError", "bad"), OK, "errored"),
])
def test_an_error_is_logged_as_what_it_says(path: Path, error: Exception, outcome: str, status: str) -> None:
    """A refusal is certain, a time-out is not, and a failed instance is an answer."""
    with history(path) as log, pytest.raises(type(error)), log.recording(CREATE, "census", "a"):
        raise error

    [op] = read_history(path)

    assert (op.outcome, op.status) == (outcome, status)


def test_a_torn_last_line_is_left_out(path: Path) -> None:
    """A log whose writer was killed in the middle of a line is still read."""
    with history(path) as log:
        log.invoke(CREATE, "census", "a")
    with path.open("ab") as file:
        file.write(b'{"number":2,"op":"cre')

    assert [op.instance for op in read_history(path)] == ["a"]
