"""Control groups of both versions, on a directory tree that behaves like the kernel's as far as they need it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from toque.chaos import cgroups
from toque.chaos.cgroups import Cgroup, CgroupsAway

POD, CHILD, ME = 70, 71, os.getpid()
V2_FILES = {"memory": ("memory.max", "memory.swap.max"), "cpu": ("cpu.max", "cpu.stat")}
V1_FILES = {"memory": ("memory.limit_in_bytes",), "cpu": ("cpu.cfs_quota_us", "cpu.stat")}


class Kernel:
    """Makes the files of a group with it, moves processes, and refuses what Linux refuses.

    In v2 `handing` are the groups whose children get the controllers: but for the root none of them takes processes.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, *, v1: bool = False,
                 handing: tuple[str, ...] = ()) -> None:
        self.root, self.proc, self.v1 = directory / "cgroup", directory / "proc", v1
        self.handing = [self.root / path for path in handing]
        self._mkdir, self._rmdir, self._write = Path.mkdir, Path.rmdir, Path.write_text
        self.root.mkdir()
        for name, act in (("mkdir", self.mkdir), ("rmdir", self.rmdir), ("write_text", self.write)):
            monkeypatch.setattr(Path, name, lambda path, *args, act=act, **kwargs: act(path, *args, **kwargs))
        monkeypatch.setattr(cgroups, "ROOT", self.root)
        monkeypatch.setattr(cgroups, "PROC", self.proc)

    def group(self, path: str, *pids: int) -> Path:
        """A group with processes in it."""
        place = self.root / path
        for part in [*reversed(place.relative_to(self.root).parents), Path(path)]:
            if not (self.root / part / "cgroup.procs").exists():
                self._mkdir(self.root / part, exist_ok=True)
                self._fill(self.root / part)
        for pid in pids:
            self._put(place, pid)
        return place

    def of(self, pid: int) -> Path:
        """Where a process is."""
        return next(file.parent for file in self.root.rglob("cgroup.procs") if str(pid) in file.read_text().split())

    def end(self, pid: int) -> None:
        """A process ends."""
        self._write(self.of(pid) / "cgroup.procs", "")
        shutil.rmtree(self.proc / str(pid))

    def made(self) -> list[Path]:
        return list(self.root.rglob("toque-chaos-*"))

    def _fill(self, group: Path) -> None:
        self._write(group / "cgroup.procs", "")
        if self.v1:
            files = V1_FILES[group.relative_to(self.root).parts[0]] if group != self.root else ()
        else:
            self._write(group / "cgroup.subtree_control", "cpu memory\n" if group in self.handing else "\n")
            files = [name for names in V2_FILES.values() for name in names] if group.parent in self.handing else ()
        for name in files:
            self._write(group / name, "nr_periods 9\nnr_throttled 3\n" if name == "cpu.stat" else "max")

    def _put(self, group: Path, pid: int) -> None:
        for file in [*self.root.rglob("cgroup.procs")]:
            self._write(file, "".join(f"{other}\n" for other in file.read_text().split() if other != str(pid)))
        self._write(group / "cgroup.procs", (group / "cgroup.procs").read_text() + f"{pid}\n")
        for name in (str(pid), *(["self"] if pid == ME else [])):
            self._mkdir(self.proc / name, parents=True, exist_ok=True)
            path = group.relative_to(self.root)
            line = f"4:{path.parts[0]}:/{'/'.join(path.parts[1:])}" if self.v1 else f"0::/{path}"
            self._write(self.proc / name / "cgroup", f"9:name=systemd:/elsewhere\n{line}\n")

    def mkdir(self, path: Path, *args: int, **kwargs: bool) -> None:
        self._mkdir(path, *args, **kwargs)
        if self.root in path.parents:
            self._fill(path)

    def rmdir(self, path: Path) -> None:
        if self.root in path.parents:
            if (path / "cgroup.procs").read_text().split():
                raise OSError(errno.EBUSY, "Device or resource busy")
            shutil.rmtree(path)
        else:
            self._rmdir(path)

    def write(self, path: Path, text: str, **kwargs: str) -> None:
        if path.name == "cgroup.procs" and self.root in path.parents:
            if path.parent in self.handing and path.parent != self.root:
                raise OSError(errno.EBUSY, "Device or resource busy")
            if not (self.proc / text).exists():
                raise ProcessLookupError(errno.ESRCH, "No such process")
            self._put(path.parent, int(text))
        else:
            self._write(path, text, **kwargs)


