"""Child processes of the local cluster: started, heard line by line, ended together with this process.

A child is the leader of a session of its own, so that a Ctrl-C in the terminal reaches the supervisor alone, which
then ends its children in order. `die_with_parent` is the child's side: a killed supervisor leaves nobody behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from toque.errors import SetupError

PARENT_VARIABLE: Final = "TOQUE_PARENT_PID"
LINE_BYTES_MAX: Final = 16 * 1024  # a longer line of output is handed on in pieces
DRAIN_S_MAX: Final = 1.0  # how long a dead child's pipe is read on: its own children may hold it open
_READ_BYTES: Final = 64 * 1024
_PR_SET_PDEATHSIG: Final = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the parent named by the environment dies; nothing without one.

    Call it first thing in a child. A parent that is gone already ends the child here.
    """
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        raise SystemExit(1)


class Backoff:
    """How long to wait before a child is started again: doubling from `first_s` to `cap_s`.

    A child that lived for `reset_s` starts the series anew.
    """

    def __init__(self, *, first_s: float = 0.2, cap_s: float = 10.0, reset_s: float = 30.0) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._reset_s = reset_s
        self._next_s = first_s

    def next_s(self, lived_s: float) -> float:
        """The pause after a child that lived so long, in seconds."""
        delay_s = self._first_s if lived_s >= self._reset_s else self._next_s
        self._next_s = min(delay_s * 2, self._cap_s)
        return delay_s


class LineSplitter:
    """Cuts a stream of bytes into lines of text, none longer than LINE_BYTES_MAX."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that are complete now, without their ends."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        pieces = [piece for line in lines for piece in _pieces(line)]
        if len(self._rest) > LINE_BYTES_MAX:
            *full, self._rest = _pieces(self._rest)
            pieces += full
        return [piece.decode(errors="replace").rstrip("\r") for piece in pieces]

    def rest(self) -> list[str]:
        """What stands at the end without a line end."""
        rest, self._rest = self._rest, b""
        return [rest.decode(errors="replace")] if rest else []


def _pieces(line: bytes) -> list[bytes]:
    return [line[at:at + LINE_BYTES_MAX] for at in range(0, len(line), LINE_BYTES_MAX)] or [line]


class ChildProcess:
    """One child process. Made by `start`; `wait` returns once it is dead and its output is handed on."""

    def __init__(self, process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> None:
        self._process = process
        self._started = time.monotonic()
        self._pump = asyncio.ensure_future(_pump(process, on_line))
        self._end = asyncio.ensure_future(self._follow())

    @classmethod
    async def start(cls, argv: Sequence[str], *, env: Mapping[str, str],
                    on_line: Callable[[str], None]) -> ChildProcess:
        """Start it; `on_line` gets each line of its output and error output.

        Raises SetupError when the program cannot be run.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *argv, env={**env, PARENT_VARIABLE: str(os.getpid())}, start_new_session=True,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        except OSError as error:
            raise SetupError(f"{argv[0]} cannot be run: {error.strerror}") from error
        return cls(process, on_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._end.done() and self._process.returncode is None

    @property
    def lived_s(self) -> float:
        return time.monotonic() - self._started

    def send(self, sig: signal.Signals) -> None:
        """Send it a signal; nothing happens when it is dead."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(sig)

    def kill(self) -> None:
        """SIGKILL to it and to every process that it started and that did not leave its session."""
        if not self._end.done():
            self._kill_group()

    async def wait(self) -> int:
        """Its exit code; the negative number of the signal that killed it. What it started is dead then, too."""
        return await asyncio.shield(self._end)

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, and SIGKILL to all of it when `grace_s` seconds are over. Its exit code."""
        self.send(signal.SIGTERM)
        await asyncio.wait([self._end], timeout=grace_s)
        self.kill()
        return await self.wait()

    async def _follow(self) -> int:
        code = await self._process.wait()
        self._kill_group()  # the group outlives its leader while callbacks' own processes run
        await asyncio.wait([self._pump], timeout=DRAIN_S_MAX)
        self._pump.cancel()
        return code

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


async def _pump(process: asyncio.subprocess.Process, on_line: Callable[[str], None]) -> None:
    assert process.stdout is not None
    splitter = LineSplitter()
    while data := await process.stdout.read(_READ_BYTES):
        for line in splitter.feed(data):
            on_line(line)
    for line in splitter.rest():
        on_line(line)


def exit_text(code: int) -> str:
    """What an exit code says: "exit 1", or "signal 9 (SIGKILL)"."""
    if code >= 0:
        return f"exit {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"
