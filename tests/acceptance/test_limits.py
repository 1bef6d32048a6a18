"""The account's limit under load, seen from outside: a sweep line over the ledger. Sleepers hold no slot."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from acceptance.load import Load
from acceptance.stack import APPS, RunAsync, Stack, assert_holds, eventually, toque

from toque.chaos.five_steps import STEPS
from toque.chaos.ledger_checks import check_l1
from toque.chaos.load import set_limit
from toque.chaos.pairing import Ledgered, Visit
from toque.chaos.verdicts import InstanceKey
from toque.client import Client, NewInstance

pytestmark = pytest.mark.timeout(120)

BUSY_MIN = 0.6  # of the slots, while work waits: the rest is the commits between two steps
SLEEPERS = 50
SLEEP_S = 3.0
SLEEPERS_S_MAX = 10.0


def limit_by_hand(url: str, limit: int) -> None:
    """`toque accounts set`, as an operator does it."""
    done = toque("accounts", "set", "main", "--max-concurrent", str(limit), "--nats", url)
    assert done.returncode == 0, done.stderr


def most_inside(visits: list[Visit], *, after_ns: int) -> int:
    """The most instances inside callbacks at one time, at a moment after `after_ns`."""
    verdict = check_l1(Ledgered([visit for visit in visits if visit.left_ns > after_ns], [], []), limit=0)
    return int(verdict.note.split()[2])


def busy_share(visits: list[Visit], limit: int) -> float:
    """How much of the slots' time was spent inside callbacks, from the first entry to the last exit."""
    inside_ns = sum(visit.left_ns - visit.entered_ns for visit in visits)
    lasted_ns = max(visit.left_ns for visit in visits) - min(visit.entered_ns for visit in visits)
    return inside_ns / (lasted_ns * limit)


def test_a_limit_holds_and_is_used_up(stack: Stack, run_async: RunAsync) -> None:
    """Limit 3 on two pods: never more than 3 instances inside, and rarely fewer while work waits."""

    async def scenario() -> None:
        load = Load(stack, callback_ms=50)
        async with stack.running(pods=2) as (cluster, client):
            limit_by_hand(cluster.url, 3)
            await load.create(client, 40, limit=3)
            await load.results(client)

            ledger = stack.ledgered()
            assert_holds(check_l1(ledger, limit=3))
            assert busy_share(ledger.visits, 3) >= BUSY_MIN
            load.assert_each_step_once()

    run_async(scenario(), timeout_s=110)


def test_a_limit_is_changed_under_load(stack: Stack, run_async: RunAsync) -> None:
    """Raised live, more instances run within seconds; lowered live, none begins above it, and those inside end."""

    async def scenario() -> None:
        load = Load(stack, callback_ms=50)
        async with stack.running(pods=2) as (cluster, client):
            await load.create(client, 400, limit=3)
            await load.until_left(30)
            assert_holds(check_l1(stack.ledgered(), limit=3))

            limit_by_hand(cluster.url, 24)
            await eventually(lambda: most_inside(stack.ledgered().visits, after_ns=0) == 24)
            limit_by_hand(cluster.url, 3)
            await leased_at_most(client, 3)
            lowered_ns = time.monotonic_ns()
            await load.until_left(len(stack.ledgered().visits) + 30)
            raised_ns = time.monotonic_ns()
            await set_limit(client, 24)
            await load.results(client)

            visits = stack.ledgered().visits
            begun_lowered = [visit for visit in visits if lowered_ns < visit.entered_ns < raised_ns]
            assert len(begun_lowered) >= 30
            assert_holds(check_l1(Ledgered(begun_lowered, [], []), limit=3), check_l1(stack.ledgered(), limit=24))
            load.assert_each_step_once()

    run_async(scenario(), timeout_s=110)


async def leased_at_most(client: Client, limit: int) -> None:
    """Wait until the pods hold and use no more slots than that."""

    async def lowered() -> bool:
        pods = await client.pods()
        return sum(view.slots_leased for view in pods) <= limit and sum(view.slots_in_use for view in pods) <= limit

    await eventually(lowered)


def test_sleepers_hold_no_slot_and_wake_in_time(stack: Stack, run_async: RunAsync) -> None:
    """Limit 1 and 50 instances that sleep 3 s between two steps: all done in less than 10 s, and none woke early."""

    async def scenario() -> None:
        async with stack.running(str(APPS / "kitchen.py"), pods=2) as (_, client):
            await set_limit(client, 1)
            began = time.monotonic()
            results = await client.create_batch("sleeper", [NewInstance(f"{SLEEP_S} seconds")] * SLEEPERS)
            for result in results:
                await client.handle("sleeper", result.id).result("20 seconds")
            took_s = time.monotonic() - began

            ledger = stack.ledgered()
            slept_s = [(after.entered_ns - before.left_ns) / 1e9 for visits in ledger.by_instance().values()
                       for before, after in pairwise(visits)]
            assert took_s < SLEEPERS_S_MAX
            assert len(slept_s) == SLEEPERS and min(slept_s) >= SLEEP_S
            assert_holds(check_l1(ledger, limit=1))

    run_async(scenario(), timeout_s=110)


def test_a_killed_pods_sleepers_wake_elsewhere(stack: Stack, run_async: RunAsync) -> None:
    """Sleepers of a pod that is killed while they sleep wake in time in another, and their first step is not repeated."""

    async def scenario() -> None:
        async with stack.running(str(APPS / "kitchen.py"), pods=2) as (cluster, client):
            results = await client.create_batch("sleeper", [NewInstance("3 seconds")] * SLEEPERS)
            await eventually(lambda: len([visit for visit in stack.ledgered().visits if visit.left_ns]) == SLEEPERS)

            cluster.kill_pod("pod-1")

            for result in results:
                await client.handle("sleeper", result.id).result("20 seconds")
            visits = stack.ledgered().by_instance().values()
            assert all([visit.step for visit in of_one] == ["before", "after"] for of_one in visits)
            slept_s = [(after.entered_ns - before.left_ns) / 1e9 for before, after in visits]
            assert min(slept_s) >= SLEEP_S and max(slept_s) < SLEEP_S + 5
            assert any(before.pid != after.pid for before, after in visits)

    run_async(scenario(), timeout_s=110)


def test_every_step_is_counted() -> None:
    """The share of busy slots is 1 when nothing is between the callbacks, and the sweep line counts instances."""
    visits = [Visit(InstanceKey("w", f"i{lane}"), step, 1, "", 1, 1, "", 10 * index, 10 * index + 10, "ok")
              for lane in range(3) for index, step in enumerate(STEPS)]

    assert busy_share(visits, 3) == 1
    assert most_inside(visits, after_ns=0) == 3
