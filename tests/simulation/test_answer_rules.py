"""What the owner of a station answers, and what fits into its records (protocol rules 14 to 17, 21, 24)."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from toque import _subjects as subjects
from toque._protocol import Answer, InstanceRequest, PodView, encode
from toque._subjects import StationId
from toque.errors import InstanceExists, OwnerAway, StepFailed, ToqueError
from toque.sim.checks import check_all, check_once
from toque.sim.world import TTL_S, World, account, play, sleeper_workflow, steps_workflow
from toque.storage import records as r
from toque.storage.memory_broker import DELAY, DROP_BEFORE, LOSE_ANSWER
from toque.storage.ports import BusTimeout
from toque.workflow import Step, Workflow, WorkflowEvent

FIRST = StationId(1, 0)
QUEUE = subjects.queue_stream("main", "work")
LEADER_READ = f"$JS.API.STREAM.MSG.GET.{QUEUE}"
SMALL = 1024 * 1024  # nats-server's own default for max_payload


async def ask(world: World, operation: str, request: InstanceRequest) -> Answer:
    """One question to the owner of the instance, without a client's patience."""
    subject = subjects.station_request("main", world.station_of(request.id), operation)
    reply = await world.bus().request(subject, encode(request, json=False), timeout_s=20.0)
    return msgspec.msgpack.decode(reply.data, type=Answer)


# -- reports of pods ---------------------------------------------------------------------------------------------------

def test_a_pod_counts_its_tasks_when_it_is_asked_to():
    """Not otherwise, for the loop stands still meanwhile; in JSON too, and a request that means nothing is answered."""

    async def story(world: World) -> None:
        async def ask_for(request: bytes) -> int:
            reply = await world.bus().request(subjects.pods("main"), request)
            decode = msgspec.json.decode if request.startswith(b"{") else msgspec.msgpack.decode
            return decode(reply.data, type=PodView).tasks

        await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        idle = [asyncio.ensure_future(asyncio.Event().wait()) for _ in range(1000)]

        assert [view.tasks for view in await world.client().pods()] == [0]
        [view] = await world.client().pods(count_tasks=True)
        assert 1000 < view.tasks < 1100
        assert await ask_for(b'{"tasks":true}') > 1000
        assert await ask_for(b"{}") == await ask_for(b'{"tasks":7}') == await ask_for(b"\xc1") == 0
        for task in idle:
            task.cancel()

    play(story)


# -- rules 14 and 15: nonces -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("theirs", [False, True])
def test_a_duplicate_after_a_lost_answer_is_told_apart_by_its_nonce(theirs):
    """Closes: the answer to a creation is lost, the repeat is refused as a duplicate of what is queued, and the caller is
    told "exists" of its own creation, or believes that somebody else's is its own."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, step_s=20)))
        await world.all_owned()
        await world.publish("work", "busy")
        await world.until(lambda: world.history.entered("busy"), "the slot is taken")
        world.broker.fail_next(subjects.create("main", "work", "one"), DROP_BEFORE if theirs else LOSE_ANSWER)
        creating = asyncio.ensure_future(world.client().create("work", 7, id="one", timeout="30 seconds"))
        await world.passes(1)
        if theirs:
            await world.publish("work", "one", nonce="theirs")
            with pytest.raises(InstanceExists):
                await creating
        else:
            await creating
        assert len(world.queued("work")) == 1, "the story needs it to be queued still"

    play(story, account=account(max_concurrent=1))


# -- rule 16: a negative answer ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("operation", ["status", "wait", "watch", "describe", "exists", "terminate"])
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
        with pytest.raises(OwnerAway, match=r"does not have workflow|did not answer in time"):
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


def test_an_owner_answers_when_it_has_taken_up_what_lives_there():
    """Closes: the new owner answers while its records of the interruptions are still on their way: a termination gets the
    number that an interruption has already, it is acknowledged, and the instance runs on."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=2))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s2"), "it is inside s2")
        a.kill()
        starting = asyncio.ensure_future(world.start_pod("a", app))
        await world.until(lambda: len(world.records(r.Claim)) == 2, "it is claimed again")
        world.broker.fail_next(subjects.journal("main", FIRST), DROP_BEFORE)
        handle = world.client().handle("work", "one")
        await handle.terminate()
        terminated = world.now
        await starting
        await world.passes(5)

        assert (await handle.status()).status == "terminated"
        assert world.history.entered("one", since=terminated) == []
        assert world.records(r.Interrupted)
        await world.quiet()
        check_all(world, "work", ["one"])

    play(story, account=account(stations=1))


def test_an_owner_that_cannot_read_the_queue_does_not_say_not_found():
    """Closes: the queue has no leader just now, the index does not know the id, and a queued instance is "not found"."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, step_s=5)))
        await world.all_owned()
        await world.publish("work", "busy")
        await world.until(lambda: world.history.entered("busy"), "the slot is taken")
        await world.publish("work", "one")
        world.broker.fail_next(LEADER_READ, "refuse:10008", times=5)
        answers = [await ask(world, operation, InstanceRequest("work", "one", nonce="x"))
                   for operation in ("status", "describe", "exists", "terminate", "watch")]

        assert [answer.code for answer in answers] == ["retry"] * 5
        assert (await world.client().handle("work", "one").status()).status == "queued"

    play(story, account=account(max_concurrent=1))


def test_an_owner_says_nothing_of_ids_that_belong_elsewhere():
    """Closes: a client with an old layout asks the wrong station, whose owner rightly has no such instance, and says so
    (rule 24): "moved" makes the client read the layout again."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.records(r.Ended), "it has ended")
        others = [station for station in world.stations() if station != world.station_of("one")]
        for operation in ("status", "describe", "exists", "terminate", "wait", "watch"):
            subject = subjects.station_request("main", others[0], operation)
            reply = await world.bus().request(subject, encode(InstanceRequest("work", "one"), json=False))
            assert msgspec.msgpack.decode(reply.data, type=Answer).code == "moved"

    play(story)


