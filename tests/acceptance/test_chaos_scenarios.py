"""`toque chaos run`: each scenario small, on a cluster of its own; one on a deployment as a user has it.

The scenarios that need root run where there is root, in processes of their own. Seeds are chosen so that faults are short.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from acceptance.stack import RunAsync, Stack, Terminal, command, environment, toque

from toque.chaos.cgroups import Cgroup, CgroupsAway
from toque.cli.chaos import EXIT_VOID
from toque.client import Client

pytestmark = [pytest.mark.usefixtures("nats_binary"), pytest.mark.timeout(150)]

TTL = "2s"
RUN_S_MAX = 120.0


def chaos(tmp_path: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a scenario to its end; its output is printed, so that a failure shows it."""
    done = toque("chaos", "run", name, "--dir", str(tmp_path / "runs"), "--report", str(tmp_path / "page.html"), *options,
                 timeout_s=RUN_S_MAX)
    print(done.stdout, done.stderr)
    return done


def assert_passed(done: subprocess.CompletedProcess[str], tmp_path: Path, seed: str) -> None:
    """The seed stands first, the verdict is pass, the page is there, and nothing else is left."""
    assert done.stdout.splitlines()[0] == f"seed {seed}"
    assert done.returncode == 0
    assert "BROKEN" not in done.stdout
    assert f"Seed {seed}" in (tmp_path / "page.html").read_text()
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(("name", "seed", "faults"), [
    ("zombies", "12", "1"),
    ("broker-restarts", "1", "3"),
    pytest.param("gatekeeper-loss", "1", "2", marks=pytest.mark.slow),
    pytest.param("slow-and-cut-links", "1", "2", marks=pytest.mark.slow),
])
def test_a_scenario_without_root_passes(tmp_path: Path, name: str, seed: str, faults: str) -> None:
    """Every promise holds, every fault happened, and it cleans up behind itself."""
    done = chaos(tmp_path, name, "--seed", seed, "--faults", faults, "--instances", "60", "--ttl", TTL)

    assert_passed(done, tmp_path, seed)
    assert f"{faults} of {faults} faults" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and iptables")
def test_partitions_pass(tmp_path: Path) -> None:
    """In a network namespace of their own; the host's rules are not touched."""
    done = chaos(tmp_path, "partitions", "--seed", "1", "--faults", "1", "--instances", "60", "--ttl", TTL)
    if done.returncode == EXIT_VOID and "is skipped" in done.stdout:
        pytest.skip(done.stdout)

    assert_passed(done, tmp_path, "1")
    assert not re.search(r"127\.0\.1\.\d", subprocess.run(["iptables", "-w", "-S"], capture_output=True, text=True,
                                                           check=True).stdout)


@pytest.mark.parametrize(("name", "controller"), [("oom", "memory"), ("cpu-starvation", "cpu")])
def test_a_scenario_with_control_groups_passes(tmp_path: Path, name: str, controller: str) -> None:
    """The groups are gone afterwards."""
    try:
        Cgroup(controller).close()
    except (CgroupsAway, OSError) as error:
        pytest.skip(str(error))

    done = chaos(tmp_path, name, "--seed", "1", "--faults", "1", "--instances", "60", "--ttl", TTL)

    assert_passed(done, tmp_path, "1")
    assert list(Path("/sys/fs/cgroup").glob("**/toque-chaos-*")) == []


def test_a_scenario_runs_against_a_deployment(stack: Stack, run_async: RunAsync, tmp_path: Path) -> None:
    """The user's own server and pods, which report to `toque chaos ledger`; the pod that is killed is started again by
    the scenario. What needs links is refused."""
    place = tmp_path / "ledger"
    ledger = Terminal(["chaos", "ledger", "--dir", str(place)], env={}, log=tmp_path / "ledger.log")

    async def run(url: str, name: str, *options: str) -> str:
        """What it printed, and its exit code."""
        process = await asyncio.create_subprocess_exec(
            *command("chaos", "run", name, "--nats", url, "--ledger", str(place), "--seed", "1", "--faults", "1",
                     "--instances", "60", "--dir", str(tmp_path), *options),
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        out, _ = await process.communicate()
        return f"{out.decode()}exit {process.returncode}"

    async def scenario() -> tuple[str, str]:
        async with stack.server() as server, Client.connect(server.url) as client:
            stack.ledger.socket = place / "socket"
            for name in ("one", "two"):
                await stack.worker(name, server, "--ttl", TTL)
            await stack.serving(client, "one", "two")
            before = (await client.accounts.describe("main")).max_concurrent
            killed = await run(server.url, "killing-pods", "--restart")
            refused = await run(server.url, "slow-and-cut-links")
            assert (await client.accounts.describe("main")).max_concurrent == before
            for view in await client.pods():  # one of them was started by the scenario, and outlives it
                os.kill(view.pid, signal.SIGKILL)
            return killed, refused

    try:
        ledger.wait_for("Ctrl-C ends it")
        killed, refused = run_async(scenario(), timeout_s=RUN_S_MAX)
        print(killed, refused)
    finally:
        ledger.close()
    assert killed.endswith("exit 0")
    assert "1 of 1 faults" in killed
    assert refused.endswith(f"exit {EXIT_VOID}")
    assert "the pods do not reach the server through links of this scenario" in refused


def test_ctrl_c_ends_a_run_in_order(tmp_path: Path, run_async: RunAsync) -> None:
    """What it started is gone, and it says so; exit code 130."""
    run = Terminal(["chaos", "run", "killing-pods", "--dir", str(tmp_path), "--seed", "1"], env={}, log=tmp_path / "log")
    try:
        run.wait_for("fault 1 of 5")
        run.ctrl_c()
        assert run_async(run.exit_code(), timeout_s=60) == 130
        assert "interrupted: what was broken is healed" in run.text
    finally:
        run.close()
