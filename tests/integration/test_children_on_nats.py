"""Children on a real server and LMDB: a pod leaves while a parent waits, and every child counts once."""

from __future__ import annotations

import asyncio
import runpy
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pod_here import owned, pod

from toque._app import App
from toque._nats_server import NatsServer
from toque.client import Client
from toque.errors import ChildFailed
from toque.storage.nats_options import NatsOptions
from toque.workflow import Step, Workflow, WorkflowEvent

CHILDREN = 40


class Leaf(Workflow[int, int], name="leaf"):
    """Sleeps, so that a pod can be stopped meanwhile; fails for 13."""

    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        if event.payload == 13:
            raise ValueError("unlucky")
        await step.sleep("rest", "3 seconds")
        return event.payload * 10


class Boss(Workflow[int, list[Any]], name="boss"):
    """As many children as its params say, and one that nobody waits for."""

    async def run(self, event: WorkflowEvent[int], step: Step) -> list[Any]:
        async def one(number: int) -> Any:
            try:
                return await step.run_workflow("part", Leaf, number)
            except ChildFailed as error:
                return error.error_message

        await step.start_workflow("apart", Leaf, 1000)
        return list(await asyncio.gather(*[one(number) for number in range(event.payload)]))


APP = App(workflows={"leaf": Leaf, "boss": Boss}, lifespan=None, reference="test", files=[])


@pytest.mark.timeout(120)
def test_a_parent_gets_the_end_of_each_child_once_over_a_change_of_owner(tmp_path: Path) -> None:
    """40 children of one parent; their pod leaves while they sleep, and another one goes on from the journal."""
    async def main() -> None:
        server = NatsServer(tmp_path / "nats")
        await server.start()
        try:
            await story(server.url, tmp_path)
        finally:
            await server.stop()

    asyncio.run(main())


async def story(url: str, directory: Path) -> None:
    options = NatsOptions(servers=(url,))
    async with pod(APP, "a", directory, options), await Client.connect(url) as client:
        await until(lambda: owned(client), "every station has an owner")
        handle = await client.create(Boss, CHILDREN, id="one")
        await until(lambda: created(client), "every child is created")
    async with pod(APP, "b", directory, options), await Client.connect(url) as client:
        assert await client.handle(Boss, "one").result(timeout="1 minute") == [
            number * 10 if number != 13 else "unlucky" for number in range(CHILDREN)]
        steps = (await handle_of(client, handle.id).describe()).steps
        assert len({step.child for step in steps}) == CHILDREN + 1
        assert {step.status for step in steps} == {"complete", "failed"}
        await until(lambda: all_ended(client), "the one that nobody waits for has ended, too")


def handle_of(client: Client, instance_id: str) -> Any:
    return client.handle("boss", instance_id)


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    give_up = time.monotonic() + 30
    while not await condition():
        assert time.monotonic() < give_up, f"not in time: {what}"
        await asyncio.sleep(0.05)


async def counts(client: Client) -> dict[str, int]:
    found: dict[str, int] = {}
    for report in await client.stations():
        for queue in report.view.queues if report.view else ():
            for status, count in queue.counts.items() if queue.workflow == "leaf" else ():
                found[status] = found.get(status, 0) + count
    return found


async def created(client: Client) -> bool:
    return sum((await counts(client)).values()) == CHILDREN + 1


async def all_ended(client: Client) -> bool:
    return await counts(client) == {"complete": CHILDREN, "errored": 1}


@pytest.mark.timeout(120)
def test_the_example_runs_as_its_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """examples/order_batch.py: three orders are weighed, one is not, and the report is written."""
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "order_batch.py"))
    flows = {name: example[name.title()] for name in ("ship", "report", "batch")}

    async def main() -> None:
        server = NatsServer(tmp_path / "nats")
        await server.start()
        try:
            async with (pod(App(workflows=flows, lifespan=None, reference="test", files=[]), "a", tmp_path,
                            NatsOptions(servers=(server.url,))), await Client.connect(server.url) as client):
                await until(lambda: owned(client), "every station has an owner")
                batch = await client.create(flows["batch"], ["books", "lamp", "moon", "seeds"])
                lines = await batch.result(timeout="30 seconds")
                report = next(step.child for step in (await batch.describe()).steps if step.name == "report")
                await client.handle(*report.split("/")).result(timeout="30 seconds")
        finally:
            await server.stop()
        assert [line.partition(":")[0] for line in lines] == ["books", "lamp", "moon", "seeds"]
        assert lines[0] == "books: 900 g" and "nobody knows how heavy it is" in lines[2]
        assert "seeds: 15 g" in capsys.readouterr().out

    asyncio.run(main())