def test_a_pod_that_was_stopped_past_its_deadline_answers_nothing_of_before():
    """Closes: SIGSTOP with a question on its way, SIGCONT after the TTL: the answer is the first thing that the pod does,
    before it looks at its session, and tells of a station that is another's by now (rule 24)."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.records(r.Ended), "it has ended: a pod with a callback inside would end itself")
        a.pause()
        asking = asyncio.ensure_future(ask(world, "status", InstanceRequest("work", "one")))
        await world.passes(TTL_S + 2)
        a.resume()
        with pytest.raises(BusTimeout):
            await asking

    play(story)


# -- rule 17: a record always fits -------------------------------------------------------------------------------------

def returning_workflow(size: int, steps: int = 1):
    """Steps whose results have so many bytes; the output is the size, or what became of a step."""

    class Returning(Workflow[int, str], name="work"):
        async def run(self, event: WorkflowEvent[int], step: Step) -> str:
            try:
                results = [await step.do("large", large) for _ in range(steps)]
                return str(len(results[-1]))
            except StepFailed as error:
                return error.error_type

    async def large() -> bytes:
        return bytes(size)

    return Returning


@pytest.mark.parametrize(("over", "output"), [(-100, "fits"), (0, "toque.errors.PayloadTooLarge")])
def test_a_result_fits_into_a_message_of_a_server_with_the_default_max_payload(over, output):
    """Closes: a result of 1 MiB is within our own limit, and its record is more than one message of the server may have:
    the group is refused, the station lost and claimed again, the step entered again, without end."""

    async def story(world: World) -> None:
        world.broker.max_payload = SMALL
        size = SMALL - 16 * 1024 + over
        await world.start_pod("a", world.app(returning_workflow(size)))
        await world.all_owned()
        await world.publish("work", "one")

        assert await world.client().handle("work", "one").result(timeout="20 seconds") == output.replace("fits", str(size))
        assert len(world.records(r.Claim)) == world.account.stations
        check_all(world, "work", ["one"])

    play(story)


def test_an_output_fits_into_a_message_of_a_server_with_the_default_max_payload():
    """Closes: the same by the output of run()."""

    async def story(world: World) -> None:
        class Large(Workflow[int, bytes], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> bytes:
                return bytes(SMALL - 100)

        world.broker.max_payload = SMALL
        await world.start_pod("a", world.app(Large))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.records(r.Ended), "it has ended")

        assert world.records(r.Ended)[0].status is r.Status.ERRORED
        assert len(world.records(r.Claim)) == world.account.stations

    play(story)


def test_params_whose_record_would_not_fit_are_parked():
    """Closes: a plain creation of almost max_payload is accepted by the server; its record is larger than a message may
    be, and the station's head is stuck. It is parked, as far as that fits, and those behind it run."""

    async def story(world: World) -> None:
        world.broker.max_payload = SMALL
        await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        large, small = world.ids_at(FIRST, 2)
        await world.publish("work", large, b'"' + b"x" * (SMALL - 2) + b'"')
        await world.publish("work", small)
        await world.until(lambda: world.records(r.Ended), "the one behind it has ended")
        await world.until(lambda: world.records(r.Parked), "it is parked")
        await world.until(lambda: not world.queued("work"), "both have left the queue", timeout_s=30)

        assert "more than" in world.records(r.Parked)[0].reason
        assert len(world.parked()) == 1
        assert len(world.records(r.Claim)) == world.account.stations
        await world.quiet()
        check_once(world, "work", [small])

    play(story)


def test_groups_fit_into_a_message_of_a_server_with_a_small_max_payload():
    """Closes: records that fit one by one collect into a group of 512 KiB, which the server does not take."""

    async def story(world: World) -> None:
        world.broker.max_payload = SMALL // 4
        await world.start_pod("a", world.app(returning_workflow(100_000)))
        await world.all_owned()
        ids = [f"i{number}" for number in range(12)]
        for instance in ids:
            await world.publish("work", instance)
        await world.until(lambda: len(world.records(r.Ended)) == 12, "all have ended")

        assert len(world.records(r.Claim)) == world.account.stations
        check_all(world, "work", ids)

    play(story, account=account(stations=1))


def test_an_answer_that_no_message_can_carry_is_a_refusal():
    """Closes: the answer is larger than the server takes, sending it raises, and the caller asks again and again in vain."""

    async def story(world: World) -> None:
        world.broker.max_payload = SMALL // 4
        await world.start_pod("a", world.app(returning_workflow(100_000, steps=4)))
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        await world.until(lambda: world.records(r.Ended), "it has ended")

        with pytest.raises(ToqueError, match=r"the answer has .* bytes, and the server takes messages of 262144"):
            await handle.describe()
        assert (await handle.status()).status == "complete"

    play(story)
