"""Fixtures of the acceptance tests: real processes, a real server, a ledger that the callbacks report to.

With TOQUE_FULL=1 they run at full length: tests marked `slow`, and the long form of those that have a short one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance.stack import FULL, Stack

from toque.chaos.ledger import Ledger

LOG_LINES_SHOWN = 400


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") is not None and not FULL:
            item.add_marker(pytest.mark.skip(reason="takes long: TOQUE_FULL=1 runs it"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Put the last lines of the pods beside the failure of a test."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]  # what pluggy sends
    stack = getattr(item, "funcargs", {}).get("stack")
    if report.when == "call" and report.failed and isinstance(stack, Stack):
        log = stack.directory / "pods.log"
        shown = log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        report.sections.append((f"what the processes said ({log})", "\n".join(shown)))


@pytest.fixture
def stack(nats_binary: None, tmp_path: Path) -> Iterator[Stack]:
    """A directory and a running ledger; the test starts the rest."""
    with Ledger.start(tmp_path / "ledger.jsonl") as ledger:
        stack = Stack(tmp_path, ledger)
        yield stack
        stack.close()
