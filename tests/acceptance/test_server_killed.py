"""kill -9 of nats-server in the middle of the work: what was acknowledged is there, and the pods go on by themselves."""

from __future__ import annotations

import asyncio
import time

import pytest
from acceptance.load import Load
from acceptance.stack import RunAsync, Stack, assert_holds, eventually

from toque.chaos.five_steps import RETRIES
from toque.chaos.ledger_checks import check_e3
from toque.client import Client

pytestmark = pytest.mark.timeout(120)

CREATORS = 4
SHORT_TTL_S = 2.0


def test_pods_go_on_when_the_server_comes_back(stack: Stack, run_async: RunAsync) -> None:
    """300 instances and creations all the while: no pod restarts, nothing acknowledged is lost or done twice."""

    async def scenario() -> None:
        load = Load(stack, callback_ms=50)
        async with stack.running(pods=2) as (cluster, client):
            await load.create(client, 300, limit=20)
            await load.until_left(300)
            before = cluster.server_pid

            cluster.kill_server()
            created = await asyncio.gather(*(load.create_one(client) for _ in range(CREATORS)))

            await eventually(lambda: cluster.server_pid not in (0, before))
            await load.results(client)
            assert all(created)
            assert [pod.restarts for pod in cluster.pods.values()] == [0, 0]
            load.assert_nothing_lost()
            assert_holds(check_e3(stack.ledgered(), retries=RETRIES.limit))

    run_async(scenario(), timeout_s=110)


def test_an_outage_longer_than_the_ttl_loses_nothing(stack: Stack, run_async: RunAsync) -> None:
    """Every session ends meanwhile; the same processes open new ones and go on."""

    async def scenario() -> None:
        load = Load(stack, callback_ms=50)
        async with stack.server() as server, Client.connect(server.url) as client:
            for name in ("one", "two"):
                await stack.worker(name, server, "--ttl", f"{SHORT_TTL_S}s")
            await stack.serving(client, "one", "two")
            await load.create(client, 200, limit=20)
            await load.until_left(300)

            server.kill()
            await server.exited
            down_until = time.monotonic() + 2 * SHORT_TTL_S
            await eventually(lambda: time.monotonic() >= down_until)
            await server.start()

            await load.results(client)
            assert all(worker.child.alive for worker in stack.workers.values())
            load.assert_nothing_lost()

    run_async(scenario(), timeout_s=110)
