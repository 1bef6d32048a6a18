"""compose.yaml on a Docker engine: `make test-containers` builds the image and runs this."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from toque.client import Client
from toque.errors import ToqueError

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
PROJECT = f"toque-test-{os.getpid()}"
ANSWER_TIMEOUT = "60 seconds"
PODS = ("pod-1", "pod-2")


class Compose:
    """A project of compose.yaml, by whichever Compose is there."""

    def __init__(self, port: int) -> None:
        self.url = f"nats://127.0.0.1:{port}"
        self._env = {**os.environ, "NATS_PORT": str(port), "COMPOSE_PROJECT_NAME": PROJECT}
        self._command = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]

    def run(self, *arguments: str) -> str:
        return subprocess.run([*self._command, *arguments], cwd=ROOT, env=self._env, capture_output=True, text=True,
                              timeout=120, check=True).stdout

    def exit_code(self, service: str) -> int:
        container = self.run("ps", "-a", "-q", service).strip()
        shown = subprocess.run(["docker", "inspect", "-f", "{{.State.ExitCode}}", container], capture_output=True,
                               text=True, timeout=30, check=True)
        return int(shown.stdout)


@pytest.fixture
def compose() -> Iterator[Compose]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    compose = Compose(port)
    compose.run("up", "-d", "--no-build")
    yield compose
    compose.run("down", "-v")


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

    assert [compose.exit_code(pod) for pod in PODS] == [0, 0]
    compose.run("start")
    assert asyncio.run(greet(compose.url)) == "Hello, you!"


def test_a_killed_container_is_taken_over(compose: Compose) -> None:
    """Whichever stations the killed pod had, the other one serves them after its session ended."""
    asyncio.run(greet(compose.url))

    compose.run("kill", "-s", "SIGKILL", PODS[0])

    assert [asyncio.run(greet(compose.url)) for _ in range(5)] == ["Hello, you!"] * 5
