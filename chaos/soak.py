"""A long run with faults: what a deployment uses is sampled all the while, and must not grow.

Each figure ends as a verdict, flat or growing, from its course after the warm-up. Instances are deleted a minute after
their end, and their tombstones another minute later, so state is bounded. What LMDB takes is told in bytes for each.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from toque.chaos import processes
from toque.chaos.faults import Kind, Recipe
from toque.chaos.load import LoadOptions
from toque.chaos.scenario import Scenario
from toque.chaos.topology import Topology
from toque.chaos.verdicts import Verdict

SAMPLE_S = 5.0
FAULTS_PER_MINUTE = 2.0
QUIET_SHARE = 0.15  # of the time, at the end, without faults
WARM_UP_SHARE = 0.25  # of the samples: caches fill, pools open
GROWTH_SHARE = 0.10  # of a figure's mean, over the samples that count: less is flat
GROWTH_SAMPLES_MIN = 6
MONITOR_S_MAX = 2.0
MIB = 1024 * 1024
KEPT_S = 60.0  # so long an instance is kept after its end: state is as large at the end as after the warm-up
JOURNAL_MARK = "JOURNAL"

SOAK = Scenario(
    name="soak", faults=1, load=LoadOptions(instances=200, later_max=1_000_000, kept_s=KEPT_S),
    worker_options=("--snapshot-after", "0.1"),  # small, so that minutes show many snapshots, and what they trim
    recipe=Recipe([Kind.KILL_POD, Kind.KILL_SERVER, Kind.STOP_SERVER, Kind.END_SERVER, Kind.KILL_POD]),
    does="work with a fault now and then, while memory, files, threads, tasks, consumers, subscriptions and the journal "
         "are watched")


@dataclass(frozen=True)
class Figure:
    """Something that must not grow. A growth below `least` is noise."""

    name: str
    unit: str
    least: float


TASKS = "pods: tasks"
FIGURES = (
    Figure("pods: memory", "MiB", 24.0),
    Figure("pods: file descriptors", "", 12.0),
    Figure("pods: threads", "", 12.0),
    Figure(TASKS, "", 100.0),  # some for each instance that has a slot, and these come and go
    Figure("server: memory", "MiB", 24.0),
    Figure("server: file descriptors", "", 12.0),
    Figure("server: consumers", "", 4.0),
    Figure("server: subscriptions", "", 24.0),
    Figure("journal: messages", "", 2_000.0),
    Figure("journal: size", "MiB", 4.0),
)
LMDB = "pods: LMDB"


class SoakSample(msgspec.Struct):
    """All figures at one moment, in their units; those that could not be read are missing. `ended`: instances."""

    at_s: float
    ended: int
    figures: dict[str, float]


def planned(minutes: float) -> tuple[int, float]:
    """How many faults, and every how many seconds."""
    count = max(1, round(minutes * (1 - QUIET_SHARE) * FAULTS_PER_MINUTE))
    return count, minutes * 60 * (1 - QUIET_SHARE) / count


# -- sampling ----------------------------------------------------------------------------------------------------------

class Sampler:
    """Samples until it is cancelled. `ended` tells how many instances have ended; `file` gets a line each."""

    def __init__(self, topology: Topology, file: Path, ended: Callable[[], int]) -> None:
        self.samples: list[SoakSample] = []
        self._topology = topology
        self._file = file
        self._ended = ended
        self._began = time.monotonic()

    async def run(self) -> None:
        with self._file.open("ab") as log:
            while True:
                await asyncio.sleep(SAMPLE_S)
                sample = await self._sample()
                self.samples.append(sample)
                log.write(msgspec.json.encode(sample) + b"\n")

    async def _sample(self) -> SoakSample:
        figures: dict[str, float] = {}
        pods = [pod for pod in await self._topology.pods(count_tasks=True) if pod.pid]
        if len(pods) >= self._topology.pods_wanted:  # else a dead one would look like a figure that fell
            figures |= of_processes("pods", [pod.pid for pod in pods])
            figures[TASKS] = sum(pod.tasks for pod in pods)
        if (server := self._topology.server_pid()) and processes.is_alive(server):
            figures |= of_processes("server", [server], threads=False)
        figures |= await asyncio.to_thread(of_monitor, self._topology.monitor_url)
        figures[LMDB] = sum(stored_bytes(path) for path in self._topology.stores)
        return SoakSample(time.monotonic() - self._began, self._ended(), figures)


def of_processes(who: str, pids: Sequence[int], *, threads: bool = True) -> dict[str, float]:
    """Sums over processes of this host."""
    figures: dict[str, float] = {
        f"{who}: memory": sum(map(processes.memory_bytes, pids)) / MIB,
        f"{who}: file descriptors": sum(map(processes.files_of, pids)),
    }
    return figures | ({f"{who}: threads": sum(map(processes.threads_of, pids))} if threads else {})


def of_monitor(url: str) -> dict[str, float]:
    """What the server says of itself; nothing while it does not answer."""
    if not url:
        return {}
    try:
        streams = _get(f"{url}/jsz?streams=true")
        subscriptions = _get(f"{url}/subsz")
    except (OSError, ValueError):
        return {}
    return {"server: consumers": float(streams.get("consumers", 0)),
            "server: subscriptions": float(subscriptions.get("num_subscriptions", 0)), **journal_of(streams)}


def journal_of(streams: dict[str, Any]) -> dict[str, float]:
    """Messages and size of the journal, from /jsz."""
    states = [stream["state"] for account in streams.get("account_details", [])
              for stream in account.get("stream_detail", []) if JOURNAL_MARK in stream["name"].upper()]
    if not states:
        return {}
    return {"journal: messages": sum(state["messages"] for state in states),
            "journal: size": sum(state["bytes"] for state in states) / MIB}


def _get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=MONITOR_S_MAX) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def stored_bytes(directory: Path) -> int:
    """What the files of a directory take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


