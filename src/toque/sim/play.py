"""Plays a plan: a safety phase with the faults, then a liveness phase in which everything has to come to its end.

    outcome = play_plan(draw_plan(seed=7))
    outcome.broken      # the verdicts that do not hold
    outcome.digest      # the trace's hash: the same for the same plan
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from toque._protocol import AccountRecord
from toque._subjects import StationId, parse_queue
from toque.chaos.verdicts import Verdict
from toque.errors import ToqueError
from toque.sim import verdicts
from toque.sim.clients import Clients
from toque.sim.nemesis import Nemesis, Pods
from toque.sim.plan import Plan
from toque.sim.process import ProcessLoop
from toque.sim.shapes import make_workflow
from toque.sim.trace import Trace
from toque.sim.world import ACCOUNT, World
from toque.storage import records as r
from toque.storage.journal import decode_group, header_of
from toque.storage.ports import Message

LIVENESS_S_MAX: Final = 300.0  # of virtual time after the last fault, until everything has ended
POLL_S: Final = 0.25


@dataclass
class Outcome:
    """What came of a plan."""

    plan: Plan
    verdicts: list[Verdict]
    digest: str
    trace: list[str]
    counts: Counter[str] = field(default_factory=Counter)
    virtual_s: float = 0.0

    @property
    def broken(self) -> list[Verdict]:
        return verdicts.broken(self.verdicts)


def play_plan(plan: Plan) -> Outcome:
    """Run it in a loop of its own, to its end."""
    with asyncio.Runner(loop_factory=lambda: ProcessLoop(plan.seed)) as runner:
        return runner.run(_Play(plan).run())


class _Play:
    """One run."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._live: set[tuple[StationId, int]] = set()  # admitted and not ended
        self._known: set[tuple[str, str]] = set()  # admitted
        self._parked: set[int] = set()

    async def run(self) -> Outcome:
        plan = self._plan
        record = AccountRecord(name=ACCOUNT, stations=plan.stations, ttl_s=plan.ttl_s, max_concurrent=plan.limit)
        world = World(plan.seed, account=record, delay_s=(plan.delay_ms[0] / 1000, plan.delay_ms[1] / 1000))
        world.expected = (ToqueError, Exception)  # judged below
        trace = self._trace = Trace()
        self._world = world
        world.on_note = trace.note
        world.on_journal = self._journaled
        world.history.on_line = trace.history
        try:
            return await self._play(world, trace)
        finally:
            world.on_note = lambda text: None
            world.history.on_line = lambda line: None
            await world.close()

    async def _play(self, world: World, trace: Trace) -> Outcome:
        plan, began = self._plan, world.now
        app = world.app(*(make_workflow(shape, plan, world.history) for shape in plan.shapes))
        pods = Pods(world, app, plan)
        clients = Clients(world, plan.creations)
        nemesis = Nemesis(world, pods, plan, clients.buses)
        await asyncio.sleep(plan.safety_s)
        trace.note("faults end")
        await nemesis.end()
        alive = await self._liveness(pods, clients)
        for task in (*pods.tasks, *clients.tasks):
            task.cancel()
        clients.stop_asking()
        judged = [alive, *verdicts.judge(world, plan, clients)]
        counts = verdicts.counts(world, nemesis.counts)
        return Outcome(plan, judged, trace.digest, list(trace.lines), counts, world.now - began)

    def _journaled(self, message: Message) -> None:
        station = StationId.parse(message.subject.split(".", 3)[3])
        records = decode_group(message)
        self._trace.journal(station, message.sequence, header_of(message), records)
        for record in records:
            if isinstance(record, r.Admitted):
                self._live.add((station, record.serial))
                self._known.add((record.workflow, record.id))
            elif isinstance(record, r.Ended):
                self._live.discard((station, record.serial))

    async def _liveness(self, pods: Pods, clients: Clients) -> Verdict:
        """Without faults everything ends, everybody hears of it, and nothing is left in memory."""
        verdict = Verdict("R5", f"everything ended within {LIVENESS_S_MAX:g} s after the last fault", 1)
        world = self._world
        give_up = world.now + LIVENESS_S_MAX
        while left := self._left(pods, clients):
            if world.now >= give_up:
                verdict.violated(left)
                break
            await asyncio.sleep(POLL_S)
        verdict.note = f"{world.now - give_up + LIVENESS_S_MAX:.1f} s"
        return verdict

    def _left(self, pods: Pods, clients: Clients) -> str:
        """What is not at its end yet."""
        world = self._world
        down = [number for number in range(len(self._plan.clocks)) if pods.node(number) is None]
        if down:
            return f"pods {down} are down"
        if self._live:
            return f"live: {sorted((str(station), serial) for station, serial in self._live)}"
        if waiting := sum(not task.done() for task in clients.tasks):
            return f"{waiting} clients wait"
        if queued := self._queued():
            return f"queued: {queued}"
        if left := world.leftovers():
            return f"in memory: {left}"
        unowned = [str(station) for station in world.stations() if not world.is_owned(station)]
        return f"nobody owns {unowned}" if unowned else ""

    def _queued(self) -> list[str]:
        found = []
        for shape in self._plan.shapes:
            for message in self._world.queued(shape.name):
                token = parse_queue(message.subject)
                if (token.workflow, token.instance_id) not in self._known:
                    found.append(f"{token.workflow}/{token.instance_id}")
        return found
