"""Events: acknowledged ones are given out exactly once and in order, whatever is killed (rules 22 and 23; V1, V2)."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from toque import _subjects as subjects
from toque._protocol import Answer, EventRequest, encode
from toque._subjects import StationId
from toque.errors import EventRefused, EventTimeout, InstanceEnded, InstanceNotFound, OwnerAway
from toque.sim.world import World, account, play, steps_workflow
from toque.storage import records as r
from toque.storage.memory_broker import DROP_BEFORE, LOSE_ANSWER
from toque.workflow import Step, Workflow, WorkflowEvent

FIRST = StationId(1, 0)


def collector(count: int, *, timeout: str = "1 hour", name: str = "collect") -> type[Workflow[Any, Any]]:
    """Waits for so many events of type "a", or until one of the waits is over; returns what came."""

    class Collect(Workflow[Any, Any], name=name):
        async def run(self, event: WorkflowEvent[Any], step: Step) -> Any:
            got: list[Any] = []
            for _ in range(count):
                try:
                    got.append(await step.wait_for_event("next", "a", timeout=timeout))
                except EventTimeout:
                    got.append("timed out")
            return got

    return Collect


async def send(world: World, instance_id: str, payload: Any, *, event_id: str, timeout_s: float = 1.0) -> Answer:
    """One attempt of a request, without a client's patience."""
    request = EventRequest("collect", instance_id, request=event_id, type="a",
                           payload=msgspec.Raw(msgspec.msgpack.encode(payload)))
    subject = subjects.station_request("main", world.station_of(instance_id), "event")
    reply = await world.bus().request(subject, encode(request, json=False), timeout_s=timeout_s)
    return msgspec.msgpack.decode(reply.data, type=Answer)


async def waiting(world: World, instance_id: str) -> None:
    """Until it waits for an event, out of memory."""
    client = world.client()
    for _ in range(1000):
        status = await client.handle("collect", instance_id).status()
        if status.status == "waiting" and status.awaits == ("a",):
            return
        await world.passes(0.05)
    raise AssertionError(f"it does not wait: {status}")


def test_an_event_to_a_waiting_instance_is_given_out_and_shown_while_it_is_awaited():
    """The whole way with a client: status tells what it waits for, and the payload comes out."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(1)))
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        await waiting(world, "one")

        await handle.send_event("a", {"amount": 5})

        assert await handle.result(timeout="1 minute") == [{"amount": 5}]
        (step,) = (await handle.describe()).steps
        assert (step.kind, step.status, step.event) == ("event", "complete", "a")
        await world.quiet()

    play(story)


def test_events_to_a_queued_instance_are_kept_and_the_instance_runs_once():
    """Closes: an event for an instance that is still queued is refused, or lost, or the instance is admitted twice: by
    the event and by its message."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, step_s=30), collector(2)))
        await world.all_owned()
        await world.publish("work", "busy")
        await world.until(lambda: world.history.entered("busy"), "the slot is taken")
        handle = await world.client().create("collect", id="one")
        assert (await handle.status()).status == "queued"

        await handle.send_event("a", 1)
        await handle.send_event("a", 2)
        assert (await handle.status()).buffered == 2
        assert len(world.records(r.WaitDone)) == 0, "it runs without a slot"

        assert await handle.result(timeout="2 minutes") == [1, 2]
        assert len(world.records(r.Admitted)) == 2
        await world.quiet()

    play(story, account=account(max_concurrent=1))


def test_an_event_to_an_unknown_or_ended_instance_is_refused():
    """The caller hears which; a repeat of an event that came before the end hears what it heard then."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(1)))
        await world.all_owned()
        client = world.client()
        with pytest.raises(InstanceNotFound):
            await client.handle("collect", "nobody").send_event("a", 1)
        handle = await client.create("collect", id="one")
        await handle.send_event("a", 1, event_id="first")
        assert await handle.result(timeout="1 minute") == [1]
        await handle.send_event("a", 1, event_id="first")
        with pytest.raises(InstanceEnded):
            await handle.send_event("a", 2)

    play(story)


def test_an_instance_takes_so_many_events_and_no_more(monkeypatch: pytest.MonkeyPatch):
    """What is beyond the bound is refused by name; nothing that was acknowledged is dropped for it."""
    monkeypatch.setattr("toque.workers.events.BUFFERED_MAX", 3)

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(1)))
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        for number in range(3):
            await handle.send_event("b", number)
        with pytest.raises(EventRefused, match="events that it has not waited for"):
            await handle.send_event("b", 3)
        assert (await handle.status()).buffered == 3

    play(story)


@pytest.mark.parametrize("loss", [DROP_BEFORE, LOSE_ANSWER])
def test_an_event_whose_journal_append_is_lost_is_kept_once(loss):
    """Closes: the append of the event's group times out, the sender repeats it, and two records of one event are made."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(2)))
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        await waiting(world, "one")
        world.broker.fail_next(subjects.journal("main", world.station_of("one")), loss)
        await handle.send_event("a", 1)
        await handle.send_event("a", 2)

        assert await handle.result(timeout="1 minute") == [1, 2]
        assert len(world.records(r.EventReceived)) == 2

    play(story)


