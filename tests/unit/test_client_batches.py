"""Promises about batches: one true result per item, however the batch was cut, refused, lost or settled."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from stand_in_owner import new_place

from toque import _subjects, sim
from toque.client import NewInstance
from toque.errors import (
    InstanceExists,
    InstanceNotFound,
    InvalidName,
    InvalidPayload,
    OwnerAway,
    QueueFull,
    TwiceInBatch,
    UnknownWorkflow,
    UsageError,
)
from toque.workflow import Step, Workflow, WorkflowEvent

CREATE = "toque.main.create.census.>"
BEFORE = "drop before"
AFTER = "execute then lose the answer"


class FileParams(msgspec.Struct):
    path: str


class Census(Workflow[FileParams, None], name="census"):
    async def run(self, event: WorkflowEvent[FileParams], step: Step) -> None:
        return None


def test_a_batch_creates_every_item_and_says_so_in_order():
    """Results stand in the items' order, and each id lies in the queue."""

    async def main():
        place = await new_place()

        results = await place.client.create_batch(Census, [NewInstance(FileParams(str(n))) for n in range(2500)])

        assert [result.index for result in results] == list(range(2500))
        assert all(result.error is None for result in results)
        assert sorted(place.stored_ids()) == sorted(result.id for result in results)
        paths = {_subjects.parse_queue(m.subject).instance_id: msgspec.msgpack.decode(m.data)["path"]
                 for m in place.stored()}
        assert all(paths[result.id] == str(result.index) for result in results)

    sim.run(main(), seed=1)


def test_large_items_are_cut_into_batches_of_bounded_size():
    """A batch never holds more than about 4 MiB."""

    async def main():
        place = await new_place()

        results = await place.client.create_batch("census", [NewInstance("x" * 900_000) for _ in range(10)])

        assert [result.error for result in results] == [None] * 10

    sim.run(main(), seed=1)


def test_one_bad_item_harms_no_other():
    """Params that do not fit, ids that are illegal: an error for that item, the rest is created."""

    async def main():
        place = await new_place()
        items = [NewInstance(FileParams("a"), "good"), NewInstance({"path": 1}, "misfit"),
                 NewInstance(FileParams("b"), "a.b"), NewInstance(FileParams("c"), "good"),
                 NewInstance(FileParams("d"), "fine")]

        results = await place.client.create_batch(Census, items)

        kinds = [type(result.error) for result in results]
        assert kinds == [type(None), InvalidPayload, InvalidName, TwiceInBatch, type(None)]
        assert sorted(place.stored_ids()) == ["fine", "good"]

    sim.run(main(), seed=1)


def test_something_that_is_no_item_stops_the_call_before_it_sends():
    """Plain params in place of NewInstance are a mistake of the call: it raises, and nothing is stored."""

    async def main():
        place = await new_place()

        with pytest.raises(UsageError, match="item 1 of the batch is a dict"):
            await place.client.create_batch("census", [NewInstance(1), {"params": 1}])

        assert place.stored() == []

    sim.run(main(), seed=1)


def test_queued_duplicates_are_found_and_the_rest_is_sent():
    """One duplicate refuses an atomic batch as a whole; still only that item gets an error."""

    async def main():
        place = await new_place()
        for id_ in ("n7", "n450"):
            await place.client.create("census", id=id_)

        results = await place.client.create_batch("census", [NewInstance(n, f"n{n}") for n in range(1200)])

        refused = [result.id for result in results if result.error is not None]
        assert refused == ["n7", "n450"]
        assert all(isinstance(results[n].error, InstanceExists) for n in (7, 450))
        assert len(place.stored()) == 1200

    sim.run(main(), seed=1)


def test_ids_that_exist_but_are_not_queued_are_found_by_asking():
    """Each chosen id is asked for, so that a result is true."""

    async def main():
        place = await new_place()
        place.owner.put("census", "n3", "complete", nonce="another's", ended_at=1)

        results = await place.client.create_batch("census", [NewInstance(n, f"n{n}") for n in range(5)])

        assert [type(result.error) for result in results] == [type(None)] * 3 + [InstanceExists, type(None)]

    sim.run(main(), seed=1)


