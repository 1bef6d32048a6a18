"""The ledger: a process of its own to which callbacks report that they were entered and left.

It stands outside of what is being tested: its own clock (CLOCK_MONOTONIC), its own file, no record of Toque. An entry
is in the file before its reporter gets the acknowledgement, so a callback that did anything after `enter` is in the
ledger, however its process ended. When a process dies the kernel closes its connections, which is noted too (`gone`).

One line per entry: a JSON array `[at_ns, connection, kind, …]`, the rest as the reporter sent it (see `Entry`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Protocol, cast

import msgspec
import uvloop

SOCKET_VARIABLE = "TOQUE_LEDGER"
START_TIMEOUT_S = 20.0
REPORT_TIMEOUT_S = 60.0
LINE_BYTES_MAX = 16 * 1024
ACK = b"+"
READY = b"ready\n"

OPENED, GONE, ENTER, EXIT, MARK = "opened", "gone", "enter", "exit", "mark"


class LedgerAway(ConnectionError):
    """The ledger does not answer: the callback must not go on, because nobody would know of it."""


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """One line of the ledger. Lines stand in the order of `at_ns`, the ledger's own CLOCK_MONOTONIC."""

    at_ns: int
    connection: int  # ended by a `gone` of the same number
    kind: str  # opened | gone | enter | exit | mark
    workflow: str = ""
    instance: str = ""
    step: str = ""
    attempt: int = 0
    pod: str = ""
    pid: int = 0  # of opened and gone: as the kernel says; else as the reporter says
    token: str = ""  # the callback's idempotency key
    note: str = ""  # of exit: "ok" or the exception's type; of mark: what happened


class CallbackContext(Protocol):
    """What the ledger wants to know of a callback; `toque.StepContext` is one."""

    @property
    def workflow_name(self) -> str: ...
    @property
    def instance_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def idempotency_key(self) -> str: ...


# -- the process -------------------------------------------------------------------------------------------------------

class _Reporter(asyncio.Protocol):
    """One connection: stamps its lines, appends them to the file in one write, acknowledges each with one byte."""

    def __init__(self, file: int, number: int) -> None:
        self._file = file
        self._number = number
        self._tail = b""
        self._pid = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not its subclasses
        credentials = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self._pid = struct.unpack("3i", credentials)[0]
        self._append_own(OPENED)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        *lines, self._tail = (self._tail + data).split(b"\n")
        if len(self._tail) > LINE_BYTES_MAX or not all(map(_is_array, lines)):
            self._transport.abort()
            return
        if lines:
            own = self._number
            os.write(self._file, b"".join([b"[%d,%d,%b\n" % (time.monotonic_ns(), own, line[1:]) for line in lines]))
            self._transport.write(ACK * len(lines))

    def connection_lost(self, exc: Exception | None) -> None:
        self._append_own(GONE)

    def _append_own(self, kind: str) -> None:
        entry = Entry(time.monotonic_ns(), self._number, kind, pid=self._pid)
        os.write(self._file, msgspec.json.encode(entry) + b"\n")


def _is_array(line: bytes) -> bool:
    return line.startswith(b"[") and line.endswith(b"]") and len(line) <= LINE_BYTES_MAX


async def _serve(socket_path: Path, file: int) -> None:
    """Serve until standard input ends: with whoever started the ledger, the ledger ends."""
    loop = asyncio.get_running_loop()
    numbers = iter(range(1, sys.maxsize))
    server = await loop.create_unix_server(lambda: _Reporter(file, next(numbers)), path=str(socket_path), backlog=1024)
    ended = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), ended.set)
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    await ended.wait()
    loop.remove_reader(sys.stdin.fileno())
    server.close()


