"""The loop of one instance: what it runs, in which order, and what it refuses."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
from asyncio import events
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from toque.errors import MisuseError
from toque.workers.instance_loop import EVICTIONS_MAX, TASKS_KEPT_MIN, Evicted, InstanceLoop, explain

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")


class Running:
    """A coroutine on a loop of its own, and futures to hand results to it."""

    def __init__(self, main: Callable[[Running], Coroutine[Any, Any, Any]]) -> None:
        self.loop = InstanceLoop()  # type: ignore[abstract]  # what is missing is refused at run time
        self.futures: dict[str, asyncio.Future[Any]] = {}
        self.log: list[Any] = []
        self.task: asyncio.Task[Any]
        self.loop.drain(self._begin, main)

    def _begin(self, main: Callable[[Running], Coroutine[Any, Any, Any]]) -> None:
        self.task = self.loop.create_task(main(self))

    def wait(self, name: str) -> asyncio.Future[Any]:
        """What run() calls: wait for a result by name."""
        return self.futures.setdefault(name, self.loop.create_future())

    def give(self, name: str, value: Any = None) -> None:
        """What the engine does: hand one result out."""
        self.loop.drain(self.futures.pop(name).set_result, value)


def test_it_runs_until_nothing_is_ready() -> None:
    """In one drain: tasks that wake each other, and what they make."""

    async def main(run: Running) -> int:
        async def child(number: int) -> int:
            await asyncio.sleep(0)
            return number

        return sum(await asyncio.gather(*(child(number) for number in range(10)))) + await run.wait("a")

    run = Running(main)
    assert not run.task.done()
    run.give("a", 100)
    assert run.task.result() == 145


def test_callbacks_run_in_the_order_they_came() -> None:
    """First in, first out, as asyncio promises; a cancelled one does not run."""

    async def main(run: Running) -> None:
        loop = asyncio.get_running_loop()
        handles = [loop.call_soon(run.log.append, number) for number in range(5)]
        handles[2].cancel()
        assert handles[2].cancelled()
        loop.call_soon(loop.call_soon, run.log.append, "later")
        loop.call_soon(run.log.append, "soon")

    assert Running(main).log == [0, 1, 3, 4, "soon", "later"]


def test_the_parts_of_asyncio_that_need_no_clock_work() -> None:
    """TaskGroup, gather, wait, shield, as_completed, Event, Lock, Semaphore, Condition, Queue."""

    async def main(run: Running) -> Any:
        queue: asyncio.Queue[int] = asyncio.Queue(1)
        condition, semaphore, event, lock = asyncio.Condition(), asyncio.Semaphore(2), asyncio.Event(), asyncio.Lock()
        found: list[Any] = []

        async def produce() -> None:
            for number in range(3):
                await queue.put(number)
            async with condition:
                condition.notify_all()
            event.set()

        async def consume() -> None:
            for _ in range(3):
                async with semaphore, lock:
                    found.append(await queue.get())

        async def watch() -> None:
            async with condition:
                await condition.wait()
            await event.wait()
            found.append("notified")

        async with asyncio.TaskGroup() as group:
            for branch in (watch(), consume(), produce()):
                group.create_task(branch, name="branch")
        first, second = run.wait("first"), run.wait("second")
        done, pending = await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        found.append((len(done), len(pending)))
        for next_ in asyncio.as_completed([second]):
            found.append(await asyncio.shield(next_))
        return found

    run = Running(main)
    run.give("first")
    run.give("second", "second")
    assert sorted(map(str, run.task.result())) == sorted(["0", "1", "2", "notified", "(1, 1)", "second"])


def test_the_order_of_results_alone_decides() -> None:
    """The same results in the same order come to the same trace, whatever happened between them."""

    async def main(run: Running) -> None:
        async def branch(tag: str) -> None:
            for number in range(3):
                run.log.append((tag, number, await run.wait(f"{tag}{number}")))

        async with asyncio.TaskGroup() as group:
            for tag in "abc":
                group.create_task(branch(tag))

    order = ["b0", "a0", "b1", "c0", "a1", "b2", "a2", "c1", "c2"]
    runs = [Running(main), Running(main)]
    for name in order:
        for run in runs:
            run.give(name, name)

    assert runs[0].log == runs[1].log == [(name[0], int(name[1]), name) for name in order]


def test_it_knows_the_current_task_and_loop() -> None:
    """As code on any loop expects; and the outer loop is the running one again afterwards."""

    async def main(run: Running) -> None:
        run.log.append(asyncio.current_task() is not None)
        run.log.append(asyncio.get_running_loop() is run.loop)

    async def outside() -> list[Any]:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        loop.call_soon(lambda: done.set_result(Running(main)))
        run: Running = await done
        return [*run.log, asyncio.get_running_loop() is loop]

    assert asyncio.run(outside()) == [True, True, True]


def test_context_variables_belong_to_their_task() -> None:
    """Each task has a copy, as on any loop."""

    async def main(run: Running) -> None:
        async def child() -> None:
            variable.set("child")
            await asyncio.sleep(0)
            run.log.append(variable.get())

        variable.set("main")
        await asyncio.gather(child(), child())
        run.log.append(variable.get())

    assert Running(main).log == ["child", "child", "main"]
    assert variable.get() == "none"


@pytest.mark.parametrize("name", [
    "call_later", "call_at", "time", "call_soon_threadsafe", "run_in_executor", "create_connection", "create_server",
    "create_unix_connection", "create_datagram_endpoint", "sock_recv", "sock_connect", "add_reader", "add_signal_handler",
    "subprocess_exec", "getaddrinfo", "connect_read_pipe", "sendfile", "start_tls", "stop", "close", "run_forever",
    "run_until_complete", "set_exception_handler", "set_task_factory", "shutdown_asyncgens", "set_debug",
])
def test_what_needs_more_than_results_is_refused(name: str) -> None:
    """Clock, threads, sockets, processes, and the loop's own life; the message says what to do instead."""
    loop = InstanceLoop()  # type: ignore[abstract]  # what is missing is refused at run time

    with pytest.raises(MisuseError, match="Put it into a step"):
        getattr(loop, name)(*(() if name == "time" else (1, print)))


