"""A feed on a real server under faults: it may deliver twice, it never passes a message over.

What every feed promises is in `test_bus_conformance_delivery.py`.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from nats.aio.msg import Msg

from toque.storage import nats_feed
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_feed import ASKED_MAX, PULL_MESSAGES_MAX, NatsFeed, pull_size
from toque.storage.nats_options import NatsOptions
from toque.storage.ports import FeedSpec, Message, StreamConfig

EVENTUALLY_S_MAX = 15.0
STREAM = "fed"
LONG_ACK = "$JS.ACK._.ACCOUNT.fed.consumer.1.{stream}.{consumer}.1700000000123456789.0.rand"


class Reader:
    """A feed's handler that keeps what it gets, and the tests' view of the feed."""

    def __init__(self) -> None:
        self.batches: list[Sequence[Message]] = []
        self._grew = asyncio.Event()
        self.feed: NatsFeed

    def __call__(self, batch: Sequence[Message]) -> None:
        self.batches.append(batch)
        self._grew.set()

    @property
    def sequences(self) -> list[int]:
        return [message.sequence for batch in self.batches for message in batch]

    async def until(self, sequence: int) -> None:
        """Wait until the message of a sequence has arrived."""
        async with asyncio.timeout(EVENTUALLY_S_MAX):
            while sequence not in self.sequences:
                self._grew.clear()
                await self._grew.wait()

    async def made(self, *, other_than: str = "") -> str:
        """Wait until the feed has a consumer (another one than that). Returns its name on the server."""
        async with asyncio.timeout(EVENTUALLY_S_MAX):
            while self.feed._consumer is None or self.feed._consumer.name == other_than:
                await asyncio.sleep(0.005)
        return self.feed._consumer.name


@asynccontextmanager
async def reading(url: str, *, messages: int = 0, filters: tuple[str, ...] = ("fed.>",),
                  **spec: object) -> AsyncIterator[tuple[NatsBus, Reader]]:
    """A bus, a fresh stream of so many messages, and an open feed of it that wants nothing yet."""
    bus = await NatsBus.connect(NatsOptions(servers=(url,)))
    reader = Reader()
    try:
        await make_stream(bus, messages)
        reader.feed = await bus.open_feed(FeedSpec(stream=STREAM, filters=filters, **spec), reader)
        yield bus, reader
        await reader.feed.close()
    finally:
        await bus.close()


async def make_stream(bus: NatsBus, messages: int) -> None:
    await bus.ensure_stream(StreamConfig(name=STREAM, subjects=["fed.>"]))
    await asyncio.gather(*(bus.publish(f"fed.{n}", str(n).encode()) for n in range(messages)))


async def api(bus: NatsBus, operation: str, request: object = None) -> dict:
    answer = await bus.request(f"$JS.API.{operation}", json.dumps(request).encode() if request else b"")
    return json.loads(answer.data)


async def consumers(bus: NatsBus) -> list[str]:
    return (await api(bus, f"CONSUMER.NAMES.{STREAM}"))["consumers"] or []


async def hand_over(feed: NatsFeed, reply: str) -> None:
    """Give the feed a message as the client library would; the server lets nobody publish such reply subjects."""
    await feed._consumer.on_message(Msg(_client=feed._connection._client, subject="fed.x", reply=reply, data=b"x"))


def increasing(sequences: list[int]) -> bool:
    return sequences == sorted(set(sequences))


# -- how it reads ------------------------------------------------------------------------------------------------------

def test_the_consumer_is_disposable(nats_server, run_async):
    """Memory storage, one replica, no acks, gone after a while without its reader, and at once when the feed closes."""
    async def main() -> None:
        async with reading(nats_server.url, name="pod7", filters=("fed.a", "fed.b")) as (bus, reader):
            name = await reader.made()
            config = (await api(bus, f"CONSUMER.INFO.{STREAM}.{name}"))["config"]

            assert name.startswith("pod7-")
            assert (config["mem_storage"], config["num_replicas"], config["ack_policy"]) == (True, 1, "none")
            assert (config["filter_subjects"], config["inactive_threshold"]) == (["fed.a", "fed.b"], 30 * 10**9)
            await reader.feed.close()
            assert await consumers(bus) == []

    run_async(main())


def test_what_arrives_together_is_handled_together(nats_server, run_async):
    """Batches, not single messages: in stream order, with the broker's time."""
    async def main() -> None:
        async with reading(nats_server.url, messages=500) as (bus, reader):
            reader.feed.want(500)
            await reader.until(500)

            assert increasing(reader.sequences)
            assert len(reader.batches) < 100
            stored = await bus.message_at(STREAM, 500)
            assert reader.batches[-1][-1].time_ms == stored.time_ms

    run_async(main())


def test_wishes_of_one_turn_are_one_pull(nats_server, run_async, monkeypatch):
    """Many small wants do not flood the server with requests, and are all granted."""
    async def main() -> None:
        async with reading(nats_server.url) as (bus, reader):
            for _ in range(600):  # the server keeps 512 open pulls
                reader.feed.want(1)
                await asyncio.sleep(0)
            name = await reader.made()
            waiting = (await api(bus, f"CONSUMER.INFO.{STREAM}.{name}"))["num_waiting"]
            await asyncio.gather(*(bus.publish(f"fed.{n}", b"") for n in range(600)))
            await reader.until(600)

            assert waiting <= 12
            assert await reader.made() == name

    run_async(main())


