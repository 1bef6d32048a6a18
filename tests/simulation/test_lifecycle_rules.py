"""Pause, resume, restart, delete and retention: an acknowledged one holds, whatever happens (protocol rules 12, 15, 22)."""

from __future__ import annotations

import asyncio

import pytest

from toque._subjects import journal_stream
from toque.client import StepRef
from toque.errors import InstanceEnded, InstanceExists, InstanceNotFound, OwnerAway, StepNotFound
from toque.sim.checks import check_all, check_steps
from toque.sim.process import work_in_thread
from toque.sim.world import World, account, play, sleeper_workflow, steps_workflow
from toque.storage import records as r
from toque.workflow import Retention, Step, StepContext, Workflow, WorkflowEvent

TOMBSTONE_S = 600


async def status_of(world: World, workflow: str, instance: str) -> str:
    return (await world.client().handle(workflow, instance).status()).status


# -- pause and resume --------------------------------------------------------------------------------------------------

def test_a_pause_lets_callbacks_finish_and_enters_nothing_more():
    """Closes: between the pause's record and its answer the next callback is entered; or the one inside is cut."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=3, step_s=2.0)))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s1"), "it is inside s1")
        handle = world.client().handle("work", "one")

        await handle.pause()
        assert await status_of(world, "work", "one") == "waitingForPause"
        await world.passes(4)
        assert await status_of(world, "work", "one") == "paused"
        assert world.history.times("one", "s2") == 0
        assert len(world.records(r.StepDone)) == 1

        await handle.resume()
        assert await handle.result() is not None
        assert [world.history.times("one", f"s{number}") for number in (1, 2, 3)] == [1, 1, 1]
        await world.quiet()
        check_all(world, "work", ["one"])

    play(story)


def test_a_paused_instance_holds_no_slot():
    """Closes: paused instances use up the account's limit (L4)."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=2, step_s=1.0)))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s1"), "it is inside s1")
        await world.client().handle("work", "one").pause()
        await world.publish("work", "two")

        assert await world.client().handle("work", "two").result() is not None
        assert await status_of(world, "work", "one") == "paused"

    play(story, account=account(max_concurrent=1))


def test_a_pause_holds_while_the_owner_dies():
    """Closes: the next owner of a running instance lets it go on, though its pause was acknowledged (V3)."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world, steps=2, step_s=5.0)))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s1"), "it is inside s1")
        await world.client().handle("work", "one").pause()
        a.kill()
        await world.start_pod("b", world.app(steps_workflow(world, steps=2, step_s=5.0)))
        await world.all_owned()
        await world.until(lambda: world.records(r.Paused), "its pause is recorded")
        await world.passes(20)

        assert await status_of(world, "work", "one") == "paused"
        assert world.history.entered("one", pod="b") == []
        await world.client().handle("work", "one").resume()
        assert await world.client().handle("work", "one").result() is not None
        await world.quiet()
        check_steps(world)

    play(story)


def test_timers_stand_still_while_it_is_paused():
    """Closes: a sleep goes on behind a pause, and is over at its end. It is moved by the pause's length, also over a death
    of the owner before and behind the resume."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(sleeper_workflow(world, nap="30 seconds")))
        await world.all_owned()
        begun = world.now
        await world.publish("nap", "one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        await world.passes(10)
        await world.client().handle("nap", "one").pause()
        a.kill()
        b = await world.start_pod("b", world.app(sleeper_workflow(world, nap="30 seconds")))
        await world.passes(100)
        assert await status_of(world, "nap", "one") == "paused"
        paused_s = world.records(r.Paused)[0].at
        await world.client().handle("nap", "one").resume()
        shift_s = (world.records(r.Resumed)[0].at - paused_s) / 1000
        assert world.records(r.Resumed)[0].shift_ms == pytest.approx(shift_s * 1000, abs=5)
        b.kill()
        await world.start_pod("c", world.app(sleeper_workflow(world, nap="30 seconds")))
        await world.client().handle("nap", "one").result()

        assert world.now - begun >= 30 + shift_s
        assert world.now - begun < 30 + shift_s + 3

    play(story)


def test_a_repeated_request_gets_the_first_answer_and_does_nothing():
    """Closes: the answer to a pause is lost, the instance is resumed, and the repeat of the pause stops it again
    (protocol rule 22), at this owner or the next one."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(sleeper_workflow(world, nap="1 hour")))
        await world.all_owned()
        await world.publish("nap", "one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        first = await world.ask("pause", "nap", "one", request="q-1")
        await world.client().handle("nap", "one").resume()
        again = await world.ask("pause", "nap", "one", request="q-1")
        a.kill()
        await world.start_pod("b", world.app(sleeper_workflow(world, nap="1 hour")))
        await world.all_owned()
        later = await world.ask("pause", "nap", "one", request="q-1")

        assert [first.code, again.code, later.code] == ["ok"] * 3
        assert len(world.records(r.Paused)) == 1
        assert await status_of(world, "nap", "one") in ("running", "waiting")

    play(story)


def test_a_queued_instance_can_be_paused_before_it_begins():
    """Closes: the operation finds no record and says "not found", or the instance begins all the same (rule 12)."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=1, step_s=3.0)))
        await world.all_owned()
        await world.publish("work", "first")
        await world.until(lambda: world.history.entered("first"), "the only slot is taken")
        await world.publish("work", "one")
        await world.client().handle("work", "one").pause()
        await world.client().handle("work", "first").result()
        await world.passes(5)

        assert await status_of(world, "work", "one") == "paused"
        assert world.history.entered("one") == []
        await world.client().handle("work", "one").resume()
        await world.client().handle("work", "one").result()
        assert world.history.times("one", "s1") == 1
        await world.quiet()
        check_all(world, "work", ["first", "one"])

    play(story, account=account(max_concurrent=1))


def test_a_resume_before_the_pause_is_there_takes_it_back():
    """Closes: a callback is inside, the pause that was asked for is taken back, and the instance stands still for ever."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=3, step_s=2.0)))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s1"), "it is inside s1")
        handle = world.client().handle("work", "one")
        await handle.pause()
        await handle.resume()
        await handle.result(timeout="30 seconds")

        assert not world.records(r.Paused)
        assert [world.history.times("one", f"s{number}") for number in (1, 2, 3)] == [1, 1, 1]

    play(story)


# -- restart -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("moment", ["running", "ended", "paused", "dead owner"])
def test_a_restart_begins_another_run_from_the_start(moment):
    """Closes: results of the run before are handed out, or its late callback counts. Every step is entered again, once."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=1.0))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s2"), "it is inside s2")
        handle = world.client().handle("work", "one")
        if moment == "ended":
            await handle.result()
        if moment == "paused":
            await handle.pause()
            await world.passes(3)
        await handle.restart()
        if moment == "dead owner":
            a.kill()
            await world.start_pod("b", app)
        await handle.result()

        status = await handle.status()
        assert (status.status, status.run) == ("complete", 2)
        assert len({done.name for done in world.records(r.StepDone) if done.run == 2}) == 3
        assert [step.status for step in (await handle.describe()).steps] == ["complete"] * 3

    play(story)


