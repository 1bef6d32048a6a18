"""Bounds of memory and CPU for single processes, by control groups (v2, or v1 where controllers are mounted so). Root."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")
PERIOD_US = 100_000
_LIMIT_FILES = {"memory": ("memory.max", "memory.limit_in_bytes"), "cpu": ("cpu.max", "cpu.cfs_quota_us")}  # v2, v1
_SWAP_FILE = "memory.swap.max"  # v2


class CgroupsAway(OSError):
    """Groups cannot be made here: no root, or the controller is not to be had."""


class Cgroup:
    """One group of one controller ("memory" or "cpu"), removed by `close`.

    It is made below this process's own group; in v2, where a group that hands controllers down holds no processes itself,
    below the nearest one from there upwards that does.
    """

    def __init__(self, controller: str) -> None:
        self._controller = controller
        self._came_from: dict[int, Path] = {}  # by process
        self._is_v1 = (ROOT / controller).is_dir()
        self._base = self._v1_base() if self._is_v1 else self._v2_base()
        self._path = self._base / f"toque-chaos-{os.getpid()}-{time.monotonic_ns()}"
        try:
            self._path.mkdir()
        except OSError as error:
            raise CgroupsAway(f"no control group can be made in {self._base}: {error.strerror}") from error
        if not (self._path / self._limit_file).exists():
            self.close()
            raise CgroupsAway(f"control groups in {self._base} have no {controller} controller")

    def add(self, pid: int) -> None:
        """Move a process into the group; what it holds already is charged to it only in part. Raises OSError."""
        self._came_from[pid] = self._group_of(str(pid))
        (self._path / "cgroup.procs").write_text(str(pid))

    def let_go(self, pid: int) -> None:
        """Move a process back to where it came from, one that it has begun meanwhile to where we are; nothing if it is gone.

        In v2 never to where the group was made: that one takes none.
        """
        with contextlib.suppress(OSError):
            (self._came_from.get(pid, self._group_of("self")) / "cgroup.procs").write_text(str(pid))

    def limit_memory(self, size: int) -> None:
        """Bound its memory; the kernel kills a process of the group that needs more. Set it while the group is empty."""
        (self._path / self._limit_file).write_text(str(size))
        if (self._path / _SWAP_FILE).exists():
            (self._path / _SWAP_FILE).write_text("0")  # else it is swapped out, and lives

    def limit_cpu(self, share: float) -> None:
        """Bound it to a share of one CPU."""
        quota = max(1000, int(PERIOD_US * share))
        text = str(quota) if self._is_v1 else f"{quota} {PERIOD_US}"
        (self._path / self._limit_file).write_text(text)

    def throttled(self) -> int:
        """How often it was made to wait for its share of the CPU."""
        lines = dict(line.split() for line in (self._path / "cpu.stat").read_text().splitlines())
        return int(lines.get("nr_throttled", 0))

    def close(self) -> None:
        """Remove the group; what is still in it goes back."""
        with contextlib.suppress(OSError):
            for pid in (self._path / "cgroup.procs").read_text().split():
                self.let_go(int(pid))
            self._path.rmdir()

    @property
    def _limit_file(self) -> str:
        return _LIMIT_FILES[self._controller][self._is_v1]

    def _v1_base(self) -> Path:
        return self._group_of("self")

    def _group_of(self, process: str) -> Path:
        """Where a process is; "self" is this one."""
        if self._is_v1:
            return ROOT / self._controller / _path_of(process, self._controller).lstrip("/")
        return ROOT / _path_of(process, "").lstrip("/")

    def _v2_base(self) -> Path:
        """The nearest group from our own upwards whose children get the controller."""
        base = self._group_of("self")
        while base != ROOT and self._controller not in _text(base / "cgroup.subtree_control").split():
            base = base.parent
        if self._controller not in _text(base / "cgroup.subtree_control").split():
            raise CgroupsAway(f"no group from our own upwards hands its {self._controller} controller down")
        return base


def _path_of(process: str, controller: str) -> str:
    """From /proc/<process>/cgroup: lines of number:controllers:path, v2's without controllers."""
    for line in (PROC / process / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