@pytest.mark.parametrize(("credit", "asked", "size"), [
    (0, 0, 0), (1, 0, 1), (5, 5, 0), (1, 1, 0), (2, 1, 1), (10, 8, 0), (10, 5, 5),
    (10**6, 0, PULL_MESSAGES_MAX), (10**6, PULL_MESSAGES_MAX, PULL_MESSAGES_MAX), (10**6, ASKED_MAX, 0)])
def test_the_size_of_a_pull(credit, asked, size):
    """What is wanted and not asked for yet, within the bounds, once it is worth a request."""
    assert pull_size(credit, asked) == size


def test_a_pull_that_expires_is_asked_for_again(nats_server, run_async, monkeypatch):
    """What was wanted stays wanted; the consumer stays too."""
    monkeypatch.setattr(nats_feed, "PULL_EXPIRES_S", 0.4)
    monkeypatch.setattr(nats_feed, "HEARTBEAT_S", 0.1)

    async def main() -> None:
        async with reading(nats_server.url) as (bus, reader):
            name = await reader.made()
            reader.feed.want(10)
            await bus.publish("fed.a", b"")
            await reader.until(1)

            async def pulls() -> int:
                return int(reader.feed._connection._client.stats["out_msgs"])

            before = await pulls()
            async with asyncio.timeout(EVENTUALLY_S_MAX):
                while await pulls() < before + 2:
                    await asyncio.sleep(0.01)
            await bus.publish("fed.b", b"")
            await reader.until(2)

            assert (reader.sequences, await reader.made()) == ([1, 2], name)

    run_async(main())


def test_a_pull_that_is_full_of_bytes_is_asked_for_again(nats_server, run_async, monkeypatch):
    """The bound on bytes delays messages, it loses none, and the consumer stays."""
    monkeypatch.setattr(nats_feed, "PULL_BYTES_MAX", 20_000)

    async def main() -> None:
        async with reading(nats_server.url) as (bus, reader):
            name = await reader.made()
            await asyncio.gather(*(bus.publish(f"fed.{n}", bytes(3_000)) for n in range(50)))
            reader.feed.want(60)
            await reader.until(50)

            assert (reader.sequences, await reader.made()) == (list(range(1, 51)), name)

    run_async(main())


def test_both_forms_of_the_ack_subject_are_read(nats_server, run_async):
    """Sequence and time also come out of the longer form, which has the domain and the account in front."""
    async def main() -> None:
        async with reading(nats_server.url) as (_, reader):
            reader.feed.want(5)
            await hand_over(reader.feed, LONG_ACK.format(stream=42, consumer=1))
            await reader.until(42)

            message = reader.batches[0][0]
            assert (message.data, message.sequence, message.time_ms) == (b"x", 42, 1_700_000_000_123)

    run_async(main())


# -- faults ------------------------------------------------------------------------------------------------------------

def test_a_killed_server_loses_no_message_of_a_feed(nats_server, run_async):
    """kill -9 in the middle, with pulls open: everything comes, in order."""
    async def main() -> None:
        async with reading(nats_server.url, messages=200) as (bus, reader):
            reader.feed.want(150)
            await reader.until(150)
            reader.feed.want(10_000)

            exited = nats_server.exited
            nats_server.kill()
            await exited
            await nats_server.start()
            await reader.made()
            await asyncio.gather(*(bus.publish(f"fed.more{n}", b"") for n in range(100)))
            await reader.until(300)

            assert reader.sequences == list(range(1, 301))

    run_async(main())


@pytest.mark.parametrize("wanting", [True, False])
def test_a_deleted_consumer_is_made_again(nats_server, run_async, wanting):
    """With a pull open (409) and without one (503): the feed goes on behind the last message."""
    async def main() -> None:
        async with reading(nats_server.url, messages=20) as (bus, reader):
            name = await reader.made()
            reader.feed.want(20 if wanting else 10)
            await reader.until(10)
            if wanting:
                await reader.until(20)
                reader.feed.want(5)

            await api(bus, f"CONSUMER.DELETE.{STREAM}.{name}")
            await bus.publish("fed.last", b"")
            reader.feed.want(100)
            await reader.until(21)

            assert reader.sequences == list(range(1, 22))
            assert await reader.made() != name

    run_async(main())


def test_a_gap_in_the_consumers_numbers_makes_it_again(nats_server, run_async):
    """A message that was dropped on the way is read again from the stream."""
    async def main() -> None:
        async with reading(nats_server.url) as (bus, reader):
            name = await reader.made()
            reader.feed.want(100)
            dropped = f"$JS.ACK.{STREAM}.{name}.1.9.2.1700000000000000000.0"  # as if number 1 had been lost
            await hand_over(reader.feed, dropped)
            await reader.made(other_than=name)
            await asyncio.gather(*(bus.publish(f"fed.{n}", b"") for n in range(10)))
            await reader.until(10)

            assert reader.sequences == list(range(1, 11))

    run_async(main())


