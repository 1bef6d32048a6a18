"""A pod in the simulator: what `run_pod` wires from sockets, threads and files, wired from a Process instead.

Its disk (tables and the name of its last session) outlives it, as the directory of a real pod does.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from toque._accounts import ensure_account
from toque._app import App
from toque._protocol import AccountRecord, SessionRecord
from toque.errors import SetupError
from toque.sim.loop import VirtualClock
from toque.sim.process import Process, SimulatedThread
from toque.storage.memory_broker import MemoryBroker
from toque.storage.memory_store import MemoryStore, MemoryTables
from toque.storage.ports import Bus, BusError, BusTimeout, NoResponders
from toque.workers.attempt import Callbacks
from toque.workers.keeper_thread import EXIT_FENCED, WATCH_S
from toque.workers.pod import EXIT_OK, Pod
from toque.workers.session import RETRY_S, Session, SessionKeeper, end_session
from toque.workers.snapshot_taker import SnapshotRules

THREAD_START_S_MAX = 0.002


@dataclass
class Disk:
    """A pod's directory. `suspect`: what it holds is set aside at the next start, as after a power cut or damage."""

    tables: MemoryTables = field(default_factory=MemoryTables)
    last_session: str = ""
    suspect: bool = False

    def copy(self) -> Disk:
        """The directory as it is now."""
        return Disk(self.tables.copy(), self.last_session, self.suspect)

    def opened(self) -> MemoryTables:
        """What a starting pod finds."""
        if self.suspect:
            self.tables, self.suspect = MemoryTables(), False
        return self.tables


