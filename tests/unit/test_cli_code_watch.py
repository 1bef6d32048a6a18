"""`toque dev --reload`: what counts as a change, and which files are watched."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from toque.cli.code_watch import CodeWatch, differences, inspect_app, marks, nearby_files
from toque.errors import AppError

CHANGE_S_MAX = 10.0
LONG_AGO_NS = 1_000_000_000


def old_file(path: Path, text: str = "x = 1\n") -> Path:
    path.write_text(text)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return path


def test_made_changed_and_removed_files_differ(tmp_path: Path) -> None:
    """Every way in which code can change is a difference; an untouched file is none."""
    same, changed, removed, made = (tmp_path / name for name in ("same", "changed", "removed", "made"))
    for path in (same, changed, removed):
        old_file(path)
    before = marks([same, changed, removed, made])
    changed.write_text("x = 2\n")
    removed.unlink()
    made.touch()

    assert differences(before, marks(before)) == [changed, made, removed]


def test_a_change_is_told(tmp_path: Path) -> None:
    """Saving a watched file wakes the supervisor, with the file's name."""
    path = old_file(tmp_path / "app.py")
    watch = CodeWatch()
    watch.watch([path], read_ns=time.time_ns())

    async def scenario() -> list[Path]:
        changing = asyncio.ensure_future(watch.changed())
        path.write_text("x = 2\n")
        return await asyncio.wait_for(changing, CHANGE_S_MAX)

    assert asyncio.run(scenario()) == [path]


def test_a_change_while_the_code_is_read_is_not_missed(tmp_path: Path) -> None:
    """A file saved again while its first change was being loaded counts as changed."""
    path = tmp_path / "app.py"
    read_ns = time.time_ns()
    path.write_text("x = 2\n")
    os.utime(path, ns=(read_ns, read_ns))
    watch = CodeWatch()

    watch.watch([path], read_ns=read_ns)

    assert asyncio.run(asyncio.wait_for(watch.changed(), CHANGE_S_MAX)) == [path]


def test_a_file_from_the_future_is_not_changed_for_ever(tmp_path: Path) -> None:
    """A clock that was set back does not make the pods restart without end."""
    path = tmp_path / "app.py"
    path.touch()
    tomorrow_ns = time.time_ns() + 86_400_000_000_000
    os.utime(path, ns=(tomorrow_ns, tomorrow_ns))
    watch = CodeWatch()

    watch.watch([path], read_ns=time.time_ns())

    assert differences(watch.marks, marks([path])) == []


def test_an_app_is_looked_into_without_running_it_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workflows and files are found; what it prints, and its import, stay in another process."""
    monkeypatch.chdir(tmp_path)
    app = tmp_path / "kitchen_app.py"
    app.write_text("import sys\nfrom toque import Workflow\nprint('noise')\nsys.kitchen = True\n"
                   "class Soup(Workflow, name='soup', version='7'):\n"
                   "    async def run(self, event, step): return 1\n")

    report = asyncio.run(inspect_app(str(app)))

    assert (report.workflows, report.files) == ({"soup": "7"}, [str(app)])
    assert not hasattr(sys, "kitchen")


def test_an_app_that_does_not_import_says_why(tmp_path: Path) -> None:
    """The error is that of the import, with its place."""
    app = tmp_path / "broken_app.py"
    app.write_text("x = 1\n1 / 0\n")

    with pytest.raises(AppError, match=r"ZeroDivisionError(.|\n)*broken_app\.py:2"):
        asyncio.run(inspect_app(str(app)))


def test_the_files_around_a_broken_app_are_watched(tmp_path: Path) -> None:
    """Mending any of the app's files is noticed, though it could not say which are its own."""
    app = old_file(tmp_path / "app.py")
    (tmp_path / "parts").mkdir()
    part = old_file(tmp_path / "parts" / "soup.py")
    (tmp_path / ".venv").mkdir()
    old_file(tmp_path / ".venv" / "other.py")

    assert sorted(nearby_files(str(app))) == [app, part]
