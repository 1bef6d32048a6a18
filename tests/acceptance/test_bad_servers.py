"""A NATS server that is not fit for Toque: refused, or warned about, with what to do; nothing is created on it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL
from typing import NamedTuple

import pytest
from acceptance.stack import RunAsync, Stack, eventually, toque

from toque._nats_server import find_server
from toque.client import Client
from toque.errors import SetupError

pytestmark = [pytest.mark.usefixtures("nats_binary"), pytest.mark.timeout(90)]

APP = "toque.chaos.five_steps"
LAZY = ("the server acknowledges before it writes to the disk: a power cut loses acknowledged work; "
        "set sync_interval: always in its jetstream block")
UNKNOWN = ("unknown whether the server writes to the disk before it acknowledges: "
           "name its HTTP monitor with --monitor URL")
NO_JETSTREAM = "start nats-server with -js (or a jetstream block in its configuration), and enable it for the account"
OLD_SERVER = '#!/bin/sh\necho "nats-server: v2.10.7"\n'


class Ended(NamedTuple):
    """How a command ended, and its last line on stderr."""

    code: int
    error: str


async def toque_beside(*arguments: str, env: dict[str, str] | None = None) -> Ended:
    """Run a command beside this loop."""
    done = await asyncio.to_thread(lambda: toque(*arguments, env=env))
    return Ended(done.returncode, done.stderr.splitlines()[-1] if done.stderr else "")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@asynccontextmanager
async def server_without_jetstream() -> AsyncIterator[str]:
    """Its address."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        find_server().path, "-a", "127.0.0.1", "-p", str(port), stdout=DEVNULL, stderr=DEVNULL)

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    try:
        await eventually(listens)
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.kill()
        await process.wait()


def test_a_server_without_jetstream_is_refused(tmp_path: Path, run_async: RunAsync) -> None:
    """A pod and a client say so, and how JetStream is switched on; exit code 1."""

    async def scenario() -> None:
        async with server_without_jetstream() as url:
            worker = await toque_beside("worker", APP, "--nats", url, "--data", str(tmp_path / "pod"))
            trigger = await toque_beside("trigger", "five-steps", "{}", "--nats", url)
            async with Client.connect(url) as client:
                with pytest.raises(SetupError) as caught:
                    await client.create("five-steps", {})

        assert worker == (1, f"toque: JetStream is not enabled on NATS at {url}: {NO_JETSTREAM}")
        assert trigger.code == 1 and NO_JETSTREAM in trigger.error and trigger.error.endswith("nothing was stored")
        assert NO_JETSTREAM in str(caught.value)

    run_async(scenario(), timeout_s=80)


def test_a_lazy_server_is_refused_only_on_demand(stack: Stack, run_async: RunAsync) -> None:
    """Lazy or unknown fsync: --require-sync refuses with the remedy, exit code 1; without it a pod warns and serves."""

    async def scenario() -> None:
        async with stack.server(sync_always=False) as server:
            pod = ["worker", APP, "--nats", server.url, "--data", str(stack.directory / "refused")]
            lazy = await toque_beside(*pod, "--require-sync", "--monitor", server.monitor_url,
                                      env=stack.ledger.environment)
            unknown = await toque_beside(*pod, "--require-sync", env=stack.ledger.environment)
            nobody = f"http://127.0.0.1:{free_port()}"
            no_monitor = await toque_beside(*pod, "--monitor", nobody, env=stack.ledger.environment)
            async with Client.connect(server.url) as client:
                assert await client.accounts.list() == [], "a refused pod has made the account"
            await stack.worker("warned", server, "--monitor", server.monitor_url)
            await stack.worker("unsure", server)
            await eventually(lambda: stack.said("pod serves", "warned") and stack.said("pod serves", "unsure"))

        assert lazy == (1, f"toque: {LAZY}")
        assert unknown == (1, f"toque: {UNKNOWN}")
        assert no_monitor.code == 1 and f"no nats-server monitor answers at {nobody}/varz" in no_monitor.error
        assert stack.said(LAZY, "warned") and stack.said(UNKNOWN, "unsure")

    run_async(scenario(), timeout_s=80)


def test_a_server_that_fsyncs_always_is_taken_without_a_word(stack: Stack, run_async: RunAsync) -> None:
    """--require-sync and --monitor against the server that `toque dev` starts: no warning."""

    async def scenario() -> None:
        async with stack.server() as server:
            pod = await stack.worker("pod", server, "--require-sync", "--monitor", server.monitor_url)
            await eventually(lambda: stack.said("pod serves", "pod"))
            pod.send(signal.SIGTERM)
            assert await pod.exit_code() == 0

        assert not stack.said("warning", "pod")

    run_async(scenario(), timeout_s=80)


def test_an_old_server_program_is_refused(tmp_path: Path) -> None:
    """`toque dev` names the program, both versions and the command that installs a newer one; exit code 1."""
    program = tmp_path / "nats-server"
    program.write_text(OLD_SERVER)
    program.chmod(0o755)

    done = toque("dev", APP, "--dir", str(tmp_path / "dev"), env={"TOQUE_NATS_SERVER": str(program)})

    assert done.returncode == 1
    assert done.stderr.startswith(f"toque: {program} is nats-server 2.10.7, Toque needs 2.12.0 or newer: "
                                  "pip install 'toque[server]'")
    assert not (tmp_path / "dev").exists()


def test_a_port_in_use_is_named(stack: Stack) -> None:
    """`toque dev --port` with a port that another process has: exit code 1, and no other port is taken instead."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        done = toque("dev", APP, "--port", str(port), "--dir", str(stack.dev), env=stack.ledger.environment)

    assert done.returncode == 1
    assert done.stderr == (f"toque: port {port} of 127.0.0.1 is in use by another process: stop it, or choose another "
                           "port\n")


def test_a_server_that_is_not_there_is_exit_3(tmp_path: Path) -> None:
    """The address, where it was taken from, and what to do."""
    url = f"nats://127.0.0.1:{free_port()}"

    done = toque("queues", "--nats", url)

    assert done.returncode == 3
    assert done.stderr.startswith(f"toque: cannot connect to NATS at {url} (from the URL given): ")
    assert "start a server (`toque dev APP` does), or name another address with --nats" in done.stderr
