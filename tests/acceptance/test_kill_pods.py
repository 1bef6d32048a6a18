"""kill -9 of pods at random, judged from the ledger and the client's own log: C1, C2, C3, E1, E3, L1 and R5 hold.

TOQUE_CHAOS_SEED repeats a run; TOQUE_FULL=1 runs the form without a supervisor at its full length.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest
from acceptance.stack import FULL, RunAsync, Stack

from toque.chaos.kill_pods import KillPods, Outcome, kill_pods
from toque.client import Client

pytestmark = pytest.mark.timeout(240)

TTL_S = 5.0
WITHIN_S = TTL_S + 2.0


def seed() -> int:
    return int(os.environ.get("TOQUE_CHAOS_SEED") or random.SystemRandom().randrange(1_000_000))


def assert_outcome(stack: Stack, outcome: Outcome) -> None:
    for line in outcome.lines():
        stack.say(line)
    assert outcome.holds, "\n".join(outcome.lines())


def test_five_kills_lose_nothing_and_repeat_nothing(stack: Stack, run_async: RunAsync) -> None:
    """1,000 instances × 5 steps on 3 supervised pods: nothing is lost or done twice, and cut work goes on at once."""
    options = KillPods(seed=seed(), within_s=WITHIN_S)

    async def scenario() -> None:
        async with stack.running(pods=3, ttl_s=TTL_S) as (cluster, client):
            outcome = await kill_pods(options, client=client, kill=cluster.kill_pod, ledger=stack.ledger,
                                      log=stack.directory / "ops.jsonl", say=stack.say)
            assert_outcome(stack, outcome)

    run_async(scenario(), timeout_s=200)


def test_a_death_that_nobody_sees_costs_the_ttl(stack: Stack, run_async: RunAsync) -> None:
    """Without a supervisor nobody ends the dead session: the others find out by themselves, within TTL + 2 s.

    Short form: 400 instances and 2 kills; with TOQUE_FULL=1 1,000 instances and 5 kills.
    """
    instances, kills = (1000, 5) if FULL else (400, 2)
    options = KillPods(seed=seed(), within_s=WITHIN_S, instances=instances, kills=kills, limit=16, callback_ms=100)

    async def scenario() -> None:
        async with stack.server() as server, Client.connect(server.url) as client:
            for number in (1, 2, 3):
                await stack.worker(f"pod-{number}", server, "--ttl", f"{TTL_S}s")
            await stack.serving(client, "pod-1", "pod-2", "pod-3")
            replacements: list[asyncio.Task[object]] = []

            def kill(pod: str) -> int:
                """Kill it, and let another pod of another name take its place: nobody knows that the first is dead."""
                stack.workers[pod].send(signal.SIGKILL)
                name = f"pod-{len(stack.workers) + len(replacements) + 1}"
                replacements.append(asyncio.ensure_future(stack.worker(name, server, "--ttl", f"{TTL_S}s")))
                return stack.workers[pod].pid

            outcome = await kill_pods(options, client=client, kill=kill, ledger=stack.ledger,
                                      log=stack.directory / "ops.jsonl", say=stack.say)
            await asyncio.gather(*replacements)
            assert_outcome(stack, outcome)

    run_async(scenario(), timeout_s=200)
