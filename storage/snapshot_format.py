"""The bytes of a snapshot: a head, then the rows of one station's tables, as one stream that is cut into chunks anywhere.

    head   4 bytes "TQS1", 4 bytes length, msgpack Head
    row    1 byte table, 2 bytes key length, 4 bytes value length, key (without the station), value

Numbers are big-endian; tables and their rows are those of `toque.storage.fold`, without the position, which is in the
head. A chunk may end in the middle of a row, so no chunk is larger than was asked for. The CRC in the Snapshot record
covers every byte: neither side holds more than a chunk and a row.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import msgspec

from toque._subjects import StationId
from toque.errors import ToqueError
from toque.storage import fold
from toque.storage.ports import StoredRow
from toque.storage.records import Position

MAGIC = b"TQS1"
_HEAD = struct.Struct(">4sI")
_ROW = struct.Struct(">BHI")
HEAD_BYTES_MAX = 4096


class SnapshotDamaged(ToqueError):
    """The object is not what its record says: a chunk is missing, the CRC does not hold, or it is none of this format."""


class Head(msgspec.Struct, array_like=True, frozen=True):
    """Whose state it is, and where in the journal it stands."""

    station: str
    position: Position


class ChunkWriter:
    """Turns rows into chunks of `chunk_bytes`; the last one may be shorter."""

    def __init__(self, station: StationId, position: Position, rows: Iterator[StoredRow], chunk_bytes: int) -> None:
        self.position = position
        self.rows = 0
        self._rows = rows
        self._chunk_bytes = chunk_bytes
        head = msgspec.msgpack.encode(Head(str(station), position))
        self._waiting = bytearray(_HEAD.pack(MAGIC, len(head)) + head)

    def next(self) -> bytes:
        """The next chunk; empty when there is no more."""
        waiting, wanted = self._waiting, self._chunk_bytes
        while len(waiting) < wanted:
            row = next(self._rows, None)
            if row is None:
                break
            waiting += _ROW.pack(row.table, len(row.key), len(row.value))
            waiting += row.key
            waiting += row.value
            self.rows += 1
        chunk = bytes(waiting[:wanted])
        del waiting[:wanted]
        return chunk

    def close(self) -> None:
        """Read no more rows."""
        self._rows = iter(())
        self._waiting.clear()


class ChunkReader:
    """Turns chunks, in their order, back into rows. `head` is there after the first one.

    Raises SnapshotDamaged for what is no snapshot of this format. That it is the right one, whole, is for `finish`.
    """

    def __init__(self) -> None:
        self.head: Head | None = None
        self.rows = 0
        self.size_bytes = 0
        self.crc = 0
        self._waiting = b""

    def feed(self, chunk: bytes) -> list[StoredRow]:
        """The rows that are complete with this chunk."""
        self.crc = zlib.crc32(chunk, self.crc)
        self.size_bytes += len(chunk)
        data = self._waiting + chunk
        at = 0
        if self.head is None:
            at = self._read_head(data)
        rows: list[StoredRow] = []
        while self.head is not None and at + _ROW.size <= len(data):
            table, key_length, value_length = _ROW.unpack_from(data, at)
            value_at = at + _ROW.size + key_length
            end = value_at + value_length
            if end > len(data):
                break
            if table == fold.POSITION or table >= len(fold.TABLES):
                raise SnapshotDamaged(f"it holds a row of table {table}, which this version does not know")
            rows.append(StoredRow(table, data[at + _ROW.size:value_at], data[value_at:end]))
            at = end
        self._waiting = data[at:]
        self.rows += len(rows)
        return rows

    def finish(self, *, crc: int, size_bytes: int, rows: int) -> Head:
        """The head, when everything that was fed is what was expected. Raises SnapshotDamaged."""
        if (self.crc, self.size_bytes) != (crc, size_bytes):
            raise SnapshotDamaged(f"{size_bytes:,} bytes of CRC {crc:08x} were expected, {self.size_bytes:,} bytes of "
                                  f"CRC {self.crc:08x} found")
        if self.head is None or self._waiting or self.rows != rows:
            raise SnapshotDamaged(f"{rows:,} rows were expected, {self.rows:,} found")
        return self.head

    def _read_head(self, data: bytes) -> int:
        """Where the rows begin; 0 while the head is not complete."""
        if len(data) < _HEAD.size:
            return 0
        magic, length = _HEAD.unpack_from(data)
        if magic != MAGIC or length > HEAD_BYTES_MAX:
            raise SnapshotDamaged("it does not begin like a snapshot of this format")
        end = _HEAD.size + int(length)
        if len(data) < end:
            return 0
        try:
            self.head = msgspec.msgpack.decode(data[_HEAD.size:end], type=Head)
        except msgspec.MsgspecError as error:
            raise SnapshotDamaged(f"its head cannot be read: {error}") from error
        return end
