"""A seeded asyncio loop in virtual time: it never waits, it moves its clock to the next timer instead.

With one seed a program that uses no real sockets and threads runs the same every time. What makes interleavings happen
are delays, drawn from `VirtualLoop.rng`, in the ports (the in-memory bus, executor calls), not in the loop's order:
`call_soon` stays first in, first out, as asyncio promises.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
import selectors
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from toque.errors import ToqueError

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

T = TypeVar("T")

START_S: Final = 1_000.0  # virtual time at the start: not 0, which means "not yet" in many a field
EXECUTOR_DELAY_S_MAX: Final = 0.005  # bound of the virtual time before and after a call in an executor
CANCELLED_MAX: Final = 2_000  # timers that are kept though they will never fire
THREAD_GRACE_S: Final = 1.0  # of real time: how long a loop with nothing to do waits for other threads' calls


class Deadlock(ToqueError):
    """Nothing is scheduled and the main task is not done: it would wait for ever. `tasks` says who waits and where."""

    def __init__(self, tasks: list[str]) -> None:
        waiting = "".join(f"\n  {task}" for task in tasks)
        super().__init__(f"nothing is scheduled any more, and these tasks are still waiting:{waiting}")
        self.tasks = tasks


class _Handle(asyncio.Handle):
    """Made in a third of the time: it asks for no debug mode, for which a virtual loop has no use."""

    __slots__ = ()

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], loop: VirtualLoop,
                 context: contextvars.Context | None) -> None:
        self._callback, self._args, self._loop = callback, args, loop
        self._context = contextvars.copy_context() if context is None else context
        self._cancelled = False
        self._repr = self._source_traceback = None


class _Timer(asyncio.TimerHandle):
    """The same of a timer, and it is cancelled in half the time."""

    __slots__ = ()

    def __init__(self, when: float, callback: Callable[..., object], args: tuple[Any, ...], loop: VirtualLoop,
                 context: contextvars.Context | None) -> None:
        self._when, self._callback, self._args, self._loop = when, callback, args, loop
        self._context = contextvars.copy_context() if context is None else context
        self._cancelled = False
        self._scheduled = True
        self._repr = self._source_traceback = None

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._callback = self._args = None  # type: ignore[assignment]  # as asyncio's own
            self._loop._timer_handle_cancelled(self)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose time is virtual and whose random source is seeded.

    `time()` starts at START_S and moves only when nothing is ready, straight to the next timer. Executor calls run
    inline, each after a small seeded delay, and are seen to be done after another. `call_soon_threadsafe` works from
    real threads too, but when their calls land is not repeatable.
    """

    def __init__(self, seed: int) -> None:
        self._now_s = START_S
        super().__init__(_VirtualSelector(self))
        self.seed = seed
        self.rng = random.Random(seed)

        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []  # a heap; those of one time in their order
        self._timers_made = 0
        self._timers_cancelled = 0

    def time(self) -> float:
        return self._now_s

    def pending_timers(self) -> list[asyncio.TimerHandle]:
        """The timers that will fire, soonest first."""
        return [timer for _, _, timer in sorted(self._timers, key=lambda entry: entry[:2]) if not timer.cancelled()]

    # -- the loop itself: what asyncio's does, without looking at sockets each time ------------------------------------

    def call_soon(self, callback: Callable[..., object], *args: Any,  # type: ignore[override]  # less generic
                  context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]  # asyncio's own
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any,  # type: ignore[override]
                   context: contextvars.Context | None = None) -> asyncio.TimerHandle:
        return self._schedule(_Timer(self._now_s + delay, callback, args, self, context))

    def call_at(self, when: float, callback: Callable[..., object], *args: Any,  # type: ignore[override]  # less generic
                context: contextvars.Context | None = None) -> asyncio.TimerHandle:
        return self._schedule(_Timer(when, callback, args, self, context))

    def _schedule(self, timer: _Timer) -> _Timer:
        self._timers_made += 1
        heapq.heappush(self._timers, (timer._when, self._timers_made, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._timers_cancelled += 1
        if self._timers_cancelled > CANCELLED_MAX:
            self._timers = [timer for timer in self._timers if not timer[2].cancelled()]
            heapq.heapify(self._timers)
            self._timers_cancelled = 0

    def _run_once(self) -> None:
        ready: deque[asyncio.Handle] = self._ready  # type: ignore[attr-defined]  # asyncio's own
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not timers:
                self._process_events(self._selector.select(None))  # type: ignore[attr-defined]
            elif timers[0][0] > self._now_s:
                self._now_s = timers[0][0]
        while timers and timers[0][0] <= self._now_s:
            timer = heapq.heappop(timers)[2]
            if not timer._cancelled:
                ready.append(timer)
        run_handle = self._run_handle
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                run_handle(handle)

    def _run_handle(self, handle: asyncio.Handle) -> None:
        handle._run()

    def advance(self, seconds: float) -> None:
        """Move virtual time on. Timers that are due then run in the loop's next round."""
        assert seconds >= 0, "virtual time never goes back"
        self._now_s += seconds

    def run_in_executor(  # type: ignore[override]  # typeshed spells *args as a TypeVarTuple
            self, executor: object, func: Callable[..., T], *args: Any) -> asyncio.Task[T]:
        """Run the call inline, soon. Cancelled before it began it never runs; later only its result is lost."""
        name = getattr(func, "__qualname__", type(func).__qualname__)
        return self.create_task(self._inline(func, args), name=f"executor: {name}")

    async def _inline(self, func: Callable[..., T], args: tuple[Any, ...]) -> T:
        await asyncio.sleep(self.rng.uniform(0, EXECUTOR_DELAY_S_MAX))
        result = func(*args)
        await asyncio.sleep(self.rng.uniform(0, EXECUTOR_DELAY_S_MAX))
        return result

    def waiting_tasks(self) -> list[str]:
        """The pending tasks by name, each with the line where it waits."""
        return sorted(_describe(task) for task in asyncio.all_tasks(self))


class _VirtualSelector(selectors.BaseSelector):
    """Asked to wait when nothing is scheduled. Its real selector only carries wake-ups from other threads."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        grace_s = THREAD_GRACE_S if threading.active_count() > 1 else 0
        events = self._real.select(grace_s)
        if not events:
            raise Deadlock(self._loop.waiting_tasks())
        return events

    def register(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


def _describe(task: asyncio.Task[Any]) -> str:
    stack = task.get_stack()
    if not stack:
        return task.get_name()
    frame = stack[-1]
    return f"{task.get_name()} in {frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"


def run(main: Coroutine[Any, Any, T], *, seed: int) -> T:
    """Run a coroutine to its end in virtual time, then cancel what it left behind; like `asyncio.run`.

    Raises Deadlock when everything waits for something that nobody will do.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(seed)) as runner:
        return runner.run(main)


class VirtualClock:
    """A host's clock on a virtual loop (the Clock port): off by `skew_s`, and running `rate` times as fast."""

    def __init__(self, loop: asyncio.AbstractEventLoop, skew_s: float = 0.0, rate: float = 1.0) -> None:
        self._loop = loop
        self.skew_s = skew_s
        self.rate = rate
        self._stands_at: float | None = None

    def boottime(self) -> float:
        """Seconds since the host's boot, in virtual time."""
        if self._stands_at is not None:
            return self._stands_at
        return self._loop.time() * self.rate + self.skew_s

    def stand(self) -> None:
        """Stop: the whole machine is stopped, as by its hypervisor."""
        if self._stands_at is None:
            self._stands_at = self.boottime()

    def go_on(self) -> None:
        """Run again from where it stood: it never learns how long that was."""
        if self._stands_at is not None:
            stood_at, self._stands_at = self._stands_at, None
            self.skew_s += stood_at - self.boottime()
