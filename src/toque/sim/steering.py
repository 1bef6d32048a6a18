"""Concurrent clients steer a few instances, while pods and the broker break: create, event, pause, resume, and so on.

    outcome = play_steering(draw_steering(seed=7))
    outcome.broken      # the verdicts that do not hold; `toque.sim.steering_checks` has the model

Faults are drawn as for other plans, but no clock stands still: a process that cannot know that its session is over may
tell what was; and a request comes once and in order, as NATS delivers it. Every call has an id of its own, by which its
records are known in the journal.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import msgspec

from toque._protocol import AccountRecord, Answer, EventRequest, InstanceRequest, InstanceView, RestartRequest
from toque._requests import Deadline, StationAsker
from toque.chaos.verdicts import Verdict
from toque.errors import InstanceExists, ToqueError, Unavailable
from toque.sim import plan as p
from toque.sim.draw import draw_plan
from toque.sim.nemesis import Nemesis, Pods
from toque.sim.play import Outcome
from toque.sim.process import ProcessLoop
from toque.sim.steering_checks import ENDED, NOT_FOUND, SILENCE, Call, counts, judge
from toque.sim.sweep import Result, result_of
from toque.sim.trace import Trace
from toque.sim.world import ACCOUNT, World
from toque.storage.memory_broker import DELAY, DUPLICATE
from toque.storage.memory_bus import MemoryBus
from toque.workflow import Step, StepContext, Workflow, WorkflowEvent

CALLS: Final = 60
IDS: Final = 3
EVENTS: Final = 3  # that an instance waits for, one after the other
CLIENTS: Final = 2
PATIENCE_S: Final = (0.5, 2.0, 6.0)
WEIGHTS: Final = {"create": 6, "event": 8, "status": 8, "pause": 5, "resume": 5, "terminate": 2, "restart": 3, "delete": 2}
LIVENESS_S_MAX: Final = 300.0
POLL_S: Final = 0.25
TYPE: Final = "a"


class Steer(msgspec.Struct, frozen=True):
    """One call of a client."""

    at_s: float
    what: str  # as in WEIGHTS
    workflow: str
    id: str
    patience_s: float
    client: int


class Steering(msgspec.Struct, frozen=True):
    """A whole run: `plan` has the account, the pods and the faults, but no creations."""

    plan: p.Plan
    steers: tuple[Steer, ...]


def draw_steering(seed: int) -> Steering:
    """The run of a seed; always the same one."""
    plan = draw_plan(seed)
    plan = msgspec.structs.replace(plan, creations=(), faults=tuple(filter(_fits, plan.faults)))
    rng = random.Random(f"steering {seed}")
    places = [(rng.choice(plan.shapes).name, f"i{number}") for number in range(1, IDS + 1)]
    steers = []
    for number in range(CALLS):
        what = "create" if number < IDS else rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        workflow, instance = places[number] if number < IDS else rng.choice(places)
        at_s = rng.uniform(0, 1) if number < IDS else rng.uniform(0, plan.safety_s)
        steers.append(Steer(round(at_s, 3), what, workflow, instance, rng.choice(PATIENCE_S), rng.randrange(CLIENTS)))
    return Steering(plan, tuple(steers))


def _fits(fault: p.Fault) -> bool:
    late = fault.subject == "toque.main.station.>" and fault.how in (DELAY, DUPLICATE)
    return fault.kind != p.SUSPEND and not late


def play_steering(steering: Steering) -> Outcome:
    """Run it in a loop of its own, to its end."""
    with asyncio.Runner(loop_factory=lambda: ProcessLoop(steering.plan.seed)) as runner:
        return runner.run(_Play(steering).run())


def steer_seed(seed: int) -> Result:
    """Play the seed's own run."""
    return result_of(play_steering(draw_steering(seed)))


def steered_workflow(world: World, name: str) -> type[Workflow[Any, Any]]:
    """Steps, naps and waits in turn; its output is what it was sent, in order."""

    async def work(ctx: StepContext) -> None:
        with world.history.inside(ctx):
            await asyncio.sleep(0.3)

    class Steered(Workflow[Any, Any], name=name):
        async def run(self, event: WorkflowEvent[Any], step: Step) -> Any:
            got = []
            for _ in range(EVENTS):
                await step.do("work", work)
                got.append(await step.wait_for_event("next", TYPE, timeout=timedelta(days=1)))
                await step.sleep("nap", timedelta(seconds=1.5))
            await step.do("work", work)
            return got

    return Steered


@dataclass
class _Asked:
    """A client: its connection, and who asks for it."""

    bus: MemoryBus
    asker: StationAsker


