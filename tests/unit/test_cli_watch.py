"""What `toque instances watch` says between two looks at an instance."""

from __future__ import annotations

import msgspec

from toque._protocol import DescribeView, ErrorView, InstanceView, StepView
from toque.cli.instances import News


def described(status: str, *steps: StepView, **more: object) -> DescribeView:
    return DescribeView(InstanceView("census", "a1", status, **more), list(steps))  # type: ignore[arg-type]


def step(name: str, status: str, attempts: int = 1, **more: object) -> StepView:
    return StepView("do", name, 1, status, attempts, **more)  # type: ignore[arg-type]


def test_only_what_is_new_is_said() -> None:
    """A look that finds nothing new says nothing; a new step is said once."""
    news = News()
    first = list(news.lines(described("running")))
    again = list(news.lines(described("running")))

    later = list(news.lines(described("running", step("hash", "complete", output=msgspec.Raw(b"\x05")))))

    assert (first, again, later) == (["census/a1  running"], [], ["do  hash  complete  5"])


def test_steps_are_said_before_the_end_that_they_led_to() -> None:
    """The last look shows the last steps first, then how the instance ended."""
    news = News()
    view = described("errored", step("fetch", "failed", 3, error=ErrorView("OSError", "gone")),
                     error=ErrorView("StepFailed", "fetch failed"))

    lines = list(news.lines(view))

    assert lines == ["do  fetch  failed  attempt 3  OSError: gone", "census/a1  errored  StepFailed: fetch failed"]


def test_another_attempt_is_news() -> None:
    """A step that is tried again shows up with its new attempt."""
    news = News()
    list(news.lines(described("running", step("fetch", "retrying", 1))))

    lines = list(news.lines(described("running", step("fetch", "retrying", 2))))

    assert lines == ["do  fetch  retrying  attempt 2"]


def test_an_error_text_cannot_steer_the_terminal() -> None:
    """What user code raised is shown, not obeyed."""
    lines = list(News().lines(described("errored", error=ErrorView("E", "\x1b[2J\nsecond"))))

    assert lines == ["census/a1  errored  E: \\x1b[2J⏎second"]