def test_a_batch_without_an_owner_says_what_is_known_per_item():
    """Stored, but nobody could say whether the ids existed: OwnerAway with the handle, for the chosen ones only."""

    async def main():
        place = await new_place()
        await place.owner.close()

        results = await place.client.create_batch("census", [NewInstance(1, "one"), NewInstance(2)],
                                                  timeout="2 seconds")

        assert isinstance(results[0].error, OwnerAway) and results[0].error.handle.id == "one"
        assert results[1].error is None

    sim.run(main(), seed=1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("how", [BEFORE, AFTER])
def test_a_batch_whose_answer_is_lost_is_settled_per_item(how, seed):
    """The same ids and nonces are sent again one by one: each item is stored once, and is said to be created."""

    async def main():
        place = await new_place(seed=seed)
        place.broker.fail_next(CREATE, how)

        results = await place.client.create_batch("census", [NewInstance(n) for n in range(200)])

        assert [result.error for result in results] == [None] * 200
        assert sorted(place.stored_ids()) == sorted(result.id for result in results)

    sim.run(main(), seed=seed)


def test_a_batch_fills_a_queue_to_its_limit_and_says_which_items_did_not_fit():
    """What fits is stored, the others get QueueFull, and both are true."""

    async def main():
        place = await new_place(queue_limit=500)

        results = await place.client.create_batch("census", [NewInstance(n) for n in range(3000)])

        created = [result.id for result in results if result.error is None]
        assert sorted(created) == sorted(place.stored_ids())
        assert len(created) == 525
        assert all(isinstance(result.error, QueueFull) for result in results if result.error is not None)

    sim.run(main(), seed=1)


def test_a_batch_of_an_unknown_workflow_raises():
    """No item could be stored: the call itself says why."""

    async def main():
        place = await new_place()

        with pytest.raises(UnknownWorkflow, match="sensus"):
            await place.client.create_batch("sensus", [NewInstance(n) for n in range(30)])

    sim.run(main(), seed=1)


def test_a_batch_through_a_dying_server_stays_true():
    """A server that dies and comes back in the middle: created items are stored, and no item is stored twice."""

    async def main():
        place = await new_place(seed=3)
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, place.broker.stop)
        loop.call_later(1.5, place.broker.start)

        results = await place.client.create_batch("census", [NewInstance(n) for n in range(8000)])

        stored = place.stored_ids()
        assert len(stored) == len(set(stored))
        assert {result.id for result in results if result.error is None} <= set(stored)
        assert [result for result in results if result.error is not None] == []

    sim.run(main(), seed=3)


def test_an_empty_batch_is_nothing():
    """No items, no results, no message."""

    async def main():
        place = await new_place()

        assert await place.client.create_batch("census", []) == []
        assert place.stored() == []

    sim.run(main(), seed=1)


def test_results_of_a_batch_carry_codes():
    """Those of Cloudflare: the id exists, the id stands twice in the batch; none where nothing is wrong."""

    async def main():
        place = await new_place()
        await place.client.create("census", id="old")

        results = await place.client.create_batch("census", [NewInstance(id=id_) for id_ in ("new", "old", "new")])

        assert [result.code for result in results] == [None, 10405, 10415]
        assert isinstance(results[2].error, InstanceExists)  # whoever does not care which it was

    sim.run(main(), seed=1)


# -- deletions ---------------------------------------------------------------------------------------------------------

def test_a_batch_of_deletions_has_a_result_at_each_position():
    """In order, each true for itself; one that is not there, or has no legal id, harms no other."""

    async def main():
        place = await new_place()
        for instance in ("a", "b"):
            place.owner.put("census", instance, "running")

        results = await place.client.delete_batch(Census, iter(["a", "none", "b", "a.b"]))

        assert [(result.index, result.id) for result in results] == [(0, "a"), (1, "none"), (2, "b"), (3, "a.b")]
        assert [type(result.error) for result in results] == [type(None), InstanceNotFound, type(None), InvalidName]
        assert [result.code for result in results] == [None, 10400, None, None]
        assert place.owner.instances == {}

    sim.run(main(), seed=1)


def test_an_id_that_stands_twice_is_deleted_once():
    """And its result at both positions."""

    async def main():
        place = await new_place()
        place.owner.put("census", "a", "running")

        results = await place.client.delete_batch("census", ["a", "none", "a", "none"])

        assert [result.code for result in results] == [None, 10400, None, 10400]
        assert [operation for _, operation in place.owner.asked].count("delete") == 2

    sim.run(main(), seed=1)


def test_a_batch_of_deletions_may_be_large():
    """Far more than Cloudflare's 100; so many questions at once and no more."""

    async def main():
        place = await new_place()
        for number in range(1500):
            place.owner.put("census", f"i{number}", "complete", ended_at=1)

        results = await place.client.delete_batch("census", [f"i{number}" for number in range(1500)])

        assert all(result.error is None for result in results) and len(results) == 1500
        assert place.owner.instances == {}
        assert await place.client.delete_batch("census", []) == []

    sim.run(main(), seed=1)


def test_a_deletion_that_nobody_answers_carries_its_handle():
    """So that whoever deletes can ask again."""

    async def main():
        place = await new_place()
        place.owner.muted = True

        results = await place.client.delete_batch("census", ["a"], timeout="1 second")

        assert isinstance(results[0].error, OwnerAway)
        assert results[0].error.handle.id == "a"

    sim.run(main(), seed=1)


@pytest.mark.parametrize("ids", ["abc", [1], b"abc"])
def test_what_is_no_list_of_ids_deletes_nothing(ids):
    """The letters of an id are not ids."""

    async def main():
        place = await new_place()
        for instance in "abc":
            place.owner.put("census", instance, "running")

        with pytest.raises(UsageError, match="nothing was deleted"):
            await place.client.delete_batch("census", ids)

        assert len(place.owner.instances) == 3

    sim.run(main(), seed=1)