class _Play:
    """One run."""

    def __init__(self, steering: Steering) -> None:
        self._plan = steering.plan
        self._steers = steering.steers
        self._calls: list[Call] = []
        self._world: World

    async def run(self) -> Outcome:
        plan = self._plan
        record = AccountRecord(name=ACCOUNT, stations=plan.stations, ttl_s=plan.ttl_s, max_concurrent=plan.limit)
        self._world = world = World(plan.seed, account=record, delay_s=(plan.delay_ms[0] / 1000, plan.delay_ms[1] / 1000))
        world.expected = (ToqueError, Exception)  # judged below
        trace = Trace()
        world.on_note = trace.note
        world.on_journal = trace.message
        world.history.on_line = trace.history
        try:
            return await self._play(trace)
        finally:
            world.on_note = lambda text: None
            world.history.on_line = lambda line: None
            await world.close()

    async def _play(self, trace: Trace) -> Outcome:
        plan, world = self._plan, self._world
        began = world.now
        await world.ensure_account()
        names = [shape.name for shape in plan.shapes]
        pods = Pods(world, world.app(*(steered_workflow(world, name) for name in names)), plan)
        self._clients = [self._client(f"client-{number}") for number in range(CLIENTS)]
        nemesis = Nemesis(world, pods, plan, [client.bus for client in self._clients])
        tasks = [asyncio.ensure_future(self._steer(steer)) for steer in self._steers]
        await asyncio.sleep(plan.safety_s)
        trace.note("faults end")
        await nemesis.end()
        await asyncio.gather(*tasks)
        alive = await self._liveness()
        for task in pods.tasks:
            task.cancel()
        judged = [alive, *judge(world, self._calls)]
        return Outcome(plan, judged, trace.digest, list(trace.lines), nemesis.counts + counts(world, self._calls),
                       world.now - began)

    def _client(self, name: str) -> _Asked:
        world = self._world
        bus = MemoryBus(world.broker, name)
        return _Asked(bus, StationAsker(bus, ACCOUNT, random.Random(world.rng.getrandbits(64))))

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def _steer(self, steer: Steer) -> None:
        await asyncio.sleep(steer.at_s)
        client = self._clients[steer.client]
        await self._call(client, steer.what, steer.workflow, steer.id, steer.patience_s)

    async def _call(self, client: _Asked, what: str, workflow: str, instance: str, patience_s: float) -> Call:
        world = self._world
        call = Call(len(self._calls) + 1, what, workflow, instance, world.now)
        self._calls.append(call)
        world.note(f"call {call.number} {what} {workflow}/{instance}")
        await (self._create(client, call, patience_s) if what == "create" else self._ask(client, call, patience_s))
        call.returned_at = world.now
        world.note(f"call {call.number} {what} {workflow}/{instance} -> {call.code} {call.status}")
        return call

    async def _create(self, client: _Asked, call: Call, patience_s: float) -> None:
        try:
            await self._world.client(client.bus).create(call.workflow, call.number, id=call.instance,
                                                        timeout=timedelta(seconds=patience_s))
        except InstanceExists:
            call.code = "exists"
        except Unavailable:
            call.code = SILENCE
        except ToqueError as error:
            call.code = type(error).__name__
        else:
            call.code = "ok"

    async def _ask(self, client: _Asked, call: Call, patience_s: float) -> None:
        answer = await client.asker.about(call.what, _request(call), Deadline(patience_s))
        call.code = answer.code if isinstance(answer, Answer) else SILENCE
        if isinstance(answer, Answer) and (call.code, call.what) == ("ok", "status"):
            call.status = msgspec.msgpack.decode(answer.value, type=InstanceView).status

    # -- the end -------------------------------------------------------------------------------------------------------

    async def _liveness(self) -> Verdict:
        """Without faults every instance can be brought to its end, and nothing is left in memory."""
        world = self._world
        verdict = Verdict("R5", f"everything ended within {LIVENESS_S_MAX:g} s after the last fault", 1)
        give_up = world.now + LIVENESS_S_MAX
        places = sorted({(steer.workflow, steer.id) for steer in self._steers})
        client = self._client("finisher")
        await asyncio.gather(*(self._finish(client, *place, give_up) for place in places))
        while (left := world.leftovers()) and world.now < give_up:
            await asyncio.sleep(POLL_S)
        if left or world.now >= give_up:
            verdict.violated(f"in memory: {left}" if left else "an instance has not ended")
        return verdict

    async def _finish(self, client: _Asked, workflow: str, instance: str, give_up: float) -> None:
        while self._world.now < give_up:
            call = await self._call(client, "status", workflow, instance, 10.0)
            if call.code == NOT_FOUND or call.status in ENDED:
                return
            what = "resume" if call.status in ("paused", "waitingForPause") else "event" if call.status == "waiting" else ""
            if what:
                await self._call(client, what, workflow, instance, 10.0)
            await asyncio.sleep(1.0)


def _request(call: Call) -> InstanceRequest:
    shape: type[InstanceRequest] = InstanceRequest
    if call.what == "event":
        payload = msgspec.Raw(msgspec.msgpack.encode(call.number))
        return EventRequest(call.workflow, call.instance, request=call.request, type=TYPE, payload=payload)
    if call.what == "restart":
        shape = RestartRequest
    return shape(call.workflow, call.instance, request=call.request)
