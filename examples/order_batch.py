"""A batch that runs one child per order and waits for all of them without holding a slot.

    toque dev examples/order_batch.py      # a server and two pods; leave it running
    python examples/order_batch.py         # in another terminal: four orders, one of which fails

See them with `toque instances list`, and what a parent made with `toque instances describe ID`.
"""

from __future__ import annotations

import asyncio

from toque import ChildFailed, Client, NonRetryableError, Step, Workflow, WorkflowEvent


class Ship(Workflow[str, int], name="ship"):
    async def run(self, event: WorkflowEvent[str], step: Step) -> int:
        return await step.do("weigh", self.weigh, event.payload)

    async def weigh(self, order: str) -> int:
        grams = {"books": 900, "lamp": 2400, "seeds": 15}.get(order)
        if grams is None:
            raise NonRetryableError(f"nobody knows how heavy it is: {order}")
        return grams


class Report(Workflow[list[str], None], name="report"):
    async def run(self, event: WorkflowEvent[list[str]], step: Step) -> None:
        await step.do("write", self.write, event.payload)

    async def write(self, lines: list[str]) -> None:
        print("\n".join(lines))


class Batch(Workflow[list[str], list[str]], name="batch"):
    async def run(self, event: WorkflowEvent[list[str]], step: Step) -> list[str]:
        async def one(order: str) -> str:
            try:
                grams = await step.run_workflow("ship", Ship, order, timeout="1 day")
            except ChildFailed as error:
                return f"{order}: {error.error_message}"
            return f"{order}: {grams} g"

        lines = list(await asyncio.gather(*[one(order) for order in event.payload]))
        await step.start_workflow("report", Report, lines)  # nobody waits for this one
        return lines


async def main() -> None:
    async with Client.connect() as client:
        batch = await client.create(Batch, ["books", "lamp", "moon", "seeds"])
        for line in await batch.result(timeout="30 seconds"):
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
