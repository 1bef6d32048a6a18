"""Answers `watch`: the events of an instance behind a cursor, from its kept records; held back while there are none.

Events are read from the store, which holds accepted records only, after everything accepted so far is folded: so an
event is told after its acceptance, and the next owner tells the same ones (protocol rules 3 and 19). What is remembered
of a watcher here only saves reading the history from its beginning for the next page.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from toque._payload import to_json
from toque._protocol import LONG_POLL_S_MAX, Answer, WatchPage, WatchRequest, WatchView, encode
from toque.storage import records as r
from toque.workers.finder import Finder
from toque.workers.news import within
from toque.workers.watch_events import Cursor, Narrator, Place, queued_view, weight

if TYPE_CHECKING:
    from toque.workers.station import Station

HELD_MAX = 1_000  # watchers of a station whose answer is held back at once
STORIES_MAX = 1_000  # watchers of whom is remembered how far they are
PAGE_EVENTS_MAX = 200  # about: a record's events stay together
PAGE_BYTES_MAX = 256 * 1024  # … but one record's are always told
PIECES_PER_SCAN = 20

Key = tuple[str, str]  # workflow and id


class Story:
    """One watcher's reading of one instance, record by record."""

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.narrator = Narrator()
        self.cursor = ""  # that its next page will be asked with
        self._piece = (0, 0)  # where the last piece read begins: its end may not have been told
        self._told = (0, 0)

    async def read(self, station: Station, page: WatchPage, *, after: Place, bytes_max: int) -> bool:
        """Add the events behind `after`, until the page is full. True when everything kept is told."""
        store = station.context.store
        size = 0
        while pieces := store.history_from(station.id, self.serial, *self._piece, PIECES_PER_SCAN):
            for piece in pieces:
                for record in piece:
                    if (record.run, record.seq) <= self._told:
                        continue
                    size += weight(record)
                    if page.events and (len(page.events) >= PAGE_EVENTS_MAX or size > bytes_max):
                        return False
                    size = self._take(record, page, after, size)
                self._piece = (piece[0].run, piece[0].seq)
            if len(pieces) < PIECES_PER_SCAN:
                return True
            await asyncio.sleep(0)  # a long history is not to keep others waiting
        return True

    def _take(self, record: r.Record, page: WatchPage, after: Place, size: int) -> int:
        """Tell one record; the size of the page with it."""
        self._told = (record.run, record.seq)
        events = [event for index, event in enumerate(self.narrator.tell(record))
                  if (record.run, record.seq, index) > after]
        page.events += events
        return size if events else size - weight(record)


class Ear:
    """Who waits for news of one instance, and under which serials it is known."""

    __slots__ = ("serials", "waiters")

    def __init__(self) -> None:
        self.waiters: list[asyncio.Future[None]] = []
        self.serials: set[int] = set()

    def wake(self) -> None:
        for news in self.waiters:
            if not news.done():
                news.set_result(None)


