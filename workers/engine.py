"""The Engine: executes one instance. It replays run(), memoises steps, retries, sleeps, and records every outcome.

Commit before consequence (protocol rule 18): run() may go on with a result whose record is only pending, but no callback
is entered, no slot given back and no end made known before every earlier record of the instance is accepted. All gates
are read after that wait, with no await before the entry.

The engine lives in callbacks of the pod's loop: a *turn* drains the instance's own loop, hands out recorded outcomes one
by one, and then begins the steps that run() has opened.
"""

from __future__ import annotations

import asyncio
from collections import deque
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol, cast

from toque._logging import get_logger
from toque._payload import decode_params, describe_exception, encode
from toque.errors import DeterminismError, MisuseError, NonRetryableError, UsageError
from toque.storage import records as r
from toque.storage.fold import INTERRUPTED_TYPE
from toque.workers.attempt import Attempt, Callbacks
from toque.workers.instance_loop import InstanceLoop
from toque.workers.replay import (
    Outcome,
    Replay,
    decode_result,
    describe_key,
    hand_out,
    outcome_error,
    outcome_key,
)
from toque.workers.step_call import Evicted, RunStep, StepCall
from toque.workflow import (
    Step,
    StepContext,
    StepOptions,
    Workflow,
    WorkflowEvent,
    idempotency_key,
    params_type,
    retry_delay_ms,
    workflow_name,
)

_log = get_logger("toque.engine")

NEAR_MS = 1000  # a wait that ends so soon keeps its slot (protocol rule 9)
INTERRUPTIONS_PER_ATTEMPT = 5  # so many interruptions at one position count as a failed attempt
INTERRUPTIONS_MAX = 10  # so many park the instance


class Host(Protocol):
    """What an Engine needs of its station."""

    account: str
    env: Any
    callbacks: Callbacks
    inside: int  # callbacks of the station that have been entered and not left

    def commit(self, record: r.Record, engine: Engine) -> None:
        """Put a record of the engine into the pending group."""
        ...

    def now_ms(self) -> int:
        """Broker time, never ahead of it."""
        ...

    def random(self) -> float: ...

    def may_enter(self) -> bool:
        """Whether a callback may be entered now: deadline, pause of the station, room in the journal."""
        ...

    def in_time(self) -> bool:
        """Whether the session's deadline lies ahead. Safe from any thread."""
        ...

    def enter_later(self, engine: Engine) -> None:
        """Call `engine.enter()` when `may_enter` may be true again."""
        ...

    def engine_rests(self, engine: Engine) -> None:
        """Nothing but far timers is left of it, all accepted, no callback inside: take its slot back."""
        ...

    def engine_ended(self, engine: Engine) -> None:
        """Its terminal record is accepted."""
        ...

    def engine_left(self, engine: Engine) -> None:
        """It needs its slot no more: ended or blocked, and no callback inside."""
        ...

    def engine_blocked(self, engine: Engine, reason: str) -> None:
        """Its code does not fit its history; it is held until it is loaded again."""
        ...


class Tried(NamedTuple):
    """An attempt that has come to its end, entered or not."""

    call: StepCall
    number: int
    started_at: int


