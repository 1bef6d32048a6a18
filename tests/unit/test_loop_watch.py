"""The watch of a pod's loop: what blocks it is named, once, and nobody is accused who does not block."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvloop
from unit.engine_host import EngineHost

from toque.errors import StepFailed
from toque.workers.loop_watch import BEAT_S, REPORTED_S, STALL_S, Culprit, LoopWatch, sample
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]
TTL_S = 10.0
LOOK_S = 0.1
REAL_S_MAX = 10.0
ONCE = Retries(limit=0)
BLOCKED = "the pod's loop is blocked"
UNRENEWED = "the pod's loop is blocked so long that its session is not renewed"
TURNS = "the pod's loop turns again"


class HandClock:
    """Moved by the test."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def boottime(self) -> float:
        return self.now


class Gate:
    """Blocks whoever enters it, in one C call, until the test opens it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._lock = threading.Lock()
        self._lock.acquire()

    def block(self) -> None:
        self.entered.set()
        assert self._lock.acquire(timeout=REAL_S_MAX), "the test never opened the gate"

    def open(self) -> None:
        self._lock.release()


class Watched:
    """A loop in a thread of its own, and its watch, whose looks and clock are the test's."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.gate = Gate()
        self.watch: LoopWatch
        self.loop: asyncio.AbstractEventLoop
        self.thread: threading.Thread

    def looks(self, seconds: float) -> None:
        """Time passes, and the watch looks as often as it should."""
        for _ in range(round(seconds / LOOK_S)):
            self.clock.now += LOOK_S
            self.watch.look()

    def sampled(self) -> Culprit:
        assert self.thread.ident is not None
        return sample(self.loop, self.thread.ident)

    def in_loop(self, act: Callable[[], Any]) -> Any:
        """What it returns, called in the loop."""

        async def called() -> Any:
            return act()

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(REAL_S_MAX)

    def next_beat(self) -> None:
        """Wait until the loop has beaten once more."""
        beats = self.watch._beats

        async def beaten() -> None:
            while self.watch._beats == beats:
                await asyncio.sleep(0.001)

        asyncio.run_coroutine_threadsafe(beaten(), self.loop).result(REAL_S_MAX)


Story = Callable[[Gate], Coroutine[Any, Any, Any]]


@contextmanager
def running(story: Story) -> Iterator[Watched]:
    """Run the story in a loop that is watched, up to where it enters the gate; open the gate at the end."""
    watched = Watched()
    over = threading.Event()

    async def main() -> None:
        watched.loop = asyncio.get_running_loop()
        watched.watch = LoopWatch(watched.clock, ttl_s=TTL_S)
        watched.watch.start()
        await story(watched.gate)
        while not over.is_set():
            await asyncio.sleep(0.001)
        watched.watch.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    watched.thread = threading.Thread(target=run, daemon=True)
    watched.thread.start()
    assert watched.gate.entered.wait(REAL_S_MAX), "the story never entered the gate"
    while top_frame_of(watched.thread) != "block":
        os.sched_yield()
    try:
        yield watched
    finally:
        over.set()
        if watched.gate._lock.locked():
            watched.gate.open()
        watched.thread.join(REAL_S_MAX)
        assert not watched.thread.is_alive()


def top_frame_of(thread: threading.Thread) -> str:
    assert thread.ident is not None
    return sys._current_frames()[thread.ident].f_code.co_name


async def blocks(gate: Gate) -> None:
    gate.block()


class Values:
    """A result type whose validation blocks."""

    gate: Gate

    def __init__(self, text: str) -> None:
        self.gate.block()


def the_flow(act: Callable[[Gate, Step], Coroutine[Any, Any, Any]]) -> Story:
    """A story that runs an instance whose run() does this."""

    class Flow(Workflow[Any, Any], name="flow"):
        env: Gate

        async def run(self, event: Event, step: Step) -> Any:
            try:
                return await act(self.env, step)
            except StepFailed as error:
                return str(error)

    async def story(gate: Gate) -> None:
        host = EngineHost(Flow, env=gate)
        host.create()
        await host.ended()

    return story


async def in_run(gate: Gate, step: Step) -> None:
    gate.block()


async def in_an_async_callback(gate: Gate, step: Step) -> None:
    async def callback() -> None:
        gate.entered.set()
        gate._lock.acquire()

    callback.__code__ = callback.__code__.replace(co_name="block")  # where the harness waits for it
    await step.do("x", callback, retries=ONCE)


async def in_sync_code(gate: Gate, step: Step) -> None:
    async def callback() -> None:
        gate.block()

    await step.do("x", callback, retries=ONCE)


async def in_a_task_of_a_callback(gate: Gate, step: Step) -> None:
    async def callback() -> None:
        await asyncio.gather(asyncio.sleep(0), blocks(gate))

    await step.do("x", callback, retries=ONCE)


async def in_a_coroutine_made_by_a_sync_callback(gate: Gate, step: Step) -> None:
    def callback() -> Any:
        return blocks(gate)

    await step.do("x", callback, retries=ONCE)


