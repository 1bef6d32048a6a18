"""What the Bus port promises of feeds and core messages, held by every implementation.

See `test_bus_conformance.py`.
"""

from __future__ import annotations

import asyncio
import json

import pytest

from toque._subjects import EXPECTED_LAST_HEADER, SIZE_HEADER
from toque.errors import PayloadTooLarge
from toque.storage.ports import BusError, BusTimeout, NoResponders


async def publish_all(stage, *tokens):
    for number, token in enumerate(tokens, 1):
        await stage.publish("queue", token, data=str(number).encode())


async def arrived(stage, collected, count):
    """Wait for so many messages, and make sure that no more come."""
    await stage.eventually(lambda: len(collected.messages) >= count)
    await stage.quiet()
    assert len(collected.messages) == count


# -- feeds -------------------------------------------------------------------------------------------------------------

def test_a_feed_delivers_in_stream_order(each_bus):
    """With stored subject, body, headers, sequence and time, what was there before and what comes after."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await publish_all(stage, "a", "b")
        feed, collected = await stage.feed()

        feed.want(10)
        await stage.publish("queue", "c", data=b"3", headers={"Toque-Nonce": "n"})
        await arrived(stage, collected, 3)

        last = await stage.bus.message_at(stage.name, 3)
        assert collected.bodies == [b"1", b"2", b"3"]
        assert collected.sequences == [1, 2, 3]
        assert [message.subject.rpartition(".")[2] for message in collected.messages] == ["a", "b", "c"]
        assert collected.messages[2].header("Toque-Nonce") == "n"
        assert collected.messages[2].time_ms == last.time_ms


def test_a_feed_of_headers_leaves_the_bodies_out(each_bus):
    """Each message tells how large its body is, one without headers too."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await stage.publish("queue", "a", data=b"12345", headers={"Toque-Nonce": "n"})
        await stage.publish("queue", "b")
        feed, collected = await stage.feed(headers_only=True)

        feed.want(10)
        await arrived(stage, collected, 2)

        assert collected.bodies == [b"", b""]
        assert [message.header(SIZE_HEADER) for message in collected.messages] == ["5", "0"]
        assert collected.messages[0].header("Toque-Nonce") == "n"
        assert (await stage.bus.message_at(stage.name, 1)).data == b"12345"


def test_a_feed_delivers_only_what_is_wanted(each_bus):
    """Nothing before the first `want`, then exactly as many as were asked for, however they were asked for."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await publish_all(stage, *"abcdefghij")
        feed, collected = await stage.feed()

        await arrived(stage, collected, 0)
        feed.want(3)
        await arrived(stage, collected, 3)
        for _ in range(4):
            feed.want(1)
        await arrived(stage, collected, 7)
        feed.want(100)
        await arrived(stage, collected, 10)

        assert collected.sequences == list(range(1, 11))


def test_unused_credit_waits_for_messages(each_bus):
    """What was wanted and not there is delivered as soon as it is stored."""

    @each_bus
    async def check(stage):
        await stage.stream()
        feed, collected = await stage.feed()
        feed.want(2)
        await arrived(stage, collected, 0)

        await publish_all(stage, "a", "b", "c")

        await arrived(stage, collected, 2)
        assert collected.sequences == [1, 2]


def test_a_large_backlog_comes_whole_and_in_order(each_bus):
    """More than any single pull or batch."""

    @each_bus
    async def check(stage):
        await stage.stream(allow_atomic=True)
        for begin in range(0, 5_000, 1_000):
            await stage.bus.publish_batch(
                [(stage.subject("queue", str(n)), b"", None) for n in range(begin, begin + 1_000)])
        feed, collected = await stage.feed()

        feed.want(4_500)

        await arrived(stage, collected, 4_500)
        assert collected.sequences == list(range(1, 4_501))


def test_a_feed_reads_all_its_filters_and_nothing_else(each_bus):
    """Several filters are merged in stream order."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await publish_all(stage, "a", "b", "c", "b", "a")
        feed, collected = await stage.feed(filters=(stage.subject("queue", "a"), stage.subject("queue", "c")))

        feed.want(10)

        await arrived(stage, collected, 3)
        assert collected.sequences == [1, 3, 5]