class Engine:
    """One instance in memory. Made by its SousChef; see the module for its rules."""

    __slots__ = ("_admitting", "_attempts", "_awaiting", "_blocked_before", "_deferred", "_entering", "_failed",
                 "_interrupted", "_main", "_new", "_open", "_pod_loop", "_replay", "_rested", "_sleeping", "_timers",
                 "_unawaited", "_wakes", "admitted", "blocked", "closed", "end", "ended", "flow", "has_slot", "held",
                 "host", "inside", "leaving", "loop", "resting", "run", "seq", "serial", "threads_inside",
                 "unaccepted")

    def __init__(self, host: Host, flow: type[Workflow[Any, Any]], serial: int, replay: Replay) -> None:
        assert replay.admitted is not None
        self.host = host
        self.flow = flow
        self.serial = serial
        self.admitted = replay.admitted
        self.run = replay.admitted.run
        self.seq = replay.seq
        self.unaccepted = 0  # records that are pending or in flight
        self.inside = 0  # callbacks that have been entered and not left, those whose result is refused too
        self.threads_inside = 0  # of those: in threads
        self.has_slot = False  # kept by the station
        self.closed = False  # it has left memory: nothing it does counts
        self.ended = False  # the terminal record is written (pending or accepted)
        self.leaving = False  # kept by the station: it leaves memory when its last record is folded
        self.end: r.Ended | None = None  # the terminal record
        self.blocked = ""  # why it is held, when its code does not fit its history
        self.resting = False  # only far timers are left, and the record that says so is written
        self.held = replay.interruptions > 0  # results are handed out only after their acceptance (rule 18)
        self.loop = InstanceLoop()  # type: ignore[abstract]  # what is missing is refused at run time
        self._pod_loop = asyncio.get_running_loop()
        self._interrupted = replay.interruptions
        self._replay = replay.outcomes
        self._failed = replay.failed
        self._sleeping = replay.sleeping
        self._main: asyncio.Task[Any] | None = None
        self._admitting = False  # run() is entered when the Admitted record is accepted
        self._open: dict[str, StepCall] = {}
        self._new: list[StepCall] = []
        self._entering: list[StepCall] = []
        self._awaiting = False  # enter_later is under way
        self._attempts: dict[str, Attempt] = {}
        self._wakes: dict[str, int] = {}  # open waits: step key → due, ms
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._deferred: deque[Outcome] = deque()
        self._unawaited: list[StepCall] = []  # were not awaited when their outcome came
        self._rested = replay.resting  # the journal says that it holds no slot
        self._blocked_before = replay.blocked_on

    @property
    def title(self) -> str:
        return f"{self.admitted.workflow}/{self.admitted.id}"

    @property
    def _over(self) -> bool:
        """Nothing of it goes on: ended, held, or gone from memory."""
        return self.ended or self.closed or bool(self.blocked)

    @property
    def wake_at(self) -> int:
        """When the soonest wait ends; 0 without one."""
        return min(self._wakes.values()) if self._wakes else 0

    def now_ms(self) -> int:
        return self.host.now_ms()

    # -- the station's calls -------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Record the creation; run() is entered after its acceptance."""
        self._admitting = True
        self._record(self.admitted)

    def start(self) -> None:
        """Enter run(). Call it when everything recorded so far is accepted."""
        admitted = self.admitted
        try:
            params = decode_params(admitted.params, admitted.content_type, params_type(self.flow),
                                   what=f"the params of {self.title}")
            event: WorkflowEvent[Any] = WorkflowEvent(
                payload=params, timestamp=datetime.fromtimestamp(admitted.created_at / 1000, UTC),
                instance_id=admitted.id, workflow_name=workflow_name(self.flow))
            flow = self.flow()
            flow.env = self.host.env
        except Exception as error:  # user code: __init__ and validators  # noqa: BLE001
            self._end(r.Status.ERRORED, failure=describe_exception(error))
            return
        if self._rested:
            self._woken()
        self._main = self.loop.create_task(flow.run(event, cast(Step, RunStep(self))))
        self._turn()

    def wake(self) -> None:
        """It has a slot again: fire what is due."""
        if self.resting:
            self.resting = False
            self._woken()
        for key in list(self._wakes):
            self._arm(key)

    def _woken(self) -> None:
        self._record(r.Woken(self.serial, self.run, self.seq + 1, self.now_ms()))

    def terminate(self) -> None:
        """End it here and now. No callback is entered from this call on."""
        self._end(r.Status.TERMINATED)

    def accepted(self) -> None:
        """One more of its records is accepted (see `Listener`)."""
        self.unaccepted -= 1
        if self.unaccepted == 0 and not self.closed:
            self._all_accepted()

    def enter(self) -> None:
        """Enter the callbacks that wait for it, if every gate is open."""
        self._awaiting = False
        while self._entering and self.unaccepted == 0 and not self._over:
            if not self.host.may_enter():
                self._awaiting = True
                self.host.enter_later(self)
                return
            call = self._entering.pop(0)
            if call.key in self._open:
                self._attempt(call)

    def cut(self) -> None:
        """Stop every attempt; whatever they still bring is refused. The engine is closed from here on."""
        self.closed = True
        for timer in self._timers.values():
            timer.cancel()
        for attempt in list(self._attempts.values()):
            attempt.cut()
        self._attempts.clear()
        if self._main is not None and not self._main.done():
            self._main._log_destroy_pending = False  # type: ignore[attr-defined]  # it is dropped on purpose
            try:
                self._main.get_coro().close()
            except (Evicted, Exception) as error:  # user code: its `finally` blocks run here  # noqa: BLE001
                _log.debug("run() did not end quietly", instance=self.title, error=type(error).__name__)

    # -- run()'s calls -------------------------------------------------------------------------------------------------

    def call_opened(self, call: StepCall) -> None:
        self._open[call.key] = call
        self._new.append(call)

    def call_cancelled(self, call: StepCall) -> None:
        """run() has cancelled the step: nothing of it is recorded any more."""
        if self._open.pop(call.key, None) is not None:
            self._wakes.pop(call.key, None)
            if (timer := self._timers.pop(call.key, None)) is not None:
                timer.cancel()
            if (attempt := self._attempts.pop(call.key, None)) is not None:
                attempt.cut()

    # -- turns ---------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Let run() go on until it waits for steps, hand out what is recorded, begin what is new."""
        assert self._main is not None
        try:
            self.loop.drain()
            while self._replay:
                self._hand_recorded(*self._replay.popleft())
                self.loop.drain()
        except DeterminismError as error:
            self.hold(f"code: {error}")
            return
        except (MisuseError, SystemExit) as error:
            self._end(r.Status.ERRORED, failure=describe_exception(error))
            return
        if self._main.done():
            self._finish(self._main)
        elif not self._open:
            self._end(r.Status.ERRORED, failure=describe_exception(MisuseError(
                "run() waits for something that no step will bring. Await only steps inside run()")))
        else:
            self._begin()

    def _hand_recorded(self, key: str, outcome: Outcome) -> None:
        call = self._open.pop(key, None)
        if call is None:
            found = ", ".join(map(str, self._open.values())) or "the end of run()"
            raise DeterminismError(
                f"{self.title}: the journal holds the outcome of {describe_key(key)}, but run() is at {found}. The code "
                f"was changed under a live instance: put the old code back, or terminate the instance",
                expected=describe_key(key), found=found)
        hand_out(call, outcome)
        self._note_unawaited(call)

    def _note_unawaited(self, call: StepCall) -> None:
        if not call.awaited:
            self._unawaited.append(call)

    def _begin(self) -> None:
        """Begin the steps that run() has opened in this turn and that the journal does not answer."""
        new, self._new = self._new, []
        starting: list[StepCall] = []
        for call in new:
            if call.key not in self._open:
                continue
            if call.kind is r.StepKind.SLEEP:
                started = self._sleeping.get(call.key)
                if started is None:
                    starting.append(call)
                else:
                    self._wait(call.key, started.due)
            elif call.key in self._failed:
                self._wait(call.key, self._failed[call.key][-1].retry_at)
            elif self._interrupted and self._interrupted % INTERRUPTIONS_PER_ATTEMPT == 0:
                self._fail_interrupted(call)
            else:
                self._entering.append(call)
        self._interrupted_once()
        self._start_sleeps(starting)
        if self._rests() and not self.resting:
            self.resting = True
            self._record(r.Waiting(self.serial, self.run, self.seq + 1, self.now_ms()))
        if self._entering and not self._awaiting:
            self.enter()

    def _interrupted_once(self) -> None:
        """The interruptions count against the steps that were open when the engine was loaded, not later ones."""
        if self._interrupted % INTERRUPTIONS_PER_ATTEMPT == 0:
            self._interrupted = 0

    def _start_sleeps(self, calls: list[StepCall]) -> None:
        now = self.now_ms()
        for call in calls:
            call.due = call.due or now + call.duration_ms
            self._wakes[call.key] = call.due
        for index, call in enumerate(calls, 1):
            idle = index == len(calls) and self._rests()
            self.resting = self.resting or idle
            self._record(r.SleepStarted(self.serial, self.run, self.seq + 1, now, call.name, call.occurrence, call.due,
                                        idle))
        for call in calls:
            self._arm(call.key)

    def _rests(self) -> bool:
        """Nothing but far timers is left."""
        if self._attempts or self._entering or self._deferred or not self._wakes or self.ended:
            return False
        return self.wake_at - self.now_ms() > NEAR_MS

    # -- attempts ------------------------------------------------------------------------------------------------------

    def _attempt(self, call: StepCall) -> None:
        failed = self._failed.get(call.key)
        if failed:
            call.options = _options_of(failed[-1].config)  # what was stored with the first attempt wins
        number = (failed[-1].attempt if failed else 0) + 1 + self._interrupted
        self.inside += 1
        self.host.inside += 1
        self.host.callbacks.inside += 1
        self._attempts[call.key] = Attempt(self, call, number, lambda: self._context(call, number))

    def _context(self, call: StepCall, number: int) -> StepContext:
        key = idempotency_key(account=self.host.account, workflow=self.admitted.workflow, instance_id=self.admitted.id,
                              run=self.run, kind=call.kind.name, name=call.name, occurrence=call.occurrence)
        return StepContext(name=call.name, count=call.occurrence, attempt=number, idempotency_key=key,
                           instance_id=self.admitted.id, workflow_name=self.admitted.workflow)

    def attempt_left(self) -> None:
        """A callback is not inside any more; its slot may be free now."""
        self.inside -= 1
        self.host.inside -= 1
        self.host.callbacks.inside -= 1
        if self.inside == 0 and self.unaccepted == 0:
            self._settle()

    def attempt_done(self, attempt: Attempt, value: Any) -> None:
        """The callback returned. Encoded and checked before anything sees its effect."""
        call = attempt.call
        self._attempts.pop(call.key, None)
        if call.key not in self._open:
            return
        try:
            data = encode(value, what=f"the result of step {call.name!r}")
            result = decode_result(call, data)
        except (UsageError, DeterminismError) as error:
            self._fail_step(Tried(call, attempt.number, attempt.started_at), describe_exception(error))
            return
        outcome = r.StepDone(self.serial, self.run, self.seq + 1, self.now_ms(), call.kind, call.name, call.occurrence,
                             attempt.number, attempt.started_at, data)
        self._interrupted = 0
        self._record(outcome)
        if self.held:
            self._deferred.append(outcome)
            return
        del self._open[call.key]
        self._note_unawaited(call)
        if not call.done():
            call.set_result(result)
        self._turn()

    def attempt_raised(self, attempt: Attempt, error: BaseException) -> None:
        """The callback raised: another attempt follows, or the step has failed."""
        retryable = not isinstance(error, NonRetryableError | MisuseError)
        tried = Tried(attempt.call, attempt.number, attempt.started_at)
        self._attempt_failed(tried, describe_exception(error), retryable=retryable)

    def attempt_timed_out(self, attempt: Attempt) -> None:
        options = attempt.call.options
        assert options is not None
        failure = r.Failure("TimeoutError", f"the callback took longer than {options.timeout_ms / 1000:g} s")
        tried = Tried(attempt.call, attempt.number, attempt.started_at)
        self._attempt_failed(tried, failure, retryable=True, timed_out=True)

    def _attempt_failed(self, tried: Tried, failure: r.Failure, *, retryable: bool, timed_out: bool = False) -> None:
        call = tried.call
        self._attempts.pop(call.key, None)
        if call.key not in self._open:
            return
        options = call.options
        assert options is not None
        failed = self._failed.setdefault(call.key, [])
        if not retryable or len(failed) >= options.limit:
            self._fail_step(tried, failure, timed_out=timed_out)
            return
        now = self.now_ms()
        due = now + retry_delay_ms(options, len(failed) + 1, self.host.random)
        self._wakes[call.key] = due
        idle = self._rests()
        record = r.AttemptFailed(self.serial, self.run, self.seq + 1, now, call.kind, call.name, call.occurrence,
                                 tried.number, tried.started_at, failure, due, _config_of(options), idle)
        failed.append(record)
        self.resting = idle
        self._interrupted = 0
        self._record(record)
        self._arm(call.key)

    def _fail_interrupted(self, call: StepCall) -> None:
        """Too many interruptions at one position count as a failed attempt (protocol rule 20)."""
        failure = r.Failure(INTERRUPTED_TYPE, f"the pod ended {self._interrupted} times while the step was open")
        failed = self._failed.get(call.key)
        number = (failed[-1].attempt if failed else 0) + self._interrupted
        self._attempt_failed(Tried(call, number, self.now_ms()), failure, retryable=True)

    def _fail_step(self, tried: Tried, failure: r.Failure, *, timed_out: bool = False) -> None:
        call = tried.call
        self._interrupted = 0
        outcome = r.StepFailed(self.serial, self.run, self.seq + 1, self.now_ms(), call.kind, call.name,
                               call.occurrence, tried.number, tried.started_at, failure, timed_out)
        self._record(outcome)
        if self.held:
            self._deferred.append(outcome)
            return
        del self._open[call.key]
        if not call.done():
            call.set_exception(outcome_error(outcome))
        self._pod_loop.call_soon(self._turn_if_live)

    def _turn_if_live(self) -> None:
        if not self._over:
            self._turn()

    # -- waits ---------------------------------------------------------------------------------------------------------

    def _wait(self, key: str, due: int) -> None:
        self._wakes[key] = due
        self._arm(key)

    def _arm(self, key: str) -> None:
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
        delay = max(0, self._wakes[key] - self.now_ms()) / 1000
        self._timers[key] = self._pod_loop.call_later(delay, self._due, key)

    def _due(self, key: str) -> None:
        self._timers.pop(key, None)
        if self._over or self.resting or key not in self._wakes:
            return  # a resting engine is woken by its station, when it has a slot
        if self._wakes[key] > self.now_ms():
            self._arm(key)  # never early, whatever the pod's own clock says
            return
        del self._wakes[key]
        call = self._open[key]
        if call.kind is r.StepKind.DO:
            self._entering.append(call)
            if not self._awaiting:
                self.enter()
            return
        outcome = r.SleepDone(self.serial, self.run, self.seq + 1, self.now_ms(), call.name, call.occurrence)
        self._record(outcome)
        if self.held:
            self._deferred.append(outcome)
            return
        del self._open[key]
        if not call.done():
            call.set_result(None)
        self._turn()

    # -- acceptance ----------------------------------------------------------------------------------------------------

    def _record(self, record: r.Record) -> None:
        self.seq = record.seq
        self.unaccepted += 1
        self.host.commit(record, self)

    def _all_accepted(self) -> None:
        if self.ended:
            self.host.engine_ended(self)
        elif self.blocked:
            self._settle()
        elif self._admitting:
            self._admitting = False
            self.start()
        elif self._deferred:
            self._hand_deferred()
        elif self._entering and not self._awaiting:
            self.enter()
        if self.inside == 0:
            self._settle()

    def _hand_deferred(self) -> None:
        outcome = self._deferred.popleft()
        call = self._open.pop(outcome_key(outcome), None)
        if call is not None:
            hand_out(call, outcome)
            self._note_unawaited(call)
        self._turn()

    def _settle(self) -> None:
        """Nothing is inside and everything is accepted: the slot goes back if nothing is left to do."""
        if self.closed or self.unaccepted:
            return
        if self.ended or self.blocked:
            self.host.engine_left(self)
        elif self.resting:
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()
            self.host.engine_rests(self)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _finish(self, main: asyncio.Task[Any]) -> None:
        if main.cancelled():
            failure = r.Failure("CancelledError", "run() was cancelled from inside")
            self._end(r.Status.ERRORED, failure=failure)
        elif (error := main.exception()) is not None:
            self._end(r.Status.ERRORED, failure=describe_exception(_explain(error)))
        else:
            try:
                self._check_closed()
                what = f"the result of {self.title}"
                output = encode(main.result(), what=what)
            except UsageError as misuse:
                self._end(r.Status.ERRORED, failure=describe_exception(misuse))
            else:
                self._end(r.Status.COMPLETE, output=output)

    def _check_closed(self) -> None:
        if self._open:
            names = ", ".join(map(str, self._open.values()))
            raise MisuseError(f"run() returned with steps open: {names}. Await every step before returning")
        forgotten = [str(call) for call in self._unawaited if not call.awaited]
        if forgotten:
            raise MisuseError(f"run() never awaited {', '.join(forgotten)}. Write `await step.do(…)`")

    def _end(self, status: r.Status, *, output: bytes = b"", failure: r.Failure | None = None) -> None:
        if self._over:
            return
        self.ended = True
        for timer in self._timers.values():
            timer.cancel()
        for attempt in list(self._attempts.values()):
            attempt.cut()
        self._attempts.clear()
        self.end = r.Ended(self.serial, self.run, self.seq + 1, self.now_ms(), status, output, failure)
        self._record(self.end)

    def hold(self, reason: str) -> None:
        """Hold the instance: the journal keeps why, once, and loading it again tries again."""
        self.blocked = reason
        for timer in self._timers.values():
            timer.cancel()
        for attempt in list(self._attempts.values()):
            attempt.cut()
        self._attempts.clear()
        if self.blocked != self._blocked_before:
            self._record(r.Blocked(self.serial, self.run, self.seq + 1, self.now_ms(), self.blocked))
        self.host.engine_blocked(self, self.blocked)
        if self.inside == 0:
            self._settle()


def _explain(error: BaseException) -> BaseException:
    """asyncio's own words for a foreign await, put into ours."""
    if isinstance(error, RuntimeError) and "attached to a different loop" in str(error):
        return MisuseError("run() awaited something of the pod's own loop (a client, a lock, a task made elsewhere), "
                           "which would not survive a restart. Put it into a step: `await step.do(\"name\", fn)`")
    return error


def _config_of(options: StepOptions) -> r.RetryConfig:
    return r.RetryConfig(*options)


def _options_of(config: r.RetryConfig) -> StepOptions:
    return StepOptions(config.limit, config.delay_ms, config.backoff, config.cap_ms, config.jitter, config.timeout_ms)

