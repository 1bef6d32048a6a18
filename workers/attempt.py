"""One attempt at a callback, on the pod's loop or in a thread, under a time-out.

An attempt has one outcome that counts; after it was closed (time-out, cut, terminated) a late one is refused. A task can
be cancelled, a thread cannot: it stays "inside" until it returns, and holds its instance's slot so long.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import CodeType
from typing import TYPE_CHECKING, Any, Protocol

from toque._logging import get_logger
from toque.workers.step_call import StepCall
from toque.workflow import context_place, pass_context

if TYPE_CHECKING:
    from toque.workers.engine import Engine
    from toque.workflow import StepContext

CODES_MAX = 10_000
HELD_SHOWN_MAX = 5
NO_THREAD_PAUSE_S = 1.0

step_inside: contextvars.ContextVar[tuple[str, str, str]] = contextvars.ContextVar("step_inside")
"""Workflow, instance id and step of the async callback that the task runs, or was made by."""

_log = get_logger("toque.callbacks")


def _nothing() -> None:
    """For a thread that only has to be there."""


class Callbacks:
    """Who is inside a callback of this pod now, and the threads for sync ones."""

    def __init__(self, threads_max: int) -> None:
        self.threads_max = threads_max
        self.inside = 0
        self.threads_inside = 0  # sync callbacks that have a thread, or wait for one
        self.threads_taken = 0  # of those: that have one
        self.abandoned = 0  # of those inside: they timed out or were cut, so their result will be refused
        self._closed = False
        self._held: dict[Attempt, float] = {}  # abandoned ones that have a thread → since when, in the loop's time
        self._pool = ThreadPoolExecutor(threads_max, thread_name_prefix="toque-step")

    @property
    def threads_abandoned(self) -> int:
        """Threads that nobody waits for any more, and that cannot be stopped."""
        return len(self._held)

    def hold(self, attempt: Attempt, since: float) -> None:
        """The result of a callback in a thread does not count any more; its thread goes on."""
        self._held[attempt] = since
        _log.warning("a callback is abandoned; its thread goes on", callback=attempt.title, abandoned=len(self._held),
                     threads=self.threads_max)
        if len(self._held) == self.threads_max:
            self._say_that_all_are_held()

    def let_go(self, attempt: Attempt, now: float) -> None:
        """A thread is free again."""
        since = self._held.pop(attempt, None)
        if since is not None:
            _log.info("an abandoned callback has returned, and is refused", callback=attempt.title,
                      late_s=round(now - since, 1), abandoned=len(self._held))

    def _say_that_all_are_held(self) -> None:
        titles = [attempt.title for attempt in self._held]
        more = f" and {len(titles) - HELD_SHOWN_MAX} more" if len(titles) > HELD_SHOWN_MAX else ""
        _log.error("all threads are held by abandoned callbacks: no sync callback can be entered here",
                   threads=self.threads_max, callbacks=", ".join(titles[:HELD_SHOWN_MAX]) + more,
                   remedy="restart the pod, which is the only way to end a thread; then give what the callbacks wait "
                          "for a time-out of its own, or have them look at ctx.cancelled, or raise --threads")

    def submit(self, fn: Callable[[], None]) -> None:
        """Run it in a thread. When the host has none to give it waits, and is not lost: the next thread takes it."""
        try:
            self._pool.submit(fn)
        except RuntimeError as error:
            if self._closed:
                raise
            _log.error("no thread can be started; a sync callback waits", why=str(error),
                       remedy="raise the host's limit of processes and threads (ulimit -u, TasksMax, pids.max)")
            asyncio.get_running_loop().call_later(NO_THREAD_PAUSE_S, self._try_again)

    def _try_again(self) -> None:
        if not self._closed:
            self.submit(_nothing)  # what waits was taken into the pool's queue all the same

    def close(self) -> None:
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)


class Reports(Protocol):
    """Who hears of an attempt. Each hears once of its end, and once more of its leaving when the two differ."""

    @property
    def engine(self) -> Engine: ...

    def context(self, call: StepCall, number: int) -> StepContext:
        """What the callback is told, if it asks."""
        ...

    def done(self, attempt: Attempt, value: Any) -> None:
        """It returned, and is not inside any more."""
        ...

    def raised(self, attempt: Attempt, error: BaseException) -> None:
        """It raised, and is not inside any more."""
        ...

    def timed_out(self, attempt: Attempt) -> None:
        """Its time is over. It is still inside."""
        ...

    def not_entered(self, attempt: Attempt) -> None:
        """The deadline came before its thread did: the callback was never inside."""
        ...

    def left(self, attempt: Attempt) -> None:
        """It is not inside any more; what it brought is refused."""
        ...


class Attempt:
    """See the module. It begins when it is made, and tells `reports` what becomes of it, never before it is made."""

    __slots__ = ("_callbacks", "_closed", "_context", "_has_thread", "_loop", "_made", "_reports", "_task", "_timer",
                 "call", "number", "started_at")

    def __init__(self, reports: Reports, call: StepCall, number: int) -> None:
        engine = reports.engine
        self.call = call
        self.number = number
        self.started_at = engine.now_ms()
        self._reports = reports
        self._callbacks = engine.host.callbacks
        self._loop = asyncio.get_running_loop()
        self._context: StepContext | None = None
        self._task: asyncio.Future[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._has_thread = False
        self._made: Awaitable[Any] | None = None  # by a sync callable
        fn = call.fn
        assert fn is not None
        args: tuple[Any, ...] = call.args
        keywords = call.keywords or {}
        if context_place(fn) is not None:
            self._context = reports.context(call, number)
            args, keywords = pass_context(fn, args, keywords, self._context)
        if is_async(fn):
            self._start_timer()
            self._watch(_entered(self._place, engine.host.in_time, fn, args, keywords))
        else:
            self._begin_thread(fn, args, keywords)

    @property
    def title(self) -> str:
        """For people."""
        return f"step {self.call.name!r} of {self._reports.engine.title}"

    @property
    def _place(self) -> tuple[str, str, str]:
        admitted = self._reports.engine.admitted
        return admitted.workflow, admitted.id, self.call.name

    def cut(self) -> None:
        """Refuse whatever comes: the session is lost, the instance is terminated, or run() cancelled the step."""
        if self._closed:
            return
        self._close()
        self._callbacks.abandoned += 1
        if self._has_thread:
            self._callbacks.hold(self, self._loop.time())
        if self._task is not None:
            self._task.cancel()

    # -- on the loop ---------------------------------------------------------------------------------------------------

    def _start_timer(self) -> None:
        if not self._closed:
            self._timer = self._loop.call_later(self.call.options.timeout_ms / 1000, self._time_out)

    def _watch(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._task = self._loop.create_task(coroutine, name=self.title)
        self._task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Future[Any]) -> None:
        if task.cancelled():
            _close(self._made)  # its task may have been cancelled before it began
            self._raised(asyncio.CancelledError("the callback was cancelled from inside"))
        elif (error := task.exception()) is None:
            self._returned(task.result())
        elif isinstance(error, _NotInTime):
            self._not_entered()
        else:
            self._raised(error)

    def _not_entered(self) -> None:
        if not self._refused():
            self._close()
            self._reports.not_entered(self)

    def _returned(self, value: Any) -> None:
        if self._refused():
            return
        self._close()
        self._reports.done(self, value)

    def _raised(self, error: BaseException) -> None:
        if self._refused():
            return
        self._close()
        self._reports.raised(self, error)

    def _refused(self) -> bool:
        """It is out. True when that is all there is to tell."""
        if self._closed:
            self._callbacks.abandoned -= 1
            self._reports.left(self)
        return self._closed

    def _time_out(self) -> None:
        if not self._closed:
            self.cut()
            self._reports.timed_out(self)

    def _close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._context is not None:
            self._context._cancel()

    # -- in a thread ---------------------------------------------------------------------------------------------------

    def _begin_thread(self, fn: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._callbacks.threads_inside += 1
        self._reports.engine.threads_inside += 1
        run = contextvars.copy_context().run
        self._callbacks.submit(lambda: self._run_in_thread(functools.partial(run, fn, *args, **keywords)))

    def _run_in_thread(self, fn: Callable[[], Any]) -> None:
        post = self._loop.call_soon_threadsafe
        if self._closed or not self._reports.engine.host.in_time():
            post(self._thread_not_entered)
            return
        post(self._thread_entered)
        try:
            result = fn()
        except BaseException as error:  # whatever it was, it belongs to the step  # noqa: BLE001
            post(self._thread_raised, _tamed(error))
        else:
            post(self._thread_returned, result)

    def _thread_entered(self) -> None:
        self._has_thread = True
        self._callbacks.threads_taken += 1
        if self._closed:
            self._callbacks.hold(self, self._loop.time())  # it was cut while its thread came
        else:
            self._start_timer()

    def _thread_returned(self, result: Any) -> None:
        self._thread_gone()
        if not inspect.isawaitable(result):
            self._returned(result)
        elif not self._closed:  # a sync callable that made a coroutine: await it here
            self._made = result
            self._watch(_awaited(self._place, result))
        else:
            _close(result)
            self._returned(None)

    def _thread_raised(self, error: BaseException) -> None:
        self._thread_gone()
        self._raised(error)

    def _thread_not_entered(self) -> None:
        self._thread_gone()
        self._not_entered()

    def _thread_gone(self) -> None:
        self._callbacks.threads_inside -= 1
        self._reports.engine.threads_inside -= 1
        if self._has_thread:
            self._has_thread = False
            self._callbacks.threads_taken -= 1
            self._callbacks.let_go(self, self._loop.time())


class _NotInTime(Exception):
    """The deadline came between the making of the task and its first step (the process was stopped, say)."""


async def _entered(place: tuple[str, str, str], in_time: Callable[[], bool], fn: Callable[..., Awaitable[Any]],
                   args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The entry itself: the deadline is read here once more, with nothing between it and the callback."""
    step_inside.set(place)
    if not in_time():
        raise _NotInTime
    return await _called(fn, args, keywords)


