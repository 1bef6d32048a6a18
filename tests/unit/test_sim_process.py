"""Simulated processes: what a stopped one hears when it goes on."""

from __future__ import annotations

import asyncio
import random

from toque.sim.process import Process, ProcessLoop
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.storage.ports import FeedSpec, StreamConfig


def test_a_feed_that_was_opened_while_its_process_stood_still_outlives_a_loss() -> None:
    """The answer came, nobody had seen it yet, and the connection broke: the feed is opened again like any other."""

    async def main() -> None:
        broker = MemoryBroker(random.Random(1))
        other = MemoryBus(broker, "other")
        await other.ensure_stream(StreamConfig(name="S", subjects=["journal.>"]))
        process = Process("p")
        bus = process.bus(broker, "p")
        got: list[bytes] = []

        async def read() -> None:
            feed = await bus.open_feed(FeedSpec(stream="S", filters=("journal.*",)),
                                       lambda messages: got.extend(message.data for message in messages))
            feed.want(1)

        process.spawn(read())
        await asyncio.sleep(0)
        process.pause()
        await asyncio.sleep(1)
        bus.disconnect()
        bus.reconnect()
        await asyncio.sleep(1)
        process.resume()
        await other.publish("journal.1", b"1")
        await asyncio.sleep(1)

        assert got == [b"1"]
        await process.bury()

    with asyncio.Runner(loop_factory=lambda: ProcessLoop(1)) as runner:
        runner.run(main())
