"""The bytes of a snapshot: what was written is read, in chunks of any size; what is not whole is refused."""

from __future__ import annotations

import random
import zlib

import pytest

from toque._subjects import StationId
from toque.storage import fold
from toque.storage import records as r
from toque.storage.ports import StoredRow
from toque.storage.snapshot_format import ChunkReader, ChunkWriter, Head, SnapshotDamaged

STATION = StationId(1, 3)
POSITION = r.Position(77, r.GroupHeader(4, "a-1", 30, 99))


def some_rows(count=200, seed=1):
    rng = random.Random(seed)
    return [StoredRow(rng.randrange(1, len(fold.TABLES)), rng.randbytes(rng.randrange(30)), rng.randbytes(rng.randrange(90)))
            for _ in range(count)]


def written(rows, chunk_bytes=512):
    writer = ChunkWriter(STATION, POSITION, iter(rows), chunk_bytes)
    return list(iter(writer.next, b""))


def read(chunks, rows, *, crc=None, size_bytes=None):
    reader = ChunkReader()
    found = [row for chunk in chunks for row in reader.feed(chunk)]
    whole = b"".join(chunks)
    head = reader.finish(crc=zlib.crc32(whole) if crc is None else crc, rows=rows,
                         size_bytes=len(whole) if size_bytes is None else size_bytes)
    return head, found


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 512, 10**6])
def test_rows_are_read_as_they_were_written(chunk_bytes):
    """A chunk may end anywhere, in the head too, and none is larger than asked for."""
    rows = some_rows()

    chunks = written(rows, chunk_bytes)

    assert read(chunks, len(rows)) == (Head("1.3", POSITION), rows)
    assert {len(chunk) for chunk in chunks[:-1]} <= {chunk_bytes}


def test_a_row_larger_than_chunks_is_cut_and_memory_stays_bounded():
    """The writer takes no further row while it has a chunk to give."""
    rows = [StoredRow(1, b"k", bytes(10_000)) for _ in range(20)]
    writer = ChunkWriter(STATION, POSITION, iter(rows), 1_000)

    largest = max(len(writer._waiting) for _ in iter(writer.next, b""))

    assert largest <= 11_000
    assert writer.rows == 20


def test_a_station_without_rows_has_a_snapshot_too():
    """Its head alone."""
    chunks = written([])

    assert read(chunks, 0) == (Head("1.3", POSITION), [])


@pytest.mark.parametrize("harm", ["cut", "a chunk less", "a chunk twice", "order", "bit", "rows"])
def test_what_is_not_whole_is_damaged(harm):
    """By the CRC and size of the record; the rows were not told to be right before."""
    rows = some_rows()
    chunks = written(rows)
    whole = b"".join(chunks)
    crc, size_bytes = zlib.crc32(whole), len(whole)
    harmed = {
        "cut": [*chunks[:-1], chunks[-1][:-1]], "a chunk less": chunks[:-1], "a chunk twice": [*chunks, chunks[-1]],
        "order": [chunks[0], *reversed(chunks[1:])],
        "bit": [*chunks[:3], bytes([chunks[3][0] ^ 1]) + chunks[3][1:], *chunks[4:]],
        "rows": chunks}[harm]

    with pytest.raises(SnapshotDamaged):
        read(harmed, len(rows) + (harm == "rows"), crc=crc, size_bytes=size_bytes)


@pytest.mark.parametrize("first", [b"", b"TQS", b"XXXX" + bytes(100), b"TQS1\xff\xff\xff\xff" + bytes(100),
                                   b"TQS1\x00\x00\x00\x02\xc1\xc1"])
def test_what_does_not_begin_like_one_is_none(first):
    """Another format, a length beyond any head, a head that is no msgpack, and nothing at all."""
    with pytest.raises(SnapshotDamaged):
        read([first], 0)


def test_a_row_of_a_table_that_is_not_known_is_refused():
    """A newer version's snapshot is not folded in part."""
    with pytest.raises(SnapshotDamaged, match="table"):
        read(written([StoredRow(len(fold.TABLES), b"k", b"v")]), 1)
