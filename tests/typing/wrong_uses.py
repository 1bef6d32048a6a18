"""Wrong uses that a strict type check must refuse: an error at each line marked E, and at no other.

It is never run.
"""

from __future__ import annotations

import asyncio

from toque import Client, Retries, Step, StepContext, Workflow, WorkflowEvent


async def size_of(path: str) -> int:
    return len(path)


def lines_of(path: str, limit: int = 10) -> list[str]:
    return [path][:limit]


async def with_context(ctx: StepContext, path: str) -> bytes:
    return path.encode()


class Wrong(Workflow[str, int]):
    async def run(self, event: WorkflowEvent[str], step: Step) -> int:
        await step.do("size", size_of, 5)  # E: a path is a str
        await step.do("size", size_of)  # E: the argument is missing
        await step.do("lines", lines_of, "a", "b")  # E: a limit is an int
        await step.do("key", with_context, 5)  # E: behind ctx comes a str
        await step.do(5, size_of, "a")  # E: a name is a str
        await step.do("size", size_of, "a", retries=3)  # E: Retries(limit=3)
        await step.do("size", size_of, "a", timeout=60)  # E: a bare number
        await step.do("size", size_of, "a", retry=Retries())  # E: no such option
        await step.sleep("nap", 5)  # E: a bare number
        await step.sleep_until("later", "2030-01-01")  # E: a datetime
        await step.run_workflow("child", Wrong, 5)  # E: its Params are a str
        await step.start_workflow("child", Wrong)  # E: the params are missing
        child: str = await step.run_workflow("child", Wrong, "a")  # E: its Result is an int
        print(child)
        text: str = await step.do("size", size_of, "a")  # E: the result is an int

        @step.do("greet")
        def greet(ctx: StepContext, name: str) -> str:
            return text + name

        await greet(5)  # E: a name is a str
        await greet("a", "b")  # E: ctx is no argument of the product
        number: int = await greet("a")  # E: the result is a str
        print(number)
        async with asyncio.TaskGroup() as group:
            group.create_task(step.do("size", size_of, "a"))  # E: a Future is no coroutine
        return event.payload  # E: the Result is an int


class WrongRun(Workflow[str, int]):
    async def run(self, event: WorkflowEvent[int], step: Step) -> int:  # E: Params are a str
        return event.payload


class SyncRun(Workflow[str, int]):
    def run(self, event: WorkflowEvent[str], step: Step) -> int:  # E: run is async
        return 1


Retries(limit="3")  # E: an int
Retries(delay=10)  # E: a bare number
Retries(backoff="quadratic")  # E: no such backoff
Retries(3, factor=2)  # E: no such field


async def ask(client: Client) -> None:
    await client.create(Wrong, 5)  # E: Params are a str
    await client.create(Wrong, "a", id=5)  # E: an id is a str
    await client.create(Wrong, "a", timeout=10)  # E: a bare number
    handle = await client.create(Wrong, "a")
    text: str = await handle.result()  # E: the Result is an int
    await client.get(Wrong)  # E: the id is missing
    print(text)
