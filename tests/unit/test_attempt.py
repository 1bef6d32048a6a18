"""One attempt at a callback: each has one end that counts, and is told once when it is out."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from unit.engine_host import ThreadsByHand, play

from toque.workers.attempt import Attempt, Callbacks, is_async
from toque.workflow import StepContext

place: contextvars.ContextVar[str] = contextvars.ContextVar("place", default="outside")


class Reports:
    """Notes what an attempt reports."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.callbacks = ThreadsByHand(by_hand=True)
        self.deadline_ahead = True
        host = SimpleNamespace(callbacks=self.callbacks, in_time=lambda: self.deadline_ahead)
        self.engine: Any = SimpleNamespace(host=host, now_ms=lambda: 5, title="flow/i1", threads_inside=0,
                                           admitted=SimpleNamespace(workflow="flow", id="i1"))

    def begin(self, fn: Callable[..., Any], *args: Any, timeout_ms: int = 1000, **keywords: Any) -> Attempt:
        call: Any = SimpleNamespace(fn=fn, args=args, keywords=keywords or None, name="x",
                                    options=SimpleNamespace(timeout_ms=timeout_ms))
        return Attempt(self, call, 3)

    def context(self, call: Any, number: int) -> StepContext:
        return StepContext(name="x", count=1, attempt=number, idempotency_key="k", instance_id="i1", workflow_name="f")

    def done(self, attempt: Attempt, value: Any) -> None:
        self.told.append(("done", value))

    def raised(self, attempt: Attempt, error: BaseException) -> None:
        self.told.append(("raised", type(error).__name__, str(error)))

    def timed_out(self, attempt: Attempt) -> None:
        self.told.append("timed out")

    def not_entered(self, attempt: Attempt) -> None:
        self.told.append("not entered")

    def left(self, attempt: Attempt) -> None:
        self.told.append("left")


