"""The in-memory broker's faults, chances and losses. What it does when nothing is broken: the conformance suite."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from toque.sim.loop import VirtualLoop, run
from toque.storage.memory_broker import DELAY, DROP_BEFORE, DUPLICATE, LOSE_ANSWER
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.storage.memory_stream import format_ttl, matcher, overlap, parse_ttl_s
from toque.storage.ports import BusError, BusTimeout, FeedSpec, Message, NoResponders, PubAck, StreamConfig

SEEDS = range(30)
QUIET_S = 1.0  # above any delay
EXPECTED = "Nats-Expected-Last-Subject-Sequence"
JOURNAL = "journal.1"


class World:
    """A broker with one stream and two connections."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.broker = MemoryBroker(loop.rng if isinstance(loop, VirtualLoop) else random.Random(1))
        self.bus, self.other = MemoryBus(self.broker, "bus"), MemoryBus(self.broker, "other")

    async def with_stream(self) -> World:
        await self.with_stream_from(self.bus)
        return self

    async def with_stream_from(self, bus: MemoryBus) -> None:
        await bus.ensure_stream(StreamConfig(name="S", subjects=["journal.>"], allow_atomic=True))

    @property
    def stored(self) -> list[bytes]:
        return [message.data for message in self.broker.stored("S")]


def in_world(check: Callable[[World], Awaitable[object]], *, seed: int = 1) -> object:
    async def main() -> object:
        return await check(await World().with_stream())

    return run(main(), seed=seed)


def outcome(results: list[PubAck | BaseException]) -> list[str]:
    return [type(result).__name__ for result in results]


# -- who gets a message ------------------------------------------------------------------------------------------------

def test_a_subject_finds_its_way_anew_after_every_change():
    """The broker remembers who takes a subject: subscriptions and streams that come, change and go are heeded at once."""

    async def check(world):
        async def listeners() -> list[str]:
            heard.clear()
            world.bus.emit("news.1", b"")
            await asyncio.sleep(QUIET_S)
            messages = len(world.broker.stored("N")) if "N" in world.broker.stream_names("") else 0
            return [*heard, f"{messages} stored"]

        heard: list[str] = []
        stream = StreamConfig(name="N", subjects=["news.*"])

        assert await listeners() == ["0 stored"]
        subscription = await world.other.subscribe("news.>", lambda _: heard.append("subscriber"))
        assert await listeners() == ["subscriber", "0 stored"]
        await world.bus.ensure_stream(stream)
        assert await listeners() == ["subscriber", "1 stored"]
        await world.bus.update_stream(msgspec.structs.replace(stream, subjects=["other.*"]))
        assert await listeners() == ["subscriber", "1 stored"]
        await subscription.close()
        with pytest.raises(NoResponders):
            await world.bus.request("news.1", b"")
        await world.bus.update_stream(stream)
        assert await listeners() == ["2 stored"]
        await world.bus.delete_stream("N")
        with pytest.raises(NoResponders):
            await world.bus.request("news.1", b"")

    in_world(check)


# -- faults to order ---------------------------------------------------------------------------------------------------

def test_a_message_dropped_before_arrival_is_not_stored():
    """The caller sees an unknown outcome; the very next message is fine."""

    async def check(world):
        world.broker.fail_next("journal.*", DROP_BEFORE)
        with pytest.raises(BusTimeout):
            await world.bus.publish(JOURNAL, b"1")
        await world.bus.publish(JOURNAL, b"2")
        assert world.stored == [b"2"]

    in_world(check)


def test_a_message_whose_answer_is_lost_is_stored():
    """The same unknown outcome, the other truth: resending the same bytes meets 10071."""

    async def check(world):
        world.broker.fail_next(JOURNAL, LOSE_ANSWER)
        with pytest.raises(BusTimeout):
            await world.bus.publish(JOURNAL, b"1", {EXPECTED: "0"})
        with pytest.raises(BusError, match="wrong last sequence: 1"):
            await world.bus.publish(JOURNAL, b"1", {EXPECTED: "0"})
        assert world.stored == [b"1"]

    in_world(check)


def test_a_delayed_message_lands_after_its_senders_time_out():
    """And after others that were sent later: the compare-and-append decides who was first."""

    async def check(world):
        world.broker.fail_next(JOURNAL, DELAY, delay_s=3.0)
        with pytest.raises(BusTimeout):
            await world.bus.publish(JOURNAL, b"late", {EXPECTED: "0"}, timeout_s=1)
        with pytest.raises(BusTimeout):
            world.broker.fail_next(JOURNAL, DELAY, delay_s=0.5)
            await world.bus.publish(JOURNAL, b"first", {EXPECTED: "0"}, timeout_s=0.1)
        await asyncio.sleep(5)
        assert world.stored == [b"first"]

    in_world(check)


