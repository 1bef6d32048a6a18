"""The callbacks of one instance: those that wait for their gate, those inside, and what follows when one fails.

A step is tried until it succeeds, fails for good, or its retries are used up. Attempts are numbered through, those that
an interruption cut are counted too (protocol rule 20), so that a number is never given twice.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from toque._payload import decode, describe_exception, encode
from toque.errors import MisuseError, NonRetryableError
from toque.storage import records as r
from toque.storage.fold import INTERRUPTED_TYPE
from toque.workers.attempt import Attempt
from toque.workers.children import FINAL_ERRORS
from toque.workers.replay import Tries
from toque.workers.step_call import StepCall
from toque.workflow import StepContext, StepOptions, idempotency_key, retry_delay_ms

if TYPE_CHECKING:
    from toque.workers.engine import Engine

INTERRUPTIONS_PER_ATTEMPT = 5  # so many interruptions of an open step count as a failed attempt


class Tried(NamedTuple):
    """An attempt that has come to its end, entered or not."""

    call: StepCall
    number: int
    started_at: int


class Attempts:
    """See the module."""

    __slots__ = ("_at_gate", "_entering", "_running", "engine", "interruptions")

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.interruptions = 0  # of the run, up to where replay stands
        self._entering: list[StepCall] = []
        self._running: dict[str, Attempt] = {}
        self._at_gate = False  # the host will call when a callback may be entered

    @property
    def busy(self) -> bool:
        """Whether a callback is inside whose result counts, or is to be entered now."""
        return bool(self._running or self._entering)

    def take_up(self, call: StepCall, tries: Tries) -> None:
        """The journal holds failed attempts of the step. The options stored with them win over the code's."""
        call.recorded = True
        call.failures = tries.failures
        call.last_attempt = tries.last_attempt
        call.since = tries.since
        call.due = tries.retry_at
        call.options = StepOptions(*msgspec.structs.astuple(tries.config))

    def begin(self, call: StepCall) -> None:
        """run() has opened the step: enter it, or wait for its next attempt."""
        if self.interruptions - call.since >= INTERRUPTIONS_PER_ATTEMPT:
            self._fail_interrupted(call)
        elif call.due:
            self.engine.waits.add(call.key, call.due)
        else:
            self._entering.append(call)

    def again(self, call: StepCall) -> None:
        """The wait for the next attempt is over."""
        self._entering.append(call)
        self.enter()

    def enter(self) -> None:
        """Enter the callbacks that wait for it, if every gate is open."""
        engine, host = self.engine, self.engine.host
        while self._entering and not self._at_gate and engine.may_go_on and not engine.must_wait:
            if not host.may_enter(engine):
                self._at_gate = True
                host.enter_later(engine)
                return
            call = self._entering.pop(0)
            engine.inside += 1
            host.inside += 1
            host.callbacks.inside += 1
            number = call.last_attempt + 1 + self.interruptions - call.since
            self._running[call.key] = Attempt(self, call, number)

    def gate_opens(self) -> None:
        """The host says that callbacks may perhaps be entered again."""
        self._at_gate = False
        self.enter()

    def drop(self, call: StepCall) -> None:
        """run() has cancelled the step."""
        if (attempt := self._running.pop(call.key, None)) is not None:
            attempt.cut()
        elif call in self._entering:
            self._entering.remove(call)

    def stop(self) -> None:
        """Enter nothing more, refuse whatever those inside bring."""
        self._entering.clear()
        for attempt in self._running.values():
            attempt.cut()
        self._running.clear()

    # -- what the attempts report --------------------------------------------------------------------------------------

    def context(self, call: StepCall, number: int) -> StepContext:
        engine, admitted = self.engine, self.engine.admitted
        key = idempotency_key(account=engine.host.account, workflow=admitted.workflow, instance_id=admitted.id,
                              run=engine.run, kind=call.kind.name, name=call.name, occurrence=call.occurrence)
        loop = asyncio.get_running_loop()

        def report(value: bytes) -> None:
            with suppress(RuntimeError):  # a thread that has outlived its pod's loop: nobody is left to hear of it
                loop.call_soon_threadsafe(self._reported, call, number, value)

        return StepContext(name=call.name, count=call.occurrence, attempt=number, idempotency_key=key,
                           instance_id=admitted.id, workflow_name=admitted.workflow, report=report)

    def _reported(self, call: StepCall, number: int, value: bytes) -> None:
        """Of an attempt whose result counts still."""
        attempt = self._running.get(call.key)
        if attempt is not None and attempt.number == number:
            self.engine.report(value, step=call.name, occurrence=call.occurrence, attempt=number)

    def done(self, attempt: Attempt, value: Any) -> None:
        """Encoded and checked before anything sees its effect."""
        call, engine = attempt.call, self.engine
        self._is_out(call.key)
        if call.kind is r.StepKind.CHILD:
            engine.children.created(call)
            return
        what = f"the result of step {call.name!r}"
        try:
            data = encode(value, what=what, limit=engine.host.payload_max)
            result = decode(data, call.result_type, what=what)
        except Exception as error:  # encoders and validators are user code, too  # noqa: BLE001
            self._fail_step(_tried(attempt), describe_exception(error))
        else:
            engine.conclude(call, r.StepDone(
                engine.serial, engine.run, engine.seq + 1, engine.now_ms(), call.kind, call.name, call.occurrence,
                attempt.number, attempt.started_at, data), result)
        engine.turn()

    def raised(self, attempt: Attempt, error: BaseException) -> None:
        self._is_out(attempt.call.key)
        final = FINAL_ERRORS if attempt.call.child is not None else (NonRetryableError, MisuseError)
        retryable = not isinstance(error, final)
        self._failed(_tried(attempt), describe_exception(error), retryable=retryable)

    def timed_out(self, attempt: Attempt) -> None:
        del self._running[attempt.call.key]
        timeout_s = attempt.call.options.timeout_ms / 1000
        failure = r.Failure("TimeoutError", f"the callback took longer than {timeout_s:g} s")
        self._failed(_tried(attempt), failure, timed_out=True)

    def not_entered(self, attempt: Attempt) -> None:
        self._is_out(attempt.call.key)
        self.again(attempt.call)

    def left(self, attempt: Attempt) -> None:
        self._count_out()
        self.engine.callback_left()

    def _is_out(self, key: str) -> None:
        del self._running[key]
        self._count_out()

    def _count_out(self) -> None:
        self.engine.inside -= 1
        self.engine.host.inside -= 1
        self.engine.host.callbacks.inside -= 1

    # -- failed attempts -----------------------------------------------------------------------------------------------

    def _failed(self, tried: Tried, failure: r.Failure, *, retryable: bool = True, timed_out: bool = False) -> None:
        if retryable and tried.call.failures < tried.call.options.limit:
            self._wait_for_next(tried, failure, in_turn=False)
        else:
            self._fail_step(tried, failure, timed_out=timed_out)
            self.engine.turn()

    def _fail_interrupted(self, call: StepCall) -> None:
        """Too many interruptions of an open step count as a failed attempt. Called in a turn, which goes on after it."""
        interruptions = self.interruptions - call.since
        failure = r.Failure(INTERRUPTED_TYPE, f"the pod ended {interruptions} times while the step was open")
        tried = Tried(call, call.last_attempt + interruptions, self.engine.now_ms())
        if call.failures < call.options.limit:
            self._wait_for_next(tried, failure, in_turn=True)
        else:
            self._fail_step(tried, failure)

    def _wait_for_next(self, tried: Tried, failure: r.Failure, *, in_turn: bool) -> None:
        call, engine = tried.call, self.engine
        call.recorded = True
        call.failures += 1
        call.last_attempt = tried.number
        call.since = self.interruptions
        call.due = engine.host.latest_ms() + retry_delay_ms(call.options, call.failures, engine.host.random)
        engine.waits.add(call.key, call.due)
        idle = not in_turn and engine.rests()  # a turn looks at its end whether the instance rests
        engine.record(r.AttemptFailed(
            engine.serial, engine.run, engine.seq + 1, engine.now_ms(), call.kind, call.name, call.occurrence,
            tried.number, tried.started_at, failure, call.due, r.RetryConfig(*call.options), idle))
        if not in_turn:
            engine.rest(idle)

    def _fail_step(self, tried: Tried, failure: r.Failure, *, timed_out: bool = False) -> None:
        call, engine = tried.call, self.engine
        engine.conclude(call, r.StepFailed(
            engine.serial, engine.run, engine.seq + 1, engine.now_ms(), call.kind, call.name, call.occurrence,
            tried.number, tried.started_at, failure, timed_out))


def _tried(attempt: Attempt) -> Tried:
    return Tried(attempt.call, attempt.number, attempt.started_at)
