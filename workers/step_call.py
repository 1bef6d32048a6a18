"""A step as run() sees it: an awaitable that opens at the call, and the `step` object that makes them."""

from __future__ import annotations

import asyncio
import functools
import inspect
from asyncio import events
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from types import CodeType
from typing import TYPE_CHECKING, Any

from toque._durations import Duration, to_ms
from toque._names import check_step_name
from toque.errors import InvalidDuration, MisuseError, UsageError
from toque.storage.fold import step_key
from toque.storage.records import StepKind
from toque.workflow import Retries, StepOptions, resolve_options

if TYPE_CHECKING:
    from toque.workers.engine import Engine

WAIT_MS_MAX = 365 * 24 * 3600 * 1000


class Evicted(BaseException):
    """Control flow: the instance has left this pod's memory; nothing it does from here on counts."""


class StepCall(asyncio.Future[Any]):
    """One open step. Awaiting it, or handing it to gather, marks it as awaited."""

    def __init__(self, engine: Engine, kind: StepKind, name: str, occurrence: int) -> None:
        super().__init__(loop=engine.loop)
        self.engine = engine
        self.kind = kind
        self.name = name
        self.occurrence = occurrence
        self.key = step_key(kind, name, occurrence)
        self.awaited = False
        self.fn: Callable[..., Any] | None = None
        self.args: tuple[Any, ...] = ()
        self.options: StepOptions | None = None
        self.duration_ms = 0
        self.due = 0  # broker time in ms, of sleep_until

    def __await__(self) -> Generator[Any, None, Any]:
        self.awaited = True
        return super().__await__()

    __iter__ = __await__

    def add_done_callback(self, fn: Callable[..., object], *, context: Any = None) -> None:
        self.awaited = True
        super().add_done_callback(fn, context=context)

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled:
            self.engine.call_cancelled(self)
        return cancelled

    def __str__(self) -> str:
        return f"{self.kind.name.lower()}({self.name!r}, occurrence {self.occurrence})"


class RunStep:
    """The `step` argument of run(): see `toque.workflow.Step`."""

    __slots__ = ("_counts", "_engine")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._counts: dict[tuple[StepKind, str], int] = {}

    def do(self, name: str, fn: Callable[..., Any] | None = None, /, *args: Any,
           retries: Retries | None = None, timeout: Duration | None = None) -> Any:
        check_step_name(name)
        options = resolve_options(retries, timeout)
        if fn is None:
            return functools.partial(_decorate, self, name, options)
        if not callable(fn):
            hint = " (pass the function itself, not the result of calling it)" if inspect.isawaitable(fn) else ""
            if inspect.iscoroutine(fn):
                fn.close()
            raise UsageError(f"step {name!r}: the second argument must be a function, not {type(fn).__name__}{hint}")
        return self.open(name, options, fn, args)

    def open(self, name: str, options: StepOptions, fn: Callable[..., Any], args: tuple[Any, ...]) -> StepCall:
        call = self._call(StepKind.DO, name)
        call.fn, call.args, call.options = fn, args, options
        self._engine.call_opened(call)
        return call

    def sleep(self, name: str, duration: Duration) -> StepCall:
        check_step_name(name)
        milliseconds = to_ms(duration, what=f"step.sleep({name!r})")
        call = self._call(StepKind.SLEEP, name)
        call.duration_ms = milliseconds
        self._engine.call_opened(call)
        return call

    def sleep_until(self, name: str, until: datetime) -> StepCall:
        check_step_name(name)
        if not isinstance(until, datetime) or until.tzinfo is None:
            raise InvalidDuration(f"step.sleep_until({name!r}) needs a datetime with a time zone, for example "
                                  f"datetime(2027, 1, 1, tzinfo=UTC), not {until!r}")
        due = int(until.astimezone(UTC).timestamp() * 1000)
        if due - self._engine.now_ms() > WAIT_MS_MAX:
            raise InvalidDuration(f"step.sleep_until({name!r}) may wait 365 days at most")
        call = self._call(StepKind.SLEEP, name)
        call.due = due
        self._engine.call_opened(call)
        return call

    def _call(self, kind: StepKind, name: str) -> StepCall:
        engine = self._engine
        if engine.closed:
            raise Evicted
        if events._get_running_loop() is not engine.loop:
            raise MisuseError(f"step {name!r} was called inside a callback or outside run(). Steps cannot be nested: "
                              f"call it from run() itself.")
        count = self._counts[kind, name] = self._counts.get((kind, name), 0) + 1
        return StepCall(engine, kind, name, count)


def _decorate(step: RunStep, name: str, options: StepOptions, fn: Callable[..., Any]) -> Callable[..., StepCall]:
    @functools.wraps(fn)
    def call(*args: Any) -> StepCall:
        return step.open(name, options, fn, args)

    return call


_async_codes: dict[CodeType, bool] = {}
CODES_MAX = 10_000


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether the callable makes a coroutine, so that it runs on the loop and not in a thread; remembered by its code."""
    code = getattr(fn, "__code__", None)
    known = _async_codes.get(code) if code is not None else None
    if known is not None:
        return known
    plain = fn
    while isinstance(plain, functools.partial):
        plain = plain.func
    found = inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(getattr(type(plain), "__call__", None))
    if code is not None:
        if len(_async_codes) >= CODES_MAX:
            _async_codes.clear()
        _async_codes[code] = found
    return found
