"""A step as run() sees it: an awaitable that opens at the call, and the `step` object that makes them."""

from __future__ import annotations

import asyncio
import functools
import inspect
from asyncio import events
from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from toque._durations import Duration, to_ms
from toque._names import approval_type, check_event_type, check_instance_id, check_step_name, check_workflow
from toque._payload import check_type, return_type
from toque._protocol import ApprovalPayload
from toque.errors import InvalidDuration, MisuseError, TooManySteps, UsageError
from toque.storage.fold import step_key
from toque.storage.records import StepKind
from toque.workers.instance_loop import Evicted
from toque.workflow import (
    CHILD_TIMEOUT_DEFAULT,
    DEFAULT_OPTIONS,
    WAIT_TIMEOUT_DEFAULT,
    Approval,
    Child,
    Retention,
    Retries,
    StepOptions,
    Workflow,
    is_runnable,
    params_type,
    resolve_options,
    result_type,
    steps_max,
    workflow_name,
)

if TYPE_CHECKING:
    from toque.workers.engine import Engine
    from toque.workers.host import ChildCreation

WAIT_MS_MAX = 365 * 24 * 3600 * 1000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class StepCall(asyncio.Future[Any]):
    """One open step. Awaiting it, handing it to gather, or looking at its result marks it as awaited."""

    __slots__ = ("args", "awaited", "child", "created", "due", "duration_ms", "engine", "event_type", "failures", "fn",
                 "key", "keywords", "kind", "last_attempt", "made_of", "name", "occurrence", "options", "recorded",
                 "result_type", "since", "started_at")

    def __init__(self, engine: Engine, kind: StepKind, name: str, occurrence: int) -> None:
        super().__init__(loop=engine.loop)
        self.engine = engine
        self.kind = kind
        self.name = name
        self.occurrence = occurrence
        self.key = step_key(kind, name, occurrence)
        self.awaited = False
        self.recorded = False  # the journal holds a timer or failed attempts of it
        # of a callback:
        self.fn: Callable[..., Any] | None = None
        self.args: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] | None = None
        self.result_type: Any = None
        self.options: StepOptions = DEFAULT_OPTIONS
        self.failures = 0  # failed attempts
        self.last_attempt = 0  # the number of the last of them; interruptions are counted too
        self.since = 0  # interruptions of the run before the step was open, or before its last failed attempt
        # of a wait:
        self.duration_ms = 0
        self.due = 0  # broker time in ms
        # of a wait for an event:
        self.event_type = ""
        self.made_of: Callable[[Any, int], Any] | None = None  # makes the value of the decoded payload and its time
        self.started_at = 0
        # of a child:
        self.child: ChildCreation | None = None
        self.created = False  # the wait for its end has begun

    def __await__(self) -> Generator[Any, None, Any]:
        if not self.awaited:
            self._mark_awaited()
        return super().__await__()

    __iter__ = __await__

    def add_done_callback(self, fn: Callable[..., object], *, context: Any = None) -> None:
        if not self.awaited:
            self._mark_awaited()
        super().add_done_callback(fn, context=context)

    def exception(self) -> BaseException | None:
        if not self.awaited:
            self._mark_awaited()  # gather does no more than this with a step that is done already
        return super().exception()

    def result(self) -> Any:
        if not self.awaited:
            self._mark_awaited()
        return super().result()

    def cancel(self, msg: Any | None = None) -> bool:
        if events._get_running_loop() is not self.engine.loop:
            raise MisuseError(f"step {self.name!r} was cancelled from outside run(), which would not happen again after "
                              f"a restart. Return a value from the callback and cancel the step in run()")
        cancelled = super().cancel(msg)
        if cancelled:
            self.engine.call_cancelled(self)
        return cancelled

    def _mark_awaited(self) -> None:
        self.awaited = True
        if self.done():
            self.engine.call_awaited(self)

    def __str__(self) -> str:
        return f"{self.kind.name.lower()}({self.name!r}, occurrence {self.occurrence})"