class InlineCallbacks(Callbacks):
    """Sync callbacks run in the loop, soon, as simulated threads."""

    def __init__(self, threads_max: int, rng: random.Random) -> None:
        super().__init__(threads_max)
        self._rng = rng

    def submit(self, fn: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(self._rng.uniform(0, THREAD_START_S_MAX), SimulatedThread().run, fn)


class LoopKeeper:
    """Keeps a session as `KeeperThread` does, in the loop, on a connection of its own."""

    def __init__(self, node: PodNode, session: Session, on_lost: Callable[[str], None], bus: Bus) -> None:
        self._node = node
        self._session = session
        self._keeper = SessionKeeper(bus, node.account, node.clock, session, on_lost=on_lost)
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        while True:
            try:
                await self._keeper.open()
                break
            except (BusTimeout, BusError, NoResponders):
                await asyncio.sleep(RETRY_S)
        self._tasks = [self._node.process.spawn(self._keeper.run()), self._node.process.spawn(self._watch())]

    def announce(self, record: SessionRecord) -> None:
        self._keeper.announce(record)

    async def leave(self) -> None:
        await self._keeper.leave()
        for task in self._tasks:
            task.cancel()

    async def _watch(self) -> None:
        """End the process when a callback has outlived the session."""
        while True:
            left_s = self._session.exit_in_s
            await asyncio.sleep(min(left_s, self._session.ttl_s) if left_s > 0 else WATCH_S)
            late = self._session.exit_in_s <= 0 and not self._session.quiet
            if late and self._node.callbacks.inside:
                self._node.exit_code = EXIT_FENCED
                self._node.kill()


class PodNode:
    """One process of a pod. `pod` is there from `start` on; the ports are `bus`, `keeper_bus`, `store` and `clock`."""

    def __init__(self, name: str, app: App, *, broker: MemoryBroker, disk: Disk, rng: random.Random,
                 account: str = "main", pid: int = 0, skew_s: float = 0.0, rate: float = 1.0, slots_max: int = 10_000,
                 ttl_s: float | None = None, grace_s: float = 25.0, env: object = None,
                 snapshot_rules: SnapshotRules | None = None,
                 on_death: Callable[[PodNode], None] = lambda node: None) -> None:
        self.name = name
        self.app = app
        self.account = account
        self.disk = disk
        self.process = Process(name, pid)
        self.clock = VirtualClock(asyncio.get_running_loop(), skew_s, rate)
        self.bus = self.process.bus(broker, f"{name}-pod")
        self.keeper_bus = self.process.bus(broker, f"{name}-keeper")
        self.store: MemoryStore
        self.callbacks = InlineCallbacks(32, rng)
        self.pod: Pod
        self.exit_code: int | None = None  # None while it runs, and after a kill
        self.exited: asyncio.Task[None] | None = None
        self.served = False  # it has opened a session
        self.damaged = False  # its store was, and it ended for that
        self.sessions_lost: dict[str, float] = {}  # when, in virtual time
        self.died: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # the process is gone
        self._broker = broker
        self._rng = rng
        self._slots_max = slots_max
        self._ttl_s = ttl_s
        self._grace_s = grace_s
        self._env = env
        self._snapshot_rules = snapshot_rules
        self._on_death = on_death

    @property
    def alive(self) -> bool:
        return self.process.alive

    @property
    def session(self) -> str:
        return self.pod.context.session.id

    @property
    def expires_at(self) -> float:
        """When the session surely has expired, in virtual time; far away without one that was ever renewed."""
        if not self.served:
            return math.inf
        left_s = self.pod.context.session.expires_at - self.clock.boottime()
        return asyncio.get_running_loop().time() + left_s / self.clock.rate

    async def start(self) -> None:
        """Returns when the pod serves (its session is open; stations come later), or was killed before that.

        Raises what stopped it.
        """
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def serves() -> None:
            self.served = True
            ready.set_result(None)

        self.exited = self.process.spawn(self._main(serves))
        self.exited.add_done_callback(lambda _: self._died(), context=contextvars.Context())
        await asyncio.wait({self.exited, ready, self.died}, return_when=asyncio.FIRST_COMPLETED)
        if self.exited.done():
            await self.exited

    async def _main(self, ready: Callable[[], None]) -> None:
        try:
            await self._serve(ready)
        finally:
            for bus in self.process.buses:
                await bus.close()

    async def _serve(self, ready: Callable[[], None]) -> None:
        account, layout = await ensure_account(self.bus, self.account, defaults=AccountRecord(name=self.account))
        if self.disk.last_session:
            await end_session(self.bus, self.account, self.disk.last_session, reason="dead", by=self.name,
                              over_live=True)
        self.store = MemoryStore(self.disk.opened(), on_damage=self._damaged)
        self.pod = Pod(self.app, pod=self.name, account=account, layout=layout, bus=self.bus, store=self.store,
                       clock=self.clock, rng=self._rng, make_keeper=self._make_keeper, slots_max=self._slots_max,
                       ttl_s=self._ttl_s, callbacks=self.callbacks, remember_session=self._remember_session,
                       snapshot_rules=self._snapshot_rules, env=self._env)
        await self.pod.run(grace_s=self._grace_s, ready=ready)
        self.store.close()
        self.exit_code = EXIT_OK

    def _damaged(self, error: Exception) -> None:
        self.disk.suspect = self.damaged = True
        if hasattr(self, "pod"):
            self.pod.stop(SetupError(f"the local store cannot be used any more ({error})"))

    def _make_keeper(self, session: Session, on_lost: Callable[[str], None]) -> LoopKeeper:
        def lost(why: str) -> None:
            self.sessions_lost[session.id] = asyncio.get_running_loop().time()
            on_lost(why)

        return LoopKeeper(self, session, lost, self.keeper_bus)

    def _remember_session(self, session: str) -> None:
        self.disk.last_session = session
        self.process.session = session

    def kill(self) -> None:
        """kill -9. Its session's key stays until the TTL; what was folded stays on its disk."""
        self._died()

    def _died(self) -> None:
        if not self.died.done():
            self.died.set_result(None)
            self.process.kill()
            self._on_death(self)

    async def stop(self) -> None:
        """SIGTERM, and wait for the exit, which cuts what still runs. Raises what ended the pod otherwise."""
        assert self.exited is not None
        self.pod.stop()
        await asyncio.wait({self.exited, self.died}, return_when=asyncio.FIRST_COMPLETED)
        if self.exited.done():
            await self.exited

    def pause(self) -> None:
        """SIGSTOP."""
        self.process.pause()

    def resume(self) -> None:
        """SIGCONT."""
        self.process.resume()

    async def bury(self) -> None:
        """At the end of a simulation: leave nothing behind in the loop."""
        self._died()
        await self.process.bury()
        if hasattr(self, "pod") and self.pod.ownership is not None:
            await self.pod.ownership.drop_all()
