"""The Store on LMDB: one environment per pod directory, one writer thread, groups folded only after their acceptance.

The environment is a cache of the journal (protocol rule 3), so it is written without fsync, but at a clean close. After
a power cut it may be torn: `open` sets it aside when the host has booted since without a clean close, when its identity
or format is another's, or when a value's CRC does not hold. What is set aside is rebuilt from the journal. A kill -9 is
no reason: what the process had written is in the kernel's hands.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import msgspec

from toque._subjects import StationId
from toque.errors import SetupError, ToqueError
from toque.storage import fold
from toque.storage.folded_store import FoldedReaders
from toque.storage.ports import StoreDamaged, StoredRow
from toque.storage.records import FORMAT, Group, Position
from toque.storage.snapshot_format import ChunkWriter

MAP_BYTES = 256 << 30  # address space, not disk
GROUPS_PER_TRANSACTION = 64
ASIDE_CHUNK_BYTES = 1024 * 1024
DROPS_PER_TRANSACTION = 10_000
_META = b"meta"
_IDENTITY = b"identity"


class Identity(msgspec.Struct):
    """Whose environment it is, and whether it was closed cleanly under which boot of the host."""

    format: int
    account: str
    pod: str
    boot_id: str
    clean: bool


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class LmdbTables:
    """The tables as LMDB databases; each value is preceded by the CRC of key and value."""

    def __init__(self, environment: lmdb.Environment) -> None:
        self._environment = environment
        self._databases = [environment.open_db(name.encode()) for name in fold.TABLES]

    def get(self, table: int, key: bytes) -> bytes | None:
        with self._environment.begin(db=self._databases[table]) as transaction:
            sealed = transaction.get(key)
        return _unseal(key, sealed) if sealed is not None else None

    def scan(self, table: int, prefix: bytes, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        with self._environment.begin(db=self._databases[table]) as transaction, transaction.cursor() as cursor:
            if not cursor.set_range(max(prefix, start)):
                return found
            for key, sealed in cursor:
                if len(found) == limit or not key.startswith(prefix):
                    break
                found.append((key, _unseal(key, sealed)))
        return found

    def scan_back(self, table: int, prefix: bytes, below: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        with self._environment.begin(db=self._databases[table]) as transaction, transaction.cursor() as cursor:
            if not (cursor.prev() if cursor.set_range(below) else cursor.last()):
                return found
            for key, sealed in cursor.iterprev():
                if len(found) == limit or not key.startswith(prefix):
                    break
                found.append((key, _unseal(key, sealed)))
        return found

    def keys(self, table: int, prefix: bytes, start: bytes, limit: int) -> list[bytes]:
        found: list[bytes] = []
        with self._environment.begin(db=self._databases[table]) as transaction, transaction.cursor() as cursor:
            if not cursor.set_range(max(prefix, start)):
                return found
            for key in cursor.iternext(keys=True, values=False):
                if len(found) == limit or not key.startswith(prefix):
                    break
                found.append(key)
        return found

    def write(self, writes: fold.Writes) -> None:
        with self._environment.begin(write=True) as transaction:
            for database, changes in zip(self._databases, writes, strict=True):
                if not changes:
                    continue
                puts = [(key, _seal(key, value)) for key, value in sorted(changes.items()) if value is not None]
                if puts:
                    transaction.cursor(database).putmulti(puts)
                if len(puts) < len(changes):
                    for key, value in changes.items():
                        if value is None:
                            transaction.delete(key, db=database)

    def drop(self, prefix: bytes) -> None:
        """The position goes first, so that nothing is believed of what a kill leaves behind."""
        for database in self._databases:
            while self._drop_some(database, prefix) == DROPS_PER_TRANSACTION:
                pass

    def _drop_some(self, database: Any, prefix: bytes) -> int:
        dropped = 0
        with self._environment.begin(write=True) as transaction:
            cursor = transaction.cursor(database)
            found = cursor.set_range(prefix)
            while found and dropped < DROPS_PER_TRANSACTION and cursor.key().startswith(prefix):
                found = cursor.delete()  # and stands on the next one then
                dropped += 1
        return dropped

    def export(self, transaction: lmdb.Transaction[bytes], prefix: bytes) -> Iterator[StoredRow]:
        """Every row but the position, as the transaction sees them."""
        for number, database in enumerate(self._databases):
            if number == fold.POSITION:
                continue
            with transaction.cursor(database) as cursor:
                if not cursor.set_range(prefix):
                    continue
                for key, sealed in cursor:
                    if not key.startswith(prefix):
                        break
                    yield StoredRow(number, key[len(prefix):], _unseal(key, sealed))

    def get_in(self, transaction: lmdb.Transaction[bytes], table: int, key: bytes) -> bytes | None:
        sealed = transaction.get(key, db=self._databases[table])
        return _unseal(key, sealed) if sealed is not None else None


class _WatchedTables:
    """The tables as the pod's loop reads them: it is told of damage, once, beside the error that the reader gets."""

    def __init__(self, tables: LmdbTables, failed: Callable[[Exception], None]) -> None:
        self._tables = tables
        self._failed = failed

    def get(self, table: int, key: bytes) -> bytes | None:
        try:
            return self._tables.get(table, key)
        except (lmdb.Error, StoreDamaged) as error:
            self._failed(error)
            raise

    def scan(self, table: int, prefix: bytes, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        try:
            return self._tables.scan(table, prefix, start, limit)
        except (lmdb.Error, StoreDamaged) as error:
            self._failed(error)
            raise

    def scan_back(self, table: int, prefix: bytes, below: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        try:
            return self._tables.scan_back(table, prefix, below, limit)
        except (lmdb.Error, StoreDamaged) as error:
            self._failed(error)
            raise

    def keys(self, table: int, prefix: bytes, start: bytes, limit: int) -> list[bytes]:
        try:
            return self._tables.keys(table, prefix, start, limit)
        except (lmdb.Error, StoreDamaged) as error:
            self._failed(error)
            raise


def _seal(key: bytes, value: bytes) -> bytes:
    return zlib.crc32(value, zlib.crc32(key)).to_bytes(4, "big") + value


def _unseal(key: bytes, sealed: bytes) -> bytes:
    value = sealed[4:]
    if zlib.crc32(value, zlib.crc32(key)).to_bytes(4, "big") != sealed[:4]:
        raise StoreDamaged("a value of the local store fails its CRC")
    return value


def set_aside(directory: Path) -> Path:
    """Move an environment out of the way, keeping it for inspection. Returns where it went."""
    aside = directory.with_name(f"{directory.name}.aside-{time.time_ns()}")
    directory.rename(aside)
    return aside


def _open(directory: Path, account: str, pod: str) -> lmdb.Environment | None:
    """None when what is there must be set aside. Raises SetupError for what is somebody else's."""
    environment = lmdb.open(str(directory), map_size=MAP_BYTES, max_dbs=len(fold.TABLES) + 1, sync=False,
                            readahead=False, mode=0o600)
    meta = environment.open_db(_META)
    now = Identity(FORMAT, account, pod, boot_id(), False)
    with environment.begin(write=True) as transaction:
        data = transaction.get(_IDENTITY, db=meta)
        if data is not None:
            found = msgspec.msgpack.decode(_unseal(_IDENTITY, data), type=Identity)
            if found.format > FORMAT:
                environment.close()
                raise SetupError(f"{directory} was written in format {found.format}; this version reads up to "
                                 f"{FORMAT}. Upgrade toque, or give another --data directory.")
            if (found.account, found.pod) != (account, pod):
                environment.close()
                raise SetupError(f"{directory} belongs to pod {found.pod!r} of account {found.account!r}, not to pod "
                                 f"{pod!r} of account {account!r}. Give each pod its own --data directory.")
            if not found.clean and found.boot_id != now.boot_id:
                environment.close()
                return None
        encoded = msgspec.msgpack.encode(now)
        transaction.put(_IDENTITY, _seal(_IDENTITY, encoded), db=meta)
    environment.sync(True)
    return environment


def open_environment(directory: Path, account: str, pod: str) -> tuple[lmdb.Environment, Path | None]:
    """Open or make the environment. The second value tells where a suspect one was set aside to.

    Raises SetupError when it belongs to another account or pod, or was written by a newer version.
    """
    for aside in (None, directory):
        moved = set_aside(directory) if aside is not None else None
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            environment = _open(directory, account, pod)
        except (lmdb.Error, StoreDamaged, msgspec.MsgspecError):
            environment = None
        if environment is not None:
            return environment, moved
    raise SetupError(f"{directory} cannot hold a store: see the disk's free space and rights")


class LmdbExport:
    """See `toque.storage.ports.Export`. One step at a time: a transaction must not end under a thread that reads in it."""

    def __init__(self, transaction: lmdb.Transaction[bytes], chunks: ChunkWriter, journal_bytes: int, *,
                 failed: Callable[[Exception], None], closed: Callable[[LmdbExport], None]) -> None:
        self.position = chunks.position
        self.journal_bytes = journal_bytes
        self._transaction = transaction
        self._chunks = chunks
        self._failed = failed
        self._on_close = closed
        self._step = threading.Lock()
        self._closed = False

    @property
    def rows(self) -> int:
        return self._chunks.rows

    async def next(self) -> bytes:
        try:
            return await asyncio.to_thread(self._next)
        except (lmdb.Error, StoreDamaged) as error:
            self._failed(error)
            raise

    def _next(self) -> bytes:
        with self._step:
            return b"" if self._closed else self._chunks.next()

    def close(self) -> None:
        with self._step:
            if not self._closed:
                self._closed = True
                self._chunks.close()
                self._transaction.abort()
                self._on_close(self)


class _Job(NamedTuple):
    """Something that the writer thread does between two groups."""

    act: Callable[[], None]
    done: asyncio.Future[None]


class LmdbStore(FoldedReaders):
    """See `toque.storage.ports.Store`. `on_damage` is called once, in the loop, when writing or reading failed."""

    def __init__(self, directory: Path, *, account: str, pod: str,
                 on_damage: Callable[[Exception], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._directory = directory
        self._environment, self.set_aside_to = open_environment(directory, account, pod)
        self.tables = LmdbTables(self._environment)
        super().__init__(_WatchedTables(self.tables, self._fail))
        self._account, self._pod = account, pod
        self._on_damage = on_damage
        self._damaged = False
        self._exports: set[LmdbExport] = set()
        self._queue: queue.SimpleQueue[tuple[Group, Callable[[], None] | None] | _Job | None] = queue.SimpleQueue()
        self._since: deque[float] = deque()
        self._thread = threading.Thread(target=self._write, name="toque-store", daemon=True)
        self._thread.start()

    def apply(self, group: Group, on_folded: Callable[[], None] | None = None) -> None:
        self._since.append(time.monotonic())
        self._queue.put((group, on_folded))

    async def flush(self) -> None:
        await self._do(lambda: None)

    async def _do(self, act: Callable[[], None]) -> None:
        """In the writer thread, after everything applied so far. Never returns once the store is damaged."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._queue.put(_Job(act, done))
        await done

    @property
    def lag_s(self) -> float:
        try:
            return time.monotonic() - self._since[0]
        except IndexError:  # nothing waits; asked in one step, for the writer thread takes from the other end
            return 0.0

    async def drop(self, station: StationId) -> None:
        await self._do(lambda: self.tables.drop(fold.station_key(station)))

    async def set_aside(self, station: StationId) -> str:
        path = self._directory.with_name(f"{self._directory.name}.aside-{time.time_ns()}-station-{station}")
        export = self.export(station, ASIDE_CHUNK_BYTES)
        if export is None:
            return ""
        try:
            with path.open("xb") as file:
                while chunk := await export.next():
                    file.write(chunk)
        finally:
            export.close()
        return str(path)

    async def load(self, station: StationId, rows: Sequence[StoredRow], position: Position | None = None) -> None:
        writes = fold.load_writes(station, rows, position)
        await self._do(lambda: self.tables.write(writes))

    def export(self, station: StationId, chunk_bytes: int) -> LmdbExport | None:
        prefix = fold.station_key(station)
        transaction = self._environment.begin()
        try:
            position = self.tables.get_in(transaction, fold.POSITION, prefix)
            size = self.tables.get_in(transaction, fold.SIZES, prefix)
        except (lmdb.Error, StoreDamaged) as error:
            transaction.abort()
            self._fail(error)
            raise
        if position is None:
            transaction.abort()
            return None
        rows = self.tables.export(transaction, prefix)
        chunks = ChunkWriter(station, fold.decode_position(position), rows, chunk_bytes)
        export = LmdbExport(transaction, chunks, int.from_bytes(size or b"", "big"), failed=self._fail,
                            closed=self._exports.discard)
        self._exports.add(export)
        return export

    def close(self) -> None:
        for export in list(self._exports):
            export.close()
        self._queue.put(None)
        self._thread.join()
        if not self._damaged:
            identity = msgspec.msgpack.encode(Identity(FORMAT, self._account, self._pod, boot_id(), True))
            meta = self._environment.open_db(_META)
            self._environment.sync(True)
            with self._environment.begin(write=True, db=meta) as transaction:
                transaction.put(_IDENTITY, _seal(_IDENTITY, identity))
            self._environment.sync(True)
        self._environment.close()

    # -- the writer thread ---------------------------------------------------------------------------------------------

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if isinstance(item, _Job):
                    item.act()
                    self._loop.call_soon_threadsafe(_resolve, item.done)
                else:
                    self._fold(item)
            except (lmdb.Error, ToqueError, OSError, msgspec.MsgspecError) as error:
                self._fail(error)
                return

    def _fold(self, first: tuple[Group, Callable[[], None] | None]) -> None:
        groups = [first]
        tail: _Job | None = None
        stop = False
        while len(groups) < GROUPS_PER_TRANSACTION and tail is None and not stop:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is None:
                self._queue.put(None)
                stop = True
            elif isinstance(item, _Job):
                tail = item
            else:
                groups.append(item)
        batch = fold.FoldBatch(self.tables)
        for group, _ in groups:
            batch.apply(group)
        self.tables.write(batch.finish())
        for _ in groups:
            self._since.popleft()
        callbacks = [on_folded for _, on_folded in groups if on_folded is not None]
        if callbacks:
            self._loop.call_soon_threadsafe(_call_all, callbacks)
        if tail is not None:
            tail.act()
            self._loop.call_soon_threadsafe(_resolve, tail.done)

    def _fail(self, error: Exception) -> None:
        """The environment is not closed as a clean one; what waits for a fold is woken by the damage report."""
        if not self._damaged:
            self._damaged = True
            self._loop.call_soon_threadsafe(self._on_damage, error)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _call_all(callbacks: list[Callable[[], None]]) -> None:
    for callback in callbacks:
        callback()
