"""docs/compatibility.md: each "same" or "better" is backed by a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs" / "compatibility.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| there")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}"[:60])
def test_a_verdict_is_backed(row: list[str]) -> None:
    """By a test function of that name in a file of that name; "not" and "not yet" need none."""
    assert len(row) == 4
    _, _, verdict, test = row
    assert re.match(r"(same|better|not yet|not)\b", verdict)
    if verdict.startswith("not"):
        assert not test
        return
    file, _, name = test.strip("`").partition("::")
    found = [path for path in (ROOT / "tests").rglob(file) if f"def {name}(" in path.read_text()]
    assert len(found) == 1, f"no test {test}"
