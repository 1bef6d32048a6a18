"""Workflows made from shapes, and what the checkers must know of them.

A callback returns who called it and in which attempt, so two attempts of one step have different results: run() puts
every result into the instance's output, and the checkers compare it with the one that the journal recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final

from toque.errors import EventTimeout, StepError
from toque.sim.history import History
from toque.sim.plan import Plan, Shape, StepShape
from toque.sim.process import work_in_thread
from toque.workflow import Retries, Step, StepContext, Workflow, WorkflowEvent

TIMEOUT_DEFAULT_S: Final = 600.0
EVENT_TYPE: Final = "go"  # of all events
HANG_FACTOR: Final = 2.0  # how much longer than its time-out a hanging attempt takes

Line = list[Any]  # of an output: [branch, step, the callback's result or how the step failed]


class Fails(Exception):
    """What callbacks raise that were told to."""


def make_workflow(shape: Shape, plan: Plan, history: History) -> type[Workflow[Any, Any]]:
    """The workflow class of a shape; its callbacks report to the history."""

    callbacks = _make_callbacks(history)

    class Shaped(Workflow[Any, Any], name=shape.name):
        async def run(self, event: WorkflowEvent[Any], step: Step) -> Any:
            run = _Run(plan, callbacks, step)
            await run.follow("", shape.steps)
            return {"params": event.payload, "lines": sorted(run.lines), "events": run.events}

    return Shaped


class _Run:
    """One run() of one instance."""

    def __init__(self, plan: Plan, callbacks: tuple[Any, Any], step: Step) -> None:
        self._plan = plan
        self._callbacks = callbacks
        self._step = step
        self.lines: list[Line] = []
        self.events: list[Any] = []  # payloads in the order of the waits; None for a time-out

    async def follow(self, branch: str, steps: Sequence[StepShape]) -> None:
        for shape in steps:
            if shape.kind == "sleep":
                await self._step.sleep(shape.name, timedelta(seconds=shape.seconds))
            elif shape.kind == "event":
                await self._event(shape)
            elif shape.kind == "do":
                await self._do(branch, shape)
            else:
                await self._fork(branch, shape)

    async def _fork(self, branch: str, shape: StepShape) -> None:
        runs = [self.follow(f"{branch}{number}", steps) for number, steps in enumerate(shape.branches, 1)]
        if shape.kind == "gather":
            await asyncio.gather(*runs)
        else:
            async with asyncio.TaskGroup() as group:
                for run in runs:
                    group.create_task(run)

    async def _event(self, shape: StepShape) -> None:
        try:
            payload = await self._step.wait_for_event(shape.name, EVENT_TYPE, timeout=timedelta(seconds=shape.timeout_s))
        except EventTimeout:
            payload = None
        self.events.append(payload)

    async def _do(self, branch: str, shape: StepShape) -> None:
        retries = Retries(limit=self._plan.retries, delay=timedelta(seconds=self._plan.retry_delay_s),
                          backoff="constant")
        timeout = timedelta(seconds=shape.timeout_s or TIMEOUT_DEFAULT_S)
        callback = self._callbacks[shape.sync]
        try:
            result = await self._step.do(shape.name, callback, branch, shape, len(self.lines), retries=retries,
                                         timeout=timeout)
        except StepError as error:
            if not shape.caught:
                raise
            result = ["failed", error.attempts]
        self.lines.append([branch, shape.name, result])


def _make_callbacks(history: History) -> tuple[Any, Any]:
    """The async one, and the one for threads."""

    async def work(ctx: StepContext, branch: str, shape: StepShape, seen: int) -> Line:
        with history.inside(ctx):
            await asyncio.sleep(_seconds(shape, ctx.attempt))
            return _result(branch, shape, ctx, seen)

    def work_sync(ctx: StepContext, branch: str, shape: StepShape, seen: int) -> Line:
        with history.inside(ctx):
            work_in_thread(_seconds(shape, ctx.attempt))
            return _result(branch, shape, ctx, seen)

    return work, work_sync


def _seconds(shape: StepShape, attempt: int) -> float:
    return shape.timeout_s * HANG_FACTOR if attempt <= shape.hangs else shape.seconds


def _result(branch: str, shape: StepShape, ctx: StepContext, seen: int) -> Line:
    if ctx.attempt <= shape.fails:
        raise Fails(f"attempt {ctx.attempt}")
    return [branch, ctx.name, ctx.count, ctx.attempt, seen]


# -- for the checkers --------------------------------------------------------------------------------------------------

def step_order(shapes: Iterable[Shape]) -> dict[str, dict[str, int]]:
    """Workflow → step → stage (see `toque.chaos.ledger_checks.StepOrder`): a fork is one stage."""
    return {shape.name: {name: stage for stage, line in enumerate(shape.steps) for name in _names([line])}
            for shape in shapes}


def _names(steps: Sequence[StepShape]) -> Iterator[str]:
    """The callbacks' names as in the ledger: the second step of a name is `name#2`."""
    seen: dict[str, int] = {}
    for step in flat(steps):
        if step.kind == "do":
            seen[step.name] = seen.get(step.name, 0) + 1
            yield step.name if seen[step.name] == 1 else f"{step.name}#{seen[step.name]}"


def flat(steps: Iterable[StepShape]) -> Iterator[StepShape]:
    """Every step and sleep, those of branches too."""
    for step in steps:
        if step.branches:
            for branch in step.branches:
                yield from flat(branch)
        else:
            yield step


def late_threads(shape: Shape) -> set[str]:
    """The names of steps whose threads may outlive their time-out."""
    return {step.name for step in flat(shape.steps) if step.sync and step.hangs}