def test_missed_heartbeats_make_the_consumer_again(nats_server, run_async, monkeypatch):
    """When nothing at all comes for a wanted message, not even a heartbeat, the feed starts over behind the last one."""
    monkeypatch.setattr(nats_feed, "HEARTBEAT_S", 0.1)

    async def main() -> None:
        async with reading(nats_server.url, messages=5) as (bus, reader):
            name = await reader.made()
            reader.feed.want(100)
            await reader.until(5)
            await reader.feed._consumer.handle._subscription.unsubscribe()  # nothing reaches this inbox any more
            await bus.publish("fed.unheard", b"")
            await reader.made(other_than=name)
            await reader.until(6)

            assert reader.sequences == list(range(1, 7))

    run_async(main())


def test_a_quiet_consumer_with_heartbeats_stays(nats_server, run_async, monkeypatch):
    """Silence of the stream is no fault: heartbeats are enough."""
    monkeypatch.setattr(nats_feed, "HEARTBEAT_S", 0.1)

    async def main() -> None:
        async with reading(nats_server.url) as (bus, reader):
            name = await reader.made()
            reader.feed.want(1)
            ticks = asyncio.get_running_loop().time() + 1.0  # ten heartbeats: longer than the feed would wait
            async with asyncio.timeout(EVENTUALLY_S_MAX):
                while asyncio.get_running_loop().time() < ticks:
                    await bus.stream_info(STREAM)
                    assert await reader.made() == name

    run_async(main())


def test_a_stream_made_again_is_read_from_its_start(nats_server, run_async):
    """The cursor of the stream that is gone means nothing in the new one."""
    async def main() -> None:
        async with reading(nats_server.url, messages=20) as (bus, reader):
            reader.feed.want(1_000)
            await reader.until(20)
            await bus.delete_stream(STREAM)
            reader.batches.clear()
            await make_stream(bus, 30)
            await reader.until(30)

            assert reader.sequences == list(range(1, 31))

    run_async(main())


def test_a_stream_from_an_older_disk_is_read_from_its_start(nats_server, run_async, tmp_path):
    """When the broker comes back with less than the feed has seen, nothing of what follows is passed over."""
    async def restart_with(bus: NatsBus, disk_of) -> None:
        await nats_server.stop()
        disk_of()
        await nats_server.start()

    store, copy = nats_server.store_dir / "jetstream", tmp_path / "older"

    async def main() -> None:
        async with reading(nats_server.url, messages=10) as (bus, reader):
            reader.feed.want(10_000)
            await reader.until(10)
            name = await reader.made()
            await restart_with(bus, lambda: shutil.copytree(store, copy))
            name = await reader.made(other_than=name)
            await asyncio.gather(*(bus.publish(f"fed.later{n}", b"") for n in range(10)))
            await reader.until(20)

            await restart_with(bus, lambda: (shutil.rmtree(store), shutil.copytree(copy, store)))
            reader.batches.clear()
            await reader.made(other_than=name)
            await bus.publish("fed.new", b"")
            await reader.until(11)

            assert reader.sequences == list(range(1, 12))

    run_async(main())


def test_the_newest_of_each_subject_come_again_after_a_loss(nats_server, run_async):
    """A feed of newest messages shows them all once more, so that nothing that changed meanwhile is missed."""
    async def main() -> None:
        async with reading(nats_server.url, messages=3, last_per_subject=True) as (bus, reader):
            reader.feed.want(100)
            await reader.until(3)
            name = await reader.made()
            await api(bus, f"CONSUMER.DELETE.{STREAM}.{name}")
            await reader.made(other_than=name)
            await bus.publish("fed.0", b"newer")
            await reader.until(4)

            assert reader.sequences == [1, 2, 3, 1, 2, 3, 4]

    run_async(main())


def test_a_feed_waits_for_a_stream_that_is_gone(nats_server, run_async):
    """It keeps trying, and delivers when there is one again."""
    async def main() -> None:
        async with reading(nats_server.url, messages=1) as (bus, reader):
            reader.feed.want(10)
            await reader.until(1)
            await bus.delete_stream(STREAM)
            reader.batches.clear()
            async with asyncio.timeout(EVENTUALLY_S_MAX):
                while reader.feed._consumer is not None:
                    await asyncio.sleep(0.005)
            await make_stream(bus, 2)
            await reader.until(2)

            assert reader.sequences == [1, 2]

    run_async(main())


def test_a_closed_feed_delivers_nothing(nats_server, run_async):
    """Not what is stored afterwards, and not what the server sent already."""
    async def main() -> None:
        async with reading(nats_server.url, messages=100) as (bus, reader):
            reader.feed.want(100)
            closing = asyncio.create_task(reader.feed.close())
            await closing
            seen = list(reader.sequences)
            await bus.publish("fed.late", b"")
            for _ in range(20):
                await bus.stream_info(STREAM)

            assert reader.sequences == seen

    run_async(main())
