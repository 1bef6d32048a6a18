"""Promises about parked messages: lists are whole, a retry loses and doubles nothing, and what cannot go stays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from stand_in_owner import Place, new_place

from toque import _subjects, sim
from toque._dead import PAGE_MESSAGES, DeadCount, DeadResult, _each, _page_of
from toque._subjects import CUT_HEADER, ORIGIN_HEADER, REASON_HEADER, StationId, station_number, stored_event
from toque.client import Client
from toque.errors import (
    BrokerUnavailable,
    InstanceEnded,
    InstanceExists,
    InstanceNotFound,
    InvalidName,
    NotParked,
    OwnerAway,
    PayloadTooLarge,
    QueueFull,
    SetupError,
    UnknownWorkflow,
    UsageError,
)
from toque.storage.memory_bus import MemoryBus
from toque.storage.ports import Message

DEAD = "toque+main+dead"
EVENTS = "toque+main+events"
CREATE = "toque.main.create.census.>"
DELETE = "$JS.API.STREAM.MSG.DELETE.toque+main+dead"
AFTER = "execute then lose the answer"


def play(story: Callable[[Place], Awaitable[None]], *, queue_limit: int = 2_000_000, seed: int = 1) -> None:
    async def main() -> None:
        await story(await new_place(seed=seed, queue_limit=queue_limit))

    sim.run(main(), seed=seed)


async def park(place: Place, instance_id: str, *, workflow: str = "census", kind: str = "create", body: bytes = b"7",
               reason: str = "for a test", origin: str = "", **headers: str) -> int:
    """As a station's owner does. Returns the sequence."""
    station = StationId(1, station_number(instance_id, 8))
    subject = origin or _subjects.queue("main", workflow, station, instance_id)
    sender = {name.replace("_", "-"): text for name, text in headers.items()}
    ack = await place.owner.bus.publish(_subjects.dead("main", kind, workflow), body,
                                        {**sender, REASON_HEADER: reason, ORIGIN_HEADER: subject})
    return ack.sequence


async def park_event(place: Place, instance_id: str, **headers: str) -> int:
    origin = stored_event("main", StationId(1, station_number(instance_id, 8)), "census", instance_id, "paid")
    return await park(place, instance_id, kind="event", origin=origin, **headers)


def parked(place: Place) -> list[int]:
    return [message.sequence for message in place.broker.stored(DEAD)]


# -- looking -----------------------------------------------------------------------------------------------------------

def test_a_list_tells_what_where_from_why_and_when():
    """Everything but the body, as typed values."""

    async def story(place: Place) -> None:
        await park(place, "a$b", body=b"12345", reason="the id has no legal form")
        await park_event(place, "order-1")

        first, second = [message async for message in place.client.dead.list()]

        assert (first.sequence, first.kind, first.workflow, first.id) == (1, "create", "census", "a$b")
        assert (first.reason, first.size) == ("the id has no legal form", 5)
        assert first.subject == f"toque.main.queue.census.1.{station_number('a$b', 8)}.a$b"
        assert int(first.parked_at.timestamp() * 1000) == place.broker.stored(DEAD)[0].time_ms
        assert (second.kind, second.id, second.obstacle) == ("event", "order-1", "")

    play(story)


@pytest.mark.parametrize("seed", range(5))
def test_every_page_is_in_the_list_once(seed):
    """More messages than a page holds, with holes, with others among them, and with a connection that is lost meanwhile."""

    async def story(place: Place) -> None:
        bus = MemoryBus(place.broker)
        client = Client(bus)
        for number in range(PAGE_MESSAGES + 300):
            await park(place, f"i{number}", workflow="report" if number % 5 == 0 else "census")
        for gone in (2, 17, PAGE_MESSAGES):
            await client.dead.drop(gone)
        wanted = [message.sequence for message in place.broker.stored(DEAD) if message.subject.endswith("census")]

        loop = asyncio.get_running_loop()
        loop.call_later(0.01 * (1 + seed), bus.disconnect)
        loop.call_later(0.01 * (1 + seed) + 0.001, bus.reconnect)

        try:
            found = [message.sequence async for message in client.dead.list(workflow="census")]
        except BrokerUnavailable:  # it hit a request under way: said so, instead of a list that is cut short
            await asyncio.sleep(0.01)  # until it is connected again
            found = [message.sequence async for message in client.dead.list(workflow="census")]

        assert found == wanted

    play(story, seed=seed)


