"""A crash after each record in turn changes nothing: same output, same order of events, no checkpointed callback again.

Each workflow is played once without faults, to count the records of its instance, and then once for every record with the
owner killed at that very point, while another pod goes on. Every record is a group of its own here, so that there is a
point behind each: where a group ends is a matter of time alone.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from example_flows import EXAMPLES as WRITTEN
from example_flows import PARAMS, CaughtFailure, GatherEqualNames, Grouped, Retried, Sequential
from steered_flows import PATIENCE, TOLD, Script, Told, nothing

from toque.client import Instance
from toque.errors import InstanceErrored
from toque.sim.checks import check_all, check_chains, check_folds
from toque.sim.world import World, account, play
from toque.storage import records as r
from toque.storage.group_commit import GroupCommit
from toque.storage.journal import decode_group
from toque.storage.ports import Message
from toque.workflow import StepContext, Workflow, idempotency_key, workflow_name

EXAMPLES = Path(__file__).parents[2] / "examples"
SENT, STORED, HEARD = "sent", "stored", "heard"  # what has become of the group when its owner is killed
MOMENTS = {SENT: "right before it is accepted", STORED: "accepted, and nobody knows", HEARD: "its consequences have begun"}
PLAYED = (Sequential, GatherEqualNames, Grouped, Retried, CaughtFailure)  # the others take days
FLOWS = [Told(one.flow, nothing, one.output, one.same_order) for one in WRITTEN if one.flow in PLAYED] + TOLD


class Recorder:
    """The `env` of the workflows: their callbacks report to the world's history."""

    def __init__(self, world: World) -> None:
        self._history = world.history

    async def work(self, ctx: StepContext, value: Any = None, seconds: float = 0.0) -> Any:
        with self._history.inside(ctx):
            await asyncio.sleep(seconds)
            return value

    async def fail(self, ctx: StepContext, times: int, value: Any = None, seconds: float = 0.0) -> Any:
        with self._history.inside(ctx):
            entry = sum(visit.count == ctx.count for visit in self._history.entered(ctx.instance_id, ctx.name))
            await asyncio.sleep(seconds)
            if entry <= times:
                raise ConnectionError(f"failure {entry}")
            return value


class Killer:
    """Kills the owner at the `number`-th record of the instance, at a moment of its group; 0 = never."""

    def __init__(self, world: World, number: int = 0, moment: str = "") -> None:
        self._world = world
        self._number = number
        self._moment = moment
        self.killed = False
        self.records: dict[tuple[int, int, int], int] = {}  # (serial, run, seq) → which one it is, from 1
        world.journal_watchers.append(lambda message: self._stored(message))

    def _stored(self, message: Message) -> None:
        self.reached(decode_group(message)[0], STORED)

    def reached(self, record: r.Record, moment: str) -> bool:
        """Kill the owner if this is the place."""
        key = (record.serial, record.run, record.seq)
        if not record.serial or self.killed:
            return False
        number = self.records.setdefault(key, len(self.records) + 1)
        self.killed = (number, moment) == (self._number, self._moment)
        if self.killed:
            self._world.owner(self._world.stations()[0]).kill()
        return self.killed


@pytest.fixture
def killers(monkeypatch: pytest.MonkeyPatch) -> list[Killer]:
    """Each record becomes a group of its own, and the last killer in the list sees every group at its moments."""
    found: list[Killer] = []
    append, deliver, take = GroupCommit._append, GroupCommit._deliver, GroupCommit._take

    async def watched_append(self: GroupCommit, header: Any, body: bytes, batch: Any) -> None:
        if found[-1].reached(batch[0][1], SENT):
            await asyncio.Event().wait()  # its process is dead
        await append(self, header, body, batch)

    def watched_deliver(self: GroupCommit, batch: Any) -> None:
        deliver(self, batch)
        found[-1].reached(batch[0][1], HEARD)

    def take_one(self: GroupCommit) -> Any:
        rest, self._pending = self._pending[1:], self._pending[:1]
        batch = take(self)
        self._pending = rest
        return batch

    monkeypatch.setattr(GroupCommit, "_append", watched_append)
    monkeypatch.setattr(GroupCommit, "_deliver", watched_deliver)
    monkeypatch.setattr(GroupCommit, "_take", take_one)
    return found


@dataclass(frozen=True)
class Case:
    """What is played: a workflow with its params, what it is told, and the `env` of its pods."""

    name: str
    flow: Callable[[World], type[Workflow[Any, Any]]]
    params: Any
    script: Script
    output: Any
    env: Callable[[World], Any]
    same_order: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass
class Played:
    """What came of one run."""

    output: Any
    records: int
    killed: bool
    outcomes: list[tuple[str, str, int]] = field(default_factory=list)  # of the instance's steps, in order
    events: list[tuple[str, bytes]] = field(default_factory=list)  # those given out, in order: their types and payloads


def run_case(case: Case, killers: list[Killer], *, number: int = 0, moment: str = "") -> Played:
    """One run, with the checks that hold for every one."""

    async def story(world: World) -> Played:
        killer = Killer(world, number, moment)
        killers.append(killer)
        app, env = world.app(case.flow(world)), case.env(world)
        await world.start_pod("a", app, env=env)
        await world.start_pod("b", app, env=env)
        await world.all_owned()
        (workflow,) = app.workflows
        handle = await world.client().create(workflow, case.params, id="one", timeout=PATIENCE)
        await case.script(handle)
        output = await _end(handle)
        await world.all_owned()
        await world.quiet()
        _check(world, workflow)
        return Played(output, len(killer.records), killer.killed, _outcomes(world), _given_out(world))

    return play(story, account=account(stations=1, ttl_s=2))


