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
from collections.abc import Callable
from pathlib import Path

import lmdb
import msgspec

from toque._subjects import StationId
from toque.errors import SetupError, ToqueError
from toque.storage import fold
from toque.storage.folded_store import FoldedReaders
from toque.storage.ports import StoreDamaged
from toque.storage.records import FORMAT, Group

MAP_BYTES = 256 << 30  # address space, not disk
GROUPS_PER_TRANSACTION = 64
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
        with self._environment.begin(write=True) as transaction:
            for database in self._databases:
                cursor = transaction.cursor(database)
                while cursor.set_range(prefix) and cursor.key().startswith(prefix):
                    cursor.delete()


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


class LmdbStore(FoldedReaders):
    """See `toque.storage.ports.Store`. `on_damage` is called once, in the loop, when writing or reading failed."""

    def __init__(self, directory: Path, *, account: str, pod: str,
                 on_damage: Callable[[Exception], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._environment, self.set_aside_to = open_environment(directory, account, pod)
        self.tables = LmdbTables(self._environment)
        super().__init__(_WatchedTables(self.tables, self._fail))
        self._account, self._pod = account, pod
        self._on_damage = on_damage
        self._damaged = False
        self._queue: queue.SimpleQueue[tuple[Group, Callable[[], None] | None] | asyncio.Future[None] | None]
        self._queue = queue.SimpleQueue()
        self._since: deque[float] = deque()
        self._thread = threading.Thread(target=self._write, name="toque-store", daemon=True)
        self._thread.start()

    def apply(self, group: Group, on_folded: Callable[[], None] | None = None) -> None:
        self._since.append(time.monotonic())
        self._queue.put((group, on_folded))

    async def flush(self) -> None:
        done: asyncio.Future[None] = self._loop.create_future()
        self._queue.put(done)
        await done

    @property
    def lag_s(self) -> float:
        try:
            return time.monotonic() - self._since[0]
        except IndexError:  # nothing waits; asked in one step, for the writer thread takes from the other end
            return 0.0

    def drop(self, station: StationId) -> None:
        self.tables.drop(fold.station_key(station))

    def close(self) -> None:
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
                if isinstance(item, asyncio.Future):
                    self._loop.call_soon_threadsafe(_resolve, item)
                else:
                    self._fold(item)
            except (lmdb.Error, ToqueError, OSError, msgspec.MsgspecError) as error:
                self._fail(error)
                return

    def _fold(self, first: tuple[Group, Callable[[], None] | None]) -> None:
        groups = [first]
        tail: asyncio.Future[None] | None = None
        stop = False
        while len(groups) < GROUPS_PER_TRANSACTION and tail is None and not stop:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is None:
                self._queue.put(None)
                stop = True
            elif isinstance(item, asyncio.Future):
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
        if tail is not None:
            callbacks.append(lambda: _resolve(tail))
        if callbacks:
            self._loop.call_soon_threadsafe(_call_all, callbacks)

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