async def _called(fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """A callback that calls sys.exit() fails its step; it does not end the pod."""
    try:
        return await fn(*args, **keywords)
    except (SystemExit, KeyboardInterrupt) as error:
        raise _tamed(error) from error


async def _awaited(place: tuple[str, str, str], awaitable: Awaitable[Any]) -> Any:
    step_inside.set(place)
    return await _called(lambda: awaitable, (), {})


def _close(made: Any) -> None:
    """A coroutine that nobody will await."""
    if inspect.iscoroutine(made):
        made.close()


def _tamed(error: BaseException) -> BaseException:
    """What would end the process, said as an ordinary error."""
    if isinstance(error, SystemExit):
        return RuntimeError(f"the callback called sys.exit({error.code!r})")
    if isinstance(error, KeyboardInterrupt):
        return RuntimeError("the callback raised KeyboardInterrupt")
    return error


_async_codes: dict[CodeType, bool] = {}


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether the callable makes a coroutine, so that it runs on the loop and not in a thread; remembered by its code."""
    code = getattr(fn, "__code__", None)
    known = _async_codes.get(code) if code is not None else None
    if known is not None:
        return known
    plain = fn
    while isinstance(plain, functools.partial):
        plain = plain.func
    method = getattr(type(plain), "__call__", None)  # noqa: B004  # not whether it can be called, but what is called
    found = inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(method)
    if code is not None:
        if len(_async_codes) >= CODES_MAX:
            _async_codes.clear()
        _async_codes[code] = found
    return found
