"""The accident of the demo: kills a pod with SIGKILL and watches what becomes of its stations and instances."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from toque._cluster import DevCluster
from toque._protocol import PodView
from toque.chaos.ledger import ENTER, Entry, Ledger, LedgerClient, LedgerReader
from toque.chaos.pairing import KILLED, pair
from toque.chaos.recovery import Recovery, recoveries
from toque.client import Client
from toque.demo.report import KillFacts
from toque.errors import Unavailable

POLL_S = 0.1
INSIDE_POLL_S = 0.002
INSIDE_PATIENCE_S = ((0.3, 3), (1.0, 1))  # so long for so many callbacks inside; then whatever there is
WATCH_S_MAX = 30.0


@dataclass
class Accident:
    """One kill, and what was seen of it. Times are CLOCK_MONOTONIC."""

    pod: str
    session: str
    pid: int
    stations: Sequence[str]
    at_ns: int
    moved_s: float = 0.0
    seen: Recovery | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def since_s(self) -> float:
        return (time.monotonic_ns() - self.at_ns) / 1e9


async def kill_a_pod(cluster: DevCluster, views: Sequence[PodView], ledger: Ledger) -> Accident:
    """SIGKILL to the pod that owns the most stations (the last by name), in the middle of callbacks of its.

    `views` are the pods' latest reports. The kill is noted in the ledger at once.
    """
    reporter = LedgerClient(ledger.socket, pod="demo")
    victim = max(views, key=lambda view: (len(view.stations), view.pod))
    await _until_inside(victim.pid, LedgerReader(ledger.file))
    at_ns = time.monotonic_ns()
    pid = cluster.kill_pod(victim.pod)
    reporter.mark(KILLED, pod=victim.pod, pid=pid)
    reporter.close()
    return Accident(victim.pod, victim.session, pid, victim.stations, at_ns)


async def _until_inside(pid: int, ledger: LedgerReader) -> None:
    """Wait until the process is inside a few callbacks, or at least in one; not for long."""
    inside: set[int] = set()  # connections: each thread has its own
    begun = time.monotonic()
    while True:
        for entry in ledger.read_new():
            if entry.pid == pid and entry.kind == ENTER:
                inside.add(entry.connection)
            elif entry.pid == pid:
                inside.discard(entry.connection)
        waited_s = time.monotonic() - begun
        wanted = next((count for patience_s, count in INSIDE_PATIENCE_S if waited_s < patience_s), 0)
        if len(inside) >= wanted:
            return  # without another await: what was inside still is
        await asyncio.sleep(INSIDE_POLL_S)


async def watch_takeover(accident: Accident, client: Client, ledger: LedgerReader, say: Callable[[str], None]) -> None:
    """Tell how the dead pod's stations and instances go on; returns when all do, or after WATCH_S_MAX."""
    async with asyncio.TaskGroup() as group:
        group.create_task(_watch_stations(accident, client, say))
        group.create_task(_watch_instances(accident, ledger, say))


async def _watch_stations(accident: Accident, client: Client, say: Callable[[str], None]) -> None:
    """Until each of its stations has an owner of another session."""
    waiting = set(accident.stations)
    while waiting and accident.since_s < WATCH_S_MAX:
        owners = await _owners(client)
        taken = {station for station in waiting if owners.get(station, ("", accident.session))[1] != accident.session}
        if taken:
            accident.moved_s = accident.since_s
            names = ", ".join(sorted({owners[station][0] for station in taken}))
            say(f"  +{accident.moved_s:.2f} s  stations {' '.join(sorted(taken))} now belong to {names}")
        waiting -= taken
        await asyncio.sleep(POLL_S)


async def _owners(client: Client) -> dict[str, tuple[str, str]]:
    """station → (pod, session) of those whose owner answers."""
    try:
        reports = await client.stations()
    except Unavailable:
        return {}
    return {report.station: (report.pod, report.view.session) for report in reports if report.view is not None}


async def _watch_instances(accident: Accident, ledger: LedgerReader, say: Callable[[str], None]) -> None:
    """Until every instance that the kill cut has entered a callback in another process."""
    entries: list[Entry] = []
    told_first = False
    while accident.since_s < WATCH_S_MAX:
        entries += ledger.read_new()
        recovery = next(found for found in recoveries(pair(entries)) if found.kill.pid == accident.pid)
        if recovery.gaps_s and not told_first:
            told_first = True
            say(f"  +{min(recovery.gaps_s):.2f} s  the first of its instances entered a callback in another process")
        if recovery.gaps_s and not recovery.lost:
            say(f"  +{recovery.max_s:.2f} s  all {recovery.cut} callbacks that it cut are under way elsewhere")
            return
        await asyncio.sleep(POLL_S)


def facts_of(accident: Accident, recovery: Recovery, first_ns: int) -> KillFacts:
    """What the page says of it; `first_ns` is when the first callback was entered."""
    return KillFacts(
        accident.pod, accident.pid, (recovery.kill.at_ns - first_ns) / 1e9, len(accident.stations), recovery.cut,
        accident.moved_s, len(recovery.gaps_s), min(recovery.gaps_s, default=0.0), recovery.p50_s, recovery.max_s)


def pods_by_pid(views: Sequence[PodView]) -> dict[int, str]:
    """The pods' names, for a ledger that knows process ids."""
    return {view.pid: view.pod for view in views if view.pid}
