"""compose.yaml on a Docker engine, and a server in a container: `make test-containers` builds the image and runs this."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from acceptance.load import Load
from acceptance.stack import RunAsync, Stack, eventually

from toque.chaos.ledger import Ledger
from toque.client import Client
from toque.errors import BrokerUnavailable, ToqueError

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
LEDGER_FILE = "tests/acceptance/compose.ledger.yaml"
PROJECT = f"toque-test-{os.getpid()}"
NATS_IMAGE = os.environ.get("NATS_IMAGE", "nats:2.15")
ANSWER_TIMEOUT = "60 seconds"
PODS = ("pod-1", "pod-2")
WITHIN_S = 10.0 + 2.0  # TTL + 2 s
NATS_PORT = 4222


class Compose:
    """A project of compose.yaml, by whichever Compose is there; with a ledger, of its workflow."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        port = free_port()
        self.url = f"nats://127.0.0.1:{port}"
        self._env = {**os.environ, "NATS_PORT": str(port), "COMPOSE_PROJECT_NAME": PROJECT, "NATS_IMAGE": NATS_IMAGE}
        self._command = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
        if ledger is not None:
            ledger.socket.parent.chmod(0o755)
            ledger.socket.chmod(0o777)  # pods are a user of their own in the container
            self._env |= {"LEDGER": str(ledger.socket.parent), "APP": "toque.chaos.five_steps"}
            self._command += ["-f", "compose.yaml", "-f", LEDGER_FILE]

    def run(self, *arguments: str) -> str:
        return _run([*self._command, *arguments], env=self._env)

    def inspect(self, service: str, what: str) -> int:
        return int(_run(["docker", "inspect", "-f", f"{{{{.State.{what}}}}}", self.run("ps", "-a", "-q", service).strip()]))

    def kill(self, service: str) -> None:
        """`docker kill` of its container; nobody starts it again."""
        self.run("kill", "-s", "SIGKILL", service)


def _run(command: list[str], *, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def compose() -> Iterator[Compose]:
    yield from _up(Compose())


@pytest.fixture
def ledgered(stack: Stack) -> Iterator[Compose]:
    """With the ledger of `stack`."""
    yield from _up(Compose(stack.ledger))


def _up(compose: Compose) -> Iterator[Compose]:
    try:
        compose.run("up", "-d", "--no-build")
        yield compose
    finally:
        print(compose.run("logs", "--no-color"))
        compose.run("down", "-v")


async def answers(url: str) -> bool:
    """Whether a server answers; before it listens, the engine's proxy takes connections and drops them."""
    try:
        async with Client.connect(url):
            return True
    except BrokerUnavailable:
        return False


async def greet(url: str) -> str:
    """Wait until a pod serves the workflow, and have it greet."""
    async with asyncio.timeout(60):
        while True:
            try:
                async with Client.connect(url) as client:
                    if any(report.served for report in await client.workflows()):
                        return str(await (await client.create("hello", "you")).result(ANSWER_TIMEOUT))
            except ToqueError as error:  # the server, or the account, is not there yet
                print(f"not yet: {error}")
            await asyncio.sleep(0.2)


def test_the_composed_cluster_works_and_stops_in_order(compose: Compose) -> None:
    """An instance completes; SIGTERM reaches the pods, which hand over and exit 0; after a restart it goes on."""
    assert asyncio.run(greet(compose.url)) == "Hello, you!"

    compose.run("stop")

    assert [compose.inspect(pod, "ExitCode") for pod in PODS] == [0, 0]
    compose.run("start")
    assert asyncio.run(greet(compose.url)) == "Hello, you!"


def test_a_killed_container_loses_nothing_and_repeats_nothing(ledgered: Compose, stack: Stack, run_async: RunAsync) -> None:
    """One of two pods is killed inside callbacks: C1, C2, C3 and E1 hold, and what was cut goes on within TTL + 2 s."""

    async def scenario() -> None:
        load = Load(stack, callback_ms=100)
        async with Client.connect(ledgered.url) as client:
            await stack.serving(client, *PODS)
            await load.create(client, 300, limit=16)
            await load.until_left(200)

            ledgered.kill(PODS[0])
            await load.results(client, within_s=90.0)

            load.assert_nothing_lost()

    run_async(scenario(), timeout_s=200)
    visits = stack.ledgered().visits
    cut = [visit for visit in visits if visit.outcome != "ok"]
    assert cut and {visit.pod for visit in cut} == {PODS[0]}
    died_ns = min(visit.left_ns for visit in cut)
    again = [visit for visit in visits if visit.entered_ns > died_ns and visit.attempt > 1]
    assert {(visit.key, visit.step) for visit in again} == {(visit.key, visit.step) for visit in cut}
    assert {visit.pod for visit in again} == {PODS[1]}
    gap_s = (min(visit.entered_ns for visit in again) - died_ns) / 1e9
    stack.say(f"{len(cut)} callbacks cut, the first entered again after {gap_s:.1f} s")
    assert gap_s <= WITHIN_S


def test_a_server_killed_in_its_container_keeps_what_it_acknowledged(stack: Stack, run_async: RunAsync) -> None:
    """A pod on the host works for a server in a container, which is killed and started again: nothing is lost."""
    containers = pytest.importorskip("testcontainers.core.container")
    pytest.importorskip("testcontainers.core.config").testcontainers_config.ryuk_disabled = True  # an image more to pull
    port = free_port()
    server: Any = SimpleNamespace(url=f"nats://127.0.0.1:{port}")
    container = containers.DockerContainer(NATS_IMAGE).with_command(f"-js -sd /data -p {NATS_PORT}")
    container.ports = {f"{NATS_PORT}/tcp": ("127.0.0.1", port)}  # its own way to say so is for all interfaces

    async def scenario() -> None:
        load = Load(stack, callback_ms=50)
        await eventually(lambda: answers(server.url))
        async with Client.connect(server.url) as client:
            pod = await stack.worker("pod-1", server)
            await stack.serving(client, "pod-1")
            await load.create(client, 100, limit=20)
            await load.until_left(100)

            await asyncio.to_thread(container.get_wrapped_container().kill)
            await asyncio.to_thread(container.get_wrapped_container().start)
            await load.results(client)
            pod.send(signal.SIGTERM)

            assert await pod.exit_code() == 0
            load.assert_nothing_lost()

    with container:
        run_async(scenario(), timeout_s=120)
