"""How each kind of fault is made and healed. Whatever interrupts a strike, what it did is undone, but for deaths."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from toque.chaos import partition, processes
from toque.chaos.cgroups import Cgroup
from toque.chaos.faults import Fault, Kind
from toque.chaos.ledger import LedgerClient
from toque.chaos.links import Manner, Way
from toque.chaos.pairing import KILLED
from toque.chaos.progress import Progress
from toque.chaos.topology import PodSeen, Topology

POLL_S = 0.05
INSIDE_POLL_S = 0.002
INSIDE_S_MAX = 5.0
BACK_S_MAX = 40.0  # until a pod that was away has stations again
ANSWERS_S_MAX = 60.0
DIES_S_MAX = 30.0
DELAY_S = (0.05, 0.5)
DRIP_BYTES_PER_S = (2_000, 40_000)
OOM_BYTES = 4 * 1024 * 1024  # for all that a pod asks for anew
CPU_SHARE = (0.02, 0.15)


class Injected(msgspec.Struct):
    """One fault that was made. Times are CLOCK_MONOTONIC in nanoseconds."""

    fault: Fault
    pod: str = ""
    pid: int = 0
    stations: list[str] = []
    session: str = ""
    begun_ns: int = 0
    ended_ns: int = 0
    """When it was healed; of a death, when it happened."""
    answered_ns: int = 0
    """Of the server: when it answered a client again."""
    held_by_others: int = 0
    """Slots that the other pods were leased when it began."""
    session_after: str = ""
    """Of the pod, once it had stations again; empty when it was not seen."""

    @property
    def lasted_s(self) -> float:
        return (self.ended_ns - self.begun_ns) / 1e9

    @property
    def owned_zero(self) -> bool:
        return any(station.endswith(".0") for station in self.stations)

    @property
    def came_back(self) -> bool:
        return bool(self.session_after)

    @property
    def lost_session(self) -> bool:
        return self.came_back and self.session_after != self.session


@dataclass(frozen=True)
class Hands:
    """What strikes work with."""

    topology: Topology
    progress: Progress
    reporter: LedgerClient
    """Reports the scenario's own marks to the ledger."""

    async def until_inside(self, pid: int) -> None:
        """Wait until the pod is inside a callback; not for ever. No await comes between the look and the return."""
        deadline = time.monotonic() + INSIDE_S_MAX
        while not self.progress.read().is_inside(pid) and time.monotonic() < deadline:
            await asyncio.sleep(INSIDE_POLL_S)


Strike = Callable[[Fault, PodSeen, Injected, Hands], Awaitable[None]]


# -- processes ---------------------------------------------------------------------------------------------------------

async def kill_pod(fault: Fault, victim: PodSeen, out: Injected, hands: Hands) -> None:
    await hands.until_inside(victim.pid)
    out.begun_ns = time.monotonic_ns()
    hands.topology.send(victim.pid, signal.SIGKILL)
    hands.reporter.mark(KILLED, pod=victim.pod, pid=victim.pid)
    out.ended_ns = time.monotonic_ns()