def test_a_restart_from_a_step_keeps_what_began_before_it():
    """Closes: steps before the named one are entered again, or the named one is not."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world, steps=3, step_s=0.5)))
        await world.all_owned()
        await world.publish("work", "one")
        handle = world.client().handle("work", "one")
        await handle.result()
        await handle.restart(from_=StepRef("s2"))
        await world.until(lambda: len(world.records(r.StepDone)) == 4, "s2 is done again")
        await a.stop()
        await world.start_pod("b", world.app(steps_workflow(world, steps=3, step_s=0.5)))
        await handle.result()

        assert [world.history.times("one", f"s{number}") for number in (1, 2, 3)] == [1, 2, 2]
        with pytest.raises(StepNotFound, match="s9"):
            await handle.restart(from_=StepRef("s9"))
        assert await handle.result() is not None

    play(story)


def test_a_thread_of_the_run_before_is_out_before_the_next_one_begins():
    """Closes: a thread cannot be cut, and the new run enters the same step beside it, above the limit."""

    async def story(world: World) -> None:
        class Threaded(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                return await step.do("s1", blocking)

        def blocking(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                work_in_thread(6.0)
                return 7

        await world.start_pod("a", world.app(Threaded))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one"), "it is inside")
        handle = world.client().handle("work", "one")
        await handle.restart()
        await handle.result(timeout="1 minute")

        first, second = world.history.entries
        assert first.left_at is not None
        assert second.entered_at >= first.left_at

    play(story)


def test_a_restart_that_a_pod_cannot_make_leaves_nothing_in_memory():
    """Closes: a pod without the workflow reads the instance back, cannot restart it, and keeps it in memory: a paused one
    is out of reach from then on."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(sleeper_workflow(world, nap="1 hour")))
        await world.all_owned()
        await world.publish("nap", "one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        handle = world.client().handle("nap", "one")
        await handle.pause()
        await a.stop()
        await world.start_pod("b", world.app(steps_workflow(world)))
        await world.all_owned()
        with pytest.raises(OwnerAway):
            await handle.restart(timeout="3 seconds")

        await world.quiet()
        await handle.terminate()

    play(story)


# -- delete and retention ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("moment", ["queued", "running", "asleep", "ended"])
def test_a_deleted_instance_is_gone_and_its_id_is_free(moment):
    """Closes: something of it goes on, or shows; or a creation of its id is taken for the old one."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=2.0), sleeper_workflow(world, nap="1 hour"))
        a = await world.start_pod("a", app)
        await world.all_owned()
        client = world.client()
        name = "nap" if moment == "asleep" else "work"
        if moment == "queued":
            await world.publish("work", "first")
            await world.until(lambda: world.history.entered("first"), "the only slot is taken")
        handle = await client.create(name, 1, id="one")
        if moment == "running":
            await world.until(lambda: world.history.entered("one"), "it is inside")
        if moment == "asleep":
            await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        if moment == "ended":
            await handle.result()
        entered = len(world.history.entered("one"))
        await handle.delete()

        with pytest.raises(InstanceNotFound):
            await handle.status()
        await world.passes(10)
        assert len(world.history.entered("one")) == entered
        for pod in ("a", "b"):
            if pod == "b":
                a.kill()
                await world.start_pod("b", app)
                await world.all_owned()
            with pytest.raises(InstanceNotFound):
                await handle.status()
        again = await client.create("work", 2, id="one")
        await again.result()
        assert world.history.times("one", "s2") == (2 if moment == "ended" else 1)

    play(story, account=account(max_concurrent=1))


def test_a_late_attempt_of_a_deleted_creation_is_dropped():
    """Closes: a creation is published twice, its instance ends and is deleted, and the second message makes another one
    (protocol rule 15). A creation of another nonce is a new one; one without a nonce is parked."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=1, step_s=0.1)))
        await world.all_owned()
        await world.publish("work", "one", nonce="n-1")
        handle = world.client().handle("work", "one")
        await handle.result()
        await handle.delete()
        await world.passes(15)  # the first message is purged

        await world.publish("work", "one", nonce="n-1")
        await world.passes(5)
        with pytest.raises(InstanceNotFound):
            await handle.status()
        await world.publish("work", "one", nonce="")
        await world.until(lambda: world.records(r.Parked), "it is parked")
        await world.passes(15)  # and purged
        await world.publish("work", "one", nonce="n-2")
        await handle.result()
        assert world.history.times("one", "s1") == 2

        await handle.delete()
        await world.passes(TOMBSTONE_S + 10)
        await world.publish("work", "one", nonce="n-2")
        await handle.result()

    play(story, account=account(tombstones_s=TOMBSTONE_S))


def test_what_has_ended_is_deleted_when_its_retention_is_over():
    """Closes: ended instances are kept for ever, or not as long as was asked for. As long after a success as its workflow
    says, after an error as its creation says, at whichever owner."""

    async def story(world: World) -> None:
        class Kept(Workflow[int, int], name="kept", retention=Retention(success="1 minute", error="10 minutes")):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                return 1 // event.payload

        a = await world.start_pod("a", world.app(Kept))
        await world.all_owned()
        client = world.client()
        good, bad = await client.create(Kept, 1, id="good"), await client.create(Kept, 0, id="bad")
        short = await client.create(Kept, 0, id="short", retention=Retention(success="1 hour", error="2 minutes"))
        await good.result()
        await world.passes(50)
        assert [row.id async for row in client.list("kept")] == ["good", "bad", "short"]
        a.kill()
        await world.start_pod("b", world.app(Kept))
        await world.passes(20)
        assert [row.id async for row in client.list("kept")] == ["bad", "short"]
        await world.passes(60)
        assert [row.id async for row in client.list("kept")] == ["bad"]
        await world.passes(600)
        assert [row.id async for row in client.list("kept")] == []
        for handle in (good, bad, short):
            with pytest.raises(InstanceNotFound):
                await handle.status()

    play(story)


def test_a_creation_that_comes_while_the_old_instance_is_deleted_is_not_lost():
    """Closes: the creation is read between the deletion's acceptance and its fold, dropped as known, and C1 broken."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world, steps=1, step_s=0.1)))
        await world.all_owned()
        client = world.client()
        handle = await client.create("work", 1, id="one")
        await handle.result()
        await world.passes(15)  # its message is purged
        a.store._delay_s = 3.0
        deleting = asyncio.ensure_future(handle.delete())
        await world.until(lambda: world.records(r.Deleted), "it is deleted, and not folded yet")
        await world.publish("work", "one", nonce="n-2")
        await deleting
        await world.until(lambda: world.history.times("one", "s1") == 2, "the new one has run")

    play(story)


def test_an_operation_whose_answer_is_lost_is_done_once():
    """Closes: a delete lands, its answer is lost, somebody creates the id anew, and the repeat deletes that one too."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=1, step_s=0.1)))
        await world.all_owned()
        client = world.client()
        handle = await client.create("work", 1, id="one")
        await handle.result()
        assert (await world.ask("delete", "work", "one", request="q-1")).code == "ok"
        again = await client.create("work", 2, id="one")
        await again.result()
        assert (await world.ask("delete", "work", "one", request="q-1")).code == "ok"

        assert (await again.status()).status == "complete"
        with pytest.raises(InstanceExists):
            await client.create("work", 3, id="one")

    play(story)


@pytest.mark.parametrize("operation", ["pause", "resume"])
def test_an_ended_instance_cannot_be_paused_or_resumed(operation):
    """Closes: an answer that says ok, and nothing holds. The error says what it is."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=1, step_s=0.1)))
        await world.all_owned()
        handle = await world.client().create("work", 1, id="one")
        await handle.result()

        with pytest.raises(InstanceEnded, match="complete"):
            await getattr(handle, operation)()

    play(story)


# -- what clients are told ---------------------------------------------------------------------------------------------

def test_a_creation_that_was_refused_never_runs_when_the_instance_is_deleted():
    """Closes: a creator hears that the id exists, the instance is deleted and its owner dies: the next owner finds the
    refused creation in the queue still, and runs it."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=0.1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        client = world.client()
        handle = await client.create("work", 1, id="one")
        await handle.result()
        await world.until(lambda: not world.queued("work"), "its message is purged")
        with pytest.raises(InstanceExists):
            await client.create("work", 2, id="one")
        await handle.delete()
        a.kill()
        await world.start_pod("b", app)
        await world.all_owned()
        await world.passes(5)

        with pytest.raises(InstanceNotFound):
            await handle.status()
        assert len(world.records(r.Admitted)) == 1
        assert await (await client.create("work", 3, id="one")).result() == 3

    play(story)


def test_a_creation_that_was_deleted_meanwhile_was_no_repeat():
    """Closes: an instance is created, deleted and created by another before its first creator asks whether it was there:
    that hears that the id existed before, and yet his creation had been run."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=1)))
        await world.all_owned()
        await world.publish("work", "one", nonce="n-1")
        handle = world.client().handle("work", "one")
        await handle.result()
        await handle.delete()
        assert (await world.ask("exists", "work", "one", nonce="n-1")).code == "ok"
        await world.until(lambda: not world.queued("work"), "its message is purged")
        await world.publish("work", "one", nonce="n-2")
        await handle.result()

        assert [(await world.ask("exists", "work", "one", nonce=nonce)).code for nonce in ("n-1", "n-2", "n-3")] == [
            "ok", "ok", "exists"]

    play(story)


def test_an_acknowledged_pause_shows_while_the_last_result_is_on_its_way():
    """Closes: the pause is acknowledged, the callback comes out while the journal takes no writes, and the instance is said
    to be running again (S1)."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=2, step_s=2.0)))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s1"), "it is inside s1")
        await world.client().handle("work", "one").pause()
        world.broker.freeze_stream(journal_stream("main"))
        await world.until(lambda: world.history.entered("one")[0].left_at, "it has left s1")
        await world.passes(0.1)

        assert await status_of(world, "work", "one") == "waitingForPause"

    play(story)


