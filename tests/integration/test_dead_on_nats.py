"""Promises about parked messages on a real server: reading by filter, deleting by sequence, and a retry."""

from __future__ import annotations

import uuid

import pytest
from stand_in_owner import StandInOwner

from toque import _subjects
from toque._accounts import ensure_account, ensure_queue_stream
from toque._dead import PAGE_MESSAGES, DeadCount
from toque.client import Client
from toque.errors import InstanceExists, InvalidName, NotParked, SetupError
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import NatsOptions


class Place:
    """An account with a queue, a client of it, and an owner on another connection."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.account = f"t{uuid.uuid4().hex[:12]}"
        self.stream = _subjects.dead_stream(self.account)

    async def __aenter__(self) -> Place:
        self.bus = await NatsBus.connect(NatsOptions(servers=(self.url,)))
        account, layout = await ensure_account(self.bus, self.account)
        await ensure_queue_stream(self.bus, account, layout, "census")
        self.owner = await StandInOwner(self.bus, self.account).open()
        self.client = await Client.connect(self.url, account=self.account)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        for stream in await self.bus.list_streams(f"toque+{self.account}+"):
            await self.bus.delete_stream(stream)
        await self.bus.close()

    async def park(self, *instance_ids: str, workflow: str = "census", body: bytes = b"7", **headers: str) -> None:
        """As a station's owner does."""
        for instance_id in instance_ids:
            origin = f"toque.{self.account}.queue.{workflow}.1.0.{instance_id}"
            sender = {name.replace("_", "-"): text for name, text in headers.items()}
            await self.bus.publish(_subjects.dead(self.account, "create", workflow), body, {
                **sender, "Toque-Reason": "because of ü", "Toque-Subject": origin})

    async def parked(self) -> int:
        return (await self.bus.stream_info(self.stream)).messages


def test_parked_messages_are_listed_shown_and_counted(nats_url, run_async):
    """By a filter of subjects, without bodies in lists, with times of the server."""

    async def main():
        async with Place(nats_url) as place:
            await place.park("a$b", "two", body=b"x" * 70_000)
            await place.park("three", workflow="report", Toque_Nonce="n1")
            dead = place.client.dead

            everything = [message async for message in dead.list()]
            report = [message.sequence async for message in dead.list(workflow="report", kind="create")]
            content = await dead.get(3)
            info = await place.bus.stream_info(place.stream)

            assert [(message.sequence, message.id, message.size) for message in everything] == [
                (1, "a$b", 70_000), (2, "two", 70_000), (3, "three", 1)]
            assert everything[0].reason == "because of ü" and "'$'" in everything[0].obstacle
            assert abs(everything[2].parked_at.timestamp() * 1000 - info.server_time_ms) < 10_000
            assert report == [3]
            assert (content.body, content.headers) == (b"7", {"Toque-Nonce": "n1"})
            assert await dead.count() == [DeadCount("create", "census", "because of ü", 2),
                                          DeadCount("create", "report", "because of ü", 1)]

    run_async(main())


def test_a_list_of_several_pages_leaves_no_consumer_behind(nats_url, run_async):
    """Everything once and in order; who stops in the middle holds nothing at the server."""

    async def main():
        async with Place(nats_url) as place:
            await place.park(*(f"i{number}" for number in range(PAGE_MESSAGES + 5)))
            await place.client.dead.drop(7)

            found = [message.sequence async for message in place.client.dead.list()]
            async for _ in place.client.dead.list():
                break

            assert found == [number for number in range(1, PAGE_MESSAGES + 6) if number != 7]
            answer = await place.bus.request(f"$JS.API.CONSUMER.NAMES.{place.stream}", b"")
            assert b'"total":0' in answer.data

    run_async(main())


def test_a_message_is_dropped_by_its_sequence(nats_url, run_async):
    """Only it, and only once; what never was there is told too."""

    async def main():
        async with Place(nats_url) as place:
            await place.park("one", "two", "three")

            dropped = [await place.client.dead.drop(sequence) for sequence in (2, 2, 99)]

            assert dropped == [True, False, False]
            assert [message.sequence async for message in place.client.dead.list()] == [1, 3]
            with pytest.raises(NotParked):
                await place.client.dead.get(2)

    run_async(main())


def test_a_retry_is_accepted_before_it_is_dropped(nats_url, run_async):
    """Each outcome stands for itself, and what was refused is parked still."""

    async def main():
        async with Place(nats_url) as place:
            place.owner.put("census", "taken", "complete", nonce="theirs", ended_at=1)
            await place.park("one", Toque_Nonce="n1", Nats_Msg_Id="x")
            await place.park("a$b", "taken", Toque_Nonce="n1")

            results = await place.client.dead.retry_many([1, 2, 3])

            assert [type(result.error) for result in results] == [type(None), InvalidName, InstanceExists]
            assert [message.sequence async for message in place.client.dead.list()] == [2, 3]
            queue = _subjects.queue_stream(place.account, "census")
            queued = await place.bus.last_message(queue, f"toque.{place.account}.queue.census.*.*.one")
            assert queued is not None and (queued.data, queued.headers) == (b"7", {"Toque-Nonce": "n1"})

    run_async(main())


def test_no_account_is_no_empty_list(nats_url, run_async):
    """Said so, by the name of the account."""

    async def main():
        async with await Client.connect(nats_url, account="nobody") as client:
            with pytest.raises(SetupError, match="nobody"):
                [message async for message in client.dead.list()]

    run_async(main())
