"""Time-outs of attempts: async callbacks are cancelled, threads cannot be; what comes late is refused."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from unit.engine_host import EngineHost, ThreadsByHand, play

from toque.errors import StepTimeout
from toque.storage import records as r
from toque.workflow import Retries, Step, StepContext, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]
ONCE = Retries(limit=0)
LATER = Retries(limit=1, delay="1 minute", jitter=False)
REAL_S_MAX = 10.0


class Callbacks:
    """The `env` of these tests."""

    def __init__(self) -> None:
        self.entries: list[int] = []  # attempts
        self.contexts: list[StepContext] = []
        self.out: list[str] = []
        self.release = asyncio.Event()

    def _enter(self, ctx: StepContext) -> None:
        self.entries.append(ctx.attempt)
        self.contexts.append(ctx)

    async def slow(self, ctx: StepContext, first_s: float = 600.0) -> str:
        """Takes long at the first attempt."""
        self._enter(ctx)
        try:
            await asyncio.sleep(first_s if ctx.attempt == 1 else 0.1)
        finally:
            self.out.append("slow")
        return "slow"

    async def stubborn(self, ctx: StepContext) -> str:
        """Swallows its cancellation, and returns when it is released."""
        self._enter(ctx)
        if ctx.attempt > 1:
            return "second"
        while not self.release.is_set():
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.out.append("swallowed")
        return "late"

    def in_thread(self, ctx: StepContext) -> str:
        """A sync callback."""
        self._enter(ctx)
        return f"attempt {ctx.attempt}"


def flow_of(name: str, retries: Retries, *, timeout: str = "5 seconds") -> type[Workflow[Any, Any]]:
    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            try:
                return await step.do("x", getattr(self.env, name), retries=retries, timeout=timeout)
            except StepTimeout as error:
                return [error.step, error.error_type, error.error_message, error.attempts]

    return Flow


def host_of(name: str, retries: Retries) -> EngineHost:
    host = EngineHost(flow_of(name, retries), env=Callbacks())
    host.create()
    return host


def test_a_timed_out_callback_is_cancelled_and_the_step_times_out() -> None:
    """StepTimeout carries step, reason and the number of attempts."""

    async def story() -> None:
        host = host_of("slow", Retries(limit=0))

        assert await host.output() == ["x", "TimeoutError", "the callback took longer than 5 s", 1]
        assert host.env.out == ["slow"]
        assert host.of_kind(r.StepFailed)[0].timed_out

    play(story)


def test_the_time_out_is_for_each_attempt() -> None:
    """The second attempt has all its time."""

    async def story() -> None:
        host = host_of("slow", LATER)

        assert await host.output() == "slow"
        (failed,) = host.of_kind(r.AttemptFailed)
        assert failed.failure.type == "TimeoutError"
        assert host.env.entries == [1, 2]

    play(story)


def test_the_time_out_comes_when_it_is_due() -> None:
    """Not earlier, and at once."""

    async def story() -> None:
        host = host_of("slow", ONCE)
        await host.ended()

        (failed,) = host.of_kind(r.StepFailed)
        assert failed.at - failed.started_at == 5_000

    play(story)


def test_a_callback_in_time_is_left_alone() -> None:
    """No timer is left behind that would cancel anything later."""

    async def story() -> None:
        host = EngineHost(flow_of("slow", ONCE, timeout="601 seconds"), env=Callbacks())
        host.create()

        assert await host.output() == "slow"
        await asyncio.sleep(1000)
        assert host.env.out == ["slow"]

    play(story)


def test_a_callback_that_swallows_its_cancellation_is_refused() -> None:
    """Its late result counts for nothing; the step has gone on without it."""

    async def story() -> None:
        host = host_of("stubborn", LATER)
        await asyncio.sleep(30)
        host.env.release.set()

        assert await host.output() == "second"
        assert host.env.out == ["swallowed"]
        assert len(host.of_kind(r.StepDone)) == 1

    play(story)


def test_the_slot_is_held_until_a_cancelled_callback_is_really_out() -> None:
    """And goes back then, not before: limits count instances inside callbacks (invariant L1)."""

    async def story() -> None:
        host = host_of("stubborn", Retries(limit=0))
        await asyncio.sleep(3600)
        assert (await host.ended()).status is r.Status.COMPLETE
        assert host.slots_given_back == 0
        assert host.callbacks.abandoned == host.callbacks.inside == 1

        host.env.release.set()
        await host.settle()
        assert host.slots_given_back == 1
        assert host.callbacks.abandoned == host.callbacks.inside == host.inside == 0

    play(story)


def test_a_retry_comes_though_the_timed_out_callback_is_still_inside() -> None:
    """A callback that hangs for ever does not keep its step from being tried again."""

    async def story() -> None:
        host = host_of("stubborn", LATER)
        await asyncio.sleep(3600)

        assert await host.output() == "second"
        assert host.env.entries == [1, 2]
        host.env.release.set()
        await host.settle()

    play(story)


def test_the_instance_rests_once_the_late_callback_is_out() -> None:
    """Between attempts, with nothing inside any more, it needs no slot."""

    async def story() -> None:
        host = host_of("stubborn", Retries(limit=1, delay="1 hour", jitter=False))
        await asyncio.sleep(60)
        assert host.row is not None
        assert host.row.status is r.Status.RUNNING

        host.env.release.set()
        await host.settle()
        assert host.row.status is r.Status.WAITING
        assert host.slots_given_back == 1
        assert await host.output() == "second"

    play(story)


def test_the_context_is_cancelled_when_the_result_cannot_count_any_more() -> None:
    """From the time-out on."""

    async def story() -> None:
        host = host_of("stubborn", LATER)
        await asyncio.sleep(4.9)
        assert not host.env.contexts[0].cancelled
        await asyncio.sleep(0.2)
        assert host.env.contexts[0].cancelled

        host.env.release.set()
        await host.ended()

    play(story)


def threaded(retries: Retries) -> EngineHost:
    """An instance whose sync callback waits for the test to let its thread run."""
    host = host_of("in_thread", retries)
    host.callbacks.by_hand = True
    return host


async def in_a_thread(host: EngineHost) -> Any:
    """The next waiting thread's work."""
    while not host.callbacks.waiting:
        await asyncio.sleep(0.1)
    return host.callbacks.waiting.pop(0)


