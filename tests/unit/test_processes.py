"""Processes of this host, seen from outside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from toque.chaos import processes

SLEEP = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"]


def sleeper(**options: object) -> subprocess.Popen[str]:
    """A process that has begun, and ends when its input does."""
    process = subprocess.Popen(SLEEP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_a_process_lives_until_it_has_ended():
    """One that nobody has waited for yet is dead, too."""
    process = sleeper()
    living = processes.is_alive(process.pid)
    os.kill(process.pid, 9)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    assert living
    assert not processes.is_alive(process.pid)
    process.communicate()
    assert not processes.is_alive(process.pid)
    assert processes.command_of(process.pid) == ""


def test_the_listener_of_a_port_is_found():
    """This process, and nobody once the port is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert processes.listener(port) == os.getpid()

    assert processes.listener(port) == 0


def test_local_addresses_are_those_that_can_be_bound():
    """Loopback is; an address of the documentation is not."""
    assert processes.is_local("127.0.0.1")
    assert processes.is_local("localhost")
    assert not processes.is_local("203.0.113.7")


def test_a_process_is_started_again_as_it_was(tmp_path: Path):
    """The same command line, directory and environment, but for what ties it to the one that started it."""
    process = sleeper(env={**os.environ, "MARK": "kept", "TOQUE_PARENT_PID": "1"}, cwd=tmp_path)

    launch = processes.Launch.of(process.pid)
    process.communicate()

    assert launch.argv == SLEEP
    assert launch.cwd == str(tmp_path)
    assert launch.env["MARK"] == "kept"
    assert "TOQUE_PARENT_PID" not in launch.env
    pid = launch.again(tmp_path / "log")
    os.waitpid(pid, 0)
    assert (tmp_path / "log").read_text() == "up\n"
