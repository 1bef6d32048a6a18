"""One attempt at a callback, on the pod's loop or in a thread, under a time-out.

An attempt has one outcome that counts; after it was closed (time-out, cut, terminated) a late one is refused. A task can
be cancelled, a thread cannot: it stays "inside" until it returns, and holds its instance's slot so long.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from toque.workers.step_call import StepCall, is_async
from toque.workflow import context_place, pass_context

if TYPE_CHECKING:
    from toque.workers.engine import Engine
    from toque.workflow import StepContext


class Callbacks:
    """Who is inside a callback of this pod now, and the threads for sync ones."""

    def __init__(self, threads_max: int) -> None:
        self.threads_max = threads_max
        self.inside = 0
        self.threads_inside = 0
        self.abandoned = 0  # threads inside that timed out or were cut: their result will be refused
        self._pool = ThreadPoolExecutor(threads_max, thread_name_prefix="toque-step")

    def submit(self, fn: Callable[[], None]) -> None:
        self._pool.submit(fn)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


async def _guarded(awaitable: Awaitable[Any]) -> Any:
    """A callback that calls sys.exit() fails its step; it does not end the pod."""
    try:
        return await awaitable
    except SystemExit as error:
        raise RuntimeError(f"the callback called sys.exit({error.code!r})") from error


class Attempt:
    """See the module. Reports to its engine: `attempt_done`, `attempt_raised`, `attempt_timed_out`, `attempt_left`."""

    __slots__ = ("_closed", "_context", "_engine", "_in_thread", "_loop", "_task", "_timer", "call", "number",
                 "started_at")

    def __init__(self, engine: Engine, call: StepCall, number: int, context: Callable[[], StepContext]) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self.call = call
        self.number = number
        self.started_at = engine.now_ms()
        self._context: StepContext | None = None
        self._task: asyncio.Future[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._in_thread = False
        assert call.fn is not None and call.options is not None
        args: tuple[Any, ...] = call.args
        keywords: dict[str, Any] = {}
        if context_place(call.fn) is not None:
            self._context = context()
            args, keywords = pass_context(call.fn, args, keywords, self._context)
        if is_async(call.fn):
            self._start_timer()
            try:
                coroutine = call.fn(*args, **keywords)
            except Exception as error:  # the call itself failed, for example for a missing argument  # noqa: BLE001
                self._loop.call_soon(self._raised, error)
                return
            self._watch(coroutine)
        else:
            self._in_thread = True
            engine.host.callbacks.threads_inside += 1
            engine.threads_inside += 1
            engine.host.callbacks.submit(lambda: self._run_in_thread(args, keywords))

    def cut(self) -> None:
        """Refuse whatever comes: the session is lost, the instance is terminated, or run() cancelled the step."""
        if self._closed:
            return
        self._close()
        if self._in_thread:
            self._engine.host.callbacks.abandoned += 1
        elif self._task is not None:
            self._task.cancel()

    # -- on the loop ---------------------------------------------------------------------------------------------------

    def _start_timer(self) -> None:
        options = self.call.options
        if options is not None and not self._closed:
            self._timer = self._loop.call_later(options.timeout_ms / 1000, self._time_out)

    def _watch(self, awaitable: Any) -> None:
        task = self._loop.create_task(_guarded(awaitable), name=f"step {self.call.name!r} of {self._engine.title}")
        self._task = task
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Future[Any]) -> None:
        if task.cancelled():
            if not self._closed:
                self._raised(asyncio.CancelledError("the callback was cancelled from inside"))
                return
        elif (error := task.exception()) is not None:
            self._raised(error)
            return
        elif not self._closed:
            self._close()
            self._engine.attempt_left()
            self._engine.attempt_done(self, task.result())
            return
        self._engine.attempt_left()

    def _raised(self, error: BaseException) -> None:
        self._engine.attempt_left()
        if not self._closed:
            self._close()
            self._engine.attempt_raised(self, error)

    def _time_out(self) -> None:
        if not self._closed:
            self.cut()
            self._engine.attempt_timed_out(self)

    def _close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._context is not None:
            self._context._cancel()

    # -- in a thread ---------------------------------------------------------------------------------------------------

    def _run_in_thread(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        post = self._loop.call_soon_threadsafe
        if self._closed or not self._engine.host.in_time():
            post(self._thread_left)
            return
        post(self._start_timer)
        try:
            assert self.call.fn is not None
            result = self.call.fn(*args, **keywords)
        except BaseException as error:  # whatever it was, it belongs to the step  # noqa: BLE001
            post(self._thread_raised, error)
        else:
            post(self._thread_done, result)

    def _thread_done(self, result: Any) -> None:
        if inspect.isawaitable(result):  # a sync callable that made a coroutine: await it here
            self._thread_gone()
            if self._closed:
                self._engine.attempt_left()
                if inspect.iscoroutine(result):
                    result.close()
            else:
                self._watch(result)
            return
        refused = self._closed
        self._thread_left()
        if not refused:
            self._close()
            self._engine.attempt_done(self, result)

    def _thread_raised(self, error: BaseException) -> None:
        self._thread_gone()
        self._raised(error)

    def _thread_left(self) -> None:
        self._thread_gone()
        self._engine.attempt_left()

    def _thread_gone(self) -> None:
        callbacks = self._engine.host.callbacks
        callbacks.threads_inside -= 1
        self._engine.threads_inside -= 1
        if self._closed:
            callbacks.abandoned -= 1
        self._in_thread = False
