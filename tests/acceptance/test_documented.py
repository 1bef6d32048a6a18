"""What README and docs show is typed and run here: console examples as they stand, and every example file.

In a console example `…` stands for whatever differs from one time to the next, and alone on a line for any lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from acceptance.stack import Terminal, environment

from toque import SyncClient

pytestmark = [pytest.mark.usefixtures("nats_binary"), pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]
START_S_MAX = 60.0
END_S_MAX = 40.0
COMMAND_S_MAX = 60.0
POLL_S = 0.02
ELLIPSIS = "…"


class Typed(NamedTuple):
    """A command of a console example, and what it is shown to print."""

    command: str
    shown: str


def console(page: str) -> list[Typed]:
    """Everything that is typed in a page, in order."""
    found: list[Typed] = []
    for block in re.findall(r"^```console\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            found.append(Typed(command, shown))
    return found


def pattern(shown: str) -> re.Pattern[str]:
    """What is shown, as an expression that the output must match."""
    lines = [re.escape(line) for line in squeezed(shown).splitlines()]
    any_lines = [r"(?:[^\n]*\n)*?" if line == ELLIPSIS else line.replace(ELLIPSIS, r"[^\n]*") + "\n" for line in lines]
    return re.compile("".join(any_lines))


def squeezed(output: str) -> str:
    """Without the widths of columns, which depend on what stands in them."""
    return "".join(" ".join(line.split()) + "\n" for line in output.strip().splitlines())


def until(condition: Callable[[], object], what: str, within_s: float) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {within_s:g} s in vain until {what}"
        time.sleep(POLL_S)


class Newcomer:
    """A user's directory with the examples in it, and a shell that finds `toque` and `python`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("examples", "docs"):
            (directory / name).symlink_to(ROOT / name)
        commands = directory / "bin"
        commands.mkdir()
        for name, module in (("toque", "-m toque "), ("python", "")):
            (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
            (commands / name).chmod(0o755)
        self._path = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}

    def type(self, command: str) -> str:
        """Run a command line to its end; both outputs, in the order of a terminal."""
        done = subprocess.run(command, shell=True, cwd=self.directory, env=environment(self._path), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=COMMAND_S_MAX, check=False)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    @contextmanager
    def dev(self, app: str) -> Iterator[Terminal]:
        """`toque dev APP` in a terminal of its own, until it serves; at the end Ctrl-C, and exit code 0."""
        with chdir(self.directory):
            terminal = Terminal(["dev", app], env={}, log=self.directory / "dev.log")
        try:
            until(lambda: "Ctrl-C ends all" in terminal.text or terminal.process.poll() is not None, f"{app} serves",
                  START_S_MAX)
            assert terminal.process.poll() is None, terminal.text
            yield terminal
            terminal.ctrl_c()
            until(lambda: terminal.process.poll() is not None, "`toque dev` has ended", END_S_MAX)
            assert terminal.process.returncode == 0, terminal.text
        finally:
            terminal.close()


