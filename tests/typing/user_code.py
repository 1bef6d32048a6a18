"""Typed user code: a strict type check of this file is part of the tests, so public types are a tested promise.

It is never run. `assert_type` says what a type checker must infer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar, assert_type

from toque import (
    Approval,
    BatchResult,
    Child,
    Client,
    DeleteResult,
    Instance,
    InstanceStatus,
    NewInstance,
    Retries,
    Step,
    StepContext,
    SyncClient,
    SyncInstance,
    Workflow,
    WorkflowEvent,
)
from toque.client import Page

Item = TypeVar("Item")


@dataclass
class FileParams:
    path: str


@dataclass
class FileReport:
    size: int
    lines: list[str]


async def size_of(path: str) -> int:
    return len(path)


def lines_of(path: str, limit: int = 10) -> list[str]:
    return [path][:limit]


async def with_context(ctx: StepContext, path: str) -> bytes:
    return (ctx.idempotency_key + path).encode()


def sync_with_context(ctx: StepContext, path: str) -> float:
    return 0.0 if ctx.cancelled else float(ctx.attempt + len(path))


async def nothing() -> None:
    return None


@asynccontextmanager
async def lifespan() -> AsyncIterator[dict[str, int]]:
    yield {"connections": 5}


class Direct(Workflow[FileParams, FileReport], name="direct", version="2"):
    """`step.do(name, fn, *args)`: arguments are checked, results inferred."""

    async def run(self, event: WorkflowEvent[FileParams], step: Step) -> FileReport:
        path = assert_type(event.payload.path, str)
        assert_type(event.timestamp, datetime)
        size = assert_type(await step.do("size", size_of, path), int)
        lines = assert_type(await step.do("lines", lines_of, path), list[str])
        assert_type(await step.do("few lines", lines_of, path, 3), list[str])
        assert_type(await step.do("key", with_context, path), bytes)
        assert_type(await step.do("attempt", sync_with_context, path), float)
        await step.do("nothing", nothing)
        await step.do("call", lambda: size + 1)
        await step.do("kept", size_of, path, retries=Retries(limit=3, delay="2 seconds"), timeout=timedelta(minutes=1))
        await step.sleep("cool down", "5 seconds")
        await step.sleep("cool down", timedelta(seconds=5))
        await step.sleep_until("midnight", datetime(2030, 1, 1, tzinfo=UTC))
        return FileReport(size, lines)


class Decorated(Workflow[int, str]):
    """`@step.do(name)`: the product takes what the callback takes, without the context."""

    async def run(self, event: WorkflowEvent[int], step: Step) -> str:
        @step.do("measure")
        async def measure(ctx: StepContext) -> int:
            return ctx.attempt + event.payload

        @step.do("greet", retries=Retries(limit=0), timeout="1 minute")
        def greet(name: str, times: int = 1) -> str:
            return name * times

        @step.do("both")
        def both(ctx: StepContext, name: str) -> str:
            return name + ctx.name

        @step.do("plain")
        async def plain() -> list[int]:
            return []

        assert_type(await measure(), int)
        assert_type(await greet("a"), str)
        assert_type(await greet("a", times=2), str)
        assert_type(await plain(), list[int])
        return assert_type(await both("b"), str)


class Fan(Workflow[list[str], int]):
    """gather over steps keeps each type; a TaskGroup takes the user's own coroutines."""

    async def run(self, event: WorkflowEvent[list[str]], step: Step) -> int:
        pair = await asyncio.gather(step.do("size", size_of, "a"), step.do("lines", lines_of, "a"))
        assert_type(pair, tuple[int, list[str]])
        sizes = await asyncio.gather(*(step.do("size", size_of, path) for path in event.payload))
        assert_type(sizes, list[int])

        async def branch(path: str) -> int:
            return await step.do("size", size_of, path)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(branch(path)) for path in event.payload]
        held = step.do("held", size_of, "a")
        return sum(task.result() for task in tasks) + assert_type(await held, int)


class Batch(Workflow[list[Item], int], Generic[Item]):
    """A generic base for workflows."""

    async def run(self, event: WorkflowEvent[list[Item]], step: Step) -> int:
        return len(event.payload)


class Numbers(Batch[int]):
    pass


class Untyped(Workflow):  # type: ignore[type-arg]  # a workflow may leave its types open
    async def run(self, event: WorkflowEvent[object], step: Step) -> object:
        return await step.do("any", self.env["callback"])


class Waiting(Workflow[None, int]):
    """Waits for events are typed by what they are told to decode to."""

    async def run(self, event: WorkflowEvent[None], step: Step) -> int:
        assert_type(await step.wait_for_event("any", "paid"), Any)
        report = await step.wait_for_event("report", "reported", timeout="1 hour", result_type=FileReport)
        assert_type(report, FileReport)
        approval = await step.wait_for_approval("refund", timeout=timedelta(days=3))
        assert_type(approval, Approval)
        assert_type(await step.run_workflow("once more", Waiting), int)
        assert_type(await step.run_workflow("by name", "waits", 5), Any)
        assert_type(await step.start_workflow("apart", Waiting, id="one"), Child)
        return len(report.lines)


def made_by_hand(callback: Callable[[], int]) -> Callable[[Step], asyncio.Future[int]]:
    """The Future can be named."""
    return lambda step: step.do("by hand", callback)


async def ask(paths: list[str]) -> None:
    """A handle knows the Result of its workflow."""
    async with Client.connect() as client:
        handle = await client.create(Direct, FileParams("a"), id="a", timeout="5 seconds")
        assert_type(handle, Instance[FileReport])
        assert_type(await handle.result(timeout=timedelta(minutes=1)), FileReport)
        assert_type(await handle.status(), InstanceStatus)
        assert_type(await (await client.get(Direct, "a")).result(), FileReport)
        assert_type(client.handle(Decorated, "b"), Instance[str])
        batch = await client.create_batch(Direct, [NewInstance(FileParams(path)) for path in paths])
        assert_type(batch, list[BatchResult])
        assert_type(batch[0].code, int | None)
        assert_type(await client.delete_batch(Direct, [result.id for result in batch]), list[DeleteResult])
        await client.create("direct", {"path": "a"})
        async for row in client.list(Direct, status="running", limit=10):
            assert_type(row, InstanceStatus)
        await handle.send_event("paid", {"amount": 5}, event_id="payment-17", timeout="5 seconds")
        await handle.approve("refund", by="ann", comment="seen")
        assert_type(await client.list_page(Direct, status=["running"], order="newest", cursor=None), Page)
        assert_type(await client.counts(Direct), dict[str, dict[str, int]])
        await handle.terminate()


def ask_blocking() -> FileReport:
    """The blocking client is typed the same."""
    with SyncClient() as client:
        handle = client.create(Direct, FileParams("a"))
        assert_type(handle, SyncInstance[FileReport])
        return handle.result(timeout="1 minute")
