"""The pages say what is so: examples are files that run, links lead somewhere, messages and log lines are the code's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EXAMPLES = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "docs" / "examples").glob("*.py")])
SOURCES = [ROOT / "src" / "toque", ROOT / "workers", ROOT / "storage", ROOT / "chaos"]
LANGUAGES = {
    "python": "quoted from a file of examples/ or docs/examples/, which the acceptance tests run",
    "console": "typed and answered as it stands: the acceptance tests type it again",
    "sh": "installs, starts or needs something that tests cannot: tried by hand",
    "json": "compared with its type",
    "text": "a drawing, or part of a configuration",
}
FRAGMENT_MIN = 12  # characters of a message that say enough to look for them


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language == language]


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2])


def headings(page: Path) -> set[str]:
    """The anchors of a page, as forges make them."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL),
                       re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def links(page: Path) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists() or not target.is_relative_to(ROOT):
        return False
    return not anchor or anchor in headings(target)


# -- examples ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_has_a_language_that_says_how_it_is_checked(page: Path) -> None:
    """Nothing is shown that nobody looks at."""
    assert {block.language for block in blocks_of(page)} <= LANGUAGES.keys()


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_a_python_example_is_quoted_from_a_file_that_runs(block: Block) -> None:
    """Line by line as it stands there."""
    assert any(block.text in f"{example.read_text()}\n" for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_how_to_run_it(example: Path) -> None:
    """Each opens with what it shows and the commands to try it."""
    docstring = ast.get_docstring(ast.parse(example.read_text())) or ""

    assert "toque dev " in docstring
    for path in re.findall(r"(?:docs/)?examples/\w+\.py", docstring):
        assert (ROOT / path).is_file()


# -- links -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Relative ones to a file of the repository, and to a heading in it if they name one."""
    inside = [link for link in links(page) if not link.startswith(("http://", "https://"))]

    assert [link for link in inside if not leads_somewhere(page, link)] == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    """A page that nobody links to is not read."""
    reached = {ROOT / "README.md"}
    new = set(reached)
    while new:
        page = new.pop()
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            found = sorted(target.glob("*.md")) if target.is_dir() else [target] if target.suffix == ".md" else []
            new |= {path for path in found if path.exists()} - reached
            reached |= set(found)

    assert {str(page.relative_to(ROOT)) for page in set(PAGES) - reached} == set()


# -- messages and log lines --------------------------------------------------------------------------------------------

@cache
def texts() -> tuple[str, ...]:
    """Every text in the code, with "…" for what is filled in."""
    found: list[str] = []
    for folder in SOURCES:
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…"
                                         for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


def first_cells(heading: str) -> list[str]:
    """The texts in backquotes of the first column, below a line of operations.md."""
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page.split(heading)[1].split("\n\n")[1]
    return [text for line in table.splitlines()[2:] for text in re.findall(r"`([^`]+)`", line.split(" | ")[0])]


@pytest.mark.parametrize("message", first_cells("## What an error means"))
def test_an_explained_message_is_one_that_toque_says(message: str) -> None:
    """The fixed parts of it stand in the code, in one text."""
    fragments = [part.strip() for part in message.split("…") if part.strip()]

    assert sum(map(len, fragments)) >= FRAGMENT_MIN
    assert any(all(fragment in text for fragment in fragments) for text in texts())


def logged(level: str) -> set[str]:
    found: set[str] = set()
    for folder in SOURCES:
        for file in folder.rglob("*.py"):
            found.update(re.findall(rf'_log\.{level}\(\s*"([^"]+)"', file.read_text()))
    return found


def test_every_error_in_the_log_is_explained() -> None:
    """Whoever reads an error line finds in operations.md what to do about it."""
    assert logged("error") - set(first_cells("And in the logs of pods:")) == set()


def test_every_explained_log_line_is_one_that_toque_writes() -> None:
    """No line is explained that does not exist any more."""
    written = logged("error") | logged("warning") | logged("info")

    assert set(first_cells("And in the logs of pods:")) - written == set()
