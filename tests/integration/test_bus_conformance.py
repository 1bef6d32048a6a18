"""What the Bus port promises of publishing, expiry, batches and stream management, held by every implementation.

Each test runs on the in-memory bus (`-k memory`: virtual time, several seeds) and on a real server (`-k nats`). Where the
two disagree the real server is right. Feeds and core messages are in `test_bus_conformance_delivery.py`.
"""

from __future__ import annotations

import pytest

from toque._subjects import (
    BATCH_COMMIT_HEADER,
    BATCH_ID_HEADER,
    BATCH_SEQUENCE_HEADER,
    EXPECTED_LAST_HEADER,
    FIRST_GENERATION,
    MARKER_HEADER,
    TTL_HEADER,
    StationId,
    create,
    parse_queue,
    queue,
    queue_transform,
    station_number,
)
from toque.errors import PayloadTooLarge
from toque.storage.ports import BATCH_MESSAGES_MAX, BusError, BusTimeout, NoResponders, StreamConfig

STATIONS = 8
S = 1_000_000_000  # of a stream's configuration: nanoseconds
LATE_MS_MAX = 1_000  # the server says 250; a busy machine is slower
EXPIRING = {"max_msgs_per_subject": 1, "allow_msg_ttl": True, "subject_delete_marker_ttl": 60 * S}


def expect(sequence: int, **more: str) -> dict[str, str]:
    return {EXPECTED_LAST_HEADER: str(sequence), **more}


def ttl(text: str) -> dict[str, str]:
    return {TTL_HEADER: text}


def queue_settings(stage, *, generation=FIRST_GENERATION, **more):
    """A queue stream as in the product, under an account named after the test."""
    return {
        "subjects": [create(stage.name, "census", "*")], "max_msgs_per_subject": 1, "discard": "new",
        "discard_new_per_subject": True, "allow_atomic": True,
        "subject_transform": queue_transform(stage.name, "census", generation, STATIONS), **more}


def creation(stage, instance_id):
    return create(stage.name, "census", instance_id)


async def refused(attempt) -> BusError:
    """The refusal of something that must be refused."""
    with pytest.raises(BusError) as caught:
        await attempt
    return caught.value


# -- compare and append ------------------------------------------------------------------------------------------------

def test_an_append_at_the_last_sequence_is_accepted(each_bus):
    """Compare-and-append looks at the subject's last sequence, not at the stream's."""

    @each_bus
    async def check(stage):
        name = await stage.stream()
        first = await stage.publish("journal", "1", headers=expect(0))
        await stage.publish("journal", "2")

        ack = await stage.bus.publish(stage.subject("journal", "1"), b"next", expect(first))

        assert (ack.stream, ack.sequence) == (name, first + 2)


def test_a_stale_append_stores_nothing(each_bus):
    """It is refused with 10071 and the sequence that stands, and the tail is what it was."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await stage.publish("journal", data=b"old")
        tail = await stage.publish("journal", data=b"tail")

        refusal = await refused(stage.publish("journal", data=b"stale", headers=expect(tail - 1)))

        assert (refusal.code, refusal.description) == (BusError.WRONG_LAST_SEQUENCE, f"wrong last sequence: {tail}")
        message = await stage.bus.last_message(stage.name, stage.subject("journal"))
        assert (message.data, message.sequence) == (b"tail", tail)
        assert (await stage.bus.stream_info(stage.name)).last_sequence == tail


def test_expecting_nothing_is_refused_once_something_is_there(each_bus):
    """Of two who expect an empty subject one wins, whichever connection they use."""

    @each_bus
    async def check(stage):
        await stage.stream()
        subject = stage.subject("journal")
        await stage.bus.publish(subject, b"claim", expect(0))

        refusal = await refused(stage.other.publish(subject, b"claim too", expect(0)))

        assert refusal.code == BusError.WRONG_LAST_SEQUENCE


def test_a_purged_subject_expects_nothing_again(each_bus):
    """Why trimming never removes a station's last message: after that, expecting 0 is accepted from anyone."""

    @each_bus
    async def check(stage):
        await stage.stream()
        tail = await stage.publish("journal")
        await stage.bus.purge(stage.name, stage.subject("journal"), tail + 1)

        refusal = await refused(stage.publish("journal", headers=expect(tail)))

        assert refusal.description == "wrong last sequence: 0"
        assert await stage.publish("journal", headers=expect(0)) == tail + 1


