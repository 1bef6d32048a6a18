"""Watching an app's source files for changes, and looking into an APP in a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from toque._children import ChildProcess
from toque._cluster import pod_environment
from toque._dev_pod import error_in
from toque.errors import AppError

WATCH_S: Final = 0.3
FILES_MAX: Final = 2_000
INSPECT_S_MAX: Final = 120.0
INSPECT_MARK: Final = '{"workflows":'
_NOT_WATCHED: Final = frozenset({"node_modules", "venv", "site-packages", "__pycache__"})

FileMarks = dict[Path, tuple[int, int]]
_GONE: Final = (0, 0)


class AppReport(msgspec.Struct):
    """What is in an APP: its workflows with their versions, and its source files."""

    workflows: dict[str, str]
    files: list[str]


async def inspect_app(reference: str) -> AppReport:
    """Import the APP in a child process, so that the supervisor never runs the user's code.

    Raises AppError with what the import says.
    """
    lines: list[str] = []
    child = await ChildProcess.start([sys.executable, "-m", "toque", "inspect", reference],
                                     env=pod_environment({}, ()), on_line=lines.append)
    try:
        async with asyncio.timeout(INSPECT_S_MAX):
            await child.wait()
    except TimeoutError:
        raise AppError(f"importing {reference} took longer than {INSPECT_S_MAX:g} s") from None
    finally:
        child.kill()
    marked = [line for line in lines if line.startswith(INSPECT_MARK)]  # the user's module may print, too
    if not marked:
        raise AppError(error_in(lines) or "\n".join(lines[-3:]) or f"importing {reference} ended the process")
    return msgspec.json.decode(marked[-1], type=AppReport)


class CodeWatch:
    """Tells of changes of files. The files are looked at in a thread, every WATCH_S seconds."""

    def __init__(self) -> None:
        self.marks: FileMarks = {}

    def watch(self, files: Iterable[Path], *, read_ns: int) -> None:
        """From now on these. One changed since `read_ns` (time.time_ns) was read too early and counts as changed."""
        now_ns = time.time_ns()
        self.marks = {path: _GONE if read_ns <= mark[0] <= now_ns else mark for path, mark in marks(files).items()}

    async def changed(self) -> list[Path]:
        """Wait for a change; returns the files that were changed, made or removed."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Path]] = loop.create_future()
        stop = threading.Event()

        def tell(paths: list[Path]) -> None:
            if not found.done():
                found.set_result(paths)

        def look() -> None:
            while not stop.wait(WATCH_S):
                if paths := differences(self.marks, marks(self.marks)):
                    loop.call_soon_threadsafe(tell, paths)
                    return

        threading.Thread(target=look, name="toque-reload", daemon=True).start()
        try:
            return await found
        finally:
            stop.set()


def marks(files: Iterable[Path]) -> FileMarks:
    """What tells a change of each file: its time and size; zeros while there is no such file."""
    return {path: _mark(path) for path in files}


def _mark(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return _GONE
    return (stat.st_mtime_ns, stat.st_size)


def differences(before: FileMarks, after: FileMarks) -> list[Path]:
    return sorted(path for path, mark in after.items() if before.get(path) != mark)


def nearby_files(reference: str) -> list[Path]:
    """The Python files around an APP that does not import, and so cannot say which are its own."""
    target = Path(reference.rpartition(":")[0] or reference)
    root = target.parent if target.suffix == ".py" else Path.cwd()
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NOT_WATCHED)
        found += [Path(folder, name).resolve() for name in names if name.endswith(".py")]
        if len(found) >= FILES_MAX:
            break
    return found[:FILES_MAX]
