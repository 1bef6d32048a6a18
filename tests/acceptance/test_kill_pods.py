"""kill -9 of pods at random, judged from the ledger and the client's own log: every promise of the scenario holds.

TOQUE_CHAOS_SEED repeats a run; TOQUE_FULL=1 runs the form without a supervisor at its full length.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest
from acceptance.stack import FULL, RunAsync, Stack

from toque._cluster import DevCluster
from toque._nats_server import NatsServer
from toque.chaos.catalog import SCENARIOS
from toque.chaos.scenario import Figures, Outcome, RunOptions, run
from toque.chaos.topology import LedgerAt, Topology
from toque.client import Client

pytestmark = pytest.mark.timeout(240)

TTL_S = 5.0


def seed() -> int:
    return int(os.environ.get("TOQUE_CHAOS_SEED") or random.SystemRandom().randrange(1_000_000))


class StackShow:
    """Says it between the lines of the pods."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def say(self, text: str) -> None:
        self._stack.say(text)

    def progress(self, figures: Figures) -> None:
        pass


async def kill_pods(stack: Stack, topology: Topology, options: RunOptions) -> Outcome:
    stack.say(f"seed {options.seed}")
    outcome = await run(SCENARIOS["killing-pods"], options, topology, directory=stack.directory, show=StackShow(stack))
    for line in outcome.lines():
        stack.say(line)
    assert outcome.holds, "\n".join(outcome.lines())
    return outcome


def topology(stack: Stack, client: Client, server: DevCluster | NatsServer) -> Topology:
    return Topology(client=client, connect=lambda: Client.connect(server.url), url=server.url, ttl_s=TTL_S,
                    ledger=LedgerAt(stack.ledger.socket, stack.ledger.file), server_pid=lambda: 0)


def test_five_kills_lose_nothing_and_repeat_nothing(stack: Stack, run_async: RunAsync) -> None:
    """800 instances and more × 5 steps on 3 supervised pods: nothing is lost or done twice, cut work goes on at once."""
    options = RunOptions(seed=seed(), instances=800, limit=60, faults=5)

    async def scenario() -> None:
        async with stack.running(pods=3, ttl_s=TTL_S) as (cluster, client):
            await kill_pods(stack, topology(stack, client, cluster), options)

    run_async(scenario(), timeout_s=200)


def test_a_death_that_nobody_sees_costs_the_ttl(stack: Stack, run_async: RunAsync) -> None:
    """Without a supervisor nobody ends the dead session: the others find out by themselves, within TTL + 2 s.

    Short form: 2 kills; with TOQUE_FULL=1 5 kills.
    """
    options = RunOptions(seed=seed(), instances=300, limit=16, faults=5 if FULL else 2)

    async def replace_the_dead(server: NatsServer) -> None:
        """Another pod of another name takes each dead one's place: nobody knows that the first is dead."""
        replaced: set[str] = set()
        while True:
            for name, worker in list(stack.workers.items()):
                if name not in replaced and not worker.child.alive:
                    assert await worker.child.wait() == -signal.SIGKILL
                    replaced.add(name)
                    await stack.worker(f"pod-{len(stack.workers) + 1}", server, "--ttl", f"{TTL_S}s")
            await asyncio.sleep(0.1)

    async def scenario() -> None:
        async with stack.server() as server, Client.connect(server.url) as client:
            for number in (1, 2, 3):
                await stack.worker(f"pod-{number}", server, "--ttl", f"{TTL_S}s")
            await stack.serving(client, "pod-1", "pod-2", "pod-3")
            replacing = asyncio.ensure_future(replace_the_dead(server))
            try:
                outcome = await kill_pods(stack, topology(stack, client, server), options)
            finally:
                replacing.cancel()
            assert any(out.owned_zero for out in outcome.injected)

    run_async(scenario(), timeout_s=200)
