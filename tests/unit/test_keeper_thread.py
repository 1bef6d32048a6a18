"""The keeper's own thread: it renews beside the pod's loop, names what blocks that loop, and ends a fenced process."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from toque import _subjects as subjects
from toque._accounts import ensure_account
from toque._protocol import AccountRecord, SessionRecord
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.workers import keeper_thread
from toque.workers.attempt import Callbacks
from toque.workers.keeper_thread import EXIT_FENCED, KeeperThread
from toque.workers.loop_watch import STALL_S, LoopWatch
from toque.workers.session import Session, decode_session

TTL_S = 1.0
PATIENCE_S = 5.0  # of real time, for what the thread does within a tenth of a second


class SteppedClock:
    """A pod's clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def boottime(self) -> float:
        return self.now_s


class Bench:
    """A keeper on a broker that lives in the keeper's own loop, and the exits that the process was to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = SteppedClock()
        self.session = Session(self.clock, SessionRecord(pod="a", session="a-1", ttl_s=TTL_S))
        self.callbacks = Callbacks(1)
        self.loop_watch = LoopWatch(self.clock, ttl_s=TTL_S)  # of a loop that does not beat
        self.exits: list[int] = []
        self.exited = threading.Event()
        self.losses: list[str] = []
        self.keeper = KeeperThread(self._connect, "main", self.clock, self.session, callbacks=self.callbacks,
                                   loop_watch=self.loop_watch, on_lost=self.losses.append)
        monkeypatch.setattr(keeper_thread.os, "_exit", self._exit)  # the test's process must live on

    def _exit(self, code: int) -> None:
        self.exits.append(code)
        self.exited.set()
        self.callbacks.inside = 0  # as the end of a process ends them

    async def _connect(self) -> MemoryBus:
        self.loop = asyncio.get_running_loop()
        self.broker = MemoryBroker(random.Random(1))
        bus = MemoryBus(self.broker)
        await ensure_account(bus, "main", defaults=AccountRecord(name="main"))
        return bus

    def key(self) -> SessionRecord | None:
        message = self.broker.last_message(subjects.control_stream("main"), subjects.control_session("main", "a-1"))
        assert message is not None
        return decode_session(message)


def on_bench(monkeypatch: pytest.MonkeyPatch, check: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        bench = Bench(monkeypatch)
        await bench.keeper.open()
        try:
            await check(bench)
        finally:
            bench.callbacks.inside = 0  # what a failed test has left there would keep the thread
            await bench.keeper.leave()
            bench.callbacks.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_the_process_ends_when_a_callback_outlives_its_session(monkeypatch):
    """Protocol rule 7: a thread cannot be stopped in any other way, and another pod may be inside the same callback."""

    async def check(bench: Bench) -> None:
        bench.callbacks.inside = 1

        bench.clock.now_s += TTL_S

        assert await asyncio.to_thread(bench.exited.wait, PATIENCE_S)
        assert bench.exits == [EXIT_FENCED]

    on_bench(monkeypatch, check)


def test_a_fenced_process_without_a_callback_inside_lives(monkeypatch):
    """It hears that its session is lost, opens another and goes on."""

    async def check(bench: Bench) -> None:
        bench.clock.now_s += TTL_S

        await asyncio.shield(bench.keeper._ended)  # the thread has come to its end by itself
        assert bench.losses == ["it was not renewed in time"]
        assert bench.exits == []

    on_bench(monkeypatch, check)


def test_callbacks_of_the_next_session_do_not_end_the_process(monkeypatch):
    """The session is over and quiet: what is inside now was entered under another one."""

    async def check(bench: Bench) -> None:
        bench.session.quiet = True
        bench.callbacks.inside = 1

        bench.clock.now_s += TTL_S

        await asyncio.shield(bench.keeper._ended)
        assert bench.exits == []

    on_bench(monkeypatch, check)


def test_what_blocks_the_pods_loop_is_named_once(monkeypatch, caplog):
    """Protocol rule 7: the loop's beat has stopped; the log says for how long, what runs in it, and what to do."""

    async def check(bench: Bench) -> None:
        bench.session.deadline = bench.session.expires_at = float("inf")

        blocking(bench)

        said = [record.msg for record in caplog.records if record.name == "toque.loop"]
        assert [line["event"] for line in said].count("the pod's loop is blocked") == 1
        assert said[0]["at"].endswith("in blocking")
        assert said[0]["remedy"]

    on_bench(monkeypatch, check)


def blocking(bench: Bench) -> None:
    """User code that does not let the loop go on, until the keeper has looked at it a few times."""
    looked = threading.Event()
    for _ in range(4):
        bench.clock.now_s += STALL_S / 2
        bench.loop.call_soon_threadsafe(bench.loop.call_later, keeper_thread.WATCH_S, looked.set)
        assert looked.wait(PATIENCE_S)
        looked.clear()


def test_leaving_ends_the_session_and_the_thread(monkeypatch):
    """The key says so to everybody, at once."""

    async def check(bench: Bench) -> None:
        await bench.keeper.leave()

        assert bench.key().ended == "left"
        assert bench.losses == []

    on_bench(monkeypatch, check)