@pytest.fixture
def v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """As systemd leaves it: we are in a session's scope, the pod in a service, controllers come from the slices."""
    kernel = Kernel(tmp_path, monkeypatch, handing=("", "user.slice", "system.slice"))
    kernel.group("user.slice/session.scope", ME)
    kernel.group("system.slice/toque.service", POD)
    return kernel


@pytest.fixture
def v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """One tree for each controller; we and the pod are in groups of our own."""
    kernel = Kernel(tmp_path, monkeypatch, v1=True)
    kernel.group("memory/ours", ME)
    kernel.group("memory/theirs", POD)
    return kernel


def test_a_v2_group_is_made_where_the_controller_is_handed_down(v2):
    """Our own group hands nothing down while we are in it: the group stands beside us."""
    group = Cgroup("memory")

    assert [made.parent for made in v2.made()] == [v2.root / "user.slice"]
    group.close()
    assert not v2.made()


def test_a_v2_group_bounds_memory_and_swap(v2):
    """In bytes; without swap, or the process would be swapped out and live."""
    group = Cgroup("memory")
    group.limit_memory(1 << 20)

    [made] = v2.made()
    assert ((made / "memory.max").read_text(), (made / "memory.swap.max").read_text()) == ("1048576", "0")


@pytest.mark.parametrize(("share", "written"), [(0.25, "25000 100000"), (0.001, "1000 100000")])
def test_a_v2_group_bounds_cpu_by_quota_and_period(v2, share, written):
    """In microseconds, no quota below what the kernel takes; the waits are read from cpu.stat."""
    group = Cgroup("cpu")
    group.limit_cpu(share)

    [made] = v2.made()
    assert (made / "cpu.max").read_text() == written
    assert group.throttled() == 3


def test_a_process_of_a_v2_group_goes_back_to_where_it_was(v2):
    """Not to where the group was made: a group that hands controllers down takes no processes, and the bound would stay."""
    group = Cgroup("cpu")
    group.add(POD)
    assert v2.of(POD) == v2.made()[0]
    v2.group(str(v2.made()[0].relative_to(v2.root)), CHILD)  # begun by the pod meanwhile

    group.close()

    assert v2.of(POD) == v2.root / "system.slice/toque.service"
    assert v2.of(CHILD) == v2.root / "user.slice/session.scope"
    assert not v2.made()


def test_a_v2_group_outlives_a_process_that_is_gone(v2):
    """The kernel has taken it out already: it cannot be moved, and that is no reason to fail."""
    group = Cgroup("memory")
    group.add(POD)
    v2.end(POD)
    group.let_go(POD)

    group.close()

    assert not v2.made()


def test_a_v2_host_that_hands_no_controller_down_is_refused(tmp_path, monkeypatch):
    """Nowhere from our group up to the root: there is nothing to make a group with, and nothing is made."""
    kernel = Kernel(tmp_path, monkeypatch)
    kernel.group("user.slice/session.scope", ME)

    with pytest.raises(CgroupsAway, match="hands its cpu controller down"):
        Cgroup("cpu")
    assert not kernel.made()


def test_a_v1_group_is_made_below_our_own(v1):
    """Its bound is a file of v1; the process goes back to the group it was in."""
    group = Cgroup("memory")
    group.limit_memory(4096)
    group.add(POD)

    [made] = v1.made()
    assert made.parent == v1.root / "memory/ours"
    assert (made / "memory.limit_in_bytes").read_text() == "4096"
    assert v1.of(POD) == made
    group.close()
    assert v1.of(POD) == v1.root / "memory/theirs"
    assert not v1.made()
