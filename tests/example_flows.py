"""Ten workflows that use every way to write run(), for tests that cut an engine anywhere and compare what comes out.

Their callbacks are `self.env.work(ctx, value, seconds)`, which returns the value after a while, and
`self.env.fail(ctx, times, value, seconds)`, which fails so often first.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from toque.errors import StepFailed
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[int]
SOON = Retries(limit=3, delay="5 seconds", jitter=False)
NEVER = Retries(limit=0)


class Sequential(Workflow[int, list[int]]):
    """One step after the other, each with the one before's result."""

    async def run(self, event: Event, step: Step) -> list[int]:
        first = await step.do("first", self.env.work, event.payload + 1)
        second = await step.do("second", self.env.work, first * 10, 0.2)

        @step.do("third")
        async def third(extra: int) -> int:
            return second + extra

        return [first, second, await third(extra=5)]


class GatherEqualNames(Workflow[int, list[list[int]]]):
    """Branches whose steps have the same name: who opened which occurrence depends on the order of results alone."""

    async def run(self, event: Event, step: Step) -> list[list[int]]:
        async def branch(tag: int, seconds: float) -> list[int]:
            one = await step.do("x", self.env.work, tag, seconds)
            two = await step.do("x", self.env.work, one * 10, seconds)
            return [one, two, await step.do("x", self.env.work, two + 1, seconds)]

        return list(await asyncio.gather(branch(1, 0.5), branch(2, 0.3), branch(3, 0.4)))


class Grouped(Workflow[int, dict[str, Any]]):
    """A TaskGroup whose branches meet at an Event, a Queue and a Lock."""

    async def run(self, event: Event, step: Step) -> dict[str, Any]:
        ready, queue, lock = asyncio.Event(), asyncio.Queue[int](1), asyncio.Lock()
        log: list[str] = []

        async def producer() -> None:
            for number in range(3):
                await queue.put(await step.do("make", self.env.work, number, 0.1 * number))
            ready.set()

        async def consumer() -> int:
            total = 0
            for _ in range(3):
                value = await queue.get()
                async with lock:
                    total += await step.do("use", self.env.work, value * 100, 0.25)
                log.append(f"used {value}")
            return total

        async def watcher() -> int:
            async with lock:
                held = await step.do("use", self.env.work, 7, 0.05)
            await ready.wait()
            log.append("ready")
            return await step.do("after", self.env.work, held)

        async with asyncio.TaskGroup() as group:
            group.create_task(producer())
            used, watched = group.create_task(consumer()), group.create_task(watcher())
        return {"used": used.result(), "watched": watched.result(), "log": sorted(log)}


class Retried(Workflow[int, list[int]]):
    """Steps that fail a few times, one after the other and at once."""

    async def run(self, event: Event, step: Step) -> list[int]:
        first = await step.do("flaky", self.env.fail, 2, 1, retries=SOON)
        rest = await asyncio.gather(
            step.do("flaky", self.env.fail, 1, 2, 0.5, retries=SOON),
            step.do("steady", self.env.work, 3, 0.7),
            step.do("flaky", self.env.fail, 3, 4, retries=Retries(limit=3, delay="100 ms", backoff="linear")))
        return [first, *rest]


class CaughtFailure(Workflow[int, list[Any]]):
    """A step that fails for good is caught, and another way is taken."""

    async def run(self, event: Event, step: Step) -> list[Any]:
        caught = []
        for name in ("bad", "worse"):
            try:
                await step.do(name, self.env.fail, 99, retries=NEVER)
            except StepFailed as error:
                caught.append([error.step, error.error_type])
                caught.append(await step.do("mend", self.env.work, name))
        results = await asyncio.gather(step.do("bad", self.env.fail, 99, 0, 0.1, retries=NEVER),
                                       step.do("good", self.env.work, 1, 0.2), return_exceptions=True)
        return [*caught, [type(result).__name__ for result in results]]


class Sleeper(Workflow[int, list[int]]):
    """Long and short sleeps between steps."""

    async def run(self, event: Event, step: Step) -> list[int]:
        first = await step.do("a", self.env.work, 1)
        await step.sleep("long", "1 hour")
        await step.sleep("short", "300 ms")
        await step.sleep("none", "0 s")
        second = await step.do("b", self.env.work, 2)
        await step.sleep("long", "30 days")
        return [first, second]


