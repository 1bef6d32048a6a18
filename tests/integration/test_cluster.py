"""The local cluster on real processes: it starts, mends what dies, ends in order, and goes on where it stopped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest

from toque import _subjects
from toque._cluster import ClusterEvent, DevCluster
from toque._dev_pod import PodState
from toque.client import Client
from toque.errors import AppError, SetupError
from toque.storage.ports import BusTimeout, StreamConfig

pytestmark = [pytest.mark.usefixtures("nats_binary"), pytest.mark.timeout(120)]

SOURCE = Path(__file__).resolve().parents[2] / "src"
WAIT_S_MAX = 30.0
LONG_TTL_S = 60.0  # so long that nothing in a test can be due to it
APP = textwrap.dedent("""
    import asyncio, os
    from pathlib import Path
    from toque import Workflow

    class Greet(Workflow, name="greet"):
        async def run(self, event, step):
            return await step.do("greet", self.greet, event.payload)
        async def greet(self, name):
            return f"hello {name}"

    class Gated(Workflow, name="gated"):
        '''Says that it was entered, and goes on when the gate is there.'''
        async def run(self, event, step):
            first = await step.do("first", self.first, event.payload)
            return [first, await step.do("second", self.second, event.payload)]
        async def first(self, place):
            with open(Path(place) / "first", "a") as log:
                print(os.getpid(), file=log)
            return "first"
        async def second(self, place):
            with open(Path(place) / "second", "a") as log:
                print(os.getpid(), file=log)
            while not (Path(place) / "gate").exists():
                await asyncio.sleep(0.01)
            return "second"
