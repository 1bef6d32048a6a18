"""A small event loop for one instance: `run()` and the tasks it makes live here, callbacks on the pod's loop.

Why a loop of its own (protocol rule 18): it knows exactly when nothing of the instance is ready any more, so that results
can be handed out one at a time, in the journal's order, live and on replay alike. It has no clock, no sockets and no
threads: whatever needs one of them is a foreign await, refused with the remedy. Nobody outside can wake it up either.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from asyncio import events
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, NoReturn

from toque._logging import get_logger
from toque.errors import MisuseError

TURN_CALLBACKS_MAX = 250_000  # between two steps; then run() is said to spin (a quarter of a second)
EVICTIONS_MAX = 100  # so often a suspended coroutine is told to end before it is left to the garbage collector
TASKS_KEPT_MIN = 16

_REMEDY = ("Put it into a step: `await step.do(\"name\", fn)`, or `await step.sleep(\"name\", \"5 seconds\")` for a "
           "pause.")
_FOREIGN_WORDS = ("attached to a different loop", "bound to a different event loop", "is bound to a different loop")

_log = get_logger("toque.engine")


class Evicted(BaseException):
    """Control flow: the instance has left this pod's memory; nothing it does from here on counts."""


class _Handle(asyncio.Handle):
    """A callback that is ready. Holds no loop, and is not slowed down by what only a debugger needs."""

    __slots__ = ("args", "callback", "cancelled_", "context")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.cancelled_ = False

    def cancel(self) -> None:
        self.cancelled_ = True

    def cancelled(self) -> bool:
        return self.cancelled_

    def get_context(self) -> contextvars.Context:
        return self.context

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.callback!r}>"