def test_an_event_is_acknowledged_only_when_the_journal_has_it():
    """Closes: the owner answers while the record is pending, dies, and an acknowledged event is gone."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(1)))
        await world.all_owned()
        await world.client().create("collect", id="one")
        await waiting(world, "one")
        world.broker.fail_next(subjects.journal("main", world.station_of("one")), DROP_BEFORE, times=3)
        sending = asyncio.ensure_future(send(world, "one", 1, event_id="e", timeout_s=30.0))
        await world.passes(0.2)
        assert not sending.done()
        assert world.records(r.EventReceived) == []

        assert (await sending).code == "ok"
        assert len(world.records(r.EventReceived)) == 1

    play(story)


@pytest.mark.parametrize("after", [r.EventReceived, r.Woken, r.WaitDone])
def test_a_pod_killed_between_an_event_and_its_match_loses_and_doubles_nothing(after):
    """Closes: the pod dies when the event, the waking or the match is in the journal; the next owner forgets the buffer
    (the wait hangs or times out), or gives the event to the next wait once more (W1, W10)."""

    async def story(world: World) -> None:
        app = world.app(collector(3))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        await waiting(world, "one")
        sending = asyncio.ensure_future(handle.send_event("a", 1, event_id="e1", timeout="1 minute"))
        await world.until(lambda: world.records(after), "it has come so far")
        a.kill()
        await world.start_pod("b", app)
        await sending
        await handle.send_event("a", 1, event_id="e1", timeout="1 minute")
        await handle.send_event("a", 2)
        await handle.send_event("a", 3)

        assert await handle.result(timeout="1 minute") == [1, 2, 3]
        await world.quiet()

    play(story)


def test_an_event_called_instance_is_woken_by_the_next_owner():
    """Closes: the event was acknowledged, the pod died before the instance had a slot again, and nobody ever looks whether
    an event came for what rests: it wakes at its time-out, days later."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, step_s=20), collector(1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        await waiting(world, "one")
        await world.publish("work", "busy")
        await world.until(lambda: world.history.entered("busy"), "the slot is taken")
        await handle.send_event("a", 1)
        await world.passes(1)
        assert world.records(r.Woken) == []
        a.kill()
        await world.start_pod("b", app)

        assert await handle.result(timeout="2 minutes") == [1]

    play(story, account=account(max_concurrent=1))


def test_an_owner_that_was_deposed_acknowledges_no_event():
    """Closes: a stopped pod wakes up past its deadline with an event in its inbox: it answers "ok", and the instance that
    lives elsewhere by now never hears of it."""

    async def story(world: World) -> None:
        app = world.app(collector(2))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        await waiting(world, "one")
        a.pause()
        sending = asyncio.ensure_future(handle.send_event("a", 1, timeout="2 minutes"))
        await world.start_pod("b", app)
        await world.passes(30)
        a.resume()
        await sending
        await handle.send_event("a", 2)

        assert await handle.result(timeout="1 minute") == [1, 2]

    play(story)


def test_events_go_on_while_their_station_moves():
    """Closes: an event reaches a station that is being handed over, and is lost between its owners, or doubled."""

    async def story(world: World) -> None:
        app = world.app(collector(40))
        await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        starting = asyncio.ensure_future(world.start_pod("b", app))
        for number in range(40):
            await handle.send_event("a", number, timeout="1 minute")
            await world.passes(0.2)
        await starting

        assert await handle.result(timeout="1 minute") == list(range(40))

    play(story, account=account(stations=2))