def test_a_refusal_to_order_stores_nothing():
    """Any code, for example a store at its limit."""

    async def check(world):
        world.broker.fail_next(JOURNAL, "refuse:10023", times=2)
        for _ in range(2):
            with pytest.raises(BusError) as caught:
                await world.bus.publish(JOURNAL, b"1")
            assert caught.value.code == 10023
        await world.bus.publish(JOURNAL, b"2")
        assert world.stored == [b"2"]

    in_world(check)


def test_management_requests_can_fail_too():
    """They have the server's own subjects, so a leader read can be lost or refused."""

    async def check(world):
        world.broker.fail_next("$JS.API.STREAM.MSG.GET.S", DROP_BEFORE)
        with pytest.raises(BusTimeout):
            await world.bus.last_message("S", JOURNAL)
        world.broker.fail_next("$JS.API.>", "refuse:10008")
        with pytest.raises(BusError):
            await world.bus.stream_info("S")
        world.broker.fail_next("$JS.API.STREAM.PURGE.S", LOSE_ANSWER)
        await world.bus.publish(JOURNAL, b"1")
        with pytest.raises(BusTimeout):
            await world.bus.purge("S", JOURNAL, 2)
        assert world.stored == []

    in_world(check)


def test_a_question_whose_answer_is_lost_was_heard():
    """Core requests can be executed without an answer as well."""

    async def check(world):
        heard: list[Message] = []
        await world.other.subscribe("station.1", heard.append)
        world.broker.fail_next("station.1", LOSE_ANSWER)
        with pytest.raises(BusTimeout):
            await world.bus.request("station.1", b"terminate", timeout_s=1)
        assert [message.data for message in heard] == [b"terminate"]

    in_world(check)


def test_an_unknown_fault_is_a_mistake():
    """A test that misspells its fault would test nothing."""

    async def check(world):
        for how in ("drop", "refuse:", "refuse:often"):
            with pytest.raises(ValueError, match="unknown fault"):
                world.broker.fail_next(">", how)

    in_world(check)


def test_a_lost_message_makes_a_batch_incomplete():
    """Nothing of it is stored."""

    async def check(world):
        world.broker.fail_next("journal.2", DROP_BEFORE)
        with pytest.raises(BusError, match="batch is incomplete"):
            await world.bus.publish_batch([(f"journal.{n}", b"", None) for n in (1, 2, 3)])
        assert world.stored == []

    in_world(check)


# -- write-dead streams ------------------------------------------------------------------------------------------------

def test_a_frozen_stream_answers_reads_and_no_writes():
    """Until the server starts again, as after a full disk."""

    async def check(world):
        await world.bus.publish(JOURNAL, b"1")
        await world.bus.ensure_stream(StreamConfig(name="T", subjects=["other"]))
        world.broker.freeze_stream("S")

        with pytest.raises(BusTimeout):
            await world.bus.publish(JOURNAL, b"2")
        with pytest.raises(BusTimeout):
            await world.bus.purge("S", ">", 9)
        assert (await world.bus.last_message("S", JOURNAL)).data == b"1"
        await world.bus.publish("other", b"")

        world.broker.stop()
        world.broker.start()
        await asyncio.sleep(QUIET_S)
        await world.bus.publish(JOURNAL, b"3")
        assert world.stored == [b"1", b"3"]

    in_world(check)


# -- lost connections --------------------------------------------------------------------------------------------------

async def _publish_through_a_loss(world, lose, after_s):
    """Several publishes under way when the connection goes: what their callers saw, and what is stored."""
    publishes = [asyncio.ensure_future(world.bus.publish(f"journal.{n}", str(n).encode())) for n in range(6)]
    await asyncio.sleep(after_s)
    lose()
    seen = await asyncio.gather(*publishes, return_exceptions=True)
    return outcome(seen), world.stored


@pytest.mark.parametrize("after_s", [0, 0.001])
@pytest.mark.parametrize("how", ["disconnect", "stop"])
def test_what_is_under_way_at_a_loss_may_or_may_not_be_stored(how, after_s):
    """Over many seeds: an acknowledged one always is, of the unknown ones some are and some are not."""

    async def check(world):
        lose = world.bus.disconnect if how == "disconnect" else world.broker.stop
        return await _publish_through_a_loss(world, lose, after_s)

    unknown_stored = unknown_lost = 0
    for seed in SEEDS:
        seen, stored = in_world(check, seed=seed)
        assert set(seen) <= {"PubAck", "BusTimeout"}
        acknowledged = [str(n).encode() for n, name in enumerate(seen) if name == "PubAck"]
        assert set(acknowledged) <= set(stored)
        assert stored == [str(n).encode() for n in range(len(stored))], "a connection loses a suffix of what it sent"
        unknown_stored += len(stored) - len(acknowledged)
        unknown_lost += 6 - len(stored)
    assert unknown_stored and unknown_lost


