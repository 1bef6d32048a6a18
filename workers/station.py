"""A station under one epoch of one session: its group commit, its SousChefs, its engines, its timers.

A Station lives from an accepted claim to its release or loss, and is never reused: whoever owns the station again, the
same pod too, claims again and reads back from the store. When the epoch is lost the engines leave memory at once, and
nothing of what they had pending has left them (protocol rules 2, 7 and 18).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from toque._logging import get_logger
from toque._payload import payload_max
from toque._subjects import StationId
from toque.errors import ToqueError
from toque.storage import records as r
from toque.storage.group_commit import Acceptance, GroupCommit
from toque.storage.ports import Message
from toque.storage.restore import LOCAL, Restored
from toque.storage.runs import newest_run
from toque.workers.child_creation import ChildCreations
from toque.workers.context import PodContext
from toque.workers.engine import INTERRUPTIONS_MAX, Engine
from toque.workers.event_inbox import EventInbox
from toque.workers.host import ChildCreation
from toque.workers.outbox import Outbox
from toque.workers.replay import Replay
from toque.workers.set_aside import set_aside
from toque.workers.souschef import SousChef
from toque.workers.time_outs import TimeOuts
from toque.workflow import Workflow, workflow_version

TIMER_SCAN_S = 0.5
TIMER_HORIZON_MS = 1500
TIMERS_PER_SCAN = 10_000
QUIET_POLL_S = 0.01
CUT_S = 5.0  # so long a callback that a hand-over has cut may clean up

_log = get_logger("toque.station")


class Station:
    """See the module. Is the Host of its engines and the Waker of its waiting instances."""

    def __init__(self, context: PodContext, station: StationId, tail: r.Position, *,
                 on_lost: Callable[[Station, ToqueError], None]) -> None:
        self.context = context
        self.id = station
        self.account = context.account
        self.env = context.env
        self.callbacks = context.callbacks
        self.payload_max = payload_max(context.bus.max_payload)
        self.inside = 0
        self.closed = False
        self.frozen = False  # it is being handed over: nothing is admitted, woken or entered
        self.restored = Restored(LOCAL)
        self.restored_ms = 0
        self.engines: dict[int, Engine] = {}
        self.by_id: dict[tuple[str, str], Engine] = {}
        self.souschefs: dict[str, SousChef] = {}
        self.waiters: dict[tuple[str, str], list[asyncio.Future[None]]] = {}
        self.on_group: Callable[[r.Group], None] = lambda group: None
        self.on_progress: Callable[[int], None] = lambda serial: None
        self._reports = 0  # of progress, under this epoch
        self._session = context.session
        self._loop = asyncio.get_running_loop()
        self._unstarted: list[int] = []  # loaded, and not let go on yet: serials
        self._pausing: list[int] = []  # … and those whose pause was asked for: nothing of them is inside any more
        self._lingering: list[Engine] = []  # once closed: those with threads inside
        self._gone: asyncio.Future[None] = self._loop.create_future()  # done when the station is closed
        self._next_serial = context.store.highest_serial(station) + 1
        self._folded_to = tail.header.group  # up to which the store shows everything
        self._leaving: deque[tuple[int, Engine]] = deque()
        self._armed: dict[int, asyncio.TimerHandle | None] = {}  # serial → its timer; None: it waits for a slot
        self._lacking: set[int] = set()  # waiting instances that are due, and that this pod's app cannot run
        self._admitting: set[tuple[str, str]] = set()  # ids of control operations on queued instances, under way
        self._at_gate: list[Engine] = []
        self.deleting: dict[tuple[str, str], int] = {}  # ids of instances whose deletion is not folded yet
        self._shelved: set[int] = set()  # idle ones that have given their slot back while the station is frozen
        self._gate_watched = False  # the next acceptance opens the gate
        self._tasks: dict[asyncio.Task[None], None] = {}  # in their order, so that runs can be repeated
        self.events = EventInbox(self)
        self.outbox = Outbox(self)
        self._creations = ChildCreations(context)
        self.time_outs = TimeOuts(self)
        self.commits = GroupCommit(
            context.journal, context.store, station, tail, may_send=self._session.in_time,
            on_accepted=self._group_accepted, on_lost=lambda error: on_lost(self, error),
            bytes_max=min(r.GROUP_BYTES_MAX, context.bus.max_payload - r.MESSAGE_RESERVE))

    # -- life ----------------------------------------------------------------------------------------------------------

    async def load(self, *, interrupted_by: str) -> None:
        """See what lives here. `interrupted_by`: the session that ended without releasing the station, or "".

        Nothing runs before `take_up`.
        """
        active = [(serial, row) for serial, row in self.context.store.unended(self.id)
                  if row.status in (r.Status.RUNNING, r.Status.WAITING_FOR_PAUSE)]
        running = [(serial, row) for serial, row in active if not row.blocked_on]
        held = [(serial, row) for serial, row in active if row.blocked_on]  # had no slot; the code may fit now
        if interrupted_by and running:
            now = self.now_ms()
            acceptance = Acceptance()
            for serial, row in running:
                acceptance = Acceptance()
                self.commits.add(r.Interrupted(serial, row.run, row.seq + 1, now, interrupted_by), acceptance)
            # Groups are accepted in order: the last one is enough. None of them is when the epoch is lost here.
            await asyncio.wait({acceptance.future, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if self.closed:
                return
            await self.context.store.flush()
        self._unstarted = [serial for serial, row in (*running, *held) if row.status is r.Status.RUNNING]
        self._pausing = [serial for serial, row in (*running, *held) if row.status is r.Status.WAITING_FOR_PAUSE]
        for workflow, flow in self.context.app.workflows.items():
            self.souschefs[workflow] = SousChef(self, workflow, flow)

    def take_up(self) -> None:
        """Let go on what lives here. Only once the station is open: what runs before could be lost uninterrupted."""
        for serial in self._unstarted:
            self._want_slot(0, serial)
        self._unstarted.clear()
        for serial in self._pausing:
            self.load_engine(serial).settle()
        self._pausing.clear()
        self.spawn(self._scan_timers())
        self.spawn(self.outbox.run())

    async def hand_over(self, successor: str, *, patience_s: float, ending: bool,
                        before_release: Callable[[], None]) -> bool:
        """Release the station (protocol rule 6). False, and still the owner, when callbacks did not end in time.

        No callback is entered meanwhile. After `patience_s` async callbacks that are still inside are cut, unless the
        pod is `ending`: then its exit cuts them, as an interruption. A thread cannot be cut: the station stays. So it
        does when a callback that was cut stays inside; its instance is read back when it comes out.
        """
        self.frozen = True
        for engine in list(self.engines.values()):
            if not engine.inside and not engine.unaccepted:
                self.engine_idle(engine)
        give_up = self._loop.time() + patience_s
        while not self.closed:
            late = self._loop.time() >= give_up
            if not self.inside and self.commits.idle:
                break
            if late and ending:
                return False  # still frozen: what was entered in the last moments would only be cut
            overdue = self.inside and self._loop.time() >= give_up + CUT_S
            if late and (self.callbacks_in_threads or overdue):
                self._take_back_cut()
                self._unfreeze()
                return False
            if late:
                self._cut_callbacks()
            await asyncio.sleep(QUIET_POLL_S)
        if self.closed:
            return False
        before_release()
        for engine in self.engines.values():
            engine.cut()
        released = self.commits.seal(r.Released(0, 0, 0, self.now_ms(), successor))
        while not released.done():
            late = ending and self._loop.time() >= give_up
            if self.closed or late:
                return False  # the journal has not taken it: it may be there all the same, the next claim will see
            await asyncio.wait({released}, timeout=QUIET_POLL_S)
        await self.close()
        return True

    def _take_back_cut(self) -> None:
        """The station stays: what was cut goes on from the store, as soon as no callback of it is inside any more."""
        for engine in self.engines.values():
            if engine.closed:
                self.spawn(self.read_back(engine))

    async def read_back(self, engine: Engine) -> None:
        """Out of memory as soon as nothing of it is inside, and back for a slot: it goes on from the store."""
        while engine.inside or engine.unaccepted:
            await asyncio.sleep(QUIET_POLL_S)
        await self.context.store.flush()
        if self.engines.get(engine.serial) is not engine:
            return  # a second move was given up meanwhile, and somebody else has seen to it
        self._release_slot(engine)
        del self.engines[engine.serial]
        del self.by_id[engine.admitted.workflow, engine.admitted.id]
        if not engine.ended:
            self._want_slot(0, engine.serial)

    def _cut_callbacks(self) -> None:
        for engine in self.engines.values():
            if engine.inside:
                engine.cut()

    @property
    def held_up(self) -> bool:
        """Whether a callback is inside that a hand-over cannot cut, or has cut in vain."""
        return any(engine.threads_inside or engine.closed for engine in self.engines.values())

    @property
    def callbacks_in_threads(self) -> bool:
        return any(engine.threads_inside for engine in self.engines.values())

    async def close(self) -> None:
        """Leave memory: engines are cut, slots given back, but those of threads inside. What was pending is dropped."""
        if self.closed:
            return
        self.closed = True
        self._gone.set_result(None)
        self.commits.close()
        for task in self._tasks:
            task.cancel()
        for timer in self._armed.values():
            if timer is not None:
                timer.cancel()
        for engine in list(self.engines.values()):
            engine.cut()
            if engine.threads_inside:
                self._lingering.append(engine)
            else:
                self._release_slot(engine)
        self.engines.clear()
        self.by_id.clear()
        for waiters in self.waiters.values():
            for waiter in waiters:
                waiter.cancel()
        self.waiters.clear()

    async def empty(self) -> None:
        """Once closed: wait until no callback is inside any more, and give the last slots back."""
        while self.inside:
            await asyncio.sleep(QUIET_POLL_S)
        self.give_back_all()

    def give_back_all(self) -> None:
        """Once closed: give the last slots back, whoever is still inside."""
        for engine in self._lingering:
            self._release_slot(engine)
        self._lingering.clear()

    def _unfreeze(self) -> None:
        self.frozen = False
        for serial in sorted(self._shelved):
            self._want_slot(0, serial)
        self._open_gate()
        self.context.slots.kick()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something that ends with the station, at the latest."""
        task = self._loop.create_task(coroutine)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task

    # -- the engines' host ---------------------------------------------------------------------------------------------

    def commit(self, record: r.Record, engine: Engine) -> None:
        self.commits.add(record, engine)

    def now_ms(self) -> int:
        return self.context.broker_time.now_ms()

    def latest_ms(self) -> int:
        return self.context.broker_time.latest_ms()

    def may_fire(self) -> bool:
        return self.context.broker_time.ready

    def random(self) -> float:
        return self.context.rng.random()

    def in_time(self) -> bool:
        return self._session.in_time() and not self.closed

    def may_enter(self, engine: Engine) -> bool:
        able = engine.serial not in self._shelved and not self.frozen and not self.commits.closed and not self.commits.full
        return able and self.in_time() and not self.context.journal.trouble

    def may_admit(self) -> bool:
        """Whether a creation may be admitted now."""
        return not self.frozen and not self.closed and not self.commits.full

    def enter_later(self, engine: Engine) -> None:
        self._at_gate.append(engine)
        if not self._gate_watched:
            self._gate_watched = True
            self.commits.when_room(self._room_made)

    def _room_made(self) -> None:
        self._gate_watched = False
        self._open_gate()

    def _open_gate(self) -> None:
        waiting, self._at_gate = self._at_gate, []
        for engine in waiting:
            engine.enter()

    def engine_rests(self, engine: Engine) -> None:
        self._release_slot(engine)
        self._leave_when_folded(engine)

    def engine_idle(self, engine: Engine) -> None:
        """While the station is frozen nothing of it goes on here: others may use its slot (L3)."""
        if self.frozen and engine.has_slot and engine.may_go_on and not engine.resting:
            self._shelved.add(engine.serial)
            self._release_slot(engine)

    def engine_called(self, engine: Engine) -> None:
        """Not while the station is frozen: the index keeps that it was called, for whoever goes on with it."""
        if not self.frozen and not engine.has_slot and not self.stands_in_line(engine.serial):
            self._want_slot(self.now_ms(), engine.serial)

    def before_time_out(self, engine: Engine, decide: Callable[[], None]) -> None:
        self.time_outs.ask((engine.admitted.workflow, engine.admitted.id), decide)

    async def create_child(self, creation: ChildCreation) -> None:
        await self._creations.create(creation)

    def engine_ended(self, engine: Engine) -> None:
        self._answer_waiters(engine)
        self.outbox.kick()
        if not engine.has_slot:
            self._leave_when_folded(engine)

    def engine_left(self, engine: Engine) -> None:
        self._release_slot(engine)
        self._leave_when_folded(engine)

    def progressed(self, engine: Engine) -> int:
        self._reports += 1
        self.on_progress(engine.serial)
        return self._reports

    def engine_blocked(self, engine: Engine, reason: str) -> None:
        _log.warning("instance held", instance=engine.title, station=str(self.id), why=reason)

    def _release_slot(self, engine: Engine) -> None:
        if engine.has_slot:
            engine.has_slot = False
            souschef = self.souschefs.get(engine.admitted.workflow)
            if souschef is not None:
                souschef.slots_in_use -= 1
            self.context.slots.give_back()

    def _take_slot(self, engine: Engine) -> None:
        engine.has_slot = True
        souschef = self.souschefs.get(engine.admitted.workflow)
        if souschef is not None:
            souschef.slots_in_use += 1

    # -- acceptance and folding ----------------------------------------------------------------------------------------

    def _group_accepted(self, group: r.Group) -> Callable[[], None]:
        for record in group.records:
            if isinstance(record, r.Admitted | r.Parked):
                souschef = self.souschefs.get(record.workflow)
                if souschef is not None and record.queue_sequence:
                    souschef.was_accepted(record.queue_sequence)
                elif souschef is not None and isinstance(record, r.Admitted):
                    self._admitting.discard((record.workflow, record.id))
                    souschef.was_admitted(record.id)
        self.on_group(group)
        number = group.position.header.group
        return lambda: self._folded(number)

    def _leave_when_folded(self, engine: Engine) -> None:
        group = self.commits.tail.header.group
        if engine.leaving >= group or self.closed:
            return
        engine.leaving = group
        self._leaving.append((group, engine))
        if group <= self._folded_to:  # a callback came out late: no fold will follow for it
            self._loop.call_soon(self._folded, group)

    def _folded(self, number: int) -> None:
        self._folded_to = max(self._folded_to, number)
        while self._leaving and self._leaving[0][0] <= number:
            group, engine = self._leaving.popleft()
            stays = engine.is_started and not engine.over and not engine.resting
            if engine.has_slot or engine.unaccepted or engine.closed or stays or engine.leaving > group:
                continue  # it was woken or changed meanwhile: it leaves another time
            self._evict(engine)

    def _evict(self, engine: Engine) -> None:
        engine.cut()
        if self.engines.get(engine.serial) is engine:
            del self.engines[engine.serial]
        key = (engine.admitted.workflow, engine.admitted.id)
        if self.by_id.get(key) is engine:
            del self.by_id[key]

    def leave_if_idle(self, engine: Engine) -> None:
        """An operation has read it back, and it is not to run now: out of memory, when all is folded."""
        if not engine.has_slot and not engine.inside and not engine.closed and (engine.over or not engine.is_started):
            self._leave_when_folded(engine)

    def forget(self, serial: int) -> None:
        """The instance is deleted: out of memory at once. What is still inside keeps its slot until it comes out."""
        engine = self.engines.get(serial)
        if engine is None:
            return
        self._evict(engine)
        self._answer_waiters(engine)
        if engine.inside:
            self._lingering.append(engine)
            self.spawn(self._outlive(engine))
        else:
            self._release_slot(engine)

    async def _outlive(self, engine: Engine) -> None:
        while engine.inside:
            await asyncio.sleep(QUIET_POLL_S)
        self._lingering.remove(engine)
        self._release_slot(engine)

    def _answer_waiters(self, engine: Engine) -> None:
        for waiter in self.waiters.pop((engine.admitted.workflow, engine.admitted.id), ()):
            if not waiter.done():
                waiter.set_result(None)

    # -- admission -----------------------------------------------------------------------------------------------------

    def new_serial(self) -> int:
        serial = self._next_serial
        self._next_serial += 1
        return serial

    def knows(self, workflow: str, instance_id: str) -> bool:
        """Whether the id is known here: in memory (every record not yet folded is), or in the index."""
        return ((workflow, instance_id) in self.by_id
                or self.context.store.find(self.id, workflow, instance_id) is not None)

    def tombstone(self, workflow: str, instance_id: str) -> r.TombRow | None:
        return self.context.store.tombstone(self.id, workflow, instance_id)

    def is_admitting(self, workflow: str, instance_id: str) -> bool:
        """Whether the id is known only by a control operation's Admitted record that is not accepted yet."""
        return (workflow, instance_id) in self._admitting

    def admit(self, souschef: SousChef, admitted: r.Admitted, *, into_slot: bool) -> Engine:
        """Commit a creation; its run() begins after the acceptance."""
        engine = self._hold(souschef.flow, admitted.serial, Replay([admitted]))
        if not admitted.queue_sequence:
            self._admitting.add((admitted.workflow, admitted.id))
        if into_slot:
            self._take_slot(engine)
        engine.admit()
        return engine

    def park(self, record: r.Parked, message: Message) -> None:
        """Set a creation aside that cannot become an instance."""
        self.spawn(set_aside(self, record, message, kind="create", workflow=record.workflow))

    def _hold(self, flow: type[Workflow[Any, Any]], serial: int, replay: Replay) -> Engine:
        engine = Engine(self, flow, serial, replay)
        self.engines[serial] = engine
        self.by_id[engine.admitted.workflow, engine.admitted.id] = engine
        return engine

    # -- waking --------------------------------------------------------------------------------------------------------

    def start_woken(self, serial: int) -> bool:
        self._armed.pop(serial, None)
        engine = self.engines.get(serial)
        if serial in self._shelved:
            if self.frozen:
                return False  # again: it is asked for when this move, too, comes to nothing
            self._shelved.discard(serial)
            if engine is None or not engine.may_go_on or engine.resting:
                return False
            self._take_slot(engine)
            engine.enter()
            return True
        if engine is not None and (engine.is_started or not engine.may_start):
            due = engine.resting and engine.may_go_on and (engine.called or engine.wake_at <= self.now_ms())
            if engine.has_slot or not due:
                return False
            self._take_slot(engine)
            engine.wake()
            return True
        return self._enter_run(serial, engine)

    def _enter_run(self, serial: int, engine: Engine | None) -> bool:
        """Begin with an instance that is not in memory, or only for somebody's sake. False: it needs no slot."""
        row = self.context.store.row(self.id, serial)
        paused = row is not None and row.status is r.Status.PAUSED and engine is None
        if (engine is None and row is None) or (row is not None and row.status.ended) or paused:
            return False
        called = engine is not None and engine.called
        if row is not None and row.status is r.Status.WAITING and row.wake_at > self.now_ms() and not called:
            return False
        if row is not None and self.missing(row):
            self._lacking.add(serial)
            return False
        engine = engine or self.load_engine(serial)
        if not engine.may_go_on:
            return False
        self._take_slot(engine)
        if row is not None and row.interruptions >= INTERRUPTIONS_MAX:
            engine.hold(f"interrupted {row.interruptions} times at one position: its pod ended each time")
        else:
            engine.start_when_accepted()
        return True

    def load_engine(self, serial: int) -> Engine:
        """Read an instance back into memory, without entering run()."""
        replay = Replay(newest_run(self.context.store.history(self.id, serial)))
        assert replay.admitted is not None, f"instance {serial} of station {self.id} has no Admitted record"
        flow = self.context.app.workflows.get(replay.admitted.workflow, Workflow)
        return self._hold(flow, serial, replay)

    def missing(self, row: r.InstanceRow) -> str:
        """What this pod's app lacks to run the instance, or ""."""
        flow = self.context.app.workflows.get(row.workflow)
        if flow is None:
            return f"version: pod {self.context.pod} does not have workflow {row.workflow!r}"
        if workflow_version(flow) != row.version:
            return (f"version: pod {self.context.pod} has version {workflow_version(flow)!r} of {row.workflow!r}, the "
                    f"instance needs {row.version!r}")
        return ""

    @property
    def epoch(self) -> int:
        return self.commits.tail.header.epoch

    def _want_slot(self, due: int, serial: int) -> None:
        if (timer := self._armed.get(serial)) is not None:
            timer.cancel()
        self._armed[serial] = None
        self.context.slots.wake(due, self, serial)

    def stands_in_line(self, serial: int) -> bool:
        """Whether it could go on, and waits for a slot."""
        return serial in self._armed and self._armed[serial] is None

    async def _scan_timers(self) -> None:
        """Bring the timers that are due soon into memory; the others stay in the store."""
        while True:
            self._open_gate()  # it may have been closed by what brings no acceptance here: another station's trouble
            if self.context.broker_time.ready and not self.frozen:
                now = self.now_ms()
                limit = TIMERS_PER_SCAN + len(self._armed) + len(self._lacking)  # they stand before all others
                for due, serial in self.context.store.due(self.id, now + TIMER_HORIZON_MS, limit):
                    engine = self.engines.get(serial)
                    seen_to = serial in self._armed or serial in self._lacking
                    if not seen_to and (engine is None or not engine.has_slot):
                        self._arm(due, serial, now)
            await asyncio.sleep(TIMER_SCAN_S)

    def _arm(self, due: int, serial: int, now: int) -> None:
        delay_s = max(0, due - now) / 1000
        self._armed[serial] = self._loop.call_later(delay_s, self._fire, due, serial)

    def _fire(self, due: int, serial: int) -> None:
        now = self.now_ms()
        if due > now:
            self._arm(due, serial, now)
        else:
            self._want_slot(due, serial)