def test_an_event_and_its_time_out_have_one_outcome_whichever_comes_first():
    """Sent around the time-out, before, at and after it: what was acknowledged is given out, to this wait or the next."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(3, timeout="5 seconds")))
        await world.all_owned()
        client = world.client()
        handles = [await client.create("collect", id=f"i{number}") for number in range(40)]
        await world.passes(4.8)
        for number, handle in enumerate(handles):
            await handle.send_event("a", number)
            await world.passes(0.01)
        for number, handle in enumerate(handles):
            got = await handle.result(timeout="1 minute")
            assert got.count(number) == 1, got
            assert got.count("timed out") == 2, got

    play(story)


def test_silence_says_that_the_outcome_is_not_known():
    """And the same event id makes it safe to send it again."""

    async def story(world: World) -> None:
        app = world.app(collector(1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        await waiting(world, "one")
        a.kill()
        with pytest.raises(OwnerAway):
            await handle.send_event("a", 1, event_id="mine", timeout="1 second")
        await world.start_pod("b", app)
        await handle.send_event("a", 1, event_id="mine", timeout="1 minute")

        assert await handle.result(timeout="1 minute") == [1]

    play(story)


def test_a_repeated_event_leaves_nothing_in_memory():
    """Closes: an event's answer is lost with its owner, the next owner reads the instance back for the repeat, records
    nothing, and keeps it in memory for ever: a paused one could not be resumed, terminated or restarted any more."""

    async def story(world: World) -> None:
        app = world.app(collector(2))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        await waiting(world, "one")
        await handle.pause()
        await handle.send_event("a", 1, event_id="mine")
        a.kill()
        await world.start_pod("b", app)
        await handle.send_event("a", 1, event_id="mine", timeout="1 minute")
        await world.quiet()
        await handle.resume()
        await handle.send_event("a", 2)

        assert await handle.result(timeout="1 minute") == [1, 2]

    play(story)


# -- plain publishing: the event stream --------------------------------------------------------------------------------

EVENTS = subjects.event_stream("main")


async def publish(world: World, instance_id: str, payload: Any, *, type_: str = "a", request: str = "",
                  workflow: str = "collect") -> int:
    """As anybody does it; the sequence of the stream's acknowledgement."""
    headers = {subjects.REQUEST_HEADER: request} if request else None
    body = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
    ack = await world.bus().publish(subjects.event("main", workflow, instance_id, type_), body, headers, timeout_s=30.0)
    return ack.sequence


def test_plain_events_reach_their_instances_in_order_and_once():
    """Published while it is queued, waiting and running; a repeat with the same id changes nothing."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(4)))
        await world.all_owned()
        await publish(world, "one", 1, request="first")
        handle = await world.client().create("collect", id="one")
        await publish(world, "one", 1, request="first")
        await publish(world, "one", 2)
        await waiting(world, "one")
        await publish(world, "one", 3)
        await publish(world, "one", 4)

        assert await handle.result(timeout="1 minute") == [1, 2, 3, 4]
        await world.quiet()

    play(story)


def test_the_stream_is_purged_behind_what_all_owners_have_committed():
    """Closes: the stream only grows, and refuses when it is full."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(3)))
        await world.start_pod("b", world.app(collector(3)))
        await world.all_owned()
        handles = [await world.client().create("collect", id=f"i{number}") for number in range(8)]
        for number in range(3):
            for handle in handles:
                await publish(world, handle.id, number)
        for handle in handles:
            assert await handle.result(timeout="1 minute") == [0, 1, 2]
        await world.passes(15)

        assert (await world.bus().stream_info(EVENTS)).messages == 0

    play(story, account=account(stations=4))


@pytest.mark.parametrize(("workflow", "instance_id", "type_", "body", "reason"), [
    ("collect", "nobody", "a", b"1", "no instance"), ("other", "one", "a", b"1", "no instance"),
    ("collect", "done", "a", b"1", "is terminated"), ("collect", "one", "-a", b"1", "type has no legal form"),
    ("collect", "one", "a", b"{", "cannot be decoded"), ("collect", "-x", "a", b"1", "no legal form"),
])
def test_an_event_that_nobody_can_have_is_parked_with_the_reason(workflow, instance_id, type_, body, reason):
    """Closes: it stays at the head of the stream for ever, or vanishes. Others behind it are not held up."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(1)))
        await world.all_owned()
        client = world.client()
        await (await client.create("collect", id="done")).terminate()
        one = await client.create("collect", id="one")
        await publish(world, instance_id, body, type_=type_, workflow=workflow)
        began = world.now
        await publish(world, "one", 5)
        assert await one.result(timeout="1 minute") == [5]
        assert world.now - began < 2
        await world.until(world.parked, "it is parked")

        (message,) = world.parked()
        assert message.subject == subjects.dead("main", "event", workflow)
        assert reason in message.header(subjects.REASON_HEADER)
        assert (world.now - began >= 5) == ("no instance" in reason)
        await world.passes(15)
        assert (await world.bus().stream_info(EVENTS)).messages == 0
        await world.quiet()

    play(story)


def test_an_event_published_before_its_instance_waits_for_the_creation():
    """Closes: an event and its creation race on two streams, and the event is parked though both were acknowledged."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(2)))
        await world.all_owned()
        await publish(world, "one", 1)
        await publish(world, "one", 2)
        await world.passes(4)
        handle = await world.client().create("collect", id="one")

        assert await handle.result(timeout="1 minute") == [1, 2]
        assert world.parked() == []

    play(story)