def test_a_subject_without_a_stream_is_refused_at_once(each_bus):
    """NoResponders: nothing was stored, and nobody waits for the time-out."""

    @each_bus
    async def check(stage):
        with pytest.raises(NoResponders):
            await stage.bus.publish(stage.subject("nowhere"), b"")


# -- creations ---------------------------------------------------------------------------------------------------------

def test_a_creation_lands_at_its_ids_station(each_bus):
    """The server's partition() is `station_number`, and the stored subject is the queue's."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage))

        for instance_id in ("a", "order-17", "Z_9", "0" * 100, "01JD8M3V9T6Q2W5X7Y1Z0KABCD"):
            ack = await stage.bus.publish(creation(stage, instance_id), b"{}")
            stored = await stage.bus.message_at(stage.name, ack.sequence)
            station = StationId(FIRST_GENERATION, station_number(instance_id, STATIONS))
            assert stored.subject == queue(stage.name, "census", station, instance_id)
            assert parse_queue(stored.subject) == ("census", station, instance_id)


def test_a_second_creation_of_an_id_is_a_duplicate(each_bus):
    """Refused on the transformed subject, and told apart from a full queue by the description only."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage, max_msgs=2))
        await stage.bus.publish(creation(stage, "a"), b"first")

        duplicate = await refused(stage.other.publish(creation(stage, "a"), b"second"))
        await stage.bus.publish(creation(stage, "b"), b"")
        full = await refused(stage.bus.publish(creation(stage, "c"), b""))
        both = await refused(stage.bus.publish(creation(stage, "a"), b""))

        assert duplicate.duplicate and not duplicate.full
        assert (duplicate.code, duplicate.description) == (10077, "maximum messages per subject exceeded")
        assert full.full and not full.duplicate
        assert (full.code, full.description) == (10077, "maximum messages exceeded")
        assert both.duplicate


def test_a_purged_creation_makes_room_for_its_id(each_bus):
    """Behind the owner's committed position an id and its place in the queue are free again."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage, max_msgs=1))
        ack = await stage.bus.publish(creation(stage, "a"), b"")

        assert await stage.bus.purge(stage.name, f"toque.{stage.name}.queue.census.1.>", ack.sequence + 1) == 1

        assert (await stage.bus.publish(creation(stage, "a"), b"")).sequence == ack.sequence + 1


def test_only_the_creation_form_enters_the_queue(each_bus):
    """Nobody can publish into a generation's subjects, and an id with a dot is no id."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage))

        for subject in (queue(stage.name, "census", StationId(1, 0), "a"), creation(stage, "a.b")):
            with pytest.raises(NoResponders):
                await stage.bus.publish(subject, b"")
        assert (await stage.bus.stream_info(stage.name)).messages == 0


def test_a_new_generation_takes_new_creations_only(each_bus):
    """Updating the transform moves no message; the same id can be stored in both generations (protocol rule 13)."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage))
        before = await stage.bus.publish(creation(stage, "a"), b"")
        settings = queue_settings(stage, generation=2)
        await stage.bus.update_stream(StreamConfig(name=stage.name, **settings))

        after = await stage.bus.publish(creation(stage, "a"), b"")

        stored = [await stage.bus.message_at(stage.name, ack.sequence) for ack in (before, after)]
        assert [parse_queue(message.subject).station.generation for message in stored] == [1, 2]


def test_the_size_limit_counts_headers(each_bus):
    """`max_msg_size` is for the header block as it is on the wire and the body together."""

    @each_bus
    async def check(stage):
        await stage.stream(max_msg_size=100)
        headers = {"A": "b"}
        room = 100 - len("NATS/1.0\r\nA: b\r\n\r\n")

        await stage.publish("fits", data=b"x" * 100)
        await stage.publish("fits", data=b"x" * room, headers=headers)
        for data, headers in ((b"x" * 101, None), (b"x" * (room + 1), headers)):
            refusal = await refused(stage.publish("large", data=data, headers=headers))
            assert (refusal.code, refusal.description) == (10054, "message size exceeds maximum allowed")


def test_refusals_have_an_order(each_bus):
    """Size before sequence before duplicate: what a caller is told when several things are wrong."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage, max_msg_size=100))
        ack = await stage.bus.publish(creation(stage, "a"), b"")

        async def code(data, headers):
            return (await refused(stage.bus.publish(creation(stage, "a"), data, headers))).code

        assert await code(b"x" * 101, expect(ack.sequence + 7)) == 10054
        assert await code(b"x", expect(ack.sequence + 7)) == BusError.WRONG_LAST_SEQUENCE
        assert await code(b"x", expect(ack.sequence)) == BusError.MAXIMUM_MESSAGES


