"""The smallest workflow: one step, one parameter, one result.

    toque dev examples/hello.py            # a server and two pods; leave it running
    python examples/hello.py Ada           # in another terminal: creates an instance and waits for its result
"""

from __future__ import annotations

import asyncio
import sys

from toque import Client, Step, Workflow, WorkflowEvent


def greet(name: str) -> str:
    return f"Hello, {name}!"


class Hello(Workflow[str, str], name="hello"):
    async def run(self, event: WorkflowEvent[str], step: Step) -> str:
        return await step.do("greet", greet, event.payload)


async def main(name: str) -> None:
    async with Client.connect() as client:
        handle = await client.create(Hello, name)
        print(await handle.result(timeout="30 seconds"))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "world"))
