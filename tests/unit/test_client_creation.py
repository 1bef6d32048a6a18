"""Promises about creations: an acknowledged one is stored, a refused one never, and what is unknown is said so."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from stand_in_owner import new_place

from toque import sim
from toque.client import Client
from toque.errors import (
    BrokerUnavailable,
    InstanceExists,
    InvalidName,
    InvalidPayload,
    OwnerAway,
    PayloadTooLarge,
    QueueFull,
    UnknownWorkflow,
)
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.storage.ports import NoResponders
from toque.workflow import Step, Workflow, WorkflowEvent

QUEUE = "toque+main+queue+census"
CREATE = "toque.main.create.census.>"
BEFORE = "drop before"
AFTER = "execute then lose the answer"


class FileParams(msgspec.Struct):
    path: str
    lines: int = 0


class Census(Workflow[FileParams, int], name="census"):
    async def run(self, event: WorkflowEvent[FileParams], step: Step) -> int:
        return event.payload.lines


def test_a_creation_is_stored_with_params_content_type_and_nonce():
    """What create acknowledges lies in the queue, as msgpack, under the id's station."""

    async def main():
        place = await new_place()

        handle = await place.client.create(Census, FileParams("a.py", 3))

        [message] = place.stored()
        assert (handle.workflow, handle.id) == ("census", place.stored_ids()[0])
        assert msgspec.msgpack.decode(message.data) == {"path": "a.py", "lines": 3}
        assert message.header("Content-Type") == "application/msgpack"
        assert len(message.header("Toque-Nonce")) == 16

    sim.run(main(), seed=1)


def test_a_generated_id_asks_no_owner():
    """A new id cannot exist, so one publish is all."""

    async def main():
        place = await new_place()

        await place.client.create("census", {"path": "a.py"})

        assert place.owner.asked == []

    sim.run(main(), seed=1)


def test_a_chosen_id_that_exists_is_refused():
    """An id whose instance is known to its owner, but not queued any more, raises InstanceExists."""

    async def main():
        place = await new_place()
        place.owner.put("census", "one", "complete", nonce="another's", ended_at=1)

        with pytest.raises(InstanceExists, match="census/one"):
            await place.client.create(Census, FileParams("a.py"), id="one")

    sim.run(main(), seed=1)


def test_a_chosen_id_that_is_queued_is_refused_without_an_owner():
    """The queue itself refuses a second creation of an id."""

    async def main():
        place = await new_place()
        await place.client.create("census", id="one")
        place.owner.muted = True

        with pytest.raises(InstanceExists):
            await place.client.create("census", id="one")

        assert place.stored_ids() == ["one"]

    sim.run(main(), seed=1)


def test_a_chosen_id_without_an_owner_is_stored_and_said_so():
    """When nobody can say whether the id existed before, the error says what is known and carries the handle."""

    async def main():
        place = await new_place()
        await place.owner.close()

        with pytest.raises(OwnerAway, match=r"is stored; whether the id existed before is not known") as caught:
            await place.client.create("census", id="one", timeout="2 seconds")

        assert caught.value.handle.id == "one"
        assert place.stored_ids() == ["one"]

    sim.run(main(), seed=1)


def test_an_owner_that_comes_back_in_time_answers():
    """The question is repeated until the time-out, so a short absence is not seen."""

    async def main():
        place = await new_place()
        await place.owner.close()
        asyncio.get_running_loop().call_later(3, lambda: tasks.append(asyncio.ensure_future(place.owner.open())))
        tasks: list[Any] = []

        handle = await place.client.create("census", id="one", timeout="10 seconds")

        assert handle.id == "one"

    sim.run(main(), seed=1)


@pytest.mark.parametrize("how", [BEFORE, AFTER])
@pytest.mark.parametrize("chosen", [None, "one"])
def test_a_lost_answer_is_settled_by_the_same_id_and_nonce(how, chosen):
    """Whether the message or only its ack was lost: one creation is stored, and create succeeds."""

    async def main():
        place = await new_place()
        place.broker.fail_next(CREATE, how)

        handle = await place.client.create("census", 5, id=chosen)

        assert place.stored_ids() == [handle.id]

    sim.run(main(), seed=1)


def test_a_lost_answer_whose_creation_was_admitted_and_purged_is_settled_by_the_owner():
    """Ours was admitted; somebody else's of the same id is queued now: the owner knows whose instance it is."""

    async def main():
        place = await new_place()
        place.broker.fail_next(CREATE, AFTER)
        creating = asyncio.ensure_future(place.client.create("census", id="one", timeout="10 seconds"))
        await asyncio.sleep(1)
        [ours] = place.stored()
        place.owner.put("census", "one", "running", nonce=ours.header("Toque-Nonce"))
        place.purge()
        await MemoryBus(place.broker).publish("toque.main.create.census.one", b"", {"Toque-Nonce": "theirs"})

        handle = await creating

        assert handle.id == "one"

    sim.run(main(), seed=1)


def test_a_lost_message_whose_id_somebody_else_took_is_refused():
    """Ours never landed and another creation of the id did: InstanceExists, never a false success."""

    async def main():
        place = await new_place()
        place.broker.fail_next(CREATE, BEFORE)
        creating = asyncio.ensure_future(place.client.create("census", id="one", timeout="10 seconds"))
        await asyncio.sleep(1)
        await MemoryBus(place.broker).publish("toque.main.create.census.one", b"", {"Toque-Nonce": "theirs"})

        with pytest.raises(InstanceExists):
            await creating

    sim.run(main(), seed=1)


