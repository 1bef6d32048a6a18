"""What a scenario runs against: a client, a ledger, the pods that answer, and the ways to lay hands on their processes.

Pods are found by the host and process id that they report themselves. Faults need processes of this host; what cannot
be done is refused with a sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toque.chaos import processes
from toque.chaos.cgroups import Cgroup, CgroupsAway
from toque.chaos.faults import OF_CGROUP, OF_LINK, OF_NETWORK, OF_SERVER, Kind
from toque.chaos.links import Link
from toque.client import Client, Connecting
from toque.errors import SetupError, ToqueError, Unavailable

POLL_S = 0.1
ANSWER_POLL_S = 0.02
ANSWER_S_MAX = 1.0
PODS_S_MAX = 60.0  # until two pods answer, so that one can be lost
PODS_MIN = 2
TOQUE_MARK = "toque"  # stands in the command line of every pod


class Refused(SetupError):
    """The fault cannot be made here; the message says why, and what would help."""


@dataclass(frozen=True)
class LedgerAt:
    """A running ledger: where to report, and where it writes."""

    socket: Path
    file: Path


@dataclass(frozen=True)
class PodSeen:
    """A pod as it reported itself."""

    pod: str
    pid: int
    session: str
    stations: list[str]
    slots_leased: int
    tasks: int = 0
    """Of asyncio, where they were counted."""

    @property
    def owns_zero(self) -> bool:
        return any(station.endswith(".0") for station in self.stations)


@dataclass
class Topology:
    """See the module."""

    client: Client
    connect: Callable[[], Connecting]
    """Makes one more client, which remembers nothing of what others were told."""
    url: str
    ledger: LedgerAt
    ttl_s: float
    server_pid: Callable[[], int]
    """The nats-server's process on this host; 0 = none."""
    links: Mapping[str, Link] = field(default_factory=dict)
    """Pod → its own way to the server, if it has one."""
    addresses: Mapping[str, str] = field(default_factory=dict)
    """Pod → the address by which it alone reaches the server, in a namespace of this run."""
    server_port: int = 0
    monitor_url: str = ""
    """The server's HTTP monitor, if it is known."""
    pods_wanted: int = PODS_MIN
    """How many there are when none is lost."""
    stores: Sequence[Path] = ()
    """Directories in which the pods keep their local stores, as far as they are known."""
    restart_log: Path | None = None
    """Killed processes are started again by the scenario, and write here; None = somebody else starts them again."""
    host: str = field(default_factory=socket.gethostname)

    async def pods(self, *, count_tasks: bool = False) -> list[PodSeen]:
        """The pods that answer and have stations, by name. Empty while the server does not answer."""
        try:
            views = await self.client.pods(count_tasks=count_tasks)
        except Unavailable:
            return []
        return [PodSeen(view.pod, view.pid if view.host == self.host else 0, view.session, list(view.stations),
                        view.slots_leased, view.tasks) for view in views if view.stations]

    async def living(self) -> list[PodSeen]:
        """Once there are two pods at least, and an owner of station 0. Raises Unavailable when there never are."""
        deadline = time.monotonic() + PODS_S_MAX
        while time.monotonic() < deadline:
            pods = await self.pods()
            if len(pods) >= PODS_MIN and any(pod.owns_zero for pod in pods):
                return pods
            await asyncio.sleep(POLL_S)
        raise Unavailable(f"there are no {PODS_MIN} pods with stations after {PODS_S_MAX:g} s")

    async def until_back(self, pod: str, within_s: float, *, not_as: str = "") -> PodSeen | None:
        """Wait until the pod answers with stations, under another session than `not_as`; None: not in time."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            for seen in await self.pods():
                if seen.pod == pod and seen.session != not_as:
                    return seen
            await asyncio.sleep(POLL_S)
        return None

    async def until_answers(self, within_s: float) -> int:
        """Wait until JetStream answers a client; when that was. Raises Unavailable when it does not in time."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            with contextlib.suppress(ToqueError, TimeoutError):
                async with asyncio.timeout(ANSWER_S_MAX):
                    await self.client.accounts.describe(self.client.account)
                return time.monotonic_ns()
            await asyncio.sleep(ANSWER_POLL_S)
        raise Unavailable(f"the server at {self.url} does not answer again after {within_s:g} s")

    # -- hands ---------------------------------------------------------------------------------------------------------

    async def check(self, kinds: frozenset[Kind]) -> None:
        """Whether faults of these kinds can be made at all. Raises Refused."""
        if kinds & OF_SERVER and not self.server_pid():
            raise Refused(f"the nats-server at {self.url} is no process of this host (or not ours to see): run this "
                          "scenario where the server runs")
        if kinds & OF_LINK and not self.links:
            raise Refused("the pods do not reach the server through links of this scenario: run it without --nats, "
                          "with a cluster of its own")
        if kinds & OF_NETWORK and not self.addresses:
            raise Refused("the pods do not live in a network namespace of this scenario: run it without --nats, with a "
                          "cluster of its own, as root")
        if kinds & OF_CGROUP:
            _check_cgroups(kinds)
        for pod in await self.living():
            if kinds - OF_SERVER:
                self.check_pod(pod)

    def check_pod(self, pod: PodSeen) -> None:
        """Whether its process is on this host and looks like a pod. Raises Refused."""
        if not pod.pid or not processes.is_alive(pod.pid):
            raise Refused(f"{pod.pod} is no process of this host ({self.host}): run this scenario on the pods' host, in "
                          "their process namespace")
        if TOQUE_MARK not in processes.command_of(pod.pid):
            raise Refused(f"process {pod.pid}, which {pod.pod} says to be, does not look like a pod of Toque here")

    def send(self, pid: int, sig: signal.Signals) -> None:
        """A signal to a process. A killed one is started again by the scenario, if it is to."""
        deadly = sig in (signal.SIGKILL, signal.SIGTERM)
        launch = processes.Launch.of(pid) if deadly and self.restart_log is not None else None
        os.kill(pid, sig)
        if launch is not None and self.restart_log is not None:
            launch_when_gone(pid, launch, self.restart_log)


_launching: set[asyncio.Task[None]] = set()


def launch_when_gone(pid: int, launch: processes.Launch, log: Path) -> None:
    """Start the process again as soon as the old one is gone."""

    async def wait_and_launch() -> None:
        while processes.is_alive(pid):
            await asyncio.sleep(POLL_S)
        launch.again(log)

    task = asyncio.ensure_future(wait_and_launch())
    _launching.add(task)
    task.add_done_callback(_launching.discard)


def _check_cgroups(kinds: frozenset[Kind]) -> None:
    try:
        for controller in {"memory" if kind is Kind.OOM else "cpu" for kind in kinds & OF_CGROUP}:
            Cgroup(controller).close()
    except CgroupsAway as error:
        raise Refused(f"{error}: this scenario needs root and writable control groups") from error
