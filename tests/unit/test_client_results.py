"""Promises about result(): it waits as long as wanted, over any take-over, and tells every end apart."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from stand_in_owner import StandInOwner, new_place

from toque import sim
from toque._protocol import Answer, ErrorView
from toque.client import Client
from toque.errors import (
    InstanceErrored,
    InstanceTerminated,
    InvalidPayload,
    OwnerAway,
    ResultTimeout,
)
from toque.workflow import Step, Workflow, WorkflowEvent


class Report(msgspec.Struct):
    lines: int


class Census(Workflow[None, Report], name="census"):
    async def run(self, event: WorkflowEvent[None], step: Step) -> Report:
        return Report(1)


async def client_and_owner() -> tuple[Client, StandInOwner]:
    place = await new_place()
    return place.client, place.owner


def now() -> float:
    return asyncio.get_running_loop().time()


def test_result_waits_for_the_end_and_decodes():
    """The output comes as soon as the owner knows it, over however many polls, in the Result type."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "running")
        began = now()
        asyncio.get_running_loop().call_later(
            12, lambda: owner.put("census", "one", "complete", output={"lines": 4}, ended_at=1))

        out = await client.handle(Census, "one").result()

        assert out == Report(4)
        assert 12 <= now() - began < 12.1
        assert len(owner.asked) == 3

    sim.run(main(), seed=1)


def test_result_outlives_the_absence_of_its_owner():
    """A take-over in the middle is only a pause: asking goes on, and the answer comes."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "running")
        waiting = asyncio.ensure_future(client.handle("census", "one").result("1 minute"))
        await asyncio.sleep(1)
        await owner.close()
        owner.muted = True
        await asyncio.sleep(12)
        owner.put("census", "one", "complete", output=7, ended_at=1)
        owner.muted = False
        await owner.open()

        assert await waiting == 7

    sim.run(main(), seed=1)


def test_a_time_out_of_result_says_that_the_instance_goes_on():
    """ResultTimeout is a TimeoutError too, and carries the handle."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "waiting")
        began = now()

        with pytest.raises(ResultTimeout, match="waiting") as caught:
            await client.handle("census", "one").result("7 seconds")

        assert isinstance(caught.value, TimeoutError)
        assert caught.value.handle.id == "one"
        assert 7 <= now() - began < 7.6

    sim.run(main(), seed=1)


def test_a_time_out_of_result_without_an_owner_is_owner_away():
    """Whether it has ended is not known then."""

    async def main():
        client, owner = await client_and_owner()
        await owner.close()

        with pytest.raises(OwnerAway, match="not known") as caught:
            await client.handle("census", "one").result("3 seconds")

        assert caught.value.handle.id == "one"

    sim.run(main(), seed=1)


def test_an_owner_that_does_not_hold_back_is_not_asked_in_a_rush():
    """Early answers to `wait` are asked again with growing pauses."""

    async def main():
        client, owner = await client_and_owner()
        running = msgspec.Raw(msgspec.msgpack.encode({"workflow": "census", "id": "one", "status": "running"}))
        owner.say = [Answer(1, value=running)] * 10_000

        with pytest.raises(ResultTimeout):
            await client.handle("census", "one").result("30 seconds")

        assert len(owner.asked) < 100

    sim.run(main(), seed=1)


def test_an_errored_instance_raises_what_was_recorded():
    """Type, message and traceback text of the error come along."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "errored", ended_at=1, error=ErrorView("ValueError", "no lines", "Traceback …"))

        with pytest.raises(InstanceErrored, match="ValueError: no lines") as caught:
            await client.handle("census", "one").result()

        assert (caught.value.error_type, caught.value.traceback) == ("ValueError", "Traceback …")

    sim.run(main(), seed=1)


def test_a_terminated_instance_raises():
    """There is no result, and the error says why."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "terminated", ended_at=1)

        with pytest.raises(InstanceTerminated, match="census/one"):
            await client.handle("census", "one").result()

    sim.run(main(), seed=1)


def test_an_output_of_another_type_is_said_so():
    """An output that does not fit the Result type raises InvalidPayload that names the instance."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "complete", output="text", ended_at=1)

        with pytest.raises(InvalidPayload, match="census/one"):
            await client.handle(Census, "one").result()

    sim.run(main(), seed=1)


def test_none_is_a_result():
    """An output of None is an output."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "complete", output=None, ended_at=1)

        assert await client.handle("census", "one").result() is None

    sim.run(main(), seed=1)
