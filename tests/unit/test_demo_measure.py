"""The census's work on one file gives known figures for known source."""

from __future__ import annotations

import ast
import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from toque.demo.measure import bins_of, hash_file, measure_file, report_on, resolve_imports, symbols_of

SOURCE = '''\
"""A docstring
of two lines."""

import os, sys
from json.decoder import JSONDecoder
from . import neighbour  # a comment beside code


# a comment of its own
class Cook:
    def stir(self, pots):
        for pot in pots:
            if pot and pot.hot or os.name:
                yield tuple(lid for lid in pot if lid)

    async def wait(self):
        pots = []

        def inner():
            return pots if pots else sys

        return inner
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cook.py"
    path.write_text(SOURCE)
    return path


def test_digest_is_size_and_sha256(file: Path) -> None:
    """The digest is that of the bytes on the disk."""
    digest = hash_file(str(file))

    assert (digest.size, digest.sha256) == (len(SOURCE), sha256(SOURCE.encode()).hexdigest())


def test_lines_are_counted_by_kind(file: Path) -> None:
    """A line with code and a comment counts as both, a docstring as code, a blank line as neither."""
    measures = measure_file(str(file))

    assert (measures.lines, measures.code_lines, measures.comment_lines) == (22, 15, 2)


def test_definitions_are_counted_and_branches_add_up(file: Path) -> None:
    """for, if, and, or, comprehension and its if: 7 for stir; inner's conditional counts for inner alone."""
    measures = measure_file(str(file))

    assert (measures.functions, measures.classes) == (3, 1)
    assert (measures.hardest, measures.hardest_complexity, measures.complexity) == ("stir", 7, 7 + 1 + 2)
    assert sum(measures.bins) == 3


def test_symbols_come_from_the_compiler(file: Path) -> None:
    """Every scope is counted, free names found, imports listed by top-level module."""
    symbols = symbols_of(str(file))

    assert symbols.imports == ("json", "os", "sys")
    assert (symbols.relative_imports, symbols.free_names) == (1, 1)
    assert symbols.scopes == 6  # module, class, stir, its generator (a scope in every Python), wait, inner


def test_imports_are_resolved_by_origin() -> None:
    """Python's own, installed (with the distribution), and missing modules are told apart."""
    resolution = resolve_imports(("os", "yaml", "gone"), {"yaml": ["PyYAML"]})

    assert resolution.stdlib == ("os",)
    assert (resolution.installed, resolution.distributions) == (("yaml",), ("PyYAML",))
    assert resolution.missing == ("gone",)


@pytest.mark.parametrize(("source", "reason"), [
    (b"print 'old'\n", "SyntaxError"),
    (b"# -*- coding: no-such -*-\n", "SyntaxError"),
    (b"x = '\xff'\n", "SyntaxError"),
    (b"a = 1\0\n", "Error"),
    (b"(" * 5000 + b")" * 5000, "Error"),
], ids=["python-2", "unknown-coding", "not-utf-8", "nul", "too-deep"])
def test_source_that_python_does_not_take_is_a_result(tmp_path: Path, source: bytes, reason: str) -> None:
    """A file that does not compile has a reason in its report, and its digest all the same."""
    path = tmp_path / "bad.py"
    path.write_bytes(source)

    report = report_on(str(path), {})

    assert report.digest.size == len(source)
    assert report.measures.error
    assert report.symbols.error
    assert reason in report.symbols.error or "nested too deep" in report.symbols.error


def test_an_empty_file_has_nothing_in_it(tmp_path: Path) -> None:
    """No line, no function, no error."""
    path = tmp_path / "__init__.py"
    path.touch()

    measures = measure_file(str(path))

    assert (measures.lines, measures.code_lines, measures.functions, measures.error) == (0, 0, 0, "")


def test_each_complexity_falls_into_one_bin() -> None:
    """The bins begin at 1, 2, 3, 5, 8, 13, 21 and 34."""
    assert bins_of([1, 2, 3, 4, 5, 7, 12, 20, 33, 34, 900]) == (1, 1, 2, 2, 1, 1, 1, 2)


@pytest.fixture
def switching_gc() -> Iterator[None]:
    """Let another thread in at every garbage collection, so in the middle of making a syntax tree too."""

    def switch(phase: str, info: object) -> None:
        time.sleep(0)

    gc.callbacks.append(switch)
    yield
    gc.callbacks.remove(switch)


@pytest.mark.usefixtures("switching_gc")
def test_files_may_be_measured_side_by_side_in_threads() -> None:
    """What a callback finds does not depend on which other threads are parsing at that moment."""
    paths = [str(path) for path in sorted(Path(ast.__file__).parent.glob("[ac]*.py"))[:16]]
    alone = [measure_file(path) for path in paths]

    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(measure_file, paths))

    assert together == alone
