"""Promises about questions to owners: only an owner's own words count, silence is repeated and then said so."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import msgspec
import pytest
from stand_in_owner import StandInOwner, new_place

from toque import sim
from toque._accounts import ensure_account
from toque._protocol import Answer, Layout, encode
from toque._subjects import station_number
from toque.client import Client
from toque.errors import (
    InstanceEnded,
    InstanceNotFound,
    InvalidDuration,
    OwnerAway,
    SetupError,
    Unavailable,
    UsageError,
)
from toque.workflow import Step, Workflow, WorkflowEvent

AT = 1_767_225_600_123


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


def test_status_has_utc_times_and_the_typed_output():
    """What the owner says comes as datetimes and as the workflow's Result type."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "complete", output={"lines": 3}, created_at=AT, ended_at=AT + 1000, pod="a",
                  station="1.2")

        status = await client.handle(Census, "one").status()

        assert status.output == Report(3)
        assert status.created_at == datetime(2026, 1, 1, 0, 0, 0, 123000, tzinfo=UTC)
        assert (status.status, status.ended, status.pod, status.station) == ("complete", True, "a", "1.2")
        assert status.admitted_at is None and status.error is None

    sim.run(main(), seed=1)


def test_the_question_goes_to_the_id_s_station():
    """The client computes the station that the server's hash gives the id."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "running")

        await client.handle("census", "one").status()

        assert owner.asked == [(f"1.{station_number('one', 8)}", "status")]

    sim.run(main(), seed=1)


def test_not_found_comes_from_an_owner():
    """get of an id that its owner does not know raises InstanceNotFound and names it."""

    async def main():
        client, _ = await client_and_owner()

        with pytest.raises(InstanceNotFound, match="census/nobody"):
            await client.get("census", "nobody")

    sim.run(main(), seed=1)


def test_a_queued_instance_is_found():
    """An acknowledged creation that no pod has admitted yet has a status."""

    async def main():
        client, _ = await client_and_owner()
        handle = await client.create("census")

        status = await (await client.get("census", handle.id)).status()

        assert status.status == "queued" and not status.ended

    sim.run(main(), seed=1)


@pytest.mark.parametrize("absence", ["closed", "muted"])
def test_silence_is_never_not_found(absence):
    """Without an owner, or with one that says nothing, the call ends at its time-out with OwnerAway and the handle."""

    async def main():
        client, owner = await client_and_owner()
        owner.muted = True
        if absence == "closed":
            await owner.close()
        handle = client.handle("census", "one")
        began = now()

        with pytest.raises(OwnerAway, match="census/one") as caught:
            await handle.status(timeout="5 seconds")

        assert caught.value.handle is handle
        assert 5 <= now() - began < 6

    sim.run(main(), seed=1)


def test_an_owner_that_is_restoring_is_asked_again():
    """"retry" is no answer: the call waits for one that is."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "running")
        owner.say = [Answer(1, "retry", "restoring")] * 4

        status = await client.handle("census", "one").status()

        assert status.status == "running"
        assert len(owner.asked) == 5

    sim.run(main(), seed=1)


def test_the_reason_of_the_last_silence_is_told():
    """OwnerAway says why there was no answer, as far as it is known."""

    async def main():
        client, owner = await client_and_owner()
        owner.say = [Answer(1, "retry", "restoring 70,000 records")] * 1000

        with pytest.raises(OwnerAway, match="restoring 70,000 records"):
            await client.handle("census", "one").status(timeout="1 second")

    sim.run(main(), seed=1)


def test_answers_of_a_former_owner_do_not_count():
    """Once a higher epoch was seen, a lower one is ignored (protocol rule 24)."""

    async def main():
        client, owner = await client_and_owner()
        handle = client.handle("census", "one")
        owner.put("census", "one", "complete", output=1)
        owner.epoch = 5
        await handle.status()
        owner.say = [Answer(4, "not_found")] * 3

        status = await handle.status()

        assert status.status == "complete"

    sim.run(main(), seed=1)


def test_an_account_that_was_wiped_and_made_anew_is_followed():
    """Epochs begin again with a new control bucket, so a client that lives on (a web server, say) is not deaf to it."""

    async def main():
        client, owner = await client_and_owner()
        owner.epoch = 5
        owner.put("census", "one", "running")
        handle = client.handle("census", "one")
        await handle.status()
        for stream in await owner.bus.list_streams("toque+"):
            await owner.bus.delete_stream(stream)
        await ensure_account(owner.bus, "main")
        owner.epoch = 1

        assert (await handle.status()).status == "running"

    sim.run(main(), seed=1)


