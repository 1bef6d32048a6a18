"""What the Bus port promises of reading and managing streams, held by every implementation.

See `test_bus_conformance.py`.
"""

from __future__ import annotations

import pytest

from toque._subjects import EXPECTED_LAST_HEADER
from toque.storage.ports import BusError, BusTimeout, StreamConfig


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
        assert (await stage.refused(stage.bus.message_at(stage.name, 0))).code == 10003


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


def test_one_message_is_deleted_by_its_sequence(each_bus):
    """Whether it was there is told, of one that went before, of a purged one and of one that never was; only it goes."""

    @each_bus
    async def check(stage):
        await stage.stream()
        for token in "abcde":
            await stage.publish("queue", token)
        await stage.bus.purge(stage.name, stage.subject("queue", "a"), 2)

        assert await stage.bus.delete_message(stage.name, 3)
        for gone in (3, 1, 99):
            assert not await stage.other.delete_message(stage.name, gone)

        info = await stage.bus.stream_info(stage.name, subjects_filter=">")
        assert (info.messages, info.first_sequence, info.last_sequence) == (3, 2, 5)
        assert sorted(info.subjects) == [stage.subject("queue", token) for token in "bde"]
        assert await stage.bus.message_at(stage.name, 3) is None


def test_deleting_the_last_message_gives_its_sequence_to_nobody(each_bus):
    """Who kept the sequence of what was deleted never finds another message there."""

    @each_bus
    async def check(stage):
        await stage.stream()
        last = await stage.publish("queue", "a")

        assert await stage.bus.delete_message(stage.name, last)

        assert await stage.publish("queue", "a") == last + 1


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
            bus.delete_message(name, 1), bus.delete_stream(name),
            bus.update_stream(StreamConfig(name=name, subjects=[name])), stage.feed()]

        refusals = [await stage.refused(attempt) for attempt in attempts]

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

        refusal = await stage.refused(stage.stream(name=f"{stage.name}-2", subjects=[stage.subject("a", "*")]))

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

        assert (await stage.refused(stage.publish("d"))).full
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
        assert await stage.publish("a", headers={EXPECTED_LAST_HEADER: "1"}) == 2