def test_more_than_max_payload_is_refused_before_it_is_sent(each_bus):
    """PayloadTooLarge with the figures; the connection lives on."""

    @each_bus
    async def check(stage):
        await stage.stream()
        limit = stage.bus.max_payload
        assert limit == 8 * 1024 * 1024

        with pytest.raises(PayloadTooLarge) as caught:
            await stage.publish("large", data=bytes(limit + 1))

        assert (caught.value.size, caught.value.limit) == (limit + 1, limit)
        assert await stage.publish("small") == 1


# -- expiry ------------------------------------------------------------------------------------------------------------

async def marker_of(stage, subject, *, after):
    """The expiry marker that follows a message."""

    async def marker():
        message = await stage.bus.last_message(stage.name, subject)
        return message if message.sequence > after else None

    return await stage.eventually(marker)


def test_an_expired_key_leaves_a_marker(each_bus):
    """Never early, at most a little late, under the next sequence, with no body and the server's reason."""

    @each_bus
    async def check(stage):
        await stage.stream(**EXPIRING)
        sequence = await stage.publish("session", data=b"alive", headers=ttl("1s"))
        stored = await stage.bus.message_at(stage.name, sequence)

        marker = await marker_of(stage, stage.subject("session"), after=sequence)

        assert 1_000 <= marker.time_ms - stored.time_ms <= 1_000 + LATE_MS_MAX
        assert (marker.sequence, marker.subject, marker.data) == (sequence + 1, stored.subject, b"")
        assert marker.header(MARKER_HEADER) == "MaxAge"
        assert marker.header(TTL_HEADER) == "1m0s"
        assert await stage.bus.message_at(stage.name, sequence) is None


def test_a_marker_is_what_the_next_writer_must_expect(each_bus):
    """The old session's renewal is refused after expiry; a compare-and-set over the marker is how it is ended."""

    @each_bus
    async def check(stage):
        await stage.stream(**EXPIRING)
        sequence = await stage.publish("session", headers=ttl("1s"))
        marker = await marker_of(stage, stage.subject("session"), after=sequence)

        renewal = await refused(stage.publish("session", headers=expect(sequence, **ttl("1s"))))
        fresh = await refused(stage.publish("session", headers=expect(0, **ttl("1s"))))
        ended = await stage.publish("session", data=b"ended", headers=expect(marker.sequence))

        assert renewal.description == fresh.description == f"wrong last sequence: {marker.sequence}"
        assert (await stage.bus.last_message(stage.name, stage.subject("session"))).sequence == ended


def test_a_renewal_restarts_the_ttl(each_bus):
    """One compare-and-set message is renewal, fence and new expiry at once."""

    @each_bus
    async def check(stage):
        await stage.stream(**EXPIRING)
        first = await stage.publish("session", headers=ttl("1s"))
        begun = await stage.bus.message_at(stage.name, first)
        await stage.broker_time_reaches(begun.time_ms + 600)
        renewed = await stage.publish("session", headers=expect(first, **ttl("1s")))
        stored = await stage.bus.message_at(stage.name, renewed)

        await stage.broker_time_reaches(begun.time_ms + 1_000 + 300)
        still = await stage.bus.last_message(stage.name, stage.subject("session"))
        marker = await marker_of(stage, stage.subject("session"), after=renewed)

        assert still.sequence == renewed
        assert 1_000 <= marker.time_ms - stored.time_ms <= 1_000 + LATE_MS_MAX


