"""Public types are a promise: a strict type check accepts what users should write and refuses what they should not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "typing"
MYPY_S_MAX = 240


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """What mypy says of the two files: message by line, by file name. Other files' errors are not asked for."""
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--hide-error-context",
               "--no-error-summary", "--no-pretty", "--no-color-output", "--config-file=",
               f"--cache-dir={tmp_path_factory.mktemp('mypy')}", "user_code.py", "wrong_uses.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=CASES, env=environment, capture_output=True, text=True, timeout=MYPY_S_MAX)
    assert done.returncode == 1, f"mypy could not check at all: {done.stdout}{done.stderr}"
    found: dict[str, dict[int, str]] = {}
    for file, line, message in re.findall(r"^(\w+\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        found.setdefault(file, {}).setdefault(int(line), message)
    return found


def marked(file: str) -> set[int]:
    return {number for number, line in enumerate((CASES / file).read_text().splitlines(), 1) if "  # E: " in line}


@pytest.mark.timeout(MYPY_S_MAX)
def test_typed_user_code_is_accepted(errors):
    """Every form of the documented interface passes a strict check, and infers what it should."""
    assert errors.get("user_code.py", {}) == {}


@pytest.mark.timeout(MYPY_S_MAX)
def test_wrong_uses_are_refused_where_they_stand(errors):
    """Every marked line has an error, and no other line has one."""
    found = errors["wrong_uses.py"]

    assert {line: found.get(line) for line in marked("wrong_uses.py") ^ set(found)} == {}
