"""Promises about reports and lists: complete, in order, and honest about what has no owner."""

from __future__ import annotations

import asyncio

import pytest
from stand_in_owner import StandInOwner, new_place

from toque import sim
from toque._accounts import ensure_account, ensure_queue_stream
from toque._protocol import SessionRecord, encode
from toque.client import Client, NewInstance
from toque.errors import OwnerAway, SetupError, UsageError

QUEUE = "toque+main+queue+census"


async def client_and_owner() -> tuple[Client, StandInOwner]:
    place = await new_place()
    return place.client, place.owner


async def begin_session(owner: StandInOwner, pod: str, **fields: object) -> None:
    record = SessionRecord(pod=pod, session=f"session-{pod}", workflows={"census": "2"}, **fields)  # type: ignore[arg-type]  # by name
    await owner.bus.publish(f"toque.main.control.session.session-{pod}", encode(record, json=True))


# -- list --------------------------------------------------------------------------------------------------------------

def test_a_list_holds_every_instance_oldest_first():
    """Pages of all stations are merged in the order of admission."""

    async def main():
        client, owner = await client_and_owner()
        for n in range(1000):
            owner.put("census", f"n{n}", "running", admitted_at=1_000_000 + n)

        rows = [row.id async for row in client.list()]

        assert rows == [f"n{n}" for n in range(1000)]

    sim.run(main(), seed=1)


def test_a_list_is_narrowed_by_workflow_status_and_limit():
    """Only matching rows come, and not more than wanted."""

    async def main():
        client, owner = await client_and_owner()
        for n in range(40):
            owner.put("census", f"n{n}", "complete" if n % 2 else "running", output=n, admitted_at=1 + n)
        owner.put("report", "other", "running", admitted_at=1)

        complete = [row async for row in client.list("census", status="complete", limit=5)]

        assert [(row.id, row.output) for row in complete] == [(f"n{n}", n) for n in (1, 3, 5, 7, 9)]

    sim.run(main(), seed=1)


def test_a_list_with_a_silent_station_is_not_called_complete():
    """Instead of leaving rows out it raises."""

    async def main():
        client, owner = await client_and_owner()
        await owner.close()

        with pytest.raises(OwnerAway, match="incomplete"):
            [row async for row in client.list(timeout="2 seconds")]

    sim.run(main(), seed=1)


@pytest.mark.parametrize(("arguments", "said"), [
    ({"status": "queued"}, "queues()"), ({"status": "done"}, "there are running"), ({"limit": 0}, "1 or more")])
def test_illegal_list_arguments_are_refused(arguments, said):
    """The error names what there is instead."""

    async def main():
        client, _ = await client_and_owner()

        with pytest.raises(UsageError, match=said):
            [row async for row in client.list(**arguments)]

    sim.run(main(), seed=1)


# -- pods, stations, workflows -----------------------------------------------------------------------------------------

def test_pods_are_collected_until_every_live_session_has_answered():
    """When all have answered there is nothing to wait for."""

    async def main():
        client, owner = await client_and_owner()
        for pod in "ab":
            await begin_session(owner, pod)
        began = asyncio.get_running_loop().time()

        pods = await client.pods()

        assert [pod.pod for pod in pods] == ["a", "b"]
        assert asyncio.get_running_loop().time() - began < 0.2

    sim.run(main(), seed=1)


def test_a_silent_pod_does_not_hold_the_others_back_for_long():
    """After a second the report is made of those who answered."""

    async def main():
        client, owner = await client_and_owner()
        for pod in "abc":
            await begin_session(owner, pod)

        pods = await client.pods()

        assert [pod.pod for pod in pods] == ["a", "b"]

    sim.run(main(), seed=1)


def test_stations_without_an_owner_are_listed_as_such():
    """Every station of the layout is in the report, whoever answers."""

    async def main():
        client, owner = await client_and_owner()
        owned = await client.stations()
        await owner.close()
        orphaned = await client.stations()

        assert [report.station for report in owned] == [f"1.{n}" for n in range(8)]
        assert {report.pod for report in owned} == {"a"} and owned[0].view is not None and owned[0].view.epoch == 1
        assert [report.view for report in orphaned] == [None] * 8
        assert all("no owner" in report.note for report in orphaned)

    sim.run(main(), seed=1)


