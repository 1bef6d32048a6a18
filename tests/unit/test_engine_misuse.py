"""Misuse of run() and callbacks: each gets a message that names the thing and the remedy, and ends one instance alone."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import pytest
from unit.engine_host import EngineHost, play, raises_misuse

from toque.errors import StepFailed
from toque.storage import records as r
from toque.workers.instance_loop import TURN_CALLBACKS_MAX
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]
Body = Callable[[Any, Step], Awaitable[Any]]


async def work() -> int:
    return 1


def flow_of(body: Body) -> type[Workflow[Any, Any]]:
    """A workflow whose run() is `await body(env, step)`."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            return await body(self.env, step)

    return Flow


def host_of(body: Body, env: Any = None) -> EngineHost:
    host = EngineHost(flow_of(body), env=env)
    host.create()
    return host


def failure_of(body: Body, env: Callable[[], Any] = lambda: None) -> r.Failure:
    """How an instance with this run() fails."""

    async def story() -> r.Failure:
        return await host_of(body, env()).failure()

    return play(story)


def output_of(body: Body, env: Callable[[], Any] = lambda: None) -> Any:
    """What an instance with this run() returns."""

    async def story() -> Any:
        return await host_of(body, env()).output()

    return play(story)


# -- steps that nobody awaits ------------------------------------------------------------------------------------------

async def not_awaited(env: Any, step: Step) -> None:
    step.do("forgotten", work)  # that is the point
    await step.do("other", work)
    await step.sleep("pause", "1 second")


async def returns_too_early(env: Any, step: Step) -> None:
    step.do("forgotten", work)  # that is the point


async def sleep_not_awaited(env: Any, step: Step) -> None:
    step.sleep("forgotten", "1 day")  # that is the point


async def branch_not_awaited(env: Any, step: Step) -> None:
    async def branch() -> None:
        await step.do("forgotten", work)

    env.append(asyncio.create_task(branch()))
    await asyncio.sleep(0)


async def failed_and_not_looked_at(env: Any, step: Step) -> None:
    async def fails() -> None:
        raise ValueError

    step.do("forgotten", fails, retries=Retries(limit=0))  # that is the point
    await step.sleep("pause", "1 second")


@pytest.mark.parametrize(("body", "words"), [
    (not_awaited, ["run() never awaited do('forgotten', occurrence 1)", "await step.do("]),
    (returns_too_early, ["run() returned with steps open: do('forgotten', occurrence 1)", "Await every step"]),
    (sleep_not_awaited, ["run() returned with steps open: sleep('forgotten', occurrence 1)"]),
    (branch_not_awaited, ["run() returned with steps open: do('forgotten', occurrence 1)"]),
    (failed_and_not_looked_at, ["run() never awaited do('forgotten', occurrence 1)"]),
])
def test_a_step_that_is_not_awaited_is_named(body: Body, words: list[str]) -> None:
    """Whether its result came or not."""
    raises_misuse(failure_of(body, list), *words)


def test_many_open_steps_are_named_in_short() -> None:
    """The first few, and how many more."""

    async def body(env: Any, step: Step) -> None:
        for number in range(100):
            step.do(f"s{number}", work)  # that is the point

    failure = failure_of(body)

    raises_misuse(failure, "do('s0', occurrence 1)", "and 95 more")
    assert len(failure.message) < 400


def test_a_step_may_be_awaited_late_and_looked_at_in_any_way() -> None:
    """Awaited after its result came, gathered, waited for, cancelled: none of it is misuse."""

    async def body(env: Any, step: Step) -> Any:
        early, other, third = step.do("a", work), step.do("b", work), step.do("c", work)
        slow = step.sleep("slow", "1 day")
        await step.sleep("pause", "1 second")
        done, _ = await asyncio.wait([other])
        slow.cancel()
        return [await early, done.pop().result(), *await asyncio.gather(third), slow.cancelled()]

    assert output_of(body) == [1, 1, 1, True]


# -- what is given to step.do ------------------------------------------------------------------------------------------