@contextmanager
def chdir(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def newcomer(tmp_path: Path) -> Newcomer:
    return Newcomer(tmp_path)


def test_the_console_examples_of_the_readme_print_what_they_show(newcomer: Newcomer) -> None:
    """From `toque dev` to the description of an instance, typed in their order."""
    first, *others = console("README.md")
    assert first.command.startswith("toque dev ")

    with newcomer.dev(first.command.removeprefix("toque dev ")) as terminal:
        until(lambda: pattern(first.shown).search(squeezed(terminal.text)), "`toque dev` has said all", COMMAND_S_MAX)
        for typed in others:
            output = squeezed(newcomer.type(typed.command))
            assert pattern(typed.shown).fullmatch(output), f"{typed.command} printed\n{output}"
    assert others


def test_no_other_page_has_console_examples_that_nobody_types() -> None:
    """A page with console examples needs a test above."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]

    assert [page.name for page in pages if console(str(page.relative_to(ROOT)))] == ["README.md"]


def test_the_blocking_example_runs(newcomer: Newcomer) -> None:
    """Django-style views beside hello.py: created, shown, and sent twice but run once."""
    with newcomer.dev("examples/hello.py"):
        lines = newcomer.type("python examples/create_from_django_style.py Ada").splitlines()

    assert lines == ["202 greeting-Ada", "200 {'greeting': 'Hello, Ada!'}", "202 sent twice, run once"]


def test_the_orders_example_runs(newcomer: Newcomer) -> None:
    """One order ships after a payment that is tried again; one is refused by the bank."""
    with newcomer.dev("examples/orders.py"):
        shipped, refused = newcomer.type("python examples/orders.py").splitlines()

    assert re.fullmatch(r"shipped: payment-\w+, parcel-\w+", shipped)
    assert refused.startswith("refused: ") and "the bank refuses this card" in refused


def test_the_refund_example_runs(newcomer: Newcomer) -> None:
    """One is approved, one rejected before anybody asks, and for one no receipt comes in time."""
    with newcomer.dev("examples/refund.py"):
        lines = newcomer.type("python examples/refund.py").splitlines()

    assert lines == ["Ada: 12.50 paid back, approved by Mo", "Bob: rejected by Mo (too much)", "Eve: no receipt"]


def test_the_newsletter_example_runs(newcomer: Newcomer) -> None:
    """Paused and resumed, sent again from its last step, deleted, and deleted by its retention."""
    with newcomer.dev("examples/newsletter.py"):
        lines = newcomer.type("python examples/newsletter.py").splitlines()

    assert lines == [
        "paused; its sleep stands still",
        "newsletter/cats has ended already (instance 'cats' of 'newsletter' is complete, so it cannot be paused)",
        "the draft is the same: True", "it was sent anew: True", "there is no instance newsletter/cats",
        "0 cats deleted", "1 never-created 10400", "2 cats deleted", "kept for a second, and deleted"]


def test_the_watching_example_runs(newcomer: Newcomer) -> None:
    """Every attempt of a step that fails twice is told, then what lies behind a cursor, then the ends of three."""
    with newcomer.dev("docs/examples/guide.py"):
        lines = newcomer.type("python docs/examples/watching.py").splitlines()

    told = [line.split()[0] for line in lines[:-5]]
    assert told[:2] == ["workflow_queued", "workflow_started"] and told[-1] == "workflow_completed"
    assert told.count("attempt_errored") == 2 and told.count("step_started") == 1
    assert lines[-5:] == ["behind it: step_completed page in attempt 1", "behind it: workflow_completed page in attempt 1",
                          "3 have ended", "reported: {'page': 5, 'of': 5}", "['workflow_started', 'workflow_completed']"]


def test_the_examples_of_the_guides_run(newcomer: Newcomer) -> None:
    """Every workflow of docs/examples/guide.py gives what the guide says; docs/examples/clients.py runs beside it."""
    with newcomer.dev("docs/examples/guide.py") as terminal:
        url = re.search(r"nats://[\d.:]+", terminal.text)
        assert url is not None
        with SyncClient(url[0]) as client:
            def result(workflow: str, params: object) -> object:
                return client.create(workflow, params).result("30 seconds")

            assert result("thumbnails", {"url": "https://example.org/cat.png", "widths": [64, 256]}) == [
                "27 bytes at 64 px", "27 bytes at 256 px"]
            assert result("charge", 500) == "500 cents"
            assert result("fetch", "page") == "page in attempt 1"
            assert result("fetch", "flaky") == "flaky in attempt 3"
            assert result("fetch", "missing") == "gave up after 1"
            assert result("fetch", "down") == "gave up after 4"
            assert result("remind", "tea") == ["tea (1)", "tea (2)"]
            assert result("compare", "pan") == {"north": "9 bytes at 10 px", "south": "9 bytes at 10 px"}
            assert result("count", 20) == 20
            draws = result("lottery", 3)
            assert isinstance(draws, list) and len(draws) == 3 and all(1 <= draw < 50 for draw in draws)
        lines = newcomer.type("python docs/examples/clients.py").splitlines()

    assert lines[:3] == ["['27 bytes at 64 px', '27 bytes at 256 px']",
                         "complete ['27 bytes at 64 px', '27 bytes at 256 px']", "page in attempt 1"]
    assert "this order was created before" in lines
    assert "2000 created" in lines
    assert "not ended yet; it goes on" in lines
    assert "somebody terminated it" in lines
    assert "reminder-7 terminated" in lines
    assert lines[-1] == "page in attempt 1"
