"""Simulated processes in one virtual loop: each can be killed as by kill -9, or stopped and continued as by signals.

What a process started (tasks, timers, handlers) carries it in its context, and so does all that these start. The loop
looks at it before each callback: a dead process runs nothing any more, a paused one runs it when it is resumed. What is
under way in the network belongs to nobody.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Sequence
from enum import Enum
from typing import Any, TypeVar

from toque.sim.loop import VirtualLoop
from toque.storage.memory_bus import MemoryBroker, MemoryBus, MemoryFeed, MemorySubscription
from toque.storage.ports import FeedSpec, Message

T = TypeVar("T")
BURY_S = 1.0
TASKS_DONE_MAX = 500  # of a process, that are still kept


class State(Enum):
    """Of a process."""

    RUNNING = "running"
    PAUSED = "paused"
    DEAD = "dead"


class Process:
    """One simulated process. `name` is for people; `pid` tells a process from an earlier one of its name."""

    def __init__(self, name: str, pid: int = 0) -> None:
        self.name = name
        self.pid = pid
        self.session = ""  # that it has opened last; kept by whoever runs a pod in it
        self.state = State.RUNNING
        self._tasks: list[asyncio.Task[Any]] = []  # kept, so that nothing of a dead process is ever collected
        self._tasks_max = TASKS_DONE_MAX
        self.buses: list[ProcessBus] = []
        self._context = contextvars.copy_context()
        self._context.run(_current.set, self)
        self._parked: list[Callable[[], None]] = []

    @staticmethod
    def current() -> Process | None:
        """The process whose code runs now."""
        return _current.get()

    @property
    def alive(self) -> bool:
        return self.state is not State.DEAD

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine as the process's own."""
        return asyncio.get_running_loop().create_task(coroutine, context=self._context.copy())

    def call(self, callback: Callable[..., Any], *args: Any) -> None:
        """Run a callback as the process's own: now, when it is resumed, or never."""
        self.admit(lambda: self._context.copy().run(callback, *args))

    def admit(self, act: Callable[[], Any]) -> None:
        """Act as far as the process's state lets it. What a dead one missed is kept for `bury`."""
        if self.state is State.RUNNING:
            act()
        else:
            self._parked.append(act)

    def bus(self, broker: MemoryBroker, name: str) -> ProcessBus:
        """A connection that dies with the process."""
        bus = ProcessBus(self, broker, name)
        self.buses.append(bus)
        return bus

    def kill(self) -> None:
        """kill -9: nothing of it runs any more; part of what its connections had sent arrives."""
        self.state = State.DEAD
        for bus in self.buses:
            contextvars.Context().run(bus.disconnect)

    def pause(self) -> None:
        """SIGSTOP: its clock and its connections go on, its code does not."""
        assert self.state is State.RUNNING
        self.state = State.PAUSED

    def resume(self) -> None:
        """SIGCONT: what came meanwhile runs now, in its order."""
        assert self.state is State.PAUSED
        self._go_on()

    def _go_on(self) -> None:
        self.state = State.RUNNING
        parked, self._parked = self._parked, []
        for act in parked:
            asyncio.get_running_loop().call_soon(self.admit, act)

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Keep a task until it is done, or longer: to look now and then costs less than to be told of each."""
        self._tasks.append(task)
        if len(self._tasks) > self._tasks_max:
            self._tasks = [task for task in self._tasks if not task.done()]
            self._tasks_max = len(self._tasks) + TASKS_DONE_MAX

    async def bury(self) -> None:
        """At the end of a simulation: cancel the process's tasks and let them run out, without any connection."""
        self.kill()
        self._go_on()
        me = asyncio.current_task()
        while tasks := [task for task in self._tasks if task is not me and not task.done()]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=BURY_S)  # who was told twice at once may have heard one of them only
        self.state = State.DEAD


_current: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class SimulatedThread:
    """A function that runs as if in a thread: at once, but the loop sees what it does when it would have done it."""

    current: SimulatedThread | None = None  # threads run one at a time, and without a stop between

    def __init__(self) -> None:
        self.elapsed_s = 0.0

    def run(self, fn: Callable[[], None]) -> None:
        SimulatedThread.current = self
        try:
            fn()
        finally:
            SimulatedThread.current = None


def work_in_thread(seconds: float) -> None:
    """A sync callback takes so long here: whatever it does from now on the loop sees so much later."""
    assert SimulatedThread.current is not None, "only a sync callback works in a thread"
    SimulatedThread.current.elapsed_s += seconds


def later_in_thread(fn: Callable[..., None], *args: Any) -> None:
    """Call a function when the current thread has come to this point; at once where there is no thread."""
    thread = SimulatedThread.current
    if thread is None:
        fn(*args)
    else:
        asyncio.get_running_loop().call_later(thread.elapsed_s, fn, *args)


class ProcessLoop(VirtualLoop):
    """A virtual loop that knows processes; see the module."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any,  # type: ignore[override]  # less generic
                             context: contextvars.Context | None = None) -> asyncio.Handle:
        thread = SimulatedThread.current
        if thread is not None and thread.elapsed_s:  # else in the order of the calls, which timers do not keep
            return self.call_later(thread.elapsed_s, callback, *args, context=context)
        return super().call_soon_threadsafe(callback, *args, context=context)

    def create_task(self, coro: Any, *, name: str | None = None,  # type: ignore[override]  # less generic
                    context: contextvars.Context | None = None) -> asyncio.Task[Any]:
        process = _current.get() if context is None else context.get(_current)
        task: asyncio.Task[Any] = super().create_task(coro, name=name, context=context)
        if process is not None:
            process.keep(task)
        return task

    def _run_handle(self, handle: asyncio.Handle) -> None:
        process = handle._context.get(_current)  # type: ignore[attr-defined]  # whose it is
        if process is None or process.state is State.RUNNING:
            handle._run()
        else:
            process.admit(lambda: None if handle.cancelled() else handle._run())


class ProcessBus(MemoryBus):
    """A process's connection: its handlers run as the process's own."""

    def __init__(self, process: Process, broker: MemoryBroker, name: str) -> None:
        super().__init__(broker, name)
        self.process = process

    async def subscribe(self, subject: str, handler: Callable[[Message], None]) -> MemorySubscription:
        return await super().subscribe(subject, lambda message: self.process.call(handler, message))

    async def open_feed(self, spec: FeedSpec, handler: Callable[[Sequence[Message]], None]) -> MemoryFeed:
        return await super().open_feed(spec, lambda messages: self.process.call(handler, messages))