class Watching:
    """The watchers of one station."""

    def __init__(self, station: Station, finder: Finder) -> None:
        self._station = station
        self._finder = finder
        self._stories: OrderedDict[tuple[int, str], Story] = OrderedDict()
        self._ears: dict[Key, Ear] = {}
        self._by_serial: dict[int, Ear] = {}
        self._held = 0
        station.on_group = self.group_accepted
        station.on_progress = lambda serial: self._wake(self._by_serial.get(serial))

    def group_accepted(self, group: r.Group) -> None:
        """Wake those who wait for news of an instance that the group brings news of."""
        if not self._ears:
            return
        for record in group.records:
            if type(record) is r.Admitted:
                self._wake(self._ears.get((record.workflow, record.id)))
            elif type(record) is r.Deleted:
                for serial in record.serials:
                    self._wake(self._by_serial.get(serial))
            else:
                self._wake(self._by_serial.get(record.serial))

    def _wake(self, ear: Ear | None) -> None:
        if ear is not None:
            ear.wake()

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything here."""
        return not (self._held or self._ears or self._by_serial)

    async def serve(self, request: WatchRequest, json: bool) -> Answer:
        """One page, held back while it is empty and the instance goes on, for `wait_s` at most."""
        try:
            cursor = Cursor.parse(request.cursor) if request.cursor else None
        except ValueError:
            return self._answer("refused", f"{request.cursor!r:.80} is not the cursor of an event")
        loop = asyncio.get_running_loop()
        give_up = loop.time() + min(max(request.wait_s, 0.0), LONG_POLL_S_MAX)
        while True:
            with self._listening(request) as (ear, news):
                page = await self._page(request, cursor, ear)
                if page is None:
                    return self._answer("not_found", f"no instance {request.id!r} of workflow {request.workflow!r}" +
                                        (" that the cursor belongs to" if cursor else ""))
                left_s = give_up - loop.time()
                self._add_progress(request, page)
                if page.events or page.ended or page.progress or left_s <= 0:
                    return Answer(self._station.epoch, value=_encoded(page, json))
                if self._held >= HELD_MAX:
                    return self._answer("busy", f"station {self._station.id} has {HELD_MAX:,} watchers already")
                cursor = Cursor.parse(page.cursor) if page.cursor else cursor
                await self._hold(news, left_s)

    def _add_progress(self, request: WatchRequest, page: WatchPage) -> None:
        """Behind everything that is recorded; only while it is in memory."""
        engine = self._station.by_id.get((request.workflow, request.id))
        if page.events or page.ended or engine is None or engine.progress is None:
            return
        report = engine.progress.shown(engine.accepted_to)
        reported = f"{self._station.epoch}.{report.number}" if report else ""
        if report is None or reported == request.progress or (request.types and "progress" not in request.types):
            return
        page.reported = reported
        page.progress = WatchView("progress", report.at, run=engine.run, kind="do" if report.step else "", step=report.step,
                                  count=report.occurrence, attempt=report.attempt, value=msgspec.Raw(report.value))

    async def _hold(self, news: asyncio.Future[None], seconds: float) -> None:
        self._held += 1
        try:
            await within(news, seconds)
        finally:
            self._held -= 1

    @contextmanager
    def _listening(self, request: WatchRequest) -> Iterator[tuple[Ear, asyncio.Future[None]]]:
        """Hear of what is accepted from here on of the instance, by its id; `_hear` adds its serial."""
        key = (request.workflow, request.id)
        ear = self._ears.setdefault(key, Ear())
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ear.waiters.append(news)
        try:
            yield ear, news
        finally:
            ear.waiters.remove(news)
            if not ear.waiters:
                del self._ears[key]
                for serial in ear.serials:
                    del self._by_serial[serial]

    def _hear(self, ear: Ear, serial: int) -> None:
        """Hear of what is accepted from here on under the serial, too."""
        ear.serials.add(serial)
        self._by_serial[serial] = ear

    def _serial(self, request: WatchRequest) -> int | None:
        return self._station.context.store.find(self._station.id, request.workflow, request.id)

    async def _page(self, request: WatchRequest, cursor: Cursor | None, ear: Ear) -> WatchPage | None:
        """What is told behind the cursor; None when there is no such instance."""
        serial = self._serial(request)
        if serial is None:
            await self._station.context.store.flush()
            serial = self._serial(request)
        if serial is None:
            message = await self._finder.queue_message(request.workflow, request.id)
            if message is not None:
                return self._queued_page(request, cursor, message.time_ms)
            await self._station.context.store.flush()  # it may have been admitted and purged meanwhile
            serial = self._serial(request)
        if serial is None:
            return None
        self._hear(ear, serial)
        await self._station.context.store.flush()  # what was accepted before we heard is told by the store
        return await self._kept_page(request, cursor, serial)

    def _queued_page(self, request: WatchRequest, cursor: Cursor | None, created_at: int) -> WatchPage | None:
        if cursor is not None:
            return WatchPage([], str(cursor)) if cursor.created_at == created_at else None
        view = queued_view(created_at)
        return WatchPage([view] if _wanted(view, request) else [], view.cursor)

    async def _kept_page(self, request: WatchRequest, cursor: Cursor | None, serial: int) -> WatchPage | None:
        store, station = self._station.context.store, self._station
        row = store.row(station.id, serial)
        if row is None or (cursor is not None and cursor.created_at != row.created_at):
            return None
        text = str(cursor) if cursor else ""
        story = self._stories.pop((serial, request.request), None)
        if story is None or story.cursor != text:
            story = Story(serial)
        page = WatchPage([], text)
        after = cursor.place if cursor else Place()
        bytes_max = min(PAGE_BYTES_MAX, station.context.bus.max_payload // 2)
        all_told = False
        while not page.events and not all_told:  # again when none of so many was asked for
            all_told = await story.read(station, page, after=after, bytes_max=bytes_max)
            if page.events:
                page.cursor = page.events[-1].cursor
                page.events = [event for event in page.events if _wanted(event, request)]
        story.cursor = page.cursor
        told = story.narrator.row
        page.ended = all_told and told is not None and told.status.ended
        self._stories[serial, request.request] = story
        while len(self._stories) > STORIES_MAX:
            self._stories.popitem(last=False)
        return page

    def _answer(self, code: str, message: str) -> Answer:
        return Answer(self._station.epoch, code, message)


def _wanted(event: WatchView, request: WatchRequest) -> bool:
    return not request.types or event.type in request.types


def _encoded(page: WatchPage, json: bool) -> msgspec.Raw:
    if json:
        for event in [*page.events, *([page.progress] if page.progress else [])]:
            if event.value:
                event.value = msgspec.Raw(to_json(bytes(event.value)))
    return msgspec.Raw(encode(page, json=json))
