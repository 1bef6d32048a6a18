"""Group commit of one station: records collect while one group is in flight (protocol rule 2).

Callers add encoded records with a listener; listeners hear once for each record, after its group was accepted and handed
to the store. Nothing here waits for the store, but no group is sent while the store lags too far behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import accumulate
from typing import Protocol

from toque._logging import get_logger
from toque._subjects import StationId
from toque.errors import ToqueError
from toque.storage.journal import Journal, JournalHalted
from toque.storage.ports import Store
from toque.storage.records import (
    GROUP_BYTES_MAX,
    GROUP_RECORDS_MAX,
    Group,
    GroupHeader,
    Position,
    Record,
    crc_of,
    encode_record,
    join_records,
)

_log = get_logger("toque.commit")

STORE_LAG_MAX_S = 1.0
STORE_LAG_POLL_S = 0.005


class Listener(Protocol):
    """Whoever waits for the acceptance of a record."""

    def accepted(self) -> None:
        """One of its records stands in the journal."""
        ...


class Acceptance:
    """A listener that can be awaited, for a record that has no instance."""

    def __init__(self) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def accepted(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class GroupCommit:
    """The pending records of one station under one epoch.

    `on_lost` is called once, with the reason, when the epoch has ended: deposed, halted or abandoned. From then on
    nothing is accepted and no listener is called.
    """

    def __init__(self, journal: Journal, store: Store, station: StationId, tail: Position, *,
                 may_send: Callable[[], bool], on_accepted: Callable[[Group], Callable[[], None] | None],
                 on_lost: Callable[[ToqueError], None], bytes_max: int = GROUP_BYTES_MAX) -> None:
        self._journal = journal
        self._store = store
        self._station = station
        self.tail = tail
        self._may_send = may_send
        self._on_accepted = on_accepted
        self._on_lost = on_lost
        self._bytes_max = bytes_max  # of a group of more than one record
        self._loop = asyncio.get_running_loop()
        self._pending: list[tuple[bytes, Record, Listener]] = []
        self._pending_bytes = 0
        self._busy = False  # a group is in flight, or about to be sent
        self._closed = False
        self._sealed: asyncio.Future[None] | None = None  # of the epoch's last record: nothing may follow it
        self._sender: asyncio.Task[None] | None = None
        self._on_room: list[Callable[[], None]] = []

    @property
    def next_group(self) -> int:
        """The number of the group that a record added now will be in, or a later one."""
        return self.tail.header.group + 1

    @property
    def full(self) -> bool:
        """More than one full group is pending: no callback may be entered (protocol rule 9)."""
        return len(self._pending) > GROUP_RECORDS_MAX or self._pending_bytes > self._bytes_max

    @property
    def closed(self) -> bool:
        """Whether the epoch is over here: nothing more will be accepted."""
        return self._closed

    @property
    def idle(self) -> bool:
        return not self._busy and not self._pending

    def add(self, record: Record, listener: Listener) -> None:
        """Append the record to the pending group. After `seal` it is dropped: its listener never hears of it."""
        if self._sealed is not None:
            return
        encoded = encode_record(record)
        self._pending.append((encoded, record, listener))
        self._pending_bytes += len(encoded)
        if not self._busy:
            self._busy = True
            self._loop.call_soon(self._send)

    def when_room(self, callback: Callable[[], None]) -> None:
        """Call back once, after the next acceptance."""
        self._on_room.append(callback)

    async def commit(self, record: Record) -> None:
        """Add one record and wait for its acceptance. Never returns once the epoch is lost: cancel the caller."""
        await self.submit(record)

    def submit(self, record: Record) -> asyncio.Future[None]:
        """Add one record; the future tells its acceptance, and stays open once the epoch is lost."""
        acceptance = Acceptance()
        self.add(record, acceptance)
        return acceptance.future

    async def next_acceptance(self) -> None:
        """Wait for the next group. Never returns once the epoch is lost: cancel the caller."""
        accepted: asyncio.Future[None] = self._loop.create_future()
        self.when_room(lambda: None if accepted.done() else accepted.set_result(None))
        await accepted

    def seal(self, record: Record) -> asyncio.Future[None]:
        """Add the epoch's last record; the future tells its acceptance. Once sealed it is that of the first call."""
        if self._sealed is None:
            self._sealed = self.submit(record)
        return self._sealed

    def close(self) -> None:
        """Send nothing more. A group in flight stays so: its outcome is the next claim's to see."""
        self._closed = True
        self._pending.clear()
        if self._sender is not None:
            self._sender.cancel()

    def _send(self) -> None:
        if self._closed:
            return
        if not self._pending:
            self._busy = False
            return
        if self._store.lag_s > STORE_LAG_MAX_S:
            self._loop.call_later(STORE_LAG_POLL_S, self._send)
            return
        batch = self._take()
        body = join_records([encoded for encoded, _, _ in batch])
        header = GroupHeader(self.tail.header.epoch, self.tail.header.session, self.tail.header.group + 1,
                             crc_of(body))
        self._sender = self._loop.create_task(self._append(header, body, batch))

    def _take(self) -> list[tuple[bytes, Record, Listener]]:
        count = min(len(self._pending), GROUP_RECORDS_MAX)
        if self._pending_bytes > self._bytes_max:
            sizes = accumulate(len(encoded) for encoded, _, _ in self._pending[:count])
            count = max(1, sum(size <= self._bytes_max for size in sizes))
        batch, self._pending = self._pending[:count], self._pending[count:]
        self._pending_bytes -= sum(len(encoded) for encoded, _, _ in batch)
        return batch

    async def _append(self, header: GroupHeader, body: bytes, batch: list[tuple[bytes, Record, Listener]]) -> None:
        try:
            sequence = await self._journal.append(self._station, header, body, expected=self.tail.sequence,
                                                  may_send=self._may_send)
            self._accept(Position(sequence, header), batch)
        except ToqueError as error:
            self._lose(error)
        except Exception as error:  # the edge of the task: a station that goes on in silence would be stuck  # noqa: BLE001
            _log.exception("group commit failed", station=str(self._station))
            self._lose(JournalHalted(f"station {self._station}: {type(error).__name__}: {error}"))

    def _lose(self, error: ToqueError) -> None:
        if not self._closed:
            self._closed = True
            self._on_lost(error)

    def _accept(self, tail: Position, batch: list[tuple[bytes, Record, Listener]]) -> None:
        if self._closed:
            return
        self.tail = tail
        group = Group(self._station, tail, [record for _, record, _ in batch], [data for data, _, _ in batch])
        self._store.apply(group, self._on_accepted(group))
        self._send()
        self._loop.call_soon(self._deliver, batch)  # listeners run instances, which must not happen inside a task

    def _deliver(self, batch: list[tuple[bytes, Record, Listener]]) -> None:
        if self._closed:
            return
        for _, record, listener in batch:
            try:
                listener.accepted()
            except Exception:  # one instance's fault must not keep the others of its group waiting  # noqa: BLE001
                _log.exception("a listener failed", station=str(self._station), serial=record.serial)
        room, self._on_room = self._on_room, []
        for callback in room:
            callback()
