"""Workflows that are told something while they run, each with the script of whoever tells them.

A script is acknowledged line by line, and waits where the outcome would depend on who is faster otherwise: so a workflow
comes to the same output however often its pods are killed. Callbacks are `self.env.work`, as in `example_flows`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from toque.client import Instance, StepRef
from toque.errors import EventTimeout, StepFailed
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[int]
WAIT = "1 hour"
PATIENCE = "2 minutes"
SOON = Retries(limit=3, delay="2 seconds", jitter=False)
NEVER = Retries(limit=0)
POLL_S = 0.05

Script = Callable[[Instance[Any]], Awaitable[None]]


class Fifo(Workflow[int, list[Any]]):
    """Waits of two types between steps: some events are there before, some come later."""

    async def run(self, event: Event, step: Step) -> list[Any]:
        got: list[Any] = []
        for number in range(4):
            got.append(await step.wait_for_event("next", "a", timeout=WAIT))
            got.append(await step.do("after", self.env.work, number, 0.3))
        return [*got, await step.wait_for_event("last", "b", timeout=WAIT)]


async def send_in_order(handle: Instance[Any]) -> None:
    for number in range(4):
        await handle.send_event("b" if number == 1 else "a", number, timeout=PATIENCE)
    await asyncio.sleep(4)
    for number in range(4, 7):
        await handle.send_event("a", number, timeout=PATIENCE)


class GatherWaits(Workflow[int, list[Any]]):
    """Waits of one name side by side: which of them got what depends on the order of records alone."""

    async def run(self, event: Event, step: Step) -> list[Any]:
        async def branch(tag: int, seconds: float) -> list[Any]:
            first = await step.do("x", self.env.work, tag, seconds)
            got = await step.wait_for_event("x", "a", timeout=WAIT)
            return [first, got, await step.do("x", self.env.work, got, seconds)]

        branches = await asyncio.gather(branch(1, 0.1), branch(2, 0.1), branch(3, 0.1))
        return [*sorted(line for lines in branches for line in lines),
                await step.wait_for_event("x", "a", timeout=WAIT)]


async def send_four(handle: Instance[Any]) -> None:
    for number in range(10, 14):
        await handle.send_event("a", number, timeout=PATIENCE)


class WaitsThatGiveUp(Workflow[int, list[Any]]):
    """Time-outs, alone and beside a callback; an event that comes after one is the next wait's."""

    async def run(self, event: Event, step: Step) -> list[Any]:
        got: list[Any] = []
        for name, seconds in (("short", "500 ms"), ("long", "3 seconds")):
            try:
                got.append(await step.wait_for_event(name, "never", timeout=seconds))
            except EventTimeout:
                got.append(name)
        late, busy = await asyncio.gather(step.wait_for_event("beside", "never", timeout="2 seconds"),
                                          step.do("busy", self.env.work, 1, 1.0), return_exceptions=True)
        await step.do("given up", self.env.work, 2)
        return [*got, type(late).__name__, busy, await step.wait_for_event("then", "late", timeout=WAIT)]


async def send_late(handle: Instance[Any]) -> None:
    await _reached(handle, "given up")
    await handle.send_event("late", "here", timeout=PATIENCE)


class FirstOfTwo(Workflow[int, list[Any]]):
    """A wait is cancelled because another got its event; the event that it did not get is the next one's."""

    async def run(self, event: Event, step: Step) -> list[Any]:
        waits = [asyncio.ensure_future(step.wait_for_event(name, name, timeout=WAIT)) for name in ("yes", "no")]
        nap = asyncio.ensure_future(step.sleep("nap", "1 hour"))
        done, late = await asyncio.wait([*waits, nap], return_when=asyncio.FIRST_COMPLETED)
        for wait in late:
            wait.cancel()
        first = [wait.result() for wait in waits if wait in done]
        await step.do("decided", self.env.work, 1, 0.2)
        return [first, await step.wait_for_event("no", "no", timeout=WAIT)]


async def send_yes_then_no(handle: Instance[Any]) -> None:
    await handle.send_event("yes", 1, timeout=PATIENCE)
    await _reached(handle, "decided")
    await handle.send_event("no", 2, timeout=PATIENCE)


class Approved(Workflow[int, list[Any]]):
    """Two approvals, one of them given before it was asked for."""

    async def run(self, event: Event, step: Step) -> list[Any]:
        first = await step.wait_for_approval("one", timeout=WAIT)
        await step.do("between", self.env.work, 1, 0.5)
        second = await step.wait_for_approval("two", timeout=WAIT)
        return [first.approved, first.by, second.approved, second.by, second.comment]