class UntilDates(Workflow[int, str]):
    """Sleeps until times that have passed, and that have not."""

    async def run(self, event: Event, step: Step) -> str:
        await step.sleep_until("past", datetime(1970, 1, 1, 0, 5, tzinfo=UTC))
        name = await step.do("a", self.env.work, "done")
        await step.sleep_until("ahead", datetime(1970, 1, 1, 6, tzinfo=UTC))
        await step.sleep_until("ahead", datetime(1970, 1, 2, tzinfo=UTC))
        return str(name)


class SleepBesideCallbacks(Workflow[int, list[int]]):
    """Sleeps in parallel with callbacks and with each other."""

    async def run(self, event: Event, step: Step) -> list[int]:
        async def later(name: str, pause: str, value: int) -> int:
            await step.sleep(name, pause)
            return int(await step.do("woken", self.env.work, value, 0.5))

        return list(await asyncio.gather(
            later("nap", "10 minutes", 1), step.do("busy", self.env.work, 2, 3.0), later("nap", "2 seconds", 3),
            later("nap", "10 minutes", 4), step.do("flaky", self.env.fail, 2, 5, retries=SOON)))


class Cancelling(Workflow[int, list[Any]]):
    """A branch is cancelled by run(), and others by a failing neighbour: while inside, asleep and between attempts."""

    async def run(self, event: Event, step: Step) -> list[Any]:
        slow = asyncio.create_task(self._slow(step))
        quick = await step.do("quick", self.env.work, 1, 0.2)
        slow.cancel()
        found: list[Any] = [quick, (await asyncio.gather(slow, return_exceptions=True))[0]]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._asleep(step))
                group.create_task(self._trying(step))
                group.create_task(self._failing(step))
        except* StepFailed as errors:
            found.append(len(errors.exceptions))
        await step.sleep("afterwards", "3 hours")
        return [*found, await step.do("last", self.env.work, 9)]

    async def _slow(self, step: Step) -> str:
        try:
            await step.do("slow", self.env.work, 2, 5.0)
        except asyncio.CancelledError:
            return str(await step.do("tidy", self.env.work, "tidied", 0.1))
        return "not cancelled"

    async def _asleep(self, step: Step) -> None:
        await step.sleep("cancelled", "1 hour")

    async def _trying(self, step: Step) -> None:
        await step.do("trying", self.env.fail, 99, retries=Retries(limit=5, delay="1 hour"))

    async def _failing(self, step: Step) -> None:
        await step.do("failing", self.env.fail, 99, 0, 20.0, retries=NEVER)


class Loop(Workflow[int, int]):
    """Fifty steps of one name."""

    async def run(self, event: Event, step: Step) -> int:
        total = 0
        for number in range(50):
            total += await step.do("add", self.env.work, number)
        return total


@dataclass(frozen=True)
class Example:
    """A workflow and what comes out of it."""

    flow: type[Workflow[Any, Any]]
    output: Any
    same_order: bool = True  # a cut cannot change the order of its outcomes

    def __str__(self) -> str:
        return self.flow.__name__


EXAMPLES = [
    Example(Sequential, [4, 40, 45]),
    Example(GatherEqualNames, [[1, 10, 11], [2, 20, 21], [3, 30, 31]], same_order=False),
    Example(Grouped, {"used": 300, "watched": 7, "log": ["ready", "used 0", "used 1", "used 2"]}, same_order=False),
    Example(Retried, [1, 2, 3, 4], same_order=False),
    Example(CaughtFailure, [["bad", "ConnectionError"], "bad", ["worse", "ConnectionError"], "worse",
                            ["StepFailed", "int"]]),
    Example(Sleeper, [1, 2]),
    Example(UntilDates, "done"),
    Example(SleepBesideCallbacks, [1, 2, 3, 4, 5], same_order=False),
    Example(Cancelling, [1, "tidied", 1, 9]),
    Example(Loop, 1225),
]
PARAMS = 3
