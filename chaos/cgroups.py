"""Bounds of memory and CPU for single processes, by control groups (v2, or v1 where controllers are mounted so). Root."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 100_000
_LIMIT_FILES = {"memory": ("memory.max", "memory.limit_in_bytes"), "cpu": ("cpu.max", "cpu.cfs_quota_us")}  # v2, v1


class CgroupsAway(OSError):
    """Groups cannot be made here: no root, or the controller is not to be had."""


class Cgroup:
    """One group of one controller ("memory" or "cpu"), made below this process's own, removed by `close`."""

    def __init__(self, controller: str) -> None:
        self._controller = controller
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
        """Move a process into the group; what it holds already is charged to it only in part."""
        (self._path / "cgroup.procs").write_text(str(pid))

    def let_go(self, pid: int) -> None:
        """Move a process back to where the group was made; nothing if it is gone."""
        with contextlib.suppress(OSError):
            (self._base / "cgroup.procs").write_text(str(pid))

    def limit_memory(self, size: int) -> None:
        """Bound its memory; the kernel kills a process of the group that needs more. Set it while the group is empty."""
        (self._path / self._limit_file).write_text(str(size))

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
        """Remove the group; what is still in it goes back to where it was made."""
        with contextlib.suppress(OSError):
            for pid in (self._path / "cgroup.procs").read_text().split():
                self.let_go(int(pid))
            self._path.rmdir()

    @property
    def _limit_file(self) -> str:
        return _LIMIT_FILES[self._controller][self._is_v1]

    def _v1_base(self) -> Path:
        return ROOT / self._controller / _own_path(self._controller).lstrip("/")

    def _v2_base(self) -> Path:
        """The nearest group from our own upwards whose children get the controller."""
        base = ROOT / _own_path("").lstrip("/")
        while base != ROOT and self._controller not in _text(base / "cgroup.subtree_control").split():
            base = base.parent
        if self._controller not in _text(base / "cgroup.subtree_control").split():
            raise CgroupsAway(f"no group from our own upwards hands its {self._controller} controller down")
        return base


def _own_path(controller: str) -> str:
    """From /proc/self/cgroup: lines of number:controllers:path, v2's without controllers."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