def test_workflows_show_who_serves_them_now():
    """Ended and expired sessions do not count; a workflow that only has a queue is shown as not served."""

    async def main():
        client, owner = await client_and_owner()
        account, layout = await ensure_account(owner.bus, "main")
        await ensure_queue_stream(owner.bus, account, layout, "abandoned")
        await begin_session(owner, "a")
        await begin_session(owner, "b", ended="left")
        await owner.bus.publish("toque.main.control.session.session-c", b"", {"Nats-Marker-Reason": "MaxAge"})

        workflows = await client.workflows()

        assert [(report.workflow, report.pods, report.served) for report in workflows] == [
            ("abandoned", {}, False), ("census", {"a": "2"}, True)]

    sim.run(main(), seed=1)


# -- queues ------------------------------------------------------------------------------------------------------------

def test_a_queue_counts_what_no_owner_has_committed():
    """Depth, limit and the age of the oldest queued creation; per station the owner and its position."""

    async def main():
        client, owner = await client_and_owner()
        owner.committed = {"census": 0}
        await client.create_batch("census", [NewInstance(n) for n in range(20)])
        await asyncio.sleep(30)
        await client.create("census")

        [report] = await client.queues(count_stations=True)

        assert (report.workflow, report.queued, report.limit) == ("census", 21, 2_000_000)
        assert report.oldest_age_s is not None and 30 <= report.oldest_age_s < 31
        assert sum(part.queued or 0 for part in report.stations) == 21
        assert {part.pod for part in report.stations} == {"a"}

    sim.run(main(), seed=1)


def test_a_queue_that_is_committed_to_its_end_is_empty():
    """Messages that only wait for the owner's purge are not queued (protocol rule 11)."""

    async def main():
        client, owner = await client_and_owner()
        await client.create_batch("census", [NewInstance(n) for n in range(20)])
        owner.committed = {"census": 20}

        [report] = await client.queues()

        assert (report.queued, report.oldest) == (0, None)
        assert {part.lag for part in report.stations} == {0}

    sim.run(main(), seed=1)


def test_the_oldest_queued_creation_lies_behind_the_committed_positions():
    """What is committed does not make the queue look old."""

    async def main():
        client, owner = await client_and_owner()
        await client.create("census")
        await asyncio.sleep(60)
        owner.committed = {"census": 1}
        await client.create("census")

        [report] = await client.queues()

        assert report.oldest_age_s is not None and report.oldest_age_s < 1

    sim.run(main(), seed=1)


def test_queues_without_owners_still_show_their_depth():
    """Everything in the stream is queued then; positions are unknown, not zero."""

    async def main():
        client, owner = await client_and_owner()
        await owner.close()
        await client.create("census")

        [report] = await client.queues()

        assert report.queued == 1
        assert {part.committed for part in report.stations} == {None}
        assert {part.pod for part in report.stations} == {""}

    sim.run(main(), seed=1)


def test_parked_messages_are_counted_per_workflow_and_kind():
    """What another workflow has parked is not in it."""

    async def main():
        client, owner = await client_and_owner()
        for kind, workflow in (("create", "census"), ("create", "census"), ("event", "census"), ("create", "report")):
            await owner.bus.publish(f"toque.main.dead.{kind}.{workflow}", b"")

        [report] = await client.queues()

        assert (report.parked, report.parked_by_kind) == (3, {"create": 2, "event": 1})

    sim.run(main(), seed=1)


@pytest.mark.parametrize("report", ["pods", "stations", "queues", "workflows"])
def test_reports_of_an_account_that_is_not_there_say_so(report):
    """The error names the account and how to make it."""

    async def main():
        _, owner = await client_and_owner()
        client = Client(owner.bus, account="other")

        if report == "workflows":
            with pytest.raises(SetupError, match="other"):
                await client.workflows()
        else:
            with pytest.raises(SetupError, match="other"):
                await getattr(client, report)()

    sim.run(main(), seed=1)
