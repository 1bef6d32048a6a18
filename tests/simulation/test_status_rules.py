"""What a status says of an instance that could go on and does not: whoever asks must not take it for one that is stuck."""

from __future__ import annotations

import pytest

from toque.client import InstanceStatus
from toque.sim.process import work_in_thread
from toque.sim.world import World, account, play, sleeper_workflow, steps_workflow
from toque.storage import records as r
from toque.workflow import Step, StepContext, Workflow, WorkflowEvent

ONE_SLOT = account(max_concurrent=1)


async def status_of(world: World, workflow: str, instance: str) -> InstanceStatus:
    """By asking for the one; its row in the list says the same."""
    client = world.client()
    status = await client.handle(workflow, instance).status()
    rows = [row async for row in client.list(workflow) if row.id == instance]
    assert [(row.status, row.blocked_on) for row in rows] in ([], [(status.status, status.blocked_on)])
    return status


async def busy(world: World, instance: str = "other") -> None:
    """The only slot is taken for ten seconds."""
    await world.publish("work", instance)
    await world.until(lambda: world.history.entered(instance), "the only slot is taken")


def test_a_woken_instance_without_a_slot_says_so():
    """Closes: its timer is due, every slot is taken, and it looks as if its timer had been forgotten."""

    async def story(world: World) -> None:
        app = world.app(sleeper_workflow(world, nap="5 seconds"), steps_workflow(world, steps=1, step_s=10.0))
        await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("nap", "one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        await world.passes(1)
        asleep = await status_of(world, "nap", "one")
        await busy(world)
        await world.passes(7)
        woken = await status_of(world, "nap", "one")

        assert (asleep.status, asleep.blocked_on) == ("waiting", "")
        assert (woken.status, woken.blocked_on) == ("waiting", "slot")
        assert await world.client().handle("nap", "one").result(timeout="30 seconds") is not None
        assert (await status_of(world, "nap", "one")).blocked_on == ""

    play(story, account=ONE_SLOT)


@pytest.mark.parametrize("operation", ["resume", "restart"])
def test_an_instance_that_is_to_go_on_without_a_slot_says_so(operation):
    """Closes: a resume or restart is acknowledged, and the status still says paused, or says running and nothing moves.
    It is said as soon as the call returns."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=2, step_s=10.0)))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one"), "it is inside")
        handle = world.client().handle("work", "one")
        await handle.pause()
        await world.passes(12)
        paused = await status_of(world, "work", "one")
        await busy(world)
        await (handle.resume() if operation == "resume" else handle.restart())
        at_once = await status_of(world, "work", "one")
        await world.passes(3)
        later = await status_of(world, "work", "one")

        assert (paused.status, paused.blocked_on) == ("paused", "")
        assert (at_once.status, at_once.blocked_on, at_once.run) == ("running", "slot", 1 + (operation == "restart"))
        assert (later.status, later.blocked_on) == ("running", "slot")
        await world.until(lambda: len(world.history.entered("one")) == 2, "it goes on")
        assert (await status_of(world, "work", "one")).blocked_on == ""

    play(story, account=ONE_SLOT)


def test_an_instance_that_was_taken_over_without_a_slot_says_so():
    """Closes: its pod died, the next owner has no slot for it yet, and it looks as if it ran."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=20.0))
        a = await world.start_pod("a", app)
        await world.all_owned()
        for instance in ("one", "two"):
            await world.publish("work", instance)
            await world.until(lambda instance=instance: world.history.entered(instance), "it is inside")
        await world.change_account(max_concurrent=1)
        a.kill()
        await world.start_pod("b", app)
        await world.all_owned()
        await world.until(lambda: [entry for name in ("one", "two") for entry in world.history.entered(name, pod="b")],
                          "one of them goes on")
        statuses = [await status_of(world, "work", instance) for instance in ("one", "two")]

        assert [status.status for status in statuses] == ["running", "running"]
        assert sorted(status.blocked_on for status in statuses) == ["", "slot"]

    play(story, account=account(max_concurrent=2))


def test_what_is_paused_while_it_waits_for_a_slot_does_not_say_that_it_does():
    """Closes: a woken instance stands in the line for a slot, is paused there, and shows as blocked on a slot."""

    async def story(world: World) -> None:
        app = world.app(sleeper_workflow(world, nap="5 seconds"), steps_workflow(world, steps=1, step_s=10.0))
        await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("nap", "one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        await busy(world)
        await world.passes(6)
        await world.client().handle("nap", "one").pause()
        status = await status_of(world, "nap", "one")

        assert (status.status, status.blocked_on) == ("paused", "")

    play(story, account=ONE_SLOT)


@pytest.mark.parametrize("operation", ["pause", "restart"])
def test_what_an_operation_has_done_is_seen_when_it_returns(operation):
    """Closes: the pause of an instance that is not in memory is acknowledged, its record is not folded yet, and its status
    is read from the index."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(sleeper_workflow(world, nap="1 hour")))
        await world.all_owned()
        await world.publish("nap", "one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        await world.quiet()
        a.store._delay_s = 2.0
        handle = world.client().handle("nap", "one")
        await (handle.pause() if operation == "pause" else handle.restart())
        status = await handle.status()

        if operation == "pause":
            assert (status.status, status.run) == ("paused", 1)
        else:
            assert status.run == 2

    play(story)


def test_a_restarted_instance_is_not_what_the_run_before_was():
    """Closes: a thread of the run before is still inside, so its engine is in memory, and its pause shows as the status."""

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
        await handle.pause()
        before = await status_of(world, "work", "one")
        await handle.restart()
        after = await status_of(world, "work", "one")

        assert (before.status, before.run) == ("waitingForPause", 1)
        assert (after.status, after.run) == ("running", 2)
        await handle.result(timeout="1 minute")

    play(story)