def test_a_moved_station_makes_the_client_read_the_layout_again():
    """After "moved" the layout is read from the leader, and every generation is asked, the newest first."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "running")
        await client.handle("census", "one").status()
        layout = Layout(generations=[(1, 8), (2, 3)])
        await owner.bus.publish("toque.main.control.layout", encode(layout, json=True))
        owner.asked.clear()
        owner.say = [Answer(1, "moved"), Answer(1, "not_found")]

        status = await client.handle("census", "one").status()

        old, new = f"1.{station_number('one', 8)}", f"2.{station_number('one', 3)}"
        assert status.status == "running"
        assert owner.asked == [(old, "status"), (new, "status"), (old, "status")]

    sim.run(main(), seed=1)


def test_not_found_needs_every_generation():
    """One silent generation keeps the answer open, whatever the others say."""

    async def main():
        client, owner = await client_and_owner()
        layout = Layout(generations=[(1, 8), (2, 3)])
        await owner.bus.publish("toque.main.control.layout", encode(layout, json=True))
        retry, missing = Answer(1, "retry"), Answer(1, "not_found")
        owner.say = [retry, missing, missing, retry, missing, missing]

        with pytest.raises(InstanceNotFound):
            await client.handle("census", "one").status()

        assert owner.say == []

    sim.run(main(), seed=1)


def test_a_broken_answer_is_silence():
    """Bytes that are no answer are asked for again, and named when nothing better comes."""

    async def main():
        client, owner = await client_and_owner()
        await owner.close()
        await owner.bus.subscribe("toque.main.station.>", lambda message: owner.bus.respond(message, b"\xff\x00"))

        with pytest.raises(OwnerAway, match="cannot be read"):
            await client.handle("census", "one").status(timeout="1 second")

    sim.run(main(), seed=1)


def test_an_account_that_is_not_there_is_said_so():
    """A client of an account that nobody made does not wait for owners."""

    async def main():
        _, owner = await client_and_owner()

        with pytest.raises(SetupError, match="no account 'other'"):
            await Client(owner.bus, account="other").get("census", "one")

    sim.run(main(), seed=1)


def test_a_dead_broker_is_no_owner_either():
    """Without a connection, even the layout unread, the call ends at its time-out with what is known."""

    async def main():
        client, owner = await client_and_owner()
        owner.bus.broker.stop()

        with pytest.raises(Unavailable) as caught:
            await client.handle("census", "one").status(timeout="3 seconds")

        assert caught.value.handle.id == "one"

    sim.run(main(), seed=1)


def test_bare_numbers_are_no_time_outs():
    """A time-out has a unit."""

    async def main():
        client, _ = await client_and_owner()

        with pytest.raises(InvalidDuration, match="5 seconds"):
            await client.handle("census", "one").status(timeout=5)  # type: ignore[arg-type]  # what is tested

    sim.run(main(), seed=1)


# -- terminate ---------------------------------------------------------------------------------------------------------

def test_terminate_is_done_when_it_returns():
    """The owner has recorded it."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "running")

        await client.handle("census", "one").terminate()

        assert owner.instances["census", "one"].status == "terminated"

    sim.run(main(), seed=1)


def test_terminating_what_has_ended_raises():
    """Its result stays what it is."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "complete", output=1, ended_at=1)

        with pytest.raises(InstanceEnded, match="census/one"):
            await client.handle("census", "one").terminate()

    sim.run(main(), seed=1)


def test_every_repeat_of_terminate_carries_one_request_id():
    """A lost answer makes the client ask again: as the same operation, so that it gets the first answer."""

    async def main():
        client, owner = await client_and_owner()
        owner.put("census", "one", "running")
        requests: list[str] = []
        await owner.bus.subscribe("toque.main.station.*.*.terminate",
                                  lambda message: requests.append(msgspec.msgpack.decode(message.data)["request"]))
        owner.say = [Answer(1, "retry")] * 2

        await client.handle("census", "one").terminate()

        assert len(requests) == 3
        assert len(set(requests)) == 1 and requests[0]

    sim.run(main(), seed=1)


def test_a_refused_operation_tells_the_owner_s_reason():
    """What the owner refuses is a mistake of the caller, in the owner's words."""

    async def main():
        client, owner = await client_and_owner()
        owner.say = [Answer(1, "refused", "no such operation")]

        with pytest.raises(UsageError, match="no such operation"):
            await client.handle("census", "one").terminate()

    sim.run(main(), seed=1)


def test_a_workflow_is_named_by_class_or_name_only():
    """Anything else is a mistake that says so."""

    async def main():
        client, _ = await client_and_owner()

        with pytest.raises(UsageError, match="by its class or its name"):
            client.handle(7, "one")  # type: ignore[call-overload]  # what is tested

    sim.run(main(), seed=1)
