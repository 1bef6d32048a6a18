"""What an instance that leaves memory in the middle of run() may do, and what becomes of its generators and contexts."""

from __future__ import annotations

import asyncio
import contextlib
import types
from collections.abc import AsyncIterator, Generator
from typing import Any

from unit.engine_host import EngineHost, Recorder, play
from unit.test_engine_misuse import Body, failure_of, host_of, output_of, work

from toque.workflow import Step

# -- eviction ----------------------------------------------------------------------------------------------------------

async def cut_in_the_middle(body: Body, env: Any) -> EngineHost:
    """The instance is cut while it waits for a step `slow`."""
    host = host_of(body, env)
    await asyncio.sleep(1)
    host.crash()
    await host.settle()
    return host


def test_catching_exception_does_not_catch_eviction() -> None:
    """An instance that leaves memory runs nothing but its `finally` blocks, and those get no step."""
    seen: list[str] = []

    async def body(env: Any, step: Step) -> None:
        try:
            while True:
                try:
                    await step.do("slow", env.work, 1, 100.0)
                except Exception as error:  # noqa: BLE001  # as users write it
                    seen.append(f"caught {type(error).__name__}")
        finally:
            seen.append("finally")
            await step.do("clean up", work)
            seen.append("unreachable")

    async def story() -> None:
        host = await cut_in_the_middle(body, Recorder())
        assert seen == ["finally"]
        assert len(host.env.entries) == 1

    play(story)


def test_catching_everything_in_a_loop_does_not_hang_the_pod() -> None:
    """Bare `except:` around a step swallows eviction, too; the coroutine is left alone after a few tries."""
    seen: list[str] = []

    async def body(env: Any, step: Step) -> None:
        while True:
            try:
                await step.do("slow", env.work, 1, 100.0)
            except:  # noqa: E722  # as users write it
                seen.append("again")
                if len(seen) > 5:
                    raise

    async def story() -> None:
        host = await cut_in_the_middle(body, Recorder())

        assert len(host.env.entries) == 1
        assert host.pending == []

    play(story)


def test_contexts_and_groups_are_left_when_an_instance_leaves() -> None:
    """Nested tasks and context managers are ended, the innermost first, each once."""
    seen: list[str] = []

    @contextlib.asynccontextmanager
    async def resource(name: str) -> AsyncIterator[None]:
        try:
            yield
        finally:
            seen.append(name)

    async def branch(env: Any, step: Step, name: str) -> None:
        async with resource(name), resource(f"{name} inner"):
            await step.do("slow", env.work, 1, 100.0)

    async def body(env: Any, step: Step) -> None:
        async with resource("outer"), asyncio.TaskGroup() as group:
            group.create_task(branch(env, step, "one"))
            group.create_task(branch(env, step, "two"))

    async def story() -> None:
        await cut_in_the_middle(body, Recorder())
        assert sorted(seen) == ["one", "one inner", "outer", "two", "two inner"]
        assert seen.index("one inner") < seen.index("one")

    play(story)


# -- generators --------------------------------------------------------------------------------------------------------

@types.coroutine
def bare_yield() -> Generator[None, None, None]:
    yield


@types.coroutine
def yields_a_number() -> Generator[int, None, None]:
    yield 5


@types.coroutine
def yields_a_step(step: Any) -> Generator[Any, Any, Any]:
    return (yield from step.do("a", work))


def test_generator_based_coroutines_work_or_fail_loudly() -> None:
    """A bare yield is a turn, `yield from` a step awaits it, anything else is asyncio's own error."""

    async def fine(env: Any, step: Step) -> int:
        await bare_yield()
        found: int = await yields_a_step(step)
        return found

    async def wrong(env: Any, step: Step) -> None:
        await yields_a_number()

    assert output_of(fine) == 1
    failure = failure_of(wrong)
    assert (failure.type, failure.message) == ("RuntimeError", "Task got bad yield: 5")


async def numbers(step: Step, seen: list[str]) -> AsyncIterator[int]:
    try:
        for number in range(10):
            yield await step.do("number", work) + number
    finally:
        seen.append("closed")


def test_an_async_generator_that_is_not_finished_is_closed_at_once() -> None:
    """In the instance, not by a task of the pod's loop as asyncio would."""

    async def body(env: Any, step: Step) -> list[str]:
        async for number in numbers(step, env):
            if number > 2:
                break
        return list(env)

    assert output_of(body, list) == ["closed"]


def test_an_async_generator_is_closed_when_the_instance_leaves() -> None:
    """Its `finally` block runs, and gets no step."""
    seen: list[str] = []

    async def items(step: Step) -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            seen.append("closing")
            await step.do("clean up", work)

    async def body(env: Any, step: Step) -> None:
        async for _ in items(step):
            await step.do("slow", env.work, 1, 100.0)

    async def story() -> None:
        host = await cut_in_the_middle(body, Recorder())
        assert seen == ["closing"]
        assert host.pending == []

    play(story)