async def stop_pod(fault: Fault, victim: PodSeen, out: Injected, hands: Hands) -> None:
    await hands.until_inside(victim.pid)
    out.begun_ns = time.monotonic_ns()
    hands.topology.send(victim.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        out.ended_ns = time.monotonic_ns()  # before it runs on: what it does from then on is judged
        hands.topology.send(victim.pid, signal.SIGCONT)


async def end_server(fault: Fault, victim: PodSeen, out: Injected, hands: Hands) -> None:
    out.pid = hands.topology.server_pid()
    out.begun_ns = time.monotonic_ns()
    hands.topology.send(out.pid, signal.SIGKILL if fault.kind is Kind.KILL_SERVER else signal.SIGTERM)
    while processes.is_alive(out.pid):
        await asyncio.sleep(POLL_S)
    out.answered_ns = out.ended_ns = await hands.topology.until_answers(ANSWERS_S_MAX)


async def stop_server(fault: Fault, victim: PodSeen, out: Injected, hands: Hands) -> None:
    out.pid = hands.topology.server_pid()
    out.begun_ns = time.monotonic_ns()
    hands.topology.send(out.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        hands.topology.send(out.pid, signal.SIGCONT)
    out.answered_ns = out.ended_ns = await hands.topology.until_answers(ANSWERS_S_MAX)


# -- network -----------------------------------------------------------------------------------------------------------

async def bend_link(fault: Fault, victim: PodSeen, out: Injected, hands: Hands) -> None:
    link = hands.topology.links[victim.pod]
    out.begun_ns = time.monotonic_ns()
    link.set(manner_of(fault))
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        link.set(Manner())
        out.ended_ns = time.monotonic_ns()


def manner_of(fault: Fault) -> Manner:
    """What the fault makes of a link."""
    match fault.kind:
        case Kind.SLOW_LINK:
            return Manner(Way.DELAY, delay_s=_between(DELAY_S, fault.strength))
        case Kind.DRIPPING_LINK:
            return Manner(Way.DRIP, bytes_per_s=int(_between(DRIP_BYTES_PER_S, fault.strength)))
        case Kind.CUT_LINK:
            return Manner(Way.CUT)
        case _:
            return Manner(Way.HALF_OPEN)


async def part(fault: Fault, victim: PodSeen, out: Injected, hands: Hands) -> None:
    address, port = hands.topology.addresses[victim.pod], hands.topology.server_port
    to_server, to_pod = fault.kind is not Kind.DEAF_POD, fault.kind is not Kind.MUTE_POD
    out.begun_ns = time.monotonic_ns()
    partition.drop(address, port, to_server=to_server, to_pod=to_pod)
    try:
        await asyncio.sleep(fault.lasts_s)
    finally:
        partition.let_through(address, port, to_server=to_server, to_pod=to_pod)
        out.ended_ns = time.monotonic_ns()


# -- control groups ----------------------------------------------------------------------------------------------------

async def exhaust_memory(fault: Fault, victim: PodSeen, out: Injected, hands: Hands) -> None:
    """Bound what the pod asks for anew, until the kernel kills it. Nothing is marked when it lives on."""
    await hands.until_inside(victim.pid)
    group = Cgroup("memory")
    try:
        group.limit_memory(OOM_BYTES)
        out.begun_ns = time.monotonic_ns()
        group.add(victim.pid)
        deadline = time.monotonic() + DIES_S_MAX
        while processes.is_alive(victim.pid) and time.monotonic() < deadline:
            await asyncio.sleep(INSIDE_POLL_S)
        if not processes.is_alive(victim.pid):
            hands.reporter.mark(KILLED, pod=victim.pod, pid=victim.pid)
            out.ended_ns = time.monotonic_ns()
    finally:
        group.close()


async def starve(fault: Fault, victim: PodSeen, out: Injected, hands: Hands) -> None:
    """Nothing counts as done when the pod never had to wait for its share."""
    group = Cgroup("cpu")
    try:
        group.limit_cpu(_between(CPU_SHARE, fault.strength))
        out.begun_ns = time.monotonic_ns()
        group.add(victim.pid)
        await asyncio.sleep(fault.lasts_s)
        if group.throttled():
            out.ended_ns = time.monotonic_ns()
    finally:
        group.close()


def _between(bounds: tuple[float, float], share: float) -> float:
    low, high = bounds
    return low + (high - low) * share


STRIKES: dict[Kind, Strike] = {
    Kind.KILL_POD: kill_pod,
    Kind.STOP_POD: stop_pod,
    Kind.KILL_SERVER: end_server,
    Kind.END_SERVER: end_server,
    Kind.STOP_SERVER: stop_server,
    Kind.SLOW_LINK: bend_link,
    Kind.DRIPPING_LINK: bend_link,
    Kind.CUT_LINK: bend_link,
    Kind.SILENT_LINK: bend_link,
    Kind.PARTITION: part,
    Kind.DEAF_POD: part,
    Kind.MUTE_POD: part,
    Kind.OOM: exhaust_memory,
    Kind.STARVE: starve,
}
