"""An APP that cannot be served: one error that names the place and what to do, exit code 2, nothing started."""

from __future__ import annotations

from pathlib import Path

import pytest
from acceptance.stack import toque

pytestmark = [pytest.mark.usefixtures("nats_binary"), pytest.mark.timeout(60)]

NOBODY = "nats://127.0.0.1:1"  # the app is looked at first
APPS = {
    "flows": "from toque import Workflow\nclass Plain: pass\n"
             "class Soup(Workflow):\n    async def run(self, event, step): return 1\n",
    "broken": "import json\nimport nosuch_package\n",
    "torn": "def half(:\n",
    "empty": "x = 1\n",
    "twice": "from toque import Workflow\n"
             "class A(Workflow, name='same'):\n    async def run(self, event, step): return 1\n"
             "class B(Workflow, name='same'):\n    async def run(self, event, step): return 1\n",
}
SERVED_NOT = [
    ("nosuch", "no module 'nosuch': looked for nosuch.py and nosuch/__init__.py in the working directory {folder}"),
    ("nosuch.py", "no file nosuch.py (looked for {folder}/nosuch.py"),
    ("torn", "importing torn raised SyntaxError: invalid syntax"),
    ("empty.py", "no workflow found in empty.py: {folder}/empty.py defines no subclass of toque.Workflow"),
    ("flows:Nope", "{folder}/flows.py has no 'Nope'; workflows there: Soup"),
    ("flows:Plain", "'Plain' in {folder}/flows.py is the class, not a subclass of toque.Workflow; workflows there: Soup"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in APPS.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


@pytest.mark.parametrize(("app", "message"), SERVED_NOT, ids=[app for app, _ in SERVED_NOT])
def test_a_worker_says_what_is_wrong_with_its_app(folder: Path, app: str, message: str) -> None:
    """One error on stderr, before any connection is made; the line of the app's own code where there is one."""
    done = toque("worker", app, "--nats", NOBODY, cwd=folder)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("toque: " + message.format(folder=folder))
    assert not (folder / "toque-data").exists()


def test_the_line_that_failed_is_shown(folder: Path) -> None:
    """File, line and code of the app, not of the machinery that imports it."""
    done = toque("worker", "broken.py", "--nats", NOBODY, cwd=folder)

    assert done.stderr == ("toque: importing broken raised ModuleNotFoundError: No module named 'nosuch_package'\n"
                           f"  {folder / 'broken.py'}:2: import nosuch_package\n")


def test_two_workflows_of_one_name_are_both_named(folder: Path) -> None:
    """Which of them a creation means could not be said."""
    done = toque("worker", "twice.py", "--nats", NOBODY, cwd=folder)

    assert done.returncode == 2
    assert "'same'" in done.stderr and "A" in done.stderr and "B" in done.stderr


def test_toque_dev_starts_nothing_for_such_an_app(folder: Path) -> None:
    """The same error and exit code, and no directory is made."""
    done = toque("dev", "broken.py", cwd=folder)

    assert done.returncode == 2
    assert "importing broken raised ModuleNotFoundError: No module named 'nosuch_package'" in done.stderr
    assert not (folder / ".toque").exists()
