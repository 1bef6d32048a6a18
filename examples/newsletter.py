"""A newsletter that an operator steers: stopped before it goes out, let go, sent again, and forgotten.

    toque dev examples/newsletter.py       # a server and two pods; leave it running
    python examples/newsletter.py          # in another terminal: all of it, from code

By hand: `toque trigger newsletter '"cats"' --id cats`, then `toque instances pause cats`, `describe`, `resume` …
"""

from __future__ import annotations

import asyncio
import random

from toque import Client, Instance, InstanceEnded, InstanceNotFound, Retention, Step, StepRef, Workflow, WorkflowEvent


class Newsletter(Workflow[str, str], name="newsletter", retention=Retention(success="30 days", error="90 days")):
    async def run(self, event: WorkflowEvent[str], step: Step) -> str:
        text = await step.do("write", self.write, event.payload)
        await step.sleep("until the morning", "2 seconds")
        return await step.do("send", self.send, text)

    async def write(self, topic: str) -> str:
        return f"{topic}, draft {random.randrange(10**6)}"

    async def send(self, text: str) -> str:
        return f"{text}, sent {random.randrange(10**6)}"


async def until(letter: Instance[str], status: str) -> None:
    while (await letter.status()).status != status:
        await asyncio.sleep(0.05)


async def stop_and_go(client: Client) -> Instance[str]:
    letter = await client.create(Newsletter, "cats", id="cats")
    await letter.pause()
    await until(letter, "paused")  # a callback that was inside has finished: nothing goes out now
    print("paused; its sleep stands still")
    await letter.resume()
    await letter.result()
    try:
        await letter.pause()
    except InstanceEnded as error:
        print(error)
    return letter


async def again(letter: Instance[str]) -> None:
    before = await letter.result()
    await letter.restart(from_=StepRef("send"))
    after = await letter.result()
    print("the draft is the same:", after.split(", sent")[0] == before.split(", sent")[0])
    print("it was sent anew:", after != before)


async def forget(client: Client, letter: Instance[str]) -> None:
    await letter.delete()
    try:
        await letter.status()
    except InstanceNotFound as error:
        print(error)
    await client.create(Newsletter, "dogs", id=letter.id)  # the id is free
    for result in await client.delete_batch(Newsletter, [letter.id, "never-created", letter.id]):
        print(result.index, result.id, result.code or "deleted")


async def keep_short(client: Client) -> None:
    letter = await client.create(Newsletter, "birds", retention=Retention(success="1 second", error="7 days"))
    await letter.result()
    try:
        await until(letter, "gone")
    except InstanceNotFound:
        print("kept for a second, and deleted")


async def main() -> None:
    async with Client.connect() as client:
        letter = await stop_and_go(client)
        await again(letter)
        await forget(client, letter)
        await keep_short(client)


if __name__ == "__main__":
    asyncio.run(main())
