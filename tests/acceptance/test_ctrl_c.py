"""Ctrl-C of `toque dev` in the middle of the work, and the start after it: nothing is lost, nothing done is repeated."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance.load import Load
from acceptance.stack import APPS, WORK, RunAsync, Stack, Terminal, children_of, eventually, is_alive

from toque.client import Client

pytestmark = pytest.mark.timeout(120)

AT_ONCE_S = 5.0
SERVES = "Ctrl-C ends all in order"


@pytest.fixture
def terminals(stack: Stack) -> Iterator[list[Terminal]]:
    """Terminals that are closed when the test ends."""
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()
        stack.hear("dev", terminal.text)


async def started(terminals: list[Terminal], stack: Stack, app: str) -> tuple[Terminal, str, list[int]]:
    """`toque dev` in a new terminal, once it serves: the terminal, the server's address, its children."""
    log = stack.directory / f"dev-{len(terminals)}.log"
    terminal = Terminal(["dev", app, "--dir", str(stack.dev)], env=stack.ledger.environment, log=log)
    terminals.append(terminal)
    await eventually(lambda: SERVES in terminal.text or terminal.process.poll() is not None)
    assert SERVES in terminal.text, terminal.text
    return terminal, json.loads(state_of(stack))["url"], children_of(terminal.process.pid)


def state_of(stack: Stack) -> str:
    return (stack.dev / "dev.json").read_text()


def test_ctrl_c_and_a_start_again_go_on(stack: Stack, terminals: list[Terminal], run_async: RunAsync) -> None:
    """300 instances, Ctrl-C in their middle, `toque dev` again: all complete, and each step was done exactly once."""

    async def scenario() -> None:
        load = Load(stack, callback_ms=50)
        terminal, url, children = await started(terminals, stack, WORK)
        async with Client.connect(url) as client:
            await load.create(client, 300, limit=20)
            await load.until_left(400)

        terminal.ctrl_c()

        assert await terminal.exit_code() == 0, terminal.text
        assert not any(map(is_alive, children)) and len(children) == 3
        assert len(stack.ledgered().visits) < 1500, "everything was done before the Ctrl-C"
        _, again, _ = await started(terminals, stack, WORK)
        async with Client.connect(again) as client:
            await load.results(client)
        assert again == url
        load.assert_nothing_lost()
        load.assert_each_step_once()

    run_async(scenario(), timeout_s=110)


def test_a_second_ctrl_c_ends_at_once(stack: Stack, terminals: list[Terminal], tmp_path: Path, run_async: RunAsync) -> None:
    """It does not wait for a callback that goes on and on: that one is cut, and done again by the next start."""
    gate = tmp_path / "gate"

    async def scenario() -> None:
        terminal, url, children = await started(terminals, stack, str(APPS / "kitchen.py"))
        async with Client.connect(url) as client:
            handle = await client.create("gated", str(gate))
            await eventually(lambda: any(visit.step == "gate" for visit in stack.ledgered().visits))

        terminal.ctrl_c()
        await eventually(lambda: "ending: the pods hand over" in terminal.text)
        assert terminal.process.poll() is None, "the first Ctrl-C did not wait for the callback"
        terminal.ctrl_c()

        assert await terminal.exit_code(AT_ONCE_S) == 130
        assert not any(map(is_alive, children))
        gate.touch()
        _, url, _ = await started(terminals, stack, str(APPS / "kitchen.py"))
        async with Client.connect(url) as client:
            assert await client.handle("gated", handle.id).result("20 seconds") == "attempt 2"
        assert [visit.step for visit in stack.ledgered().visits] == ["first", "gate", "gate"]

    run_async(scenario(), timeout_s=110)


def test_only_this_terminals_processes_are_touched() -> None:
    """The helper that counts processes sees a child, and sees that it is gone."""
    child = subprocess.Popen(["sleep", "60"])
    assert is_alive(child.pid)

    child.kill()
    child.wait()

    assert not is_alive(child.pid)
