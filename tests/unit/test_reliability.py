"""docs/reliability.md names tests and checkers: all of them are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
RULES_BUILT = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 26, 27}


def functions(*folders: str) -> set[str]:
    """The names of all functions in the modules below the folders."""
    modules = [ast.parse(path.read_text()) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {node.name for module in modules for node in ast.walk(module)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def named(prefix: str) -> list[str]:
    return sorted(set(re.findall(rf"`({prefix}\w+)`", PAGE)))


def test_every_test_that_the_page_names_is_there() -> None:
    """A promise whose test is gone, or has another name, is not shown any more."""
    assert len(named("test_")) > 150
    assert not set(named("test_")) - functions("tests")


def test_every_checker_that_the_page_names_is_there() -> None:
    """In the simulator or in the scenarios."""
    assert not set(named("check_")) - functions("chaos", "src/toque/sim")


@pytest.mark.parametrize("rule", sorted(RULES_BUILT))
def test_a_rule_that_is_built_has_a_test(rule: int) -> None:
    """Named on the page."""
    assert re.search(rf"^\| {rule} \|.*`test_", PAGE, re.MULTILINE)
