"""Lists of an account's instances: pages of all stations merged into one order, and the cursor that goes on from there.

A cursor names, for each station, the serial up to which its instances were given or passed over. Serials are given once,
in the order of admission, and stand in the journal: a cursor means the same to whoever owns the station later, and an
instance, which keeps its serial through every change of status, is given once at most.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import heapq
import math
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Final, Literal, TypedDict, get_args

import msgspec

from toque._protocol import InstanceView, ListPage, ListRequest, encode
from toque._requests import Deadline, Silence
from toque._subjects import StationId
from toque.errors import OwnerAway, UsageError

if TYPE_CHECKING:
    from toque._requests import StationAsker

PAGE_ROWS_DEFAULT: Final = 100
PAGE_ROWS_MAX: Final = 1000  # of `list_page`
STATION_ROWS_MAX: Final = 100  # of one station's answer
SPARE_ROWS: Final = 2
DONE: Final = -1
LISTED: Final = ("running", "waiting", "waitingForPause", "paused", "complete", "errored", "terminated")

Order = Literal["newest", "oldest"]

_decode_page = msgspec.msgpack.Decoder(ListPage).decode


class ListFilters(TypedDict, total=False):
    """Which instances a list holds, and in which order. What is left out does not narrow it."""

    status: str | Iterable[str] | None
    """One status, or several."""
    id_prefix: str | None
    """What their ids begin with."""
    created_after: datetime | None
    """From this time on. Times have a time zone."""
    created_before: datetime | None
    """Before this time."""
    ended_after: datetime | None
    """Ended, at this time or later."""
    ended_before: datetime | None
    """Ended, before this time."""
    order: Order | None
    """"oldest" first (the default) or "newest" first, by when they were admitted."""


class Cursor(msgspec.Struct, array_like=True, frozen=True):
    """Where a list goes on: of which account, which instances, and for each station behind which serial."""

    account: str
    request: ListRequest
    stations: list[tuple[int, int, int]]  # generation, number, serial; DONE = nothing more

    def text(self) -> str:
        """Opaque, and safe in a URL."""
        return base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).rstrip(b"=").decode()

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Raises UsageError."""
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            return msgspec.msgpack.decode(data, type=cls)
        except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
            raise UsageError(f"{text!r:.60} is no cursor of a list: give the one that a page came with") from error


def list_request(workflow: str, filters: ListFilters) -> ListRequest:
    """Raises UsageError for what no list can hold."""
    given = filters.get("status") or []
    statuses = [given] if isinstance(given, str) else list(dict.fromkeys(given))
    for status in statuses:
        _check_status(status)
    order = filters.get("order") or "oldest"
    if order not in get_args(Order):
        raise UsageError(f"order must be 'newest' or 'oldest', not {order!r}")
    return ListRequest(
        workflow=workflow, status=statuses, id_prefix=filters.get("id_prefix") or "", newest=order == "newest",
        created_after=_ms(filters.get("created_after"), "created_after"),
        created_before=_ms(filters.get("created_before"), "created_before"),
        ended_after=_ms(filters.get("ended_after"), "ended_after"),
        ended_before=_ms(filters.get("ended_before"), "ended_before"))


def _check_status(status: str) -> None:
    if status == "queued":
        raise UsageError("queued instances are not listed, only counted: ask for the queues (`toque queues`), or for the "
                         "status of a single one (`toque instances describe ID`)")
    if status not in LISTED:
        raise UsageError(f"no instance has the status {status!r}; there are {', '.join(LISTED)}")


def _ms(time: datetime | None, name: str) -> int:
    if time is None:
        return 0
    if not isinstance(time, datetime) or time.tzinfo is None:
        raise UsageError(f"{name} must be a datetime with a time zone, not {time!r}")
    return max(1, round(time.timestamp() * 1000))


