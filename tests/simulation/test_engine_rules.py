"""What an instance may do, and when: replay, commit before consequence, interruptions (protocol rules 18 to 21 and 26)."""

from __future__ import annotations

import asyncio

import pytest

from toque import _subjects as subjects
from toque._app import App
from toque._subjects import StationId
from toque.errors import StepFailed
from toque.sim.checks import check_all, check_steps
from toque.sim.node import PodNode
from toque.sim.process import Process, State
from toque.sim.world import TTL_S, World, account, play, reporting, sleeper_workflow, steps_workflow
from toque.storage import records as r
from toque.storage.memory_broker import DELAY, DROP_BEFORE
from toque.workers.engine import INTERRUPTIONS_MAX, Engine
from toque.workflow import Retries, Step, StepContext, Workflow, WorkflowEvent

FIRST = StationId(1, 0)
JOURNAL = "toque.main.journal.>"


def journal_of(world: World, instance: str) -> str:
    return subjects.journal("main", world.station_of(instance))


# -- rule 18: replay ---------------------------------------------------------------------------------------------------

def branches_workflow(world: World):
    """Two branches whose steps have the same names; each returns what its own callbacks said."""

    class Branches(Workflow[int, list[list[str]]], name="work"):
        async def run(self, event: WorkflowEvent[int], step: Step) -> list[list[str]]:
            async def branch(name: str) -> list[str]:
                return [await step.do("same", said, f"{name}{number}") for number in range(4)]

            return list(await asyncio.gather(branch("a"), branch("b")))

    async def said(ctx: StepContext, words: str) -> str:
        with world.history.inside(ctx):
            await asyncio.sleep(world.rng.uniform(0.05, 0.6))
        return words

    return Branches


