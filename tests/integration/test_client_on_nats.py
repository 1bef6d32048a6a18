"""Promises of the client on a real server: what its rules rest on is what nats-server does."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable

import pytest
from stand_in_owner import StandInOwner

from toque import _subjects
from toque._accounts import ensure_account, ensure_queue_stream, queue_capacity, update_account
from toque._protocol import AccountRecord, SessionRecord, encode
from toque.client import Client, NewInstance
from toque.errors import (
    InstanceEnded,
    InstanceExists,
    InstanceNotFound,
    OwnerAway,
    PayloadTooLarge,
    QueueFull,
    UnknownWorkflow,
)
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import NatsOptions


def new_account() -> str:
    """The server is shared: each test has an account of its own."""
    return f"t{uuid.uuid4().hex[:12]}"


async def until(condition: Callable[[], bool]) -> None:
    """Poll a condition; TimeoutError after 10 seconds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


class Place:
    """An account with a queue, a client of it, and an owner on another connection."""

    def __init__(self, url: str, *, queue_limit: int = 2_000_000) -> None:
        self.url = url
        self.account = new_account()
        self.defaults = AccountRecord(name=self.account, queue_limit=queue_limit)
        self.stream = _subjects.queue_stream(self.account, "census")

    async def __aenter__(self) -> Place:
        self.bus = await NatsBus.connect(NatsOptions(servers=(self.url,)))
        account, layout = await ensure_account(self.bus, self.account, defaults=self.defaults)
        await ensure_queue_stream(self.bus, account, layout, "census")
        self.owner = await StandInOwner(self.bus, self.account).open()
        self.client = await Client.connect(self.url, account=self.account)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        for stream in await self.bus.list_streams(f"toque+{self.account}+"):
            await self.bus.delete_stream(stream)
        await self.bus.close()

    async def messages(self) -> int:
        return (await self.bus.stream_info(self.stream)).messages


def test_a_created_instance_comes_back_with_its_result(nats_url, run_async):
    """create, status, result and terminate over a real connection."""

    async def main():
        async with Place(nats_url) as place:
            handle = await place.client.create("census", {"path": "a"}, id="one")
            queued = await handle.status()
            place.owner.put("census", "one", "running")
            waiting = asyncio.ensure_future(handle.result("20 seconds"))
            await asyncio.sleep(0)
            place.owner.put("census", "one", "complete", output=[1, 2], ended_at=1)

            assert queued.status == "queued"
            assert await waiting == [1, 2]
            with pytest.raises(InstanceEnded):
                await handle.terminate()
            with pytest.raises(InstanceNotFound):
                await place.client.get("census", "nobody")

    run_async(main())


def test_events_are_watched_over_a_real_connection(nats_url, run_async):
    """Kept ones, then live ones, and the rest from a cursor by another client."""

    async def main():
        async with Place(nats_url) as place:
            place.owner.tell("census", "one", "workflow_queued")
            handle = place.client.handle("census", "one")
            asyncio.get_running_loop().call_later(
                0.2, lambda: place.owner.tell("census", "one", "workflow_completed", value=7))

            events = [event async for event in handle.watch()]

            assert [(event.type, event.value) for event in events] == [("workflow_queued", None), ("workflow_completed", 7)]
            async with Client.connect(place.url, account=place.account) as other:
                again = [event async for event in other.handle("census", "one").watch(events[0].cursor)]
            assert again == events[1:]

    run_async(main())


def test_accounts_are_made_by_several_at_once(nats_url, run_async):
    """The compare-and-set of the control bucket and the make-once of streams hold on the server."""

    async def main():
        account = new_account()
        buses = [await NatsBus.connect(NatsOptions(servers=(nats_url,))) for _ in range(4)]

        made = await asyncio.gather(*(
            ensure_account(bus, account, defaults=AccountRecord(name=account, stations=n + 1))
            for n, bus in enumerate(buses)))

        assert len({repr(pair) for pair in made}) == 1
        assert len(await buses[0].list_streams(f"toque+{account}+")) == 5  # control, journal, dead, events, snapshots
        for stream in await buses[0].list_streams(f"toque+{account}+"):
            await buses[0].delete_stream(stream)
        for bus in buses:
            await bus.close()

    run_async(main())


def test_the_server_takes_every_stream_as_we_want_it(nats_url, run_async):
    """The configuration that the server reports is the one that the rules rest on."""

    async def main():
        async with Place(nats_url) as place:
            queue = (await place.bus.stream_info(place.stream)).config
            control = (await place.bus.stream_info(_subjects.control_stream(place.account))).config

            assert queue["discard"] == "new" and queue["discard_new_per_subject"] and queue["allow_atomic"]
            assert queue["max_msgs_per_subject"] == 1 and queue["max_msg_size"] == 2**20 + 16 * 1024
            assert queue["metadata"]["toque.workflow"] == "census" and queue["metadata"]["toque.role"] == "queue"
            assert control["allow_msg_ttl"] and control["max_msgs_per_subject"] == 1

    run_async(main())