async def _end(handle: Instance[Any]) -> Any:
    try:
        return await handle.result(timeout="5 minutes")
    except InstanceErrored as error:
        return error.error_type  # its message may count attempts, and the one that was cut is one


def _check(world: World, workflow: str) -> None:
    """E1 by the journal, one chain, folded state == replay; and events: each once, none out of order of its type."""
    if world.records(r.Restarted):  # it ended more than once, and its steps begin anew
        check_chains(world)
        check_folds(world)
    else:
        check_all(world, workflow, ["one"])
    events = world.records(r.EventReceived)
    assert len({(event.run, event.event_id) for event in events}) == len(events), "an event was recorded twice"
    given = [(done.run, done.event) for done in world.records(r.WaitDone)]
    assert len(set(given)) == len(given), "an event was given out twice"


def _outcomes(world: World) -> list[tuple[str, str, int]]:
    kinds = r.StepDone | r.StepFailed | r.SleepDone | r.WaitDone | r.WaitTimedOut
    return [(type(record).__name__, record.name, record.occurrence) for group in world.journal(world.stations()[0])
            for record in group.records if isinstance(record, kinds)]


def _given_out(world: World) -> list[tuple[str, bytes]]:
    came = {(event.run, event.seq): event for event in world.records(r.EventReceived)}
    given = [came[done.run, done.event] for done in world.records(r.WaitDone)]
    return [(event.type, event.payload) for event in given]


def check_crashes(case: Case, killers: list[Killer], moment: str) -> None:
    """A crash at each record: the same output and the same order as without."""
    whole = run_case(case, killers)
    assert whole.output == case.output
    for number in range(1, whole.records + 1):
        played = run_case(case, killers, number=number, moment=moment)
        place = f"killed at record {number} of {whole.records}, {MOMENTS[moment]}"
        assert played.output == whole.output, place
        assert _by_type(played.events) == _by_type(whole.events), place
        if case.same_order:
            assert played.outcomes == whole.outcomes, place
            assert played.events == whole.events, place


def _by_type(events: list[tuple[str, bytes]]) -> dict[str, list[bytes]]:
    return {type_: [payload for other, payload in events if other == type_] for type_, _ in events}


# -- the workflows -----------------------------------------------------------------------------------------------------

def _written(told: Told) -> Case:
    return Case(str(told), lambda world: told.flow, PARAMS, told.script, told.output, Recorder, told.same_order)


def _load(name: str) -> ModuleType:
    """A module of examples/, as `toque dev` loads it."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # msgspec looks its types up there
    spec.loader.exec_module(module)
    return module


HELLO, ORDERS, REFUND = (_load(name) for name in ("hello", "orders", "refund"))


async def answer_refund(handle: Instance[Any]) -> None:
    await handle.send_event("receipt", REFUND.Receipt("A-17", 1250), timeout=PATIENCE)
    await handle.approve("sign off", by="Mo", timeout=PATIENCE)


def _example(name: str, flow: type[Workflow[Any, Any]], params: Any, output: Any, *callbacks: str,
             script: Script = nothing, env: Callable[[World], Any] = Recorder, same_order: bool = True) -> Case:
    """A workflow of examples/, whose methods among `callbacks` report their entries."""

    def reporting(world: World) -> type[Workflow[Any, Any]]:
        methods = {method: _reported(world, getattr(flow, method)) for method in callbacks}
        return type(flow.__name__, (flow,), methods, name=workflow_name(flow))

    return Case(name, reporting, params, script, output, env, same_order)


def _reported(world: World, method: Callable[..., Any]) -> Callable[..., Any]:
    takes_ctx = "ctx" in inspect.signature(method).parameters
    if not inspect.iscoroutinefunction(method):
        def in_thread(self: Any, ctx: StepContext, *args: Any) -> Any:
            with world.history.inside(ctx):
                return method(self, *((ctx,) if takes_ctx else ()), *args)

        return in_thread

    async def callback(self: Any, ctx: StepContext, *args: Any) -> Any:
        with world.history.inside(ctx):
            return await method(self, *((ctx,) if takes_ctx else ()), *args)

    return callback


def _shop(world: World) -> Any:
    return ORDERS.Shop(stock={"knife": 10})


def _key(step: str) -> str:
    return idempotency_key(account="main", workflow="orders", instance_id="one", run=1, kind="DO",
                           name=step, occurrence=1)[:8]


CASES = [
    *map(_written, FLOWS),
    _example("examples/hello", HELLO.Hello, "Ada", "Hello, Ada!"),
    _example("examples/orders", ORDERS.Orders, ORDERS.Order("knife", 2, card="valid"),
             {"payment": f"payment-{_key('pay')}", "parcel": f"parcel-{_key('ship')}"},
             "check_stock", "check_fraud", "pay", env=_shop, same_order=False),
    _example("examples/orders refused", ORDERS.Orders, ORDERS.Order("knife", 2, card="stolen"),
             "toque.errors.StepFailed", "check_stock", "check_fraud", "pay", "tell", env=_shop, same_order=False),
    _example("examples/refund", REFUND.Refund, "Ada", "Ada: 12.50 paid back, approved by Mo", "pay_back",
             script=answer_refund),
    _example("examples/refund unanswered", REFUND.Refund, "Eve", "Eve: no receipt"),
]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_crash_at_any_record_changes_nothing(case: Case, moment: str, killers: list[Killer]) -> None:
    """Closes: the pod dies right before a record is accepted, before it hears of that, or when run() has gone on with it;
    a result is handed to another branch, an event is lost, given twice or out of order, a callback is entered again."""
    check_crashes(case, killers, moment)
