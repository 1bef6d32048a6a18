"""A small station for the tests of the Engine: it collects committed records and accepts them when the test likes.

    async def test():
        host = EngineHost(Flow, params=3)          # accepts at once; `by_hand=True`: only by `host.accept()`
        host.create()
        end = await host.ended()                   # its Ended record, accepted
        host.crash()                               # what is not accepted is lost, as with a killed pod
        host.load()                                # … and another owner reads the instance back

Every accepted record is folded as the real store does it, so a record that cannot follow from the state fails the test.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from toque._payload import PAYLOAD_MAX, decode, encode
from toque._subjects import StationId
from toque.sim.loop import run as run_virtually
from toque.storage import records as r
from toque.storage.family import Parent
from toque.storage.fold import FoldBatch
from toque.storage.folded_store import FoldedReaders
from toque.storage.memory_store import MemoryTables
from toque.workers.attempt import Callbacks
from toque.workers.children import ChildEnd
from toque.workers.engine import INTERRUPTIONS_MAX, Engine
from toque.workers.events import Event
from toque.workers.host import ChildCreation
from toque.workers.replay import Outcome, Replay
from toque.workflow import StepContext, Workflow

gc.freeze()  # what is there by now need not be looked at by each test's collection

T = TypeVar("T")
STATION = StationId(1, 0)
SERIAL = 1
TURNS_MAX = 1_000  # of the loop, until everything that can happen without time has happened
STORY_S_MAX = 1e9  # of virtual time
START_S = 1_000.0  # each host's clock begins here


def play(story: Callable[[], Coroutine[Any, Any, T]], *, seed: int = 1) -> T:
    """Run a story in virtual time. What asyncio would print of lost tasks and exceptions fails the test."""

    async def main() -> T:
        async with asyncio.timeout(STORY_S_MAX):
            return await story()

    with nothing_lost():
        return run_virtually(main(), seed=seed)


@contextmanager
def nothing_lost() -> Iterator[None]:
    """asyncio reports a task destroyed while pending, or an exception never retrieved, on its logger: nothing may."""
    seen: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    listener = Listener()
    logger = logging.getLogger("asyncio")
    logger.addHandler(listener)
    try:
        yield
        gc.collect()
    finally:
        logger.removeHandler(listener)
    assert not seen, f"asyncio reports: {seen}"


class ThreadsByHand(Callbacks):
    """Sync callbacks wait until the test lets them in, and run in the loop's own thread."""

    def __init__(self, *, by_hand: bool = False) -> None:
        super().__init__(1)
        self.by_hand = by_hand
        self.waiting: list[Callable[[], None]] = []

    def submit(self, fn: Callable[[], None]) -> None:
        if self.by_hand:
            self.waiting.append(fn)
        else:
            asyncio.get_running_loop().call_soon(fn)