async def report_of(fn: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """The one report of an attempt at the callback."""
    reports = Reports()
    reports.begin(fn, *args, **keywords)
    for work in reports.callbacks.waiting:
        work()
    await asyncio.sleep(0.5)
    assert len(reports.told) == 1
    assert reports.callbacks.threads_inside == reports.engine.threads_inside == reports.callbacks.abandoned == 0
    return reports.told[0]


async def async_sum(a: int, b: int = 2) -> int:
    return a + b


def sync_sum(a: int, b: int = 2) -> int:
    return a + b


def makes_coroutine(a: int) -> Any:
    return async_sum(a)


async def context_first(ctx: StepContext, a: int) -> str:
    return f"{ctx.attempt} {a}"


async def context_last(a: int, *, ctx: StepContext) -> str:
    return f"{ctx.attempt} {a}"


def context_in_thread(a: int, ctx: StepContext) -> str:
    return f"{ctx.attempt} {a}"


class Callable_:
    """An object whose call is async."""

    async def __call__(self, a: int) -> int:
        return a * 2


@pytest.mark.parametrize(("fn", "args", "keywords", "value"), [
    (async_sum, (1,), {}, 3), (sync_sum, (1,), {}, 3), (async_sum, (1,), {"b": 5}, 6), (sync_sum, (), {"a": 4}, 6),
    (makes_coroutine, (1,), {}, 3), (Callable_(), (4,), {}, 8), (functools.partial(async_sum, 10), (1,), {}, 11),
    (functools.partial(sync_sum, b=1), (1,), {}, 2), (lambda: 7, (), {}, 7),
    (context_first, (1,), {}, "3 1"), (context_last, (1,), {}, "3 1"), (context_in_thread, (1,), {}, "3 1"),
])
def test_callables_of_every_kind_are_called(fn: Any, args: Any, keywords: Any, value: Any) -> None:
    """Async, sync, sync that makes a coroutine, objects, partials; with the context where the callback wants it."""
    assert play(lambda: report_of(fn, *args, **keywords)) == ("done", value)


async def exits() -> None:
    raise SystemExit(3)


async def interrupts() -> None:
    raise KeyboardInterrupt


async def cancels_itself() -> None:
    raise asyncio.CancelledError


async def ends_a_generator() -> None:
    raise GeneratorExit


class Odd(BaseException):
    """Not even an Exception."""


async def odd() -> None:
    raise Odd("odd")


def in_thread(error: BaseException) -> Callable[[], None]:
    def fn() -> None:
        raise error

    return fn


@pytest.mark.parametrize(("fn", "type_", "message"), [
    (exits, "RuntimeError", "the callback called sys.exit(3)"),
    (in_thread(SystemExit(3)), "RuntimeError", "the callback called sys.exit(3)"),
    (interrupts, "RuntimeError", "the callback raised KeyboardInterrupt"),
    (in_thread(KeyboardInterrupt()), "RuntimeError", "the callback raised KeyboardInterrupt"),
    (cancels_itself, "CancelledError", "the callback was cancelled from inside"),
    (in_thread(asyncio.CancelledError()), "CancelledError", ""),
    (ends_a_generator, "GeneratorExit", ""),
    (odd, "Odd", "odd"),
    (in_thread(Odd("odd")), "Odd", "odd"),
    (in_thread(StopIteration(1)), "StopIteration", "1"),
    (async_sum, "TypeError", "async_sum() missing 1 required positional argument: 'a'"),
    (sync_sum, "TypeError", "sync_sum() missing 1 required positional argument: 'a'"),
])
def test_whatever_a_callback_raises_belongs_to_its_attempt(fn: Any, type_: str, message: str) -> None:
    """What would end a process or a task elsewhere is an error of the attempt, and nothing of the pod."""
    assert play(lambda: report_of(fn)) == ("raised", type_, message)


def test_a_cut_attempt_only_leaves() -> None:
    """Whatever it brings is refused; it is told when it is out."""

    async def story() -> None:
        reports = Reports()
        attempt = reports.begin(asyncio.sleep, 100, timeout_ms=1_000_000)
        await asyncio.sleep(1)
        attempt.cut()
        attempt.cut()
        assert (reports.told, reports.callbacks.abandoned) == ([], 1)
        await asyncio.sleep(1)

        assert reports.told == ["left"]
        assert reports.callbacks.abandoned == 0

    play(story)


@pytest.mark.filterwarnings("error")
def test_an_attempt_cut_before_its_task_began_leaves_no_coroutine_behind() -> None:
    """Nothing complains of a coroutine that was never awaited."""

    async def story() -> None:
        for fn in (async_sum, makes_coroutine):
            reports = Reports()
            attempt = reports.begin(fn, 1)
            for work in reports.callbacks.waiting:
                work()
                await asyncio.sleep(0)
            attempt.cut()
            await asyncio.sleep(1)
            assert reports.told == ["left"]

    play(story)


@pytest.mark.filterwarnings("error")
def test_a_coroutine_made_by_a_late_thread_is_closed() -> None:
    """Its attempt was cut while the thread was inside."""

    async def story() -> None:
        reports = Reports()

        def late() -> Any:
            attempt.cut()
            return async_sum(1)

        attempt = reports.begin(late)
        reports.callbacks.waiting[0]()
        await asyncio.sleep(1)

        assert reports.told == ["left"]

    play(story)


def test_an_attempt_that_waits_for_a_thread_is_not_entered_once_it_is_cut() -> None:
    """The thread comes, and does nothing."""

    async def story() -> None:
        entered: list[int] = []
        reports = Reports()
        attempt = reports.begin(lambda: entered.append(1))
        attempt.cut()
        reports.callbacks.waiting[0]()
        await asyncio.sleep(1)

        assert (entered, reports.told, reports.callbacks.threads_inside) == ([], ["left"], 0)

    play(story)


def test_an_attempt_whose_thread_comes_after_the_deadline_is_not_entered() -> None:
    """The deadline is checked in the thread, directly before the entry (protocol rule 7)."""

    async def story() -> None:
        entered: list[int] = []
        reports = Reports()
        reports.begin(lambda: entered.append(1))
        reports.deadline_ahead = False
        reports.callbacks.waiting[0]()
        await asyncio.sleep(1)

        assert (entered, reports.told, reports.callbacks.threads_inside) == ([], ["not entered"], 0)

    play(story)


def test_an_attempt_whose_task_begins_after_the_deadline_is_not_entered() -> None:
    """The process was stopped between the two: the deadline is read in the task's own first step, too."""

    async def story() -> None:
        entered: list[int] = []

        async def callback() -> None:
            entered.append(1)

        reports = Reports()
        reports.begin(callback)
        reports.deadline_ahead = False
        await asyncio.sleep(1)

        assert (entered, reports.told) == ([], ["not entered"])

    play(story)


def test_a_time_out_is_told_at_once_and_the_leaving_later() -> None:
    """Two reports, because a callback may stay inside."""

    async def story() -> None:
        release = asyncio.Event()

        async def stubborn() -> int:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            return 1

        reports = Reports()
        reports.begin(stubborn)
        await asyncio.sleep(5)
        assert reports.told == ["timed out"]
        release.set()
        await asyncio.sleep(1)

        assert reports.told == ["timed out", "left"]

    play(story)


def test_what_a_callback_sets_in_its_context_stays_its_own() -> None:
    """A thread is used for one callback after the other: context variables do not leak."""

    def fn() -> str:
        before = place.get()
        place.set("inside")
        return before

    async def story() -> list[Any]:
        place.set("pod")
        return [await report_of(fn), await report_of(fn)]

    assert play(story) == [("done", "pod"), ("done", "pod")]


def test_no_timer_outlives_its_attempt() -> None:
    """Nothing is scheduled any more when a quick callback is done."""

    async def story() -> None:
        reports = Reports()
        reports.begin(async_sum, 1, timeout_ms=10_000_000)
        await asyncio.sleep(1)
        loop: Any = asyncio.get_running_loop()

        assert [timer for timer in loop.pending_timers() if timer.when() < loop.time() + 1e6] == []

    play(story)


def test_async_callables_are_known_as_such() -> None:
    """Methods, partials, objects; a function that only returns a coroutine is sync."""
    assert is_async(async_sum)
    assert is_async(functools.partial(functools.partial(async_sum, 1)))
    assert is_async(Callable_())
    assert is_async(Callable_().__call__)
    assert not is_async(sync_sum)
    assert not is_async(makes_coroutine)
    assert not is_async(print)
    assert not is_async(Callable_)


def test_a_sync_callback_without_a_thread_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has no thread to give just now: what was submitted runs once, as soon as there is one."""
    ran: list[str] = []
    start = threading.Thread.start
    refused: list[threading.Thread] = []

    def start_later(thread: threading.Thread) -> None:
        if len(refused) < 2:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    async def story() -> None:
        callbacks = Callbacks(4)
        monkeypatch.setattr(threading.Thread, "start", start_later)
        came = asyncio.Event()
        loop = asyncio.get_running_loop()

        def work() -> None:
            ran.append("work")
            loop.call_soon_threadsafe(came.set)

        callbacks.submit(work)
        async with asyncio.timeout(10):
            await came.wait()
        callbacks.close()

    asyncio.run(story())
    assert (ran, len(refused)) == (["work"], 2)