@pytest.mark.parametrize(("act", "by", "step", "function"), [
    (in_run, "run() itself", "", "Gate.block"),
    (in_an_async_callback, "the async callback", "x", "callback"),
    (in_sync_code, "sync code in the async callback", "x", "Gate.block"),
    (in_a_task_of_a_callback, "sync code in the async callback", "x", "Gate.block"),
    (in_a_coroutine_made_by_a_sync_callback, "sync code in the async callback", "x", "Gate.block"),
])
def test_what_blocks_the_loop_is_named(act: Any, by: str, step: str, function: str) -> None:
    """Workflow, instance, step, what of it, and the line of the app."""
    with running(the_flow(act)) as watched:
        culprit = watched.sampled()

    assert (culprit.by, culprit.workflow, culprit.instance, culprit.step) == (by, "flow", "i1", step)
    assert culprit.at.startswith(f"{__file__}:") and culprit.at.endswith(function)
    assert function in culprit.stack


def test_a_value_whose_decoding_blocks_is_no_callback() -> None:
    """Encoders and validators are code of the app that runs on the loop, too."""
    pydantic = pytest.importorskip("pydantic")
    gates: list[Gate] = []

    class Slow(pydantic.BaseModel):  # type: ignore[misc, name-defined]  # imported as a test likes it
        text: str

        @pydantic.field_validator("text")
        @classmethod
        def validated(cls, text: str) -> str:
            gates[0].block()
            return text

    async def act(gate: Gate, step: Step) -> None:
        gates.append(gate)

        async def callback() -> Slow:
            return Slow.model_construct(text="t")

        callback.__annotations__["return"] = Slow
        await step.do("x", callback, retries=ONCE)

    with running(the_flow(act)) as watched:
        culprit = watched.sampled()

    assert (culprit.by, culprit.instance) == ("what encodes or decodes a value of the instance", "i1")


def test_code_that_belongs_to_no_instance_accuses_none() -> None:
    """Only its line is told."""
    with running(blocks) as watched:
        culprit = watched.sampled()

    assert (culprit.workflow, culprit.instance, culprit.step) == ("", "", "")
    assert culprit.by.startswith("no step") and culprit.at.endswith("Gate.block")


# -- incidents ---------------------------------------------------------------------------------------------------------

def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.msg["event"] for record in caplog.records if record.name == "toque.loop"]


def test_an_incident_is_told_once_and_once_more_when_the_session_is_not_renewed(caplog: pytest.LogCaptureFixture) -> None:
    """At half a second, at TTL/2, and when it is over."""
    caplog.set_level(logging.INFO)
    with running(the_flow(in_sync_code)) as watched:
        watched.looks(STALL_S)
        assert events(caplog) == []
        watched.looks(BEAT_S + LOOK_S)
        assert events(caplog) == [BLOCKED]
        watched.looks(TTL_S / 2 - STALL_S - 2 * LOOK_S)
        assert events(caplog) == [BLOCKED]
        watched.looks(3 * LOOK_S)
        watched.looks(TTL_S)
        assert events(caplog) == [BLOCKED, UNRENEWED]
        watched.gate.open()
        watched.next_beat()

    assert events(caplog) == [BLOCKED, UNRENEWED, TURNS]
    (line, *_) = [record.msg for record in caplog.records if record.name == "toque.loop"]
    assert (line["workflow"], line["instance"], line["step"]) == ("flow", "i1", "x")
    assert "plain `def`" in line["remedy"]


def test_the_worst_lag_of_the_last_minute_is_kept_with_its_culprit() -> None:
    """Then it is forgotten."""
    with running(the_flow(in_sync_code)) as watched:
        watched.looks(2.0)
        watched.gate.open()
        watched.next_beat()
        watched.next_beat()

        worst = watched.in_loop(watched.watch.worst)
        assert worst.seconds == pytest.approx(2.0 - BEAT_S)
        assert worst.by.startswith("sync code in the async callback, step 'x' of flow/i1, at ")
        assert watched.in_loop(lambda: watched.watch.lag_s) == 0
        watched.clock.now += REPORTED_S + 1
        watched.next_beat()
        assert watched.in_loop(watched.watch.worst).by == ""


def test_a_process_that_stood_still_accuses_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """After SIGCONT the watch may look before the loop beats: it has missed its own looks, so it knows nothing."""
    with running(the_flow(in_sync_code)) as watched:
        watched.looks(LOOK_S)
        watched.clock.now += 60.0
        watched.looks(LOOK_S)
        assert events(caplog) == []
        watched.looks(STALL_S + LOOK_S)
        assert events(caplog) == [BLOCKED]


def test_many_short_callbacks_in_one_turn_are_not_taken_for_one_long_one(caplog: pytest.LogCaptureFixture) -> None:
    """What is seen in the middle of the stall is another step than at its end: nobody is accused alone."""
    second = Gate()

    async def act(gate: Gate, step: Step) -> None:
        async def other() -> None:
            second.block()

        async def callback() -> None:
            gate.block()

        await asyncio.gather(step.do("x", callback, retries=ONCE), step.do("y", other, retries=ONCE))

    with running(the_flow(act)) as watched:
        watched.looks(STALL_S)
        watched.gate.open()
        assert second.entered.wait(REAL_S_MAX)
        watched.looks(STALL_S)
        second.open()

    (line,) = [record.msg for record in caplog.records if record.name == "toque.loop" and record.msg["event"] == BLOCKED]
    assert line["by"].startswith("one step after the other") and "--slots" in line["remedy"]