def test_a_newer_message_without_a_ttl_stays_for_good(each_bus):
    """Ending a session by an ordinary message leaves no expiry behind."""

    @each_bus
    async def check(stage):
        await stage.stream(**EXPIRING)
        first = await stage.publish("session", headers=ttl("1s"))
        begun = await stage.bus.message_at(stage.name, first)
        ended = await stage.publish("session", data=b"ended", headers=expect(first))

        await stage.broker_time_reaches(begun.time_ms + 1_000 + 300)

        assert (await stage.bus.last_message(stage.name, stage.subject("session"))).sequence == ended


def test_a_marker_expires_without_a_trace(each_bus):
    """After the marker's own time the key is as if it had never been."""

    @each_bus
    async def check(stage):
        await stage.stream(**(EXPIRING | {"subject_delete_marker_ttl": S}))
        await stage.publish("session", headers=ttl("1s"))

        async def gone():
            info = await stage.bus.stream_info(stage.name)
            return info if info.messages == 0 else None

        info = await stage.eventually(gone)
        assert info.last_sequence == 2
        assert await stage.publish("session", headers=expect(0)) == 3


def test_without_markers_an_expired_message_just_goes(each_bus):
    """A stream that keeps no markers only loses the message."""

    @each_bus
    async def check(stage):
        await stage.stream(allow_msg_ttl=True)
        await stage.publish("key", headers=ttl("1s"))

        async def gone():
            return (await stage.bus.stream_info(stage.name)).messages == 0

        await stage.eventually(gone)
        assert (await stage.bus.stream_info(stage.name)).last_sequence == 1


def test_the_server_cuts_a_ttl_to_whole_seconds(each_bus):
    """1500ms lives for one second: whoever sends a TTL must send whole seconds."""

    @each_bus
    async def check(stage):
        await stage.stream(**EXPIRING)
        sequence = await stage.publish("session", headers=ttl("1500ms"))
        stored = await stage.bus.message_at(stage.name, sequence)

        marker = await marker_of(stage, stage.subject("session"), after=sequence)

        assert 1_000 <= marker.time_ms - stored.time_ms < 1_500


def test_a_ttl_below_a_second_or_where_none_is_allowed_is_refused(each_bus):
    """With codes of their own; nothing is stored."""

    @each_bus
    async def check(stage):
        await stage.stream(**EXPIRING)
        await stage.stream(name=f"{stage.name}-plain", subjects=[f"plain.{stage.name}"])

        short = [await refused(stage.publish("key", headers=ttl(text))) for text in ("500ms", "0", "soon")]
        disabled = await refused(stage.bus.publish(f"plain.{stage.name}", b"", ttl("5s")))

        assert [(it.code, it.description) for it in short] == [(10165, "invalid per-message TTL")] * 3
        assert (disabled.code, disabled.description) == (10166, "per-message TTL is disabled")
        assert (await stage.bus.stream_info(stage.name)).last_sequence == 0


# -- atomic batches ----------------------------------------------------------------------------------------------------

def creations(stage, *ids):
    return [(creation(stage, instance_id), instance_id.encode(), None) for instance_id in ids]


def test_a_batch_is_stored_whole_and_in_order(each_bus):
    """The answer carries the last sequence; the others stand right before it."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage))
        await stage.bus.publish(creation(stage, "before"), b"")

        ack = await stage.bus.publish_batch(creations(stage, "a", "b", "c"))

        assert ack.sequence == 4
        stored = [await stage.bus.message_at(stage.name, sequence) for sequence in (2, 3, 4)]
        assert [message.data for message in stored] == [b"a", b"b", b"c"]


def test_a_batch_of_one_and_of_the_most_are_stored(each_bus):
    """Both ends of what a batch may hold."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage))

        await stage.bus.publish_batch(creations(stage, "one"))
        ack = await stage.bus.publish_batch(creations(stage, *map(str, range(BATCH_MESSAGES_MAX))))

        assert ack.sequence == (await stage.bus.stream_info(stage.name)).messages == BATCH_MESSAGES_MAX + 1


