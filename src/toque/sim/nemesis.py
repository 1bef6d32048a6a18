"""Carries out the faults of a plan, and mends at its end what they have broken: pods come back, the broker too."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from toque import _subjects as subjects
from toque._app import App
from toque.errors import ToqueError
from toque.sim import plan as p
from toque.sim.node import Disk, PodNode
from toque.sim.process import State
from toque.sim.world import World
from toque.storage import fold
from toque.storage.journal import decode_group, header_of
from toque.storage.memory_bus import MemoryBus
from toque.storage.ports import Message
from toque.storage.records import StepDone
from toque.workers.snapshot_taker import SnapshotRules

RESTART_S: Final = 1.0  # after an exit that nobody ordered, and after a start that failed
COMMIT_S_MAX: Final = 3.0  # how long a pause waits for its moment
BACK_S: Final = 0.3  # a broker that takes no writes is down for so long in its restart
ROT_TABLES: Final = (fold.ROWS, fold.HISTORY, fold.POSITION, fold.IDS, fold.TIMERS)


class Pods:
    """The pods as a supervisor sees them: each is started again when it has ended, as long as it is wanted."""

    def __init__(self, world: World, app: App, plan: p.Plan) -> None:
        self._world = world
        self._app = app
        self._clocks = clocks = plan.clocks
        least = plan.snapshot_bytes
        self._snapshot_rules = SnapshotRules(journal_bytes_min=least, held_back_bytes_min=least) if least else None
        self._nodes: dict[int, PodNode] = {}
        self._down_s: dict[int, float] = {}  # by pod: how long it shall be down next time
        self.tasks = [asyncio.ensure_future(self._supervise(number)) for number in range(len(clocks))]
        self.hurry = asyncio.Event()

    def node(self, number: int) -> PodNode | None:
        """The pod's living process."""
        node = self._nodes.get(number)
        return node if node is not None and node.alive else None

    def stays_down(self, number: int, seconds: float) -> None:
        """When it has ended, start it so much later."""
        self._down_s[number] = seconds

    def name(self, number: int) -> str:
        return f"p{number}"

    async def _supervise(self, number: int) -> None:
        clock = self._clocks[number]
        while True:
            with contextlib.suppress(ToqueError):  # no broker just now: it is started again like any other
                await self._world.start_pod(self.name(number), self._app, skew_s=clock.skew_s, rate=clock.rate,
                                            snapshot_rules=self._snapshot_rules,
                                            on_made=lambda node: self._made(number, node))
            if number in self._nodes:
                await self._nodes[number].died
            await self._pause(self._down_s.pop(number, RESTART_S))

    def _made(self, number: int, node: PodNode) -> None:
        self._nodes[number] = node

    async def _pause(self, seconds: float) -> None:
        if not self.hurry.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.hurry.wait()
        await asyncio.sleep(RESTART_S / 10)


