"""What the Bus port promises of publishing, held by every implementation: compare and append, creations, batches.

Each test runs on the in-memory bus (`-k memory`: virtual time, several seeds) and on a real server (`-k nats`). Where
the two disagree the real server is right. The other promises are in `test_bus_conformance_{expiry,streams,delivery}.py`.
"""

from __future__ import annotations

import pytest

from toque._subjects import (
    BATCH_COMMIT_HEADER,
    BATCH_ID_HEADER,
    BATCH_SEQUENCE_HEADER,
    EXPECTED_LAST_HEADER,
    FIRST_GENERATION,
    StationId,
    create,
    event,
    event_transform,
    events_of,
    parse_event,
    parse_queue,
    queue,
    queue_transform,
    station_number,
    stored_event,
)
from toque.errors import PayloadTooLarge
from toque.storage.ports import BATCH_MESSAGES_MAX, BusError, NoResponders, StreamConfig

STATIONS = 8


def expect(sequence: int, **more: str) -> dict[str, str]:
    return {EXPECTED_LAST_HEADER: str(sequence), **more}


def queue_settings(stage, *, generation=FIRST_GENERATION, **more):
    """A queue stream as in the product, under an account named after the test."""
    return {
        "subjects": [create(stage.name, "census", "*")], "max_msgs_per_subject": 1, "discard": "new",
        "discard_new_per_subject": True, "allow_atomic": True,
        "subject_transform": queue_transform(stage.name, "census", generation, STATIONS), **more}


def creation(stage, instance_id):
    return create(stage.name, "census", instance_id)


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

        refusal = await stage.refused(stage.publish("journal", data=b"stale", headers=expect(tail - 1)))

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

        refusal = await stage.refused(stage.other.publish(subject, b"claim too", expect(0)))

        assert refusal.code == BusError.WRONG_LAST_SEQUENCE


def test_a_purged_subject_expects_nothing_again(each_bus):
    """Why trimming never removes a station's last message: after that, expecting 0 is accepted from anyone."""

    @each_bus
    async def check(stage):
        await stage.stream()
        tail = await stage.publish("journal")
        await stage.bus.purge(stage.name, stage.subject("journal"), tail + 1)

        refusal = await stage.refused(stage.publish("journal", headers=expect(tail)))

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


def test_an_event_lands_at_its_instances_station(each_bus):
    """The server's partition() over the second wildcard is `station_number` of the id, whatever the other tokens are."""

    @each_bus
    async def check(stage):
        await stage.stream(subjects=[event(stage.name, "*", "*", "*")], discard="new",
                           subject_transform=event_transform(stage.name, FIRST_GENERATION, STATIONS))

        for instance_id in ("a", "order-17", "Z_9", "0" * 100, "01JD8M3V9T6Q2W5X7Y1Z0KABCD"):
            for workflow, type_ in (("census", "paid"), ("b", "approval-sign_off")):
                ack = await stage.bus.publish(event(stage.name, workflow, instance_id, type_), b"{}")
                stored = await stage.bus.message_at(stage.name, ack.sequence)
                station = StationId(FIRST_GENERATION, station_number(instance_id, STATIONS))
                assert stored.subject == stored_event(stage.name, station, workflow, instance_id, type_)
                assert parse_event(stored.subject) == (station, workflow, instance_id, type_)
        last = await stage.bus.last_message(stage.name, events_of(stage.name, station))
        assert last.sequence == ack.sequence
        assert (await stage.bus.publish(event(stage.name, "*", "a", "paid"), b"")).sequence == ack.sequence + 1
        assert (await stage.bus.message_at(stage.name, ack.sequence + 1)).subject == event(stage.name, "*", "a", "paid")


def test_a_second_creation_of_an_id_is_a_duplicate(each_bus):
    """Refused on the transformed subject, and told apart from a full queue by the description only."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage, max_msgs=2))
        await stage.bus.publish(creation(stage, "a"), b"first")

        duplicate = await stage.refused(stage.other.publish(creation(stage, "a"), b"second"))
        await stage.bus.publish(creation(stage, "b"), b"")
        full = await stage.refused(stage.bus.publish(creation(stage, "c"), b""))
        both = await stage.refused(stage.bus.publish(creation(stage, "a"), b""))

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
        for data, its_headers in ((b"x" * 101, None), (b"x" * (room + 1), headers)):
            refusal = await stage.refused(stage.publish("large", data=data, headers=its_headers))
            assert (refusal.code, refusal.description) == (10054, "message size exceeds maximum allowed")


def test_refusals_have_an_order(each_bus):
    """Size before sequence before duplicate: what a caller is told when several things are wrong."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage, max_msg_size=100))
        ack = await stage.bus.publish(creation(stage, "a"), b"")

        async def code(data, headers):
            return (await stage.refused(stage.bus.publish(creation(stage, "a"), data, headers))).code

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

        known = await stage.refused(stage.bus.publish_batch(creations(stage, "a", "known", "b")))
        twice = await stage.refused(stage.bus.publish_batch(creations(stage, "a", "b", "a")))

        assert known.duplicate and twice.duplicate
        assert (await stage.bus.stream_info(stage.name)).last_sequence == 1


def test_a_batch_beyond_the_queue_limit_is_refused_as_full(each_bus):
    """Also one of duplicates only: in a batch the stream's limit is looked at first, and they count as more."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage, max_msgs=2))
        await stage.bus.publish(creation(stage, "a"), b"")

        over = await stage.refused(stage.bus.publish_batch(creations(stage, "b", "c")))
        await stage.bus.publish(creation(stage, "b"), b"")
        duplicates = await stage.refused(stage.bus.publish_batch(creations(stage, "a")))

        assert over.full and duplicates.full
        assert (await stage.bus.stream_info(stage.name)).messages == 2


def test_a_stale_expectation_refuses_the_batch(each_bus):
    """And a subject that the batch has written already cannot be expected at all (10164)."""

    @each_bus
    async def check(stage):
        await stage.stream(allow_atomic=True)
        tail = await stage.publish("journal")
        journal, other = stage.subject("journal"), stage.subject("other")

        stale = await stage.refused(stage.bus.publish_batch([(other, b"", None), (journal, b"", expect(tail - 1))]))
        twice = await stage.refused(
            stage.bus.publish_batch([(journal, b"", expect(tail)), (journal, b"", expect(tail + 1))]))

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
        refusal = await stage.refused(stage.publish("c", headers=place(3, **{BATCH_COMMIT_HEADER: "1"})))

        assert (refusal.code, refusal.description) == (10176, "atomic publish batch is incomplete")
        assert (await stage.bus.stream_info(stage.name)).messages == 0


def test_an_oversized_message_refuses_its_batch(each_bus):
    """Wherever it stands in the batch."""

    @each_bus
    async def check(stage):
        await stage.stream(**queue_settings(stage, max_msg_size=300))
        large = (creation(stage, "large"), b"x" * 301, None)

        middle = await stage.refused(stage.bus.publish_batch([*creations(stage, "a"), large, *creations(stage, "b")]))
        last = await stage.refused(stage.bus.publish_batch([*creations(stage, "a"), large]))

        assert (middle.code, last.code) == (10176, 10054)
        assert (await stage.bus.stream_info(stage.name)).messages == 0


def test_a_stream_takes_batches_only_when_it_says_so(each_bus):
    """Without `allow_atomic` the commit is refused."""

    @each_bus
    async def check(stage):
        await stage.stream()

        refusal = await stage.refused(stage.bus.publish_batch([(stage.subject("a"), b"", None)]))

        assert (refusal.code, refusal.description) == (10174, "atomic publish is disabled")