class EngineHost:
    """See the module. Holds one instance of `flow` at a time."""

    def __init__(self, flow: type[Workflow[Any, Any]], params: Any = None, *, by_hand: bool = False, env: Any = None,
                 evicts: bool = True, clock: Callable[[], float] | None = None) -> None:
        self.account = "main"
        self.env = env
        self.callbacks: ThreadsByHand = ThreadsByHand()
        self.payload_max = PAYLOAD_MAX
        self.inside = 0
        self.flow = flow
        self.params = encode(params, what="params")
        self.by_hand = by_hand
        self.evicts = evicts  # a resting engine leaves memory
        self.engine: Engine | None = None
        self.pending: list[tuple[r.Record, Engine]] = []
        self.records: list[r.Record] = []  # accepted
        self.slots_given_back = 0
        self.reports = 0  # of progress
        self.events_sent = 0
        self.told: list[str] = []  # what the engine said, in order
        self.gate_open = True
        self.deadline_ahead = True
        self.time_known = True
        self.children: list[ChildCreation] = []  # creations, repeats too
        self.creates: Callable[[ChildCreation], Coroutine[Any, Any, None]] = _stored
        self.time_outs: list[Callable[[], None]] = []
        self.holds_time_outs = False  # they are decided by `decide_time_outs` only
        self.behind_ms = 0  # how far `now_ms` may be behind the broker's true time
        self.jitter = 0.5
        self.accept_delay_s: Callable[[], float] = lambda: 0.0
        self.group_max: Callable[[], int] = lambda: 1_000_000
        self.accept_until: int | None = None  # no more records than so many are accepted; then `reached` is set
        self.reached = asyncio.Event()
        self._at_gate: list[Engine] = []
        self._loop = asyncio.get_running_loop()
        began = self._loop.time() - START_S
        self._clock = clock or (lambda: self._loop.time() - began)
        self._scheduled = False
        self._group = 0
        self._wake: asyncio.TimerHandle | None = None
        self._over: asyncio.Event = asyncio.Event()
        self.tables = MemoryTables()
        self.store = FoldedReaders(self.tables)

    # -- the engine's host ---------------------------------------------------------------------------------------------

    def commit(self, record: r.Record, engine: Engine) -> None:
        assert engine is self.engine, "a record of an engine that has left memory"
        assert record.seq == len(self.records) + len(self.pending) + 1, f"a gap before {record}"
        self.pending.append((record, engine))
        if not self.by_hand and not self._scheduled:
            self._scheduled = True
            self._loop.call_later(self.accept_delay_s(), self._accept_all)

    def now_ms(self) -> int:
        return int(self._clock() * 1000) - self.behind_ms

    def latest_ms(self) -> int:
        return int(self._clock() * 1000) + 1

    def may_fire(self) -> bool:
        return self.time_known

    def random(self) -> float:
        return self.jitter

    def may_enter(self, engine) -> bool:
        assert all(type(record) is r.EventReceived for record, _ in self.pending), \
            "a gate is read, to enter a callback, before everything is accepted"
        return self.gate_open and self.deadline_ahead

    def in_time(self) -> bool:
        return self.deadline_ahead

    def enter_later(self, engine: Engine) -> None:
        self._at_gate.append(engine)

    def engine_rests(self, engine: Engine) -> None:
        self._give_back(engine)
        if self.evicts and not engine.unaccepted:
            engine.cut()
            self.engine = None
        if engine.resting:
            self._schedule_wake()

    def engine_called(self, engine: Engine) -> None:
        self._loop.call_soon(self._called, engine)

    def _called(self, engine: Engine) -> None:
        if engine is self.engine and not engine.has_slot and engine.may_go_on:
            engine.has_slot = True
            if engine.is_started:
                engine.wake()
            else:
                engine.start_when_accepted()

    def before_time_out(self, engine: Engine, decide: Callable[[], None]) -> None:
        self.time_outs.append(decide)
        if not self.holds_time_outs:
            self.decide_time_outs()

    def decide_time_outs(self) -> None:
        """The event stream has been read up to where it stood."""
        decided, self.time_outs = self.time_outs, []
        for decide in decided:
            decide()

    async def create_child(self, creation: ChildCreation) -> None:
        assert not self.pending, "a child is created before everything is accepted"
        self.children.append(creation)
        await self.creates(creation)

    def engine_idle(self, engine: Engine) -> None:
        """A frozen station would take its slot."""

    def engine_ended(self, engine: Engine) -> None:
        self.told.append("ended")
        self._over.set()
        if not engine.has_slot:
            self._evict(engine)

    def engine_left(self, engine: Engine) -> None:
        self._give_back(engine)
        self._over.set()
        self._evict(engine)

    def progressed(self, engine: Engine) -> int:
        self.reports += 1
        return self.reports

    def engine_blocked(self, engine: Engine, reason: str) -> None:
        self.told.append(f"blocked: {reason}")

    def _give_back(self, engine: Engine) -> None:
        assert not engine.must_wait, "a slot is given back before everything is accepted"
        assert not engine.inside, "a slot is given back while a callback is inside"
        if engine.has_slot:
            engine.has_slot = False
            self.slots_given_back += 1

    def _evict(self, engine: Engine) -> None:
        engine.cut()
        if self.engine is engine:
            self.engine = None

    # -- what the test does --------------------------------------------------------------------------------------------

    def create(self) -> Engine:
        """Admit the instance."""
        created_at = self.now_ms()
        admitted = r.Admitted(SERIAL, 1, 1, created_at, self.flow._toque_name, "i1", "nonce", 1, created_at,
                              self.params, "application/msgpack", "1")
        self.engine = Engine(self, self.flow, SERIAL, Replay([admitted]))
        self.engine.has_slot = True
        self.engine.admit()
        return self.engine

    def accept(self, count: int | None = None) -> None:
        """Accept the first pending records as one group (all of them), fold them, and tell the engine."""
        group, self.pending = self.pending[:count], self.pending[count:] if count is not None else []
        self._keep([record for record, _ in group])
        for _, engine in group:
            engine.accepted()

    def crash(self, *, interrupted: bool = True) -> None:
        """The pod dies: what was not accepted is lost. The next owner notes an interruption if the instance had a slot."""
        if self.engine is not None:
            self.engine.cut()
            self.engine = None
        self.pending.clear()
        self._at_gate.clear()
        if self._wake is not None:
            self._wake.cancel()
        row = self.row
        if interrupted and row is not None and row.status is r.Status.RUNNING and not row.blocked_on:
            self._keep([r.Interrupted(SERIAL, row.run, row.seq + 1, self.now_ms(), "dead")])

    def load(self, flow: type[Workflow[Any, Any]] | None = None) -> Engine | None:
        """Another owner takes the instance up, perhaps with other code. None: it waits, and is woken when it is due."""
        self.flow = flow or self.flow
        self._over.clear()
        row = self.row
        assert row is not None, "it was never admitted"
        if row.status is r.Status.WAITING:
            self._schedule_wake()
            return None
        if row.status.ended:
            self._over.set()
        else:
            self._start()
        return self.engine

    def read_back(self) -> Engine:
        """An engine in memory whose run() is not entered, as for a control operation."""
        self.engine = Engine(self, self.flow, SERIAL, Replay(self.history))
        return self.engine

    def send(self, type_: str, payload: Any = None, *, event_id: str = "") -> asyncio.Future[None]:
        """An event for the instance, as the owner takes it; done when it is acknowledged."""
        engine = self.engine or self.read_back()
        self.events_sent += 1
        event_id = event_id or f"e{self.events_sent}"
        if event_id not in engine.events.ids:
            engine.events.receive(Event(type_, event_id, encode(payload, what="payload"), self.now_ms()))
        return engine.events.when_accepted(event_id)

    def end_child(self, creation: ChildCreation, output: Any = None, *, status: r.Status = r.Status.COMPLETE,
                  failure: r.Failure | None = None, child_run: int = 1) -> asyncio.Future[None]:
        """The end of a child, as the parent's owner takes it; done when it is acknowledged."""
        was_in_memory = self.engine is not None
        engine = self.engine or self.read_back()
        parent = Parent.parse(creation.parent)
        accepted = engine.children.end(ChildEnd(parent.run, parent.name, parent.occurrence, creation.nonce, child_run,
                                                status, encode(output, what="output"), failure))
        if not was_in_memory and not engine.unaccepted:
            self._evict(engine)  # it was read back in vain
        return accepted

    async def cut_after(self, records: int, *, interrupted: bool = True) -> None:
        """Let it run until so many records are accepted, or it has ended; then its pod dies."""
        self.accept_until = records
        self.reached.clear()
        self._loop.call_soon(self._accept_all)
        waiting = [asyncio.ensure_future(self.reached.wait()), asyncio.ensure_future(self._over.wait())]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        self.crash(interrupted=interrupted)
        self.accept_until = None

    def open_gate(self) -> None:
        """Callbacks may be entered (again)."""
        self.gate_open = True
        waiting, self._at_gate = self._at_gate, []
        for engine in waiting:
            engine.enter()

    async def ended(self) -> r.Ended:
        """Wait for the terminal record's acceptance."""
        await self._over.wait()
        last = self.records[-1]
        assert isinstance(last, r.Ended), f"it is held: {self.told}"
        return last

    async def held(self) -> str:
        """Wait until it is held; the reason as the index has it."""
        await self._over.wait()
        row = self.row
        assert row is not None and row.blocked_on, f"it is not held: {self.records[-1]}"
        return row.blocked_on

    async def output(self) -> Any:
        """Wait for the end, and decode what run() returned."""
        end = await self.ended()
        assert end.status is r.Status.COMPLETE, f"it ended so: {end}"
        return decode(end.output, Any, what="output")

    async def failure(self) -> r.Failure:
        """Wait for the end with an error."""
        end = await self.ended()
        assert end.status is r.Status.ERRORED and end.failure is not None, f"it ended so: {end}"
        return end.failure

    async def settle(self) -> None:
        """Let everything happen that needs no time."""
        for _ in range(TURNS_MAX):
            await asyncio.sleep(0)

    @property
    def history(self) -> list[r.Record]:
        """As the store has it."""
        return self.store.history(STATION, SERIAL)

    @property
    def row(self) -> r.InstanceRow | None:
        return self.store.row(STATION, SERIAL)

    @property
    def outcomes(self) -> list[tuple[str, str, int]]:
        """The accepted outcomes of steps: record, name, occurrence."""
        return [(type(record).__name__, record.name, record.occurrence) for record in self.records
                if isinstance(record, Outcome)]

    def of_kind(self, kind: type[T]) -> list[T]:
        """The accepted records of a kind."""
        return [record for record in self.records if isinstance(record, kind)]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _accept_all(self) -> None:
        self._scheduled = False
        count = self.group_max()
        if self.accept_until is not None:
            count = max(0, min(count, self.accept_until - len(self.records)))
        left = len(self.pending) > count > 0
        if self.pending and count:
            self.accept(count)
        if left and not self._scheduled:
            self._scheduled = True
            self._loop.call_later(self.accept_delay_s(), self._accept_all)
        if self.accept_until is not None and len(self.records) >= self.accept_until:
            self.reached.set()

    def _keep(self, records: list[r.Record]) -> None:
        self._group += 1
        self.records.extend(records)
        batch = FoldBatch(self.tables)
        position = r.Position(self._group, r.GroupHeader(1, "s", self._group, 0))
        batch.apply(r.Group(STATION, position, records))
        self.tables.write(batch.finish())
        assert self.history == self.records, "the folded history is not the journal"

    def _start(self) -> None:
        row = self.row
        assert row is not None
        engine = self.read_back()
        engine.has_slot = True
        if row.interruptions >= INTERRUPTIONS_MAX:
            engine.hold("interrupted too often")
        else:
            engine.start()

    def _schedule_wake(self) -> None:
        row = self.row
        assert row is not None and row.status is r.Status.WAITING, f"it rests, but its row says {row}"
        delay_s = max(0, row.wake_at - self.now_ms()) / 1000
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self._loop.call_later(delay_s, self._woken, row.wake_at)

    def _woken(self, due: int) -> None:
        row = self.row
        assert row is not None
        if row.status is not r.Status.WAITING or (self.engine is not None and self.engine.ended):
            return
        if due > self.now_ms():
            self._schedule_wake()
        elif self.engine is None:
            self._start()
        else:
            self.engine.has_slot = True
            self.engine.wake()