def test_one_refused_message_refuses_its_whole_batch(each_bus):
    """A duplicate of something stored or of another message of the batch: nothing of it is there afterwards."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage))
        await stage.bus.publish(creation(stage, "known"), b"")

        known = await refused(stage.bus.publish_batch(creations(stage, "a", "known", "b")))
        twice = await refused(stage.bus.publish_batch(creations(stage, "a", "b", "a")))

        assert known.duplicate and twice.duplicate
        assert (await stage.bus.stream_info(stage.name)).last_sequence == 1


def test_a_batch_beyond_the_queue_limit_is_refused_as_full(each_bus):
    """Also one of duplicates only: in a batch the stream's limit is looked at first, and they count as more."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage, max_msgs=2))
        await stage.bus.publish(creation(stage, "a"), b"")

        over = await refused(stage.bus.publish_batch(creations(stage, "b", "c")))
        await stage.bus.publish(creation(stage, "b"), b"")
        duplicates = await refused(stage.bus.publish_batch(creations(stage, "a")))

        assert over.full and duplicates.full
        assert (await stage.bus.stream_info(stage.name)).messages == 2


def test_a_stale_expectation_refuses_the_batch(each_bus):
    """And a subject that the batch has written already cannot be expected at all (10164)."""

    @each_bus
    async def check(stage):
        await stage.stream(allow_atomic=True)
        tail = await stage.publish("journal")
        journal, other = stage.subject("journal"), stage.subject("other")

        stale = await refused(stage.bus.publish_batch([(other, b"", None), (journal, b"", expect(tail - 1))]))
        twice = await refused(stage.bus.publish_batch([(journal, b"", expect(tail)), (journal, b"", expect(tail + 1))]))

        assert stale.description == f"wrong last sequence: {tail}"
        assert (twice.code, twice.description) == (BusError.IN_FLIGHT, "wrong last sequence")
        assert (await stage.bus.stream_info(stage.name)).messages == 1


def test_a_batch_with_a_gap_is_refused(each_bus):
    """A staged message that was lost on the way cannot be left out by the commit."""

    @each_bus
    async def check(stage):
        await stage.stream(allow_atomic=True)

        def place(number, **more):
            return {BATCH_ID_HEADER: stage.name, BATCH_SEQUENCE_HEADER: str(number), **more}

        stage.bus.emit(stage.subject("a"), b"", place(1))
        refusal = await refused(stage.publish("c", headers=place(3, **{BATCH_COMMIT_HEADER: "1"})))

        assert (refusal.code, refusal.description) == (10176, "atomic publish batch is incomplete")
        assert (await stage.bus.stream_info(stage.name)).messages == 0


def test_an_oversized_message_refuses_its_batch(each_bus):
    """Wherever it stands in the batch."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage, max_msg_size=300))
        large = (creation(stage, "large"), b"x" * 301, None)

        middle = await refused(stage.bus.publish_batch([*creations(stage, "a"), large, *creations(stage, "b")]))
        last = await refused(stage.bus.publish_batch([*creations(stage, "a"), large]))

        assert (middle.code, last.code) == (10176, 10054)
        assert (await stage.bus.stream_info(stage.name)).messages == 0


def test_a_stream_takes_batches_only_when_it_says_so(each_bus):
    """Without `allow_atomic` the commit is refused."""

    @each_bus
    async def check(stage):
        await stage.stream()

        refusal = await refused(stage.bus.publish_batch([(stage.subject("a"), b"", None)]))

        assert (refusal.code, refusal.description) == (10174, "atomic publish is disabled")


# -- reading and managing streams --------------------------------------------------------------------------------------

def test_the_last_message_of_a_filter_is_the_newest_of_its_subjects(each_bus):
    """Read from the leader with everything that was stored: subject, body, headers, sequence and time."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await stage.publish("journal", "1", data=b"1")
        await stage.publish("journal", "2", data=b"2", headers={"Toque-Group": "1 s 1 00"})
        await stage.publish("other", data=b"3")
        info = await stage.bus.stream_info(stage.name)

        newest = await stage.other.last_message(stage.name, stage.subject("journal", "*"))
        exact = await stage.other.last_message(stage.name, stage.subject("journal", "1"))

        assert (newest.subject, newest.data, newest.sequence) == (stage.subject("journal", "2"), b"2", 2)
        assert newest.header("Toque-Group") == "1 s 1 00"
        assert abs(info.server_time_ms - newest.time_ms) < 10_000
        assert exact.sequence == 1
        assert await stage.bus.last_message(stage.name, stage.subject("journal", "3")) is None
        assert await stage.bus.last_message(stage.name, stage.subject("none", ">")) is None