async def no_function(env: Any, step: Step) -> None:
    await step.do("nameless")  # type: ignore[misc]  # that is the point


async def none_as_function(env: Any, step: Step) -> None:
    await step.do("nameless", None)  # type: ignore[call-overload]  # that is the point


async def decorator_never_used(env: Any, step: Step) -> None:
    step.do("nameless")
    await step.do("a", work)


async def arguments_without_function(env: Any, step: Step) -> None:
    await step.do("nameless", None, 1)  # type: ignore[call-overload]  # that is the point


async def gathered_without_function(env: Any, step: Step) -> None:
    await asyncio.gather(step.do("nameless"))  # type: ignore[call-overload]  # that is the point


async def a_number(env: Any, step: Step) -> None:
    await step.do("nameless", 5)  # type: ignore[call-overload]  # that is the point


async def decorated_number(env: Any, step: Step) -> None:
    step.do("nameless")(5)  # type: ignore[call-overload]  # that is the point


async def a_coroutine(env: Any, step: Step) -> None:
    await step.do("nameless", work())  # type: ignore[call-overload]  # that is the point


async def a_step(env: Any, step: Step) -> None:
    await step.do("nameless", step.do("inner", work))  # type: ignore[call-overload]  # that is the point


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("body", "words"), [
    (no_function, ["step 'nameless' has no function", "await step.do('nameless', fn)", "@step.do('nameless')"]),
    (none_as_function, ["step 'nameless' has no function"]),
    (decorator_never_used, ["do('nameless'), which was given no function"]),
    (arguments_without_function, ["step 'nameless' has arguments but no function"]),
    (gathered_without_function, ["step 'nameless' has no function"]),
    (a_number, ["step 'nameless'", "must be a function, not an int"]),
    (decorated_number, ["step 'nameless'", "must be a function, not an int"]),
    (a_coroutine, ["step 'nameless'", "not a coroutine", "pass the function itself"]),
    (a_step, ["step 'nameless'", "not a StepCall", "pass the function itself"]),
])
def test_what_is_no_function_is_refused(body: Body, words: list[str]) -> None:
    """Missing, not callable, or the result of a call instead of the function."""
    raises_misuse(failure_of(body), *words)


async def bare_sleep(env: Any, step: Step) -> None:
    await step.sleep("pause", 5)  # type: ignore[arg-type]  # that is the point


async def bare_timeout(env: Any, step: Step) -> None:
    await step.do("a", work, timeout=5)  # type: ignore[call-overload]  # that is the point


async def bare_delay(env: Any, step: Step) -> None:
    await step.do("a", work, retries=Retries(delay=2.5))  # type: ignore[arg-type]  # that is the point


async def naive_date(env: Any, step: Step) -> None:
    await step.sleep_until("date", datetime(2027, 1, 1))  # that is the point


async def number_as_date(env: Any, step: Step) -> None:
    await step.sleep_until("date", 1_800_000_000)  # type: ignore[arg-type]  # that is the point


async def far_date(env: Any, step: Step) -> None:
    await step.sleep_until("date", datetime.max.replace(tzinfo=datetime.now().astimezone().tzinfo))


async def retries_as_number(env: Any, step: Step) -> None:
    await step.do("a", work, retries=3)  # type: ignore[call-overload]  # that is the point


async def empty_name(env: Any, step: Step) -> None:
    await step.do("", work)


async def name_with_line_break(env: Any, step: Step) -> None:
    await step.sleep("a\nb", "1 second")


@pytest.mark.parametrize(("body", "words"), [
    (bare_sleep, ["step.sleep('pause')", '"5 seconds"', "timedelta(seconds=5)"]),
    (bare_timeout, ["timeout", '"5 seconds"', "timedelta(seconds=5)"]),
    (bare_delay, ["Retries.delay", '"2.5 seconds"', "timedelta(seconds=2.5)"]),
    (naive_date, ["step.sleep_until('date')", "time zone", "tzinfo=UTC"]),
    (number_as_date, ["step.sleep_until('date')", "datetime"]),
    (far_date, ["step.sleep_until('date')", "365 days"]),
    (retries_as_number, ["retries must be Retries(limit="]),
    (empty_name, ["step name is empty"]),
    (name_with_line_break, ["step name", "control character"]),
])
def test_bad_arguments_are_refused_where_they_are_given(body: Body, words: list[str]) -> None:
    """Bare numbers as durations above all: the message shows both forms."""
    raises_misuse(failure_of(body), *words)


