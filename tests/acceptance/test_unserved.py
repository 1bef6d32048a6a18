"""A workflow that no pod serves just now: every report says so, creations are kept, and the next pod runs them."""

from __future__ import annotations

import asyncio
import signal

import pytest
from acceptance.stack import RunAsync, Stack, eventually, toque

from toque.chaos.five_steps import WORKFLOW, Order, result_of
from toque.client import Client

pytestmark = pytest.mark.timeout(90)


def test_an_unserved_workflow_is_said_so_and_keeps_its_queue(stack: Stack, run_async: RunAsync) -> None:
    """`workflows`, `queues` and `trigger` say that no pod serves it; what was created runs when one does."""

    async def scenario() -> None:
        async with stack.server() as server, Client.connect(server.url) as client:
            pod = await stack.worker("pod", server)
            await stack.serving(client, "pod")
            pod.send(signal.SIGTERM)
            assert await pod.exit_code() == 0

            async def said(*arguments: str) -> tuple[str, str]:
                done = await asyncio.to_thread(lambda: toque(*arguments, "--nats", server.url))
                assert done.returncode == 0, done
                return done.stdout, done.stderr

            workflows, _ = await said("workflows")
            created, warned = await said("trigger", WORKFLOW, '{"number": 7}')
            queues, queued = await said("queues")
            nobody, no_pods = await said("pods")

            assert workflows.splitlines()[1].split(maxsplit=1) == [WORKFLOW, "no pod serves it"]
            assert warned == (f"toque: no pod serves the workflow '{WORKFLOW}' just now; what is created stays queued "
                              "until one does: `toque worker APP --account main`\n")
            assert queues.splitlines()[1].split()[:2] == [WORKFLOW, "1"]
            assert queued == (f"no pod serves the workflow '{WORKFLOW}': what is queued waits until one does; start one "
                              "with `toque worker APP --account main`\n")
            assert not nobody and no_pods.startswith("no pods serve the account 'main'; start one with")
            await stack.worker("pod", server)
            assert await client.handle(WORKFLOW, created.strip()).result("20 seconds") == result_of(Order(7))
            await eventually(lambda: stack.said("pod serves", "pod"))

    run_async(scenario(), timeout_s=80)