def test_without_a_connection_nothing_is_buffered():
    """Calls fail, emitted messages are dropped, and nothing of it lands after the reconnect."""

    async def check(world):
        world.bus.disconnect()
        with pytest.raises(BusTimeout):
            await world.bus.publish(JOURNAL, b"1")
        world.bus.emit(JOURNAL, b"2")
        world.bus.reconnect()
        await world.bus.publish(JOURNAL, b"3")
        await asyncio.sleep(QUIET_S)
        assert world.stored == [b"3"]

    in_world(check)


def test_one_connection_can_be_lost_alone():
    """A partition of one pod: others go on, and do not hear it."""

    async def check(world):
        await world.bus.subscribe("pods", lambda message: world.bus.respond(message, b""))
        world.bus.disconnect()
        await world.other.publish(JOURNAL, b"1")
        with pytest.raises(Exception, match="nobody listens"):
            await world.other.request("pods", b"")
        world.bus.reconnect()
        await world.other.request("pods", b"")

    in_world(check)


def test_a_restart_does_not_reconnect_who_is_cut_off():
    """A partition outlives the server's restart."""

    async def check(world):
        world.bus.disconnect()
        world.broker.stop()
        world.broker.start()
        await asyncio.sleep(QUIET_S)
        await world.other.publish(JOURNAL, b"1")
        with pytest.raises(BusTimeout):
            await world.bus.publish(JOURNAL, b"2")

    in_world(check)


def test_a_feed_skips_nothing_over_losses_and_may_repeat():
    """Through ten losses every message comes, in order but for repeats; over the seeds there are some."""

    async def check(world):
        sequences: list[int] = []
        feed = await world.bus.open_feed(
            FeedSpec(stream="S", filters=(">",)), lambda batch: sequences.extend(it.sequence for it in batch))
        feed.want(10_000)
        for number in range(100):
            await world.other.publish(JOURNAL, b"")
            if number % 10 == 9:
                world.bus.disconnect()
                await asyncio.sleep(0.01)
                world.bus.reconnect()
        await asyncio.sleep(QUIET_S)
        assert list(dict.fromkeys(sequences)) == list(range(1, 101))
        return len(sequences) - 100

    assert sum(in_world(check, seed=seed) for seed in range(5)) > 0


def test_a_feed_finds_another_stream_under_the_name_after_a_loss():
    """However far that one has got: its identity tells, not its sequences."""

    async def check(world):
        bodies: list[bytes] = []
        feed = await world.bus.open_feed(
            FeedSpec(stream="S", filters=(">",)), lambda batch: bodies.extend(it.data for it in batch))
        feed.want(1_000)
        await world.other.publish(JOURNAL, b"old")
        await asyncio.sleep(QUIET_S)
        world.bus.disconnect()
        await world.other.delete_stream("S")
        await world.with_stream_from(world.other)
        for body in (b"1", b"2", b"3"):
            await world.other.publish(JOURNAL, body)
        world.bus.reconnect()
        await asyncio.sleep(QUIET_S)
        assert bodies == [b"old", b"1", b"2", b"3"]

    in_world(check)


def test_a_restart_forgets_staged_batches():
    """A batch whose beginning was staged before the restart cannot be committed after it."""

    async def check(world):
        def place(number):
            return {"Nats-Batch-Id": "b", "Nats-Batch-Sequence": str(number)}

        world.bus.emit(JOURNAL, b"1", place(1))
        await asyncio.sleep(QUIET_S)
        world.broker.stop()
        world.broker.start()
        await asyncio.sleep(QUIET_S)
        with pytest.raises(BusError, match="batch is incomplete"):
            await world.bus.publish(JOURNAL, b"2", {**place(2), "Nats-Batch-Commit": "1"})
        assert world.stored == []

    in_world(check)


def test_what_expires_while_the_server_is_away_expires_soon_after():
    """Time does not stand still for a stopped server."""

    async def check(world):
        await world.bus.ensure_stream(StreamConfig(
            name="C", subjects=["control.>"], allow_msg_ttl=True, subject_delete_marker_ttl=60_000_000_000))
        await world.bus.publish("control.s", b"", {"Nats-TTL": "60s"})
        world.broker.stop()
        await asyncio.sleep(90)
        assert not world.broker.stored("C")[0].header("Nats-Marker-Reason")
        world.broker.start()
        await asyncio.sleep(QUIET_S)
        assert [it.header("Nats-Marker-Reason") for it in world.broker.stored("C")] == ["MaxAge"]

    in_world(check)


