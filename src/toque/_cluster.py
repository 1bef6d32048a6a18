"""The local cluster of `toque dev`, the demo and the tests: one nats-server and N pod processes, supervised.

It holds no instance and decides nothing about any: whatever dies here, the supervisor too, is found again in the
journal by the next start in the same directory. All processes listen on loopback only and die with this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from toque._accounts import check_settings, ensure_account
from toque._children import Backoff, exit_text
from toque._dev_pod import PodProcess, PodState, PodWatcher
from toque._dev_state import DevState, DirectoryClaim, claim_directory, write_state
from toque._names import check_account
from toque._nats_server import NatsServer, PortInUse
from toque._protocol import AccountRecord
from toque._server_watch import ServerLog, WriteDeadWatch
from toque.client import Client
from toque.errors import AppError, SetupError, ToqueError, Unavailable, UsageError
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import NatsOptions

if TYPE_CHECKING:
    from toque._protocol import PodView

PODS_MAX: Final = 64
READY_S_MAX: Final = 60.0
START_TRIES_MAX: Final = 4  # deaths of one pod after which `start` gives up
GRACE_S: Final = 25.0
GRACE_MARGIN_S: Final = 5.0  # pods get so much longer than their own grace before they are killed
POLL_S: Final = 0.1  # between two questions for the pods while they start
WATCH_S: Final = 1.0  # between two looks at the pods' reports and the server's log
WRITE_DEAD_RESTARTS_MAX: Final = 3  # without a healthy report in between: more would not help
END_SESSION_S_MAX: Final = 3.0


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """Something happened to a process: `who` is "nats" or a pod's name, `kind` a pod's state, or started/died."""

    who: str
    kind: str
    pid: int


class DevCluster:
    """A nats-server and its pods. `start`, then `wait`; `stop` ends all in order, `kill` at once.

    app_reference   APP as `toque worker` takes it
    directory       keeps everything, so that a later cluster in it goes on; one living cluster per directory
    port, monitor_port   None = the ports of the last time if free, else free ones
    ttl_s           of the pods' sessions: how long after a death that nobody sees others take over
    on_line         gets each line of output: "pod-1", "nats" (problems only) or "toque" (the supervisor), text
    env             added to the environment of the pods; python_path stands before their PYTHONPATH
    way             pod's name and the server's URL → the URL by which the pod is to reach it (chaos puts itself between)
    host            where the server listens: see NatsServer
    worker_options  added to the command line of each pod
    """

    def __init__(self, app_reference: str, *, directory: Path | str, pods: int = 2, port: int | None = None,
                 monitor_port: int | None = None, ttl_s: float = 5.0, account: str = "main", grace_s: float = GRACE_S,
                 on_line: Callable[[str, str], None], on_event: Callable[[ClusterEvent], None] | None = None,
                 env: Mapping[str, str] | None = None, python_path: Sequence[Path | str] = (),
                 way: Callable[[str, str], Awaitable[str]] | None = None, host: str = "127.0.0.1",
                 worker_options: Sequence[str] = ()) -> None:
        if not 1 <= pods <= PODS_MAX:
            raise UsageError(f"the number of pods must be between 1 and {PODS_MAX}, not {pods}")
        self.directory = Path(directory).absolute()
        self.account = check_account(account)
        self.pods: dict[str, PodProcess] = {}
        self._app = app_reference
        self._pods_wanted = pods
        self._ports_wanted = (_checked_port(port, "--port"), _checked_port(monitor_port, "--monitor-port"))
        self._ttl_s = check_settings(AccountRecord(name=account, ttl_s=ttl_s)).ttl_s
        self._grace_s = grace_s
        self._on_line = on_line
        self._on_event = on_event
        self._env = pod_environment(env or {}, python_path)
        self._way = way
        self._host = host
        self._worker_options = list(worker_options)
        self._claim: DirectoryClaim | None = None
        self._server: NatsServer | None = None
        self._bus: NatsBus | None = None
        self._client: Client | None = None
        self._keepers: list[asyncio.Task[None]] = []  # of the pods: they end when their pod is gone for good
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = asyncio.Event()
        self._failure: BaseException | None = None
        self._stopping = False

    # -- the public face -----------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        assert self._server is not None, "the cluster is not started"
        return self._server.url

    @property
    def monitor_url(self) -> str:
        assert self._server is not None, "the cluster is not started"
        return self._server.monitor_url

    @property
    def server_pid(self) -> int:
        """The nats-server's process id; 0 when there is none."""
        return self._server.pid if self._server is not None and self._server.running else 0

    async def start(self, ready_s_max: float = READY_S_MAX) -> None:
        """Start everything; returns when each pod has answered and each station has an owner.

        Raises SetupError (no server, directory or port not to be had), AppError (a pod cannot import the app),
        Unavailable (not ready in `ready_s_max` seconds). Nothing is left running then.
        """
        try:
            await self._start(ready_s_max)
        except BaseException:
            self.kill()
            await self._close()
            raise

    async def wait(self) -> None:
        """Wait for `stop` or `kill`. Raises what makes supervision impossible, once everything is ended."""
        await self._ended.wait()
        if self._failure is not None:
            await self._close()
            raise self._failure

    async def stop(self, grace_s: float | None = None) -> None:
        """End all in order: pods hand over in parallel, then the server. What runs on after `grace_s` is killed."""
        self._stopping = True
        limit_s = self._grace_s + GRACE_MARGIN_S if grace_s is None else grace_s
        await asyncio.gather(*(self._stop_pod(pod, limit_s) for pod in self.pods.values()))
        await self._close()

    def kill(self) -> None:
        """SIGKILL to all processes, now. A `stop` under way then returns at once."""
        self._stopping = True
        for pod in self.pods.values():
            pod.kill()
        if self._server is not None:
            self._server.kill()

    def kill_pod(self, name: str, sig: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a pod's process, as an accident would; returns its pid. A pod that dies is started again.

        Raises UsageError when no pod of that name is running.
        """
        pid = self._pod(name).pid
        if not pid:
            raise UsageError(f"{name} is not running just now")
        self._pod(name).send(sig)
        return pid

    def kill_server(self) -> None:
        """kill -9 of the nats-server, as an accident; it is started again."""
        assert self._server is not None, "the cluster is not started"
        self._server.kill()

    async def restart_pod(self, name: str, ready_s_max: float = READY_S_MAX) -> bool:
        """End a pod in order and start it again. True when it is ready; False when it did not get there."""
        pod = self._pod(name)
        await pod.restart(self._grace_s + GRACE_MARGIN_S)
        deadline = time.monotonic() + ready_s_max
        while not self._stopping and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
            if pod.state is PodState.FAILED:
                return False
            await self._reports()
            if pod.state is PodState.READY:
                return True
        return False

    # -- start ---------------------------------------------------------------------------------------------------------

    async def _start(self, ready_s_max: float) -> None:
        self._claim = claim_directory(self.directory, self.account)
        self._server = await self._start_server()
        self._claim.remember_ports(self._server.port, self._server.monitor_port)
        self._tasks.append(self._supervise(self._keep_server(self._server)))
        self._bus = await NatsBus.connect(NatsOptions(servers=(self.url,), name="toque dev"))
        record = AccountRecord(name=self.account, ttl_s=self._ttl_s)
        _, layout = await ensure_account(self._bus, self.account, defaults=record)
        self._client = Client(self._bus, account=self.account)
        await self._make_pods()
        generation, stations = layout.generations[-1]
        await self._until_ready({f"{generation}.{number}" for number in range(stations)}, ready_s_max)
        self._tasks.append(self._supervise(self._watch()))

    async def _start_server(self) -> NatsServer:
        """With the ports asked for, or those of the last time, or free ones. Raises PortInUse for a port asked for."""
        assert self._claim is not None
        port, monitor_port = self._ports_wanted
        last = self._claim.identity
        store = self.directory / "nats"
        server = NatsServer(store, port=port or last.port, monitor_port=monitor_port or last.monitor_port,
                            host=self._host)
        try:
            await server.start()
        except PortInUse as error:
            if error.port in self._ports_wanted:
                raise
            server = NatsServer(store, port=port or 0, monitor_port=monitor_port or 0, host=self._host)
            await server.start()
        self._tell("nats", "started", server.pid)
        return server

    async def _make_pods(self) -> None:
        watcher = PodWatcher(on_line=self._on_line, on_state=self._pod_changed, on_death=self._end_session)
        for number in range(1, self._pods_wanted + 1):
            name = f"pod-{number}"
            data = self.directory / "pods" / name
            url = self.url if self._way is None else await self._way(name, self.url)
            self.pods[name] = PodProcess(name, self._argv(name, data, url), env={**self._env, "TOQUE_POD": name},
                                         data=data, watcher=watcher)
        for pod in self.pods.values():
            self._keepers.append(self._supervise(pod.keep()))

    def _argv(self, name: str, data: Path, url: str) -> list[str]:
        return [sys.executable, "-m", "toque", "worker", self._app, "--pod", name, "--data", str(data),
                "--account", self.account, "--nats", url, "--monitor", self.monitor_url, "--require-sync",
                "--grace", f"{self._grace_s}s", "--ttl", f"{self._ttl_s}s", "--dev",
                *self._worker_options]

    async def _until_ready(self, stations: set[str], ready_s_max: float) -> None:
        deadline = time.monotonic() + ready_s_max
        while True:
            views = await self._reports()
            self._raise_failure()
            owned = {station for view in views for station in view.stations}
            if stations <= owned and all(pod.state is PodState.READY for pod in self.pods.values()):
                return
            if time.monotonic() > deadline:
                raise Unavailable(f"the pods were not ready after {ready_s_max:g} s: {self._unready(stations - owned)}")
            await asyncio.sleep(POLL_S)

    def _raise_failure(self) -> None:
        for pod in self.pods.values():
            if pod.state is PodState.FAILED:
                raise AppError(pod.error)
            if pod.restarts >= START_TRIES_MAX:
                raise SetupError(f"{pod.name} does not start: {pod.error}")
        if self._failure is not None:
            raise self._failure

    def _unready(self, unowned: set[str]) -> str:
        unready = [f"{pod.name} is {pod.state}{pod.error and ': ' + pod.error}" for pod in self.pods.values()
                   if pod.state is not PodState.READY]
        return "; ".join(unready) or f"nobody owns the stations {', '.join(sorted(unowned))}"

    # -- supervision ---------------------------------------------------------------------------------------------------

    def _supervise(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        task.add_done_callback(self._supervised_ended)
        return task

    def _supervised_ended(self, task: asyncio.Task[None]) -> None:
        """A supervisor that failed ends the cluster: half a cluster without one would look alive."""
        if task.cancelled() or task.exception() is None:
            return
        self._failure = self._failure or task.exception()
        self.kill()
        self._ended.set()

    async def _keep_server(self, server: NatsServer) -> None:
        backoff = Backoff()
        while not self._stopping:
            started = time.monotonic()
            code = await server.exited
            if self._stopping:
                return
            self._tell("nats", "died", 0)
            self._on_line("toque", f"nats-server ended ({exit_text(code)}); it is started again")
            while not await self._restarted(server, backoff.next_s(time.monotonic() - started)):
                started = time.monotonic()

    async def _restarted(self, server: NatsServer, delay_s: float) -> bool:
        await asyncio.sleep(delay_s)
        if self._stopping:
            return True
        try:
            await server.start()
        except SetupError as error:
            self._on_line("nats", str(error))
            return False
        self._tell("nats", "started", server.pid)
        return True

    async def _end_session(self, pod: PodProcess) -> None:
        """Free what a dead pod held at once, instead of after its TTL. Not done, it costs only that time."""
        self._tell(pod.name, "died", 0)
        if self._stopping or self._bus is None:
            return
        from toque.workers.session import end_dead_session  # the runtime: the supervisor needs this one function of it

        try:
            async with asyncio.timeout(END_SESSION_S_MAX):
                await end_dead_session(self._bus, self.account, pod.data)
        except (ToqueError, TimeoutError, OSError) as error:
            reason = str(error) or "no answer"
            self._on_line("toque", f"{pod.name}'s session could not be ended ({reason}); it ends by itself in "
                          f"{self._ttl_s:g} s")

    async def _stop_pod(self, pod: PodProcess, grace_s: float) -> None:
        code = await pod.stop(grace_s)
        if code is not None:
            self._on_line("toque", f"{pod.name} ended ({exit_text(code)})")

    async def _watch(self) -> None:
        """Hand on the server's problems, and restart it when pods cannot write to it though it answers."""
        assert self._server is not None
        log = ServerLog(self._server.log_path)
        watch = WriteDeadWatch()
        while not self._stopping:
            await asyncio.sleep(WATCH_S)
            for line in log.problems():
                self._on_line("nats", line)
            views = await self._reports()
            complaint = watch.seen(views, time.monotonic())
            if not complaint:
                continue
            self._on_line("toque", f"nats-server answers, but the pods cannot write to it: {complaint}")
            if watch.restarts <= WRITE_DEAD_RESTARTS_MAX:
                self._on_line("toque", "nats-server is restarted, since that does not heal by itself; look for a full "
                              f"disk at {self.directory}")
                await self._server.stop()

    async def _reports(self) -> list[PodView]:
        """What the pods say of themselves; marks those that answered. Empty while nothing answers."""
        if self._client is None:
            return []
        try:
            views = await self._client.pods()
        except ToqueError:  # the server is away, or not yet itself again after a restart: asked again soon
            return []
        for view in views:
            if view.pod in self.pods:
                self.pods[view.pod].answered(view.pid)
        return views

    # -- state and end -------------------------------------------------------------------------------------------------

    def _pod(self, name: str) -> PodProcess:
        if name not in self.pods:
            raise UsageError(f"there is no pod {name!r}; there are {', '.join(self.pods) or 'none yet'}")
        return self.pods[name]

    def _pod_changed(self, pod: PodProcess) -> None:
        self._tell(pod.name, pod.state, pod.pid)
        if self._server is None or self._claim is None or self._stopping:
            return
        write_state(self.directory, DevState(
            url=self.url, monitor_url=self.monitor_url, pid=os.getpid(), app=self._app,
             account=self.account, pods={name: pod.pid for name, pod in self.pods.items()}))

    def _tell(self, who: str, kind: str, pid: int) -> None:
        if self._on_event is not None:
            self._on_event(ClusterEvent(who, kind, pid))

    async def _close(self) -> None:
        """With the pods ended or killed: end supervisors, connections, the server; then let go of the directory."""
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._bus is not None:
            with contextlib.suppress(ToqueError, TimeoutError):
                await self._bus.close()
        self._client = self._bus = None
        if self._server is not None:
            await self._server.stop()
        if self._claim is not None:
            self._claim.release()
        self._ended.set()


def _checked_port(port: int | None, option: str) -> int | None:
    if port is not None and not 1 <= port <= 65535:
        raise UsageError(f"{option} must be between 1 and 65535, not {port}")
    return port


def pod_environment(extra: Mapping[str, str], python_path: Sequence[Path | str]) -> dict[str, str]:
    """The environment of pods: they import the same Toque as this process, and their prints come at once."""
    here = Path(__file__).resolve().parents[1]
    own = [] if here.name in ("site-packages", "dist-packages") else [here]  # installed, it is on the path anyway
    paths = [*map(str, python_path), *map(str, own), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **extra, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
