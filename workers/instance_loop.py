"""A small event loop for one instance: `run()` and the tasks it makes live here, callbacks on the pod's loop.

Why a loop of its own (protocol rule 18): it knows exactly when nothing of the instance is ready any more, so that results
can be handed out one at a time, in the journal's order, live and on replay alike. It has no clock, no sockets and no
threads: whatever needs one of them is a foreign await, refused with the remedy.
"""

from __future__ import annotations

import asyncio
import contextvars
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from toque.errors import MisuseError

TURN_CALLBACKS_MAX = 1_000_000


def _refuse(what: str) -> MisuseError:
    return MisuseError(f"{what} inside run() would not survive a restart. Put it into a step: "
                       f"`await step.do(\"name\", fn)`, or `await step.sleep(\"name\", \"5 seconds\")` for a pause.")


class InstanceLoop(asyncio.AbstractEventLoop):
    """Runs callbacks in order of their arrival until none is left; see the module."""

    __slots__ = ("_ready", "error")

    def __init__(self) -> None:
        self._ready: deque[asyncio.Handle] = deque()
        self.error: dict[str, Any] | None = None

    def drain(self) -> None:
        """Run until nothing of the instance is ready. Call it from a callback of the pod's loop, not from a task."""
        ready = self._ready
        outer = events._get_running_loop()
        events._set_running_loop(self)
        try:
            for _ in range(TURN_CALLBACKS_MAX):
                if not ready:
                    return
                handle = ready.popleft()
                if not handle._cancelled:  # as asyncio's own loop does
                    handle._run()
        finally:
            events._set_running_loop(outer)
        raise MisuseError("run() spins without ever waiting for a step (a loop around `asyncio.sleep(0)`?)")

    # -- what tasks, futures, gather, TaskGroup, Event, Queue and Lock need --------------------------------------------

    def call_soon(self, callback: Callable[..., object], *args: Any,  # type: ignore[override]  # less generic
                  context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        return asyncio.Task(coro, loop=self, **{k: v for k, v in options.items() if v is not None})

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.error = context

    default_exception_handler = call_exception_handler

    # -- what needs a clock, a thread or a socket ----------------------------------------------------------------------

    def call_later(self, *args: Any, **options: Any) -> NoReturn:  # type: ignore[override]
        raise _refuse("a timer (asyncio.sleep, asyncio.timeout, wait_for)")

    def call_at(self, *args: Any, **options: Any) -> NoReturn:  # type: ignore[override]
        raise _refuse("a timer (asyncio.sleep, asyncio.timeout, wait_for)")

    def time(self) -> float:
        raise _refuse("a timer (asyncio.sleep, asyncio.timeout, wait_for)")

    def call_soon_threadsafe(self, *args: Any, **options: Any) -> NoReturn:  # type: ignore[override]
        raise _refuse("waking up from a thread")

    def run_in_executor(self, *args: Any) -> NoReturn:  # type: ignore[override]
        raise _refuse("a thread (asyncio.to_thread, run_in_executor)")

    def run_until_complete(self, future: Any) -> NoReturn:
        raise _refuse("running a loop")

    def run_forever(self) -> NoReturn:
        raise _refuse("running a loop")


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: InstanceLoop, *args: Any, **options: Any) -> NoReturn:
        raise _refuse(f"I/O (`loop.{name}`)")

    return refuse


for _name in vars(asyncio.AbstractEventLoop):
    if _name.startswith(("create_connection", "create_server", "create_unix", "create_datagram", "connect_", "sock_",
                         "add_", "remove_", "subprocess_", "getaddrinfo", "getnameinfo", "sendfile", "start_tls")):
        setattr(InstanceLoop, _name, _refusing(_name))