# -- judging -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Course:
    """How a figure went, after the warm-up."""

    first: float
    last: float
    mean: float
    per_hour: float
    growth: float
    """Over the samples that count, along the line that fits them best."""
    samples: int


def course_of(points: Sequence[tuple[float, float]]) -> Course:
    """From (second, value) pairs, in order."""
    counted = points[int(len(points) * WARM_UP_SHARE):]
    if not counted:
        return Course(0.0, 0.0, 0.0, 0.0, 0.0, 0)
    times, values = [at for at, _ in counted], [value for _, value in counted]
    middle, mean = fmean(times), fmean(values)
    spread = sum((at - middle) ** 2 for at in times)
    slope = sum((at - middle) * (value - mean) for at, value in counted) / spread if spread else 0.0
    return Course(points[0][1], values[-1], mean, slope * 3600, slope * (times[-1] - times[0]), len(counted))


def is_growing(course: Course, figure: Figure) -> bool:
    return course.growth > max(figure.least, GROWTH_SHARE * course.mean)


def check_r6(samples: Sequence[SoakSample]) -> list[Verdict]:
    """A verdict for each figure. One with too few samples does not hold."""
    out = []
    for figure in FIGURES:
        course = course_of([(sample.at_s, sample.figures[figure.name]) for sample in samples
                            if figure.name in sample.figures])
        verdict = Verdict("R6", f"{figure.name} is flat")
        verdict.checked = course.samples if course.samples >= GROWTH_SAMPLES_MIN else 0
        unit = f" {figure.unit}" if figure.unit else ""
        verdict.note = (f"first {course.first:,.1f}{unit}, last {course.last:,.1f}{unit}, slope {course.per_hour:+,.1f}"
                        f"{unit}/h")
        if verdict.checked and is_growing(course, figure):
            verdict.violated(f"{figure.name} is growing: by {course.growth:,.1f}{unit} over {course.samples} samples")
        out.append(verdict)
    return out


def kept_per_instance(samples: Sequence[SoakSample]) -> str:
    """How much LMDB grew for each instance that ended, over all pods; "" when too little was seen."""
    counted = [sample for sample in samples[int(len(samples) * WARM_UP_SHARE):] if LMDB in sample.figures]
    if len(counted) < GROWTH_SAMPLES_MIN or counted[-1].ended <= counted[0].ended:
        return ""
    grown = counted[-1].figures[LMDB] - counted[0].figures[LMDB]
    ended = counted[-1].ended - counted[0].ended
    return f"{grown / ended:,.0f} bytes of LMDB, over all pods, for each of {ended:,} ended instances"