def test_a_feed_begins_where_it_is_told(each_bus):
    """At the first matching message at or behind `start_sequence`, even one that does not exist yet."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await publish_all(stage, "a", "b", "a", "b")
        middle, from_middle = await stage.feed(start_sequence=2, filters=(stage.subject("queue", "a"),))
        future, from_future = await stage.feed(start_sequence=6)

        middle.want(10)
        future.want(10)
        await publish_all(stage, "b", "b")

        await arrived(stage, from_middle, 1)
        await arrived(stage, from_future, 1)
        assert (from_middle.sequences, from_future.sequences) == ([3], [6])


def test_a_feed_may_begin_with_the_newest_of_each_subject(each_bus):
    """Older ones are left out; what comes later is all delivered."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await publish_all(stage, "a", "b", "a", "c")
        feed, collected = await stage.feed(last_per_subject=True)

        feed.want(10)
        await arrived(stage, collected, 3)
        await publish_all(stage, "a", "a")

        await arrived(stage, collected, 5)
        assert collected.sequences == [2, 3, 4, 5, 6]


def test_a_feed_passes_over_what_was_purged(each_bus):
    """A purge in front of the reader, or behind it, does not disturb it."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await publish_all(stage, "a", "b", "c", "d")
        feed, collected = await stage.feed()
        feed.want(1)
        await arrived(stage, collected, 1)

        await stage.bus.purge(stage.name, stage.subject("queue", "*"), 4)
        feed.want(10)
        await publish_all(stage, "e")

        await arrived(stage, collected, 3)
        assert collected.sequences == [1, 4, 5]


def test_a_marker_is_delivered_like_a_message(each_bus):
    """Who watches sessions hears of their expiry from the feed."""

    @each_bus
    async def check(stage):
        await stage.stream(max_msgs_per_subject=1, allow_msg_ttl=True, subject_delete_marker_ttl=60_000_000_000)
        feed, collected = await stage.feed(last_per_subject=True)
        feed.want(10)

        await stage.publish("session", data=b"alive", headers={"Nats-TTL": "1s"})

        await arrived(stage, collected, 2)
        assert [message.header("Nats-Marker-Reason") for message in collected.messages] == ["", "MaxAge"]


def test_feeds_know_nothing_of_each_other(each_bus):
    """Every feed gets everything, also two of one connection."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await publish_all(stage, "a", "b")
        one, of_one = await stage.feed(name="reader")
        two, of_two = await stage.feed(name="reader")

        one.want(10)
        await arrived(stage, of_one, 2)
        two.want(1)

        await arrived(stage, of_two, 1)
        assert (of_one.sequences, of_two.sequences) == ([1, 2], [1])


def test_a_closed_feed_delivers_nothing_more(each_bus):
    """Once `close` has returned, whatever was wanted."""

    @each_bus
    async def check(stage):
        await stage.stream()
        feed, collected = await stage.feed()
        feed.want(10)
        await publish_all(stage, "a")
        await arrived(stage, collected, 1)

        await feed.close()
        await publish_all(stage, "b")

        await arrived(stage, collected, 1)


def test_what_is_wanted_right_before_the_close_is_not_delivered(each_bus):
    """A message that comes behind the close would be taken for one of the next feed."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await publish_all(stage, "a", "b")
        feed, collected = await stage.feed()

        feed.want(10)
        await feed.close()

        await arrived(stage, collected, 0)


def test_a_feed_goes_on_after_the_server_was_gone(each_bus_alone):
    """Behind the last message delivered, with the credit that was left: nothing is skipped."""

    @each_bus_alone
    async def check(stage):
        await stage.stream()
        await publish_all(stage, "a", "b", "c")
        feed, collected = await stage.feed()
        feed.want(2)
        await arrived(stage, collected, 2)

        feed.want(1_000)
        await stage.stop_server()
        await stage.start_server()
        await publish_all(stage, "d", "e")

        await stage.eventually(lambda: set(collected.sequences) == {1, 2, 3, 4, 5})


def test_a_feed_begins_again_when_its_stream_is_another_one(each_bus):
    """No cursor outlives its stream (protocol rule 11): a stream made anew is read from its start."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await publish_all(stage, "a", "b", "c")
        feed, collected = await stage.feed()
        feed.want(1_000)
        await arrived(stage, collected, 3)

        await stage.bus.delete_stream(stage.name)
        await stage.stream()
        await publish_all(stage, *"defgh")

        await arrived(stage, collected, 8)
        assert collected.sequences == [1, 2, 3, 1, 2, 3, 4, 5]


