"""The census's page is whole, well-formed, self-contained, and shows what it was told."""

from __future__ import annotations

from html.parser import HTMLParser

import msgspec
import pytest

from toque.demo.measure import Digest, FileReport, Measures, Resolution, Symbols
from toque.demo.plots import Bar, Mark, Series, bars, nice_ceiling, shortened, stacked_columns
from toque.demo.report import Facts, KillFacts, PodTimeline, VerdictRow, lines, page
from toque.demo.summary import Summary, summarise

SUMMARY = summarise([FileReport(
    "/lib/<odd & name>.py", Digest(1200, "00"),
    Measures(lines=40, code_lines=30, comment_lines=4, functions=2, classes=1, complexity=9,
             bins=(1, 0, 0, 0, 1, 0, 0, 0), hardest="stir", hardest_complexity=8),
    Symbols(imports=("os", "yaml", "gone")), Resolution(("os",), ("yaml",), ("PyYAML",), ("gone",)))])
FACTS = Facts(
    python="3.11", machine="2 cores", started="today", seconds=2.0, pods=2, slots=12, instances=1, steps=4, found=9,
    too_big=(("/lib/huge.py", 400_000),),
    timeline=(PodTimeline("pod-1", (3, 4)), PodTimeline("pod-2", (2, 0))),
    kill=KillFacts("pod-2", 77, 1.2, stations=4, cut=3, moved_s=0.5, waiting=9, first_s=0.6, p50_s=0.7, max_s=1.1),
    verdicts=(VerdictRow("C1", "nothing is lost", True, 100), VerdictRow("E1", "nothing twice", False, 100, 2)))
VOID = frozenset({"meta"})


class Page(HTMLParser):
    """Reads a page: which tags stand in it, whether they are closed in order, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    """Every tag is closed; no script, no picture, no address outside of the file."""
    parsed = Page(page(SUMMARY, FACTS))

    assert parsed.open == []
    assert parsed.references == []
    assert not {"script", "link", "img"} & set(parsed.tags)
    assert parsed.tags.count("svg") >= 3


def test_the_page_says_what_happened() -> None:
    """Kill, verdicts, files, modules and what was left out all stand in it."""
    text = Page(page(SUMMARY, FACTS)).text

    for part in ("pod-2 killed", "process 77", "nothing is lost", "✓ holds", "✗ broken", "stir", "yaml", "gone (1)",
                 "/lib/huge.py", "/lib/<odd & name>.py"):
        assert part in text


def test_a_page_of_nothing_is_still_a_page() -> None:
    """No file, no kill, no verdict: nothing divides by zero."""
    empty = msgspec.structs.replace(FACTS, timeline=(), kill=None, verdicts=(), seconds=0.0, too_big=())

    assert Page(page(Summary(), empty)).open == []


def test_the_lines_for_a_terminal_name_the_extremes() -> None:
    """The short form tells of size, imports, the longest file and the most complex function."""
    text = "\n".join(lines(SUMMARY))

    for part in ("1 files, 40 lines", "os (1)", "yaml (1)", "<odd & name>.py", "stir"):
        assert part in text


def test_columns_reach_as_high_as_their_sum() -> None:
    """Layers are stacked: the upper one ends where the axis does when the sum is the axis' end."""
    series = [Series("a", "c1", [8]), Series("b", "c2", [4])]

    svg = stacked_columns(series, ["0 s"], unit="files", marks=[Mark(0.5, "!")])

    assert 'class="c2" x="57.0" y="26.0"' in svg
    assert "b, 0 s: 4 files" in svg


def test_the_longest_bar_is_the_greatest_value() -> None:
    """Bars are to scale."""
    svg = bars([Bar("a", 10), Bar("b", 5)])

    assert "h603.0" in svg
    assert "h300.0" in svg


@pytest.mark.parametrize(("value", "ceiling"), [(0, 4), (4, 4), (5, 8), (11, 12), (58, 60), (999, 1000)])
def test_an_axis_ends_at_a_round_number(value: int, ceiling: int) -> None:
    """The axis ends where each of its four ticks is a whole, round number."""
    assert nice_ceiling(value) == ceiling


def test_long_names_lose_their_beginning() -> None:
    """The end of a path tells more than its beginning."""
    assert shortened("/usr/lib/python3/ast.py", 9) == "…3/ast.py"
