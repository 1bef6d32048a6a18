"""The virtual-time loop: time, determinism, executor calls, threads, deadlocks, and the clock on it."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from toque.sim.loop import START_S, Deadlock, VirtualClock, VirtualLoop, run

MONTH_S = 30 * 24 * 3600.0
REAL_S_MAX = 5.0  # far below any virtual time in here


def virtual_loop() -> VirtualLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def test_a_long_sleep_takes_no_real_time() -> None:
    """Virtual time moves straight to the next timer."""
    began = time.monotonic()

    async def main() -> float:
        await asyncio.sleep(MONTH_S)
        return virtual_loop().time()

    assert run(main(), seed=1) == pytest.approx(START_S + MONTH_S)
    assert time.monotonic() - began < REAL_S_MAX


def test_timers_fire_in_the_order_of_their_times() -> None:
    """Whatever order they were set in."""
    fired: list[str] = []

    async def main() -> None:
        loop = virtual_loop()
        loop.call_later(2, fired.append, "second")
        loop.call_later(3, fired.append, "third")
        loop.call_later(1, fired.append, "first")
        await asyncio.sleep(4)

    run(main(), seed=1)

    assert fired == ["first", "second", "third"]


def test_time_stands_still_while_something_is_ready() -> None:
    """Work costs no virtual time."""

    async def main() -> float:
        for _ in range(100):
            await asyncio.sleep(0)
        return virtual_loop().time()

    assert run(main(), seed=1) == START_S


def test_a_timeout_ends_a_wait_in_virtual_time() -> None:
    """`asyncio.timeout` works on the virtual clock, to the instant."""

    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await asyncio.Event().wait()
        return virtual_loop().time()

    assert run(main(), seed=1) == pytest.approx(START_S + 60)


async def _trace_of_a_race() -> list[tuple[str, float]]:
    loop = virtual_loop()
    trace: list[tuple[str, float]] = []

    async def racer(name: str) -> None:
        for _ in range(5):
            await asyncio.sleep(loop.rng.random())
            trace.append((name, loop.time()))
            await asyncio.to_thread(trace.append, (f"{name} in a thread", loop.time()))

    await asyncio.gather(*(racer(name) for name in "abc"))
    return trace


def test_one_seed_gives_one_run() -> None:
    """Two runs of a seed are equal event for event; another seed gives another order."""
    first, again, other = (run(_trace_of_a_race(), seed=seed) for seed in (7, 7, 8))

    assert first == again
    assert [name for name, _ in first] != [name for name, _ in other]


def test_executor_calls_run_inline_and_take_virtual_time() -> None:
    """No thread is made: the call sees the loop's own thread, and its result comes a little later."""

    async def main() -> tuple[int, float]:
        return await asyncio.to_thread(threading.get_ident), virtual_loop().time()

    thread, at = run(main(), seed=1)

    assert thread == threading.get_ident()
    assert START_S < at < START_S + 1


def test_an_executor_call_hands_its_exception_to_the_caller() -> None:
    """As with a real executor."""

    async def main() -> None:
        await virtual_loop().run_in_executor(None, int, "no number")

    with pytest.raises(ValueError, match="no number"):
        run(main(), seed=1)


def test_a_cancelled_executor_call_may_have_run() -> None:
    """Like a thread it cannot be stopped half-way: over many seeds some cancelled calls ran and some did not."""

    async def main() -> bool:
        ran: list[int] = []
        call = virtual_loop().run_in_executor(None, ran.append, 1)
        await asyncio.sleep(0.003)
        call.cancel()
        await asyncio.sleep(1)
        return bool(ran)

    assert {run(main(), seed=seed) for seed in range(20)} == {True, False}


def test_a_deadlock_names_who_waits() -> None:
    """With nothing scheduled the run ends at once with the pending tasks and the lines where they wait."""

    async def wait_for_nothing() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await asyncio.create_task(wait_for_nothing(), name="the owner of station 3")

    with pytest.raises(Deadlock) as caught:
        run(main(), seed=1)

    assert any("the owner of station 3 in" in task and "wait_for_nothing" in task for task in caught.value.tasks)
    assert "the owner of station 3" in str(caught.value)


def test_what_main_leaves_behind_is_cancelled() -> None:
    """Like `asyncio.run`: background tasks get their CancelledError before the loop closes."""
    ended: list[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(MONTH_S)
        finally:
            ended.append("cancelled")

    async def main() -> None:
        task = asyncio.create_task(background())
        await asyncio.sleep(1)
        assert not task.done()

    run(main(), seed=1)

    assert ended == ["cancelled"]


def test_call_soon_threadsafe_wakes_the_loop() -> None:
    """Also when it comes from a real thread while nothing else is scheduled."""

    async def main() -> str:
        loop, answer = virtual_loop(), virtual_loop().create_future()
        thread = threading.Thread(target=lambda: loop.call_soon_threadsafe(answer.set_result, "from the thread"))
        thread.start()
        result: str = await answer
        thread.join()
        return result

    assert run(main(), seed=1) == "from the thread"


def test_a_clock_counts_the_loops_time() -> None:
    """A plain VirtualClock agrees with the loop."""

    async def main() -> float:
        clock = VirtualClock(virtual_loop())
        before = clock.boottime()
        await asyncio.sleep(10)
        return clock.boottime() - before

    assert run(main(), seed=1) == pytest.approx(10)


def test_clocks_of_two_hosts_drift_apart() -> None:
    """`skew_s` is where a host's clock stands, `rate` how fast it runs."""

    async def main() -> tuple[float, float]:
        true, fast = VirtualClock(virtual_loop()), VirtualClock(virtual_loop(), skew_s=5.0, rate=1.5)
        skew = fast.boottime() - START_S * 1.5
        before = true.boottime(), fast.boottime()
        await asyncio.sleep(100)
        assert true.boottime() - before[0] == pytest.approx(100)
        return skew, fast.boottime() - before[1]

    skew, passed = run(main(), seed=1)

    assert skew == pytest.approx(5)
    assert passed == pytest.approx(150)


def test_a_clock_that_stood_never_catches_up() -> None:
    """As of a machine that was stopped by its hypervisor."""

    async def main() -> None:
        clock = VirtualClock(virtual_loop(), skew_s=5.0, rate=2.0)
        before = clock.boottime()
        clock.stand()
        await asyncio.sleep(10)
        assert clock.boottime() == before
        clock.go_on()
        assert clock.boottime() == pytest.approx(before)
        await asyncio.sleep(1)
        assert clock.boottime() == pytest.approx(before + 2)

    run(main(), seed=1)