@pytest.mark.parametrize(("arrived", "whole", "sequences", "position"), [
    ([3, 4, 3, 4, 6], False, [3, 4, 6], 6), ([3, 9, 10], True, [3, 9], 9), ([3, 11], False, [3], 9), ([], True, [], 9)],
    ids=["twice", "later", "far", "none"])
def test_a_page_has_each_message_once_and_none_from_behind_its_end(arrived, whole, sequences, position):
    """A feed may bring some again after a loss, and what was parked meanwhile."""
    page = _page_of([Message("toque.main.dead.create.census", b"", sequence=number) for number in arrived], 2, 9,
                    whole=whole)

    assert ([message.sequence for message in page.messages], page.position) == (sequences, position)


def test_a_list_is_narrowed():
    """By kind, workflow, a part of the reason, a sequence to begin behind, and a number."""

    async def story(place: Place) -> None:
        for number in range(6):
            await park(place, f"i{number}", reason=f"reason {number % 2}", workflow="census" if number < 4 else "report")
        await park_event(place, "order-1")

        async def listed(**arguments: object) -> list[int]:
            return [message.sequence async for message in place.client.dead.list(**arguments)]  # type: ignore[arg-type]  # by name

        assert await listed(kind="event") == [7]
        assert await listed(workflow="report") == [5, 6]
        assert await listed(kind="create", workflow="census", reason_contains="n 1") == [2, 4]
        assert await listed(after=4) == [5, 6, 7]
        assert await listed(limit=2, after=1) == [2, 3]
        assert await listed(limit=1, reason_contains="reason 1") == [2]
        assert await listed(after=7) == await listed(workflow="nothing") == []

    play(story)


def test_a_list_ends_though_messages_are_parked_again_meanwhile():
    """What is parked after the list began is not in it: a retry of all comes to an end."""

    async def story(place: Place) -> None:
        for number in range(3):
            await park(place, f"i{number}")

        found = []
        async for message in place.client.dead.list():
            found.append(message.sequence)
            await park(place, f"again{message.sequence}")

        assert found == [1, 2, 3]

    play(story)


@pytest.mark.parametrize(("arguments", "said"), [
    ({"kind": "step"}, "create, event"), ({"workflow": "a.b"}, "workflow"), ({"limit": 0}, "1 or more")])
def test_illegal_filters_are_refused(arguments, said):
    """The error names what there is instead."""

    async def story(place: Place) -> None:
        with pytest.raises(UsageError, match=said):
            [message async for message in place.client.dead.list(**arguments)]

    play(story)


def test_an_account_that_is_not_there_is_said_so():
    """By every call, not as an error of the stream."""

    async def story(place: Place) -> None:
        dead = Client(MemoryBus(place.broker), account="nobody").dead
        for call in (dead.get(1), dead.retry(1), dead.drop(1), dead.count()):
            with pytest.raises(SetupError, match="nobody"):
                await call

    play(story)


def test_a_server_that_does_not_answer_is_not_an_empty_list():
    """The time-out of a page is an error."""

    async def story(place: Place) -> None:
        await park(place, "one")
        place.broker.fail_next("$JS.API.CONSUMER.CREATE.*", "drop before")

        with pytest.raises(BrokerUnavailable, match="2 s"):
            [message async for message in place.client.dead.list(timeout="2 seconds")]

    play(story)


def test_one_message_is_shown_with_body_and_headers():
    """The sender's headers alone: the reason and the subject are fields of their own."""

    async def story(place: Place) -> None:
        await park(place, "one", body=b"{}", Content_Type="application/json", Trace="7")

        content = await place.client.dead.get(1)

        assert (content.body, content.size, content.id) == (b"{}", 2, "one")
        assert content.headers == {"Content-Type": "application/json", "Trace": "7"}
        with pytest.raises(NotParked, match="no message 2 "):
            await place.client.dead.get(2)
        with pytest.raises(UsageError):
            await place.client.dead.get(0)

    play(story)


def test_messages_are_counted_by_what_is_wrong():
    """Per kind, workflow and reason, the most first."""

    async def story(place: Place) -> None:
        for number in range(5):
            await park(place, f"i{number}", reason=f"reason {number % 2}")
        await park_event(place, "order-1")

        assert await place.client.dead.count() == [
            DeadCount("create", "census", "reason 0", 3), DeadCount("create", "census", "reason 1", 2),
            DeadCount("event", "census", "for a test", 1)]
        assert len(await place.client.dead.count(kind="event")) == 1

    play(story)