""")


class RunAsync(Protocol):
    def __call__(self, coroutine: Any, *, timeout_s: float = 30.0) -> Any: ...


class Stage:
    """A directory with an app, and what the clusters in it said."""

    def __init__(self, tmp_path: Path) -> None:
        self.directory = tmp_path / "dev"
        self.app = tmp_path / "cluster_app.py"
        self.app.write_text(APP)
        self.gates = tmp_path / "gates"
        self.gates.mkdir()
        self.lines: list[tuple[str, str]] = []
        self.events: list[ClusterEvent] = []

    def cluster(self, **options: Any) -> DevCluster:
        return DevCluster(str(self.app), directory=self.directory, on_line=lambda *line: self.lines.append(line),
                          on_event=self.events.append, **options)

    @asynccontextmanager
    async def running(self, **options: Any) -> AsyncIterator[tuple[DevCluster, Client]]:
        cluster = self.cluster(**options)
        await cluster.start()
        try:
            async with Client.connect(cluster.url, account=cluster.account) as client:
                yield cluster, client
        finally:
            cluster.kill()
            await cluster.stop()

    def said(self, text: str) -> bool:
        return any(text in line for _, line in self.lines)

    def entries(self, step: str) -> list[int]:
        """Process ids of the pods that entered a gated step, in order."""
        path = self.gates / step
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def open_gate(self) -> None:
        (self.gates / "gate").touch()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


async def eventually(condition: Callable[[], Awaitable[bool] | bool], *, within_s: float = WAIT_S_MAX) -> None:
    """Poll until the condition holds; TimeoutError after the deadline."""
    async with asyncio.timeout(within_s):
        while True:
            outcome = condition()
            if outcome if isinstance(outcome, bool) else await outcome:
                return
            await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# -- start and end -----------------------------------------------------------------------------------------------------

def test_a_started_cluster_serves_and_says_where(stage: Stage, run_async: RunAsync) -> None:
    """When `start` returns, every station has an owner, an instance runs at once, and the state file tells where."""

    async def scenario() -> None:
        async with stage.running() as (cluster, client):
            state = json.loads((stage.directory / "dev.json").read_text())
            stations = await client.stations()
            greeting = await (await client.create("greet", "you")).result("10 seconds")

            assert all(report.pod in cluster.pods for report in stations) and len(stations) == 8
            assert greeting == "hello you"
            assert (state["url"], state["monitor_url"], state["pid"]) == (
                cluster.url, cluster.monitor_url, os.getpid())
            assert state["pods"] == {name: pod.pid for name, pod in cluster.pods.items()}

    run_async(scenario(), timeout_s=60)


def test_an_end_in_order_leaves_nothing_running(stage: Stage, run_async: RunAsync) -> None:
    """After `stop` all processes are gone with exit code 0, the state file too, and `wait` returns."""

    async def scenario() -> None:
        cluster = stage.cluster()
        await cluster.start()
        pids = [cluster.server_pid, *(pod.pid for pod in cluster.pods.values())]
        waiting = asyncio.ensure_future(cluster.wait())

        await cluster.stop()

        await asyncio.wait_for(waiting, WAIT_S_MAX)
        assert not any(map(is_alive, pids))
        assert not (stage.directory / "dev.json").exists()
        assert stage.said("pod-1 ended (exit 0)") and stage.said("pod-2 ended (exit 0)")

    run_async(scenario(), timeout_s=60)


def test_started_again_it_goes_on_where_it_stopped(stage: Stage, run_async: RunAsync) -> None:
    """An instance in the middle of its steps ends under the next cluster, at the same address; no step is repeated."""

    async def scenario() -> None:
        async with stage.running() as (cluster, client):
            handle = await client.create("gated", str(stage.gates))
            await eventually(lambda: bool(stage.entries("second")))
            url = cluster.url
            await cluster.stop(grace_s=1)
        stage.open_gate()
        async with stage.running() as (cluster, client):
            result = await client.handle("gated", handle.id).result("20 seconds")

            assert (result, cluster.url) == (["first", "second"], url)
            assert len(stage.entries("first")) == 1

    run_async(scenario(), timeout_s=90)


# -- accidents ---------------------------------------------------------------------------------------------------------

def test_work_of_a_killed_pod_goes_on_at_once(stage: Stage, run_async: RunAsync) -> None:
    """A dead pod's session is ended by the supervisor, so nothing waits for its TTL; the pod is started again."""

    async def scenario() -> None:
        async with stage.running(ttl_s=LONG_TTL_S) as (cluster, client):
            handle = await client.create("gated", str(stage.gates))
            await eventually(lambda: bool(stage.entries("second")))
            victim = next(pod for pod in cluster.pods.values() if pod.pid == stage.entries("second")[0])
            stage.open_gate()

            killed = cluster.kill_pod(victim.name, signal.SIGKILL)

            assert await handle.result("20 seconds") == ["first", "second"]
            await eventually(lambda: victim.state is PodState.READY and victim.pid != killed)
            assert len(stage.entries("first")) == 1 and victim.restarts == 1
            assert stage.said(f"{victim.name} ended (signal 9 (SIGKILL)); it is started again in 0.2 s")

    run_async(scenario(), timeout_s=90)


def test_a_killed_server_comes_back_at_its_address(stage: Stage, run_async: RunAsync) -> None:
    """Clients and pods find the server again, and what it had acknowledged is there."""

    async def scenario() -> None:
        async with stage.running() as (cluster, client):
            handle = await client.create("gated", str(stage.gates))
            await eventually(lambda: bool(stage.entries("second")))
            before = cluster.server_pid

            cluster.kill_server()

            await eventually(lambda: cluster.server_pid not in (0, before))
            stage.open_gate()
            assert await handle.result("30 seconds") == ["first", "second"]
            assert stage.said("nats-server ended (signal 9 (SIGKILL)); it is started again")

    run_async(scenario(), timeout_s=90)


def test_a_server_that_takes_no_writes_is_restarted(stage: Stage, run_async: RunAsync) -> None:
    """A journal that refuses for seconds, while the server answers, gets the server restarted with the reason said."""

    async def scenario() -> None:
        async with stage.running() as (cluster, client):
            await eventually(lambda: limit_journal(client, messages=1))
            handle = await client.create("greet", "you")
            before = cluster.server_pid

            await eventually(lambda: cluster.server_pid not in (0, before), within_s=40)

            assert stage.said("nats-server answers, but the pods cannot write to it: ")
            await eventually(lambda: limit_journal(client, messages=-1))
            assert await handle.result("30 seconds") == "hello you"

    run_async(scenario(), timeout_s=100)


