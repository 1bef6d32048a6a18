"""Chooses the files of the census: a spread over all Python source of this machine, worth the time that is wanted.

Which files come first is fixed by their paths; how many are taken follows from what a sample costs on this machine.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from toque.demo.measure import FILE_BYTES_MAX, report_on

SAMPLE_FILES = 40
SAMPLE_S_MAX = 2.0
FILES_MAX = 20_000
FILES_MIN = 20
ENGINE_S_PER_FILE = 0.004  # what an instance of four steps costs the pods beside its callbacks
BYTES_PER_FILE_FLOOR = 2_000  # a file's cost does not sink below that of so many bytes

_NOT_SOURCE = frozenset({"__pycache__", ".git", "node_modules"})
_PACKAGES = frozenset({"site-packages", "dist-packages"})


@dataclass(frozen=True)
class SourceFile:
    """A file that could be taken."""

    path: str
    size: int

    @property
    def work(self) -> int:
        """In bytes, as far as its cost goes."""
        return max(self.size, BYTES_PER_FILE_FLOOR)


@dataclass(frozen=True)
class Choice:
    """What the census is about."""

    files: list[SourceFile]
    too_big: list[SourceFile]  # left out: beyond FILE_BYTES_MAX
    found: int  # files seen on this machine, those left out included
    s_per_mb: float  # what the sample cost
    expected_s: float  # how long the work should last

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


def choose(*, seconds: float, cores: float, roots: Iterable[Path] | None = None,
           clock: Callable[[], float] = time.thread_time) -> Choice:
    """Files whose work should last `seconds` on so many cores of a machine that has nothing else to do.

    The sample takes up to SAMPLE_S_MAX of CPU time, and what it costs is CPU time too: others' work does not count.
    """
    every = sorted(set(source_files(python_roots() if roots is None else roots)), key=lambda file: _place(file.path))
    fit = [file for file in every if file.size <= FILE_BYTES_MAX]
    s_per_byte = _cost_of_sample(fit[:SAMPLE_FILES], clock)
    budget_s = seconds * cores
    taken: list[SourceFile] = []
    cost_s = 0.0
    for file in fit[:FILES_MAX]:
        if cost_s >= budget_s and len(taken) >= FILES_MIN:
            break
        taken.append(file)
        cost_s += file.work * s_per_byte + ENGINE_S_PER_FILE
    too_big = [file for file in every if file.size > FILE_BYTES_MAX]
    return Choice(taken, too_big, len(every), s_per_byte * 1e6, cost_s / cores)


def python_roots() -> list[Path]:
    """Where Python source lies here: the standard library, what is installed, what the system's own Python has."""
    named = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    named += [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
    system = sorted(Path("/usr/lib").glob("python3*"))
    return [path for path in dict.fromkeys([*map(Path, named), *system]) if path.is_dir()]


def source_files(roots: Iterable[Path]) -> Iterator[SourceFile]:
    """Every regular, readable .py file below the roots, once; `site-packages` only where it is a root of its own."""
    seen: set[str] = set()
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - _NOT_SOURCE - _PACKAGES)
            for name in sorted(names):
                path = os.path.realpath(os.path.join(folder, name))
                if name.endswith(".py") and path not in seen:
                    seen.add(path)
                    yield from _if_readable(path)


def _if_readable(path: str) -> Iterator[SourceFile]:
    is_text = path.isprintable()  # a name that is no text cannot be a param
    if is_text and os.path.isfile(path) and os.access(path, os.R_OK):
        yield SourceFile(path, os.stat(path).st_size)


def _place(path: str) -> bytes:
    """Spreads the files evenly, the same way each time."""
    return blake2b(path.encode(), digest_size=16).digest()


def _cost_of_sample(sample: list[SourceFile], clock: Callable[[], float]) -> float:
    """Seconds of one core per byte."""
    begun = clock()
    work = 0
    for file in sample:
        report_on(file.path, {})
        work += file.work
        if clock() - begun > SAMPLE_S_MAX:
            break
    return (clock() - begun) / max(work, 1)
