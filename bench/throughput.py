"""How fast Toque is on this machine: two pods, one server, every write synced, callbacks that do nothing.

    python bench/throughput.py [--quick] [--only batch,one,ten,idle,sequential] [--json FILE]

The queue is filled while no pod runs; then the pods are started, and what is reported is the rate in the middle of the
run (from 20 % to 80 % of the instances), with the CPU time that pods and server took for it. A figure says what was
reached here and now, beside the aim; it is no test.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop

from toque import BrokerUnavailable, Client, NewInstance, Unavailable
from toque._cluster import DevCluster
from toque._logging import configure
from toque._nats_server import NatsServer, find_server

HERE = Path(__file__).resolve().parent
APP = str(HERE / "apps.py")
ONE_STEP, TEN_STEPS, MANY_STEPS = "one-step", "ten-steps", "many-steps"  # as in apps.py
MIDDLE = (0.2, 0.8)
SAMPLE_S = 0.1
RUN_S_MAX = 300.0
WARM_UP = 30
PARTS = ("idle", "sequential", "batch", "one", "ten")
IN_FLIGHT = 4_000


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    batch: int = 50_000  # instances of one step, created in one batch, run from the filled queue
    ten: int = 10_000
    idle: int = 200
    sequential: int = 500


QUICK = Sizes(batch=20_000, ten=3_000, idle=50, sequential=100)


@dataclass(frozen=True)
class Figure:
    """One result. `aim` is a lower bound, or an upper one where `at_most`."""

    name: str
    value: float
    unit: str
    aim: float | None = None
    at_most: bool = False
    detail: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.aim is None:
            return None
        return self.value <= self.aim if self.at_most else self.value >= self.aim


@dataclass(frozen=True)
class Sample:
    """How far a run was at one moment."""

    at_s: float
    done: int
    pods_cpu_s: float
    server_cpu_s: float


class Bench:
    """One directory, in which clusters come and go: their streams and ports stay."""

    def __init__(self, directory: Path, pods: int, in_flight: int, sizes: Sizes, *, verbose: bool) -> None:
        self._directory = directory
        self._pods = pods
        self._in_flight = in_flight
        self._sizes = sizes
        self._verbose = verbose
        self._url = ""

    async def run(self, parts: Sequence[str]) -> AsyncIterator[Figure]:
        """Run these parts, in the order of PARTS. The first cluster makes the streams, so it always starts."""
        async with self._cluster() as cluster, Client.connect(cluster.url) as client:
            self._url = cluster.url
            await client.accounts.set("main", max_concurrent=self._in_flight)
            if "idle" in parts or "sequential" in parts:
                await _create_and_wait(client, WARM_UP)
            if "idle" in parts:
                yield await self._idle(client)
            if "sequential" in parts:
                yield await self._sequential(client)
        if "batch" in parts or "one" in parts:
            yield await self._fill(ONE_STEP, self._sizes.batch)
        if "one" in parts:
            for figure in await self._drain(ONE_STEP, self._sizes.batch, 1, aim=5_000):
                yield figure
        if "ten" in parts:
            await self._fill(TEN_STEPS, self._sizes.ten)
            for figure in await self._drain(TEN_STEPS, self._sizes.ten, 10, aim=20_000):
                yield figure

    # -- an idle system ------------------------------------------------------------------------------------------------

    async def _idle(self, client: Client) -> Figure:
        times_ms = await _create_and_wait(client, self._sizes.idle)
        quantiles = statistics.quantiles(times_ms, n=100)
        detail = {"p99_ms": round(quantiles[98], 2), "min_ms": round(min(times_ms), 2)}
        return Figure("create → complete, one step, idle: p50", quantiles[49], "ms", 6.0, at_most=True, detail=detail)

    async def _sequential(self, client: Client) -> Figure:
        steps = self._sizes.sequential
        begun = time.perf_counter()
        handle = await client.create(MANY_STEPS, steps)
        assert await handle.result("2 minutes") == steps
        each_ms = (time.perf_counter() - begun) / steps * 1000
        return Figure(f"one sequential step of {steps} in one instance", each_ms, "ms", 1.5, at_most=True)

    # -- a filled queue ------------------------------------------------------------------------------------------------

    async def _fill(self, workflow: str, instances: int) -> Figure:
        """Create so many instances while the server runs alone."""
        items = [NewInstance(number) for number in range(instances)]
        async with self._server_alone(), Client.connect(self._url) as client:
            begun = time.perf_counter()
            results = await client.create_batch(workflow, items, timeout="2 minutes")
            took_s = time.perf_counter() - begun
        refused = [result.error for result in results if result.error is not None]
        if refused:
            raise refused[0]
        return Figure(f"create_batch of {instances:,}", instances / took_s, "instances/s", 20_000)

    async def _drain(self, workflow: str, instances: int, steps: int, *, aim: float) -> list[Figure]:
        """Start pods on the filled queue; the rate in the middle of the run."""
        samples: list[Sample] = []
        async with self._cluster(on_started=lambda cluster: self._follow(cluster, workflow, instances, samples)):
            pass
        begin, end = (_at(samples, share * instances) for share in MIDDLE)
        rate = (end.done - begin.done) / (end.at_s - begin.at_s)
        done = end.done - begin.done
        detail = {
            "in_flight": self._in_flight,
            "cpu_us_per_instance_pods": round((end.pods_cpu_s - begin.pods_cpu_s) / done * 1e6, 1),
            "cpu_us_per_instance_server": round((end.server_cpu_s - begin.server_cpu_s) / done * 1e6, 1),
        }
        name = "one step" if steps == 1 else f"{steps} steps"
        if steps == 1:
            return [Figure(f"{name}, filled queue: instances", rate, "instances/s", aim, detail=detail)]
        return [Figure(f"{name}, filled queue: steps", rate * steps, "steps/s", aim, detail=detail),
                Figure(f"{name}, filled queue: instances", rate, "instances/s")]

    async def _follow(self, cluster: DevCluster, workflow: str, instances: int, samples: list[Sample]) -> None:
        """Sample how many are complete, from the first owner's answer on, until all are."""
        client = await _connect(self._url)
        deadline = time.monotonic() + RUN_S_MAX
        while not samples or samples[-1].done < instances:
            if time.monotonic() > deadline:
                done = samples[-1].done if samples else 0
                raise TimeoutError(f"{done} of {instances} {workflow} instances in {RUN_S_MAX:.0f} s")
            complete = await _complete(client, workflow)
            if complete is not None:
                pods_cpu_s = sum(_cpu_s(pod.pid) for pod in cluster.pods.values())
                samples.append(Sample(time.perf_counter(), complete, pods_cpu_s, _cpu_s(cluster.server_pid)))
            await asyncio.sleep(SAMPLE_S)
        await client.close()

    # -- processes -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _cluster(self, on_started: Callable[[DevCluster], Any] | None = None) -> AsyncIterator[DevCluster]:
        """The server and the pods; `on_started` runs from the start on, and to its end before the cluster's."""
        cluster = DevCluster(APP, directory=self._directory, pods=self._pods, on_line=self._on_line)
        following = asyncio.ensure_future(on_started(cluster)) if on_started is not None else None
        try:
            await cluster.start()
            if following is not None:
                await following
            yield cluster
        finally:
            if following is not None:
                following.cancel()
            await cluster.stop()

    @asynccontextmanager
    async def _server_alone(self) -> AsyncIterator[None]:
        server = NatsServer(self._directory / "nats", port=int(self._url.rpartition(":")[2]))
        await server.start()
        try:
            yield
        finally:
            await server.stop()

    def _on_line(self, who: str, text: str) -> None:
        if self._verbose:
            print(f"{who}: {text}", file=sys.stderr)


