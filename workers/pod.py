"""A pod: one worker process. Wires the parts together, follows its session, and ends in order.

`Pod` takes its ports from outside, so that simulations run many of them in one loop; `run_pod` is the real one.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

from toque import _subjects as subjects
from toque._accounts import ensure_account, ensure_queue_stream
from toque._app import App
from toque._logging import configure, get_logger
from toque._protocol import AccountRecord, Layout, PodView, SessionRecord, encode, is_json, wants_tasks
from toque._subjects import StationId
from toque.errors import SetupError, ToqueError, Unavailable
from toque.storage.journal import Journal
from toque.storage.lmdb_store import LmdbStore, set_aside
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import NatsOptions
from toque.storage.ports import Bus, BusError, BusTimeout, Clock, Message, NoResponders, Store, StreamInfo
from toque.storage.server_check import check_server
from toque.storage.snapshots import SnapshotObjects
from toque.storage.system import SystemClock
from toque.workers.attempt import Callbacks
from toque.workers.broker_time import BrokerTime
from toque.workers.context import PodContext
from toque.workers.control import ControlWatch
from toque.workers.event_reader import EventReader
from toque.workers.journal_trim import JournalTrim
from toque.workers.keeper_thread import KeeperThread
from toque.workers.leasing import Leasing
from toque.workers.loop_watch import Lag, LoopWatch
from toque.workers.news import listen
from toque.workers.ownership import Ownership
from toque.workers.queue_purge import EVERY_S, QueuePurge
from toque.workers.queue_reader import QueueReader
from toque.workers.session import DirectoryLock, Session, end_session
from toque.workers.slots import Slots
from toque.workers.snapshot_taker import SnapshotRules, SnapshotTaker
from toque.workers.station import Station
from toque.workers.stream_reader import StreamReader
from toque.workflow import workflow_version

SAMPLE_S = 1.0
REOPEN_S = 0.5
EXIT_OK = 0
EXIT_STORE = 4
SUSPECT_FILE = "suspect"
STORE_DIRECTORY = "store"
QUIET_S = 0.02
CUT_S = 1.0  # so long a callback that was cut at the end may clean up

_log = get_logger("toque.pod")


@dataclass(frozen=True)
class PodOptions:
    """What `toque worker` is told."""

    pod: str
    """Name of the pod: unique in its account, the same after a restart."""
    data: Path
    """Directory of this pod alone."""
    account: str
    nats: NatsOptions
    grace_s: float = 25.0
    """How long SIGTERM lets callbacks run before the exit cuts them."""
    monitor_url: str | None = None
    require_sync: bool = False
    slots_max: int = 10_000
    """Most instances that run here at once."""
    threads_max: int = 32
    """Most sync callbacks that run here at once."""
    ttl_s: float | None = None
    """TTL of the session; None = the account's."""
    snapshot_after_bytes: int = SnapshotRules.journal_bytes_min
    """A station's journal grows by so much, at least, between two of its snapshots."""
    log_json: bool = False
    dev: bool = False


class Keeper(Protocol):
    """Keeps one session."""

    async def open(self) -> None: ...

    def announce(self, record: SessionRecord) -> None: ...

    async def leave(self) -> None: ...


KeeperFactory = Callable[[Session, Callable[[str], None]], Keeper]