# -- steps in the wrong place ------------------------------------------------------------------------------------------

async def inside_async(env: Any, step: Step) -> None:
    async def callback() -> None:
        await step.do("inner", work)

    await step.do("outer", callback)


async def inside_thread(env: Any, step: Step) -> None:
    def callback() -> None:
        step.sleep("inner", "1 second")  # that is the point

    await step.do("outer", callback)


@pytest.mark.parametrize("body", [inside_async, inside_thread])
def test_a_step_inside_a_callback_fails_the_outer_step_at_once(body: Body) -> None:
    """On the loop and in a thread alike; without retries, for it would come to the same."""
    failure = failure_of(body)

    assert failure.type == "toque.errors.StepFailed"
    for words in ("step 'outer' failed after 1 attempt", "step 'inner' was called inside a callback", "run() itself"):
        assert words in failure.message


def test_a_step_of_another_instance_is_refused() -> None:
    """A `step` that leaked out of its own run()."""
    leaked: list[Step] = []

    async def leaks(env: Any, step: Step) -> None:
        leaked.append(step)
        await step.sleep("pause", "1 day")

    async def uses(env: Any, step: Step) -> None:
        await leaked[0].do("foreign", work)

    async def story() -> r.Failure:
        other = EngineHost(flow_of(leaks))
        other.evicts = False
        other.create()
        await other.settle()
        failure = await host_of(uses).failure()
        other.crash()
        return failure

    raises_misuse(play(story), "step 'foreign'", "outside run()")


# -- foreign awaits ----------------------------------------------------------------------------------------------------

async def sleeps(env: Any, step: Step) -> None:
    await asyncio.sleep(1)


async def waits_for(env: Any, step: Step) -> None:
    await asyncio.wait_for(step.do("a", work), 1)


async def times_out(env: Any, step: Step) -> None:
    async with asyncio.timeout(1):
        await step.do("a", work)


async def goes_to_a_thread(env: Any, step: Step) -> None:
    await asyncio.to_thread(print)


async def opens_a_connection(env: Any, step: Step) -> None:
    await asyncio.open_connection("127.0.0.1", 1)


async def starts_a_process(env: Any, step: Step) -> None:
    await asyncio.create_subprocess_exec("true")


async def looks_up_a_name(env: Any, step: Step) -> None:
    await asyncio.get_running_loop().getaddrinfo("localhost", 1)


async def stops_the_loop(env: Any, step: Step) -> None:
    asyncio.get_running_loop().stop()


async def awaits_the_pods_future(env: Any, step: Step) -> None:
    await env.create_future()


async def awaits_the_pods_future_in_a_group(env: Any, step: Step) -> None:
    async def branch() -> None:
        await env.create_future()

    async with asyncio.TaskGroup() as group:
        group.create_task(branch())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("body", "words"), [
    (sleeps, ["asyncio.sleep", 'await step.sleep("name", "5 seconds")']),
    (waits_for, ["wait_for", 'await step.do("name", fn)']),
    (times_out, ["asyncio.timeout", 'await step.do("name", fn)']),
    (goes_to_a_thread, ["asyncio.to_thread", 'await step.do("name", fn)']),
    (opens_a_connection, ["loop.create_connection", 'await step.do("name", fn)']),
    (starts_a_process, ["loop.subprocess_exec", 'await step.do("name", fn)']),
    (looks_up_a_name, ["loop.getaddrinfo", 'await step.do("name", fn)']),
    (stops_the_loop, ["loop.stop", 'await step.do("name", fn)']),
    (awaits_the_pods_future, ["the pod's own loop", 'await step.do("name", fn)']),
    (awaits_the_pods_future_in_a_group, ["the pod's own loop", 'await step.do("name", fn)']),
])
def test_a_foreign_await_says_put_it_into_a_step(body: Body, words: list[str]) -> None:
    """Timers, threads, sockets, processes, futures of the pod's own loop."""
    raises_misuse(failure_of(body, asyncio.get_running_loop), *words)