def test_a_creation_that_met_an_instance_which_is_deleted_now_is_told_so():
    """Closes: it is stored while the old instance is there, that is deleted, and both creations leave the queue: its creator
    is told "not found" until it gives up, and does not know that it never ran (rule 14)."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=1, step_s=0.1)))
        await world.all_owned()
        handle = await world.client().create("work", 1, id="one")
        await handle.result()
        await world.passes(15)  # its message is purged
        await world.publish("work", "one", nonce="n-2")
        await world.passes(1)
        await handle.delete()

        asked = await world.ask("exists", "work", "one", nonce="n-2")
        assert asked.code == "exists"
        assert "deleted since" in asked.message
        await world.passes(20)
        assert world.history.times("one", "s1") == 1

    play(story)


def test_an_instance_is_there_until_its_deletion_is_accepted():
    """Closes: an event hears "not found" while the deletion is on its way, the deletion never lands, and the instance goes
    on (protocol rule 16)."""

    async def story(world: World) -> None:
        app = world.app(sleeper_workflow(world, nap="1 hour"))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("nap", "one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        handle = world.client().handle("nap", "one")
        world.broker.freeze_stream(journal_stream("main"))
        deleting = asyncio.ensure_future(handle.delete(timeout="2 seconds"))
        await world.passes(0.5)
        with pytest.raises(OwnerAway):
            await handle.send_event("a", 1, timeout="1 second")
        with pytest.raises(OwnerAway):
            await deleting
        a.kill()

    play(story)