def test_a_lost_answer_of_a_creation_whose_id_existed_is_no_success():
    """Ours lies in the queue, and will be dropped: the id was another creation's, admitted and purged before."""

    async def main():
        place = await new_place()
        place.owner.put("census", "one", "complete", nonce="theirs", ended_at=1)
        place.broker.fail_next(CREATE, AFTER)

        with pytest.raises(InstanceExists):
            await place.client.create("census", id="one", timeout="10 seconds")

        assert place.stored_ids() == ["one"]

    sim.run(main(), seed=1)


def test_a_server_that_stays_away_leaves_the_outcome_unknown():
    """After the time-out the error says that it is not known, and carries the handle to ask with later."""

    async def main():
        place = await new_place()
        place.broker.freeze_stream(QUEUE)

        with pytest.raises(BrokerUnavailable, match="not known") as caught:
            await place.client.create("census", timeout="7 seconds")

        assert caught.value.handle.workflow == "census"

    sim.run(main(), seed=1)


def test_a_full_queue_after_a_lost_answer_stays_unknown():
    """A refusal says nothing about the earlier attempt, so it is not reported as "not stored"."""

    async def main():
        place = await new_place()
        place.broker.fail_next(CREATE, BEFORE)
        place.broker.fail_next(CREATE, "refuse:10023", times=1000)

        with pytest.raises(BrokerUnavailable, match="whether it was stored is not known"):
            await place.client.create("census", timeout="6 seconds")

    sim.run(main(), seed=1)


def test_a_workflow_that_was_never_served_is_said_so():
    """No queue stream: the error names the workflow and what there is, and nothing is stored."""

    async def main():
        place = await new_place()

        with pytest.raises(UnknownWorkflow, match=r"'sensus'.*known are census"):
            await place.client.create("sensus", {})

    sim.run(main(), seed=1)


def test_a_queue_without_a_leader_is_not_an_unknown_workflow():
    """Nobody takes the message for a moment though the stream exists: it is sent again."""

    async def main():
        place = await new_place()
        bus = _LeaderlessBus(place.broker, refusals=3)

        await Client(bus).create("census", {})

        assert bus.refusals == 0
        assert len(place.stored()) == 1

    sim.run(main(), seed=1)


class _LeaderlessBus(MemoryBus):
    """A cluster whose queue stream has no leader for the first few publishes."""

    def __init__(self, broker: MemoryBroker, refusals: int) -> None:
        super().__init__(broker)
        self.refusals = refusals

    async def publish(self, subject, data, headers=None, *, timeout_s=5.0):
        if self.refusals:
            self.refusals -= 1
            raise NoResponders("no leader")
        return await super().publish(subject, data, headers, timeout_s=timeout_s)


def test_a_full_queue_refuses_and_stores_nothing():
    """At the limit create raises QueueFull at once."""

    async def main():
        place = await new_place(queue_limit=2)
        for _ in range(3):  # the limit and its reserve
            await place.client.create("census")

        with pytest.raises(QueueFull, match="queue_limit"):
            await place.client.create("census")

        assert len(place.stored()) == 3

    sim.run(main(), seed=1)


def test_params_beyond_the_limit_are_refused_before_they_are_sent():
    """The error names the workflow, the size and the limit."""

    async def main():
        place = await new_place()

        with pytest.raises(PayloadTooLarge, match=r"'census'.*1,048,581 bytes.*1,048,576") as caught:
            await place.client.create("census", "x" * 2**20)

        assert (caught.value.size, caught.value.limit) == (2**20 + 5, 2**20)
        assert place.stored() == []

    sim.run(main(), seed=1)


def test_params_of_the_limit_are_taken():
    """One MiB fits, headers included."""

    async def main():
        place = await new_place()

        await place.client.create("census", "x" * (2**20 - 5))

        assert len(place.stored()) == 1

    sim.run(main(), seed=1)


def test_a_server_with_a_small_max_payload_lowers_the_limit():
    """What the server would not take, or what no record could hold, is refused by the client."""

    async def main():
        place = await new_place()
        place.broker.max_payload = 64 * 1024

        with pytest.raises(PayloadTooLarge, match="49,152"):
            await place.client.create("census", "x" * 49_152)

    sim.run(main(), seed=1)


@pytest.mark.parametrize("params", [{"path": 5}, {"lines": 1}, "text", None])
def test_params_that_do_not_fit_the_class_are_refused(params):
    """Given the class, its Params type is checked before anything is stored."""

    async def main():
        place = await new_place()

        with pytest.raises(InvalidPayload, match="census"):
            await place.client.create(Census, params)

        assert place.stored() == []

    sim.run(main(), seed=1)


@pytest.mark.parametrize("id_", ["", "a.b", "a*", "a b", "a\n", ">", "x" * 101])
def test_illegal_ids_are_refused(id_):
    """An id that is no subject token never leaves the client."""

    async def main():
        place = await new_place()

        with pytest.raises(InvalidName):
            await place.client.create("census", id=id_)

        assert place.stored() == []

    sim.run(main(), seed=1)