async def limit_journal(client: Client, *, messages: int) -> bool:
    """Have the server refuse the journal's next messages, as a full store does; -1 heals it. False = not connected."""
    bus = client._bus
    try:
        info = await bus.stream_info(_subjects.journal_stream(client.account))
        known = {field: info.config[field] for field in StreamConfig.__struct_fields__ if field in info.config}
        await bus.update_stream(msgspec.structs.replace(msgspec.convert(known, StreamConfig), max_msgs=messages))
    except BusTimeout:
        return False
    return True


def test_code_that_breaks_is_not_started_in_a_loop(stage: Stage, run_async: RunAsync) -> None:
    """A pod whose app does not import any more says so once and waits; mended and restarted, it serves again."""

    async def scenario() -> None:
        async with stage.running(pods=1) as (cluster, client):
            stage.app.write_text("import no_such_module")

            assert not await cluster.restart_pod("pod-1")
            failed = cluster.pods["pod-1"]
            assert (failed.state, failed.pid) == (PodState.FAILED, 0) and "no_such_module" in failed.error

            stage.app.write_text(APP)
            assert await cluster.restart_pod("pod-1")
            assert await (await client.create("greet", "you")).result("10 seconds") == "hello you"
            assert sum("raised ModuleNotFoundError" in line for _, line in stage.lines) == 1

    run_async(scenario(), timeout_s=90)


def test_a_lifespan_that_raises_is_tried_again(stage: Stage, run_async: RunAsync) -> None:
    """A database that is away when a pod starts costs that start and no more: no change of the code is waited for."""
    away = stage.gates / "away"
    stage.app.write_text(APP + textwrap.dedent(f"""
        from contextlib import asynccontextmanager
        @asynccontextmanager
        async def lifespan():
            if Path({str(away)!r}).exists():
                raise ConnectionError("the database is away")
            yield
    """))

    async def scenario() -> None:
        async with stage.running(pods=1) as (cluster, client):
            away.touch()
            cluster.pods["pod-1"].send(signal.SIGKILL)
            await eventually(lambda: stage.said("ConnectionError: the database is away"))
            away.unlink()
            assert await (await client.create("greet", "you")).result("20 seconds") == "hello you"

    run_async(scenario(), timeout_s=60)


def test_pods_die_with_a_killed_supervisor(stage: Stage, run_async: RunAsync) -> None:
    """kill -9 of `toque dev` leaves no process behind, and the next one starts in the same directory."""
    dev = start_dev(stage)
    try:
        pids = wait_for_state(dev, stage)
    finally:
        dev.kill()
        dev.communicate()

    async def scenario() -> None:
        await eventually(lambda: not any(map(is_alive, pids)))
        async with stage.running() as (_, client):
            assert await (await client.create("greet", "you")).result("10 seconds") == "hello you"

    run_async(scenario(), timeout_s=60)


# -- refusals ----------------------------------------------------------------------------------------------------------

def test_an_app_that_does_not_import_ends_the_start(stage: Stage, run_async: RunAsync) -> None:
    """The error is the app's own, and nothing is left running."""
    stage.app.write_text("import no_such_module")

    async def scenario() -> None:
        cluster = stage.cluster()
        with pytest.raises(AppError, match="no_such_module"):
            await cluster.start()
        assert cluster.server_pid == 0 and not any(pod.pid for pod in cluster.pods.values())

    run_async(scenario(), timeout_s=60)


def test_a_directory_is_used_by_one_cluster(stage: Stage, run_async: RunAsync) -> None:
    """A second `toque dev` in it is told who is there, and the first is not disturbed."""

    async def scenario() -> None:
        async with stage.running(pods=1) as (_, client):
            with pytest.raises(SetupError, match=f"process {os.getpid()}"):
                await stage.cluster().start()
            assert await (await client.create("greet", "you")).result("10 seconds") == "hello you"

    run_async(scenario(), timeout_s=60)


