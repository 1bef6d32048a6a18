"""`toque dev`: the local cluster in a terminal: banner, output, reload, and an end in order."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.text import Text

from toque._cluster import GRACE_S, DevCluster
from toque._dev_state import DEFAULT_DIRECTORY, wipe
from toque._nats_server import find_server
from toque.cli.code_watch import AppReport, CodeWatch, inspect_app, nearby_files
from toque.cli.output import EXIT_INTERRUPTED, EXIT_OK, console
from toque.errors import AppError

_COLOURS: Final = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")


@dataclass(frozen=True, kw_only=True)
class DevOptions:
    """The options of `toque dev`."""

    app: str
    pods: int
    port: int | None
    monitor_port: int | None
    directory: Path
    clean: bool
    reload: bool
    ttl_s: float
    account: str


class Screen:
    """Prints lines with their source before them; where there are colours, in the source's own."""

    def __init__(self) -> None:
        self._console = console()
        self._colours = {"toque": "bold", "nats": "red"}
        self._gone = False

    def line(self, source: str, text: str) -> None:
        colour = self._colours.setdefault(source, _COLOURS[len(self._colours) % len(_COLOURS)])
        for part in text.split("\n"):
            self._print(Text(f"{source} | ", style=colour) + Text.from_ansi(part))

    def plain(self, text: str) -> None:
        self._print(Text(text))

    def _print(self, text: Text) -> None:
        if self._gone:
            return
        try:
            self._console.print(text, soft_wrap=True)
        except OSError:
            self._gone = True  # the terminal was closed; what is running still has to be ended in order


class Stop:
    """Ctrl-C, SIGTERM and a closed terminal: the first sets `asked`, each further one calls `at_once`."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.impatient = False
        self.at_once: Callable[[], None] = lambda: None
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(sig, self._signalled)

    def _signalled(self) -> None:
        if self.asked.is_set():
            self.impatient = True
            self.at_once()
        self.asked.set()

    async def interrupts(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run the work to its end, or to the first signal, which cancels it. Whether it was that."""
        task = asyncio.ensure_future(work)
        asked = asyncio.ensure_future(self.asked.wait())
        await asyncio.wait([task, asked], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
            return True
        await task
        return False


async def run_dev(options: DevOptions) -> int:
    """Run a local cluster until Ctrl-C. 0 after an end in order, 130 when a second Ctrl-C cut it short.

    Everything is kept in the directory; run again, it goes on where it stopped. Raises ToqueError.
    """
    return await _Dev(options).run()


class _Dev:
    def __init__(self, options: DevOptions) -> None:
        self._options = options
        self._screen = Screen()
        self._stop = Stop()
        self._watch = CodeWatch()
        self._app = AppReport({}, [])
        self._cluster = DevCluster(
            options.app, directory=options.directory, pods=options.pods, port=options.port,
            monitor_port=options.monitor_port, ttl_s=options.ttl_s, account=options.account, on_line=self._screen.line)
        self._stop.at_once = self._cluster.kill

    async def run(self) -> int:
        await asyncio.to_thread(find_server)  # before anything is wiped or started
        if self._options.clean:
            wipe(self._options.directory)
        if await self._stop.interrupts(self._look_at_app()) or await self._stop.interrupts(self._cluster.start()):
            return EXIT_INTERRUPTED
        for line in banner(self._cluster, self._options, self._app):
            self._screen.plain(line)
        await self._stop.interrupts(self._serve())
        self._say(f"ending: the pods hand over, for at most {GRACE_S:g} s (Ctrl-C again ends all at once)")
        await self._cluster.stop()
        self._say(f"ended; {self._options.directory} keeps everything: start again to go on")
        return EXIT_INTERRUPTED if self._stop.impatient else EXIT_OK

    def _say(self, text: str) -> None:
        self._screen.line("toque", text)

    async def _look_at_app(self) -> None:
        """Until the app imports; without --reload it must at once."""
        while True:
            read_ns = time.time_ns()
            try:
                self._app = await inspect_app(self._options.app)
                self._watch.watch(map(Path, self._app.files), read_ns=read_ns)
                return
            except AppError as error:
                if not self._options.reload:
                    raise
                self._say(f"{error}\nwaiting for a change of the code")
            self._watch.watch(nearby_files(self._options.app), read_ns=read_ns)
            await self._watch.changed()

    async def _serve(self) -> None:
        """Until the cluster cannot go on (it raises then)."""
        if not self._options.reload:
            await self._cluster.wait()
            return
        tasks = [asyncio.ensure_future(self._cluster.wait()), asyncio.ensure_future(self._reload_for_ever())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            for task in tasks:
                task.cancel()

    async def _reload_for_ever(self) -> None:
        while True:
            changed = await self._watch.changed()
            self._say(f"{', '.join(path.name for path in changed)} changed")
            await self._look_at_app()  # code that does not import never reaches the pods: they go on with the old
            if await self._restart_pods():
                self._say("all pods have the new code")

    async def _restart_pods(self) -> bool:
        """One after another, so that the others serve meanwhile. False when one did not come up."""
        for name in self._cluster.pods:
            self._say(f"{name} is restarted")
            if not await self._cluster.restart_pod(name):
                self._say(f"{name} did not come up; the other pods are left as they are")
                return False
        return True


def banner(cluster: DevCluster, options: DevOptions, app: AppReport) -> list[str]:
    """What runs where, and what to try next."""
    pods = ", ".join(f"{pod.name} (process {pod.pid})" for pod in cluster.pods.values())
    workflows = ", ".join(f"{name} (version {version})" for name, version in app.workflows.items())
    return [
        f"Toque serves {options.app}",
        f"  server     {cluster.url}  (syncs every write; monitor {cluster.monitor_url})",
        f"  directory  {cluster.directory}",
        f"  account    {options.account}",
        f"  pods       {pods}",
        f"  workflows  {workflows}",
        f"  try        {next_command(cluster.url, options, next(iter(app.workflows), 'WORKFLOW'))}",
        "  Ctrl-C ends all in order; started again, it goes on where it stopped.",
    ]


def next_command(url: str, options: DevOptions, workflow: str) -> str:
    """A command for another terminal; clients find the default directory by themselves."""
    server = "" if options.directory == DEFAULT_DIRECTORY else f" --nats {url}"
    account = "" if options.account == "main" else f" --account {options.account}"
    return f"toque trigger {workflow} 'PARAMS IN JSON' --wait{server}{account}"
