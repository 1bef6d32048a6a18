"""Fixtures on a real nats-server. Without the binary these tests skip on a laptop and fail where CI is set."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from toque._nats_server import NatsServer, find_server
from toque.errors import SetupError

T = TypeVar("T")
RunAsync = Callable[..., Any]
RUN_S_MAX = 30.0


def run_on_uvloop(coroutine: Coroutine[Any, Any, T], *, timeout_s: float = RUN_S_MAX) -> T:
    """Run to the end on a fresh uvloop; TimeoutError after `timeout_s`."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout_s):
            return await coroutine

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


@pytest.fixture
def run_async() -> RunAsync:
    """`run_async(coroutine, timeout_s=30)`: run it on a fresh uvloop, with a time-out."""
    return run_on_uvloop


@pytest.fixture(scope="session")
def nats_binary() -> None:
    """A nats-server is there: skips without one, fails without one in CI."""
    try:
        find_server()
    except SetupError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shared_nats_server(nats_binary: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """The session's server: fsync always, a directory of its own. Never stop it; `nats_server` is for that."""
    server = NatsServer(tmp_path_factory.mktemp("shared-nats"))
    run_on_uvloop(server.start())
    yield server
    run_on_uvloop(server.stop())


@pytest.fixture(scope="session")
def nats_url(shared_nats_server: NatsServer) -> str:
    """The address of the session's server. Tests share it: use stream names and subjects of your own."""
    return shared_nats_server.url


@pytest.fixture
def nats_server(nats_binary: None, tmp_path: Path) -> Iterator[NatsServer]:
    """A server of the test's own, running; the test may kill it and start it again."""
    server = NatsServer(tmp_path / "nats")
    run_on_uvloop(server.start())
    yield server
    run_on_uvloop(server.stop())
