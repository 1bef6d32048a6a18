"""What users write against: the Workflow class, its event, the Step protocol, retries and the step's context.

Holds no engine: the Engine calls `run` with a Step of its own, and resolves options and delays with the functions here.
"""

from __future__ import annotations

import inspect
import re
from asyncio import Future
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from hashlib import blake2b
from typing import (
    Any,
    ClassVar,
    Concatenate,
    Generic,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeVar,
    TypeVarTuple,
    get_args,
    overload,
)

from toque._annotations import base_arguments
from toque._durations import Duration, format_ms, to_ms
from toque._names import check_workflow
from toque._payload import encode
from toque.errors import InvalidDuration, MisuseError, UsageError

PROGRESS_MAX = 16 * 1024  # bytes of a reported value, encoded

Params = TypeVar("Params")
Result = TypeVar("Result")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
P = ParamSpec("P")

Backoff = Literal["constant", "linear", "exponential"]

VERSION_LENGTH_MAX = 64
STEPS_MAX_DEFAULT = 10_000
STEPS_MAX_MAX = 1_000_000
RETRY_LIMIT_MAX = 10_000
TIMEOUT_DEFAULT = "10 minutes"
WAIT_TIMEOUT_DEFAULT = "24 hours"
CHILD_TIMEOUT_DEFAULT = "365 days"
_BACKOFFS = get_args(Backoff)
_VERSION = re.compile(r"[a-zA-Z0-9_.+-]+", re.ASCII)
_RUN_PARAMETERS = ("self", "event", "step")


@dataclass(frozen=True, slots=True)
class WorkflowEvent(Generic[Params]):
    """What an instance was created with; the same on every replay."""

    payload: Params
    """The params of the creation, decoded to the workflow's Params type."""
    timestamp: datetime
    """When the instance was created: UTC, the broker's time."""
    instance_id: str
    """The instance's id, unique in its workflow."""
    workflow_name: str
    """The workflow's name."""


@dataclass(frozen=True, slots=True)
class Approval:
    """What `step.wait_for_approval` returns: the decision, and who made it."""

    approved: bool
    """True for `instance.approve`, False for `instance.reject`."""
    by: str
    """Who decided, as the sender said; Toque does not check it."""
    comment: str
    """What they said about it; may be empty."""
    at: datetime
    """When it was sent: UTC, the broker's time."""


@dataclass(frozen=True, slots=True)
class Child:
    """What `step.start_workflow` returns: a name of the child, to be kept or given to a client."""

    workflow: str
    """Its workflow's name."""
    id: str
    """Its id, unique in the workflow."""


class StepContext:
    """What a callback is told about its attempt, passed to the parameter named `ctx`.

    A callback may be entered again after a crash, until its checkpoint is accepted; `idempotency_key` is the same each
    time, so give it to whatever has an effect outside.
    """

    __slots__ = ("_cancelled", "_report", "attempt", "count", "idempotency_key", "instance_id", "name", "workflow_name")

    def __init__(self, *, name: str, count: int, attempt: int, idempotency_key: str, instance_id: str,
                 workflow_name: str, report: Callable[[bytes], None] | None = None) -> None:
        self.name = name  # of the step
        self.count = count  # which step of this name in the run, from 1
        self.attempt = attempt  # from 1; attempts that an interruption cut are counted too
        self.idempotency_key = idempotency_key
        self.instance_id = instance_id
        self.workflow_name = workflow_name
        self._cancelled = False
        self._report = report

    @property
    def cancelled(self) -> bool:
        """True once the attempt's result cannot count any more (time-out, termination, a lost session).

        A thread cannot be stopped from outside, so a long sync callback should look here and return early.
        """
        return self._cancelled

    def report_progress(self, value: Any) -> None:
        """Show how far it is: watchers get the newest value at once, and `status()` has it. Works from threads, too.

        It is not recorded: what a pod was told is gone with it, and when the instance leaves memory. What an attempt
        reports whose result cannot count any more is dropped. Raises InvalidPayload, PayloadTooLarge (16 KiB).
        """
        data = encode(value, what="the progress", limit=PROGRESS_MAX)
        if self._report is not None:
            self._report(data)

    def _cancel(self) -> None:
        """The Engine says that the result is refused from here on. Safe from any thread: one store of a flag."""
        self._cancelled = True

    def __repr__(self) -> str:
        return (f"StepContext(workflow_name={self.workflow_name!r}, instance_id={self.instance_id!r}, "
                f"name={self.name!r}, count={self.count}, attempt={self.attempt})")


