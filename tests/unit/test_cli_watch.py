"""What `toque instances watch` prints of an event."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from toque._protocol import ErrorView
from toque._watch import WatchEvent
from toque.cli.instances import event_line
from toque.cli.output import time_text

AT = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)


def line(type_: str, **fields: object) -> str:
    """Behind the time."""
    event = WatchEvent(workflow="census", id="a1", cursor="c", type=type_, at=AT, run=1, **fields)  # type: ignore[arg-type]
    time, _, rest = event_line(event).partition("  ")
    assert time == time_text(AT)
    return rest


@pytest.mark.parametrize(("shown", "type_", "fields"), [
    ("workflow_queued", "workflow_queued", {}),
    ('workflow_started  {"path":"a.py"}', "workflow_started", {"value": {"path": "a.py"}}),
    ("step_completed  hash (2)  5", "step_completed", {"step": "hash", "count": 2, "value": 5}),
    ("attempt_errored  hash  attempt 1  again in 1,500 ms  OSError: gone", "attempt_errored",
     {"step": "hash", "count": 1, "attempt": 1, "retry_delay_ms": 1500, "error": ErrorView("OSError", "gone")}),
    ("sleep_started  nap  for 5,000 ms", "sleep_started", {"step": "nap", "count": 1, "duration_ms": 5000}),
    ("wait_completed  ok  approve", "wait_completed", {"step": "ok", "count": 1, "event_type": "approve"}),
    ("workflow_blocked  code: changed", "workflow_blocked", {"reason": "code: changed"}),
    ("workflow_completed  null", "workflow_completed", {}),
])
def test_an_event_is_one_line_of_what_it_has(shown: str, type_: str, fields: dict[str, object]) -> None:
    """What a type does not have is left out; an output of nothing is one."""
    assert line(type_, **fields) == shown


def test_an_error_text_cannot_steer_the_terminal() -> None:
    """What user code raised is shown, not obeyed."""
    assert line("workflow_errored", error=ErrorView("E", "\x1b[2J\nsecond")) == "workflow_errored  E: \\x1b[2J⏎second"
