"""Sums of a census: made from file reports, and merged from each other, in any order to the same sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from toque.demo.measure import COMPLEXITY_BINS, FileReport

TOP = 12  # rows kept of each list of extremes
MODULES_MAX = 5_000
ERRORS_MAX = 40


class FileRow(msgspec.Struct, frozen=True):
    """A file in a list of extremes."""

    path: str
    lines: int
    size: int
    complexity: int
    hardest: str = ""
    hardest_complexity: int = 0


class Summary(msgspec.Struct, frozen=True):
    """A census in numbers."""

    files: int = 0
    bytes: int = 0
    lines: int = 0
    code_lines: int = 0
    comment_lines: int = 0
    functions: int = 0
    classes: int = 0
    complexity: int = 0
    names: int = 0
    relative_imports: int = 0
    bins: tuple[int, ...] = (0,) * len(COMPLEXITY_BINS)
    stdlib: dict[str, int] = {}  # module → files that import it
    installed: dict[str, int] = {}
    missing: dict[str, int] = {}
    distributions: dict[str, int] = {}
    biggest: tuple[FileRow, ...] = ()
    hardest: tuple[FileRow, ...] = ()
    errors: tuple[tuple[str, str], ...] = ()  # (path, reason) of files that Python does not take
    error_count: int = 0


_ADDED = ("files", "bytes", "lines", "code_lines", "comment_lines", "functions", "classes", "complexity", "names",
          "relative_imports", "error_count")
_COUNTED = ("stdlib", "installed", "missing", "distributions")


def summarise(reports: Iterable[FileReport]) -> Summary:
    """The sum of these reports."""
    return merge([_of_one(report) for report in reports])


def merge(parts: Sequence[Summary]) -> Summary:
    """The sum of sums. Lists keep their longest entries, ties are broken by name: the order of the parts is nothing."""
    sums: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _ADDED}
    sums |= {name: _added_up(getattr(part, name) for part in parts) for name in _COUNTED}
    bins = tuple(map(sum, zip(Summary().bins, *(part.bins for part in parts), strict=True)))
    biggest = _top((row for part in parts for row in part.biggest), _by_lines)
    hardest = _top((row for part in parts for row in part.hardest), _by_hardness)
    errors = tuple(sorted(error for part in parts for error in part.errors)[:ERRORS_MAX])
    return Summary(**sums, bins=bins, biggest=biggest, hardest=hardest, errors=errors)


def _of_one(report: FileReport) -> Summary:
    measures, symbols, resolution = report.measures, report.symbols, report.resolution
    row = FileRow(report.path, measures.lines, report.digest.size, measures.complexity, measures.hardest,
                  measures.hardest_complexity)
    error = measures.error or symbols.error
    return Summary(
        files=1, bytes=report.digest.size, lines=measures.lines, code_lines=measures.code_lines,
        comment_lines=measures.comment_lines, functions=measures.functions, classes=measures.classes,
        complexity=measures.complexity, names=symbols.names, relative_imports=symbols.relative_imports,
        bins=measures.bins or Summary().bins, stdlib=dict.fromkeys(resolution.stdlib, 1),
        installed=dict.fromkeys(resolution.installed, 1), missing=dict.fromkeys(resolution.missing, 1),
        distributions=dict.fromkeys(resolution.distributions, 1), biggest=(row,),
        hardest=(row,) if measures.hardest else (), errors=((report.path, error),) if error else (),
        error_count=int(bool(error)))


def _added_up(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0]))[:MODULES_MAX])


def _top(rows: Iterable[FileRow], key: Callable[[FileRow], tuple[int, str]]) -> tuple[FileRow, ...]:
    return tuple(sorted(rows, key=key)[:TOP])


def _by_lines(row: FileRow) -> tuple[int, str]:
    return -row.lines, row.path


def _by_hardness(row: FileRow) -> tuple[int, str]:
    return -row.hardest_complexity, row.path