# -- core messages -----------------------------------------------------------------------------------------------------

def test_a_request_is_answered(each_bus):
    """By whoever subscribed, on another connection or on the same one."""

    @each_bus
    async def check(stage):
        def answer(message):
            stage.bus.respond(message, b"pong to " + message.data + message.header("Toque-Nonce").encode())

        await stage.bus.subscribe(stage.subject("station", "*"), answer)

        far = await stage.other.request(stage.subject("station", "1"), b"ping ", {"Toque-Nonce": "n"})
        near = await stage.bus.request(stage.subject("station", "2"), b"ping")

        assert (far.data, near.data) == (b"pong to ping n", b"pong to ping")
        assert far.sequence == far.time_ms == 0


def test_a_request_that_nobody_hears_fails_at_once(each_bus):
    """NoResponders, also after the only subscriber has left."""

    @each_bus
    async def check(stage):
        subscription = await stage.bus.subscribe(stage.subject("a"), lambda message: None)
        await subscription.close()
        await stage.quiet()

        for subject in (stage.subject("a"), stage.subject("b")):
            with pytest.raises(NoResponders):
                await stage.other.request(subject, b"")


def test_a_request_that_is_heard_and_not_answered_times_out(each_bus):
    """BusTimeout; a publish to a subject with a listener and no stream ends the same way."""

    @each_bus
    async def check(stage):
        collected = stage.collected()
        await stage.bus.subscribe(stage.subject("a"), collected.on_message)

        with pytest.raises(BusTimeout):
            await stage.other.request(stage.subject("a"), b"1", timeout_s=0.2)
        with pytest.raises(BusTimeout):
            await stage.other.publish(stage.subject("a"), b"2", timeout_s=0.2)

        assert collected.bodies == [b"1", b"2"]
        assert all(message.reply for message in collected.messages)


def test_the_first_of_several_answers_counts(each_bus):
    """The others are dropped, and never taken for an answer to a later question."""

    @each_bus
    async def check(stage):
        for bus in (stage.bus, stage.other):
            await bus.subscribe(stage.subject("a"), lambda message, bus=bus: bus.respond(message, message.data))

        answers = [(await stage.bus.request(stage.subject("a"), question)).data for question in (b"1", b"2", b"3")]

        assert answers == [b"1", b"2", b"3"]


def test_core_messages_arrive_in_the_order_they_were_sent(each_bus):
    """From one connection to one subscription; only those whose subject matches."""

    @each_bus
    async def check(stage):
        tail, single = stage.collected(), stage.collected()
        await stage.other.subscribe(stage.subject("pods", ">"), tail.on_message)
        await stage.other.subscribe(stage.subject("pods", "*"), single.on_message)

        for number in range(50):
            stage.bus.emit(stage.subject("pods", "report"), str(number).encode())
        stage.bus.emit(stage.subject("pods", "a", "b"), b"deep")
        stage.bus.emit(stage.subject("pods"), b"none")

        await arrived(stage, tail, 51)
        await arrived(stage, single, 50)
        assert tail.bodies == [*(str(number).encode() for number in range(50)), b"deep"]
        assert not any(message.reply for message in tail.messages)


def test_answers_go_where_the_sender_said(each_bus):
    """One emitted question with a reply subject collects an answer from everybody."""

    @each_bus
    async def check(stage):
        answers = stage.collected()
        await stage.bus.subscribe(stage.subject("inbox"), answers.on_message)
        for bus, text in ((stage.bus, b"one"), (stage.other, b"two")):
            await bus.subscribe(stage.subject("pods"), lambda message, bus=bus, text=text: bus.respond(message, text))

        stage.bus.emit(stage.subject("pods"), b"report", reply=stage.subject("inbox"))

        await arrived(stage, answers, 2)
        assert sorted(answers.bodies) == [b"one", b"two"]


def test_a_plain_request_is_a_valid_creation(each_bus):
    """Any client may send it: the answer is JetStream's acknowledgement, or its refusal, as JSON."""

    @each_bus
    async def check(stage):
        await stage.stream(max_msgs_per_subject=1, discard="new", discard_new_per_subject=True)

        stored = json.loads((await stage.bus.request(stage.subject("create"), b"{}")).data)
        again = json.loads((await stage.bus.request(stage.subject("create"), b"{}")).data)

        assert (stored["stream"], stored["seq"]) == (stage.name, 1)
        assert (again["error"]["err_code"], again["error"]["description"]) == (
            BusError.MAXIMUM_MESSAGES, "maximum messages per subject exceeded")