class RunStep:
    """The `step` argument of run(): see `toque.workflow.Step`."""

    __slots__ = ("_counts", "_engine", "_evicted", "_steps")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._counts: dict[tuple[StepKind, str], int] = {}
        self._evicted = False  # run() has been told so
        self._steps = 0  # opened so far, but sleeps

    def do(self, name: str, fn: Callable[..., Any] | None = None, /, *args: Any,
           retries: Retries | None = None, timeout: Duration | None = None) -> Any:
        check_step_name(name)
        options = resolve_options(retries, timeout)
        if fn is None:
            return self._decorator(name, options, args)
        return self.open(name, options, fn, args, None)

    def open(self, name: str, options: StepOptions, fn: Callable[..., Any], args: tuple[Any, ...],
             keywords: dict[str, Any] | None) -> StepCall:
        if not callable(fn):
            raise _not_a_function(name, fn)
        result_type = return_type(fn)
        call = self._call(StepKind.DO, name)
        call.fn, call.args, call.keywords, call.result_type, call.options = fn, args, keywords, result_type, options
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
        if not isinstance(until, datetime) or until.utcoffset() is None:
            raise InvalidDuration(f"step.sleep_until({name!r}) needs a datetime with a time zone, for example "
                                  f"datetime(2027, 1, 1, tzinfo=UTC), not {until!r}")
        due = -((_EPOCH - until) // timedelta(milliseconds=1))  # rounded up: a timer is never early
        if due - self._engine.now_ms() > WAIT_MS_MAX:
            raise InvalidDuration(f"step.sleep_until({name!r}) may wait 365 days at most")
        call = self._call(StepKind.SLEEP, name)
        call.due = max(due, 1)
        self._engine.call_opened(call)
        return call

    def wait_for_event(self, name: str, type: str, /, *, timeout: Duration = WAIT_TIMEOUT_DEFAULT,
                       result_type: Any = Any) -> StepCall:
        check_step_name(name)
        check_event_type(type)
        return self._wait(name, type, timeout, result_type, f"step.wait_for_event({name!r})")

    def wait_for_approval(self, name: str, /, *, timeout: Duration = WAIT_TIMEOUT_DEFAULT) -> StepCall:
        type_ = approval_type(check_step_name(name))
        return self._wait(name, type_, timeout, ApprovalPayload, f"step.wait_for_approval({name!r})", _approval)

    def _wait(self, name: str, type_: str, timeout: Duration, result_type: Any, what: str,
              made_of: Callable[[Any, int], Any] | None = None) -> StepCall:
        timeout_ms = to_ms(timeout, what=f"the timeout of {what}", minimum_ms=1)
        check_type(result_type, what=f"the result_type of {what}")
        call = self._call(StepKind.EVENT, name)
        call.event_type, call.duration_ms, call.result_type, call.made_of = type_, timeout_ms, result_type, made_of
        self._engine.call_opened(call)
        return call

    def start_workflow(self, name: str, workflow: Any, params: Any = None, /, *, id: str | None = None,
                       retention: Retention | None = None) -> StepCall:
        child = self._child(StepKind.START, name, workflow, params, id, retention)
        child.result_type = Child
        self._engine.call_opened(child)
        return child

    def run_workflow(self, name: str, workflow: Any, params: Any = None, /, *, id: str | None = None,
                     retention: Retention | None = None, timeout: Duration = CHILD_TIMEOUT_DEFAULT) -> StepCall:
        timeout_ms = to_ms(timeout, what=f"the timeout of step.run_workflow({name!r})", minimum_ms=1)
        child = self._child(StepKind.CHILD, name, workflow, params, id, retention)
        child.result_type = Any if isinstance(workflow, str) else result_type(workflow)
        child.duration_ms = timeout_ms
        self._engine.call_opened(child)
        return child

    def _child(self, kind: StepKind, name: str, workflow: Any, params: Any, id_: str | None,
               retention: Retention | None) -> StepCall:
        check_step_name(name)
        flow, type_ = _workflow_named(name, workflow)
        if id_ is not None:
            check_instance_id(id_)
        if retention is not None and not isinstance(retention, Retention):
            raise UsageError(f"step {name!r}: retention must be Retention(…), not {_an(type(retention).__name__)}")
        call = self._call(kind, name)
        self._engine.children.prepare(call, flow, id_, params, type_, retention)
        return call

    def _decorator(self, name: str, options: StepOptions, args: tuple[Any, ...]) -> StepDecorator:
        if args:
            raise UsageError(f"step {name!r} has arguments but no function: write `await step.do({name!r}, fn, …)`")
        decorator = StepDecorator(self, name, options)
        self._engine.decorator_made(decorator)
        return decorator

    def decorator_used(self, decorator: StepDecorator) -> None:
        self._engine.call_awaited(decorator)

    def _call(self, kind: StepKind, name: str) -> StepCall:
        engine = self._engine
        if events._get_running_loop() is not engine.loop:
            raise MisuseError(f"step {name!r} was called inside a callback or outside run(). Steps cannot be nested: "
                              f"call it from run() itself.")
        if engine.closed and not self._evicted:
            self._evicted = True
            raise Evicted
        self._steps += kind is not StepKind.SLEEP
        if self._steps > (limit := steps_max(engine.flow)):
            raise TooManySteps(f"run() has begun more than {limit:,} steps. Let a child or another instance go on, or "
                               f"raise the limit: class …(Workflow, steps_max=…)")
        count = self._counts[kind, name] = self._counts.get((kind, name), 0) + 1
        return StepCall(engine, kind, name, count)  # of a closed engine: run() has caught Evicted; this never comes


class StepDecorator:
    """What `step.do(name)` gives without a function: put it on one, call the product, await what that returns."""

    __slots__ = ("_options", "_step", "name")

    def __init__(self, step: RunStep, name: str, options: StepOptions) -> None:
        self._step = step
        self._options = options
        self.name = name

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., StepCall]:
        step, name, options = self._step, self.name, self._options
        step.decorator_used(self)
        if not callable(fn):
            raise _not_a_function(name, fn)

        @functools.wraps(fn)
        def call(*args: Any, **keywords: Any) -> StepCall:
            return step.open(name, options, fn, args, keywords or None)

        return call

    def __await__(self) -> NoReturn:
        raise MisuseError(f"step {self.name!r} has no function: write `await step.do({self.name!r}, fn)`, or put "
                          f"`@step.do({self.name!r})` on a function and await a call of that")

    def __str__(self) -> str:
        return f"do({self.name!r}), which was given no function"


def _workflow_named(step: str, workflow: Any) -> tuple[str, Any]:
    """The name of a workflow that was given as a class or by name, and the type of its params."""
    if isinstance(workflow, str):
        return check_workflow(workflow), Any
    if isinstance(workflow, type) and issubclass(workflow, Workflow) and is_runnable(workflow):
        return workflow_name(workflow), params_type(workflow)
    raise UsageError(f"step {step!r}: the second argument must be a Workflow class or the name of a workflow, not "
                     f"{workflow!r:.80}")


def _approval(payload: ApprovalPayload, sent_at: int) -> Approval:
    return Approval(payload.approved, payload.by, payload.comment, datetime.fromtimestamp(sent_at / 1000, UTC))


def _not_a_function(name: str, fn: Any) -> UsageError:
    made = inspect.isawaitable(fn)
    hint = f": pass the function itself and its arguments, `step.do({name!r}, fn, *args)`, not what a call of it returns"
    if inspect.iscoroutine(fn):
        fn.close()
    return UsageError(f"step {name!r}: the second argument must be a function, not {_an(type(fn).__name__)}"
                      f"{hint if made else ''}")


def _an(noun: str) -> str:
    return f"an {noun}" if noun[:1] in "aeiouAEIOU" else f"a {noun}"