def test_many_different_reasons_are_counted_together():
    """A reason that names a figure of each message cannot fill the memory."""

    async def story(place: Place) -> None:
        for number in range(1005):
            await park(place, f"i{number}", reason=f"{number} bytes")

        counts = await place.client.dead.count()

        assert counts[0] == DeadCount("create", "census", "(other reasons)", 5)
        assert sum(count.messages for count in counts) == 1005

    play(story)


# -- retrying a creation -----------------------------------------------------------------------------------------------

def test_a_retried_creation_is_stored_as_it_came():
    """Body, headers and nonce are the sender's; then it is not parked any more."""

    async def story(place: Place) -> None:
        sequence = await park(place, "one", Content_Type="application/msgpack", Toque_Nonce="n1", Trace="7")

        await place.client.dead.retry(sequence)

        [message] = place.stored()
        assert (message.subject.rpartition(".")[2], message.data) == ("one", b"7")
        assert message.headers == {"Content-Type": "application/msgpack", "Toque-Nonce": "n1", "Trace": "7"}
        assert parked(place) == []

    play(story)


def test_a_retry_that_is_killed_before_it_drops_is_harmless():
    """Accepted and still parked: the next retry finds its own creation, whether that is queued or runs already."""

    async def story(place: Place) -> None:
        for instance, nonce in (("with", "n1"), ("without", "")):
            sequence = await park(place, instance, **({"Toque_Nonce": nonce} if nonce else {}))
            place.broker.fail_next(DELETE, "drop before", times=2)
            with pytest.raises(BrokerUnavailable):
                await place.client.dead.retry(sequence, timeout="2 seconds")
            with pytest.raises(BrokerUnavailable):
                await place.client.dead.retry(sequence, timeout="2 seconds")
            queued = place.stored()[-1]
            place.owner.put("census", instance, "running", nonce=queued.header("Toque-Nonce"))
            place.purge()

            await place.client.dead.retry(sequence)

            assert parked(place) == []

    play(story)


def test_two_retries_of_one_message_at_once_are_one_creation():
    """Both succeed, by whoever drops it."""

    async def story(place: Place) -> None:
        sequence = await park(place, "one")

        await asyncio.gather(*(Client(MemoryBus(place.broker)).dead.retry(sequence) for _ in range(3)))

        assert place.stored_ids() == ["one"]
        assert parked(place) == []

    play(story)


def test_a_retry_with_a_lost_ack_is_settled():
    """Sent again with the same nonce, which is its own creation."""

    async def story(place: Place) -> None:
        sequence = await park(place, "one")
        place.broker.fail_next(CREATE, AFTER)

        await place.client.dead.retry(sequence, timeout="20 seconds")

        assert place.stored_ids() == ["one"]
        assert parked(place) == []

    play(story)


@pytest.mark.parametrize(("prepare", "error"), [
    (lambda place: place.owner.put("census", "one", "complete", nonce="theirs", ended_at=1), InstanceExists),
    (lambda place: setattr(place.owner, "muted", True), OwnerAway),
    (lambda place: place.broker.freeze_stream("toque+main+queue+census"), BrokerUnavailable),
], ids=["exists", "owner-away", "write-dead"])
def test_a_creation_that_is_not_surely_accepted_stays_parked(prepare, error):
    """With an error that says what is known."""

    async def story(place: Place) -> None:
        sequence = await park(place, "one", Toque_Nonce="n1")
        prepare(place)

        with pytest.raises(error):
            await place.client.dead.retry(sequence, timeout="3 seconds")

        assert parked(place) == [sequence]

    play(story)


def test_a_full_queue_leaves_it_parked():
    """QueueFull at once, to try again later."""

    async def story(place: Place) -> None:
        for number in range(2):
            await place.client.create("census", id=f"i{number}")
        sequence = await park(place, "one")

        with pytest.raises(QueueFull):
            await place.client.dead.retry(sequence)

        assert parked(place) == [sequence]

    play(story, queue_limit=1)


def test_a_workflow_that_nobody_serves_leaves_it_parked():
    """UnknownWorkflow names it."""

    async def story(place: Place) -> None:
        sequence = await park(place, "one", workflow="report")

        with pytest.raises(UnknownWorkflow, match="report"):
            await place.client.dead.retry(sequence)

        assert parked(place) == [sequence]

    play(story)