def test_a_message_is_found_by_its_sequence(each_bus):
    """None when there is none, or not any more; sequence 0 is a bad request."""

    @each_bus
    async def check(stage):
        await stage.stream()
        gone, there = await stage.publish("a", data=b"gone"), await stage.publish("b", data=b"there")
        await stage.bus.purge(stage.name, stage.subject("a"), there)

        assert (await stage.bus.message_at(stage.name, there)).data == b"there"
        assert await stage.bus.message_at(stage.name, gone) is None
        assert await stage.bus.message_at(stage.name, there + 1) is None
        assert (await refused(stage.bus.message_at(stage.name, 0))).code == 10003


def test_a_purge_takes_the_filters_messages_below_a_sequence(each_bus):
    """Nothing at or above it, nothing of other subjects, nothing at all below 1; sequences go on."""

    @each_bus
    async def check(stage):
        await stage.stream()
        for token in ("a", "b", "a", "b", "a"):
            await stage.publish("queue", token)

        assert await stage.bus.purge(stage.name, stage.subject("queue", "a"), 0) == 0
        assert await stage.bus.purge(stage.name, stage.subject("queue", "a"), 1) == 0
        assert await stage.bus.purge(stage.name, stage.subject("queue", "a"), 5) == 2
        assert await stage.bus.purge(stage.name, stage.subject("queue", "a"), 5) == 0
        info = await stage.bus.stream_info(stage.name)
        assert (info.messages, info.first_sequence, info.last_sequence) == (3, 2, 5)
        assert await stage.bus.purge(stage.name, stage.subject("queue", ">"), 6) == 3
        info = await stage.bus.stream_info(stage.name)
        assert (info.messages, info.first_sequence, info.last_sequence) == (0, 6, 5)
        assert await stage.publish("queue", "a") == 6


def test_stream_info_shows_state_configuration_and_server_time(each_bus):
    """With the message counts of the subjects that were asked for."""

    @each_bus
    async def check(stage):
        await stage.stream(max_msgs=77, discard="new", metadata={"toque.role": "test"})
        for token in ("a", "a", "b", "c.d"):
            await stage.publish("queue", token)

        plain = await stage.bus.stream_info(stage.name)
        counted = await stage.bus.stream_info(stage.name, subjects_filter=stage.subject("queue", "*"))
        none = await stage.bus.stream_info(stage.name, subjects_filter=stage.subject("none"))

        assert (plain.messages, plain.first_sequence, plain.last_sequence) == (4, 1, 4)
        assert (plain.config["max_msgs"], plain.config["discard"], plain.config["num_replicas"]) == (77, "new", 1)
        assert plain.config["metadata"]["toque.role"] == "test"
        assert counted.subjects == {stage.subject("queue", "a"): 2, stage.subject("queue", "b"): 1}
        assert plain.subjects == none.subjects == {}
        assert plain.server_time_ms <= counted.server_time_ms


def test_an_empty_stream_begins_at_nothing(each_bus):
    """Both sequences are 0 until the first message."""

    @each_bus
    async def check(stage):
        await stage.stream()

        info = await stage.bus.stream_info(stage.name)

        assert (info.messages, info.first_sequence, info.last_sequence) == (0, 0, 0)


def test_an_unknown_stream_is_refused(each_bus):
    """By everything that names one, with the server's code."""

    @each_bus
    async def check(stage):
        bus, name = stage.bus, stage.name
        attempts = [
            bus.stream_info(name), bus.last_message(name, ">"), bus.message_at(name, 1), bus.purge(name, ">", 10),
            bus.delete_stream(name), bus.update_stream(StreamConfig(name=name, subjects=[name])), stage.feed()]

        refusals = [await refused(attempt) for attempt in attempts]

        assert [it.code for it in refusals] == [BusError.STREAM_NOT_FOUND] * len(attempts)


