"""What docs/clients.md explains, as a script; a test runs it. In two terminals:

    toque dev docs/examples/guide.py
    python docs/examples/clients.py
"""

from __future__ import annotations

import asyncio

from guide import Fetch, Picture, Remind, Thumbnails

from toque import (
    BrokerUnavailable,
    Client,
    InstanceErrored,
    InstanceExists,
    InstanceTerminated,
    NewInstance,
    OwnerAway,
    QueueFull,
    ResultTimeout,
    SyncClient,
)


async def one(client: Client) -> None:
    picture = Picture("https://example.org/cat.png", [64, 256])
    handle = await client.create(Thumbnails, picture)  # stored for good when this returns
    print(await handle.result(timeout="30 seconds"))  # list[str]: the type checker knows

    status = await handle.status()
    print(status.status, status.output)


async def by_name(client: Client) -> None:
    handle = await client.create("fetch", "page")  # without the workflow's code
    print(await handle.result())


async def once(client: Client, order: str) -> None:
    try:
        await client.create(Fetch, "page", id=f"order-{order}")
    except InstanceExists:
        print("this order was created before")
    except QueueFull:
        print("not stored: the queue is full, try again later")
    except (BrokerUnavailable, OwnerAway) as error:
        print(f"{error}; the same call again settles it: {error.handle}")


async def many(client: Client) -> None:
    results = await client.create_batch(Fetch, [NewInstance("page") for _ in range(2000)])
    print(sum(result.error is None for result in results), "created")


async def waiting(client: Client) -> None:
    handle = client.handle(Remind, "reminder-7")  # asks nobody; anything that knows the id can make one
    try:
        print(await handle.result(timeout="1 second"))
    except ResultTimeout:
        print("not ended yet; it goes on")
    except OwnerAway as error:
        print(f"no pod answers for it: {error}")
    except InstanceErrored as error:
        print(f"run() raised {error.error_type}: {error.error_message}")
    except InstanceTerminated:
        print("somebody terminated it")


async def looking(client: Client) -> None:
    async for row in client.list("remind", status=["errored", "terminated"], order="newest", limit=10):
        print(row.id, row.status)
    page = await client.list_page(id_prefix="reminder-", limit=50)
    if page.cursor:  # text: it may travel in a URL, and come back to another process
        page = await client.list_page(cursor=page.cursor, limit=50)
    print(await client.counts("remind"))  # {'remind': {'complete': 12, 'queued': 3, …}}
    for pod in await client.pods():
        print(pod.pod, pod.slots_in_use, "of", pod.slots_leased, "slots in use")
    for queue in await client.queues():
        print(queue.workflow, queue.queued, "queued")


def blocking() -> None:
    with SyncClient() as client:  # connects at the first call, anew in each process
        handle = client.create("fetch", "page")
        print(handle.result(timeout="30 seconds"))


async def main() -> None:
    async with Client.connect() as client:
        await one(client)
        await by_name(client)
        await once(client, "7")
        await once(client, "7")
        await many(client)
        await client.create(Remind, "hi", id="reminder-7")
        await waiting(client)
        await client.handle(Remind, "reminder-7").terminate()
        await waiting(client)
        await looking(client)


if __name__ == "__main__":
    asyncio.run(main())
    blocking()
