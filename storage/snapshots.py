"""Snapshot objects: a station's folded state in chunks, in the account's snapshot stream (protocol rule 5).

An object is named by the epoch and the sequence of its position, and is never overwritten. It counts once a Snapshot
record in the station's journal names it; here nobody knows whether it does. What a killed writer leaves behind is an
orphan without meaning, until the station's owner deletes it.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

from toque import _subjects as subjects
from toque._subjects import StationId
from toque.errors import ToqueError
from toque.storage.journal import Abandoned
from toque.storage.ports import Bus, BusError, BusTimeout, Export, StoredRow
from toque.storage.records import Position, Snapshot
from toque.storage.snapshot_format import ChunkReader, SnapshotDamaged

CHUNK_BYTES_MAX = 512 * 1024
PAYLOAD_RESERVE_BYTES = 16 * 1024  # of the server's max_payload: headers
CHUNK_TRIES = 5
CHUNK_AGAIN_S = 0.5


class SnapshotFailed(ToqueError):
    """An object could not be written. Nothing depends on it: another one is taken later."""


class Name(NamedTuple):
    """Of a snapshot. Names of one station sort by age."""

    epoch: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.sequence}"

    @classmethod
    def of(cls, position: Position) -> Name:
        return cls(position.header.epoch, position.sequence)

    @classmethod
    def parse(cls, text: str) -> Name:
        """Raises ValueError for any other text."""
        epoch, sequence = text.split("-")
        return cls(int(epoch), int(sequence))


class SnapshotObjects:
    """The snapshot stream of one account, over one bus."""

    def __init__(self, bus: Bus, account: str, *, chunk_bytes_max: int = CHUNK_BYTES_MAX) -> None:
        self._chunk_bytes_max = chunk_bytes_max
        self._bus = bus
        self._account = account
        self._stream = subjects.snapshot_stream(account)

    @property
    def chunk_bytes(self) -> int:
        return min(self._chunk_bytes_max, self._bus.max_payload - PAYLOAD_RESERVE_BYTES)

    async def write(self, station: StationId, export: Export, *, at: int,
                    may_send: Callable[[], bool]) -> Snapshot:
        """Store everything of an export, and return the record by which it will count; `at` is broker time.

        Killed anywhere, or raised out of: an orphan. The same call again, at the same position, takes up what is there.
        Raises SnapshotFailed, BusError, NoResponders, and Abandoned at the session's deadline.
        """
        name = str(Name.of(export.position))
        crc = size_bytes = chunks = 0
        while chunk := await export.next():
            await self._write_chunk(station, subjects.snapshot_chunk(self._account, station, name, chunks), chunk,
                                    may_send)
            crc = zlib.crc32(chunk, crc)
            size_bytes += len(chunk)
            chunks += 1
        return Snapshot(0, 0, 0, at, name, export.position, crc, size_bytes, chunks, export.rows,
                        export.journal_bytes)

    async def _write_chunk(self, station: StationId, subject: str, chunk: bytes, may_send: Callable[[], bool]) -> None:
        for _ in range(CHUNK_TRIES):
            if not may_send():
                raise Abandoned(f"station {station}: the session's deadline has passed")
            try:
                await self._bus.publish(subject, chunk, {subjects.EXPECTED_LAST_HEADER: "0"})
                return
            except BusTimeout:
                await asyncio.sleep(CHUNK_AGAIN_S)
            except BusError as error:
                if error.code != BusError.WRONG_LAST_SEQUENCE:
                    raise
                there = await self._bus.last_message(self._stream, subject)
                if there is not None and there.data == chunk:
                    return  # an answer was lost, or an earlier try at the same position had come so far
                raise SnapshotFailed(f"{subject} is there already, with other bytes") from error
        raise SnapshotFailed(f"the server does not answer writes of {subject}")

    async def names(self, station: StationId) -> list[Name]:
        """Every object of the station, complete or not, oldest first. Raises BusError, BusTimeout, NoResponders."""
        info = await self._bus.stream_info(self._stream, subjects_filter=subjects.snapshots_of(self._account, station))
        found: set[Name] = set()
        for subject in info.subjects:
            try:
                found.add(Name.parse(subjects.parse_snapshot(subject)))
            except ValueError:
                continue  # not ours
        return sorted(found)

    async def delete(self, station: StationId, name: Name) -> None:
        """Remove an object. Raises BusError, BusTimeout, NoResponders: it may be gone in part then."""
        info = await self._bus.stream_info(self._stream)
        await self._bus.purge(self._stream, subjects.snapshot(self._account, station, str(name)),
                              info.last_sequence + 1)

    async def read(self, station: StationId, record: Snapshot) -> AsyncGenerator[list[StoredRow], None]:
        """The rows, by chunk. Raises SnapshotDamaged, at the end at the latest, when it is not what the record says."""
        reader = ChunkReader()
        for number in range(record.chunks):
            subject = subjects.snapshot_chunk(self._account, station, record.name, number)
            message = await self._bus.last_message(self._stream, subject)
            if message is None:
                raise SnapshotDamaged(f"snapshot {record.name} of station {station} lacks its chunk {number}")
            yield reader.feed(message.data)
        head = reader.finish(crc=record.crc, size_bytes=record.size_bytes, rows=record.rows)
        if (head.station, head.position) != (str(station), record.position):
            raise SnapshotDamaged(f"snapshot {record.name} of station {station} is one of station {head.station} at "
                                  f"sequence {head.position.sequence}")

    async def check(self, station: StationId, record: Snapshot) -> None:
        """Read the object back whole. Raises SnapshotDamaged, BusError, BusTimeout, NoResponders."""
        async for _ in self.read(station, record):
            pass