def test_a_stream_that_exists_is_kept_as_it_is(each_bus):
    """`ensure_stream` never changes or refuses one of the name, whatever its configuration."""

    @each_bus
    async def check(stage):
        await stage.stream(max_msgs=5)
        await stage.publish("a")

        await stage.stream(max_msgs=5)
        await stage.stream(max_msgs=9, discard="new")

        info = await stage.bus.stream_info(stage.name)
        assert (info.messages, info.config["max_msgs"], info.config["discard"]) == (1, 5, "old")


def test_two_streams_never_share_a_subject(each_bus):
    """The second one is refused."""

    @each_bus
    async def check(stage):
        await stage.stream()

        refusal = await refused(stage.stream(name=f"{stage.name}-2", subjects=[stage.subject("a", "*")]))

        assert (refusal.code, refusal.description) == (10065, "subjects overlap with an existing stream")


def test_an_update_changes_the_limits_and_keeps_the_messages(each_bus):
    """Also a limit below what is there, with discard new: then it is full until messages leave."""

    @each_bus
    async def check(stage):
        await stage.stream(max_msgs=2, discard="new")
        await stage.publish("a")
        await stage.publish("b")

        def config(max_msgs):
            return StreamConfig(name=stage.name, subjects=[stage.subject(">")], max_msgs=max_msgs, discard="new")

        await stage.bus.update_stream(config(3))
        await stage.publish("c")
        await stage.bus.update_stream(config(1))

        assert (await refused(stage.publish("d"))).full
        info = await stage.bus.stream_info(stage.name)
        assert (info.messages, info.config["max_msgs"]) == (3, 1)


def test_a_stream_that_discards_old_messages_keeps_the_newest(each_bus):
    """Per subject and in all."""

    @each_bus
    async def check(stage):
        await stage.stream(max_msgs_per_subject=1, max_msgs=2)
        for token in ("a", "b", "a", "c"):
            await stage.publish(token, data=token.encode())

        info = await stage.bus.stream_info(stage.name, subjects_filter=">")

        assert info.subjects == {stage.subject("a"): 1, stage.subject("c"): 1}
        assert (info.first_sequence, info.last_sequence) == (3, 4)


def test_streams_are_listed_by_prefix(each_bus):
    """Only those whose names begin with it, also on another connection."""

    @each_bus
    async def check(stage):
        names = [f"{stage.name}+{role}" for role in ("control", "journal", "queue+census")]
        for name in names:
            await stage.stream(name=name, subjects=[f"{name}.>"])

        assert sorted(await stage.other.list_streams(f"{stage.name}+")) == names
        assert await stage.bus.list_streams(f"{stage.name}+queue+") == names[2:]
        assert await stage.bus.list_streams(f"{stage.name}+none") == []


def test_a_stream_made_again_is_another_one(each_bus):
    """Its `created` tells; its messages and sequences are gone."""

    @each_bus
    async def check(stage):
        await stage.stream()
        await stage.publish("a")
        before = await stage.bus.stream_info(stage.name)
        await stage.bus.delete_stream(stage.name)
        await stage.stream()

        after = await stage.bus.stream_info(stage.name)

        assert before.created and after.created and before.created != after.created
        assert (after.messages, after.last_sequence) == (0, 0)


def test_what_is_stored_outlives_the_server(each_bus_alone):
    """Acknowledged messages, sequences and identity survive a kill; without a connection calls fail with BusTimeout."""

    @each_bus_alone
    async def check(stage):
        await stage.stream()
        await stage.publish("a", data=b"kept")
        before = await stage.bus.stream_info(stage.name)

        await stage.stop_server()
        with pytest.raises(BusTimeout):
            await stage.bus.publish(stage.subject("a"), b"lost", timeout_s=1)
        with pytest.raises(BusTimeout):
            await stage.bus.stream_info(stage.name)
        await stage.start_server()

        after = await stage.bus.stream_info(stage.name)
        assert (after.created, after.messages) == (before.created, 1)
        assert (await stage.other.last_message(stage.name, stage.subject("a"))).data == b"kept"
        assert await stage.publish("a", headers=expect(1)) == 2
