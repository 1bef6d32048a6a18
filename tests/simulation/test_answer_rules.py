"""What the owner of a station answers (protocol rules 14 to 16, 21, 24)."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from simulation.checks import check_once
from simulation.world import World, account, play, sleeper_workflow, steps_workflow

from toque import _subjects as subjects
from toque._protocol import Answer, InstanceRequest, encode
from toque._subjects import StationId
from toque.errors import OwnerAway
from toque.storage import records as r
from toque.storage.memory_broker import DELAY

FIRST = StationId(1, 0)
QUEUE = subjects.queue_stream("main", "work")
LEADER_READ = f"$JS.API.STREAM.MSG.GET.{QUEUE}"
SMALL = 1024 * 1024  # nats-server's own default for max_payload


async def ask(world: World, operation: str, request: InstanceRequest) -> Answer:
    """One question to the owner of the instance, without a client's patience."""
    subject = subjects.station_request("main", world.station_of(request.id), operation)
    reply = await world.bus().request(subject, encode(request, json=False), timeout_s=20.0)
    return msgspec.msgpack.decode(reply.data, type=Answer)


# -- rule 16: a negative answer ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("operation", ["status", "wait", "describe", "exists", "terminate"])
def test_an_instance_that_leaves_the_queue_while_its_owner_looks_is_found(operation):
    """Closes: the owner finds nothing in the index, its leader read takes long, and until it is served the instance has
    been admitted and its message purged: nothing in the queue either. The index is read again before "not found"."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, step_s=3)))
        await world.all_owned()
        await world.publish("work", "busy")
        await world.until(lambda: world.history.entered("busy"), "the slot is taken")
        await world.publish("work", "one", nonce="mine")
        world.broker.fail_next(LEADER_READ, DELAY, times=1, delay_s=4.0)
        asking = asyncio.ensure_future(ask(world, operation, InstanceRequest("work", "one", nonce="mine", wait_s=0.1)))
        await world.until(lambda: len(world.records(r.Admitted)) == 2, "it was admitted")
        await world.passes(0.1)
        world.broker.purge(QUEUE, ">", 10**9)  # as if its message had left at once
        assert not asking.done(), "the story needs a leader read that is still on its way"

        assert (await asking).code in ("ok", "ended")

    play(story, account=account(max_concurrent=1))


def test_a_queued_instance_of_a_workflow_that_the_pod_lacks_is_not_said_to_be_unknown():
    """Closes: during a rolling deploy the only pod left lacks the workflow: asked to terminate a queued instance of it,
    the owner says "not found", and the instance runs later. It is asked again until a pod has the workflow."""

    async def story(world: World) -> None:
        both = world.app(steps_workflow(world, step_s=3), sleeper_workflow(world, "nap"))
        a = await world.start_pod("a", both)
        await world.all_owned()
        await world.publish("work", "busy")
        await world.until(lambda: world.history.entered("busy"), "the slot is taken")
        await world.publish("work", "one")
        a.kill()
        b = await world.start_pod("b", world.app(sleeper_workflow(world, "nap")))
        await world.all_owned()
        handle = world.client().handle("work", "one")
        assert (await handle.status()).status == "queued"
        with pytest.raises(OwnerAway, match="does not have workflow"):
            await handle.terminate(timeout="2 seconds")

        asking = asyncio.ensure_future(handle.terminate(timeout="1 minute"))
        await b.stop()
        await world.start_pod("a", both)
        await asking
        assert (await handle.status()).status == "terminated"
        await world.quiet()
        assert world.history.times("one", "s1") == 0
        check_once(world, "work", ["one", "busy"])

    play(story, account=account(max_concurrent=1))