@dataclass(frozen=True, slots=True)
class Retries:
    """How a step is tried again. Raises UsageError or InvalidDuration where it is made."""

    limit: int = 5
    """Re-tries after the first attempt, 0 to 10,000."""
    delay: Duration = "10 seconds"
    """The wait before the first re-try."""
    backoff: Backoff = "exponential"
    """How the wait grows: not at all, by `delay` each time, or twice as long each time."""
    cap: Duration = "1 hour"
    """The longest wait; not below `delay`."""
    jitter: bool = True
    """Shorten each wait by a random part of up to a half, so that re-tries do not come all at once."""

    def __post_init__(self) -> None:
        if not isinstance(self.limit, int) or isinstance(self.limit, bool):
            raise UsageError(f"Retries.limit must be a whole number, not {type(self.limit).__name__}")
        if not 0 <= self.limit <= RETRY_LIMIT_MAX:
            raise UsageError(f"Retries.limit is {self.limit}; legal are 0 to {RETRY_LIMIT_MAX:,}")
        if self.backoff not in _BACKOFFS:
            raise UsageError(f"Retries.backoff is {self.backoff!r:.80}; legal are {', '.join(_BACKOFFS)}")
        if not isinstance(self.jitter, bool):
            raise UsageError(f"Retries.jitter must be True or False, not {type(self.jitter).__name__}")
        delay_ms = to_ms(self.delay, what="Retries.delay")
        cap_ms = to_ms(self.cap, what="Retries.cap")
        if cap_ms < delay_ms:
            raise InvalidDuration(f"Retries.cap ({format_ms(cap_ms)}) is shorter than Retries.delay "
                                  f"({format_ms(delay_ms)}): raise cap, or lower delay")


class StepOptions(NamedTuple):
    """A step's resolved options; times in milliseconds."""

    limit: int
    delay_ms: int
    backoff: str
    cap_ms: int
    jitter: bool
    timeout_ms: int


class StepDecorator(Protocol):
    """What `step.do(name)` returns: put it on a callback, call the product, await what that returns.

    A first parameter `ctx: StepContext` is filled in by Toque and is not part of the product's signature.
    """

    @overload
    def __call__(self, fn: Callable[Concatenate[StepContext, P], Awaitable[T]], /) -> Callable[P, Future[T]]: ...

    @overload
    def __call__(self, fn: Callable[Concatenate[StepContext, P], T], /) -> Callable[P, Future[T]]: ...

    @overload
    def __call__(self, fn: Callable[P, Awaitable[T]], /) -> Callable[P, Future[T]]: ...

    @overload
    def __call__(self, fn: Callable[P, T], /) -> Callable[P, Future[T]]: ...