async def _create_and_wait(client: Client, times: int) -> list[float]:
    """Create one instance and wait for its end, again and again; milliseconds of each."""
    times_ms: list[float] = []
    for number in range(times):
        begun = time.perf_counter()
        handle = await client.create(ONE_STEP, number)
        assert await handle.result("30 seconds") == number + 1
        times_ms.append((time.perf_counter() - begun) * 1000)
    return times_ms


async def _connect(url: str) -> Client:
    """A client of a server that is just being started."""
    while True:
        try:
            return await Client.connect(url)
        except BrokerUnavailable:
            await asyncio.sleep(SAMPLE_S)


async def _complete(client: Client, workflow: str) -> int | None:
    """Instances that are complete; None while a station has no owner that answers."""
    try:
        reports = await client.stations()
    except Unavailable:
        return None
    if any(report.view is None for report in reports):
        return None
    return sum(queue.counts.get("complete", 0) for report in reports if report.view is not None
               for queue in report.view.queues if queue.workflow == workflow)


def _at(samples: Sequence[Sample], done: float) -> Sample:
    """Where the run was when so many were done, between two samples in proportion."""
    before, after = samples[0], samples[0]
    for sample in samples:
        before, after = after, sample
        if sample.done >= done:
            break
    if after.done == before.done:
        return after
    share = min(max((done - before.done) / (after.done - before.done), 0.0), 1.0)

    def between(low: float, high: float) -> float:
        return low + (high - low) * share

    return Sample(between(before.at_s, after.at_s), round(between(before.done, after.done)),
                  between(before.pods_cpu_s, after.pods_cpu_s), between(before.server_cpu_s, after.server_cpu_s))