def main(arguments: list[str] | None = None) -> int:
    """The ledger's process: `python -m toque.chaos.ledger SOCKET FILE`."""
    parser = argparse.ArgumentParser(prog="toque.chaos.ledger", description="Keeps the ledger of callbacks.")
    parser.add_argument("socket", type=Path)
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    file = os.open(options.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C may reach the whole group; the end of stdin is our signal
    try:
        uvloop.run(_serve(options.socket, file))
    finally:
        with contextlib.suppress(OSError):  # left by a parent that was killed; else the parent removes it itself
            options.socket.unlink(missing_ok=True)
            options.socket.parent.rmdir()
    return 0


class Ledger:
    """A running ledger. Ends with `stop()`, at the latest with the process that started it."""

    def __init__(self, process: subprocess.Popen[bytes], file: Path, directory: Path) -> None:
        self._process = process
        self._directory = directory
        self.file = file
        self.socket = directory / "socket"

    @classmethod
    def start(cls, path: Path) -> Ledger:
        """Start a ledger that appends to `path`. Blocks until it answers; raises LedgerAway if it does not."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        directory = Path(tempfile.mkdtemp(prefix="toque-ledger-"))  # a socket's path holds 107 bytes at most
        process = subprocess.Popen(
            [sys.executable, "-m", "toque.chaos.ledger", str(directory / "socket"), str(path.resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        ledger = cls(process, path, directory)
        if not _answers(process):
            ledger.stop()
            raise LedgerAway(f"the ledger did not start within {START_TIMEOUT_S:.0f} s")
        return ledger

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """What the processes of the callbacks need in their environment."""
        return {SOCKET_VARIABLE: str(self.socket)}

    def stop(self) -> None:
        """End the process. What it acknowledged is in the file."""
        try:
            self._process.communicate(timeout=START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _answers(process: subprocess.Popen[bytes]) -> bool:
    assert process.stdout is not None
    watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        return process.stdout.readline() == READY
    finally:
        watchdog.cancel()


# -- clients -----------------------------------------------------------------------------------------------------------

_encoder = msgspec.json.Encoder()


def _line(kind: str, context: CallbackContext, pod: str, note: str = "") -> bytes:
    return _encoder.encode((kind, context.workflow_name, context.instance_id, context.name, context.attempt, pod,
                            os.getpid(), context.idempotency_key, note)) + b"\n"


def _mark_line(note: str, pod: str, pid: int) -> bytes:
    return _encoder.encode((MARK, "", "", "", 0, pod, pid, "", note)) + b"\n"


def socket_from_environment() -> str:
    """The socket's path in TOQUE_LEDGER; raises LedgerAway when it is not set."""
    path = os.environ.get(SOCKET_VARIABLE)
    if not path:
        raise LedgerAway(f"{SOCKET_VARIABLE} is not set: no ledger to report to")
    return path


class _ThreadConnection(threading.local):
    """Each thread has a connection of its own, so that nobody waits for another's acknowledgement."""

    socket: socket.socket | None = None
    owner = 0  # the process that opened it: a forked child opens its own


class LedgerClient:
    """Reports from threads. Every call blocks until the entry is in the ledger's file; raises LedgerAway."""

    def __init__(self, socket_path: str | Path | None = None, *, pod: str = "") -> None:
        self._path = str(socket_path or socket_from_environment())
        self._pod = pod
        self._local = _ThreadConnection()

    def enter(self, context: CallbackContext) -> None:
        """The callback is about to begin."""
        self._report(_line(ENTER, context, self._pod))

    def exit(self, context: CallbackContext, note: str = "ok") -> None:
        """The callback has ended: "ok", or the type of what it raised."""
        self._report(_line(EXIT, context, self._pod, note))

    @contextmanager
    def inside(self, context: CallbackContext) -> Iterator[None]:
        """Report the body as one visit of the callback."""
        self.enter(context)
        try:
            yield
        except BaseException as exc:
            self.exit(context, type(exc).__name__)
            raise
        self.exit(context)

    def mark(self, note: str, *, pod: str = "", pid: int = 0) -> None:
        """Note an event of the test itself, on the ledger's clock: "killed" right after a kill."""
        self._report(_mark_line(note, pod, pid))

    def close(self) -> None:
        """Close this thread's connection."""
        if self._local.socket is not None:
            self._local.socket.close()
            self._local.socket = None

    def _report(self, lines: bytes) -> None:
        try:
            connection = self._connection()
            connection.sendall(lines)
            missing = lines.count(b"\n")
            while missing:
                acks = connection.recv(missing)
                if not acks:
                    raise LedgerAway(f"the ledger at {self._path} closed the connection")
                missing -= len(acks)
        except OSError as exc:
            self.close()
            raise LedgerAway(f"the ledger at {self._path} does not answer: {exc}") from exc

    def _connection(self) -> socket.socket:
        local = self._local
        if local.socket is None or local.owner != os.getpid():
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(REPORT_TIMEOUT_S)
            connection.connect(self._path)
            local.socket, local.owner = connection, os.getpid()
        return local.socket


class AsyncLedgerClient:
    """Reports from one event loop, over one connection; waiting calls overtake nothing. Raises LedgerAway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pod: str) -> None:
        self._writer = writer
        self._pod = pod
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._acks = asyncio.create_task(self._read_acks(reader), name="ledger acknowledgements")

    @classmethod
    async def connect(cls, socket_path: str | Path | None = None, *, pod: str = "") -> AsyncLedgerClient:
        path = str(socket_path or socket_from_environment())
        try:
            reader, writer = await asyncio.open_unix_connection(path)
        except OSError as exc:
            raise LedgerAway(f"the ledger at {path} does not answer: {exc}") from exc
        return cls(reader, writer, pod)

    async def enter(self, context: CallbackContext) -> None:
        await self._report(_line(ENTER, context, self._pod))

    async def exit(self, context: CallbackContext, note: str = "ok") -> None:
        await self._report(_line(EXIT, context, self._pod, note))

    @asynccontextmanager
    async def inside(self, context: CallbackContext) -> AsyncIterator[None]:
        """Report the body as one visit of the callback; its exit is reported even while being cancelled."""
        try:
            await self.enter(context)
            yield
        except BaseException as exc:
            await self.exit(context, type(exc).__name__)
            raise
        await self.exit(context)

    async def mark(self, note: str, *, pod: str = "", pid: int = 0) -> None:
        """Note an event of the test itself, on the ledger's clock."""
        await self._report(_mark_line(note, pod, pid))

    async def close(self) -> None:
        self._writer.close()
        self._acks.cancel()
        await asyncio.wait([self._acks])

    def _report(self, line: bytes) -> asyncio.Future[None]:
        """Send the line at once; the future ends when it is in the file."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._acks.done():
            future.set_exception(LedgerAway("the connection to the ledger is closed"))
            return future
        self._waiting.append(future)
        self._writer.write(line)
        return future

    async def _read_acks(self, reader: asyncio.StreamReader) -> None:
        try:
            while acks := await reader.read(4096):
                for _ in acks:
                    future = self._waiting.popleft()
                    if not future.done():
                        future.set_result(None)
        finally:
            for future in self._waiting:
                if not future.done():
                    future.set_exception(LedgerAway("the connection to the ledger was lost"))
            self._waiting.clear()


# -- reading -----------------------------------------------------------------------------------------------------------

class LedgerReader:
    """Reads a ledger's file while it grows, from `offset` bytes on."""

    def __init__(self, file: Path, offset: int = 0) -> None:
        self._file = file
        self._offset = offset
        self._decoder = msgspec.json.Decoder(Entry)

    def read_new(self) -> list[Entry]:
        """Entries written since the last call; a line that is still being written is left for the next one."""
        with self._file.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [self._decoder.decode(line) for line in whole.splitlines()]


def read_ledger(file: Path, offset: int = 0) -> list[Entry]:
    """Every entry of a ledger's file from `offset` bytes on, in order."""
    return LedgerReader(file, offset).read_new()


if __name__ == "__main__":
    sys.exit(main())