def test_a_changed_queue_limit_holds_at_the_server(nats_url, run_async):
    """After update_account the stream refuses at the new bound."""

    async def main():
        async with Place(nats_url) as place:
            await update_account(place.bus, place.account, queue_limit=10)

            results = await place.client.create_batch("census", [NewInstance(n) for n in range(30)])

            created = [result for result in results if result.error is None]
            assert len(created) == await place.messages() == queue_capacity(10) == 11
            assert all(isinstance(result.error, QueueFull) for result in results if result.error is not None)
            with pytest.raises(QueueFull):
                await place.client.create("census")

    run_async(main())


def test_duplicates_are_told_apart_from_a_full_queue(nats_url, run_async):
    """Both have one error code; the item's error says which it was, and the rest of its batch is created."""

    async def main():
        async with Place(nats_url) as place:
            await place.client.create("census", id="n7")
            with pytest.raises(InstanceExists):
                await place.client.create("census", id="n7")

            results = await place.client.create_batch("census", [NewInstance(n, f"n{n}") for n in range(50)])

            assert [result.id for result in results if result.error] == ["n7"]
            assert isinstance(results[7].error, InstanceExists)
            assert await place.messages() == 50

    run_async(main())


def test_the_largest_params_fit_the_stream(nats_url, run_async):
    """1 MiB with its headers is stored; a byte more never leaves the client."""

    async def main():
        async with Place(nats_url) as place:
            await place.client.create("census", "x" * (2**20 - 5), id="x" * 100)
            with pytest.raises(PayloadTooLarge):
                await place.client.create("census", "x" * (2**20 - 4))

            assert await place.messages() == 1

    run_async(main())


def test_an_unknown_workflow_is_said_at_once(nats_url, run_async):
    """No stream takes the message: UnknownWorkflow, for one and for a batch."""

    async def main():
        async with Place(nats_url) as place:
            with pytest.raises(UnknownWorkflow, match="known are census"):
                await place.client.create("sensus", {})
            with pytest.raises(UnknownWorkflow):
                await place.client.create_batch("sensus", [NewInstance(n) for n in range(10)])

    run_async(main())


def test_an_absent_owner_is_waited_for_and_said(nats_url, run_async):
    """Nobody listens for the station: the call ends at its time-out."""

    async def main():
        async with Place(nats_url) as place:
            await place.owner.close()

            with pytest.raises(OwnerAway, match="is stored"):
                await place.client.create("census", id="one", timeout="500 ms")
            with pytest.raises(OwnerAway):
                await place.client.handle("census", "one").result("500 ms")

    run_async(main())


def test_reports_come_from_the_server_and_the_owners(nats_url, run_async):
    """Pods, stations, queues and workflows of an account with queued work."""

    async def main():
        async with Place(nats_url) as place:
            for pod in "ab":
                record = SessionRecord(pod=pod, session=f"session-{pod}", workflows={"census": "1"})
                subject = _subjects.control_session(place.account, record.session)
                await place.bus.publish(subject, encode(record, json=True), {"Nats-TTL": "60s"})
            await place.client.create_batch("census", [NewInstance(n) for n in range(100)])

            [queue] = await place.client.queues(count_stations=True)
            stations = await place.client.stations()
            [workflow] = await place.client.workflows()
            pods = await place.client.pods()

            assert queue.queued == sum(part.queued or 0 for part in queue.stations) == 100
            assert queue.oldest_age_s is not None and queue.oldest_age_s < 30
            assert [report.pod for report in stations] == ["a"] * 8
            assert workflow.pods == {"a": "1", "b": "1"}
            assert [pod.pod for pod in pods] == ["a", "b"]

    run_async(main())


def test_a_batch_reaches_a_server_that_dies_and_comes_back(nats_server, run_async):
    """Killed in the middle of a batch: each item that is said to be created is stored, none twice."""

    async def main():
        async with Place(nats_server.url) as place:
            batch = asyncio.ensure_future(
                place.client.create_batch("census", [NewInstance(n) for n in range(20_000)], timeout="20 seconds"))
            while not batch.done() and await place.messages() < 1000:
                await asyncio.sleep(0)
            nats_server.kill()
            await nats_server.exited
            await nats_server.start()

            results = await batch
            await until(lambda: place.bus.connected)

            created = sum(result.error is None for result in results)
            assert created == len(results) == await place.messages()

    run_async(main(), timeout_s=50)
