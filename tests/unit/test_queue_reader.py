"""The reader of one workflow's queue: what it says to be committed was read, and handled (protocol rule 11)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from toque import _subjects as subjects
from toque._accounts import ensure_account, ensure_queue_stream
from toque._protocol import AccountRecord
from toque._subjects import StationId, station_number
from toque.sim.loop import run
from toque.storage.memory_broker import DELAY
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.workers.queue_purge import QueuePurge, lump
from toque.workers.queue_reader import QueueReader
from toque.workers.slots import Slots
from toque.workers.souschef import SousChef
from toque.workflow import Step, Workflow, WorkflowEvent

STATIONS = 2
FIRST, SECOND = StationId(1, 0), StationId(1, 1)
QUEUE = subjects.queue_stream("main", "work")
SOON_S = 0.5
QUEUE_LIMIT = 10_000


class Work(Workflow[int, int], name="work"):
    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        return event.payload


class Owner:
    """A station that admits nothing by itself, and knows what the test says."""

    def __init__(self, station: StationId) -> None:
        self.id = station
        self.known: set[str] = set()
        self.lives = True
        self.deleting: dict[tuple[str, str], int] = {}

    def tombstone(self, workflow: str, instance_id: str) -> None:
        return None

    def knows(self, workflow: str, instance_id: str) -> bool:
        return instance_id in self.known

    def is_admitting(self, workflow: str, instance_id: str) -> bool:
        return False

    def may_admit(self) -> bool:
        return True

    def in_time(self) -> bool:
        return self.lives


class Bench:
    """A queue stream, and a reader for its first station."""

    def __init__(self) -> None:
        self.broker = MemoryBroker(random.Random(1))
        self.bus, self.other = MemoryBus(self.broker), MemoryBus(self.broker)
        self.slots = Slots(may_start=lambda: False)
        self.slots.ceiling = 100
        self.reader = QueueReader(self.bus, "main", "work", self.slots, session="a-1")

    async def opened(self) -> Bench:
        account, layout = await ensure_account(self.other, "main",
                                               defaults=AccountRecord(name="main", stations=STATIONS))
        await ensure_queue_stream(self.other, account, layout, "work")
        self.first, self.second = (SousChef(Owner(it), "work", Work) for it in (FIRST, SECOND))
        self.reader.add(self.first)
        self.running = asyncio.create_task(self.reader.run())
        await asyncio.sleep(SOON_S)
        return self

    async def publish(self, station: StationId, count: int) -> list[int]:
        """Returns the sequences of so many creations at the station."""
        ids = [f"i{number}" for number in range(10 * count) if station_number(f"i{number}", STATIONS) == station.number]
        return [(await self.other.publish(subjects.create("main", "work", it), b"7")).sequence for it in ids[:count]]


def on_bench(check: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        bench = await Bench().opened()
        await check(bench)
        bench.running.cancel()

    run(main(), seed=1)


def test_everything_was_read_where_nothing_is_queued():
    """The position is the stream's end, so that one idle station does not hold the purge of all others."""

    async def check(bench: Bench) -> None:
        last = (await bench.publish(SECOND, 5))[-1]

        assert await bench.reader.positions() == {FIRST: last}

    on_bench(check)


def test_what_waits_is_not_committed():
    """The position stands right before the oldest message that is not handled yet."""

    async def check(bench: Bench) -> None:
        await bench.publish(SECOND, 2)
        oldest = (await bench.publish(FIRST, 3))[0]
        await asyncio.sleep(SOON_S)

        assert await bench.reader.positions() == {FIRST: oldest - 1}

    on_bench(check)


def test_what_was_not_pulled_is_not_committed():
    """More is queued than there are slots and prefetch for: the reader cannot know what lies beyond."""

    async def check(bench: Bench) -> None:
        sequences = await bench.publish(FIRST, 200)
        await asyncio.sleep(SOON_S)
        assert 0 < bench.first.waiting < 200
        bench.first._owner.known = {it for it, _ in bench.first._buffer}
        bench.first.admit_next()  # all that was pulled is known, and dropped
        bench.slots.ceiling = 0
        position = (await bench.reader.positions())[FIRST]

        assert position < sequences[-1]
        assert bench.first.waiting == 0

    on_bench(check)


def test_a_station_that_joins_meanwhile_is_not_said_to_be_read():
    """"Read to the end" was asked for the consumer before: its messages would be purged, and nobody would run them."""

    async def check(bench: Bench) -> None:
        oldest = (await bench.publish(SECOND, 5))[0]
        bench.broker.fail_next(f"$JS.API.STREAM.INFO.{QUEUE}", DELAY, times=2, delay_s=0.2)
        asking = asyncio.create_task(bench.reader.positions())
        await asyncio.sleep(0.05)
        bench.reader.add(bench.second)

        assert (await asking).get(SECOND, 0) < oldest

    on_bench(check)