def test_an_emitted_message_is_stored_too(each_bus):
    """A stream takes what is sent without asking for an answer; a refusal of it is heard by nobody."""

    @each_bus
    async def check(stage):
        await stage.stream()
        stage.bus.emit(stage.subject("a"), b"stored")
        stage.bus.emit(stage.subject("a"), b"stale", {EXPECTED_LAST_HEADER: "7"})

        assert await stage.publish("b") == 2
        assert (await stage.bus.last_message(stage.name, stage.subject("a"))).data == b"stored"


def test_a_closed_subscription_hears_nothing_more(each_bus):
    """Others of the same subject go on."""

    @each_bus
    async def check(stage):
        left, right = stage.collected(), stage.collected()
        subscription = await stage.bus.subscribe(stage.subject("a"), left.on_message)
        await stage.bus.subscribe(stage.subject("a"), right.on_message)
        await subscription.close()

        stage.other.emit(stage.subject("a"), b"1")

        await arrived(stage, right, 1)
        assert left.messages == []


def test_an_oversized_message_is_never_sent(each_bus):
    """`emit` and `request` refuse it as `publish` does, and the connection lives on."""

    @each_bus
    async def check(stage):
        large = bytes(stage.bus.max_payload + 1)

        with pytest.raises(PayloadTooLarge):
            stage.bus.emit(stage.subject("a"), large)
        with pytest.raises(PayloadTooLarge):
            await stage.bus.request(stage.subject("a"), large)

        assert await stage.bus.list_streams(stage.name) == []


def test_subscriptions_outlive_the_server(each_bus_alone):
    """Requests fail with BusTimeout while it is gone, emitted messages are dropped, and afterwards all is as before."""

    @each_bus_alone
    async def check(stage):
        heard = stage.collected()
        await stage.bus.subscribe(stage.subject("a"), heard.on_message)
        await stage.bus.subscribe(stage.subject("b"), lambda message: stage.bus.respond(message, b"yes"))

        await stage.stop_server()
        stage.other.emit(stage.subject("a"), b"dropped")
        with pytest.raises(BusTimeout):
            await stage.other.request(stage.subject("b"), b"", timeout_s=1)
        await stage.start_server()

        async def answered():
            try:
                return (await stage.other.request(stage.subject("b"), b"")).data
            except NoResponders:  # it subscribes again a moment after the connection is back
                return None

        assert await stage.eventually(answered) == b"yes"
        stage.other.emit(stage.subject("a"), b"heard")
        await arrived(stage, heard, 1)
        assert heard.bodies == [b"heard"]


def test_an_open_question_ends_when_the_connection_does(each_bus_alone):
    """With BusTimeout long before its time-out: whoever asked can find out and go on."""

    @each_bus_alone
    async def check(stage):
        heard = stage.collected()
        await stage.other.subscribe(stage.subject("a"), heard.on_message)
        question = asyncio.ensure_future(stage.bus.request(stage.subject("a"), b"", timeout_s=1_000))
        await arrived(stage, heard, 1)

        await stage.stop_server()

        with pytest.raises(BusTimeout):
            async with asyncio.timeout(20):
                await question


def test_a_closed_bus_takes_and_hears_nothing(each_bus):
    """Its calls end with BusTimeout; what it had emitted before is sent, and its subscriptions are gone for others."""

    @each_bus
    async def check(stage):
        heard = stage.collected()
        await stage.bus.subscribe(stage.subject("farewell"), heard.on_message)
        await stage.other.subscribe(stage.subject("x"), lambda message: None)
        stage.other.emit(stage.subject("farewell"), b"gone")
        await stage.other.close()

        for attempt in (stage.other.publish(stage.subject("a"), b""), stage.other.stream_info(stage.name)):
            with pytest.raises(BusTimeout):
                await attempt
        await stage.eventually(lambda: heard.bodies == [b"gone"])

        async def nobody_listens():
            try:
                await stage.bus.request(stage.subject("x"), b"", timeout_s=0.5)
            except BusTimeout:  # the server has not noticed yet that the connection was closed
                return False
            except NoResponders:
                return True

        await stage.eventually(nobody_listens)
