"""One pod process of the local cluster, supervised: started, started again after a death with back-off, stopped.

A pod that says by its exit code that its APP does not import is left alone until somebody asks for a restart: starting
it again and again would only print the same error.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from toque._children import Backoff, ChildProcess, exit_text

EXIT_USAGE: Final = 2  # of `toque worker`: the APP or an option is wrong, so the next start would end the same way
LAST_WORDS: Final = 12  # lines of output kept to say why a pod died
ERROR_MARK: Final = "toque: "


class PodState(StrEnum):
    """Where a pod process stands."""

    STARTING = "starting"
    READY = "ready"  # it has answered since its start
    WAITING = "waiting"  # dead; it will be started again when the back-off is over
    FAILED = "failed"  # its APP does not import; it waits for `restart`
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class PodWatcher:
    """What a pod process tells its cluster."""

    on_line: Callable[[str, str], None]
    """A line of output: name of the pod (or "toque", for the supervisor itself), text."""
    on_state: Callable[[PodProcess], None]
    """Its state or process has changed."""
    on_death: Callable[[PodProcess], Awaitable[None]]
    """It died with its session open; it is started again only after this returns."""

    def say(self, text: str) -> None:
        """A line of the supervisor itself."""
        self.on_line("toque", text)


class PodProcess:
    """A pod: `keep` supervises it until `stop`. `pid` is 0 while it does not run."""

    def __init__(self, name: str, argv: Sequence[str], *, env: Mapping[str, str], data: Path,
                 watcher: PodWatcher) -> None:
        self.name = name
        self.data = data
        self.state = PodState.STOPPED
        self.error = ""  # its own last words, while FAILED or WAITING
        self.restarts = 0
        self._argv = argv
        self._env = env
        self._watcher = watcher
        self._child: ChildProcess | None = None
        self._wake = asyncio.Event()
        self._replaced = False  # this end was asked for by `restart`
        self._stopping = False
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)

    @property
    def pid(self) -> int:
        return self._child.pid if self._child is not None and self._child.alive else 0

    async def keep(self) -> None:
        """Run the pod until `stop` is called. Raises SetupError when Python itself cannot be started."""
        backoff = Backoff()
        while not self._stopping:
            code, lived_s = await self._live()
            if self._stopping:
                break
            await self._after(code, lived_s, backoff)
        self._set(PodState.STOPPED)

    async def restart(self, grace_s: float) -> None:
        """End it in order and start it at once, whatever state it is in. Returns when the old process is gone."""
        self._wake.set()
        if self._child is not None and self._child.alive:
            self._replaced = True
            await self._child.stop(grace_s)

    async def stop(self, grace_s: float) -> int | None:
        """End it in order; SIGKILL when `grace_s` seconds are over. Its exit code; None when it did not run."""
        self._stopping = True
        self._wake.set()
        if self._child is None or not self._child.alive:
            return None
        return await self._child.stop(grace_s)

    def kill(self) -> None:
        """End it for good, at once."""
        self._stopping = True
        self._wake.set()
        if self._child is not None:
            self._child.kill()

    def send(self, sig: signal.Signals) -> None:
        """Send its process a signal; the supervisor treats what comes of it as an accident."""
        if self._child is not None:
            self._child.send(sig)

    def answered(self, pid: int) -> None:
        """Told by the cluster: the process of this id has answered a request."""
        if self.state is PodState.STARTING and pid == self.pid:
            self._set(PodState.READY)

    # -- its life ------------------------------------------------------------------------------------------------------

    async def _live(self) -> tuple[int, float]:
        self._wake.clear()
        self._replaced = False
        self._last_words.clear()
        self._child = await ChildProcess.start(self._argv, env=self._env, on_line=self._hear)
        self._set(PodState.STARTING)
        if self._stopping:  # asked while the process was being made
            self._child.send(signal.SIGTERM)
        code = await self._child.wait()
        return code, self._child.lived_s

    def _hear(self, line: str) -> None:
        self._last_words.append(line)
        self._watcher.on_line(self.name, line)

    async def _after(self, code: int, lived_s: float, backoff: Backoff) -> None:
        """What an end that nobody asked `stop` for leads to."""
        self.restarts += 1
        if self._replaced:
            return
        self.error = error_in(self._last_words) or exit_text(code)
        if code != 0:
            await self._watcher.on_death(self)
        if code == EXIT_USAGE:
            self._set(PodState.FAILED)
            self._watcher.say(f"{self.name} cannot run the app; it waits for a change of the code, or Ctrl-C")
            await self._wake.wait()
        else:
            await self._pause(code, backoff.next_s(lived_s))

    async def _pause(self, code: int, delay_s: float) -> None:
        self._set(PodState.WAITING)
        self._watcher.say(f"{self.name} ended ({exit_text(code)}); it is started again in {delay_s:g} s")
        waiter = asyncio.ensure_future(self._wake.wait())
        await asyncio.wait([waiter], timeout=delay_s)
        waiter.cancel()

    def _set(self, state: PodState) -> None:
        self.state = state
        self._watcher.on_state(self)


def error_in(lines: Sequence[str]) -> str:
    """The error that the command line printed last, with the lines below it."""
    marked = [index for index, line in enumerate(lines) if line.startswith(ERROR_MARK)]
    if not marked:
        return ""
    return "\n".join(list(lines)[marked[-1]:]).removeprefix(ERROR_MARK)