def test_a_port_in_use_is_named(stage: Stage, run_async: RunAsync) -> None:
    """A port that was asked for is not silently replaced by another."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(SetupError, match=f"port {port} .* is in use"):
            run_async(stage.cluster(port=port).start())


# -- the command -------------------------------------------------------------------------------------------------------

def start_dev(stage: Stage, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "toque", "dev", str(stage.app), "--dir", str(stage.directory), *options],
        env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_state(dev: subprocess.Popen[str], stage: Stage) -> list[int]:
    """Read its output up to the end of the banner; the process ids of its children."""
    read_to(dev, "Ctrl-C ends all in order")
    state = json.loads((stage.directory / "dev.json").read_text())
    server = int((Path(f"/proc/{dev.pid}/task/{dev.pid}/children").read_text().split() or ["0"])[0])
    return [pid for pid in (*state["pods"].values(), server) if pid]


def read_to(dev: subprocess.Popen[str], text: str) -> list[str]:
    """Its lines up to the first that has the text."""
    assert dev.stdout is not None
    lines = []
    for line in dev.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} was never printed:\n{''.join(lines)}")


def test_ctrl_c_ends_all_in_order(stage: Stage) -> None:
    """One Ctrl-C: the pods hand over, the server follows, exit code 0."""
    dev = start_dev(stage)
    pids = wait_for_state(dev, stage)

    dev.send_signal(signal.SIGINT)

    rest, _ = dev.communicate(timeout=WAIT_S_MAX)
    assert dev.returncode == 0, rest
    assert "pod-1 ended (exit 0)" in rest and "keeps everything" in rest
    assert not any(map(is_alive, pids))


def test_a_second_ctrl_c_ends_all_at_once(stage: Stage) -> None:
    """Whoever does not want to wait for a callback does not have to; exit code 130."""
    dev = start_dev(stage)
    pids = wait_for_state(dev, stage)
    asyncio.run(create_gated(stage))

    dev.send_signal(signal.SIGINT)
    read_to(dev, "Ctrl-C again ends all at once")
    dev.send_signal(signal.SIGINT)

    rest, _ = dev.communicate(timeout=WAIT_S_MAX)
    assert dev.returncode == 130, rest
    assert not any(map(is_alive, pids))


async def create_gated(stage: Stage) -> None:
    """An instance inside a callback that will not end."""
    url = json.loads((stage.directory / "dev.json").read_text())["url"]
    async with Client.connect(url) as client:
        await client.create("gated", str(stage.gates))
        await eventually(lambda: bool(stage.entries("second")))


def test_reload_brings_new_code_to_the_pods(stage: Stage) -> None:
    """A saved change is served soon after; a change that does not import leaves the pods as they were."""
    dev = start_dev(stage, "--reload")
    wait_for_state(dev, stage)
    try:
        stage.app.write_text("import no_such_module")
        read_to(dev, "waiting for a change of the code")
        assert asyncio.run(greeting(stage)) == "hello you"

        stage.app.write_text(APP.replace("hello {name}", "good day {name}"))
        read_to(dev, "all pods have the new code")
        assert asyncio.run(greeting(stage)) == "good day you"
    finally:
        dev.send_signal(signal.SIGINT)
        dev.communicate(timeout=WAIT_S_MAX)


async def greeting(stage: Stage) -> Any:
    url = json.loads((stage.directory / "dev.json").read_text())["url"]
    async with Client.connect(url) as client:
        return await (await client.create("greet", "you")).result("20 seconds")


def test_clean_begins_anew(stage: Stage, run_async: RunAsync) -> None:
    """--clean forgets the instances of the last time, in the same directory."""

    async def earlier() -> None:
        async with stage.running(pods=1) as (_, client):
            await (await client.create("greet", "you")).result("10 seconds")

    run_async(earlier(), timeout_s=60)
    dev = start_dev(stage, "--clean")
    wait_for_state(dev, stage)

    async def count() -> int:
        url = json.loads((stage.directory / "dev.json").read_text())["url"]
        async with Client.connect(url) as client:
            return len([row async for row in client.list()])

    assert asyncio.run(count()) == 0
    dev.send_signal(signal.SIGINT)
    dev.communicate(timeout=WAIT_S_MAX)
