"""The children of one instance: their creations, and the ends that come for the steps which wait for them.

A child is recorded before it is created (ChildBegun), so every child that may exist stands in the history. Its creation
is an attempt like any callback's, and the same one in every repeat. Its end is an outcome that comes from outside, and is
recorded whether the instance is in memory, asleep or paused.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from toque.errors import DeterminismError, InstanceExists, UnknownWorkflow, UsageError
from toque.storage import records as r
from toque.storage.family import Parent, child_id, child_nonce
from toque.storage.fold import step_key
from toque.workers.host import ChildCreation
from toque.workers.replay import Recorded, Replay, describe_key, mismatch, recorded_value
from toque.workflow import Child, Retention, Retries, resolve_options

if TYPE_CHECKING:
    from toque.workers.engine import Engine
    from toque.workers.host import Host
    from toque.workers.step_call import StepCall

CHILD_KINDS = (r.StepKind.START, r.StepKind.CHILD)
OPTIONS = resolve_options(Retries(limit=10_000, delay="1 second", cap="1 minute"), "1 minute")
FINAL_ERRORS = (UsageError, InstanceExists, UnknownWorkflow)  # the same creation would meet them again


class ChildEnd(NamedTuple):
    """The end of a child on its way to its parent's run. `output` is msgpack."""

    run: int  # of the parent
    name: str  # of the step
    occurrence: int
    nonce: str  # of the child's creation
    child_run: int
    status: r.Status
    output: bytes
    failure: r.Failure | None


class Children:
    """See the module."""

    __slots__ = ("_ended", "_engine", "_replay")

    def __init__(self, engine: Engine, replay: Replay) -> None:
        self._engine: Engine | None = engine
        self._replay: Replay | None = replay  # until run() has got everything recorded
        self._ended: set[str] = set()  # steps whose outcome came since; run() may not have got it yet

    def close(self) -> None:
        """The engine has left memory."""
        self._engine = self._replay = None

    # -- creations -----------------------------------------------------------------------------------------------------

    def prepare(self, call: StepCall, workflow: str, instance_id: str | None, params: Any, params_type: Any,
                retention: Retention | None) -> None:
        """Make a step one that creates a child."""
        engine = self._engine
        if engine is None:
            return  # its run() goes on behind its end; nothing comes of the call
        admitted, account = engine.admitted, engine.host.account
        parent = Parent(admitted.workflow, admitted.id, engine.run, call.kind, call.occurrence, call.name)
        call.child = ChildCreation(
            workflow, instance_id or child_id(account, admitted, engine.run, call.key), params, params_type, retention,
            child_nonce(account, admitted, engine.run, call.key), parent.text(), instance_id is not None)
        call.fn, call.args, call.options = _create, (engine.host, call.child), OPTIONS

    def begin(self, call: StepCall) -> bool:
        """run() has opened the step. True when it is to be created, after what is recorded so far is accepted."""
        engine, child = self._engine, call.child
        assert engine is not None and child is not None
        if call.created:
            engine.waits.add(call.key, call.due)
        elif not call.recorded:
            call.recorded = True
            engine.record(r.ChildBegun(engine.serial, engine.run, engine.seq + 1, engine.now_ms(), call.kind, call.name,
                                       call.occurrence, child.workflow, child.id))
        return not call.created

    def created(self, call: StepCall) -> None:
        """The creation is acknowledged: wait for the end."""
        engine = self._engine
        assert engine is not None
        call.created = True
        call.due = engine.host.latest_ms() + call.duration_ms
        engine.waits.add(call.key, call.due)
        idle = engine.rests()
        engine.record(r.ChildCreated(engine.serial, engine.run, engine.seq + 1, engine.now_ms(), call.name,
                                     call.occurrence, call.due, idle))
        engine.rest(idle)

    def check(self, call: StepCall, begun: r.ChildBegun) -> None:
        """The open step must be for the child that is recorded. Raises DeterminismError."""
        child = call.child
        assert self._engine is not None and child is not None
        if (child.workflow, child.id) != (begun.workflow, begun.id):
            raise mismatch(self._engine.title, f"{describe_key(call.key)} for the child {begun.workflow}/{begun.id}",
                           f"one for {child.workflow}/{child.id}")

    def taken_up(self) -> None:
        """run() has got everything recorded: what comes from here on is for its open steps."""
        self._replay = None

    # -- ends ----------------------------------------------------------------------------------------------------------

    def end(self, end: ChildEnd) -> asyncio.Future[None]:
        """The end of a child: recorded, if the step still waits for it. Done when everything recorded is accepted.

        The end of another run's child, of another creation's or of one whose end came before changes nothing.
        """
        engine = self._engine
        assert engine is not None, "a child's end for an engine that has left memory"
        key = step_key(r.StepKind.CHILD, end.name, end.occurrence)
        nonce = child_nonce(engine.host.account, engine.admitted, engine.run, key)
        if end.run == engine.run and end.nonce == nonce:
            self._take(engine, key, r.ChildEnded(
                engine.serial, engine.run, engine.seq + 1, engine.now_ms(), end.name, end.occurrence, end.child_run,
                end.status, end.output, end.failure))
        return engine.events.when_recorded(engine.recorded)

    def _take(self, engine: Engine, key: str, record: r.ChildEnded) -> None:
        if self._replay is not None:
            if key not in self._replay.children:
                return
            engine.record(record)
            self._replay.take(record)
        elif not self._hand_in(engine, key, record):
            return
        if engine.called:
            engine.call()
        elif engine.is_started and engine.may_go_on:
            engine.turn()

    def _hand_in(self, engine: Engine, key: str, record: r.ChildEnded) -> bool:
        """False when run() has cancelled the step, or has its outcome."""
        call = engine.open_call(key)
        if call is None or key in self._ended:
            return False
        self._ended.add(key)
        engine.stop_step(call)
        try:
            value = recorded_value(call, Recorded(key, record, 0))
        except DeterminismError as error:
            engine.record(record)
            engine.hold(f"code: {error}")
            return False
        engine.conclude(call, record, value)
        return True

    def time_out(self, call: StepCall) -> None:
        """The child has not ended in time; it goes on, but its end is not for this step any more."""
        engine = self._engine
        assert engine is not None
        failure = r.Failure("TimeoutError", "the child did not end in time")
        engine.conclude(call, r.StepFailed(engine.serial, engine.run, engine.seq + 1, engine.now_ms(), call.kind,
                                           call.name, call.occurrence, 0, call.started_at, failure, True))
        engine.turn()


async def _create(host: Host, creation: ChildCreation) -> Child:
    await host.create_child(creation)
    return Child(creation.workflow, creation.id)