async def _stored(creation: ChildCreation) -> None:
    """The queue takes every child."""


class Recorder:
    """The `env` of test workflows: callbacks report here, and take as long as they are told."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, int, int]] = []  # step, occurrence, attempt

    def enter(self, ctx: StepContext) -> int:
        """Note an entry; which one it is of this step, from 1."""
        self.entries.append((ctx.name, ctx.count, ctx.attempt))
        return self.times(ctx.name, ctx.count)

    def times(self, name: str, count: int = 1) -> int:
        return sum(entry[:2] == (name, count) for entry in self.entries)

    async def work(self, ctx: StepContext, value: Any = None, seconds: float = 0.0) -> Any:
        """A callback that takes so long and returns the value."""
        self.enter(ctx)
        await asyncio.sleep(seconds)
        return value

    async def fail(self, ctx: StepContext, times: int, value: Any = None, seconds: float = 0.0) -> Any:
        """A callback that fails so often before it returns the value."""
        entry = self.enter(ctx)
        await asyncio.sleep(seconds)
        if entry <= times:
            raise ConnectionError(f"failure {entry}")
        return value


def raises_misuse(failure: r.Failure, *words: str) -> None:
    """The failure is a MisuseError or UsageError whose message has all these words."""
    assert failure.type.startswith("toque.errors."), failure
    for word in words:
        assert word in failure.message, failure.message

