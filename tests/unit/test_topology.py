"""What can be laid hands on, and what is refused."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from toque.chaos.faults import Fault, Kind
from toque.chaos.nemesis import _victim
from toque.chaos.topology import LedgerAt, PodSeen, Refused, Topology

HOST = "here"


class Pods:
    """A client whose pods say what they are told to say."""

    def __init__(self, *views: SimpleNamespace) -> None:
        self._views = views

    async def pods(self, *, count_tasks: bool = False) -> list[SimpleNamespace]:
        return list(self._views)


def view(pod: str, station: str, *, host: str = HOST, pid: int = 0) -> SimpleNamespace:
    return SimpleNamespace(pod=pod, pid=pid or os.getpid(), host=host, session=f"{pod}-1", stations=[station],
                           slots_leased=3, tasks=0)


def topology(*views: SimpleNamespace, server_pid: int = 0) -> Topology:
    client = Pods(*views)
    return Topology(client=client, connect=lambda: client, url="nats://127.0.0.1:1",  # type: ignore[arg-type, return-value]  # a client of its own kind
                    ledger=LedgerAt(Path("socket"), Path("file")), ttl_s=1.0, server_pid=lambda: server_pid, host=HOST)


def refusal(subject: Topology, *kinds: Kind) -> str:
    with pytest.raises(Refused) as caught:
        asyncio.run(subject.check(frozenset(kinds)))
    return str(caught.value)


ONE, TWO = view("one", "1.0"), view("two", "1.1")


@pytest.mark.parametrize(("kind", "reason"), [
    (Kind.KILL_SERVER, "is no process of this host"),
    (Kind.CUT_LINK, "do not reach the server through links"),
    (Kind.PARTITION, "do not live in a network namespace"),
])
def test_a_fault_without_its_means_is_refused(kind, reason):
    """With a sentence that says what is missing, before anything is done."""
    assert reason in refusal(topology(ONE, TWO), kind)


def test_a_pod_of_another_host_is_refused():
    """Its process id means nothing here."""
    far = view("far", "1.0", host="there")

    assert "far is no process of this host" in refusal(topology(far, TWO), Kind.KILL_POD)


def test_a_process_that_is_no_pod_is_left_alone():
    """A process id that came from somewhere else, a container's say, may be anybody's here."""
    assert "does not look like a pod" in refusal(topology(view("one", "1.0", pid=1), view("two", "1.1", pid=1)),
                                                 Kind.KILL_POD)


def test_a_servers_faults_need_no_pod_on_this_host():
    """Only the server's own process."""
    far = [view("one", "1.0", host="there"), view("two", "1.1", host="there")]

    asyncio.run(topology(*far, server_pid=os.getpid()).check(frozenset({Kind.STOP_SERVER})))


def seen(pod: str, station: str) -> PodSeen:
    return PodSeen(pod, 1, f"{pod}-1", [station], 0)


def test_the_victim_is_the_owner_of_station_zero_or_the_choice_among_names():
    """The same choice hits the same pod, in whatever order they answer."""
    pods = [seen("two", "1.10"), seen("one", "1.1"), seen("zero", "2.0")]

    assert _victim(Fault(0, Kind.KILL_POD, 1, 0.0, owner_of_zero=True), pods).pod == "zero"
    for order in (pods, pods[::-1]):
        assert [_victim(Fault(0, Kind.KILL_POD, 1, choice), order).pod for choice in (0.0, 0.5, 0.99)] == [
            "one", "two", "zero"]
