"""Keeps the session on a thread, a loop and a connection of its own, and watches the pod's loop from there.

A loop that user code blocks stops its round trips: the keeper then stops renewing, and the LoopWatch names what blocks it.
If anything is still inside a callback when the session's time is over, the process ends here and now: a thread cannot be
stopped in any other way, and another pod may be inside the same callback already.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Awaitable, Callable

from toque._logging import get_logger
from toque._protocol import SessionRecord
from toque.storage.ports import Bus, BusError, BusTimeout, Clock, NoResponders
from toque.workers.attempt import Callbacks
from toque.workers.loop_watch import LoopWatch
from toque.workers.session import RETRY_S, Session, SessionKeeper

WATCH_S = 0.1
EXIT_FENCED = 75

_log = get_logger("toque.keeper")


class KeeperThread:
    """One session's keeper. Callbacks are called in the loop that made it."""

    def __init__(self, connect: Callable[[], Awaitable[Bus]], account: str, clock: Clock, session: Session, *,
                 callbacks: Callbacks, loop_watch: LoopWatch, on_lost: Callable[[str], None]) -> None:
        self._connect = connect
        self._account = account
        self._clock = clock
        self._session = session
        self._callbacks = callbacks
        self._loop_watch = loop_watch
        self._pod_loop = asyncio.get_running_loop()
        self._on_lost = on_lost
        self._opened: asyncio.Future[None] = self._pod_loop.create_future()
        self._ended: asyncio.Future[None] = self._pod_loop.create_future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._keeper: SessionKeeper | None = None
        self._thread = threading.Thread(target=self._run, name="toque-session", daemon=True)

    async def open(self) -> None:
        """Start the thread and wait until the session's key is written."""
        self._thread.start()
        await self._opened

    def announce(self, record: SessionRecord) -> None:
        """Change what the session's key says. Nothing happens when the session is over."""
        self._session.record = record
        if self._loop is not None and self._keeper is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the thread ended with the session
                self._loop.call_soon_threadsafe(self._keeper.announce, record)

    async def leave(self) -> None:
        """End the session, and the thread."""
        loop, keeper = self._loop, self._keeper
        if loop is None or keeper is None or self._ended.done():
            return
        leaving = keeper.leave()
        try:
            asyncio.run_coroutine_threadsafe(leaving, loop)
        except RuntimeError:  # as above
            leaving.close()
        await self._ended

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._keep())
        except BaseException as error:  # the edge of the thread: the pod must hear of it  # noqa: BLE001
            self._post(self._failed, error)
        else:
            self._post(self._finish)

    async def _keep(self) -> None:
        self._loop = asyncio.get_running_loop()
        bus = await self._connect()
        keeper = SessionKeeper(bus, self._account, self._clock, self._session, on_lost=self._lost)
        try:
            while True:
                try:
                    await keeper.open()
                    break
                except (BusTimeout, BusError, NoResponders):
                    await asyncio.sleep(RETRY_S)
            self._keeper = keeper
            self._post(_resolve, self._opened)
            watch = asyncio.create_task(self._watch())
            await keeper.run()
            while self._session.lost and not self._session.quiet and self._callbacks.inside:  # fenced, not out yet
                await asyncio.sleep(WATCH_S)
            await asyncio.sleep(0)
            if keeper.leaving is not None:
                await keeper.leaving
            watch.cancel()
        finally:
            await bus.close()

    async def _watch(self) -> None:
        while True:
            left_s = self._session.exit_in_s
            await asyncio.sleep(min(WATCH_S, left_s) if left_s > 0 else WATCH_S)
            if self._session.exit_in_s <= 0 and self._callbacks.inside and not self._session.quiet:
                _log.error("a callback outlived its session: the process ends", callbacks=self._callbacks.inside)
                sys.stderr.flush()
                os._exit(EXIT_FENCED)
            self._loop_watch.look()

    def _lost(self, why: str) -> None:
        self._post(self._on_lost, why)

    def _post(self, callback: Callable[..., object], *args: object) -> None:
        try:
            self._pod_loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            _log.debug("the pod's loop is closed already")

    def _failed(self, error: BaseException) -> None:
        if not self._opened.done():
            self._opened.set_exception(error)
        else:
            self._session.lost = True
            self._on_lost(f"its keeper failed: {type(error).__name__}: {error}")
        _resolve(self._ended)

    def _finish(self) -> None:
        _resolve(self._ended)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
