"""Sums of a census."""

from __future__ import annotations

import random

from toque.demo.measure import Digest, FileReport, Measures, Resolution, Symbols, bins_of
from toque.demo.summary import TOP, Summary, merge, summarise


def report(number: int) -> FileReport:
    complexities = [1, number % 40 + 1]
    return FileReport(
        f"/lib/module_{number:03}.py", Digest(number * 100, "00"),
        Measures(lines=number, code_lines=number // 2, functions=2, complexity=sum(complexities),
                 bins=bins_of(complexities), hardest=f"f{number}", hardest_complexity=complexities[1]),
        Symbols(names=3, imports=("os",), relative_imports=number % 2),
        Resolution(stdlib=("os",), installed=("yaml",) if number % 5 == 0 else (), missing=("gone",)))


REPORTS = [report(number) for number in range(100)]


def test_numbers_and_counts_add_up() -> None:
    """The sum counts every file, line, function and import once."""
    summary = summarise(REPORTS)

    assert (summary.files, summary.lines, summary.functions, sum(summary.bins)) == (100, sum(range(100)), 200, 200)
    assert (summary.stdlib, summary.installed, summary.missing) == ({"os": 100}, {"yaml": 20}, {"gone": 100})
    assert summary.relative_imports == 50


def test_the_sum_does_not_depend_on_batches_or_order() -> None:
    """Batches of any size in any order give the same sum: the report may gather as it likes."""
    shuffled = random.Random(1).sample(REPORTS, len(REPORTS))

    in_batches = merge([summarise(shuffled[:7]), merge([summarise(shuffled[7:50]), summarise(shuffled[50:])])])

    assert in_batches == summarise(REPORTS)


def test_extremes_are_kept() -> None:
    """The longest files and the most complex functions come first, and no more than are shown."""
    summary = summarise(REPORTS)

    assert [row.lines for row in summary.biggest] == [99 - place for place in range(TOP)]
    assert [row.hardest_complexity for row in summary.hardest[:3]] == [40, 40, 39]


def test_unreadable_files_are_named() -> None:
    """A file that Python does not take is counted and named with its reason."""
    measures = Measures(lines=1, error="SyntaxError: no")
    bad = FileReport("/lib/bad.py", Digest(5, "00"), measures, Symbols(), Resolution())

    summary = summarise([bad, *REPORTS])

    assert (summary.error_count, summary.errors) == (1, (("/lib/bad.py", "SyntaxError: no"),))


def test_nothing_sums_up_to_nothing() -> None:
    """A census of no file is the empty summary."""
    assert merge([]) == Summary()