class Nemesis:
    """See the module. `counts` says what it did."""

    def __init__(self, world: World, pods: Pods, plan: p.Plan, client_buses: list[MemoryBus]) -> None:
        self.counts: Counter[str] = Counter()
        self._world = world
        self._pods = pods
        self._plan = plan
        self._client_buses = client_buses
        self._copies: dict[int, Disk] = {}  # by fault
        self._cuts: Counter[MemoryBus] = Counter()
        self._down = 0  # so many faults keep the broker down
        self._ended = asyncio.Event()
        self._tasks = [asyncio.ensure_future(self._do(number, fault)) for number, fault in enumerate(plan.faults)]
        self._tasks += [asyncio.ensure_future(self._copy(number, fault)) for number, fault in enumerate(plan.faults)
                        if fault.how == "stale"]
        self._acts: dict[str, Callable[[int, p.Fault], Awaitable[None]]] = {
            p.KILL: self._kill, p.TERM: self._term, p.PAUSE: self._pause, p.SUSPEND: self._suspend, p.CUT: self._cut,
            p.CUT_CLIENTS: self._cut_clients, p.BROKER: self._broker, p.WRITE_DEAD: self._write_dead,
            p.MESSAGES: self._messages, p.LIMIT: self._limit}

    async def end(self) -> None:
        """Every fault is over: whatever it had broken is mended when this returns, but pods are still starting."""
        self._ended.set()
        self._pods.hurry.set()
        self._world.broker.forget_faults()
        await asyncio.gather(*self._tasks)
        self._world.broker.forget_faults()

    async def _do(self, number: int, fault: p.Fault) -> None:
        if not await self._over(fault.at_s):
            self._world.note(f"fault {fault}")
            await self._acts[fault.kind](number, fault)
            self._world.note(f"over {fault}")

    async def _over(self, seconds: float) -> bool:
        """Wait so long, or until faults are over; whether they are."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        return self._ended.is_set()

    async def _copy(self, number: int, fault: p.Fault) -> None:
        """A stale disk is a copy made in time."""
        if not await self._over(max(0.0, fault.at_s - fault.age_s)):
            disk = self._world.disks.get(self._pods.name(fault.pod))
            if disk is not None:
                self._copies[number] = disk.copy()

    # -- pods ----------------------------------------------------------------------------------------------------------

    async def _kill(self, number: int, fault: p.Fault) -> None:
        node = self._pods.node(fault.pod)
        if node is None:
            return
        self._pods.stays_down(fault.pod, fault.seconds)
        self._break_disk(number, fault)
        node.kill()
        self.counts["kills"] += 1

    def _break_disk(self, number: int, fault: p.Fault) -> None:
        disk = self._world.disks[self._pods.name(fault.pod)]
        if fault.how == "lost":
            disk = Disk()
        elif fault.how == "stale" and number in self._copies:
            disk = self._copies[number]
        elif fault.how == "torn":
            disk.tables.tear(1 + number % (len(fold.TABLES) - 1))
            disk.suspect = True  # the host has booted since, without a clean close
        elif fault.how == "rot":
            self._rot(disk, number)
        else:
            return
        self.counts[f"disks {fault.how}"] += 1
        self._world.disks[self._pods.name(fault.pod)] = disk

    def _rot(self, disk: Disk, number: int) -> None:
        table = ROT_TABLES[number % len(ROT_TABLES)]
        keys = sorted(disk.tables.tables[table])
        if keys:
            disk.tables.rot(table, keys[number % len(keys)])

    async def _term(self, number: int, fault: p.Fault) -> None:
        node = self._pods.node(fault.pod)
        if node is None or not node.served or node.process.state is not State.RUNNING:
            return
        self._pods.stays_down(fault.pod, fault.seconds)
        node.pod.stop()
        self.counts["SIGTERMs"] += 1

    async def _pause(self, number: int, fault: p.Fault) -> None:
        await self._stopped(fault, clock_stands=False)

    async def _suspend(self, number: int, fault: p.Fault) -> None:
        await self._stopped(fault, clock_stands=True)

    async def _stopped(self, fault: p.Fault, *, clock_stands: bool) -> None:
        node = self._pods.node(fault.pod)
        if node is not None and fault.how == p.COMMIT:
            await self._next_commit(node)
        if node is None or not node.alive or node.process.state is not State.RUNNING:
            return
        session = node.process.session
        self._world.history.stopped(node.process, expires_at=node.expires_at, believes=clock_stands)
        node.pause()
        if clock_stands:
            node.clock.stand()
        await self._over(fault.seconds)
        if node.alive:
            node.clock.go_on()
            node.resume()
            self.counts["resumed"] += 1
            self.counts["zombies"] += bool(session) and not self._world.session_lives(session)

    async def _next_commit(self, node: PodNode) -> None:
        """Wait until the broker has stored a step's result of the pod, the answer to which is on its way then."""
        stored = asyncio.Event()

        def watch(message: Message) -> None:
            mine = header_of(message).session == node.process.session
            if mine and any(isinstance(record, StepDone) for record in decode_group(message)):
                stored.set()

        self._world.journal_watchers.append(watch)
        waits = [asyncio.ensure_future(event.wait()) for event in (stored, self._ended)]
        await asyncio.wait(waits, timeout=COMMIT_S_MAX, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._world.journal_watchers.remove(watch)

    async def _cut(self, number: int, fault: p.Fault) -> None:
        node = self._pods.node(fault.pod)
        if node is None:
            return
        self.counts["cut connections"] += 1
        buses: dict[str, list[MemoryBus]] = {"pod": [node.bus], "keeper": [node.keeper_bus],
                                             "both": [node.bus, node.keeper_bus]}
        await self._cut_off(buses[fault.how], fault.seconds)

    async def _cut_clients(self, number: int, fault: p.Fault) -> None:
        await self._cut_off(self._client_buses, fault.seconds)

    async def _cut_off(self, buses: list[MemoryBus], seconds: float) -> None:
        for bus in buses:
            self._cuts[bus] += 1
            bus.disconnect()
        await self._over(seconds)
        for bus in buses:
            self._cuts[bus] -= 1
            if not self._cuts[bus] and not _is_dead(bus, self._world):
                bus.reconnect()

    # -- the broker ----------------------------------------------------------------------------------------------------

    async def _broker(self, number: int, fault: p.Fault) -> None:
        self._down += 1
        if self._down == 1:
            self._world.broker.stop()
            self.counts["broker restarts"] += 1
        await self._over(fault.seconds)
        self._down -= 1
        if not self._down:
            self._world.broker.start()

    async def _write_dead(self, number: int, fault: p.Fault) -> None:
        account = self._world.account.name
        stream = (subjects.journal_stream(account) if fault.subject == "journal"
                  else subjects.queue_stream(account, fault.subject))
        self._world.broker.freeze_stream(stream)
        self.counts["write-dead streams"] += 1
        await self._over(fault.seconds)
        await self._broker(number, p.Fault(0.0, p.BROKER, seconds=BACK_S))

    async def _messages(self, number: int, fault: p.Fault) -> None:
        self._world.broker.fail_next(fault.subject, fault.how, times=fault.times, delay_s=fault.seconds or 1.0)

    async def _limit(self, number: int, fault: p.Fault) -> None:
        with contextlib.suppress(ToqueError):  # the broker may be away: the limit stays as it was
            await self._world.change_account(max_concurrent=fault.times)
            self.counts["limit changes"] += 1


def _is_dead(bus: Any, world: World) -> bool:
    """Whether the connection is that of a dead process."""
    process = getattr(bus, "process", None)
    return process is not None and not process.alive