async def decide(handle: Instance[Any]) -> None:
    await handle.reject("two", by="Mo", comment="too much", timeout=PATIENCE)
    await handle.approve("one", by="Ada", timeout=PATIENCE)


class Sleeping(Workflow[int, list[int]]):
    """Sleeps and pauses between attempts, in sequence and side by side."""

    async def run(self, event: Event, step: Step) -> list[int]:
        async def later(name: str, pause: str, value: int) -> int:
            await step.sleep(name, pause)
            return int(await step.do("woken", self.env.work, value, 0.3))

        await step.sleep("long", "4 seconds")
        await step.sleep("short", "300 ms")
        await step.sleep("none", "0 s")
        return list(await asyncio.gather(
            later("nap", "5 seconds", 1), step.do("busy", self.env.work, 2, 2.0), later("nap", "1 second", 3),
            later("nap", "5 seconds", 4), step.do("flaky", self.env.fail, 2, 5, retries=SOON)))


class Cancelled(Workflow[int, list[Any]]):
    """Branches that run() cancels, or a failing neighbour: inside, asleep, waiting, and between attempts."""

    async def run(self, event: Event, step: Step) -> list[Any]:
        slow = asyncio.create_task(self._slow(step))
        found: list[Any] = [await step.do("quick", self.env.work, 1, 0.2)]
        slow.cancel()
        found.append((await asyncio.gather(slow, return_exceptions=True))[0])
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._asleep(step))
                group.create_task(self._trying(step))
                group.create_task(self._failing(step))
        except* StepFailed as errors:
            found.append(len(errors.exceptions))
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
        await step.do("failing", self.env.fail, 99, 0, 4.0, retries=NEVER)


class Steered(Workflow[int, list[Any]]):
    """Steps, a sleep and a wait, while somebody steers."""

    async def run(self, event: Event, step: Step) -> list[Any]:
        first = await step.do("first", self.env.work, 1, 1.0)
        await step.sleep("nap", "2 seconds")
        got = await step.wait_for_event("next", "a", timeout=WAIT)
        return [first, got, await step.do("last", self.env.work, 3, 1.0)]


async def pause_and_resume(handle: Instance[Any]) -> None:
    await handle.pause(timeout=PATIENCE)
    await asyncio.sleep(3)
    await handle.send_event("a", 2, timeout=PATIENCE)
    await handle.resume(timeout=PATIENCE)
    await handle.pause(timeout=PATIENCE)
    await handle.resume(timeout=PATIENCE)


async def restart_midway(handle: Instance[Any]) -> None:
    await _reached(handle, "nap", kind="sleep")
    await handle.send_event("a", "of the run before", timeout=PATIENCE)
    await handle.restart(timeout=PATIENCE)
    await handle.send_event("a", 2, timeout=PATIENCE)


async def restart_from_the_wait(handle: Instance[Any]) -> None:
    await handle.send_event("a", "of the run before", timeout=PATIENCE)
    await _reached(handle, "last")
    await handle.restart(from_=StepRef("next", kind="event"), timeout=PATIENCE)
    await handle.send_event("a", 2, timeout=PATIENCE)


async def _reached(handle: Instance[Any], name: str, *, kind: str = "do") -> None:
    """Until the step is over."""
    while not any((step.name, step.kind, step.status) == (name, kind, "complete")
                  for step in (await handle.describe(timeout=PATIENCE)).steps):
        await asyncio.sleep(POLL_S)


async def nothing(handle: Instance[Any]) -> None:
    """Nobody says anything."""


@dataclass(frozen=True)
class Told:
    """A workflow, what it is told, and what comes out of it."""

    flow: type[Workflow[Any, Any]]
    script: Script
    output: Any
    same_order: bool = True  # a crash cannot change the order of its outcomes

    def __str__(self) -> str:
        return self.flow.__name__ if self.script is nothing else f"{self.flow.__name__} {self.script.__name__}"


TOLD = [
    Told(Fifo, send_in_order, [0, 0, 2, 1, 3, 2, 4, 3, 1]),
    Told(GatherWaits, send_four, [1, 2, 3, 10, 10, 11, 11, 12, 12, 13], same_order=False),
    Told(WaitsThatGiveUp, send_late, ["short", "long", "EventTimeout", 1, "here"], same_order=False),
    Told(FirstOfTwo, send_yes_then_no, [[1], 2]),
    Told(Approved, decide, [True, "Ada", False, "Mo", "too much"]),
    Told(Sleeping, nothing, [1, 2, 3, 4, 5], same_order=False),
    Told(Cancelled, nothing, [1, "tidied", 1, 9]),
    Told(Steered, pause_and_resume, [1, 2, 3]),
    Told(Steered, restart_midway, [1, 2, 3]),
    Told(Steered, restart_from_the_wait, [1, 2, 3]),
]
