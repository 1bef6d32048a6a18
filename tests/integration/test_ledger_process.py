"""The ledger as a process: what it acknowledges is in its file, whatever becomes of the reporter."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from toque.chaos.ledger import (
    GONE,
    MARK,
    AsyncLedgerClient,
    Entry,
    Ledger,
    LedgerAway,
    LedgerClient,
    LedgerReader,
    read_ledger,
)
from toque.chaos.ledger_checks import check_ledger
from toque.chaos.pairing import CUT, pair

GONE_WITHIN_S = 10.0
CALLBACK_THAT_DIES = """
import os, signal
from toque.chaos.ledger import LedgerClient
class Context:
    workflow_name, instance_id, name, attempt, idempotency_key = "census", "a", "hash", 1, "key"
with LedgerClient(pod="doomed").inside(Context()):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@dataclass(frozen=True)
class Context:
    """A callback's context, as far as the ledger wants to know it."""

    instance_id: str
    name: str = "hash"
    attempt: int = 1
    workflow_name: str = "census"
    idempotency_key: str = "key"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.start(tmp_path / "ledger.jsonl") as ledger:
        yield ledger


def wait_for(reader: LedgerReader, kind: str) -> list[Entry]:
    """Read until an entry of this kind is there."""
    entries: list[Entry] = []
    deadline = time.monotonic() + GONE_WITHIN_S
    while not any(entry.kind == kind for entry in entries):
        assert time.monotonic() < deadline, f"no {kind} within {GONE_WITHIN_S} s"
        entries += reader.read_new()
    return entries


def test_an_entry_is_in_the_file_when_the_call_returns(ledger: Ledger) -> None:
    """Acknowledged means written: nothing needs to be flushed or closed."""
    client = LedgerClient(ledger.socket, pod="pod-1")

    with client.inside(Context("a")):
        entered = read_ledger(ledger.file)
    left = read_ledger(ledger.file)

    assert [(e.kind, e.instance, e.pod, e.pid) for e in entered[1:]] == [("enter", "a", "pod-1", os.getpid())]
    assert [(e.kind, e.note) for e in left[2:]] == [("exit", "ok")]


def test_an_exit_names_what_was_raised(ledger: Ledger) -> None:
    """A callback that raised left with the exception's type."""
    with pytest.raises(ValueError), LedgerClient(ledger.socket).inside(Context("a")):
        raise ValueError

    [visit] = pair(read_ledger(ledger.file)).visits
    assert visit.outcome == "ValueError"


def test_a_killed_reporter_is_in_the_ledger_and_cut(ledger: Ledger) -> None:
    """A callback that was killed inside has its enter in the ledger, and the ledger knows when it died."""
    environment = {**os.environ, **ledger.environment, "PYTHONPATH": os.pathsep.join(sys.path)}

    code = subprocess.run([sys.executable, "-c", CALLBACK_THAT_DIES], env=environment, check=False).returncode
    paired = pair(wait_for(LedgerReader(ledger.file), GONE))

    assert code == -signal.SIGKILL
    assert [(visit.pod, visit.outcome) for visit in paired.visits] == [("doomed", CUT)]


def test_threads_report_side_by_side(ledger: Ledger) -> None:
    """One client serves every thread of a pod; no entry is lost or torn."""
    client = LedgerClient(ledger.socket)

    def work(thread: int) -> None:
        for number in range(50):
            with client.inside(Context(f"{thread}-{number}")):
                pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    verdict = check_ledger(pair(read_ledger(ledger.file)))
    assert (verdict.checked, verdict.violations) == (400, [])


def test_async_callbacks_report_over_one_connection(ledger: Ledger) -> None:
    """Many callbacks of one loop share a connection, each waits for its own acknowledgement only."""

    async def work(client: AsyncLedgerClient, number: int) -> None:
        async with client.inside(Context(str(number))):
            pass

    async def run() -> None:
        client = await AsyncLedgerClient.connect(ledger.socket)
        await asyncio.gather(*(work(client, number) for number in range(500)))
        await client.close()

    asyncio.run(run())

    verdict = check_ledger(pair(read_ledger(ledger.file)))
    assert (verdict.checked, verdict.violations) == (500, [])


def test_a_cancelled_async_callback_leaves(ledger: Ledger) -> None:
    """An async callback that is cancelled has left, and the ledger says how."""

    async def run() -> None:
        client = await AsyncLedgerClient.connect(ledger.socket)
        inside = asyncio.Event()

        async def callback() -> None:
            async with client.inside(Context("a")):
                inside.set()
                await asyncio.get_running_loop().create_future()

        task = asyncio.create_task(callback())
        await inside.wait()
        task.cancel()
        await asyncio.wait([task])
        await client.close()

    asyncio.run(run())

    [visit] = pair(read_ledger(ledger.file)).visits
    assert visit.outcome == "CancelledError"


def test_a_mark_stands_on_the_ledgers_clock(ledger: Ledger) -> None:
    """A test's own events are stamped like everything else."""
    before_ns = time.monotonic_ns()

    LedgerClient(ledger.socket).mark("killed", pod="pod-1", pid=42)

    [entry] = [entry for entry in read_ledger(ledger.file) if entry.kind == MARK]
    assert (entry.note, entry.pid) == ("killed", 42)
    assert before_ns <= entry.at_ns <= time.monotonic_ns()


def test_a_malformed_line_ends_its_connection_and_nothing_else(ledger: Ledger) -> None:
    """A reporter that speaks nonsense is cut off before it spoils the file."""
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(ledger.socket))
        stranger.sendall(b"hello\n")
        assert stranger.recv(1) == b""

    with LedgerClient(ledger.socket).inside(Context("a")):
        pass

    assert check_ledger(pair(read_ledger(ledger.file))).holds


def test_a_callback_does_not_run_without_the_ledger(tmp_path: Path) -> None:
    """When the ledger is gone its clients say so, instead of running unseen."""
    with Ledger.start(tmp_path / "ledger.jsonl") as ledger:
        client = LedgerClient(ledger.socket)
        client.enter(Context("a"))

    with pytest.raises(LedgerAway):
        client.enter(Context("b"))
    assert not ledger.socket.exists()


def test_a_reader_follows_a_growing_file(tmp_path: Path) -> None:
    """Each call gives what is new; a line that is still being written waits for the next."""
    file = tmp_path / "ledger.jsonl"
    file.write_bytes(b'[1,1,"mark","","","",0,"",0,"","first"]\n[2,1,"ma')
    reader = LedgerReader(file)

    first = reader.read_new()
    with file.open("ab") as writer:
        writer.write(b'rk","","","",0,"",0,"","second"]\n')

    assert [entry.note for entry in first] == ["first"]
    assert [entry.note for entry in reader.read_new()] == ["second"]
