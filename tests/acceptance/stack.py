"""The real stack for acceptance tests: ledger, local cluster, bare `toque worker` processes, the command line.

A `Stack` belongs to one test. What its processes said is in `pods.log` of the test's directory, and is printed when
the test fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from toque import cli
from toque._children import ChildProcess
from toque._cluster import DevCluster, pod_environment
from toque._nats_server import NatsServer
from toque.chaos.ledger import Entry, Ledger, read_ledger
from toque.chaos.pairing import Ledgered, pair
from toque.chaos.verdicts import Verdict
from toque.client import Client
from toque.errors import SetupError

RunAsync = Callable[..., Any]
"""`run_async(coroutine, timeout_s=…)`: the fixture of that name."""

FULL = os.environ.get("TOQUE_FULL", "") not in ("", "0")
APPS = Path(__file__).parent / "apps"
WORK = "toque.chaos.five_steps"
WAIT_S_MAX = 30.0
POLL_S = 0.02
EXIT_S_MAX = 40.0


async def eventually(condition: Callable[[], object], *, within_s: float = WAIT_S_MAX) -> None:
    """Poll until the condition, or what it is awaited for, is truthy; TimeoutError after the deadline."""
    async with asyncio.timeout(within_s):
        while True:
            outcome = condition()
            if await outcome if inspect.isawaitable(outcome) else outcome:
                return
            await asyncio.sleep(POLL_S)


class Worker:
    """One `toque worker` without a supervisor: nobody notices its end, nobody starts it again."""

    def __init__(self, name: str, data: Path, child: ChildProcess) -> None:
        self.name = name
        self.data = data
        self.child = child

    @property
    def pid(self) -> int:
        return self.child.pid

    def send(self, sig: signal.Signals) -> None:
        self.child.send(sig)

    async def exit_code(self) -> int:
        """Wait for its end."""
        async with asyncio.timeout(EXIT_S_MAX):
            return await self.child.wait()


class Stack:
    """See the module. `ledger` runs; everything else is started by the test."""

    def __init__(self, directory: Path, ledger: Ledger) -> None:
        self.directory = directory
        self.ledger = ledger
        self.lines: list[tuple[str, str]] = []
        self.workers: dict[str, Worker] = {}
        self._log = (directory / "pods.log").open("w")
        self._began = time.monotonic()

    # -- what was said -------------------------------------------------------------------------------------------------

    def hear(self, source: str, line: str) -> None:
        self.lines.append((source, line))
        print(f"{time.monotonic_ns() / 1e9:.3f} {source:8} | {line}", file=self._log, flush=True)

    def said(self, text: str, source: str = "") -> bool:
        return any(text in line for who, line in self.lines if source in ("", who))

    def say(self, text: str) -> None:
        """Of the test itself: printed, and between the lines of the pods."""
        print(text)
        self.hear("test", text)

    # -- what was done -------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        return read_ledger(self.ledger.file)

    def ledgered(self) -> Ledgered:
        return pair(self.entries())

    # -- processes -----------------------------------------------------------------------------------------------------

    @property
    def dev(self) -> Path:
        """The directory of the local cluster."""
        return self.directory / "dev"

    def cluster(self, app: str = WORK, **options: Any) -> DevCluster:
        return DevCluster(app, directory=self.dev, on_line=self.hear, env=self.ledger.environment, **options)

    @asynccontextmanager
    async def running(self, app: str = WORK, **options: Any) -> AsyncIterator[tuple[DevCluster, Client]]:
        """A local cluster and a client of it. Killed at the end."""
        cluster = self.cluster(app, **options)
        await cluster.start()
        try:
            async with Client.connect(cluster.url, account=cluster.account) as client:
                yield cluster, client
        finally:
            cluster.kill()
            await cluster.stop()

    @asynccontextmanager
    async def server(self, **options: Any) -> AsyncIterator[NatsServer]:
        """A nats-server alone. Its workers are killed with it."""
        server = NatsServer(self.directory / "nats", **options)
        await server.start()
        try:
            yield server
        finally:
            for worker in self.workers.values():
                worker.child.kill()
            await asyncio.gather(*(worker.child.wait() for worker in self.workers.values()))
            server.kill()
            await server.exited

    async def worker(self, name: str, server: NatsServer, *options: str, app: str = WORK,
                     data: Path | None = None) -> Worker:
        """Start a pod. It serves when `serving` says so."""
        data = data or self.directory / "pods" / name
        argv = [sys.executable, "-m", "toque", "worker", app, "--pod", name, "--data", str(data), "--nats", server.url,
                *options]
        env = pod_environment({**self.ledger.environment, "TOQUE_POD": name}, [])
        child = await ChildProcess.start(argv, env=env, on_line=lambda line: self.hear(name, line))
        self.workers[name] = Worker(name, data, child)
        return self.workers[name]

    async def serving(self, client: Client, *names: str) -> None:
        """Wait until exactly these pods have all the stations, evenly spread."""

        async def spread() -> bool:
            try:
                stations = {view.pod: len(view.stations) for view in await client.pods() if view.stations}
            except SetupError:  # the first pod makes the account
                return False
            return set(stations) == set(names) and max(stations.values()) - min(stations.values()) <= 1

        await eventually(spread)

    def close(self) -> None:
        self._log.close()


# -- the command line --------------------------------------------------------------------------------------------------

def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "toque", *arguments]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of a command: as a user's terminal that knows no server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NATS_", "TOQUE_"))}
    source = str(Path(__file__).resolve().parents[2] / "src")
    return {**kept, "PYTHONPATH": source, "PYTHONUNBUFFERED": "1", **(extra or {})}


def toque(*arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None,
          timeout_s: float = EXIT_S_MAX) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as a user would in a terminal."""
    return subprocess.run(command(*arguments), env=environment(env), cwd=cwd, capture_output=True, text=True,
                          timeout=timeout_s, check=False)


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def toque_here(*arguments: str) -> Said:
    """Run a command in this process: a new one takes a second. Not in an event loop."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = cli.main(arguments)
    said = Said(code, out.getvalue(), err.getvalue())
    assert "Traceback" not in said.err, said.err
    return said


class Terminal:
    """`toque dev` in a terminal of its own: a process group that a Ctrl-C reaches as a whole."""

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(command(*arguments), env=environment(env), stdin=subprocess.DEVNULL,
                                            stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, *, within_s: float = WAIT_S_MAX) -> None:
        """Block until it has printed this. AssertionError, with all it printed, when it ends or takes too long."""
        deadline = time.monotonic() + within_s
        while text not in self.text:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(POLL_S)

    def ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    async def exit_code(self, within_s: float = EXIT_S_MAX) -> int:
        await eventually(lambda: self.process.poll() is not None, within_s=within_s)
        return self.process.wait()

    def close(self) -> None:
        """End it, whatever it is doing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def children_of(pid: int) -> list[int]:
    """The processes that a living process has started, over all of its threads."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# -- judging -----------------------------------------------------------------------------------------------------------

def assert_holds(*verdicts: Verdict) -> None:
    """Every verdict holds; the error names each that does not, with its violations."""
    broken = [f"{verdict.word} {verdict.id}: {verdict.promise} ({verdict.checked} checked)\n    "
              + "\n    ".join(verdict.violations) for verdict in verdicts if not verdict.holds]
    assert not broken, "\n".join(broken)
