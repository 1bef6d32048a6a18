"""A pod stopped (SIGSTOP) for three times its TTL and continued: others did its work, and what it still says is lost.

What happened inside the stopped process cannot be undone, so its window is left out of the judgement: from the stop
until it has stations again. Its callbacks count as cut at the stop.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import pytest
from acceptance.load import Load
from acceptance.stack import RunAsync, Stack, assert_holds, eventually

from toque.chaos.ledger import ENTER, EXIT, MARK, Entry
from toque.chaos.ledger_checks import check_l1
from toque.chaos.pairing import KILLED, pair
from toque.chaos.recovery import check_recovery
from toque.client import Client

pytestmark = pytest.mark.timeout(120)

TTL_S = 2.0
LIMIT = 20
RUNNING_LATE_MAX = 3  # callbacks whose gates were passed before the stop, and that report their entry after it


@dataclass(frozen=True)
class Window:
    """When a process was stopped, continued, and had stations again; CLOCK_MONOTONIC."""

    pid: int
    stopped_ns: int
    continued_ns: int
    back_ns: int

    def has(self, entry: Entry) -> bool:
        return entry.pid == self.pid and self.stopped_ns < entry.at_ns <= self.back_ns


def without(entries: Sequence[Entry], window: Window) -> list[Entry]:
    """The ledger as if the process had been killed at the stop, and another one had come back for it."""
    open_at_stop: set[tuple[str, str, int]] = set()
    judged = [Entry(window.stopped_ns, 0, MARK, pid=window.pid, note=KILLED)]
    for entry in entries:
        place = (entry.instance, entry.step, entry.attempt)
        if window.has(entry):
            if entry.kind == EXIT:
                open_at_stop.discard(place)
        elif entry.pid == window.pid and entry.at_ns > window.back_ns:
            if entry.kind == EXIT and place in open_at_stop:
                open_at_stop.discard(place)  # a late exit of a callback that was inside at the stop
            else:
                judged.append(msgspec.structs.replace(entry, pid=-entry.pid, connection=-entry.connection))
        else:
            judged.append(entry)
            if entry.pid == window.pid and entry.kind == ENTER:
                open_at_stop.add(place)
            elif entry.pid == window.pid and entry.kind == EXIT:
                open_at_stop.discard(place)
    return sorted(judged, key=lambda entry: entry.at_ns)


async def loses_its_stations(client: Client, pod: str) -> bool:
    owners = {report.pod for report in await client.stations()}
    return pod not in owners and "" not in owners


def test_a_stopped_pod_loses_its_work_and_comes_back(stack: Stack, run_async: RunAsync) -> None:
    """Its instances go on elsewhere within TTL + 2 s, its late results count for nothing, and it serves again."""

    async def scenario() -> None:
        load = Load(stack, callback_ms=60)
        async with stack.running(pods=2, ttl_s=TTL_S) as (cluster, client):
            await load.create(client, 700, limit=LIMIT)
            await load.until_left(300)
            victim = stack.ledgered().visits[-1].pod

            pid = cluster.kill_pod(victim, signal.SIGSTOP)
            stopped_ns = time.monotonic_ns()
            await eventually(lambda: loses_its_stations(client, victim), within_s=TTL_S + 4)
            await eventually(lambda: time.monotonic_ns() >= stopped_ns + 3 * TTL_S * 1e9)
            cluster.kill_pod(victim, signal.SIGCONT)
            continued_ns = time.monotonic_ns()

            async def serves_again() -> bool:
                return any(view.pod == victim and view.stations for view in await client.pods())

            await eventually(serves_again)
            window = Window(pid, stopped_ns, continued_ns, time.monotonic_ns())
            await load.results(client)
            entries = stack.entries()
            ledger = pair(without(entries, window))
            assert sum(entry.kind == ENTER for entry in entries if window.has(entry)) <= RUNNING_LATE_MAX
            assert [visit for visit in ledger.cut if visit.pid == pid], "nothing was inside of it when it was stopped"
            assert any(visit.pod == victim and visit.entered_ns > window.back_ns for visit in ledger.visits)
            load.assert_nothing_lost(ledger)
            assert_holds(check_l1(ledger, limit=LIMIT), check_recovery(ledger, within_s=TTL_S + 2))

    run_async(scenario(), timeout_s=110)
