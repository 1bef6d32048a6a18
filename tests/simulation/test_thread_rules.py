"""Sync callbacks in a pod: a thread cannot be stopped, so what it brings late must change nothing (rules 7 and 18)."""

from __future__ import annotations

from toque.sim.process import work_in_thread
from toque.sim.world import World, play
from toque.storage import records as r
from toque.workflow import Retries, Step, StepContext, Workflow, WorkflowEvent

THREAD_S = 60.0
RETRIES = Retries(limit=1, delay="1 second", jitter=False)


def hanging_workflow(world: World) -> type[Workflow[int, str]]:
    """One step in a thread, with a time-out of ten seconds; it tells which attempt it was."""

    class Hanging(Workflow[int, str], name="work"):
        async def run(self, event: WorkflowEvent[int], step: Step) -> str:
            return await step.do("s1", hanging, retries=RETRIES, timeout="10 seconds")

    def hanging(ctx: StepContext) -> str:
        with world.history.inside(ctx):
            work_in_thread(THREAD_S if ctx.attempt == 1 else 0.0)
            return f"attempt {ctx.attempt}"

    return Hanging


def test_the_late_result_of_a_timed_out_thread_is_refused():
    """Closes: attempt 1 times out, attempt 2 is entered, attempt 1's thread returns and its result is recorded."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(hanging_workflow(world)))
        await world.all_owned()
        handle = await world.client().create("work", 1, id="one")
        await world.until(lambda: a.callbacks.threads_abandoned == 1, "attempt 1 has timed out")
        assert (a.callbacks.threads_taken, world.history.times("one", "s1")) == (1, 1)
        assert await handle.result() == "attempt 2"
        await world.until(lambda: a.callbacks.threads_taken == 0, "attempt 1 has returned", timeout_s=2 * THREAD_S)
        await world.quiet()

        assert a.callbacks.threads_abandoned == 0
        assert [record.attempt for record in world.records(r.AttemptFailed)] == [1]
        assert [record.attempt for record in world.records(r.StepDone)] == [2]
        assert await handle.result() == "attempt 2"

    play(story)
