"""SIGTERM of one pod among two: it hands over, repeats nothing that is done, and cuts only what outlasts its grace."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from acceptance.load import Load
from acceptance.stack import APPS, WORK, RunAsync, Stack, eventually

from toque.client import Client

pytestmark = pytest.mark.timeout(120)

GRACE_S = 2.0
EXIT_MARGIN_S = 2.0


def test_a_pod_that_ends_in_order_repeats_nothing(stack: Stack, run_async: RunAsync) -> None:
    """300 instances, SIGTERM to one pod in their middle: exit 0 within the grace, and each step was done exactly once."""

    async def scenario() -> None:
        load = Load(stack, callback_ms=50)
        async with stack.server() as server, Client.connect(server.url) as client:
            leaver = await stack.worker("leaver", server)
            await stack.worker("stayer", server)
            await stack.serving(client, "leaver", "stayer")
            await load.create(client, 300, limit=20)
            await load.until_left(300)

            leaver.send(signal.SIGTERM)
            began = time.monotonic()
            code, took_s = await leaver.exit_code(), time.monotonic() - began

            assert (code, took_s < 25.0) == (0, True)
            await load.results(client)
            assert {visit.pod for visit in stack.ledgered().visits} == {"leaver", "stayer"}
            load.assert_nothing_lost()
            load.assert_each_step_once()

    run_async(scenario(), timeout_s=110)


def test_only_what_outlasts_the_grace_is_cut(stack: Stack, tmp_path: Path, run_async: RunAsync) -> None:
    """A callback longer than --grace is cut by the exit and done again elsewhere; all others are done once."""
    gate = tmp_path / "gate"
    app = str(APPS / "kitchen.py")

    async def scenario() -> None:
        load = Load(stack, callback_ms=50)
        async with stack.server() as server, Client.connect(server.url) as client:
            for name in ("one", "two"):
                await stack.worker(name, server, "--grace", f"{GRACE_S}s", app=app)
            await stack.serving(client, "one", "two")
            handle = await client.create("gated", str(gate))
            await eventually(lambda: [visit for visit in stack.ledgered().visits if visit.step == "gate"])
            leaver = stack.workers[next(visit.pod for visit in stack.ledgered().visits if visit.step == "gate")]
            await load.create(client, 400, limit=20)
            await load.until_left(300)

            leaver.send(signal.SIGTERM)
            began = time.monotonic()
            code, took_s = await leaver.exit_code(), time.monotonic() - began

            assert code == 0
            assert GRACE_S - 0.1 <= took_s <= GRACE_S + EXIT_MARGIN_S
            gate.touch()
            assert await handle.result("20 seconds") == "attempt 2"
            await load.results(client)
            gates = [(visit.pod == leaver.name, visit.outcome) for visit in stack.ledgered().visits
                     if visit.step == "gate"]
            assert [elsewhere for elsewhere, _ in gates] == [True, False] and gates[0][1] != "ok"
            load.assert_nothing_lost()
            load.assert_each_step_once()

    run_async(scenario(), timeout_s=110)


def test_a_lone_pod_hands_over_to_its_next_start(stack: Stack, run_async: RunAsync) -> None:
    """SIGTERM of the only pod, and a start in the same directory: it goes on, and each step was done exactly once."""

    async def scenario() -> None:
        load = Load(stack, callback_ms=50)
        async with stack.server() as server, Client.connect(server.url) as client:
            lone = await stack.worker("lone", server, app=WORK)
            await stack.serving(client, "lone")
            await load.create(client, 150, limit=20)
            await load.until_left(100)

            lone.send(signal.SIGTERM)

            assert await lone.exit_code() == 0
            await stack.worker("lone", server, app=WORK)
            await load.results(client)
            load.assert_nothing_lost()
            load.assert_each_step_once()

    run_async(scenario(), timeout_s=110)
