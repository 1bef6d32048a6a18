"""A scenario: a topology, a bounded load, a seeded schedule of faults, and the checkers. Running one, and its outcome.

Everything that a run is judged from is written to its directory: ops.jsonl (the client's log), faults.jsonl (planned
and made), seen.jsonl (owners and slots); the ledger has its own file.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import msgspec

from toque.chaos.faults import OF_CGROUP, OF_LINK, OF_NETWORK, Fault, Recipe, schedule
from toque.chaos.history import History, read_history
from toque.chaos.judging import Evidence, Judgement, judge
from toque.chaos.ledger import LedgerClient, LedgerReader, read_ledger
from toque.chaos.load import Load, LoadOptions, set_limit
from toque.chaos.nemesis import Nemesis
from toque.chaos.progress import Progress
from toque.chaos.strikes import Hands, Injected
from toque.chaos.topology import Topology
from toque.chaos.watching import Sample, Watcher
from toque.client import Client
from toque.errors import ToqueError

TICK_S = 0.25
READ_AGAIN_S_MAX = 60.0
WATCH_END_S_MAX = 5.0


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is disturbed, and how."""

    name: str
    does: str
    """In a sentence."""
    recipe: Recipe
    faults: int
    """How many, unless the options say otherwise."""
    load: LoadOptions = field(default_factory=LoadOptions)
    worker_options: tuple[str, ...] = ()
    """Of the pods of a cluster of its own."""

    @property
    def needs(self) -> str:
        """What it takes beside a server and two pods; empty for nothing."""
        kinds = set(self.recipe.kinds)
        if kinds & OF_NETWORK:
            return "root, ip, iptables; a cluster of its own"
        if kinds & OF_CGROUP:
            return "root, writable control groups"
        return "a cluster of its own" if kinds & OF_LINK else ""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a scenario is run; None = as the scenario says."""

    seed: int
    faults: int | None = None
    instances: int | None = None
    limit: int | None = None
    callback_ms: int | None = None
    lasts_ttls: float | None = None
    """How long each fault that lasts does, in TTLs."""
    prefix: str = "order"
    command: str = ""
    """What repeats the run, for the report."""
    minutes: float = 0.0
    """How long work goes on at least, with a fault `every_s`; 0 = until the last fault is over."""
    every_s: float = 0.0


@dataclass(frozen=True)
class Figures:
    """How far a run is."""

    ended: int
    created: int
    inside: int
    faults: int
    faults_planned: int
    left: int

    def __str__(self) -> str:
        return (f"{self.ended}/{self.created} instances ended, {self.inside} callbacks inside, {self.left} left, "
                f"{self.faults} of {self.faults_planned} faults")


class Show(Protocol):
    """Where a run tells what happens."""

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def progress(self, figures: Figures) -> None:
        """Called often."""
        ...


@dataclass
class Outcome:
    """What a run left behind, and the judgement on it."""

    scenario: Scenario
    options: RunOptions
    load: LoadOptions
    ttl_s: float
    injected: list[Injected]
    samples: list[Sample]
    evidence: Evidence
    judgement: Judgement
    began_ns: int
    lasted_s: float

    @property
    def word(self) -> str:
        return self.judgement.word

    @property
    def holds(self) -> bool:
        return self.word == "pass"

    def lines(self) -> list[str]:
        """Counts and verdicts for people, a violation a line below its promise."""
        out = [f"{self.scenario.name}, seed {self.options.seed}: {self.word} after {self.lasted_s:.0f} s", "what happened:"]
        out += [f"  {count}" for count in self.judgement.counts]
        out += [f"  void: {reason}" for reason in self.judgement.void]
        out.append("what was promised:")
        for verdict in self.judgement.verdicts:
            note = f" ({verdict.note})" if verdict.note else ""
            out.append(f"  {verdict.word:8} {verdict.id:6} {verdict.promise}: {verdict.checked:,} checked, "
                       f"{verdict.broken:,} broken{note}")
            out += [f"           {violation}" for violation in verdict.violations]
        return out


async def run(scenario: Scenario, options: RunOptions, topology: Topology, *, directory: Path, show: Show,
              beside: Callable[[Load], Awaitable[None]] | None = None) -> Outcome:
    """Run a scenario on pods that serve `toque.chaos.five_steps`, and judge it. Ends by itself.

    `beside` runs for as long as the work does, and is cancelled then. Sets the account's limit, and back. Cancelled,
    it heals what it broke. Raises Refused when a fault cannot be made here, Unavailable when there are no two pods at
    its beginning.
    """
    await topology.check(frozenset(scenario.recipe.kinds))
    load_options = replace(scenario.load, prefix=options.prefix, limit=options.limit or scenario.load.limit,
                           instances=options.instances or scenario.load.instances,
                           callback_ms=options.callback_ms or scenario.load.callback_ms)
    faults = schedule(scenario.recipe, count=options.faults or scenario.faults, seed=options.seed, ttl_s=topology.ttl_s,
                      lasts_ttls=options.lasts_ttls)
    _write(directory / "faults.jsonl", faults)
    running = _Running(options, load_options, faults, topology, directory, show)
    async with _limited(topology.client, load_options.limit):
        await running.work(beside)
    _write(directory / "faults.jsonl", running.nemesis.injected)
    evidence = running.evidence()
    judgement = judge(evidence)
    return Outcome(scenario, options, load_options, topology.ttl_s, running.nemesis.injected, running.watcher.samples,
                   evidence, judgement, running.began_ns, (time.monotonic_ns() - running.began_ns) / 1e9)


@asynccontextmanager
async def _limited(client: Client, limit: int) -> AsyncIterator[None]:
    """The account under another limit; what it had before is set again at the end, if a server answers."""
    before = (await client.accounts.describe(client.account)).max_concurrent
    await set_limit(client, limit)
    try:
        yield
    finally:
        with contextlib.suppress(ToqueError):
            await client.accounts.set(client.account, max_concurrent=before)


class _Running:
    """One run: load, nemesis and watcher side by side."""

    def __init__(self, options: RunOptions, load: LoadOptions, faults: Sequence[Fault], topology: Topology, directory: Path,
                 show: Show) -> None:
        self.began_ns = time.monotonic_ns()
        self._topology = topology
        self._directory = directory
        self._show = show
        self._offset = topology.ledger.file.stat().st_size
        self._progress = Progress(LedgerReader(topology.ledger.file, self._offset))
        self._reporter = LedgerClient(topology.ledger.socket, pod="scenario")
        self._history = History(directory / "ops.jsonl")
        self._lasts_s = options.minutes * 60
        self.load = Load(load, topology.client, self._history, options.seed)
        self.nemesis = Nemesis(faults, Hands(topology, self._progress, self._reporter), show.say,
                               every_s=options.every_s)
        self.watcher = Watcher(topology, directory / "seen.jsonl")

    async def work(self, also: Callable[[Load], Awaitable[None]] | None) -> None:
        beside: list[asyncio.Future[None]] = [asyncio.ensure_future(self.watcher.run()),
                                              asyncio.ensure_future(self._tell())]
        if also is not None:
            beside.append(asyncio.ensure_future(also(self.load)))
        try:
            await self._work()
        finally:
            for task in beside:
                task.cancel()
            await asyncio.wait(beside, timeout=WATCH_END_S_MAX)
            self._history.close()
            self._reporter.close()
        for task in beside:
            if task.done() and not task.cancelled():
                task.result()  # a watcher that failed would leave checks without sight

    async def _work(self) -> None:
        try:
            await self.load.work(self._disturb())
        except TimeoutError:
            self._show.say(f"not all instances have ended within {self.load.options.ends_within_s:g} s after the faults")
            return
        try:
            async with asyncio.timeout(READ_AGAIN_S_MAX):
                await self.load.read_again()
        except TimeoutError:
            self._show.say("not all results could be read again")

    async def _disturb(self) -> None:
        """The faults, and what is left of the time."""
        until = time.monotonic() + self._lasts_s
        await self.nemesis.run()
        await asyncio.sleep(max(0.0, until - time.monotonic()))

    async def _tell(self) -> None:
        while True:
            self._show.progress(Figures(self.load.ended, self.load.created, self._progress.read().inside,
                                        len(self.nemesis.injected), len(self.nemesis.faults), self._progress.left))
            await asyncio.sleep(TICK_S)

    def evidence(self) -> Evidence:
        return Evidence.of(
            self.load, faults=self.nemesis.faults, injected=self.nemesis.injected, missed=self.nemesis.missed,
            ops=read_history(self._directory / "ops.jsonl"), sightings=self.watcher.sightings,
            entries=read_ledger(self._topology.ledger.file, self._offset), ttl_s=self._topology.ttl_s)


def _write(path: Path, items: Sequence[msgspec.Struct]) -> None:
    with path.open("ab") as file:
        for item in items:
            file.write(msgspec.json.encode(item) + b"\n")
