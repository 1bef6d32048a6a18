"""Pause, resume, restart, delete and retention on the real stack, over a kill -9: an acknowledged one holds."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from acceptance.stack import APPS, RunAsync, Said, Stack, eventually, toque

from toque.chaos.load import set_limit
from toque.client import Client
from toque.errors import InstanceNotFound

pytestmark = pytest.mark.timeout(150)

KITCHEN = str(APPS / "kitchen.py")
NAP_S = 4.0
KEPT_S = 2.0
PAUSED = ["asleep", "inside", "queued"]
NOT_YET = [("asleep", "after"), ("inside", "gate"), ("queued", "first")]


class Operator:
    """Somebody with a terminal."""

    def __init__(self, url: str) -> None:
        self._url = url

    def instances(self, *arguments: str, code: int = 0) -> Said:
        done = toque("instances", *arguments, "--nats", self._url)
        assert done.returncode == code, done.stdout + done.stderr
        return Said(done.returncode, done.stdout, done.stderr)

    def listed(self) -> dict[str, str]:
        """Status by id."""
        return {row["id"]: row["status"] for row in json.loads(self.instances("list", "-o", "json").out)}


def entered(stack: Stack, instance: str, step: str) -> int:
    """How often a callback of it was entered."""
    return sum((visit.key.instance, visit.step) == (instance, step) for visit in stack.ledgered().visits)


async def one_each(stack: Stack, client: Client, gate: Path) -> None:
    """With a limit of one: an instance that sleeps, one inside a callback, one in the queue."""
    await set_limit(client, 1)
    await client.create("sleeper", f"{NAP_S} seconds", id="asleep")
    await eventually(lambda: has_status(client, "sleeper", "asleep", "waiting"))
    await client.create("gated", str(gate), id="inside")
    await eventually(lambda: entered(stack, "inside", "gate"))
    await client.create("gated", str(gate), id="queued")


async def has_status(client: Client, workflow: str, instance: str, status: str) -> bool:
    return (await client.handle(workflow, instance).status()).status == status


def test_an_operator_steers_over_a_kill(stack: Stack, tmp_path: Path, run_async: RunAsync) -> None:
    """One pod, killed while everything is paused: nothing goes on until it is resumed. Then one is done again from a step,
    one is deleted, and one is gone when its retention is over."""
    gate = tmp_path / "gate"

    async def scenario() -> None:
        async with stack.server() as server, Client.connect(server.url) as client:
            operator = Operator(server.url)
            pod = await stack.worker("only", server, app=KITCHEN)
            await stack.serving(client, "only")
            await one_each(stack, client, gate)

            assert operator.instances("pause", *PAUSED).out.splitlines() == [
                "paused sleeper/asleep", "paused gated/inside", "paused gated/queued"]
            assert operator.listed() == {"asleep": "paused", "inside": "waitingForPause", "queued": "paused"}
            pod.send(signal.SIGKILL)
            await pod.exit_code()
            gate.touch()
            await stack.worker("only", server, app=KITCHEN)
            await stack.serving(client, "only")
            await eventually(lambda: has_status(client, "gated", "inside", "paused"))
            clock = await client.create("sleeper", f"{NAP_S} seconds", id="clock")
            await clock.result("20 seconds")  # the pod works, and a sleep as long as theirs is over
            assert operator.listed() == {**dict.fromkeys(PAUSED, "paused"), "clock": "complete"}
            assert [entered(stack, *what) for what in NOT_YET] == [0, 1, 0]

            operator.instances("resume", "--all")
            assert await client.handle("gated", "inside").result("20 seconds") == "attempt 2"
            assert await client.handle("gated", "queued").result("20 seconds") == "attempt 1"
            await client.handle("sleeper", "asleep").result("20 seconds")
            assert (entered(stack, "asleep", "before"), entered(stack, "asleep", "after")) == (1, 1)

            operator.instances("restart", "inside", "--from", "gate")
            assert await client.handle("gated", "inside").result("20 seconds") == "attempt 1"
            assert (entered(stack, "inside", "first"), entered(stack, "inside", "gate")) == (1, 3)

            assert operator.instances("delete", "queued", "none", "-w", "gated", code=1).out == "deleted gated/queued\n"
            assert operator.listed() == {"asleep": "complete", "inside": "complete", "clock": "complete"}

    run_async(scenario(), timeout_s=140)


def test_what_has_ended_is_really_deleted(stack: Stack, run_async: RunAsync) -> None:
    """Two seconds after its end, and not before; those that are kept longer stay."""

    async def scenario() -> None:
        async with stack.server() as server, Client.connect(server.url) as client:
            operator = Operator(server.url)
            await stack.worker("only", server, app=KITCHEN)
            await stack.serving(client, "only")
            await client.create("sleeper", "0 seconds", id="kept")
            made = toque("trigger", "sleeper", '"0 seconds"', "--id", "short", "--keep-success", f"{KEPT_S} seconds",
                         "--nats", server.url)
            assert made.returncode == 0, made.stderr
            short = client.handle("sleeper", "short")
            await short.result("20 seconds")
            ended_at = (await short.status()).ended_at
            assert ended_at is not None

            async def is_gone() -> bool:
                try:
                    await short.status()
                except InstanceNotFound:
                    return True
                return False

            await eventually(is_gone, within_s=10.0)
            assert time.time() >= ended_at.timestamp() + KEPT_S
            assert operator.listed() == {"kept": "complete"}

    run_async(scenario(), timeout_s=100)