def test_a_sync_callback_runs_in_a_thread() -> None:
    """Its time begins when its thread does, not while it waits for one."""

    async def story() -> None:
        host = threaded(ONCE)
        work = await in_a_thread(host)
        await asyncio.sleep(3600)
        assert host.callbacks.threads_inside == 1
        assert host.engine is not None
        assert host.engine.threads_inside == 1
        work()

        assert await host.output() == "attempt 1"
        assert host.callbacks.threads_inside == host.callbacks.inside == 0

    play(story)


class RealThreads(ThreadsByHand):
    """Each sync callback gets a thread, whose callback says when it is inside and waits to be released."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[threading.Thread] = []
        self.entered = threading.Event()
        self.release = threading.Event()

    def submit(self, fn: Callable[[], None]) -> None:
        thread = threading.Thread(target=fn, daemon=True)
        self.threads.append(thread)
        thread.start()
        assert self.entered.wait(REAL_S_MAX), "the callback was not entered"
        self.entered.clear()

    def let_out(self) -> None:
        """Release the callbacks and wait until their threads are over."""
        self.release.set()
        for thread in self.threads:
            thread.join(REAL_S_MAX)
            assert not thread.is_alive()
        self.release.clear()

    def inside_thread(self) -> None:
        """For the callback: say so, and wait."""
        self.entered.set()
        assert self.release.wait(REAL_S_MAX), "nobody released the callback"


class ThreadEnv:
    """Its sync callback waits in its thread at the first attempt."""

    def __init__(self, threads: RealThreads) -> None:
        self.threads = threads
        self.contexts: list[StepContext] = []
        self.seen: list[bool] = []  # ctx.cancelled, as the first attempt sees it when it is released
        self.raises = False

    def hanging(self, ctx: StepContext) -> str:
        self.contexts.append(ctx)
        if ctx.attempt > 1:
            self.threads.entered.set()
            return "second"
        self.threads.inside_thread()
        self.seen.append(ctx.cancelled)
        if self.raises:
            raise ValueError("late")
        return "late"


def with_threads(retries: Retries, *, raises: bool = False) -> tuple[EngineHost, RealThreads]:
    threads = RealThreads()
    host = EngineHost(flow_of("hanging", retries), env=ThreadEnv(threads))
    host.callbacks = threads
    host.env.raises = raises
    host.create()
    return host, threads


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_a_late_result_of_a_thread_is_refused_and_counted(raises: bool) -> None:
    """The thread cannot be stopped: it is counted until it is out, sees `ctx.cancelled`, and changes nothing."""

    async def story() -> None:
        host, threads = with_threads(LATER, raises=raises)
        await asyncio.sleep(30)
        assert (threads.abandoned, threads.threads_inside) == (1, 1)
        assert (threads.threads_taken, threads.threads_abandoned) == (1, 1)
        threads.let_out()
        await host.settle()

        assert (threads.abandoned, threads.threads_inside, threads.inside) == (0, 0, 0)
        assert (threads.threads_taken, threads.threads_abandoned) == (0, 0)
        assert host.env.seen == [True]
        assert await host.output() == "second"
        assert len(host.of_kind(r.AttemptFailed)) == 1

    play(story)


def said(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.msg for record in caplog.records if record.name == "toque.callbacks"]


def test_an_abandoned_callback_is_told_when_it_is_abandoned_and_when_it_returns(caplog: pytest.LogCaptureFixture) -> None:
    """By its step and instance; and how late it was."""
    caplog.set_level(logging.INFO)

    async def story() -> None:
        host, threads = with_threads(LATER)
        await asyncio.sleep(30)
        threads.let_out()
        await host.settle()

    play(story)
    abandoned, _, returned = said(caplog)
    assert abandoned["event"] == "a callback is abandoned; its thread goes on"
    assert returned["event"] == "an abandoned callback has returned, and is refused"
    assert abandoned["callback"] == returned["callback"] == "step 'x' of Flow/i1"
    assert returned["late_s"] == pytest.approx(25)


def test_a_pod_whose_threads_are_all_abandoned_says_so_and_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    """With one thread, one is all. It names the callbacks, and it says so once."""

    async def story() -> None:
        host, threads = with_threads(LATER)
        assert threads.threads_max == 1
        await asyncio.sleep(30)
        threads.let_out()
        await host.settle()

    play(story)
    (line,) = [line for line in said(caplog) if line["level"] == "error"]
    assert line["event"] == "all threads are held by abandoned callbacks: no sync callback can be entered here"
    assert line["callbacks"] == "step 'x' of Flow/i1"
    assert "restart the pod" in line["remedy"] and "ctx.cancelled" in line["remedy"]


def test_a_callback_that_waits_for_a_thread_has_taken_none() -> None:
    """A pod whose threads are busy shows as many as it has, not all that wait for them."""

    async def story() -> None:
        host = threaded(ONCE)
        work = await in_a_thread(host)
        assert (host.callbacks.threads_inside, host.callbacks.threads_taken) == (1, 0)
        work()
        await host.ended()

        assert (host.callbacks.threads_inside, host.callbacks.threads_taken) == (0, 0)

    play(story)


def test_the_slot_is_held_until_the_thread_is_out() -> None:
    """Though the instance has ended long before."""

    async def story() -> None:
        host, threads = with_threads(ONCE)
        end = await host.ended()
        assert end.status is r.Status.COMPLETE
        assert host.engine is not None
        assert host.engine.threads_inside == 1
        assert host.slots_given_back == 0

        threads.let_out()
        await host.settle()
        assert host.engine is None
        assert host.slots_given_back == 1

    play(story)


def test_a_thread_that_hangs_does_not_keep_its_step_from_being_tried_again() -> None:
    """The retry comes when it is due."""

    async def story() -> None:
        host, threads = with_threads(LATER)

        assert await host.output() == "second"
        assert [ctx.attempt for ctx in host.env.contexts] == [1, 2]
        threads.let_out()
        await host.settle()

    play(story)


def test_a_late_thread_of_an_engine_that_has_left_memory_changes_nothing() -> None:
    """The session was lost while it was inside."""

    async def story() -> None:
        host, threads = with_threads(LATER)
        await asyncio.sleep(1)
        host.crash()
        threads.let_out()
        await host.settle()

        assert host.env.seen == [True]
        assert host.pending == []
        assert (threads.abandoned, threads.threads_inside, threads.inside) == (0, 0, 0)

    play(story)