# -- chance and determinism --------------------------------------------------------------------------------------------

async def _race(world):
    order: list[str] = []

    async def racer(bus, name):
        for number in range(5):
            await bus.publish(f"journal.{name}", b"")
            order.append(f"{name}{number}")

    await asyncio.gather(racer(world.bus, "a"), racer(world.other, "b"))
    return order, [message.subject for message in world.broker.stored("S")]


def test_one_seed_gives_one_history():
    """Delays come from the seed alone; other seeds give other interleavings."""
    histories = [in_world(_race, seed=seed) for seed in (3, 3, 4, 5, 6)]

    assert histories[0] == histories[1]
    assert any(history != histories[0] for history in histories[2:])


def test_every_call_gives_others_a_turn():
    """A check and an act on it with a port call between them are seen to be interleaved: planted races show."""

    async def check(world):
        held: list[str] = []

        async def take_slot(name):
            if not held:
                await world.bus.stream_info("S")
                held.append(name)

        await asyncio.gather(take_slot("a"), take_slot("b"))
        return len(held)

    assert in_world(check) == 2


def test_expiry_is_late_by_chance_and_never_early():
    """Between 0 and 0.25 s over the seeds, as measured."""

    async def check(world):
        await world.bus.ensure_stream(StreamConfig(
            name="C", subjects=["control.>"], allow_msg_ttl=True, subject_delete_marker_ttl=1_000_000_000))
        await world.bus.publish("control.s", b"", {"Nats-TTL": "1s"})
        stored = world.broker.stored("C")[0]
        while (message := (world.broker.stored("C") or [stored])[0]).sequence == stored.sequence:
            await asyncio.sleep(0.001)
        return message.time_ms - stored.time_ms - 1_000

    late_ms = [in_world(check, seed=seed) for seed in SEEDS]
    assert 0 <= min(late_ms) < 50
    assert 200 < max(late_ms) <= 251


def test_the_broker_runs_on_an_ordinary_loop_too():
    """For examples and tests in real time."""

    async def main():
        world = await World().with_stream()
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        feed = await world.other.open_feed(
            FeedSpec(stream="S", filters=(JOURNAL,)), lambda batch: got.set_result(batch[0].data))
        feed.want(1)
        await world.bus.publish(JOURNAL, b"real")
        return await asyncio.wait_for(got, 10)

    assert asyncio.run(main()) == b"real"


# -- small parts -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("pattern", "subject", "expected"), [
    ("a.b", "a.b", True), ("a.b", "a.c", False), ("a.*", "a.b", True), ("a.*", "a.b.c", False), ("a.*", "a", False),
    ("a.>", "a.b.c", True), ("a.>", "a", False), (">", "a.b", True), ("*.b", "a.b", True), ("a+b.$c", "a+b.$c", True),
])
def test_patterns_match_as_in_nats(pattern, subject, expected):
    """`*` is one token, `>` one or more at the end, everything else itself."""
    assert matcher(pattern)(subject) is expected


@pytest.mark.parametrize(("one", "other", "expected"), [
    ("a.*", "a.b", True), ("a.*", "*.b", True), ("a.>", "a.b.c", True), ("a.b", "a.b.c", False), ("a.>", "b.>", False),
    ("a", "a", True), ("a.*.c", "a.b.d", False),
])
def test_patterns_overlap_where_a_subject_matches_both(one, other, expected):
    """In both directions."""
    assert overlap(one, other) is overlap(other, one) is expected


@pytest.mark.parametrize(("text", "seconds"), [
    ("1s", 1), ("10", 10), ("1500ms", 1), ("1h0m0s", 3600), ("1m0s", 60), ("90s", 90)])
def test_ttl_texts_are_read_as_the_server_does(text, seconds):
    """And written as Go writes durations."""
    assert parse_ttl_s(text) == seconds
    assert parse_ttl_s(format_ttl(seconds)) == seconds


def test_a_duplicate_arrives_once_more_later():
    """Execute twice: the second finds what the first has done, and nobody hears of it."""

    async def check(world):
        world.broker.fail_next(JOURNAL, DUPLICATE, delay_s=2.0)
        ack = await world.bus.publish(JOURNAL, b"1", {EXPECTED: "0"})
        await asyncio.sleep(3)
        await world.bus.publish(JOURNAL, b"2", {EXPECTED: str(ack.sequence)})

        assert world.stored == [b"1", b"2"]
        assert world.broker.counts["refused 10071 S"] == 1

    in_world(check)