def test_a_lock_of_the_pods_loop_is_a_foreign_await() -> None:
    """asyncio says so in other words than for a future."""

    async def body(env: Any, step: Step) -> None:
        async with env:
            await step.do("a", work)

    async def story() -> r.Failure:
        lock = asyncio.Lock()
        await lock.acquire()
        waiter = asyncio.create_task(lock.acquire())  # binds the lock to this loop
        await asyncio.sleep(0)
        failure = await host_of(body, lock).failure()
        waiter.cancel()
        return failure

    raises_misuse(play(story), "the pod's own loop", 'await step.do("name", fn)')


async def sets_an_event(env: Any, step: Step) -> None:
    event = asyncio.Event()

    async def callback() -> None:
        event.set()

    await asyncio.gather(event.wait(), step.do("sets", callback))


async def sets_an_event_in_a_thread(env: Any, step: Step) -> None:
    event = asyncio.Event()
    await asyncio.gather(event.wait(), step.do("sets", lambda: event.set()))


async def cancels_a_step(env: Any, step: Step) -> None:
    slow = step.sleep("slow", "1 day")

    async def callback() -> None:
        slow.cancel()

    await step.do("sets", callback)


@pytest.mark.parametrize("body", [sets_an_event, sets_an_event_in_a_thread, cancels_a_step])
def test_a_callback_that_acts_on_run_is_refused(body: Body) -> None:
    """It would not happen again on replay: a callback speaks by its result alone."""
    failure = failure_of(body)

    assert "step 'sets' failed after 1 attempt: toque.errors.MisuseError" in failure.message
    assert "would not happen again after a restart" in failure.message
    assert "from the callback" in failure.message


# -- run() that does not come to an end --------------------------------------------------------------------------------

async def waits_for_nothing(env: Any, step: Step) -> None:
    await step.do("a", work)
    await asyncio.Event().wait()


async def waits_for_itself(env: Any, step: Step) -> None:
    lock = asyncio.Lock()
    async with lock:
        await lock.acquire()


async def spins(env: Any, step: Step) -> None:
    while True:
        await asyncio.sleep(0)


async def spins_with_tasks(env: Any, step: Step) -> None:
    while True:
        await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))


@pytest.mark.parametrize(("body", "words"), [
    (waits_for_nothing, ["run() waits for something that no step will bring", "Await only steps"]),
    (waits_for_itself, ["run() waits for something that no step will bring", "Await only steps"]),
    (spins, ["run() spins without ever waiting for a step", "asyncio.sleep(0)"]),
    (spins_with_tasks, ["run() spins without ever waiting for a step", "asyncio.sleep(0)"]),
])
def test_a_run_that_never_waits_for_a_step_is_told_so(body: Body, words: list[str]) -> None:
    """It neither hangs for ever nor stops the pod."""
    raises_misuse(failure_of(body), *words)


def test_a_bare_yield_now_and_then_is_fine() -> None:
    """`asyncio.sleep(0)` in a loop that ends, and very many branches, are no spinning."""

    async def body(env: Any, step: Step) -> int:
        for _ in range(100):
            await asyncio.sleep(0)

        async def branch() -> int:
            await asyncio.sleep(0)
            return await step.do("a", work)

        return sum(await asyncio.gather(*(branch() for _ in range(1000))))

    assert output_of(body) == 1000
    assert TURN_CALLBACKS_MAX >= 250_000


# -- errors that would end a process -----------------------------------------------------------------------------------

async def exits(env: Any, step: Step) -> None:
    await step.do("a", work)
    sys.exit(3)


async def exits_in_a_branch(env: Any, step: Step) -> None:
    async def branch() -> None:
        await step.do("a", work)
        sys.exit(3)

    await asyncio.gather(branch(), step.do("b", work))