class Pod:
    """One pod on given ports. `run` ends when `stop` was called, or raises what made it impossible to go on."""

    def __init__(self, app: App, *, pod: str, account: AccountRecord, layout: Layout, bus: Bus, store: Store,
                 clock: Clock, rng: random.Random, make_keeper: KeeperFactory, env: object = None,
                 slots_max: int = 10_000, threads_max: int = 32, ttl_s: float | None = None,
                 callbacks: Callbacks | None = None, loop_watch: LoopWatch | None = None,
                 remember_session: Callable[[str], None] = lambda session: None,
                 snapshot_rules: SnapshotRules | None = None) -> None:
        self._snapshot_rules = snapshot_rules or SnapshotRules()
        self._make_keeper = make_keeper
        self._remember_session = remember_session
        self._loop_watch = loop_watch
        self._slots_max = slots_max
        self._ttl_s = ttl_s or account.ttl_s
        self._stopping = asyncio.Event()
        self._fatal: ToqueError | None = None
        self._halted: dict[StationId, str] = {}
        self._own_sessions: set[str] = set()
        self._sessionless = ""  # why there is no session, when a lost one could not be followed by another yet
        self._tasks: dict[asyncio.Future[None], None] = {}  # in their order, so that runs can be repeated
        self._session_tasks: dict[asyncio.Future[None], None] = {}
        slots = Slots(may_start=lambda: self.context.may_start())
        self.context = PodContext(
            pod=pod, account=account.name, app=app, bus=bus, store=store, clock=clock, rng=rng,
            journal=Journal(bus, account.name),
            snapshots=SnapshotObjects(bus, account.name, chunk_bytes_max=self._snapshot_rules.chunk_bytes_max),
            broker_time=BrokerTime(clock),
            session=Session(clock, SessionRecord(pod=pod, session="", ttl_s=self._ttl_s)), slots=slots,
            callbacks=callbacks or Callbacks(threads_max),
            control=ControlWatch(bus, account.name, clock, account, layout), env=env)
        self._readers: dict[str, QueueReader] = {}
        self._event_reader: EventReader | None = None
        self._leasing: Leasing | None = None
        self._journal_info: StreamInfo | None = None  # as of the last sample of the server's time
        self._keeper: Keeper | None = None
        self.ownership: Ownership | None = None
        self.context.control.on_change(self._control_changed)

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self, *, grace_s: float = 25.0, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`; then hand over within `grace_s`, end the session, close the store."""
        context = self.context
        await self._sample()
        context.started_at = context.broker_time.now_ms()
        for workflow in context.app.workflows:
            await ensure_queue_stream(context.bus, context.control.account, context.control.layout, workflow)
        await context.control.open()
        reports = await context.bus.subscribe(subjects.pods(context.account), self._report)
        try:
            await self._open_first_session()
            self._spawn(self._follow_time())
            self._spawn(self._purge())
            self._spawn(self._trim())
            ready()
            await self._stopping.wait()
            await self._hand_over(grace_s)
        finally:
            for task in (*self._session_tasks, *self._tasks):
                task.cancel()
            await reports.close()
            await context.control.close()
        if self._fatal is not None:
            raise self._fatal

    async def _open_first_session(self) -> None:
        """Returns early when the pod is stopped meanwhile: a broker that is away must not hold up its end."""
        opening = asyncio.ensure_future(self._open_session())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not opening.done():
            opening.cancel()
            return
        opening.result()

    def stop(self, why: ToqueError | None = None) -> None:
        """End in order; with `why`, end at once with that error."""
        self._fatal = self._fatal or why
        self._stopping.set()

    def _spawn(self, coroutine: Awaitable[None], *, of_session: bool = False) -> None:
        tasks = self._session_tasks if of_session else self._tasks
        task = asyncio.ensure_future(coroutine)
        tasks[task] = None
        task.add_done_callback(lambda done: self._task_done(done, tasks))

    def _task_done(self, task: asyncio.Future[None], tasks: dict[asyncio.Future[None], None]) -> None:
        tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a part of the pod failed", exc_info=error)
            self.stop(error if isinstance(error, ToqueError)
                      else ToqueError(f"a part of the pod failed: {type(error).__name__}: {error}"))

    async def _hand_over(self, grace_s: float) -> None:
        context, ownership = self.context, self.ownership
        if ownership is not None and self._fatal is None and context.session.in_time():
            self._announce(leaving=True)
            if not await ownership.hand_over_all(grace_s):
                _log.warning("callbacks were cut by the end of the pod", inside=context.callbacks.inside,
                             stations=", ".join(map(str, ownership.stations)))
        if ownership is not None:
            await ownership.drop_all()
        if self._keeper is not None and await self._callbacks_out():
            await self._keeper.leave()
        context.session.lost = True

    async def _callbacks_out(self) -> bool:
        """Whether every callback is out; those that were cut get a moment for it, a thread cannot be cut.

        If not, the exit ends them and the session runs out by its TTL: whoever ended it now would let another pod enter
        a callback that is still inside here.
        """
        callbacks = self.context.callbacks
        give_up = asyncio.get_running_loop().time() + CUT_S
        while callbacks.inside > callbacks.threads_inside and asyncio.get_running_loop().time() < give_up:
            await asyncio.sleep(QUIET_S)
        return not callbacks.inside

    # -- session -------------------------------------------------------------------------------------------------------

    async def _open_session(self) -> None:
        context = self.context
        session = f"{context.pod}-{context.rng.getrandbits(48):012x}"
        self._own_sessions.add(session)
        self._remember_session(session)
        versions = {name: workflow_version(flow) for name, flow in context.app.workflows.items()}
        record = SessionRecord(pod=context.pod, session=session, started_at=context.started_at, ttl_s=self._ttl_s,
                               workflows=versions)
        context.session = Session(context.clock, record)
        keeper = self._make_keeper(context.session, self._session_lost)
        await keeper.open()
        self._keeper = keeper
        self._readers = {
            workflow: QueueReader(context.bus, context.account, workflow, context.slots, session=session)
            for workflow in context.app.workflows
        }
        self._event_reader = EventReader(context.bus, context.account, session=session)
        self._leasing = Leasing(context.bus, context.account, context.session, context.slots,
                                slots_max=self._slots_max)
        self.ownership = Ownership(context, on_change=self._announce, on_station=self._station_opened,
                                   on_gone=self._station_gone, on_halted=self._station_halted)
        context.slots.on_start = self._top_up
        context.slots.on_hunger = self._leasing.ask_soon
        self._spawn(self._leasing.run(), of_session=True)
        self._spawn(self.ownership.run(), of_session=True)
        for reader in self._all_readers():
            self._spawn(reader.run(), of_session=True)

    def _session_lost(self, why: str) -> None:
        self._spawn(self._reopen(why))

    async def _reopen(self, why: str) -> None:
        """The session is over: everything it held leaves memory, then another one is opened."""
        context = self.context
        old = context.session
        _log.warning("session over; its stations are read back under the next one", session=old.id, why=why)
        for task in list(self._session_tasks):
            task.cancel()
        context.slots.set_ceiling(0)
        if self.ownership is not None:
            await self.ownership.drop_all()
        while context.callbacks.inside:
            await asyncio.sleep(QUIET_S)  # the keeper ends the process if they outlive the session
        old.quiet = True  # callbacks inside from here on are the next session's
        while not self._stopping.is_set():
            try:
                await end_session(context.bus, context.account, old.id, reason="lost", by=old.id, over_live=True)
                await self._open_session()
                self._sessionless = ""
                return
            except (BusTimeout, BusError, NoResponders, Unavailable) as error:
                self._sessionless = f"no new session can be opened: {error}"
                _log.info("no new session yet", why=str(error))
                await asyncio.sleep(REOPEN_S)

    def _control_changed(self, what: str) -> None:
        self._warn_of_namesake(what.removeprefix("session."))
        if self.ownership is not None:
            self.ownership.control_changed(what)

    def _warn_of_namesake(self, session: str) -> None:
        seen = self.context.control.sessions.get(session)
        if seen is None or seen.record is None or not seen.live or session in self._own_sessions:
            return
        if seen.record.pod == self.context.pod:
            self._own_sessions.add(session)  # told once
            _log.warning("another session of this pod's name lives, or its process died less than a TTL ago",
                         session=session, remedy="give every pod a --pod name of its own")

    def _announce(self, *, leaving: bool = False) -> None:
        if self._keeper is None or self.ownership is None:
            return
        record = self.context.session.record
        stations = sorted(str(station) for station in self.ownership.stations)
        self._keeper.announce(msgspec.structs.replace(record, stations=stations, leaving=leaving or record.leaving))

    # -- stations ------------------------------------------------------------------------------------------------------

    def _station_opened(self, station: Station) -> None:
        self._halted.pop(station.id, None)
        for workflow, souschef in station.souschefs.items():
            if souschef not in self.context.slots.sources:
                self.context.slots.sources.append(souschef)
            self._readers[workflow].add(souschef)
        if self._event_reader is not None:
            station.time_outs.reader = self._event_reader
            station.events.on_room = self._event_reader.top_up
            self._event_reader.add(station.events)

    def _station_gone(self, station: StationId) -> None:
        slots = self.context.slots
        slots.sources = [source for source in slots.sources if source.station != station]  # type: ignore[attr-defined]
        for reader in self._all_readers():
            reader.remove(station)

    def _all_readers(self) -> list[StreamReader[Any]]:
        return [*self._readers.values(), *([self._event_reader] if self._event_reader is not None else [])]

    def _station_halted(self, station: StationId, error: ToqueError) -> None:
        self._halted[station] = str(error)

    def _top_up(self) -> None:
        if self._leasing is not None:
            self._leasing.lower_soon()
        for reader in self._readers.values():
            reader.top_up()

    # -- periodic ------------------------------------------------------------------------------------------------------

    async def _sample(self) -> None:
        context = self.context
        sent = context.clock.boottime()
        info = await context.bus.stream_info(subjects.journal_stream(context.account))
        received = context.clock.boottime()
        self._journal_info = info
        context.session.roundtrip_at = received
        context.broker_time.sample(sent=sent, received=received, server_ms=info.server_time_ms)

    async def _follow_time(self) -> None:
        """Broker time, and the proof that this loop still reaches JetStream (protocol rules 7 and 10)."""
        period = min(SAMPLE_S, self._ttl_s / 8)
        while True:
            try:
                await self._sample()
                self.context.slots.kick()
            except (BusTimeout, BusError, NoResponders) as error:
                _log.info("no round trip to JetStream", why=str(error))
            await asyncio.sleep(period)

    async def _purge(self) -> None:
        context = self.context
        purge = QueuePurge(context.bus, context.account, owns_first=self._owns_first)
        heard = await listen(context.bus, subjects.queue_positions(context.account), purge.heard)
        try:
            while True:
                await asyncio.sleep(EVERY_S)
                if self.ownership is not None and context.session.in_time():
                    await purge.tick(self._all_readers(), self.ownership.all_stations(),
                                     context.control.account.queue_limit)
        finally:
            await heard.close()

    async def _trim(self) -> None:
        context, rules = self.context, self._snapshot_rules
        trim = JournalTrim(context.bus, context.journal, context.account, owns_first=self._owns_first,
                           held_back_bytes_min=rules.held_back_bytes_min)
        taker = SnapshotTaker(context, trim, rules)
        heard = await listen(context.bus, subjects.journal_positions(context.account), trim.heard)
        self._spawn(self._take_snapshots(taker))
        try:
            while True:
                await asyncio.sleep(EVERY_S)
                if self.ownership is not None and self._journal_info is not None and context.session.in_time():
                    await trim.tick(taker.kept, self.ownership.all_stations(), self._journal_info)
        finally:
            await heard.close()

    async def _take_snapshots(self, taker: SnapshotTaker) -> None:
        """Apart from the telling, for one may take long."""
        while True:
            await asyncio.sleep(EVERY_S)
            if self.ownership is not None and self._journal_info is not None and self.context.session.in_time():
                await taker.tick(self.ownership.stations.values(), self.ownership.all_stations(), self._journal_info)

    def _owns_first(self) -> bool:
        return self.ownership is not None and self.ownership.owns_first()

    def _trouble(self) -> str:
        halted = next(iter(self._halted.values()), "")
        return self.context.journal.trouble or halted or self._sessionless

    def _report(self, message: Message) -> None:
        context, callbacks = self.context, self.context.callbacks
        if not message.reply or self._leasing is None:
            return
        lag_s, worst = (self._loop_watch.lag_s, self._loop_watch.worst()) if self._loop_watch else (0.0, Lag(0.0, ""))
        view = PodView(
            pod=context.pod, session=context.session.id,
            stations=sorted(map(str, self.ownership.stations)) if self.ownership else [],
            slots_leased=self._leasing.leased, slots_in_use=context.slots.in_use, slots_wanted=self._leasing.wanted,
            loop_lag_ms=round(lag_s * 1000, 1), workflows=context.session.record.workflows,
            started_at=context.started_at, journal=self._trouble() or "ok",
            loop_lag_worst_ms=round(worst.seconds * 1000, 1), loop_blocked_by=worst.by,
            threads_in_use=callbacks.threads_taken, threads_abandoned=callbacks.threads_abandoned,
            threads_max=callbacks.threads_max, pid=os.getpid(), host=socket.gethostname(),
            memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            tasks=len(asyncio.all_tasks()) if wants_tasks(message.data) else 0)
        context.bus.respond(message, encode(view, json=is_json(message.data)))


# -- the real one ------------------------------------------------------------------------------------------------------

async def run_pod(app: App, options: PodOptions) -> int:
    """Run one pod until SIGTERM or SIGINT. Returns the exit code. Raises ToqueError when it cannot serve."""
    configure(json=options.log_json)
    structlog.contextvars.bind_contextvars(pod=options.pod)
    lock = _lock(options)
    async with AsyncExitStack() as stack:
        stack.callback(lock.release)
        pod: Pod | None = None

        def damaged(error: Exception) -> None:
            (options.data / SUSPECT_FILE).touch()
            if pod is not None:
                pod.stop(SetupError(f"the local store in {options.data} cannot be used any more ({error}). Nothing is "
                                    f"lost: the next start sets it aside and reads the journal. See to the disk first"))

        store = _open_store(options, damaged)  # first of all: a directory of somebody else's must change nothing
        stack.callback(store.close)
        bus = await NatsBus.connect(options.nats)
        stack.push_async_callback(bus.close)
        await check_server(bus, options.monitor_url, options.require_sync)
        defaults = AccountRecord(name=options.account, ttl_s=options.ttl_s) if options.ttl_s else None
        account, layout = await ensure_account(bus, options.account, defaults=defaults)
        if previous := lock.last_session():
            await end_session(bus, options.account, previous, reason="dead", by=options.pod, over_live=True)
        env = await _enter_lifespan(app, stack)
        callbacks = Callbacks(options.threads_max)
        stack.callback(callbacks.close)
        clock = SystemClock()
        loop_watch = LoopWatch(clock, ttl_s=options.ttl_s or account.ttl_s)
        loop_watch.start()
        stack.callback(loop_watch.close)

        def make_keeper(session: Session, on_lost: Callable[[str], None]) -> KeeperThread:
            return KeeperThread(lambda: NatsBus.connect(options.nats), options.account, clock, session,
                                callbacks=callbacks, loop_watch=loop_watch, on_lost=on_lost)

        pod = Pod(app, pod=options.pod, account=account, layout=layout, bus=bus, store=store, clock=clock,
                  rng=random.Random(), make_keeper=make_keeper, env=env, slots_max=options.slots_max,
                  threads_max=options.threads_max, ttl_s=options.ttl_s, callbacks=callbacks, loop_watch=loop_watch,
                  remember_session=lock.remember_session,
                  snapshot_rules=SnapshotRules(journal_bytes_min=options.snapshot_after_bytes))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, pod.stop)
        await pod.run(grace_s=options.grace_s, ready=lambda: _log.info("pod serves", account=options.account,
                                                                      workflows=", ".join(sorted(app.workflows))))
    if callbacks.threads_inside:
        os._exit(EXIT_OK)  # threads that outlived the grace time: nothing of theirs counts any more
    return EXIT_OK


def _lock(options: PodOptions) -> DirectoryLock:
    try:
        lock = DirectoryLock(options.data)
    except OSError as error:
        raise SetupError(f"{options.data} cannot be used as a pod's directory: {error.strerror}. Give another one "
                         f"with --data") from error
    if not lock.acquire():
        raise SetupError(f"{options.data} is in use by another pod process. Give each pod its own --data directory")
    return lock


def _open_store(options: PodOptions, on_damage: Callable[[Exception], None]) -> LmdbStore:
    directory = options.data / STORE_DIRECTORY
    suspect = options.data / SUSPECT_FILE
    if suspect.exists() and directory.exists():
        _log.warning("local store set aside", to=str(set_aside(directory)))
    suspect.unlink(missing_ok=True)
    store = LmdbStore(directory, account=options.account, pod=options.pod, on_damage=on_damage)
    if store.set_aside_to is not None:
        _log.warning("local store set aside", to=str(store.set_aside_to))
    return store


async def _enter_lifespan(app: App, stack: AsyncExitStack) -> object:
    if app.lifespan is None:
        return None
    try:
        return await stack.enter_async_context(app.lifespan())
    except Exception as error:  # user code: a database that does not answer yet, most often
        _log.warning("the lifespan raised", exc_info=error)
        raise Unavailable(f"the lifespan of {app.reference} raised {type(error).__name__}: {error}") from error