def test_every_method_of_a_loop_is_either_there_or_refused() -> None:
    """A new Python may bring new ones: none may fail with an empty NotImplementedError."""
    inherited = [name for name, method in vars(asyncio.AbstractEventLoop).items()
                 if callable(method) and not name.startswith("__") and name not in vars(InstanceLoop)]

    assert inherited == []


def test_nobody_outside_can_wake_it_up() -> None:
    """An Event of run() set from a callback of the pod would not be set on replay."""
    caught: list[asyncio.Event] = []

    async def main(run: Running) -> None:
        event = asyncio.Event()
        caught.append(event)
        await event.wait()

    run = Running(main)
    with pytest.raises(MisuseError, match="woke up run"):
        caught[0].set()
    run.loop.unwind()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), ValueError("plain")])
def test_what_a_plain_callback_raises_comes_out_of_the_drain(error: BaseException) -> None:
    """The engine ends the instance with it; the outer loop and its hooks are in place again."""
    loop = InstanceLoop()  # type: ignore[abstract]  # what is missing is refused at run time
    hooks = sys.get_asyncgen_hooks()

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        loop.drain(loop.call_soon, fail)
    assert events._get_running_loop() is None
    assert sys.get_asyncgen_hooks() == hooks


def test_spinning_is_ended() -> None:
    """A task that never waits for a result does not hang the pod."""

    async def main(run: Running) -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(MisuseError, match="spins"):
        Running(main)


def test_unwinding_ends_every_task() -> None:
    """The `finally` blocks run at once, and nothing that they schedule does."""

    async def main(run: Running) -> None:
        async def child(tag: str) -> None:
            try:
                await run.wait(tag)
            except BaseException as error:  # it is looked at
                run.log.append((tag, type(error)))
                run.late = asyncio.create_task(child("late"))  # type: ignore[attr-defined]  # kept for the test
                raise

        async with asyncio.TaskGroup() as group:
            group.create_task(child("a"))
            group.create_task(child("b"))

    run = Running(main)
    run.loop.unwind()

    assert sorted(run.log) == [("a", Evicted), ("b", Evicted)]
    assert run.loop._tasks == []


def test_unwinding_lets_code_wait_a_few_times_but_not_for_ever() -> None:
    """Code that catches whatever is raised is asked again and again, then left."""

    async def main(run: Running) -> None:
        while len(run.log) < EVICTIONS_MAX // 2:
            try:
                await run.loop.create_future()
            except BaseException as error:  # noqa: BLE001  # as users write it
                run.log.append(type(error))

    run = Running(main)
    run.loop.unwind()

    assert set(run.log) == {Evicted}
    assert len(run.log) == EVICTIONS_MAX // 2


def test_an_unfinished_generator_is_closed_by_its_own_loop() -> None:
    """Live when it is dropped, and when the instance leaves."""

    async def numbers(run: Running, tag: str) -> AsyncIterator[int]:
        try:
            yield 1
            await run.wait("never")
        finally:
            run.log.append(tag)

    async def main(run: Running) -> None:
        async for _ in numbers(run, "dropped"):
            break
        run.log.append("goes on")
        async for _ in numbers(run, "evicted"):
            await run.wait("a")

    run = Running(main)
    assert run.log == ["dropped", "goes on"]
    run.loop.unwind()
    gc.collect()
    assert run.log == ["dropped", "goes on", "evicted"]


def test_done_tasks_are_forgotten() -> None:
    """However many there were, and those that wait are not."""

    async def main(run: Running) -> None:
        waiting = [asyncio.create_task(run.wait_(n)) for n in range(5)]  # type: ignore[attr-defined]  # see below
        for _ in range(1000):
            await asyncio.create_task(asyncio.sleep(0))
        run.log.append(len(run.loop._tasks))
        await asyncio.gather(*waiting)

    class Waiting(Running):
        async def wait_(self, number: int) -> None:
            await self.wait(f"w{number}")

    run = Waiting(main)  # type: ignore[arg-type]  # main takes the base class
    assert 6 <= run.log[0] <= 2 * TASKS_KEPT_MIN + 6
    assert sum(not task.done() for task in run.loop._tasks) == 6
    run.loop.unwind()


@pytest.mark.parametrize("error", [
    RuntimeError("Task <T> got Future <F> attached to a different loop"),
    RuntimeError("<asyncio.locks.Lock object> is bound to a different event loop"),
    ExceptionGroup("a group", [ValueError(), ExceptionGroup("inner", [RuntimeError("attached to a different loop")])]),
])
def test_asyncios_words_for_a_foreign_await_are_put_into_ours(error: BaseException) -> None:
    """Alone and in groups."""
    explained = explain(error)

    assert isinstance(explained, MisuseError)
    assert "await step.do(" in str(explained)


@pytest.mark.parametrize("error", [RuntimeError("else"), ValueError("attached to a different loop"), SystemExit(1),
                                   ExceptionGroup("a group", [ValueError()])])
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    """Nothing else is a foreign await."""
    assert explain(error) is error
