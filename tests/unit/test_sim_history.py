"""The history of a simulated account, in the format of real runs."""

from __future__ import annotations

import pytest

from toque.chaos.ledger_checks import check_c1, check_e3, check_ledger
from toque.chaos.pairing import pair
from toque.sim.checks import check_steps
from toque.sim.process import work_in_thread
from toque.sim.world import World, account, play, steps_workflow
from toque.workflow import Step, StepContext, Workflow, WorkflowEvent


def test_the_ledger_of_a_story_is_that_of_a_real_run() -> None:
    """Enters and exits pair, a killed process cuts what was inside, and the checkers of real runs read it."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        client = world.client()
        with world.history.operations.recording("create", "work", "one"):
            handle = await client.create("work", 7, id="one")
        await world.until(lambda: world.history.entered("one", "s2"), "s2 was entered")
        a.kill()
        await world.start_pod("a", app)
        with world.history.operations.recording("result", "work", "one") as op:
            op.value, op.status = str(await handle.result()), "complete"

        ledger = pair(world.history.ledger)
        assert [(visit.step, visit.attempt, visit.outcome) for visit in ledger.visits] == [
            ("s1", 1, "ok"), ("s2", 1, "cut"), ("s2", 2, "ok")]
        assert len({visit.pid for visit in ledger.visits}) == 2
        assert check_ledger(ledger).holds
        assert check_e3(ledger).holds
        assert check_c1(world.history.ops, {}).holds

    play(story)


def test_a_thread_is_inside_for_as_long_as_it_works() -> None:
    """Its exit stands in the ledger when the thread ends, not when the simulator ran it."""

    async def story(world: World) -> None:
        class Threaded(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                return await step.do("s1", working)

        def working(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                work_in_thread(3.0)
                return 7

        await world.start_pod("a", world.app(Threaded))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entries and world.history.entries[0].left_at, "it has left")

        (visit,) = pair(world.history.ledger).visits
        assert visit.left_ns - visit.entered_ns == 3_000_000_000
        await world.quiet()

    play(story, account=account(stations=1))


def test_a_callback_outside_of_any_living_pod_is_found_though_its_step_is_tried_again() -> None:
    """What is raised in a callback fails its attempt, and nobody else hears of it."""

    async def story(world: World) -> None:
        ctx = StepContext(name="s1", count=1, attempt=1, idempotency_key="k", instance_id="one", workflow_name="work")
        with pytest.raises(AssertionError), world.history.inside(ctx):
            pass

        with pytest.raises(AssertionError, match="work/one s1 ran outside of any living pod"):
            check_steps(world)

    play(story)
