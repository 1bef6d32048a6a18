"""Promises about watch() and subscribe(): typed values, patience with owners, and errors that can be acted on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import msgspec
import pytest
from stand_in_owner import StandInOwner, new_place

from toque import sim
from toque._protocol import Answer, WatchPage
from toque._watch import WatchEvent
from toque.client import Client
from toque.errors import InstanceNotFound, OwnerAway, TooManyWatchers, UsageError
from toque.workflow import Step, Workflow, WorkflowEvent


class Report(msgspec.Struct):
    lines: int


class Census(Workflow[None, Report], name="census"):
    async def run(self, event: WorkflowEvent[None], step: Step) -> Report:
        return Report(1)


async def client_and_owner() -> tuple[Client, StandInOwner]:
    place = await new_place()
    return place.client, place.owner


async def all_of(events: AsyncIterator[WatchEvent]) -> list[WatchEvent]:
    return [event async for event in events]


def test_an_output_is_decoded_to_the_workflows_type():
    """The end carries the Result; the output of a step is plain. Times are aware, and UTC."""

    async def main():
        client, owner = await client_and_owner()
        owner.tell("census", "one", "step_completed", value={"lines": 3}, kind="do", step="count", count=1)
        owner.tell("census", "one", "workflow_completed", value={"lines": 4})

        step, end = await all_of(client.handle(Census, "one").watch())

        assert (step.value, step.step, step.workflow, step.id) == ({"lines": 3}, "count", "census", "one")
        assert (end.value, end.at) == (Report(4), datetime.fromtimestamp(1.001, UTC))

    sim.run(main(), seed=1)


def test_watching_outlives_the_absence_of_its_owner_unless_told_otherwise():
    """Without a time-out it waits; with one it raises OwnerAway, which carries the handle."""

    async def main():
        client, owner = await client_and_owner()
        owner.tell("census", "one", "workflow_queued")
        handle = client.handle("census", "one")
        patient = asyncio.ensure_future(all_of(handle.watch()))
        hasty = asyncio.ensure_future(all_of(handle.watch(timeout="8 seconds")))
        await asyncio.sleep(1)
        owner.muted = True
        await asyncio.sleep(30)
        with pytest.raises(OwnerAway) as caught:
            await hasty
        owner.muted = False
        owner.tell("census", "one", "workflow_completed")

        assert [event.type for event in await patient] == ["workflow_queued", "workflow_completed"]
        assert caught.value.handle is handle

    sim.run(main(), seed=1)


def test_an_owner_that_does_not_hold_back_is_not_asked_in_a_rush():
    """Empty pages that come early are asked again with growing pauses."""

    async def main():
        client, owner = await client_and_owner()
        empty = msgspec.Raw(msgspec.msgpack.encode(WatchPage([], "7")))
        owner.say = [Answer(1, value=empty)] * 10_000
        watching = asyncio.ensure_future(all_of(client.handle("census", "one").watch()))
        await asyncio.sleep(30)
        watching.cancel()

        assert 10 < len(owner.asked) < 120

    sim.run(main(), seed=1)


def test_an_event_type_that_is_none_is_refused_at_once():
    """The error names it and those that there are; nobody is asked."""

    async def main():
        client, owner = await client_and_owner()

        with pytest.raises(UsageError, match=r"step_finished.*step_completed"):
            await all_of(client.handle("census", "one").watch(filter=["step_finished"]))
        assert owner.asked == []

    sim.run(main(), seed=1)


def test_who_is_one_too_many_is_told_so():
    """Unavailable: the same call later, from the last cursor."""

    async def main():
        client, owner = await client_and_owner()
        owner.say = [Answer(1, "busy", "station 1.6 has 1,000 watchers already")]

        with pytest.raises(TooManyWatchers, match="1,000"):
            await all_of(client.handle("census", "one").watch())

    sim.run(main(), seed=1)


def test_a_subscription_ends_with_what_ended_one_of_its_watchers():
    """What it brought before is told first; nothing is left behind."""

    async def main():
        client, owner = await client_and_owner()
        owner.tell("census", "one", "workflow_queued")
        tasks_before = len(asyncio.all_tasks())
        seen = []

        with pytest.raises(InstanceNotFound):
            async for event in client.subscribe([client.handle("census", "one"), client.handle("census", "none")]):
                seen.append(event.id)
                await asyncio.sleep(1)

        assert seen == ["one"]
        await asyncio.sleep(10)
        assert len(asyncio.all_tasks()) == tasks_before

    sim.run(main(), seed=1)


def test_a_subscription_to_too_many_instances_is_refused():
    """Each costs a question to its owner every few seconds."""

    async def main():
        client, _ = await client_and_owner()

        with pytest.raises(UsageError, match="1,000"):
            await all_of(client.subscribe([client.handle("census", f"i{number}") for number in range(1_001)]))

    sim.run(main(), seed=1)


def test_a_subscription_to_nothing_is_over():
    """It does not wait for an event that can never come."""

    async def main():
        client, _ = await client_and_owner()

        assert await all_of(client.subscribe([])) == []

    sim.run(main(), seed=1)