@pytest.mark.parametrize(("parking", "error", "said"), [
    ({"instance_id": "a$b"}, InvalidName, "position 1"),
    ({"instance_id": "*", "origin": "toque.main.create.census.*"}, InvalidName, "'*'"),
    ({"instance_id": "one", "body": b"x" * (1024 * 1024 + 1)}, PayloadTooLarge, "1048577 bytes"),
    ({"instance_id": "one", CUT_HEADER.replace("-", "_"): "the body was cut to 5 of 9 bytes"}, UsageError, "5 of 9 bytes"),
    ({"instance_id": "one", "origin": "elsewhere"}, UsageError, "neither a creation's nor an event's"),
], ids=["id", "wildcard", "large", "cut", "origin"])
def test_what_can_never_be_accepted_is_not_sent(parking, error, said):
    """It stays parked, and the list says so beforehand."""

    async def story(place: Place) -> None:
        sequence = await park(place, **parking)

        [shown] = [message async for message in place.client.dead.list()]
        with pytest.raises(error) as caught:
            await place.client.dead.retry(sequence)

        assert said in str(caught.value)
        assert shown.obstacle == str(caught.value)
        assert (await place.client.dead.get(sequence)).obstacle == shown.obstacle
        assert place.stored() == [] and parked(place) == [sequence]

    play(story)


# -- retrying an event -------------------------------------------------------------------------------------------------

def test_a_retried_event_is_published_as_it_came():
    """Under the subject that senders use, with its own headers."""

    async def story(place: Place) -> None:
        place.owner.put("census", "order-1", "waiting")
        sequence = await park_event(place, "order-1", Toque_Request="e1")

        await place.client.dead.retry(sequence)

        [event] = place.broker.stored(EVENTS)
        assert event.subject == stored_event("main", StationId(1, station_number("order-1", 8)), "census", "order-1", "paid")
        assert (event.data, event.headers) == (b"7", {"Toque-Request": "e1"})
        assert parked(place) == []

    play(story)


@pytest.mark.parametrize(("status", "error"), [("", InstanceNotFound), ("complete", InstanceEnded),
                                               ("waiting", UnknownWorkflow)])
def test_an_event_that_nobody_can_get_stays_parked(status, error):
    """Of an instance that is not there, or has ended, or where no stream takes events: nothing is sent."""

    async def story(place: Place) -> None:
        if status == "waiting":
            await place.owner.bus.delete_stream(EVENTS)
        if status:
            place.owner.put("census", "order-1", status, ended_at=int(status == "complete"))
        sequence = await park_event(place, "order-1")

        with pytest.raises(error):
            await place.client.dead.retry(sequence)

        assert parked(place) == [sequence]
        assert status == "waiting" or place.broker.stored(EVENTS) == []

    play(story)


# -- dropping, and many ------------------------------------------------------------------------------------------------

def test_dropping_deletes_one_message_and_is_idempotent():
    """Whether it was there is told; no other message is touched."""

    async def story(place: Place) -> None:
        for number in range(3):
            await park(place, f"i{number}")

        assert [await place.client.dead.drop(2), await place.client.dead.drop(2)] == [True, False]
        assert parked(place) == [1, 3]
        with pytest.raises(NotParked):
            await place.client.dead.retry(2)
        with pytest.raises(UsageError):
            await place.client.dead.drop(0)

    play(story)


def test_results_of_many_are_in_order_and_each_true_for_itself():
    """One that fails does not hold the others back; one that is named twice is one."""

    async def story(place: Place) -> None:
        for instance in ("one", "a$b", "two"):
            await park(place, instance)

        results = await place.client.dead.retry_many([3, 2, 1, 99, 3])

        assert [result.sequence for result in results] == [3, 2, 1, 99, 3]
        assert [type(result.error) for result in results] == [type(None), InvalidName, type(None), NotParked, type(None)]
        assert sorted(place.stored_ids()) == ["one", "two"]
        assert await place.client.dead.drop_many([2, 3]) == [DeadResult(2), DeadResult(3)]
        assert parked(place) == []

    play(story)


def test_a_message_that_is_named_twice_is_acted_on_once():
    """Else the second retry of it might find nothing, and its error stand for the success of the first."""

    async def story(place: Place) -> None:
        acted: list[int] = []

        async def act(sequence: int) -> None:
            acted.append(sequence)

        assert await _each([3, 1, 3, 3], act) == [DeadResult(3), DeadResult(1), DeadResult(3), DeadResult(3)]
        assert acted == [3, 1]

    play(story)