async def interrupts(env: Any, step: Step) -> None:
    raise KeyboardInterrupt


async def exits_in_a_plain_callback(env: Any, step: Step) -> None:
    asyncio.get_running_loop().call_soon(sys.exit, 3)
    await step.do("a", work)


async def fails_in_a_plain_callback(env: Any, step: Step) -> None:
    asyncio.get_running_loop().call_soon({}.__getitem__, "missing")
    await step.do("a", work)


async def ends_a_generator(env: Any, step: Step) -> None:
    raise GeneratorExit


async def cancels_itself(env: Any, step: Step) -> None:
    raise asyncio.CancelledError


async def cancels_its_task(env: Any, step: Step) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await step.do("a", work)


async def recurses(env: Any, step: Step) -> None:
    await step.do("a", work)
    await recurses_on(env)


async def recurses_on(env: Any) -> None:
    await recurses_on(env)


@pytest.mark.parametrize(("body", "type_"), [
    (exits, "SystemExit"), (exits_in_a_branch, "SystemExit"), (exits_in_a_plain_callback, "SystemExit"),
    (interrupts, "KeyboardInterrupt"), (fails_in_a_plain_callback, "KeyError"), (ends_a_generator, "GeneratorExit"),
    (cancels_itself, "CancelledError"), (cancels_its_task, "CancelledError"), (recurses, "RecursionError"),
])
def test_errors_of_any_kind_end_the_instance_alone(body: Body, type_: str) -> None:
    """The pod goes on: another instance runs to its end on the same loop."""

    async def story() -> None:
        failure = await host_of(body).failure()
        assert failure.type == type_

        assert await host_of(lambda env, step: step.do("a", work)).output() == 1

    play(story)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(2), KeyboardInterrupt(), GeneratorExit()],
                         ids=lambda error: type(error).__name__)
def test_a_workflow_that_cannot_be_made_is_errored(error: BaseException) -> None:
    """Its __init__ raises, whatever."""

    class Broken(Workflow[Any, Any]):
        def __init__(self) -> None:
            raise error

        async def run(self, event: Event, step: Step) -> Any:
            return 1

    async def story() -> None:
        host = EngineHost(Broken)
        host.create()

        assert (await host.failure()).type == type(error).__name__

    play(story)


def test_tasks_made_by_init_belong_to_the_instance() -> None:
    """The workflow is made inside its own loop, so nothing of it gets into the pod's."""

    class Eager(Workflow[Any, Any]):
        def __init__(self) -> None:
            self.task = asyncio.create_task(self._count())

        async def _count(self) -> int:
            return 5

        async def run(self, event: Event, step: Step) -> Any:
            return await self.task

    async def story() -> None:
        host = EngineHost(Eager)
        host.create()

        assert await host.output() == 5

    play(story)


@pytest.mark.parametrize("error", [RecursionError, MemoryError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_errors_of_any_kind_in_a_callback_fail_its_step_alone(error: type[BaseException]) -> None:
    """run() can catch them as StepFailed."""

    async def body(env: Any, step: Step) -> str:
        async def callback() -> None:
            raise error

        try:
            await step.do("a", callback, retries=Retries(limit=0))
        except StepFailed as failed:
            return failed.error_type
        return "nothing"

    assert output_of(body) in (error.__name__, "RuntimeError")


@pytest.mark.parametrize("crash", [False, True])
def test_an_instance_begins_so_many_steps_and_no_more(crash: bool) -> None:
    """A loop without end is told apart from long work, after a crash too; sleeps do not count."""

    class Loop(Workflow[Any, Any], steps_max=3):
        async def run(self, event: Event, step: Step) -> Any:
            while True:
                await step.do("again", work)
                await step.sleep("rest", "1 millisecond")

    async def story() -> r.Failure:
        host = EngineHost(Loop)
        host.create()
        if crash:
            await host.cut_after(3)
            host.load()
        return await host.failure()

    failure = play(story)
    assert failure.type == "toque.errors.TooManySteps"
    assert "more than 3 steps" in failure.message
