"""Runs the demo: ledger and cluster up, a census created, a pod killed half-way, all of it judged, a page written."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from toque._cluster import DevCluster
from toque._dev_state import claim_directory
from toque._nats_server import NatsServer
from toque._protocol import PodView
from toque.chaos.history import COMPLETE, CREATE, RESULT, History, read_history
from toque.chaos.ledger import Ledger, LedgerReader, read_ledger
from toque.chaos.pairing import Ledgered, pair
from toque.chaos.recovery import recoveries
from toque.chaos.verdicts import Verdict
from toque.client import BatchResult, Client, NewInstance
from toque.demo import proof
from toque.demo.census import GATHER_BATCH, STEPS, Census, FileParams, Report, ReportParams
from toque.demo.choose import Choice, choose
from toque.demo.measure import FileReport
from toque.demo.report import Facts, PodTimeline, lines
from toque.demo.show import Figures, Show, make_show
from toque.demo.summary import Summary, merge, summarise
from toque.demo.takeover import Accident, facts_of, kill_a_pod, pods_by_pid, watch_takeover
from toque.errors import InstanceFailed, SetupError, ToqueError, Unavailable

if TYPE_CHECKING:
    from rich.console import Console

SLOTS = 24  # of the account: instances at once
SHARE_OF_CORES = 0.62  # for the callbacks; the rest is for the pods, the server, and this process
TTL_S = 5.0
RECOVERY_S_MAX = TTL_S + 2.0
READERS = 256  # results waited for at once
TICK_S = 0.25
STUCK_S_MAX = 60.0  # without one more result: something is broken, judge what there is
ACCOUNT = "main"
APP = "toque.demo.census"


async def run_demo(*, directory: Path, report: Path, pods: int = 2, seconds: float = 30.0, keep: bool = False,
                   console: Console | None = None) -> int:
    """Run the demo in a directory of its own below `directory`. Returns 0 when every verdict holds, else 1.

    The page is written to `report`: an .html file, or a directory for `index.html`. `seconds` is how long the census
    should last. With `keep`, or when something is broken, the server's and pods' data, the ledger, the client's log
    and the pods' output stay; else they are removed. Raises SetupError (no nats-server, a directory that cannot be
    written), AppError or Unavailable when the pods do not start.
    """
    show = make_show(console)
    page = _make_page_directory(report)
    place = _make_place(directory)
    demo = Demo(place, page, pods, show)
    try:
        verdicts = await demo.run(seconds)
        good = all(verdict.holds for verdict in verdicts)
        keep = keep or not good
    except Exception:
        keep = True
        raise
    finally:
        show.close()
        if keep:
            show.say(f"ledger, log, journal and pods' output are in {place}")
        else:  # it went well, or was interrupted
            shutil.rmtree(place, ignore_errors=True)
    return 0 if good else 1


def _make_place(directory: Path) -> Path:
    """A directory of this run alone."""
    place = directory.absolute() / f"toque-demo-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
    try:
        place.mkdir(parents=True)
    except OSError as error:
        raise SetupError(f"the directory {place} cannot be made: {error.strerror}; name another") from error
    return place


def _make_page_directory(report: Path) -> Path:
    """Where the page goes; found out before the work, not after it."""
    page = report if report.suffix == ".html" else report / "index.html"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"the report cannot be written to {page}: {error.strerror}; name another place") from error
    if not os.access(page.parent, os.W_OK):
        raise SetupError(f"the report cannot be written to {page}: no permission; name another place")
    return page.absolute()


class Demo:
    """One run of the demo."""

    def __init__(self, place: Path, report: Path, pods: int, show: Show) -> None:
        self._place = place
        self._report = report
        self._pods = pods
        self._show = show
        self._started = datetime.now(UTC)
        self._reports: dict[str, FileReport] = {}  # by instance id
        self._paths: dict[str, str] = {}  # by instance id: what was created
        self._pod_names: dict[int, str] = {}
        self._views: Sequence[PodView] = []  # the pods' latest reports
        self._accident: Accident | None = None
        self._half_way = asyncio.Event()
        self._last_result = (time.monotonic(), 0)
        self._page_written = False

    async def run(self, seconds: float) -> list[Verdict]:
        say = self._show.say
        say("Looking for Python source on this machine, and measuring what a sample of it costs …")
        cores = min(self._pods, os.cpu_count() or 1) * SHARE_OF_CORES
        choice = await asyncio.to_thread(choose, seconds=seconds, cores=cores)
        say(f"{choice.found:,} files found; {len(choice.files):,} of them ({choice.bytes / 1e6:.1f} MB), spread over "
            f"all folders, should take about {choice.expected_s:.0f} s. {len(choice.too_big)} are left out as too big.")
        with await asyncio.to_thread(Ledger.start, self._place / "ledger.jsonl") as ledger:
            async with self._cluster(ledger) as cluster, Client.connect(cluster.url, name="toque demo") as client:
                say(f"nats-server at {cluster.url} (every write synced), {self._pods} pods, {SLOTS} slots, the ledger "
                    f"in process {ledger.pid}")
                with History(self._place / "ops.jsonl") as history:
                    await self._census(choice, cluster, client, ledger, history)
                return await self._judged(choice, cluster, client, ledger)

    @asynccontextmanager
    async def _cluster(self, ledger: Ledger) -> AsyncIterator[DevCluster]:
        with (self._place / "pods.log").open("w", encoding="utf-8") as log:

            def on_line(who: str, text: str) -> None:
                print(f"{who}: {text}", file=log, flush=True)
                if who == "toque":
                    self._show.say(f"  {text}")

            directory = self._place / "cluster"
            await _make_account(directory)
            cluster = DevCluster(APP, directory=directory, pods=self._pods, ttl_s=TTL_S, account=ACCOUNT,
                                 on_line=on_line, env=ledger.environment)
            await cluster.start()
            try:
                yield cluster
            except BaseException:
                cluster.kill()
                raise
            finally:
                await cluster.stop()

    # -- the census ----------------------------------------------------------------------------------------------------

    async def _census(self, choice: Choice, cluster: DevCluster, client: Client, ledger: Ledger, history: History
                      ) -> None:
        """Create all instances, read all results, with the accident in the middle."""
        begun = time.monotonic()
        await self._create(choice, client, history)
        self._show.say(f"{len(self._paths):,} instances created in {time.monotonic() - begun:.2f} s, one for each "
                       f"file, {len(STEPS)} steps each")
        reading = asyncio.create_task(self._read_results(client, history), name="results")
        accident = asyncio.create_task(self._accident_half_way(cluster, client, ledger), name="accident")
        try:
            await self._follow(client, reading)
            if self._half_way.is_set():
                await accident
        finally:
            reading.cancel()
            accident.cancel()
            await asyncio.gather(reading, accident, return_exceptions=True)

    async def _create(self, choice: Choice, client: Client, history: History) -> None:
        ops = [history.invoke(CREATE, "census") for _ in choice.files]
        items = [NewInstance(FileParams(file.path)) for file in choice.files]
        results: Sequence[BatchResult] = await client.create_batch(Census, items)
        for op, result, file in zip(ops, results, choice.files, strict=True):
            if result.error is None:
                history.ok(op, instance=result.id)
                self._paths[result.id] = file.path
            else:
                op.instance = result.id
                history.unknown(op, repr(result.error))
                self._show.say(f"not created: {file.path}: {result.error}")

    async def _read_results(self, client: Client, history: History) -> None:
        waiting = iter(self._paths)
        async with asyncio.TaskGroup() as group:
            for _ in range(READERS):
                group.create_task(self._read_some(waiting, client, history))

    async def _read_some(self, waiting: Iterator[str], client: Client, history: History) -> None:
        for instance in waiting:
            try:
                with history.recording(RESULT, "census", instance) as op:
                    result = await client.handle(Census, instance).result()
                    op.status, op.value = COMPLETE, proof.digest_of(result)
            except InstanceFailed as failure:
                self._show.say(f"{self._paths[instance]}: {failure}")
            else:
                self._reports[instance] = result
            if len(self._reports) * 2 >= len(self._paths):
                self._half_way.set()

    async def _follow(self, client: Client, reading: asyncio.Task[None]) -> None:
        """Show how far it is until all results are read, or nothing has come for STUCK_S_MAX."""
        recent = [(time.monotonic(), 0)]
        looking: asyncio.Task[None] | None = None
        while not reading.done():
            await asyncio.wait([reading], timeout=TICK_S)
            now, done = time.monotonic(), len(self._reports)
            recent = [*recent[-12:], (now, done)]
            per_second = (done - recent[0][1]) / (now - recent[0][0])
            running = sum(view.slots_in_use for view in self._views)
            self._show.progress(Figures(done, len(self._paths), per_second, running, len(self._views)))
            if looking is None or looking.done():
                looking = asyncio.create_task(self._look_at_pods(client), name="pods")
            if self._is_stuck(now, done):
                self._show.say(f"no result for {STUCK_S_MAX:.0f} s: giving up, and judging what there is")
                break
        if looking is not None:
            await looking
        if reading.done():
            await reading

    def _is_stuck(self, now: float, done: int) -> bool:
        if done != self._last_result[1]:
            self._last_result = (now, done)
        return now - self._last_result[0] > STUCK_S_MAX

    async def _look_at_pods(self, client: Client) -> None:
        await asyncio.sleep(TICK_S)
        try:
            self._views = await client.pods()
        except Unavailable:
            return
        self._pod_names |= pods_by_pid(self._views)

    # -- the accident --------------------------------------------------------------------------------------------------

    async def _accident_half_way(self, cluster: DevCluster, client: Client, ledger: Ledger) -> None:
        await self._half_way.wait()
        accident = self._accident = await kill_a_pod(cluster, self._views or await client.pods(), ledger)
        self._show.say(f"Half-way: {accident.pod} (process {accident.pid}, {len(accident.stations)} of the stations) "
                       "was killed with SIGKILL")
        await watch_takeover(accident, client, LedgerReader(ledger.file), self._show.say)

    # -- the end -------------------------------------------------------------------------------------------------------

    async def _judged(self, choice: Choice, cluster: DevCluster, client: Client, ledger: Ledger) -> list[Verdict]:
        say = self._show.say
        expected = await asyncio.to_thread(proof.recompute, self._paths)
        ledgered = pair(read_ledger(ledger.file))
        ops = read_history(self._place / "ops.jsonl")
        evidence = proof.Evidence(ops, ledgered, [file.path for file in choice.files], list(self._reports.values()),
                                  expected)
        verdicts = proof.judge(evidence, slots=SLOTS, within_s=RECOVERY_S_MAX)
        facts = self._facts(choice, ledgered, verdicts)
        say(f"{len(self._reports):,} of {len(choice.files):,} files done in {facts.seconds:.1f} s: {facts.steps:,} "
            f"callbacks, {len(ledgered.cut)} of them cut by the kill")
        if len(self._reports) == len(choice.files):
            verdicts.append(await self._gather(client, cluster.url, facts))
        self._show.verdicts(verdicts)
        for verdict in verdicts:
            for violation in verdict.violations:
                say(f"  {verdict.id}: {violation}")
        if self._page_written:
            say(f"The report is at {self._report}")
        return verdicts

    def _facts(self, choice: Choice, ledgered: Ledgered, verdicts: Sequence[Verdict]) -> Facts:
        visits = ledgered.visits
        first_ns = min((visit.entered_ns for visit in visits), default=0)
        last_ns = max((visit.left_ns for visit in visits), default=0)
        kill = None
        if self._accident is not None:
            recovery = next(found for found in recoveries(ledgered) if found.kill.pid == self._accident.pid)
            kill = facts_of(self._accident, recovery, first_ns)
        return Facts(
            python=platform.python_version(), machine=f"{os.cpu_count()} cores, {sys.platform}",
            started=f"{self._started:%Y-%m-%d %H:%M} UTC", seconds=(last_ns - first_ns) / 1e9, pods=self._pods,
            slots=SLOTS, instances=len(choice.files), steps=len(visits), found=choice.found,
            too_big=tuple((file.path, file.size) for file in choice.too_big), kill=kill,
            timeline=timeline(ledgered, first_ns, self._pod_names), verdicts=proof.rows(verdicts))

    async def _gather(self, client: Client, url: str, facts: Facts) -> Verdict:
        """Let the report workflow write the page; compare its sums with the client's own."""
        ids = list(self._paths)
        params = ReportParams(ids=ids, url=url, page=str(self._report), facts=facts)
        handle = await client.create(Report, params)
        try:
            gathered = await handle.result(timedelta(minutes=2))
            self._page_written = True
        except ToqueError as error:
            self._show.say(f"the report failed: {error}")
            gathered = Summary()
        batches = [ids[start:start + GATHER_BATCH] for start in range(0, len(ids), GATHER_BATCH)]
        own = merge([summarise(self._reports[instance] for instance in batch) for batch in batches])
        for line in lines(gathered):
            self._show.say(f"  {line}")
        return proof.check_summary(gathered, own)


async def _make_account(directory: Path) -> None:
    """The account with its limit, before any pod is there: lowered under running pods it would take a while to hold."""
    claim = claim_directory(directory, ACCOUNT)
    server = NatsServer(directory / "nats")
    try:
        await server.start()
        async with Client.connect(server.url) as client:
            await client.accounts.create(ACCOUNT, max_concurrent=SLOTS, ttl_s=TTL_S)
    finally:
        await server.stop()
        claim.release()


def timeline(ledgered: Ledgered, first_ns: int, pod_names: dict[int, str]) -> tuple[PodTimeline, ...]:
    """Instances whose last step ended, per pod and second after `first_ns`."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for visit in ledgered.visits:
        if visit.step == STEPS[-1] and visit.outcome == "ok":
            counts[pod_names.get(visit.pid, f"process {visit.pid}")][(visit.left_ns - first_ns) // 10**9] += 1
    length = max((second for count in counts.values() for second in count), default=-1) + 1
    return tuple(PodTimeline(pod, tuple(count[second] for second in range(length)))
                 for pod, count in sorted(counts.items()))