class InstanceLoop(asyncio.AbstractEventLoop):
    """Runs callbacks in the order of their arrival until none is left; see the module."""

    def __init__(self) -> None:
        self._ready: list[_Handle] = []
        self._inside = False
        self._tasks: list[asyncio.Task[Any]] = []  # made here; those that are done are dropped now and then
        self._tasks_kept_max = TASKS_KEPT_MIN

    def drain(self, callback: Callable[..., object], *args: Any) -> None:
        """Call back, then run until nothing of the instance is ready. Raises what a plain callback or sys.exit() raises.

        Call it from a callback of the pod's loop, not from a task.
        """
        outer = events._get_running_loop()
        hooks = sys.get_asyncgen_hooks()
        events._set_running_loop(self)
        sys.set_asyncgen_hooks(None, _close_generator)
        self._inside = True
        left = TURN_CALLBACKS_MAX
        try:
            callback(*args)
            while self._ready:
                batch, self._ready = self._ready, []
                left -= len(batch)
                if left < 0:
                    raise MisuseError("run() spins without ever waiting for a step (a loop around `asyncio.sleep(0)`?). "
                                      "Await a step in the loop, or leave the loop.")
                for handle in batch:
                    if not handle.cancelled_:
                        handle.context.run(handle.callback, *handle.args)
        finally:
            self._inside = False
            events._set_running_loop(outer)
            sys.set_asyncgen_hooks(*hooks)

    def unwind(self) -> None:
        """End every coroutine that is still suspended, here and now: their `finally` blocks run, nothing goes on."""
        for _ in range(EVICTIONS_MAX):  # what is ended may make another task
            self._ready.clear()
            pending = [task for task in self._tasks if not task.done()]
            self._tasks = []
            if not pending:
                return
            self.drain(self._evict_all, pending)

    def _evict_all(self, tasks: list[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is dropped on purpose
            coroutine = task.get_coro()
            assert coroutine is not None
            _evict(coroutine)
        self._ready.clear()

    # -- what tasks, futures, gather, TaskGroup, Event, Queue and Lock need --------------------------------------------

    def call_soon(self, callback: Callable[..., object], *args: Any,  # type: ignore[override]  # less generic
                  context: contextvars.Context | None = None) -> _Handle:
        if not self._inside:
            raise MisuseError("something outside run(), for example a callback, woke up run() (by an Event, a Queue, a "
                              "future), which would not happen again after a restart. Return the value from the "
                              "callback instead")
        handle = _Handle(callback, args, context or contextvars.copy_context())
        self._ready.append(handle)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        task = asyncio.Task(coro, loop=self, **{k: v for k, v in options.items() if v is not None})
        self._tasks.append(task)
        if len(self._tasks) > self._tasks_kept_max:
            self._tasks = [task for task in self._tasks if not task.done()]
            self._tasks_kept_max = max(TASKS_KEPT_MIN, 2 * len(self._tasks))
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """An exception that run() never looked at: asyncio would print it. Said without its text, which may be a value."""
        error = context.get("exception")
        if error is not None:
            _log.debug("run() left an exception unseen", error=type(error).__name__)

    default_exception_handler = call_exception_handler

    # -- what needs a clock, a thread or a socket ----------------------------------------------------------------------

    def call_later(self, *args: Any, **options: Any) -> NoReturn:  # type: ignore[override]
        raise _refused("a timer (asyncio.sleep, asyncio.timeout, wait_for)")

    def call_at(self, *args: Any, **options: Any) -> NoReturn:  # type: ignore[override]
        raise _refused("a timer (asyncio.sleep, asyncio.timeout, wait_for)")

    def time(self) -> float:
        raise _refused("a timer (asyncio.sleep, asyncio.timeout, wait_for)")

    def call_soon_threadsafe(self, *args: Any, **options: Any) -> NoReturn:  # type: ignore[override]
        raise _refused("waking up from a thread")

    def run_in_executor(self, *args: Any) -> NoReturn:  # type: ignore[override]
        raise _refused("a thread (asyncio.to_thread, run_in_executor)")


def explain(error: BaseException) -> BaseException:
    """asyncio's own words for a foreign await, also in a group of exceptions, put into ours; else the error itself."""
    for leaf in _leaves(error):
        if isinstance(leaf, RuntimeError) and any(words in str(leaf) for words in _FOREIGN_WORDS):
            misuse = MisuseError("run() awaited something of the pod's own loop (a client, a lock, a task made "
                                 "elsewhere), which would not survive a restart. Put it into a step: "
                                 "`await step.do(\"name\", fn)`")
            misuse.__cause__ = leaf
            return misuse
    return error


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for part in error.exceptions for leaf in _leaves(part)]


def _refused(what: str) -> MisuseError:
    return MisuseError(f"{what} inside run() would not survive a restart. {_REMEDY}")


def _evict(coroutine: Any) -> None:
    """Raise Evicted where it waits, again when it waits elsewhere then; what it raises itself counts no more."""
    for _ in range(EVICTIONS_MAX):
        try:
            coroutine.throw(Evicted())
        except (Evicted, StopIteration):
            return
        except BaseException as error:  # user code: `finally` blocks of run()  # noqa: BLE001
            _log.debug("run() did not end quietly", error=type(error).__name__)
            return
    _log.warning("run() cannot be evicted: it catches whatever is raised, and goes on", run=repr(coroutine))


def _close_generator(generator: AsyncGenerator[Any, Any]) -> None:
    """What asyncio's loop does for an async generator that nobody finishes, but at once and without a task."""
    closing: Any = generator.aclose()
    try:
        closing.send(None)
    except StopIteration:
        return
    except BaseException as error:  # user code: `finally` blocks of the generator  # noqa: BLE001
        _log.debug("a generator of run() did not end quietly", error=type(error).__name__)
    else:
        _evict(closing)


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: InstanceLoop, *args: Any, **options: Any) -> NoReturn:
        raise _refused(f"`loop.{name}`")

    return refuse


for _name, _method in vars(asyncio.AbstractEventLoop).items():
    if callable(_method) and not _name.startswith("__") and _name not in vars(InstanceLoop):
        setattr(InstanceLoop, _name, _refusing(_name))
