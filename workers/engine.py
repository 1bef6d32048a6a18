"""The Engine: executes one instance. It replays run(), memoises steps, retries, sleeps, and records every outcome.

Commit before consequence (protocol rule 18): run() may go on with a result whose record is only pending, but no callback
is entered, no slot given back and no end made known before every earlier record of the instance is accepted. All gates
are read after that wait, with no await before the entry.

The engine lives in callbacks of the pod's loop. A *turn* hands out recorded outcomes one by one, lets run() go on after
each until nothing of it is ready, and then begins the steps that run() has opened. Attempts and waits have modules of
their own.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, cast

from toque._payload import decode_params, describe_exception
from toque.errors import DeterminismError, MisuseError
from toque.storage import records as r
from toque.workers.attempts import Attempts
from toque.workers.children import CHILD_KINDS, Children
from toque.workers.events import Events
from toque.workers.host import Host
from toque.workers.instance_loop import InstanceLoop, explain
from toque.workers.progress import Progress, Report
from toque.workers.replay import (
    Outcome,
    Recorded,
    Replay,
    describe_calls,
    describe_key,
    mismatch,
    outcome_error,
    recorded_value,
)
from toque.workers.run_end import run_end
from toque.workers.step_call import RunStep, StepCall, StepDecorator
from toque.workers.waits import Waits
from toque.workflow import Step, Workflow, WorkflowEvent, keep, params_type, workflow_name

NEAR_MS = 1000  # a wait that ends so soon keeps its slot (protocol rule 9)
BLOCKED_LENGTH_MAX = 2_000
INTERRUPTIONS_MAX = 10  # so many without progress park the instance
ROUNDS_MAX = 256  # outcomes that one turn makes by itself, of buffered events say; the rest when these are accepted


class Engine:
    """One instance in memory. Made by its SousChef; see the module for its rules."""

    __slots__ = ("__weakref__", "_attempts", "_binding", "_blocked_before", "_cancelled", "_main", "_new", "_open",
                 "_outcomes", "_pause_number", "_paused_number", "_replay", "_replaying", "_unawaited", "_wary",
                 "admitted", "admitting", "blocked", "children", "closed", "end", "ended", "events", "flow", "has_slot",
                 "host", "inside", "leaving", "loop", "paused", "pausing", "progress", "recorded", "resting", "run",
                 "seq", "serial", "starts_when_accepted", "threads_inside", "unaccepted", "waits")

    def __init__(self, host: Host, flow: type[Workflow[Any, Any]], serial: int, replay: Replay) -> None:
        assert replay.admitted is not None
        self.host = host
        self.flow = flow
        self.serial = serial
        self.admitted = replay.admitted
        self.run = replay.run
        self.seq = replay.seq
        self.admitting = False  # its creation is not accepted yet: run() waits, and nobody may hear of it
        self.unaccepted = 0  # records that are pending or in flight
        self.inside = 0  # callbacks that have been entered and not left, those whose result is refused too
        self.threads_inside = 0  # of those: in threads
        self.has_slot = False  # kept by the station
        self.closed = False  # it has left memory: nothing it does counts
        self.ended = False  # the terminal record is written (pending or accepted)
        self.leaving = 0  # kept by the station: the group to be folded before it leaves memory
        self.end: r.Ended | None = None  # the terminal record
        self.blocked = ""  # why it is held, when its code does not fit its history
        self.pausing = replay.pausing  # somebody asked for a pause: nothing is entered, fired or handed out
        self.paused = replay.paused  # the record that says so is written
        self._pause_number = self._paused_number = 0  # which records made here asked for it, and made it; 0 = none
        self.starts_when_accepted = False  # it has a slot, and waits for its last record
        self.resting = False  # only far timers are left, and the record that says so is written
        self.loop = InstanceLoop()  # type: ignore[abstract]  # what is missing is refused at run time
        self.waits = Waits(host, self._wait_over)
        self.events = Events(self, replay)
        self.children = Children(self, replay)
        self._attempts = Attempts(self)
        self.recorded = 0  # records that were made since it was loaded
        self._binding = 0  # the last of them that consequences wait for: an event that came has none by itself
        self._replay: Replay | None = replay  # until run() is entered
        self._replaying = False  # run() does not stand behind the last recorded outcome yet
        self.progress: Progress | None = None
        self._blocked_before = replay.blocked_on  # why it is held, as the journal has it
        self._wary = False  # interrupted here: results are handed out only after their acceptance (rule 18)
        self._main: asyncio.Task[Any] | None = None
        self._open: dict[str, StepCall] = {}
        self._new: list[StepCall] = []  # opened in this turn
        self._outcomes: list[tuple[StepCall, Outcome, Any]] = []  # recorded, and not handed out yet
        self._cancelled: dict[str, StepCall] | None = None  # during the replay: what run() has cancelled
        self._unawaited: dict[StepCall | StepDecorator, None] = {}  # done, and nobody has looked at them

    @property
    def title(self) -> str:
        return f"{self.admitted.workflow}/{self.admitted.id}"

    @property
    def may_go_on(self) -> bool:
        """False when it has ended, is held or paused, or has left memory."""
        return not (self.ended or self.closed or self.blocked or self.pausing)

    @property
    def over(self) -> bool:
        """Nothing more comes of it in memory: it leaves as soon as what it wrote is folded."""
        return self.ended or self.closed or self.paused or bool(self.blocked)

    @property
    def may_start(self) -> bool:
        """It was read back, and waits for a slot."""
        return self._replay is not None and self.may_go_on and not self.admitting

    @property
    def wake_at(self) -> int:
        """When the soonest wait ends; 0 without one."""
        return self.waits.soonest

    @property
    def called(self) -> bool:
        """It rests, and an event is there that an open wait of it can take, or the end of a child."""
        resting = self.resting if self._replay is None else self._replay.resting
        ended = self.handing_out if self._replay is None else self._replay.called
        return resting and self.may_go_on and (ended or self.events.matchable)

    @property
    def must_wait(self) -> bool:
        """Whether a record is not accepted that consequences wait for (protocol rule 18)."""
        return self.accepted_to < self._binding

    @property
    def accepted_to(self) -> int:
        """So many of the records made here are accepted."""
        return self.recorded - self.unaccepted

    @property
    def accepted_status(self) -> r.Status:
        """Of a live instance: how it stands by the records that are accepted, whatever follows them."""
        if self.paused and self._paused_number <= self.accepted_to:
            return r.Status.PAUSED
        if self.pausing and self._pause_number <= self.accepted_to:
            return r.Status.WAITING_FOR_PAUSE
        return r.Status.RUNNING

    @property
    def handing_out(self) -> bool:
        """Outcomes are recorded that run() has not got yet."""
        return bool(self._outcomes)

    def now_ms(self) -> int:
        return self.host.now_ms()

    # -- the station's calls -------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Record the creation; run() is entered after its acceptance."""
        self.admitting = True
        self.record(self.admitted)

    def start(self) -> None:
        """Enter run() and hand out again what is recorded. Call it when everything recorded so far is accepted."""
        replay, self._replay = self._replay, None
        if replay is None or not self.may_go_on:
            return
        if replay.resting:
            self._woken()
        left = len(replay.outcomes)
        try:
            self._cancelled = {}
            self._replaying = left > 0
            self.loop.drain(self._enter_run)
            for recorded in replay.outcomes:
                self._replaying = left > 1
                self._hand_out_again(recorded)
                left -= 1
            self._check_begun(replay)
        except DeterminismError as error:
            self.hold(f"code: {error}")
        except BaseException as error:  # user code: __init__, validators, sys.exit() in run()  # noqa: BLE001
            self._failed_in_replay(error, [recorded.key for recorded in replay.outcomes[-left:]] if left else replay.begun)
        else:
            self._take_up(replay)
            self.turn()

    def wake(self) -> None:
        """It has a slot again: take the events that came, fire what is due."""
        if self.resting:
            self._woken()
            self.rest(False)
            if self._outcomes:
                self.turn()
            self.events.go_on()

    def call(self) -> None:
        """Something came for it while it rests: go on, as soon as it has a slot."""
        if self.has_slot and self.is_started:
            self.wake()
        else:
            self.host.engine_called(self)

    def terminate(self, request: str = "", *, children: bool = False) -> None:
        """End it here and now, its `children` a little later. No callback is entered from this call on."""
        self._end(r.Status.TERMINATED, request=request, children=children)

    def pause(self, request: str) -> None:
        """Enter nothing more. Callbacks that are inside finish; the record of the pause follows when they have left."""
        if self.pausing or self.paused:
            return
        self.pausing = True
        self._pause_number = self.recorded + 1
        self.waits.disarm()
        if self.inside:
            self.record(r.PauseAsked(self.serial, self.run, self.seq + 1, self.now_ms(), request))
        else:
            self._pause_now(request)

    def resume(self, request: str) -> None:
        """Take back a pause that is only asked for: what waited for it goes on when this is accepted."""
        self.pausing = False
        self.record(r.Resumed(self.serial, self.run, self.seq + 1, self.now_ms(), request, 0))
        if self.waits:
            self.waits.arm()

    def resumed(self, request: str, shift_ms: int) -> None:
        """Record the end of a pause. The engine has to leave memory then, for its timers have moved."""
        self.record(r.Resumed(self.serial, self.run, self.seq + 1, self.now_ms(), request, shift_ms))
        self.cut()

    def restart(self, request: str, version: str, from_key: str) -> None:
        """Cut whatever runs, and begin another run. The engine has to leave memory then."""
        self.cut()
        self.ended = False
        self.run += 1
        self.record(r.Restarted(self.serial, self.run, 1, self.now_ms(), request, version, from_key))

    def _pause_now(self, request: str = "") -> None:
        self.paused = True
        self._paused_number = self.recorded + 1
        self.record(r.Paused(self.serial, self.run, self.seq + 1, self.now_ms(), request))

    def start_when_accepted(self) -> None:
        """It has its slot: `start`, as soon as everything recorded so far is accepted."""
        if self.must_wait:
            self.starts_when_accepted = True
        else:
            self.start()

    @property
    def is_started(self) -> bool:
        """Whether run() was entered since it was loaded."""
        return self._replay is None

    def accepted(self) -> None:
        """One more of its records is accepted (see `Listener`)."""
        self.unaccepted -= 1
        self.events.tell(self.accepted_to)
        if not self.must_wait and not self.closed:
            self._all_accepted()

    def enter(self) -> None:
        """Enter the callbacks that wait for it, if every gate is open."""
        if not self.closed:
            self._attempts.gate_opens()

    def hold(self, reason: str) -> None:
        """Hold the instance: the journal keeps why, once, and loading it again tries again."""
        reason = reason[:BLOCKED_LENGTH_MAX]  # it may carry texts of the user's own
        self.blocked = reason
        self._stop()
        if reason != self._blocked_before:
            self.record(r.Blocked(self.serial, self.run, self.seq + 1, self.now_ms(), reason))
        self.host.engine_blocked(self, reason)
        self.settle()

    def cut(self) -> None:
        """Stop every attempt; whatever they still bring is refused. The engine is closed from here on."""
        if not self.closed:
            self.closed = True
            self._stop()
            self.loop.unwind()
            self._main = None
            self.waits.close()
            self.events.close()
            self.children.close()
            del self._attempts  # what refers back to the engine, so that it is freed at once

    # -- run()'s calls -------------------------------------------------------------------------------------------------

    def call_opened(self, call: StepCall) -> None:
        if not self.closed:
            call.since = self._attempts.interruptions
            self._open[call.key] = call
            self._new.append(call)

    def call_awaited(self, call: StepCall | StepDecorator) -> None:
        """run() looks at a step that was done already, or gives a decorator its function."""
        self._unawaited.pop(call, None)

    def decorator_made(self, decorator: StepDecorator) -> None:
        self._unawaited[decorator] = None

    def call_cancelled(self, call: StepCall) -> None:
        """run() has cancelled the step: nothing more comes of it."""
        if self.closed or self._open.pop(call.key, None) is None:
            return
        if self._cancelled is not None:
            self._cancelled[call.key] = call
        self.events.drop(call)
        self.stop_step(call)
        if call.recorded:
            self._record_cancelled(call)

    def open_call(self, key: str) -> StepCall | None:
        """The step of this identity, if run() has it open."""
        return self._open.get(key)

    def stop_step(self, call: StepCall) -> None:
        """Neither its wait nor its attempt counts any more."""
        self.waits.drop(call.key)
        self._attempts.drop(call)

    def _record_cancelled(self, call: StepCall) -> None:
        self.record(r.StepCancelled(self.serial, self.run, self.seq + 1, self.now_ms(), call.kind, call.name,
                                    call.occurrence))

    # -- progress ------------------------------------------------------------------------------------------------------

    def report(self, value: bytes, *, step: str = "", occurrence: int = 0, attempt: int = 0) -> None:
        """Keep it, in place of what was reported before."""
        if self.closed or self.ended:
            return
        if self.progress is None:
            self.progress = Progress()
        report = Report(self.host.progressed(self), self.now_ms(), value, step, occurrence, attempt)
        self.progress.add(report, behind=self._binding, accepted_to=self.accepted_to)

    def _run_reports(self, value: bytes) -> None:
        """What run() reported before a recorded outcome is old by now, or was told already."""
        if not self._replaying:
            self.report(value)

    # -- replay --------------------------------------------------------------------------------------------------------

    def _enter_run(self) -> None:
        admitted = self.admitted
        params = decode_params(admitted.params, admitted.content_type, params_type(self.flow),
                               what=f"the params of {self.title}")
        event: WorkflowEvent[Any] = WorkflowEvent(
            payload=params, timestamp=datetime.fromtimestamp(admitted.created_at / 1000, UTC),
            instance_id=admitted.id, workflow_name=workflow_name(self.flow))
        flow = self.flow()
        flow.env = self.host.env
        flow._report = self._run_reports
        self._main = self.loop.create_task(flow.run(event, cast(Step, RunStep(self))))

    def _hand_out_again(self, recorded: Recorded) -> None:
        self._attempts.interruptions = recorded.interruptions
        call = self._open.pop(recorded.key, None)
        if call is not None:
            self._give(call, recorded.outcome, recorded_value(call, recorded))
        elif self._cancelled is None or recorded.key not in self._cancelled:
            raise mismatch(self.title, f"the outcome of {describe_key(recorded.key)}", self._place())

    def _check_begun(self, replay: Replay) -> None:
        """Every step that has records must be open now, or run() has cancelled it. Raises DeterminismError."""
        for key in replay.begun:
            if key not in self._open and key not in (self._cancelled or ()):
                raise mismatch(self.title, f"records of {describe_key(key)}, which has not ended", self._place())
        for key, begun in replay.children.items():
            if key in self._open:
                self.children.check(self._open[key], begun)
        for key, wait in replay.awaiting.items():
            if key in self._open and self._open[key].event_type != wait.type:
                raise mismatch(self.title, f"{describe_key(key)} for events of type {wait.type!r}",
                               f"one for type {self._open[key].event_type!r}")

    def _place(self) -> str:
        """Where run() is, for people."""
        if self._open:
            return describe_calls(self._open.values())
        main = self._main
        if main is None or not main.done() or main.cancelled() or main.exception() is None:
            return "the end of run()"
        return f"the end of run(), which raised {type(main.exception()).__name__}"

    def _failed_in_replay(self, error: BaseException, expected: list[str]) -> None:
        """run() could not even be entered, or broke its loop: by changed code, if the journal knows how it went on."""
        if expected:
            changed = mismatch(self.title, f"records of {describe_key(expected[0])}", f"an error: {type(error).__name__}")
            self.hold(f"code: {changed}")
        else:
            self._end(r.Status.ERRORED, failure=describe_exception(explain(error)))

    def _take_up(self, replay: Replay) -> None:
        """The replay is over: what the journal says of open steps counts from here on."""
        cancelled, self._cancelled = self._cancelled or {}, None
        self._attempts.interruptions = replay.interruptions
        self._wary = replay.stuck
        for key, tries in replay.tries.items():
            if key in self._open:
                self._attempts.take_up(self._open[key], tries)
        for key, due in replay.sleeping.items():
            if key in self._open:
                self._open[key].due = due
                self._open[key].recorded = True
                self._open[key].created = key in replay.children
        for key, begun in replay.children.items():
            if key in self._open:
                self._open[key].recorded = True
                self._open[key].started_at = begun.at
        for key, wait in replay.awaiting.items():
            if key in self._open:
                self._open[key].started_at = wait.at
        self.children.taken_up()
        if self._blocked_before:
            self._blocked_before = ""
            self._woken()
        for key in replay.begun:
            if key in cancelled:
                self._record_cancelled(cancelled[key])

    # -- turns ---------------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Hand out what is recorded, let run() go on until it waits for steps, begin those that it has opened.

        And again, as long as that brings outcomes by itself: a step that fails at its beginning, an event that was there.
        """
        if self.pausing:
            self.settle()
            return
        for _ in range(ROUNDS_MAX):
            if not self._hand_out():
                return
            assert self._main is not None
            if self._main.done():
                self._end(*run_end(self._main, self.flow, title=self.title, limit=self.host.payload_max,
                                   still_open=self._open.values(), unawaited=self._unawaited))
                return
            if not self._open:
                self._end(r.Status.ERRORED, failure=describe_exception(MisuseError(
                    "run() waits for something that no step will bring. Await only steps inside run()")))
                return
            self._begin()
            if not self._outcomes or self._wary:
                self._attempts.enter()
                return

    def _hand_out(self) -> bool:
        """False when user code broke the loop: then it has ended."""
        try:
            while self._outcomes and not (self._wary and self.must_wait):
                call, outcome, value = self._outcomes.pop(0)
                if self._open.pop(call.key, None) is not None:  # else run() has cancelled it meanwhile
                    self._give(call, outcome, value)
        except BaseException as error:  # user code: sys.exit() in run(), a callback of its own, spinning  # noqa: BLE001
            self._end(r.Status.ERRORED, failure=describe_exception(explain(error)))
            return False
        return True

    def conclude(self, call: StepCall, outcome: Outcome, value: Any = None) -> None:
        """Record a step's outcome; the next turn hands it to run()."""
        self.record(outcome)
        self._outcomes.append((call, outcome, value))

    def _give(self, call: StepCall, outcome: Outcome, value: Any) -> None:
        if call.done():  # run() itself has set it
            return
        if not call.awaited:
            self._unawaited[call] = None
        if type(outcome) is not r.StepDone and (error := outcome_error(call, outcome)) is not None:
            self.loop.drain(call.set_exception, error)
        else:
            self.loop.drain(call.set_result, value)

    def _begin(self) -> None:
        new, self._new = self._new, []
        unstarted: list[StepCall] = []
        for call in new:
            if call.key not in self._open:  # run() has cancelled it in the same turn
                continue
            if call.kind is r.StepKind.DO:
                self._attempts.begin(call)
            elif call.kind in CHILD_KINDS:
                if self.children.begin(call):
                    self._attempts.begin(call)
            elif call.recorded:
                self.waits.add(call.key, call.due)
            else:
                unstarted.append(call)
            if call.kind is r.StepKind.EVENT:
                self.events.wait(call)
        matched = self.events.match()
        if matched in unstarted:
            unstarted.remove(matched)
        if unstarted:
            self._start_waits(unstarted)
        elif self.waits:
            self.rest_or_arm()

    # -- waits and rest ------------------------------------------------------------------------------------------------

    def _start_waits(self, calls: list[StepCall]) -> None:
        now = self.now_ms()
        for call in calls:
            call.due = call.due or self.host.latest_ms() + call.duration_ms
            call.started_at = now
            call.recorded = True
            self.waits.add(call.key, call.due)
        idle = self.rests()
        for call in calls:
            last = idle and call is calls[-1]
            place = (self.serial, self.run, self.seq + 1, now, call.name, call.occurrence)
            self.record(r.SleepStarted(*place, call.due, last) if call.kind is r.StepKind.SLEEP
                        else r.WaitStarted(*place, call.event_type, call.due, last))
        self.rest(idle)

    def rest_or_arm(self) -> None:
        """Something has changed while waits are open: record it when nothing else is left, else see that they fire."""
        if not self.resting:
            idle = self.rests()
            if idle:
                self.record(r.Waiting(self.serial, self.run, self.seq + 1, self.now_ms()))
            self.rest(idle)

    def rests(self) -> bool:
        """Nothing but far timers is left."""
        if self.inside or self._outcomes or self._attempts.busy or self.events.overdue or not self.waits:
            return False
        return self.waits.soonest - self.now_ms() > NEAR_MS

    def rest(self, idle: bool) -> None:
        """`idle`: the last record says that it rests. Its slot goes back when that is accepted; its station wakes it."""
        self.resting = idle
        if idle or self.pausing:
            self.waits.disarm()
        else:
            self.waits.arm()

    def _woken(self) -> None:
        self.record(r.Woken(self.serial, self.run, self.seq + 1, self.now_ms()))

    def _wait_over(self, key: str) -> None:
        call = self._open[key]
        if call.created:
            self.children.time_out(call)
        elif call.fn is not None:
            self._attempts.again(call)
            self.waits.arm()
        elif call.kind is r.StepKind.EVENT:
            self.events.overdue.add(key)
            self.waits.arm()
            self.host.before_time_out(self, lambda: self.events.time_out(call))
        else:
            self.conclude(call, r.SleepDone(self.serial, self.run, self.seq + 1, self.now_ms(), call.name,
                                            call.occurrence))
            self.turn()

    # -- acceptance ----------------------------------------------------------------------------------------------------

    def record(self, record: r.Record) -> None:
        """Put it into the pending group. Its sequence number must be the next one."""
        self.seq = record.seq
        self.unaccepted += 1
        self.recorded += 1
        if type(record) is not r.EventReceived:
            self._binding = self.recorded
        self.host.commit(record, self)

    def callback_left(self) -> None:
        """A callback whose result was refused is not inside any more; its slot may be free now."""
        if self.may_go_on and self.waits:
            self.rest_or_arm()
        self.settle()

    def _all_accepted(self) -> None:
        if self.ended:
            self.host.engine_ended(self)
        elif self.admitting:
            self.admitting = False
            if self.has_slot:
                self.start()
            else:
                self.host.engine_called(self)
        elif self.starts_when_accepted:
            self.starts_when_accepted = False
            self.start()
        elif self._outcomes and not self.resting:
            self._wary = False
            self.turn()
        else:
            self.events.go_on()  # one may have come during a pause that was taken back
            self._attempts.enter()
        self.settle()

    def settle(self) -> None:
        """The slot goes back when nothing is left to do, nothing is inside, and everything is accepted."""
        if self.closed or self.must_wait or self.inside:
            return
        if self.pausing and not self.over:
            self._pause_now()
        elif self.ended or self.blocked or self.paused:
            self.host.engine_left(self)
        elif self.resting or not self.is_started:
            self.host.engine_rests(self)
        else:
            self.host.engine_idle(self)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _end(self, status: r.Status, output: bytes = b"", failure: r.Failure | None = None, request: str = "",
             children: bool = False) -> None:
        if self.ended or self.closed:
            return
        self.ended = True
        self._stop()
        now = self.now_ms()
        keep_ms = keep(self.flow, self.admitted.retention)[status is not r.Status.COMPLETE]
        self.end = r.Ended(self.serial, self.run, self.seq + 1, now, status, output, failure, now + keep_ms, request,
                           children)
        self.record(self.end)

    def _stop(self) -> None:
        """Nothing is entered, fired or handed out from here on."""
        self.waits.disarm()
        self._attempts.stop()
        self._outcomes.clear()
