"""An APP whose workflows do one thing each that the acceptance tests need; callbacks report to the ledger."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toque import Retries, Step, StepContext, StepFailed, StepTimeout, Workflow, WorkflowEvent
from toque.chaos import five_steps
from toque.chaos.five_steps import Reporters

GATE_POLL_S = 0.01
lifespan = five_steps.lifespan


class FiveSteps(five_steps.FiveSteps, name=five_steps.WORKFLOW):
    """The work of the chaos scenarios."""


class Gated(Workflow[str, str], name="gated"):
    """One quick step, then one that lasts until the file of the params is there."""

    env: Reporters

    async def run(self, event: WorkflowEvent[str], step: Step) -> str:
        await step.do("first", self.first)
        return await step.do("gate", self.gate, Path(event.payload))

    async def first(self, ctx: StepContext) -> None:
        async with self.env.of_loop.inside(ctx):
            return

    async def gate(self, ctx: StepContext, gate: Path) -> str:
        async with self.env.of_loop.inside(ctx):
            while not is_open(gate):
                await asyncio.sleep(GATE_POLL_S)
            return f"attempt {ctx.attempt}"


def is_open(gate: Path) -> bool:
    return gate.exists()


class Sleeper(Workflow[str, None], name="sleeper"):
    """A step, a sleep as long as the params say, a step."""

    env: Reporters

    async def run(self, event: WorkflowEvent[str], step: Step) -> None:
        await step.do("before", self.work)
        await step.sleep("rest", event.payload)
        await step.do("after", self.work)

    async def work(self, ctx: StepContext) -> None:
        async with self.env.of_loop.inside(ctx):
            return


class Echo(Workflow[Any, Any], name="echo"):
    """Returns its params."""

    async def run(self, event: WorkflowEvent[Any], step: Step) -> Any:
        return await step.do("echo", echo, event.payload)


async def echo(value: Any) -> Any:
    return value


@dataclass
class Dish:
    """Params of a form that not everything fits."""

    name: str
    portions: int


class Typed(Workflow[Dish, str], name="typed"):
    """Needs a Dish."""

    async def run(self, event: WorkflowEvent[Dish], step: Step) -> str:
        return f"{event.payload.portions} × {event.payload.name}"


class Unencodable(Workflow[str, str], name="unencodable"):
    """Its step returns what cannot be encoded, or too much of it; run() catches the failure and tells it."""

    env: Reporters

    async def run(self, event: WorkflowEvent[str], step: Step) -> str:
        try:
            await step.do("make", self.make, event.payload, retries=Retries(limit=3, delay="1 minute"))
        except StepFailed as error:
            return f"{error.error_type}: {error.error_message}"
        return "it was encoded"

    async def make(self, ctx: StepContext, what: str) -> Any:
        async with self.env.of_loop.inside(ctx):
            return b"x" * (1024 * 1024 + 1) if what == "too much" else object()


class BareNumber(Workflow[str, None], name="bare-number"):
    """Gives a bare number where a duration belongs."""

    async def run(self, event: WorkflowEvent[str], step: Step) -> None:
        if event.payload == "sleep":
            await step.sleep("rest", 5)  # type: ignore[arg-type]  # the mistake that is tested
        elif event.payload == "timeout":
            await step.do("echo", echo, 1, timeout=2.5)  # type: ignore[call-overload]  # the mistake that is tested
        else:
            await step.do("echo", echo, 1, retries=Retries(delay=10))  # type: ignore[arg-type]  # as above


class Blocking(Workflow[float, str], name="blocking"):
    """run() blocks the pod's loop for as many seconds as the params say."""

    async def run(self, event: WorkflowEvent[float], step: Step) -> str:
        block_the_loop(event.payload)
        return await step.do("echo", echo, "done")


def block_the_loop(seconds: float) -> None:
    time.sleep(seconds)


class BlockingCallback(Workflow[float, str], name="blocking-callback"):
    """An async callback that blocks the pod's loop for as many seconds as the params say."""

    async def run(self, event: WorkflowEvent[float], step: Step) -> str:
        return await step.do("nap", nap, event.payload)


async def nap(seconds: float) -> str:
    time.sleep(seconds)  # noqa: ASYNC251  # the mistake that is tested
    return "done"


class Overdue(Workflow[str, str], name="overdue"):
    """A callback in a thread that takes no notice of its time-out until the file of the params is there."""

    async def run(self, event: WorkflowEvent[str], step: Step) -> str:
        try:
            await step.do("hang", hang, Path(event.payload), retries=Retries(limit=0), timeout="0.2 seconds")
        except StepTimeout:
            return "it was told that the time was over"
        return "the late result was taken"


def hang(ctx: StepContext, gate: Path) -> str:
    while not (is_open(gate) and ctx.cancelled):
        time.sleep(GATE_POLL_S)
    return "late"