def _cpu_s(pid: int) -> float:
    """User and system time of a process, from /proc; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- what is printed and written ---------------------------------------------------------------------------------------

def row_of(figure: Figure) -> str:
    """A line of the table."""
    bound = "" if figure.aim is None else f"{'≤' if figure.at_most else '≥'} {figure.aim:,.6g}"
    word = {None: "", True: "met", False: "MISSED"}[figure.met]
    detail = ", ".join(f"{name} {value:,.6g}" for name, value in figure.detail.items())
    value = f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.2f}"
    return f"{figure.name:<44}{value:>10} {figure.unit:<12}{bound:>9}  {word:<7}{detail}"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.machine(), "cores": os.cpu_count(), "kernel": platform.release(),
            "python": platform.python_version(), "nats_server": find_server().version}


def commit() -> str:
    """The commit of this tree, with a mark when files differ from it; empty outside of a repository."""
    done = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40"],
                          capture_output=True, text=True, check=False)
    return done.stdout.strip()


def document(figures: Sequence[Figure], options: argparse.Namespace) -> dict[str, Any]:
    """The results as they are written to FILE."""
    return {"bench": "throughput", "commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(), "pods": options.pods, "in_flight": options.in_flight, "quick": options.quick,
            "figures": [asdict(figure) | {"met": figure.met} for figure in figures]}


async def run(options: argparse.Namespace, directory: Path) -> list[Figure]:
    """Run and print; returns the figures."""
    sizes = QUICK if options.quick else Sizes()
    bench = Bench(directory, options.pods, options.in_flight, sizes, verbose=options.verbose)
    figures: list[Figure] = []
    async for figure in bench.run(options.only):
        figures.append(figure)
        print(row_of(figure), flush=True)
    return figures


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How fast Toque is on this machine.")
    parser.add_argument("--quick", action="store_true", help="fewer instances: about 20 s, rougher figures")
    parser.add_argument("--only", type=_parts, default=list(PARTS), metavar="PARTS", help=",".join(PARTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--pods", type=int, default=2)
    parser.add_argument("--in-flight", type=int, default=IN_FLIGHT, help=f"slots of the account ({IN_FLIGHT:,})")
    parser.add_argument("--directory", type=Path, help="on the disk to be measured; kept (default: a new one, removed)")
    parser.add_argument("--verbose", action="store_true", help="show the pods' output")
    options = parser.parse_args(arguments)
    configure(level=logging.WARNING)
    directory = options.directory or Path(tempfile.mkdtemp(prefix="toque-bench-"))
    try:
        figures = uvloop.run(run(options, directory))
    finally:
        if options.directory is None:
            shutil.rmtree(directory, ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(document(figures, options), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
