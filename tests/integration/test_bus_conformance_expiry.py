"""What the Bus port promises of messages with a time to live, held by every implementation.

See `test_bus_conformance.py`.
"""

from __future__ import annotations

from toque._subjects import EXPECTED_LAST_HEADER, MARKER_HEADER, TTL_HEADER

S = 1_000_000_000  # of a stream's configuration: nanoseconds
LATE_MS_MAX = 1_000  # the server says 250; a busy machine is slower
EXPIRING = {"max_msgs_per_subject": 1, "allow_msg_ttl": True, "subject_delete_marker_ttl": 60 * S}


def expect(sequence: int, **more: str) -> dict[str, str]:
    return {EXPECTED_LAST_HEADER: str(sequence), **more}


def ttl(text: str) -> dict[str, str]:
    return {TTL_HEADER: text}


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

        renewal = await stage.refused(stage.publish("session", headers=expect(sequence, **ttl("1s"))))
        fresh = await stage.refused(stage.publish("session", headers=expect(0, **ttl("1s"))))
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


def test_only_a_subjects_last_message_leaves_a_marker(each_bus):
    """While the subject has another message, an expired one just goes."""

    @each_bus
    async def check(stage):
        await stage.stream(**(EXPIRING | {"max_msgs_per_subject": -1, "subject_delete_marker_ttl": S}))
        stays = await stage.publish("key", data=b"stays")
        await stage.publish("key", data=b"goes", headers=ttl("1s"))

        async def gone():
            return (await stage.bus.stream_info(stage.name)).messages == 1

        await stage.eventually(gone)
        assert (await stage.bus.last_message(stage.name, stage.subject("key"))).sequence == stays
        assert (await stage.bus.stream_info(stage.name)).last_sequence == stays + 1


def test_a_ttl_is_never_below_the_markers(each_bus):
    """Where a subject keeps several messages, a shorter one is raised: control keys must keep one message each."""

    @each_bus
    async def check(stage):
        await stage.stream(**(EXPIRING | {"max_msgs_per_subject": -1}))
        sequence = await stage.publish("key", headers=ttl("1s"))

        stored = await stage.bus.message_at(stage.name, sequence)

        assert stored.header(TTL_HEADER) == "60"


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

        short = [await stage.refused(stage.publish("key", headers=ttl(text))) for text in ("500ms", "0", "soon")]
        disabled = await stage.refused(stage.bus.publish(f"plain.{stage.name}", b"", ttl("5s")))

        assert [(it.code, it.description) for it in short] == [(10165, "invalid per-message TTL")] * 3
        assert (disabled.code, disabled.description) == (10166, "per-message TTL is disabled")
        assert (await stage.bus.stream_info(stage.name)).last_sequence == 0