def test_a_consumer_that_is_made_anew_meanwhile_takes_the_answer_back():
    """Its buffer is forgotten: what waited in it will be delivered again, and is not handled."""

    async def check(bench: Bench) -> None:
        oldest = (await bench.publish(FIRST, 5))[0]
        await asyncio.sleep(SOON_S)
        bench.broker.fail_next(f"$JS.API.STREAM.INFO.{QUEUE}", DELAY, times=2, delay_s=0.2)
        asking = asyncio.create_task(bench.reader.positions())
        await asyncio.sleep(0.05)
        bench.reader.add(bench.second)

        assert (await asking).get(FIRST, 0) < oldest

    on_bench(check)


def test_a_stream_that_was_made_anew_is_read_from_its_start():
    """No cursor outlives its stream; nothing is committed in a stream that was not read."""

    async def check(bench: Bench) -> None:
        await bench.publish(FIRST, 3)
        await asyncio.sleep(SOON_S)
        await bench.other.delete_stream(QUEUE)
        account, layout = await ensure_account(bench.other, "main")
        await ensure_queue_stream(bench.other, account, layout, "work")
        fresh = (await bench.publish(FIRST, 2))[0]
        assert await bench.reader.positions() == {}
        await asyncio.sleep(SOON_S)

        assert await bench.reader.positions() == {FIRST: fresh - 1}

    on_bench(check)


def test_messages_of_a_station_that_left_are_ignored():
    """They belong to its next owner."""

    async def check(bench: Bench) -> None:
        bench.reader.remove(FIRST)
        await bench.publish(FIRST, 3)
        await asyncio.sleep(SOON_S)

        assert bench.first.waiting == 0
        assert await bench.reader.positions() == {}

    on_bench(check)


def test_a_station_that_leaves_while_the_queue_is_opened_harms_nothing():
    """SIGTERM just behind a claim: the last station is gone before there is a consumer for it. A pod ended of it."""

    async def check(bench: Bench) -> None:
        bench.broker.fail_next(f"$JS.API.STREAM.INFO.{QUEUE}", DELAY, delay_s=1)
        bench.reader.remove(FIRST)
        bench.reader.add(bench.first)
        await asyncio.sleep(0.5)
        bench.reader.remove(FIRST)
        await asyncio.sleep(3)

        assert not bench.running.done()

    on_bench(check)


def test_a_backlog_of_another_stream_purges_nothing():
    """What a station has handled in the stream that was lost is no reason to purge the one that took its place."""

    async def check(bench: Bench) -> None:
        limit = 2 * lump(QUEUE_LIMIT, STATIONS)
        bench.first.handled.extend(range(1, limit + 2))  # it waits for the other station, which is slow
        await bench.other.delete_stream(QUEUE)
        account, layout = await ensure_account(bench.other, "main")
        await ensure_queue_stream(bench.other, account, layout, "work")
        await bench.publish(FIRST, 2)
        purge = QueuePurge(bench.bus, "main", owns_first=lambda: False)
        await purge.tick([bench.reader], [FIRST, SECOND], QUEUE_LIMIT)
        assert len(bench.broker.stored(QUEUE)) == 2
        await asyncio.sleep(SOON_S)

        await purge.tick([bench.reader], [FIRST, SECOND], QUEUE_LIMIT)

        assert len(bench.broker.stored(QUEUE)) == 2
        assert not bench.first.handled

    on_bench(check)


# -- a station that is far ahead of another ----------------------------------------------------------------------------

async def three_handled_and_one_waiting(bench: Bench) -> list[int]:
    """Station 0's creations; between them lies one of station 1, which is not read here."""
    sequences = await bench.publish(FIRST, 3)
    await bench.publish(SECOND, 1)
    await asyncio.sleep(SOON_S)
    bench.first._owner.known = {it for it, _ in bench.first._buffer}
    bench.first.admit_next()  # they are known, and dropped
    sequences.append((await bench.other.publish(subjects.create("main", "work", "i200"), b"7")).sequence)
    await asyncio.sleep(SOON_S)
    return sequences


def queued(bench: Bench) -> list[int]:
    return [message.sequence for message in bench.broker.stored(QUEUE)]


def test_a_station_purges_its_own_subjects_when_another_is_too_slow():
    """What it has handled would fill the stream. What waits, and the other station's message, stay."""

    async def check(bench: Bench) -> None:
        *handled, waiting = await three_handled_and_one_waiting(bench)

        await bench.reader.clear_backlog(2)

        assert queued(bench) == [handled[-1] + 1, waiting]
        assert not bench.first.handled

    on_bench(check)


def test_a_small_backlog_is_left_to_the_cut_at_the_front():
    """Holes between the messages of others slow their readers down."""

    async def check(bench: Bench) -> None:
        sequences = await three_handled_and_one_waiting(bench)

        await bench.reader.clear_backlog(3)

        assert set(sequences) <= set(queued(bench))

    on_bench(check)


def test_a_station_that_may_be_anothers_purges_nothing():
    """Its session's deadline has passed: the next owner reads the stream from its start."""

    async def check(bench: Bench) -> None:
        sequences = await three_handled_and_one_waiting(bench)
        bench.first._owner.lives = False

        await bench.reader.clear_backlog(2)

        assert set(sequences) <= set(queued(bench))

    on_bench(check)