class Step(Protocol):
    """The steps of one run. Each call begins its step at once and returns a Future; results come in call order.

    Await it, or give several to `asyncio.gather`. `TaskGroup.create_task` takes coroutines only: write a small
    `async def branch()` that awaits its steps and start that.

    A step is known by its kind, name and occurrence, so names must not depend on time, chance or the environment.
    Once a step's result is recorded its callback is never entered again; until then it may be entered more than once,
    for example after a crash.
    """

    @overload
    def do(self, name: str, fn: Callable[[*Ts], Awaitable[T]], /, *args: *Ts, retries: Retries | None = None,
           timeout: Duration | None = None) -> Future[T]: ...

    @overload
    def do(self, name: str, fn: Callable[[*Ts], T], /, *args: *Ts, retries: Retries | None = None,
           timeout: Duration | None = None) -> Future[T]: ...

    @overload
    def do(self, name: str, fn: Callable[[StepContext, *Ts], Awaitable[T]], /, *args: *Ts,
           retries: Retries | None = None, timeout: Duration | None = None) -> Future[T]: ...

    @overload
    def do(self, name: str, fn: Callable[[StepContext, *Ts], T], /, *args: *Ts, retries: Retries | None = None,
           timeout: Duration | None = None) -> Future[T]: ...

    @overload
    def do(self, name: str, /, *, retries: Retries | None = None,
           timeout: Duration | None = None) -> StepDecorator: ...

    def do(  # type: ignore[misc]  # mypy does not see that *args: Any takes whatever *args: *Ts does
            self, name: str, fn: Any = None, /, *args: Any, retries: Retries | None = None,
            timeout: Duration | None = None) -> Any:
        """Run a callback durably: `await step.do("name", fn, *args)`, or `@step.do("name")` on a function.

        `fn` is async, or sync (it then runs in a thread, which cannot be cancelled: see `StepContext.cancelled`).
        A parameter named `ctx`, in any position, gets the StepContext; put it first, so that type checkers follow.
        The result is encoded, and decoded to the return annotation, before `run` gets it, now as after a crash.

        `retries` defaults to Retries(); `timeout` is for each attempt and defaults to 10 minutes; an async callback is
        cancelled by it. Awaiting raises StepFailed or StepTimeout after the last attempt; NonRetryableError in the
        callback makes it the last one. A call with wrong names or durations raises UsageError at once.
        """
        ...

    def sleep(self, name: str, duration: Duration, /) -> Future[None]:
        """Wait, durably: counted from the first call and not begun again by a crash. Never early; at most 365 days.

        The instance holds no slot meanwhile. Raises InvalidDuration.
        """
        ...

    def sleep_until(self, name: str, when: datetime, /) -> Future[None]:
        """Wait, durably, until a time that knows its time zone; the time of the first call counts.

        A time that is past returns at once. Raises InvalidDuration for a naive time or more than 365 days.
        """
        ...

    @overload
    def wait_for_event(self, name: str, type: str, /, *, timeout: Duration = WAIT_TIMEOUT_DEFAULT) -> Future[Any]: ...

    @overload
    def wait_for_event(self, name: str, type: str, /, *, timeout: Duration = WAIT_TIMEOUT_DEFAULT,
                       result_type: type[T]) -> Future[T]: ...

    @overload
    def wait_for_event(self, name: str, type: str, /, *, timeout: Duration = WAIT_TIMEOUT_DEFAULT,
                       result_type: Any) -> Future[Any]: ...

    def wait_for_event(self, name: str, type: str, /, *, timeout: Duration = WAIT_TIMEOUT_DEFAULT,
                       result_type: Any = Any) -> Any:
        """Wait, durably, for an event of this type (`instance.send_event(type, payload)`) and return its payload.

        Events meet waits by type, both in their order; one that came earlier, even before the instance was admitted,
        is kept for it. Each is given to one wait, once, over crashes too. The instance holds no slot meanwhile. The
        payload is decoded to `result_type`.

        Raises EventTimeout when none came in time (an event that was acknowledged before then is given out), StepFailed
        for an event whose payload is not of the type; InvalidName, InvalidDuration.
        """
        ...

    def wait_for_approval(self, name: str, /, *, timeout: Duration = WAIT_TIMEOUT_DEFAULT) -> Future[Approval]:
        """Wait, durably, until somebody decides: `instance.approve(name, by=…)` or `instance.reject(name, by=…)`.

        An event of the type "approval-<name>" underneath. Raises EventTimeout when nobody has decided in time.
        """
        ...

    @overload
    def start_workflow(self, name: str, workflow: type[Workflow[Params, Any]], params: Params, /, *,
                       id: str | None = None, retention: Retention | None = None) -> Future[Child]: ...

    @overload
    def start_workflow(self, name: str, workflow: type[Workflow[None, Any]], /, *, id: str | None = None,
                       retention: Retention | None = None) -> Future[Child]: ...

    @overload
    def start_workflow(self, name: str, workflow: str, params: Any = None, /, *, id: str | None = None,
                       retention: Retention | None = None) -> Future[Child]: ...

    def start_workflow(self, name: str, workflow: Any, params: Any = None, /, *, id: str | None = None,
                       retention: Retention | None = None) -> Any:
        """Create an instance of another workflow, once, and go on without waiting for it.

        It is created once over crashes of this one, and another one by each run of it. Without an `id` it gets one that
        is made of this instance's. A full queue is tried again, with growing pauses. Raises StepFailed for an id that
        another creation has (`error_type` ends with "InstanceExists"), an unknown workflow, params that do not fit;
        InvalidName.
        """
        ...

    @overload
    def run_workflow(self, name: str, workflow: type[Workflow[Params, T]], params: Params, /, *, id: str | None = None,
                     retention: Retention | None = None, timeout: Duration = CHILD_TIMEOUT_DEFAULT) -> Future[T]: ...

    @overload
    def run_workflow(self, name: str, workflow: type[Workflow[None, T]], /, *, id: str | None = None,
                     retention: Retention | None = None, timeout: Duration = CHILD_TIMEOUT_DEFAULT) -> Future[T]: ...

    @overload
    def run_workflow(self, name: str, workflow: str, params: Any = None, /, *, id: str | None = None,
                     retention: Retention | None = None, timeout: Duration = CHILD_TIMEOUT_DEFAULT) -> Future[Any]: ...

    def run_workflow(self, name: str, workflow: Any, params: Any = None, /, *, id: str | None = None,
                     retention: Retention | None = None, timeout: Duration = CHILD_TIMEOUT_DEFAULT) -> Any:
        """Create an instance of another workflow, once, wait durably for its end, and return its output.

        This instance holds no slot while it waits, and gets the end once, over crashes of either. The output is decoded
        to the Result type of the class. `timeout` counts from the acknowledged creation; the child goes on behind it,
        as it does when the step is cancelled.

        Raises ChildFailed when the child errored or was terminated, StepTimeout; and as `start_workflow`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Retention:
    """How long an instance is kept after its end. Raises InvalidDuration where it is made."""

    success: Duration = "7 days"
    """When it is complete."""
    error: Duration = "7 days"
    """When it errored, or was terminated."""

    def __post_init__(self) -> None:
        self.ms()

    def ms(self) -> list[int]:
        """Of a success and of an error, in milliseconds."""
        return [to_ms(self.success, what="Retention.success"), to_ms(self.error, what="Retention.error")]


RETENTION_DEFAULT = Retention()


class Workflow(Generic[Params, Result]):
    """A workflow: a named, versioned class whose `run` is executed durably, step by step.

    `class Census(Workflow[FileParams, FileReport], name="census", version="2")`: the name defaults to the class's own,
    the version to "1". `run` is replayed after a crash with the recorded results of its steps, so whatever differs
    from one time to the next (clock, chance, I/O) belongs into a step.

    `retention` says how long ended instances are kept, seven days by default; `steps_max` how many steps an instance may
    begin, 10,000 by default, up to 1,000,000.
    """

    env: Any = None
    """What the app's `lifespan` yielded in this pod; None without one."""

    _report: Callable[[bytes], None] | None = None

    _toque_name: ClassVar[str] = ""
    _toque_version: ClassVar[str] = ""
    _toque_retention: ClassVar[list[int]] = RETENTION_DEFAULT.ms()
    _toque_steps_max: ClassVar[int] = STEPS_MAX_DEFAULT

    def __init_subclass__(cls, *, name: str | None = None, version: str = "1", retention: Retention | None = None,
                          steps_max: int | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._toque_name = check_workflow(cls.__name__ if name is None else name)
        cls._toque_version = _check_version(version)
        if retention is not None:
            cls._toque_retention = retention.ms()
        if steps_max is not None:
            cls._toque_steps_max = _check_steps_max(steps_max)
        if "run" in cls.__dict__:
            _check_run(cls)

    async def run(self, event: WorkflowEvent[Params], step: Step) -> Result:
        """The work itself. What it returns is the instance's output; an exception ends the instance as errored."""
        raise NotImplementedError(f"{type(self).__qualname__} has no run(self, event, step)")

    def report_progress(self, value: Any) -> None:
        """In run(): show how far it is, see `StepContext.report_progress`.

        Dropped while run() is replayed, up to the last recorded outcome; what follows that is reported again after a
        crash. Raises InvalidPayload, PayloadTooLarge (16 KiB).
        """
        data = encode(value, what="the progress", limit=PROGRESS_MAX)
        if self._report is not None:
            self._report(data)


def workflow_name(cls: type[Workflow[Any, Any]]) -> str:
    """The name that the class was given."""
    return cls._toque_name


def workflow_version(cls: type[Workflow[Any, Any]]) -> str:
    """The version that the class was given."""
    return cls._toque_version


def steps_max(cls: type[Workflow[Any, Any]]) -> int:
    """How many steps an instance may begin; sleeps do not count."""
    return cls._toque_steps_max


def keep(cls: type[Workflow[Any, Any]], asked: list[int]) -> list[int]:
    """How long a success and an error are kept, in ms: as the creation `asked`, if it did, or as the class says."""
    return asked or cls._toque_retention


def is_runnable(cls: type[Workflow[Any, Any]]) -> bool:
    """Whether the class has a `run` of its own or inherited, so is more than a base for workflows."""
    return cls.run is not Workflow.run


def params_type(cls: type[Workflow[Any, Any]]) -> Any:
    """The type to decode params to; Any when the class does not say. Raises MisuseError for an unknown name."""
    hashable: Any = cls
    return _payload_types(hashable)[0]


def result_type(cls: type[Workflow[Any, Any]]) -> Any:
    """The type to decode the output to; Any when the class does not say. Raises MisuseError for an unknown name."""
    hashable: Any = cls
    return _payload_types(hashable)[1]


def resolve_options(retries: Retries | None, timeout: Duration | None) -> StepOptions:
    """The options that a step is run with, defaults filled in. Raises UsageError, InvalidDuration."""
    if retries is None and timeout is None:
        return DEFAULT_OPTIONS
    if retries is not None and not isinstance(retries, Retries):
        raise UsageError(f"retries must be Retries(limit=…, delay=…), not {type(retries).__name__}")
    timeout_ms = to_ms(TIMEOUT_DEFAULT if timeout is None else timeout, what="timeout", minimum_ms=1)
    return _options(retries or _DEFAULT_RETRIES, timeout_ms)


def retry_delay_ms(options: StepOptions, failed_attempts: int, rng: Callable[[], float]) -> int:
    """The wait before the next attempt, after so many failed ones (from 1), in whole milliseconds.

    `rng` gives a float in [0, 1). The wait without jitter is delay, delay·n or delay·2^(n-1), at most the cap; jitter
    takes off up to a half of that. So it is never above the cap, nor below a half of the wait without jitter.
    """
    if options.backoff == "constant":
        factor = 1
    elif options.backoff == "linear":
        factor = failed_attempts
    else:
        factor = 1 << min(failed_attempts - 1, _DOUBLINGS_MAX)
    wait_ms = min(options.delay_ms * factor, options.cap_ms)
    if not options.jitter:
        return wait_ms
    return wait_ms - int(wait_ms * 0.5 * rng())


def idempotency_key(*, account: str, workflow: str, instance_id: str, run: int, kind: str, name: str,
                    occurrence: int) -> str:
    """32 hex digits that are the same for every attempt of a step, and different for any other step."""
    identity = "\0".join((account, workflow, instance_id, str(run), kind, name, str(occurrence)))
    return blake2b(identity.encode(), digest_size=16).hexdigest()


def pass_context(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
                 context: StepContext) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments to call `fn` with: `context` is put where its parameter named `ctx` is, if it has one."""
    place = context_place(fn)
    if place is None:
        return args, kwargs
    if place >= len(args):
        return args, {**kwargs, "ctx": context}
    return (*args[:place], context, *args[place:]), kwargs


def context_place(fn: Callable[..., Any]) -> int | None:
    """The number of positional parameters before `ctx`; beyond all of them for a keyword-only one; None without it."""
    code = getattr(fn, "__code__", None) if inspect.isfunction(fn) and not hasattr(fn, "__wrapped__") else None
    if code is not None:
        names = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
        if "ctx" not in names:
            return None
        place = names.index("ctx")
        return place if place < code.co_argcount else _KEYWORD_ONLY
    return _place_in_signature(fn)


_DOUBLINGS_MAX = 40  # 1 ms doubled so often is longer than any cap
_KEYWORD_ONLY = 1 << 30
_DEFAULT_RETRIES = Retries()


@lru_cache(maxsize=1024)
def _payload_types(cls: type) -> tuple[Any, ...]:
    return base_arguments(cls, Workflow)


@lru_cache(maxsize=1024)
def _options(retries: Retries, timeout_ms: int) -> StepOptions:
    return StepOptions(
        limit=retries.limit,
        delay_ms=to_ms(retries.delay, what="Retries.delay"),
        backoff=retries.backoff,
        cap_ms=to_ms(retries.cap, what="Retries.cap"),
        jitter=retries.jitter,
        timeout_ms=timeout_ms,
    )


DEFAULT_OPTIONS = _options(_DEFAULT_RETRIES, to_ms(TIMEOUT_DEFAULT, what="timeout"))


def _place_in_signature(fn: Callable[..., Any]) -> int | None:
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    for index, parameter in enumerate(parameters):
        if parameter.name == "ctx":
            return _KEYWORD_ONLY if parameter.kind is parameter.KEYWORD_ONLY else index
    return None


def _check_version(version: str) -> str:
    legal = isinstance(version, str) and len(version) <= VERSION_LENGTH_MAX and _VERSION.fullmatch(version)
    if not legal:
        raise UsageError(f"version is {version!r:.80}; legal are texts of 1 to {VERSION_LENGTH_MAX} letters, digits "
                         "and '_', '.', '+', '-'")
    return version


def _check_steps_max(steps: int) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= STEPS_MAX_MAX:
        raise UsageError(f"steps_max is {steps!r:.80}; it must be a whole number from 1 to {STEPS_MAX_MAX:,}")
    return steps


def _check_run(cls: type[Workflow[Any, Any]]) -> None:
    run = cls.__dict__["run"]
    if not inspect.iscoroutinefunction(run):
        raise MisuseError(f"{cls.__qualname__}.run must be written `async def run(self, event, step)`")
    required = [p for p in inspect.signature(run).parameters.values()
                if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(required) != len(_RUN_PARAMETERS):
        names = ", ".join(parameter.name for parameter in required)
        raise MisuseError(f"{cls.__qualname__}.run takes ({names}); it must take (self, event, step)")
