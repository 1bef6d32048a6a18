"""Decides which stations this pod claims and hands over, and carries it out (protocol rules 1, 6 and 8).

A claim is a compare-and-append on the tail of a station whose owner released it or whose session was ended. Any pod may
try at any time; the journal decides.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from toque import _subjects as subjects
from toque._logging import get_logger
from toque._protocol import SessionRecord
from toque._subjects import StationId
from toque.errors import ToqueError
from toque.storage import records as r
from toque.storage.journal import Abandoned, Deposed, JournalHalted, Tail
from toque.storage.ports import BusError, BusTimeout, Message, NoResponders, Subscription
from toque.storage.restore import Restore
from toque.workers.answers import Answers
from toque.workers.gatekeeper import SWEEP_EVERY_S, Gatekeeper
from toque.workers.news import listen, within
from toque.workers.session import end_session
from toque.workers.spread import spread
from toque.workers.station import Station

if TYPE_CHECKING:
    from toque.workers.context import PodContext

TICK_S = 0.5
RELEASED_ANYONE_S = 2.0  # so long a released station waits for the successor that was named
MOVE_PATIENCE_S = 30.0
MOVE_AGAIN_S = 10.0  # after a move that a callback held up

_log = get_logger("toque.ownership")


class Ownership:
    """The stations of one pod under one session."""

    def __init__(self, context: PodContext, *, on_change: Callable[[], None],
                 on_station: Callable[[Station], None], on_gone: Callable[[StationId], None],
                 on_halted: Callable[[StationId, ToqueError], None]) -> None:
        self._context = context
        self._on_change = on_change
        self._on_station = on_station
        self._on_gone = on_gone
        self._on_halted = on_halted
        self.stations: dict[StationId, Station] = {}
        self._unheld: set[StationId] = set()  # their last group may be this session's: nobody else can claim them
        self._answers: dict[StationId, Answers] = {}
        self._gates: dict[StationId, tuple[Gatekeeper, Subscription, asyncio.Task[None]]] = {}
        self._moving: dict[StationId, asyncio.Task[None]] = {}
        self._claimed: dict[StationId, str] = {}  # claimed and not opened yet → whose session's end interrupted it, if any
        self._not_before: dict[StationId, float] = {}
        self._dropping: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._claims = asyncio.Lock()  # held while a claim is under way
        self.leaving = False

    def control_changed(self, what: str) -> None:
        """Told by the pod: "account", "layout" or "session.<id>" of the control bucket is another one now."""
        self._news.set()
        if what == "account":
            for gatekeeper, _, _ in self._gates.values():
                gatekeeper.limits_changed()

    def all_stations(self) -> list[StationId]:
        return [StationId(generation, number) for generation, count in self._context.control.layout.generations
                for number in range(count)]

    def owns_first(self) -> bool:
        """Whether the Gatekeeper's station is here."""
        held = self.stations.get(self._gatekeeper_station())
        return held is not None and held.in_time()

    async def run(self) -> None:
        """Claim and move until cancelled."""
        hint = await listen(self._context.bus, subjects.released(self._context.account), self._hinted)
        unlooked = self.all_stations()
        try:
            while True:
                unlooked = await self._look_behind(unlooked)
                if self._context.session.in_time() and not self.leaving:
                    await self._tick()
                await within(self._news.wait(), TICK_S)
                self._news.clear()
        finally:
            await hint.close()

    async def _look_behind(self, stations: list[StationId]) -> list[StationId]:
        """Whether the journal still has what this pod knows as accepted, also of stations that others will have.

        Returns those that are still to be looked at: the server did not answer.
        """
        journal = self._context.journal
        for place, station in enumerate(stations):
            known = self._context.store.position(station)
            try:
                if known is not None:
                    await journal.check_reaches(station, known, await journal.tail(station))
            except (BusTimeout, BusError, NoResponders) as error:
                _log.info("tail not read", station=str(station), why=str(error))
                return stations[place:]
            except JournalHalted as error:
                self._halt(station, error)
        return []

    def _hinted(self, _: Message) -> None:
        self._news.set()

    # -- what should be where ------------------------------------------------------------------------------------------

    def _wanted(self) -> tuple[dict[StationId, str], dict[str, SessionRecord]]:
        """The session that each station should be with, and the sessions by id."""
        live = {record.session: record for record in self._context.control.live_sessions() if not record.leaving}
        mine = self._context.session
        if not mine.lost and not mine.record.leaving:
            live[mine.id] = mine.record
        able = max((len(record.workflows) for record in live.values()), default=0)
        pods = [session for session, record in live.items() if len(record.workflows) == able]
        owners = _owners(live)
        for station in (*self.stations, *self._unheld):
            owners[station] = mine.id
        return spread(self.all_stations(), pods, owners), live

    async def _tick(self) -> None:
        wanted, _ = self._wanted()
        mine = self._context.session.id
        for station, session in wanted.items():
            held = self.stations.get(station)
            if held is None and (session == mine or station in self._unheld):
                try:
                    async with self._claims:
                        await self._claim(station)
                except (BusTimeout, BusError, NoResponders) as error:
                    _log.info("claim put off", station=str(station), why=str(error))
                except JournalHalted as error:
                    self._halt(station, error)
            elif held is not None and not held.closed and session != mine and self._may_move(station):
                self._moving[station] = asyncio.get_running_loop().create_task(self._move(held, session))

    def _halt(self, station: StationId, error: JournalHalted) -> None:
        _log.error("station halted", station=str(station), why=str(error))
        self._not_before[station] = self._now() + MOVE_AGAIN_S
        self._on_halted(station, error)

    def _may_move(self, station: StationId) -> bool:
        """After a move that was held up, not before that callback is out: the station stands still during each try."""
        again = station in self._not_before and self.stations[station].held_up
        return not again and station not in self._moving and self._now() >= self._not_before.get(station, 0.0)

    def _now(self) -> float:
        return self._context.clock.boottime()

    # -- claiming ------------------------------------------------------------------------------------------------------

    async def _claim(self, station: StationId) -> None:
        if self.leaving or self._now() < self._not_before.get(station, 0.0):
            return
        context = self._context
        session = context.session
        tail = await context.journal.tail(station)
        if not await self._may_claim(station, tail):
            self._unheld.discard(station)
            return
        await context.store.flush()
        await context.journal.check_reaches(station, context.store.position(station), tail)
        self._unheld.add(station)  # until it is held here, or somebody else is known to have it
        started = time.perf_counter()
        epoch = tail.position.header.epoch + 1 if tail else 1
        number = tail.position.header.group + 1 if tail else 1
        body = r.join_records([r.encode_record(r.Claim(0, 0, 0, context.broker_time.now_ms(), context.pod, session.id))])
        header = r.GroupHeader(epoch, session.id, number, r.crc_of(body))
        try:
            sequence = await context.journal.append(station, header, body, may_send=session.in_time,
                                                    expected=tail.position.sequence if tail else 0)
        except Deposed:
            self._unheld.discard(station)
            return  # somebody else was first
        except Abandoned:
            return  # our session is over, or it was renewed only just now: then the next tick claims
        except JournalHalted:
            if not _follows(tail, await context.journal.tail(station)):
                raise
            self._news.set()  # the last owner had a group in flight, which landed first: claim above it
            return
        position = r.Position(sequence, header)
        self._note_claim(station, tail)
        restored = await Restore(context.store, context.journal, context.snapshots, station, position).run()
        if not session.in_time():
            return
        held = Station(context, station, position, on_lost=self._lost)
        held.restored = restored
        self.stations[station] = held
        self._unheld.discard(station)
        try:
            await self._open(held, self._claimed[station])
        except (BusTimeout, BusError, NoResponders):
            await self._drop(held)  # half open it would be ours and serve nobody; the next tick claims it again
            self._unheld.add(station)
            raise
        if held.closed:
            return
        del self._claimed[station]
        held.restored_ms = int((time.perf_counter() - started) * 1000)
        _log.info("station claimed", station=str(station), epoch=epoch, restored_from=restored.snapshot or restored.source,
                  groups=restored.groups, restored_ms=held.restored_ms)

    def _note_claim(self, station: StationId, tail: Tail | None) -> None:
        """Whom the station's instances were interrupted with. A claim of ours that was never opened interrupted nobody."""
        if tail is None or tail.released is not None:
            self._claimed[station] = ""
        elif tail.position.header.session != self._context.session.id:
            self._claimed[station] = tail.position.header.session
        else:
            self._claimed.setdefault(station, self._context.session.id)

    async def _may_claim(self, station: StationId, tail: Tail | None) -> bool:
        context = self._context
        if tail is None:
            return True
        if tail.released is not None:
            successor = tail.released.successor
            known = context.control.sessions.get(successor)
            gone = successor == "" or known is None or not known.live
            waited_ms = context.broker_time.now_ms() - tail.released.at
            return successor == context.session.id or gone or waited_ms >= RELEASED_ANYONE_S * 1000
        owner = tail.position.header.session
        if owner == context.session.id:
            return True  # our own epoch, given up in memory: claim above it
        seen = context.control.sessions.get(owner)
        if seen is not None and seen.live:
            return False
        ended = await end_session(context.bus, context.account, owner, reason="expired", by=context.session.id)
        return ended is not None

    async def _open(self, held: Station, interrupted_by: str) -> None:
        answers = Answers(held)
        self._answers[held.id] = answers
        await held.load(interrupted_by=interrupted_by)
        if not held.closed:
            await answers.open()
        if not held.closed and held.id == self._gatekeeper_station():
            await self._open_gatekeeper(held)
        if held.closed:  # lost meanwhile: what was opened behind its loss is closed again
            await answers.close()
            await self._close_gatekeeper(held.id)
        else:
            held.take_up()
            held.spawn(answers.lifecycle.sweep())
            self._on_station(held)
            self._on_change()

    # -- Gatekeeper ----------------------------------------------------------------------------------------------------

    def _gatekeeper_station(self) -> StationId:
        return StationId(self._context.control.layout.generations[-1][0], 0)

    async def _open_gatekeeper(self, held: Station) -> None:
        context = self._context

        gatekeeper = Gatekeeper(
            context.store.leases(held.id), context.control, context.clock, epoch=held.commits.tail.header.epoch,
            commit=held.commits.submit, now_ms=held.now_ms, respond=context.bus.respond, in_time=held.in_time,
            nudge=lambda: context.bus.emit(subjects.gatekeeper_nudge(context.account), b""))
        subscription = await context.bus.subscribe(subjects.gatekeeper(context.account), gatekeeper.handle)
        self._gates[held.id] = (gatekeeper, subscription, asyncio.get_running_loop().create_task(self._sweep(gatekeeper)))

    async def _sweep(self, gatekeeper: Gatekeeper) -> None:
        context = self._context
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            for session in gatekeeper.expired():
                try:
                    await end_session(context.bus, context.account, session, reason="expired", by=context.session.id)
                except (BusTimeout, BusError, NoResponders) as error:
                    _log.info("an expired session is not ended yet", session=session, why=str(error))
            gatekeeper.sweep()

    def _stop_gatekeeper(self, station: StationId) -> None:
        """From here on it writes no record."""
        if station in self._gates:
            self._gates[station][0].closed = True

    async def _close_gatekeeper(self, station: StationId) -> None:
        self._stop_gatekeeper(station)
        gate = self._gates.pop(station, None)
        if gate is not None:
            _, subscription, sweeper = gate
            sweeper.cancel()
            await subscription.close()

    # -- giving up -----------------------------------------------------------------------------------------------------

    async def _move(self, held: Station, successor: str) -> None:
        try:
            moved = await self._hand_over(held, successor, MOVE_PATIENCE_S, ending=False)
            if moved:
                self._not_before.pop(held.id, None)
            else:
                self._not_before[held.id] = self._now() + MOVE_AGAIN_S
        finally:
            self._moving.pop(held.id, None)

    async def _hand_over(self, held: Station, successor: str, patience_s: float, *, ending: bool) -> bool:
        self._on_gone(held.id)
        moved = await held.hand_over(successor, patience_s=patience_s, ending=ending,
                                     before_release=lambda: self._stop_gatekeeper(held.id))
        if moved:
            await self._close_gatekeeper(held.id)
            await self._forget(held)
            self._context.bus.emit(subjects.released(self._context.account), str(held.id).encode())
            _log.info("station released", station=str(held.id), successor=successor)
        elif not held.closed and not ending:
            self._on_station(held)
        return moved

    async def hand_over_all(self, patience_s: float) -> bool:
        """Release every station, each as soon as it is quiet. True when none is left."""
        self.leaving = True
        for task in list(self._moving.values()):
            task.cancel()
        give_up = self._now() + patience_s
        if await within(self._claims.acquire(), patience_s):  # what is being claimed is handed over with the others
            self._claims.release()
        others = {record.session: record for record in self._context.control.live_sessions()
                  if record.session != self._context.session.id and not record.leaving}
        targets = spread(self.all_stations(), others, _owners(others))  # as the others see it: see _wanted
        await asyncio.gather(*(
            self._hand_over(held, targets.get(held.id, ""), max(0.0, give_up - self._now()), ending=True)
            for held in list(self.stations.values())
        ))
        return not self.stations

    async def drop_all(self) -> None:
        """The session is lost: every engine leaves memory."""
        for task in list(self._moving.values()):
            task.cancel()
        for held in list(self.stations.values()):
            self._on_gone(held.id)
            await self._close_gatekeeper(held.id)
            await held.close()
            held.give_back_all()
            await self._forget(held)

    def _lost(self, held: Station, error: ToqueError) -> None:
        """The station's epoch is over: deposed, halted, or abandoned at the deadline."""
        _log.warning("station lost", station=str(held.id), why=str(error))
        if isinstance(error, JournalHalted):
            self._on_halted(held.id, error)
        if not isinstance(error, Deposed):
            self._unheld.add(held.id)  # while the session lives nobody else may claim it: the journal is read again
        self._on_gone(held.id)
        task = asyncio.get_running_loop().create_task(self._drop(held))
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def _drop(self, held: Station) -> None:
        """It is not claimed again before its threads have left: they would be inside beside their next attempt."""
        await self._close_gatekeeper(held.id)
        await held.close()
        await held.empty()
        await self._forget(held)

    async def _forget(self, held: Station) -> None:
        if self.stations.get(held.id) is held:
            del self.stations[held.id]
        answers = self._answers.pop(held.id, None)
        if answers is not None:
            await answers.close()
        self._on_change()


def _follows(before: Tail | None, now: Tail | None) -> bool:
    """Whether the tail is the one group that the owner of the tail before it may have had in flight."""
    if before is None or now is None:
        return False
    old, new = before.position.header, now.position.header
    return (new.epoch, new.session, new.group) == (old.epoch, old.session, old.group + 1)


def _owners(live: dict[str, SessionRecord]) -> dict[StationId, str]:
    return {StationId.parse(text): session for session, record in live.items() for text in record.stations}