@pytest.mark.parametrize("seed", range(5))
def test_branches_keep_their_own_results_over_a_crash(seed):
    """Closes: `gather(a, b)` with equal step names: after a crash each branch gets the other's result, because results
    are handed out in another order than they came in, or two at a time."""

    async def story(world: World) -> None:
        app = world.app(branches_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        ids = [f"i{number}" for number in range(6)]
        for instance in ids:
            await world.publish("work", instance)
        for _ in range(4):
            await world.passes(world.rng.uniform(0.2, 1.0))
            a.kill()
            a = await world.start_pod("a", app)
        await world.until(lambda: len(world.records(r.Ended)) == 6, "all have ended")

        expected = [[f"{name}{number}" for number in range(4)] for name in "ab"]
        for instance in ids:
            assert await world.client().handle("work", instance).result() == expected
        await world.quiet()
        check_all(world, "work", ids)

    play(story, seed=seed)


def test_results_that_come_together_are_handed_out_one_at_a_time():
    """Closes: two results of one moment are given to run() together: it opens its next steps in an order that no replay
    can repeat. Both are recorded while nothing may be handed out yet (the instance was interrupted at this position)."""

    async def story(world: World) -> None:
        seen: list[list[str]] = []

        class Racing(Workflow[int, list[str]], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> list[str]:
                order: list[str] = []
                seen.append(order)

                async def branch(name: str) -> None:
                    await step.do(name, reporting(world, 1, 1.0))
                    order.append(f"{name} began")
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                    order.append(f"{name} went on")
                    await step.do("next", reporting(world, 1, 0.5))

                await asyncio.gather(branch("left"), branch("right"))
                return order

        app = world.app(Racing)
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: len(world.history.entries) == 2, "both are inside")
        a.kill()
        a = await world.start_pod("a", app)
        await world.until(lambda: len(world.history.entered(step="next")) == 2, "both are recorded, both go on")
        a.kill()
        await world.start_pod("a", app)
        await world.until(lambda: world.records(r.Ended), "it has ended")

        assert seen[1] == seen[2]
        assert [line.split()[0] for line in seen[2]] in (["left"] * 2 + ["right"] * 2, ["right"] * 2 + ["left"] * 2)
        check_all(world, "work", ["one"])

    play(story)


def renamed_workflow(world: World):
    """`steps_workflow` of two steps, after somebody has renamed the first."""

    class Renamed(Workflow[int, int], name="work"):
        async def run(self, event: WorkflowEvent[int], step: Step) -> int:
            await step.do("renamed", reporting(world, 1, 0.5))
            await step.do("s2", reporting(world, 1, 0.5))
            return event.payload

    return Renamed


def test_changed_code_holds_its_instances_and_the_old_code_heals_them():
    """Closes: a deploy that changes a live instance's steps fails it, or runs its steps again under other names. It is
    held, says which step was expected and which was found, and goes on when the old code is back."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=0.5))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s2"), "s1 is recorded")
        a.kill()
        a = await world.start_pod("a", world.app(renamed_workflow(world)))
        await world.until(lambda: world.records(r.Blocked), "it is held")
        await world.quiet()
        status = await world.client().handle("work", "one").status()

        assert status.status == "running"
        assert status.blocked_on.startswith("code: ")
        assert "do('s1', occurrence 1)" in status.blocked_on
        assert "do('renamed', occurrence 1)" in status.blocked_on
        assert not world.history.entered("one", "renamed")
        a.kill()
        await world.start_pod("a", app)
        assert await world.client().handle("work", "one").result() == 7
        assert [world.history.times("one", step) for step in ("s1", "s2")] == [1, 2]
        assert (await world.client().handle("work", "one").status()).blocked_on == ""
        await world.quiet()

    play(story)


def test_changed_code_holds_an_instance_whose_wait_is_gone():
    """Closes: the code loses a wait that an instance is in: woken, it runs ahead of what the journal holds."""

    async def story(world: World) -> None:
        app = world.app(sleeper_workflow(world, "work", nap="30 seconds"))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        a.kill()

        class Sleepless(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                await step.do("before", reporting(world, 1, 0.1))
                return await step.do("after", reporting(world, 1, 0.1))

        a = await world.start_pod("a", world.app(Sleepless))
        await world.until(lambda: world.records(r.Blocked), "it is held")
        assert "sleep('nap', occurrence 1)" in world.records(r.Blocked)[0].reason
        assert world.history.times("one", "after") == 0
        a.kill()
        await world.start_pod("a", app)
        assert await world.client().handle("work", "one").result() == 7

    play(story)


# -- rule 18: commit before consequence --------------------------------------------------------------------------------

def test_run_is_entered_after_the_acceptance_of_the_creation():
    """Closes: run() of an instance is entered that the journal does not know: whatever it does to its pod, nobody will
    count. The first group is on its way for a second; run() waits for it."""

    async def story(world: World) -> None:
        admitted: list[int] = []

        class Looking(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                admitted.append(len(world.records(r.Admitted)))
                return event.payload

        await world.start_pod("a", world.app(Looking))
        await world.all_owned()
        world.broker.fail_next(journal_of(world, "one"), DROP_BEFORE)
        await world.publish("work", "one")
        await world.until(lambda: world.records(r.Ended), "it has ended")

        assert admitted == [1]

    play(story)


def test_a_gate_that_closes_while_a_record_is_on_its_way_keeps_the_callback_out():
    """Closes: the gates are read, then the record of the step before is waited for, then the callback is entered: at a
    station whose owner has begun to hand it over meanwhile."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.start_pod("b", app)
        await world.until(lambda: world.history.entered("one"), "it is inside s1")
        world.broker.fail_next(journal_of(world, "one"), DELAY, delay_s=1.0)
        await world.until(lambda: world.history.entries[0].left_at, "s1 has returned; its record is on its way")
        assert not world.records(r.StepDone)
        await a.stop()
        await world.until(lambda: world.records(r.Ended), "it has ended")

        assert [(entry.step, entry.pod) for entry in world.history.entries] == [("s1", "a"), ("s2", "b"), ("s3", "b")]

    play(story, account=account(stations=1))


def test_a_pod_that_was_stopped_past_its_deadline_enters_nothing_when_it_goes_on():
    """Closes: SIGSTOP while a record is on its way, SIGCONT after the TTL: the acceptance is the first thing that the pod
    hears, before it looks at its session, and it enters the next callback beside the new owner."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one"), "it is inside s1")
        world.broker.fail_next(journal_of(world, "one"), DELAY, delay_s=0.5)
        await world.until(lambda: world.history.entries[0].left_at, "s1 has returned; its record is on its way")
        a.pause()
        await world.until(lambda: world.records(r.StepDone), "the record has landed")
        await world.passes(TTL_S + 1)
        resumed = world.now
        a.resume()
        await world.passes(0.05)

        assert world.history.entered(pod="a", since=resumed) == []
        await world.until(lambda: world.records(r.Ended), "it has ended")
        check_all(world, "work", ["one"])

    play(story)


def stopped_at_the_gate(world: World, a: PodNode) -> None:
    """Stop the pod in the moment after its gates were read for the next callback, before the callback's first step."""
    held = a.pod.ownership.stations[world.station_of("one")]
    may_enter = held.may_enter

    def read_and_stop(engine: Engine) -> bool:
        held.may_enter = may_enter
        a.pause()
        return may_enter(engine)

    held.may_enter = read_and_stop


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_pod_that_was_stopped_between_the_gates_and_the_entry_enters_nothing(kind):
    """Closes: the gates are read, the process is stopped before the callback's task or thread has begun, and goes on
    after the TTL: the callback is entered beside the new owner's."""

    async def story(world: World) -> None:
        entered: list[tuple[str, float]] = []

        def note() -> int:
            process = Process.current()
            assert process is not None
            entered.append((process.name, world.now))
            return 1

        async def note_async() -> int:
            return note()

        class Noting(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                return await step.do("s1", note_async if kind == "async" else note)

        app = world.app(Noting)
        a = await world.start_pod("a", app)
        await world.all_owned()
        stopped_at_the_gate(world, a)
        await world.publish("work", "one")
        await world.until(lambda: a.process.state is State.PAUSED, "it is stopped")
        await world.start_pod("b", app)
        await world.until(lambda: world.records(r.Ended), "b has brought it to its end")
        a.resume()
        await world.passes(1)

        assert [pod for pod, _ in entered] == ["b"]

    play(story)


def test_nothing_is_recorded_behind_a_termination_that_is_on_its_way():
    """Closes: the termination counts when it is accepted: a callback that returns before that is recorded behind the end,
    and run() goes on with its result. Or it is answered before it is accepted, or its repeat is, and a crash undoes it."""

    async def story(world: World) -> None:
        went_on: list[str] = []

        class Watched(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                await step.do("s1", reporting(world, 1, 1.0))
                went_on.append("after s1")
                return await step.do("s2", reporting(world, 1, 1.0))

        await world.start_pod("a", world.app(Watched))
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one"), "it is inside s1")
        world.broker.fail_next(journal_of(world, "one"), DELAY, delay_s=1.8)

        async def ended_when_answered() -> int:
            await world.client().handle("work", "one").terminate()
            return len(world.records(r.Ended))

        assert await asyncio.gather(ended_when_answered(), ended_when_answered()) == [1, 1]
        await world.passes(3)

        last = [record for group in world.journal(world.station_of("one")) for record in group.records if record.serial]
        assert isinstance(last[-1], r.Ended)
        assert went_on == []
        assert world.history.times("one", "s2") == 0
        await world.quiet()

    play(story)


def test_an_interrupted_instance_gets_its_result_after_the_acceptance():
    """Closes: run() kills its pod on a step's result, which was handed to it before the record was accepted: the step is
    entered again with each life. After the first interruption run() waits for its progress; ten without any hold it."""

    async def story(world: World) -> None:
        class Killing(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                await step.do("s1", reporting(world, 1, 0.1))
                process = Process.current()
                assert process is not None
                process.state = State.DEAD  # a segmentation fault, say: nothing of what is pending leaves
                return await step.do("s2", reporting(world, 1, 0.1))

        app = world.app(Killing)
        await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        for _ in range(2 * INTERRUPTIONS_MAX):
            await world.until(lambda: not world.living or world.records(r.Blocked), "its pod has died, or it is held")
            if world.living:
                break
            world.nodes[-1].kill()
            await world.start_pod("a", app)

        assert world.history.times("one", "s1") == 2
        assert world.history.times("one", "s2") == 0
        assert len(world.records(r.Interrupted)) == 1 + INTERRUPTIONS_MAX
        status = await world.client().handle("work", "one").status()
        assert status.blocked_on.startswith(f"interrupted {INTERRUPTIONS_MAX} times")
        await world.quiet()

    play(story)


def test_run_gets_the_value_that_the_journal_holds():
    """Closes: run() goes on with an object that only its own process has: after a crash it gets another one, and takes
    another way. A tuple becomes a list, live as on replay."""

    async def story(world: World) -> None:
        seen: list[str] = []

        async def pair() -> object:
            return (1, 2)

        class Telling(Workflow[int, str], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> str:
                value = await step.do("pair", pair)
                seen.append(type(value).__name__)
                await step.do("s2", reporting(world, 1, 1))
                return type(value).__name__

        app = world.app(Telling)
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s2"), "it is inside s2")
        a.kill()
        await world.start_pod("a", app)
        await world.until(lambda: world.records(r.Ended), "it has ended")

        assert seen == ["list", "list"]
        check_steps(world)

    play(story)


# -- rule 19: eviction -------------------------------------------------------------------------------------------------

SLOW_FOLD_S = 0.9  # the store lags, but not so far that groups wait for it


def test_an_instance_leaves_memory_when_its_last_record_is_folded():
    """Closes: an instance leaves memory at its end, the store does not know of it yet, and whoever asks next hears that it
    is queued, or that there is none. It stays until the fold."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        a.store._delay_s = SLOW_FOLD_S
        await world.publish("work", "one")
        await world.until(lambda: world.records(r.Ended), "it has ended")
        await world.passes(0.05)
        assert a.store.find(world.station_of("one"), "work", "one") is None, "the story needs a store that lags"
        handle = world.client().handle("work", "one")
        for _ in range(20):
            assert (await handle.status()).status == "complete"
            await world.passes(0.1)

        await world.quiet()
        check_all(world, "work", ["one"])

    play(story)


def test_what_has_changed_since_its_rest_stays_in_memory():
    """Closes: an instance rests, is terminated before its rest is folded, and the fold takes it out of memory with its
    last record on the way: nobody hears that it has ended."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(sleeper_workflow(world, nap="1 hour")))
        await world.all_owned()
        a.store._delay_s = SLOW_FOLD_S
        await world.publish("nap", "one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        world.broker.fail_next(journal_of(world, "one"), DELAY, delay_s=1.5)
        asked = world.now
        await world.client().handle("nap", "one").terminate()

        assert world.now < asked + 4.0  # the append, the fold, and a repeat of the request at most
        await world.quiet()

    play(story)


# -- rule 20: poison steps ---------------------------------------------------------------------------------------------

def poison_workflow(world: World, *, limit: int):
    """A step that ends its pod in each attempt, then one that tells what became of it."""

    class Poison(Workflow[int, str], name="work"):
        async def run(self, event: WorkflowEvent[int], step: Step) -> str:
            try:
                await step.do("poison", poison, retries=Retries(limit=limit, delay="1 second", jitter=False))
            except StepFailed as error:
                return await step.do("told", told, error.error_type)
            return "it went well"

    async def poison(ctx: StepContext) -> None:
        with world.history.inside(ctx):
            process = Process.current()
            assert process is not None
            process.state = State.DEAD

    async def told(ctx: StepContext, words: str) -> str:
        with world.history.inside(ctx):
            return words

    return Poison


async def revived(world: World, app: App, *, lives_max: int) -> None:
    """Start the pod again whenever it has died, until it has nothing left in memory."""
    for _ in range(lives_max):
        await world.until(lambda: not world.living or world.records(r.Ended) or world.records(r.Blocked), "its next end")
        if world.living:
            return
        world.nodes[-1].kill()
        await world.start_pod("a", app)
    raise AssertionError(f"it still dies after {lives_max} lives")


@pytest.mark.parametrize(("limit", "attempts"), [(0, 5), (1, 10)])
def test_a_step_that_ends_its_pod_fails_after_five_interruptions_of_each_attempt(limit, attempts):
    """Closes: a poison step takes one pod after the other with it, for ever, and each time believes that it is the first
    attempt. Interruptions count in `ctx.attempt`; five are a failed attempt; when the retries are used up it fails."""

    async def story(world: World) -> None:
        app = world.app(poison_workflow(world, limit=limit))
        await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await revived(world, app, lives_max=attempts + 3)

        poisoned = world.history.entered("one", "poison")
        assert [entry.attempt for entry in poisoned] == list(range(1, attempts + 1))
        if limit == 0:
            assert await world.client().handle("work", "one").result() == "toque.Interrupted"
        else:
            assert world.records(r.Blocked)[0].reason.startswith(f"interrupted {INTERRUPTIONS_MAX} times")
        await world.quiet()

    play(story, account=account(stations=1))


def test_the_interruption_is_recorded_before_run_is_entered_again():
    """Closes: run() itself ends its pod, and the next owner enters it before the journal knows of the interruption: it
    is never counted. Each append of the station takes half a second; run() waits for that of the interruption."""

    async def story(world: World) -> None:
        known: list[int] = []

        class Counting(Workflow[int, int], name="work"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                known.append(len(world.records(r.Interrupted)))
                return await step.do("s1", reporting(world, 1, 3.0))

        app = world.app(Counting)
        a = await world.start_pod("a", app)
        await world.all_owned()
        one = world.ids_at(StationId(1, 3), 1)[0]  # slots come from station 0, which is taken up before
        await world.publish("work", one)
        await world.until(lambda: world.history.entered(one), "it is inside s1")
        a.kill()
        world.broker.fail_next(journal_of(world, one), DELAY, times=10**6, delay_s=0.5)
        await world.start_pod("a", app)
        await world.until(lambda: world.records(r.Ended), "it has ended")

        assert known == [0, 1]
        assert world.history.entered(one)[1].attempt == 2
        await world.quiet()
        check_all(world, "work", [one])

    play(story)


def test_only_instances_that_held_a_slot_are_interrupted():
    """Closes: an instance that sleeps while pods die is charged for it, and parked after ten deaths. Neither it nor one
    that is held for changed code has an interruption."""

    async def story(world: World) -> None:
        app = world.app(sleeper_workflow(world, "nap", nap="1 hour"), steps_workflow(world, steps=2, step_s=0.5))
        changed = world.app(sleeper_workflow(world, "nap", nap="1 hour"), renamed_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("nap", "sleeps")
        await world.publish("work", "held")
        await world.until(lambda: world.history.entered("held", "s2"), "it is inside s2")
        a.kill()
        a = await world.start_pod("a", changed)
        await world.until(lambda: world.records(r.Blocked), "it is held")
        for _ in range(3):
            await world.quiet()
            a.kill()
            a = await world.start_pod("a", changed)
            await world.all_owned()

        assert len(world.records(r.Interrupted)) == 1, "that of the first death, inside s2"
        assert (await world.client().handle("nap", "sleeps").status()).status == "waiting"
        assert (await world.client().handle("work", "held").status()).blocked_on.startswith("code: ")

    play(story)


# -- rule 21: one account, one app -------------------------------------------------------------------------------------

def test_stations_go_to_the_pods_that_can_run_everything():
    """Closes: during a rolling deploy a pod of the old app takes its share of the stations, and a part of the instances
    of the new workflow stands still."""

    async def story(world: World) -> None:
        new = world.app(steps_workflow(world), sleeper_workflow(world))
        old = world.app(sleeper_workflow(world))
        a = await world.start_pod("a", new)
        await world.all_owned()
        b = await world.start_pod("b", old)
        await world.passes(5)
        assert not b.pod.ownership.stations

        c = await world.start_pod("c", new)
        await world.spread_over(a, c)
        assert not b.pod.ownership.stations

    play(story)


@pytest.mark.parametrize("lacks", ["workflow", "version"])
def test_an_instance_that_its_owner_cannot_run_is_blocked_and_does_not_fail(lacks):
    """Closes: the only pod left is of the old app: it ends the new app's instances as errored, or replays them with
    other code. They say `version`, and go on where a pod can run them."""

    async def story(world: World) -> None:
        new = world.app(versioned_workflow(world, "2"), sleeper_workflow(world))
        old = world.app(sleeper_workflow(world), *([versioned_workflow(world, "1")] if lacks == "version" else []))
        a = await world.start_pod("a", new)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one"), "it is inside s1")
        a.kill()
        b = await world.start_pod("b", old)
        await world.all_owned()
        await world.passes(3)
        status = await world.client().handle("work", "one").status()

        assert status.status == "running"
        assert status.blocked_on.startswith("version: pod b ")
        assert world.history.entered(pod="b") == []
        await b.stop()
        await world.start_pod("c", new)
        assert await world.client().handle("work", "one").result() == 7
        await world.quiet()
        check_all(world, "work", ["one"])

    play(story)


def versioned_workflow(world: World, version: str):
    class Versioned(Workflow[int, int], name="work", version=version):
        async def run(self, event: WorkflowEvent[int], step: Step) -> int:
            return await step.do("s1", reporting(world, event.payload, 1.0))

    return Versioned


# -- rule 26: write-dead -----------------------------------------------------------------------------------------------

def test_an_instance_with_nothing_pending_enters_nothing_while_the_journal_is_dead(caplog):
    """Closes: every instance waits for its own records, but this one has none on its way: a back-off of it ends while the
    disk is full, and its next attempt works without a checkpoint. Nothing is admitted either; the log says what to do."""

    async def story(world: World) -> None:
        class Flaky(Workflow[int, int], name="flaky"):
            async def run(self, event: WorkflowEvent[int], step: Step) -> int:
                again = Retries(delay="5 seconds", jitter=False)
                results = await asyncio.gather(step.do("long", reporting(world, 1, 20)),
                                               step.do("flaky", flaky, retries=again))
                return sum(results)

        async def flaky(ctx: StepContext) -> int:
            with world.history.inside(ctx):
                if ctx.attempt == 1:
                    raise ConnectionError("once")
                return 1

        a = await world.start_pod("a", world.app(Flaky, steps_workflow(world, step_s=0.1)))
        await world.all_owned()
        await world.publish("flaky", "one")
        await world.until(lambda: world.records(r.AttemptFailed), "its first attempt has failed")
        await world.publish("work", "other")
        await world.until(lambda: world.history.entered("other"), "another one is inside")
        world.broker.freeze_stream(subjects.journal_stream("main"))
        await world.until(lambda: a.pod.context.journal.trouble, "the pod has noticed")
        slots = a.pod.context.slots.in_use
        await world.publish("work", "later")
        await world.passes(6)  # less than the deadline allows, more than the back-off

        assert world.history.times("one", "flaky") == 1
        assert a.pod.context.slots.in_use == slots
        assert "restart nats-server" in caplog.text
        world.broker.stop()
        world.broker.start()
        await world.until(lambda: len(world.records(r.Ended)) == 3, "all have ended")
        assert world.history.times("one", "flaky") == 2

    play(story)
