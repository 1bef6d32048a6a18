"""Children of the local cluster: back-off, lines of output, ends, and death with the parent."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest

from toque._children import LINE_BYTES_MAX, Backoff, ChildProcess, LineSplitter, exit_text

SOURCE = Path(__file__).resolve().parents[2] / "src"
ENV = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"}
DEATH_S_MAX = 10.0


class RunAsync(Protocol):
    def __call__(self, coroutine: Any, *, timeout_s: float = 30.0) -> Any: ...


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for_death(pid: int) -> None:
    """Returns when the process is gone; fails after a deadline."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        readable, _, _ = select.select([descriptor], [], [], DEATH_S_MAX)
        assert readable, f"process {pid} still lives"
    finally:
        os.close(descriptor)


# -- back-off ----------------------------------------------------------------------------------------------------------

def test_back_off_doubles_up_to_its_cap() -> None:
    """A child that dies at once is started again later and later, but never later than the cap."""
    backoff = Backoff(first_s=0.2, cap_s=10.0)

    delays = [backoff.next_s(lived_s=0.0) for _ in range(8)]

    assert delays == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0])


def test_back_off_begins_anew_after_a_long_life() -> None:
    """A child that had lived well is not punished for deaths of long ago."""
    backoff = Backoff(first_s=0.2, cap_s=10.0, reset_s=30.0)
    for _ in range(5):
        backoff.next_s(lived_s=1.0)

    delays = [backoff.next_s(lived_s=30.0), backoff.next_s(lived_s=29.9)]

    assert delays == pytest.approx([0.2, 0.4])


# -- lines -------------------------------------------------------------------------------------------------------------

def test_lines_are_put_together_from_any_pieces() -> None:
    """Where the pipe cuts the output does not show; a character that was cut in two neither."""
    splitter = LineSplitter()
    data = "one\ntwø\r\nthree".encode()

    lines = [line for index in range(len(data)) for line in splitter.feed(data[index:index + 1])]

    assert lines == ["one", "twø"]
    assert splitter.rest() == ["three"]


def test_an_endless_line_is_handed_on_in_pieces() -> None:
    """Output without line ends takes bounded memory, and none of it is lost."""
    splitter = LineSplitter()
    text = "x" * (3 * LINE_BYTES_MAX + 7)

    lines = [*splitter.feed(text.encode()), *splitter.rest()]

    assert "".join(lines) == text
    assert max(map(len, lines)) == LINE_BYTES_MAX


# -- processes ---------------------------------------------------------------------------------------------------------

def test_output_is_handed_on_whole_before_the_end(run_async: RunAsync) -> None:
    """When `wait` returns, both streams of the child have been handed on to the last line."""
    lines: list[str] = []

    async def scenario() -> int:
        code = "import sys; print('out'); print('err', file=sys.stderr); sys.stdout.write('end'); sys.exit(3)"
        child = await ChildProcess.start(python(code), env=ENV, on_line=lines.append)
        return await child.wait()

    assert run_async(scenario()) == 3
    assert sorted(lines) == ["end", "err", "out"]


def test_stop_kills_what_does_not_listen(run_async: RunAsync) -> None:
    """A child that ignores SIGTERM is killed when the grace time is over."""
    ready: list[str] = []

    async def scenario() -> int:
        code = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready')\n"
                "while True: time.sleep(60)")
        child = await started(code, ready)
        return await child.stop(grace_s=0.1)

    assert run_async(scenario()) == -signal.SIGKILL


async def started(code: str, lines: list[str]) -> ChildProcess:
    """A child that has printed its first line."""
    spoken = asyncio.Event()

    def hear(line: str) -> None:
        lines.append(line)
        spoken.set()

    child = await ChildProcess.start(python(code), env=ENV, on_line=hear)
    await asyncio.wait_for(spoken.wait(), DEATH_S_MAX)
    return child


def test_what_a_child_started_dies_with_it(run_async: RunAsync) -> None:
    """A process that a callback started does not outlive a pod that is killed."""
    lines: list[str] = []

    async def scenario() -> None:
        code = ("import subprocess, sys, time\n"
                "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
                "print(other.pid); time.sleep(600)")
        child = await started(code, lines)
        child.send(signal.SIGKILL)
        await child.wait()

    run_async(scenario())

    wait_for_death(int(lines[0]))


def test_a_child_dies_with_its_parent() -> None:
    """A supervisor that is killed leaves no pods behind."""
    code = (
        "import os, subprocess, sys\n"
        "child = 'from toque._children import die_with_parent; import time; die_with_parent();'\n"
        "child += 'print(1, flush=True); time.sleep(600)'\n"
        "env = {**os.environ, 'TOQUE_PARENT_PID': str(os.getpid())}\n"
        "process = subprocess.Popen([sys.executable, '-c', child], env=env, stdout=subprocess.PIPE)\n"
        "process.stdout.readline(); print(process.pid, flush=True); process.wait()")
    with subprocess.Popen(python(code), env=ENV, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())

        parent.kill()

        wait_for_death(child_pid)


def test_a_child_of_a_dead_parent_does_not_begin() -> None:
    """A child that starts up slower than its parent dies ends at once."""
    code = "from toque._children import die_with_parent; die_with_parent(); print('began')"
    env = {**ENV, "TOQUE_PARENT_PID": "1"}

    ended = subprocess.run(python(code), env=env, capture_output=True, timeout=DEATH_S_MAX, check=False)

    assert (ended.returncode, ended.stdout) == (1, b"")


def test_exit_codes_read_well() -> None:
    """A supervisor's line names the signal that killed a child."""
    assert [exit_text(code) for code in (0, 2, -9, -15)] == [
        "exit 0", "exit 2", "signal 9 (SIGKILL)", "signal 15 (SIGTERM)"]
