"""What docs/watching.md explains, as a script; a test runs it. In two terminals:

    toque dev docs/examples/guide.py
    python docs/examples/watching.py
"""

from __future__ import annotations

import asyncio

from guide import Fetch, Index, Remind

from toque import Client, SyncClient


async def one(client: Client) -> None:
    handle = await client.create(Fetch, "flaky")
    async for event in handle.watch():  # ends when the instance has ended
        print(event.type, event.step, event.attempt or "", event.value if event.value is not None else "")


async def from_a_cursor(client: Client) -> None:
    handle = await client.create(Fetch, "page")
    cursor = None
    async for event in handle.watch():
        cursor = event.cursor  # keep it with what you did with the event
        break  # killed here, say
    async for event in handle.watch(cursor, filter=["step_completed", "workflow_completed"]):
        print("behind it:", event.type, event.value)


async def many(client: Client) -> None:
    handles = [await client.create(Remind, title) for title in ("tea", "rice", "eggs")]
    ended = []
    async for event in client.subscribe(handles, filter=["workflow_completed", "workflow_errored"]):
        ended.append(event.id)
    print(len(ended), "have ended")


async def progress(client: Client) -> None:
    handle = await client.create(Index, 5)
    shares = []
    async for event in handle.watch(filter=["progress"]):  # the end ends it, though the filter hides it
        shares.append(event.value)
    print("reported:", shares[-1])


def blocking() -> None:
    with SyncClient() as client:
        handle = client.create("fetch", "page")
        print([event.type for event in handle.watch(filter=["workflow_started", "workflow_completed"])])


async def main() -> None:
    async with Client.connect() as client:
        await one(client)
        await from_a_cursor(client)
        await many(client)
        await progress(client)


if __name__ == "__main__":
    asyncio.run(main())
    blocking()
