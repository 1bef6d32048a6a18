"""Processes on this host as seen from outside: whether one lives, what it is, who listens on a port, starting it again."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

_PARENT_VARIABLE = "TOQUE_PARENT_PID"  # ties a process to the supervisor that started it
_LISTEN = "0A"  # of /proc/net/tcp
_PROC = Path("/proc")


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that waits for its parent to read its end does not."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def command_of(pid: int) -> str:
    """Its command line; empty when it is gone or not ours to see."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def is_local(host: str) -> bool:
    """Whether an address is one of this host's: a socket can be bound to it."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def listener(port: int) -> int:
    """The process that listens on a TCP port of this host; 0 when none can be seen."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    return next((pid for pid in _pids() if inodes & _open_files(pid)), 0)


def _pids() -> list[int]:
    return [int(path.name) for path in _PROC.iterdir() if path.name.isdigit()]


def _open_files(pid: int) -> set[str]:
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for path in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(path))
    return found


def memory_bytes(pid: int) -> int:
    """Memory of its own in use, without the files that it maps (a store is one); 0 when it is gone."""
    with contextlib.suppress(OSError):
        if found := re.search(r"RssAnon:\s+(\d+) kB", (_PROC / str(pid) / "status").read_text()):
            return int(found[1]) * 1024
    return 0


def threads_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(list((_PROC / str(pid) / "task").iterdir()))
    return 0


def files_of(pid: int) -> int:
    """Open file descriptors."""
    with contextlib.suppress(OSError):
        return len(list((_PROC / str(pid) / "fd").iterdir()))
    return 0


@dataclass(frozen=True)
class Launch:
    """How a process was started, so that it can be started again in the same way."""

    argv: list[str]
    env: dict[str, str]
    cwd: str

    @classmethod
    def of(cls, pid: int) -> Launch:
        """Read it from the living process. Raises OSError when it is gone or belongs to another user."""
        place = _PROC / str(pid)
        pairs = [pair.partition("=") for pair in (place / "environ").read_bytes().decode(errors="replace").split("\0")]
        argv = (place / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        env = {name: value for name, _, value in pairs if name not in ("", _PARENT_VARIABLE)}
        return cls(argv, env, os.readlink(place / "cwd"))

    def again(self, log: Path) -> int:
        """Start it, its output appended to `log`; it outlives this process. Returns its id."""
        with log.open("ab") as output:
            return subprocess.Popen(self.argv, env=self.env, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=output,
                                    stderr=subprocess.STDOUT, start_new_session=True).pid