class Lists:
    """Makes the lists of one account."""

    def __init__(self, account: str, asker: StationAsker) -> None:
        self._account = account
        self._asker = asker

    async def page(self, request: ListRequest, cursor: str, limit: int, timeout_s: float,
                   ) -> tuple[list[InstanceView], str | None]:
        """At most `limit` rows, and the cursor behind them; None when there were no more.

        Raises UsageError (a cursor of another list), SetupError, OwnerAway (a station does not answer).
        """
        if not 1 <= limit <= PAGE_ROWS_MAX:
            raise UsageError(f"limit must be 1 to {PAGE_ROWS_MAX}, not {limit}")
        merge = await self._begin(request, cursor, limit, timeout_s)
        rows: list[InstanceView] = []
        while len(rows) < limit and (view := await merge.next()) is not None:
            rows.append(view)
        return rows, merge.cursor(self._account)

    async def rows(self, request: ListRequest, limit: int | None, page_size: int,
                   timeout_s: float) -> AsyncGenerator[InstanceView, None]:
        """One after the other, read in pages of about `page_size`. Raises as `page`."""
        if limit is not None and limit < 1:
            raise UsageError(f"limit must be 1 or more, not {limit}")
        if not 1 <= page_size <= PAGE_ROWS_MAX:
            raise UsageError(f"page_size must be 1 to {PAGE_ROWS_MAX}, not {page_size}")
        merge = await self._begin(request, "", page_size if limit is None else min(limit, page_size), timeout_s)
        given = 0
        while given != limit and (view := await merge.next()) is not None:
            yield view
            given += 1

    async def _begin(self, request: ListRequest, cursor: str, rows: int, timeout_s: float) -> _Merge:
        after: dict[StationId, int] = {}
        if cursor:
            known = Cursor.parse(cursor)
            if known.account != self._account or request not in (known.request, ListRequest(status=[])):
                raise UsageError("the cursor is of another list: give it the same filters and order, or none")
            request = known.request
            after = {StationId(generation, number): serial for generation, number, serial in known.stations}
        stations = await self._asker.stations()
        even = rows // len(stations)
        share = min(STATION_ROWS_MAX, rows, even + 3 * math.isqrt(even) + SPARE_ROWS)  # how ids scatter over stations
        readers = [_Reader(self._asker, station, msgspec.structs.replace(request, limit=share),
                           after.get(station, 0), timeout_s) for station in stations]
        return _Merge(request, readers)


class _Merge:
    """All stations' rows in one order, one by one."""

    def __init__(self, request: ListRequest, readers: list[_Reader]) -> None:
        self._request = request
        self._readers = readers
        self._heads: list[tuple[int, int]] = []  # a heap of (place in the order, which reader)
        self._unplaced = list(range(len(readers)))  # readers without a head, that may have more

    async def next(self) -> InstanceView | None:
        """The next row; None at the end."""
        await asyncio.gather(*(self._readers[index].fill() for index in self._unplaced))
        for index in self._unplaced:
            self._place(index)
        self._unplaced.clear()
        if not self._heads:
            return None
        _, index = heapq.heappop(self._heads)
        self._unplaced.append(index)
        return self._readers[index].take()

    def _place(self, index: int) -> None:
        rows = self._readers[index].rows
        if rows:
            admitted_at = rows[0][1].admitted_at
            heapq.heappush(self._heads, (-admitted_at if self._request.newest else admitted_at, index))

    def cursor(self, account: str) -> str | None:
        """Behind what was given; None when there is nothing more."""
        stations = [(*reader.station, reader.after) for reader in self._readers]
        if all(after == DONE for _, _, after in stations):
            return None
        return Cursor(account, self._request, stations).text()


class _Reader:
    """Reads one station's list, page by page. `after`: up to where it was given out or passed over."""

    def __init__(self, asker: StationAsker, station: StationId, request: ListRequest, after: int,
                 timeout_s: float) -> None:
        self.station = station
        self.after = after
        self.rows: deque[tuple[int, InstanceView]] = deque()
        self._asker = asker
        self._request = request
        self._next = after
        self._timeout_s = timeout_s

    def take(self) -> InstanceView:
        self.after, view = self.rows.popleft()
        if not self.rows:
            self.after = self._next
        return view

    async def fill(self) -> None:
        """Have a row, unless there is no more."""
        while not self.rows and self._next != DONE:
            await self._read()
            if not self.rows:
                self.after = self._next

    async def _read(self) -> None:
        request = msgspec.structs.replace(self._request, after=self._next)
        answer = await self._asker.at(self.station, "list", encode(request, json=False), Deadline(self._timeout_s))
        if isinstance(answer, Silence):
            raise OwnerAway(f"the list is incomplete: {answer.reason}")
        if answer.code != "ok":
            raise UsageError(f"station {self.station} refuses the list: {answer.message or answer.code}")
        page = _decode_page(answer.value)
        self.rows.extend(zip(page.serials, page.rows, strict=True))
        self._next = page.next or DONE
