"""What ended instances of one station still have to tell others: their end to a parent, that it is over to children.

An entry is folded from the terminal record and stands until `Delivered` is accepted (protocol rule 25); so whoever owns the
station sends it again until the other side's owner has said that it is recorded there, or that it changes nothing. Told
twice it changes nothing either. Entries take their turns, so that one that cannot be told holds up no other.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from toque._logging import get_logger
from toque._protocol import ChildEndRequest, ErrorView, TerminateRequest
from toque._requests import Deadline, Silence, StationAsker
from toque.errors import ToqueError
from toque.storage import records as r
from toque.storage.family import Parent, child_nonce
from toque.storage.fold import step_key
from toque.storage.runs import newest_run, step_of
from toque.workers.news import within

if TYPE_CHECKING:
    from toque.workers.station import Station

IN_FLIGHT_MAX = 16  # each may hold an output of 1 MiB in memory
UNDER_WAY_MAX = 256  # those that wait for another attempt counted, too
ENTRIES_PER_SCAN = 64
ASK_S_MAX = 2.0
LOOK_EVERY_S = 0.5
AGAIN_S = 0.5
BREATH_S = 0.01  # between two looks, however much happens
UNKNOWN_MS = 5_000  # so long a child that nobody knows may still be on its way

_log = get_logger("toque.outbox")

Entry = tuple[int, r.Errand, r.OutboxRow]


class Outbox:
    """See the module."""

    def __init__(self, station: Station) -> None:
        self._station = station
        self._store = station.context.store
        self._asker = StationAsker(station.context.bus, station.account, station.context.rng)
        self._under_way: dict[tuple[int, int], None] = {}
        self._in_flight = 0  # of those
        self._after = (0, -1)  # the entry that was last begun with
        self._news = asyncio.Event()

    def kick(self) -> None:
        """There may be something new to tell, or room for more."""
        self._news.set()

    async def run(self) -> None:
        """Tell what there is to tell, until cancelled."""
        while True:
            await within(self._news.wait(), LOOK_EVERY_S)
            self._news.clear()
            await self._store.flush()
            while self._has_room and self._begin_some():
                pass
            await asyncio.sleep(BREATH_S)

    @property
    def _has_room(self) -> bool:
        few = self._in_flight < IN_FLIGHT_MAX and len(self._under_way) < UNDER_WAY_MAX
        return few and self._station.may_admit()

    def _begin_some(self) -> bool:
        """Begin with the next entries, as long as there is room. False behind the last one: then the first have a turn."""
        found = self._store.outbox(self._station.id, self._after, ENTRIES_PER_SCAN)
        for entry in found:
            if not self._has_room:
                break
            serial, errand, _ = entry
            self._after = (serial, errand)
            if (serial, errand) not in self._under_way:
                self._under_way[serial, errand] = None
                self._in_flight += 1
                self._station.spawn(self._see_to(entry))
        if not found:
            self._after = (0, -1)
        return bool(found)

    async def _see_to(self, entry: Entry) -> None:
        serial, errand, row = entry
        try:
            told = await (self._tell_parent(serial) if errand is r.Errand.END else self._tell_children(serial))
        except ToqueError as error:  # the broker refuses something, say: it has another turn
            _log.info("an errand could not be done", serial=serial, why=str(error))
            told = False
        self._in_flight -= 1
        if told and self._station.may_admit():
            self.kick()
            now = self._station.now_ms()
            await self._station.commits.commit(r.Delivered(0, 0, 0, now, serial, row.run, errand))
            await self._store.flush()
        else:
            await asyncio.sleep(AGAIN_S)
        del self._under_way[serial, errand]

    # -- parents -------------------------------------------------------------------------------------------------------

    async def _tell_parent(self, serial: int) -> bool:
        """Whether the parent's owner has recorded the end, or says that it changes nothing."""
        row = self._store.row(self._station.id, serial)
        end = self._store.history(self._station.id, serial)[-1]
        assert row is not None and isinstance(end, r.Ended), "an instance with errands has ended, and is kept"
        parent, failure = Parent.parse(row.parent), end.failure
        request = ChildEndRequest(
            parent.workflow, parent.id, nonce=row.nonce, run=parent.run, step=parent.name, occurrence=parent.occurrence,
            child_run=row.run, status=end.status.label, output=end.output,
            error=ErrorView(failure.type, failure.message, failure.traceback) if failure else None)
        answer = await self._asker.about("child_end", request, Deadline(ASK_S_MAX))
        if isinstance(answer, Silence) or answer.code not in ("ok", "ended", "not_found"):
            why = answer.reason if isinstance(answer, Silence) else f"{answer.code} {answer.message}"
            _log.info("an end waits for its parent", child=f"{row.workflow}/{row.id}",
                      parent=f"{parent.workflow}/{parent.id}", why=why)
            return False
        return True

    # -- children ------------------------------------------------------------------------------------------------------

    async def _tell_children(self, serial: int) -> bool:
        """Whether every child that was recorded, and whose end was not, is over now, with its own children."""
        history = newest_run(self._store.history(self._station.id, serial))
        admitted, end = history[0], history[-1]
        assert isinstance(admitted, r.Admitted) and isinstance(end, r.Ended), "an instance with errands has ended"
        over = {step_of(record) for record in history if isinstance(record, r.ChildEnded)}
        old = self._station.now_ms() - end.at >= UNKNOWN_MS
        told = True
        for record in history:
            if isinstance(record, r.ChildBegun) and step_of(record) not in over:
                told = await self._terminate(admitted, record, old=old) and told
        return told

    async def _terminate(self, parent: r.Admitted, begun: r.ChildBegun, *, old: bool) -> bool:
        key = step_key(begun.step, begun.name, begun.occurrence)
        nonce = child_nonce(self._station.account, parent, begun.run, key)
        request = TerminateRequest(begun.workflow, begun.id, request=f"parent-{nonce}", nonce=nonce, children=True)
        answer = await self._asker.about("terminate", request, Deadline(ASK_S_MAX))
        if isinstance(answer, Silence):
            return False
        return answer.code in ("ok", "ended") or (old and answer.code == "not_found")
