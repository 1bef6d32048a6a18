"""The workflows that docs/workflows.md explains; a test runs every one of them. Try them:

    toque dev docs/examples/guide.py
    toque trigger thumbnails '{"url": "https://example.org/cat.png", "widths": [64, 256]}' --wait
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import msgspec

from toque import NonRetryableError, Retries, Step, StepContext, StepFailed, StepTimeout, Workflow, WorkflowEvent


# what the pods of this app share
@dataclass
class Shop:
    stock: dict[str, int]
    payments: dict[str, str] = field(default_factory=dict)


@asynccontextmanager
async def lifespan() -> AsyncIterator[Shop]:
    shop = Shop(stock={"knife": 10})  # here: open the database pool, the HTTP client
    yield shop
    shop.stock.clear()  # here: close them; not reached when the pod is killed


# typed params and results
class Picture(msgspec.Struct):
    url: str
    widths: list[int]


class Thumbnails(Workflow[Picture, list[str]], name="thumbnails", version="1"):
    async def run(self, event: WorkflowEvent[Picture], step: Step) -> list[str]:
        data = await step.do("download", download, event.payload.url, timeout="1 minute")

        @step.do("announce")
        async def announce(ctx: StepContext) -> str:
            return f"{ctx.instance_id} has {len(data)} bytes"

        await announce()
        made = [step.do("scale", scale, data, width) for width in event.payload.widths]  # all begin at once
        return await asyncio.gather(*made)


async def download(url: str) -> bytes:
    return url.encode()  # stands for a real download


def scale(data: bytes, width: int) -> str:  # a plain function runs in a thread
    return f"{len(data)} bytes at {width} px"


# an effect outside, done once
class Charge(Workflow[int, str], name="charge"):
    env: Shop

    async def run(self, event: WorkflowEvent[int], step: Step) -> str:
        return await step.do("charge", self.charge, event.payload)

    async def charge(self, ctx: StepContext, cents: int) -> str:
        # The bank takes the first request with a key and answers later ones with its outcome.
        return self.env.payments.setdefault(ctx.idempotency_key, f"{cents} cents")


# retries, and what run() may do about a step that failed
class Fetch(Workflow[str, str], name="fetch"):
    async def run(self, event: WorkflowEvent[str], step: Step) -> str:
        patient = Retries(limit=3, delay="100 milliseconds", backoff="exponential", cap="1 minute")
        try:
            return await step.do("fetch", fetch, event.payload, retries=patient, timeout="5 seconds")
        except StepTimeout:
            return "too slow"
        except StepFailed as failure:
            await step.do("note", note, failure.error_type, failure.attempts)
            return f"gave up after {failure.attempts}"


async def fetch(ctx: StepContext, what: str) -> str:
    if what == "missing":
        raise NonRetryableError("404")  # trying again would not help
    if what == "flaky" and ctx.attempt < 3:
        raise ConnectionError("reset by peer")  # tried again
    if what == "down":
        raise ConnectionError("refused")
    return f"{what} in attempt {ctx.attempt}"


async def note(error_type: str, attempts: int) -> None:
    pass  # stands for a message to somebody


# waiting
class Remind(Workflow[str, list[str]], name="remind"):
    async def run(self, event: WorkflowEvent[str], step: Step) -> list[str]:
        sent = [await step.do("send", send, event.payload)]
        await step.sleep("let it sink in", "2 seconds")  # holds no slot, survives everything
        sent.append(await step.do("send", send, event.payload))
        await step.sleep_until("the third second", event.timestamp + timedelta(seconds=3))
        return sent


async def send(ctx: StepContext, text: str) -> str:
    return f"{text} ({ctx.count})"  # the same name twice: the count tells them apart


# whatever differs from one time to the next belongs into a step
class Lottery(Workflow[int, list[int]], name="lottery"):
    async def run(self, event: WorkflowEvent[int], step: Step) -> list[int]:
        draws = []
        for _ in range(event.payload):  # a loop over params is fine: they never change
            draws.append(await step.do("draw", random.randrange, 1, 50))  # the draw is recorded
        return draws


# branches of several steps each
class Compare(Workflow[str, dict[str, str]], name="compare"):
    async def run(self, event: WorkflowEvent[str], step: Step) -> dict[str, str]:
        prices: dict[str, str] = {}

        async def ask(shop: str) -> None:
            page = await step.do(f"ask {shop}", download, f"{shop}/{event.payload}")
            prices[shop] = await step.do(f"read {shop}", scale, page, 10)

        async with asyncio.TaskGroup() as group:
            group.create_task(ask("north"))
            group.create_task(ask("south"))
        return prices


# a long callback in a thread looks at ctx.cancelled
class Count(Workflow[int, int], name="count"):
    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        return await step.do("count", count_slowly, event.payload, timeout="1 hour")


def count_slowly(ctx: StepContext, limit: int) -> int:
    done = 0
    while done < limit and not ctx.cancelled:  # a thread cannot be stopped from outside
        time.sleep(0.001)
        done += 1
    return done


# progress
class Index(Workflow[int, int], name="index"):
    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        self.report_progress("looking for pages")
        return await step.do("read", read_pages, event.payload)


async def read_pages(ctx: StepContext, pages: int) -> int:
    for page in range(1, pages + 1):
        await asyncio.sleep(0.1)  # stands for reading a page
        ctx.report_progress({"page": page, "of": pages})
    await asyncio.sleep(0.1)
    return pages
