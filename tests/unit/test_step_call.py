"""The `step` object of run(): identities, options, and what marks a step as awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from toque.errors import MisuseError, UsageError
from toque.workers.instance_loop import Evicted, InstanceLoop
from toque.workers.step_call import RunStep, StepCall
from toque.workflow import DEFAULT_OPTIONS, Retries, Workflow


class FakeEngine:
    """Notes what its steps tell."""

    def __init__(self) -> None:
        self.loop = InstanceLoop()  # type: ignore[abstract]  # what is missing is refused at run time
        self.closed = False
        self.flow = Workflow
        self.opened: list[StepCall] = []
        self.cancelled: list[StepCall] = []
        self.awaited: list[Any] = []
        self.decorators: list[Any] = []
        self.call_opened = self.opened.append
        self.call_cancelled = self.cancelled.append
        self.call_awaited = self.awaited.append
        self.decorator_made = self.decorators.append

    def now_ms(self) -> int:
        return 1_000


def inside(act: Callable[[RunStep], Any], engine: FakeEngine | None = None) -> Any:
    """What the act returns, or raises, inside run()."""
    engine = engine or FakeEngine()
    results: list[Any] = []
    any_engine: Any = engine
    engine.loop.drain(lambda: results.append(act(RunStep(any_engine))))
    return results[0]


def work(a: int = 1) -> int:
    return a


def test_occurrences_are_counted_by_kind_and_name() -> None:
    """In the order of the calls."""

    def act(step: RunStep) -> list[str]:
        calls = [step.do("a", work), step.do("a", work), step.sleep("a", "1 s"), step.do("b", work), step.do("a", work)]
        return [call.key for call in calls]

    assert inside(act) == ["1:1:a", "1:2:a", "2:1:a", "1:1:b", "1:3:a"]


def test_a_refused_call_counts_for_nothing() -> None:
    """The next one has the occurrence that it would have had."""

    def act(step: RunStep) -> str:
        for wrong in (lambda: step.do("a", 5), lambda: step.sleep("a", "never"), lambda: step.do("a", work, timeout=1)):
            with pytest.raises(UsageError):
                wrong()
        return str(step.do("a", work))

    assert inside(act) == "do('a', occurrence 1)"


def test_both_forms_open_the_same_step() -> None:
    """Directly, and as a decorator whose product takes arguments of every kind."""

    def act(step: RunStep) -> list[Any]:
        decorated = step.do("a", retries=Retries(limit=1))(work)
        assert decorated.__name__ == "work"
        calls = [step.do("a", work, 5, retries=Retries(limit=1)), decorated(5), decorated(a=5)]
        return [(call.fn, call.args, call.keywords, call.options.limit, call.result_type) for call in calls]

    assert inside(act) == [(work, (5,), None, 1, int), (work, (5,), None, 1, int), (work, (), {"a": 5}, 1, int)]


def test_a_decorator_may_be_used_again() -> None:
    """Each call of its product is one more occurrence."""

    def act(step: RunStep) -> list[str]:
        decorated = step.do("a")(work)
        return [decorated().key, decorated().key]

    assert inside(act) == ["1:1:a", "1:2:a"]


def test_options_default_to_five_retries_and_ten_minutes() -> None:
    """Resolved at the call."""

    def act(step: RunStep) -> Any:
        return step.do("a", work).options, step.do("a", work, timeout="2 s").options

    assert inside(act) == (DEFAULT_OPTIONS, DEFAULT_OPTIONS._replace(timeout_ms=2_000))


@pytest.mark.parametrize(("when", "due"), [
    (datetime(1970, 1, 1, 0, 1, tzinfo=UTC), 60_000),
    (datetime(1970, 1, 1, 0, 1, 0, 1, tzinfo=UTC), 60_001),
    (datetime(1970, 1, 1, 0, 1, 0, 1_000, tzinfo=UTC), 60_001),
    (datetime(1900, 1, 1, tzinfo=UTC), 1),
])
def test_a_date_is_a_due_time_rounded_up(when: datetime, due: int) -> None:
    """In whole milliseconds of broker time."""
    assert inside(lambda step: step.sleep_until("a", when)).due == due


def test_a_sleep_keeps_its_duration() -> None:
    """Its due time is known when it begins."""
    call = inside(lambda step: step.sleep("a", timedelta(minutes=1)))

    assert (call.duration_ms, call.due) == (60_000, 0)


@pytest.mark.parametrize("look", [
    lambda call: asyncio.ensure_future(_awaiting(call)), lambda call: asyncio.gather(call),
    lambda call: call.exception(), lambda call: call.result(),
    lambda call: asyncio.ensure_future(_awaiting(asyncio.shield(call))), lambda call: call.add_done_callback(print),
], ids=["await", "gather", "exception", "result", "shield", "add_done_callback"])
@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_looking_at_a_step_in_any_way_marks_it_as_awaited(look: Callable[[StepCall], Any], early: bool) -> None:
    """Before its outcome and after it; the engine hears only of those that were done already."""
    engine = FakeEngine()
    call = inside(lambda step: step.do("a", work), engine)
    assert not call.awaited
    kept: list[Any] = []

    def act() -> None:
        try:
            kept.append(look(call))
        except asyncio.InvalidStateError:
            assert early

    if not early:
        engine.loop.drain(call.set_result, 1)
    engine.loop.drain(act)

    assert call.awaited
    assert engine.awaited == ([] if early else [call])
    engine.loop.unwind()


async def _awaiting(call: asyncio.Future[Any]) -> Any:
    return await call


def test_a_cancelled_step_is_told_once() -> None:
    """And only if it was not done."""
    engine = FakeEngine()

    def act(step: RunStep) -> StepCall:
        call: StepCall = step.do("a", work)
        assert call.cancel()
        assert not call.cancel()
        return call

    assert engine.cancelled == [inside(act, engine)]


def test_a_step_cannot_be_opened_or_cancelled_from_outside() -> None:
    """Not by a callback, not in another loop, not without one."""
    engine = FakeEngine()
    step, call = inside(lambda step: (step, step.do("a", work)), engine)

    with pytest.raises(MisuseError, match="step 'b' was called inside a callback"):
        step.do("b", work)
    with pytest.raises(MisuseError, match="step 'a' was cancelled from outside"):
        call.cancel()
    assert not call.cancelled()
    assert engine.opened == [call]


def test_an_evicted_run_is_told_once_and_then_waits_for_ever() -> None:
    """Whoever catches Evicted, and asks again, gets a step that never comes, and cannot spin."""
    engine = FakeEngine()

    def act(step: RunStep) -> StepCall:
        engine.closed = True
        with pytest.raises(Evicted):
            step.do("a", work)
        call: StepCall = step.do("a", work)
        return call

    assert not inside(act, engine).done()


def test_evicted_is_no_exception() -> None:
    """`except Exception` in run() does not catch it."""
    assert not issubclass(Evicted, Exception)


def test_a_result_type_is_known_when_the_step_is_opened() -> None:
    """An annotation that cannot be resolved is said before any work is done."""
    namespace = SimpleNamespace()

    def wrong() -> "Unheard":  # type: ignore[name-defined]  # noqa: F821, UP037  # that is the point
        namespace.entered = True

    with pytest.raises(MisuseError, match="Unheard"):
        inside(lambda step: step.do("a", wrong))