@pytest.mark.parametrize("after", [r.EventReceived, r.Woken, r.WaitDone])
def test_the_next_owner_reads_the_stream_again_and_drops_what_the_journal_knows(after):
    """Closes: the pod dies between an event's record and its purge; the next owner reads it once more from the stream, and
    the instance gets it twice, or what was not recorded yet is skipped."""

    async def story(world: World) -> None:
        app = world.app(collector(6))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        await waiting(world, "one")
        for number in range(3):
            await publish(world, "one", number)
        await world.until(lambda: world.records(after), "it has come so far")
        a.kill()
        for number in range(3, 6):
            await publish(world, "one", number)
        await world.start_pod("b", app)

        assert await handle.result(timeout="2 minutes") == list(range(6))
        assert len(world.records(r.EventReceived)) == 6
        await world.quiet()

    play(story)


def test_an_event_that_was_acknowledged_before_the_deadline_wins():
    """Closes: the owner is away when the event is published and when the wait's time is over; its successor fires the
    timer before it has read the event stream (rule 23)."""

    async def story(world: World) -> None:
        app = world.app(collector(1, timeout="20 seconds"))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        await waiting(world, "one")
        a.kill()
        await publish(world, "one", "in time")
        await world.passes(30)
        world.broker.fail_next(f"$JS.API.CONSUMER.CREATE.{EVENTS}", DROP_BEFORE, times=2)
        await world.start_pod("b", app)

        assert await handle.result(timeout="2 minutes") == ["in time"]

    play(story)


def test_a_time_out_waits_for_the_stream_when_the_broker_is_slow():
    """Closes: deliveries are late, the timer is not: an event that the stream acknowledged before the deadline is
    delivered after the time-out was recorded."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(1, timeout="5 seconds")))
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        await waiting(world, "one")
        reader = world.owner(world.station_of("one")).pod._event_reader
        assert reader is not None and reader._feed is not None
        held: list[Any] = []
        offer, reader._offer = reader._offer, held.append  # type: ignore[method-assign]  # what comes is held back
        clear, reader._feed.clear_to = reader._feed.clear_to, _nothing_yet  # type: ignore[method-assign]  # and said so
        await world.passes(3)
        await publish(world, "one", "in time")
        await world.passes(10)
        assert world.records(r.WaitTimedOut) == []
        assert held
        reader._offer, reader._feed.clear_to = offer, clear  # type: ignore[method-assign]
        for message in held:
            offer(message)

        assert await handle.result(timeout="1 minute") == ["in time"]

    play(story)


async def _nothing_yet() -> int:
    return 0


def test_a_reader_that_a_station_was_taken_from_says_nothing_about_its_events():
    """Closes: a station is being handed over, what comes for it is passed over by then, and a time-out is recorded because
    the reader has seen everything that others want."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(1, timeout="5 seconds")))
        await world.all_owned()
        await world.client().create("collect", id="one")
        await waiting(world, "one")
        node = world.owner(world.station_of("one"))
        assert node.pod._event_reader is not None
        node.pod._event_reader.remove(world.station_of("one"))
        await publish(world, "one", "in time")
        await world.passes(10)

        assert world.records(r.WaitTimedOut) == []

    play(story)


def test_time_outs_are_decided_when_the_broker_comes_back():
    """Closes: the look at the stream fails once, and the wait hangs for ever."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(collector(1, timeout="5 seconds")))
        await world.all_owned()
        handle = await world.client().create("collect", id="one")
        await waiting(world, "one")
        world.broker.fail_next(f"$JS.API.STREAM.MSG.GET.{EVENTS}", DROP_BEFORE, times=2)

        assert await handle.result(timeout="1 minute") == ["timed out"]
        await world.quiet()

    play(story)


def test_an_event_is_seen_to_again_when_the_broker_did_not_answer_for_its_instance():
    """Closes: the leader read that looks for a queued instance fails, and its event is dropped, or parked as unknown."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, step_s=30), collector(1)))
        await world.all_owned()
        await world.publish("work", "busy")
        await world.until(lambda: world.history.entered("busy"), "the slot is taken")
        handle = await world.client().create("collect", id="one")
        world.broker.fail_next(f"$JS.API.STREAM.MSG.GET.{subjects.queue_stream('main', 'collect')}", DROP_BEFORE, times=2)
        await publish(world, "one", 1)

        assert await handle.result(timeout="2 minutes") == [1]
        assert world.parked() == []

    play(story, account=account(max_concurrent=1))
