"""Children: a child is created once, its end reaches its parent once, whatever is killed or lost (rules 14, 15 and 25)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from toque import _subjects as subjects
from toque._protocol import AccountRecord
from toque.client import StepRef
from toque.errors import InstanceExists, InstanceNotFound, StepError, StepFailed
from toque.sim.world import World, account, play, reporting, steps_workflow
from toque.storage import records as r
from toque.storage.memory_broker import DROP_BEFORE, DUPLICATE, LOSE_ANSWER
from toque.workflow import Retention, Step, Workflow, WorkflowEvent

PLACES = [(r.Woken, 1), *((kind, nth) for kind in (r.ChildBegun, r.ChildCreated, r.ChildEnded, r.Ended, r.Delivered)
                          for nth in (1, 2))]


def parent(count: int = 1, *, child: str = "leaf", **options: Any) -> type[Workflow[Any, Any]]:
    """Runs so many children at once, and returns what came of them."""

    class Boss(Workflow[Any, Any], name="boss"):
        async def run(self, event: WorkflowEvent[Any], step: Step) -> Any:
            async def one(number: int) -> Any:
                try:
                    return await step.run_workflow("part", child, number, **options)
                except StepError as error:
                    return [error.error_type, error.error_message]

            return await asyncio.gather(*[one(number) for number in range(count)])

    return Boss


def leaf(world: World, *, step_s: float = 1.0, retention: Retention | None = None) -> type[Workflow[Any, Any]]:
    """Works for a while; returns ten times its params, or fails for 13."""

    class Leaf(Workflow[Any, Any], name="leaf", retention=retention):
        async def run(self, event: WorkflowEvent[Any], step: Step) -> Any:
            await step.do("work", reporting(world, event.payload, step_s))
            if event.payload == 13:
                raise ValueError("unlucky")
            return event.payload * 10

    return Leaf


def children_of(world: World) -> list[r.Admitted]:
    return [record for record in world.records(r.Admitted) if record.workflow == "leaf"]


async def undelivered(world: World) -> bool:
    """Whether an outbox of a living owner holds anything."""
    return any(station.context.store.outbox(station.id, (0, -1), 1)
               for node in world.living if node.pod.ownership for station in node.pod.ownership.stations.values())


async def told(world: World) -> None:
    """Until every end is delivered."""
    for _ in range(1200):
        await world.passes(0.05)
        if not await undelivered(world):
            return
    raise AssertionError("an end is not delivered")


def test_a_parent_waits_for_its_children_without_a_slot():
    """The whole way, with a limit of one: the children can only run while the parent holds nothing."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(parent(3), leaf(world)))
        await world.all_owned()
        handle = await world.client().create("boss", id="one")

        assert await handle.result(timeout="1 minute") == [0, 10, 20]
        assert len(children_of(world)) == 3
        view = await handle.describe()
        assert [(step.kind, step.status) for step in view.steps] == [("child", "complete")] * 3
        child = world.client().handle(*view.steps[0].child.split("/"))
        assert (await child.describe()).instance.parent == "boss/one"
        await told(world)
        await world.quiet()

    play(story, account=account(max_concurrent=1))


@pytest.mark.parametrize("kind, nth", PLACES)
def test_the_owner_of_everything_is_killed_after_each_record(kind: type[r.Record], nth: int):
    """Closes: any place of the parent's or the child's way: recorded and not created; created and not recorded; ended and
    not told; told and not noted. The next owner creates a second child, or nobody tells the parent, or tells it twice."""

    async def story(world: World) -> None:
        app = world.app(parent(2), leaf(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("boss", id="one")
        await world.until(lambda: len(world.records(kind)) >= nth, "it has come so far")
        a.kill()
        await world.start_pod("b", app)

        assert await handle.result(timeout="2 minutes") == [0, 10]
        assert len(children_of(world)) == 2
        assert len(world.records(r.ChildEnded)) == 2
        await told(world)
        await world.quiet()

    play(story)


@pytest.mark.parametrize("moment", [0.0005, 0.001, 0.002, 0.003, 0.005, 0.008, 0.013, 0.021, 1.002, 1.005, 1.01, 1.02, 1.05])
def test_a_child_is_created_once_wherever_its_parents_owner_is_cut(moment: float):
    """Closes: the creation was published and not noted, and the next owner publishes another one."""

    async def story(world: World) -> None:
        app = world.app(parent(2), leaf(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("boss", id="one")
        await world.passes(moment)
        a.kill()
        await world.start_pod("b", app)

        assert await handle.result(timeout="2 minutes") == [0, 10]
        assert len(children_of(world)) == 2
        await told(world)
        await world.quiet()

    play(story)


@pytest.mark.parametrize("how", [DROP_BEFORE, LOSE_ANSWER, DUPLICATE])
def test_a_creation_that_is_lost_or_doubled_makes_one_child(how: str):
    """Closes: the answer to the publication is lost, and its repeat is taken for another creation's, or makes another."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(parent(1), leaf(world)))
        await world.all_owned()
        world.broker.fail_next("toque.main.create.leaf.*", how)
        handle = await world.client().create("boss", id="one")

        assert await handle.result(timeout="2 minutes") == [0]
        assert len(children_of(world)) == 1

    play(story)


@pytest.mark.parametrize("how", [DROP_BEFORE, LOSE_ANSWER, DUPLICATE])
def test_an_end_is_told_again_until_it_is_acknowledged_and_counts_once(how: str):
    """Closes: the answer of the parent's owner is lost, and the end is told once more: two outcomes of one step."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(parent(1), leaf(world)))
        await world.all_owned()
        world.broker.fail_next(subjects.station_request("main", world.station_of("one"), "child_end"), how, times=3)
        handle = await world.client().create("boss", id="one")

        assert await handle.result(timeout="2 minutes") == [0]
        await told(world)
        assert len(world.records(r.ChildEnded)) == 1
        assert len(world.records(r.Delivered)) == 1

    play(story)


@pytest.mark.parametrize("loss", [DROP_BEFORE, LOSE_ANSWER])
def test_an_end_is_acknowledged_only_when_the_parents_journal_has_it(loss: str):
    """Closes: the parent's owner answers while the record is pending, and dies; the child is forgotten, its end lost."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(parent(6), leaf(world, step_s=5)))
        await world.all_owned()
        await world.client().create("boss", id="one")
        await world.until(lambda: len(world.records(r.ChildCreated)) == 6, "it waits for its children")
        await world.passes(1)
        world.broker.fail_next(subjects.journal("main", world.station_of("one")), loss, times=3)
        assert {world.station_of(record.id) for record in children_of(world)} != {world.station_of("one")}
        for _ in range(400):
            await world.passes(0.05)
            assert len(world.records(r.Delivered)) <= len(world.records(r.ChildEnded))
        assert len(world.records(r.Delivered)) == 6

    play(story)


def test_an_errand_that_the_broker_refuses_has_another_turn():
    """Closes: an error that is no silence ends the task that tells, and its entry is under way for ever."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(parent(2), leaf(world, step_s=5)))
        await world.all_owned()
        handle = await world.client().create("boss", id="one")
        await world.until(lambda: len(world.records(r.ChildCreated)) == 2, "it waits for its children")
        world.broker.fail_next("$JS.API.STREAM.INFO.toque+main+control", "refuse:10008", times=4)

        assert await handle.result(timeout="1 minute") == [0, 10]
        await told(world)

    play(story)


def test_a_creation_that_was_deleted_since_is_no_other_ones():
    """Closes: a started child with an id of its own has ended and is deleted before its parent knows that it was created;
    the repeat of the creation asks for ever whether the id is its own (rules 14 and 15)."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(leaf(world)))
        await world.all_owned()
        await world.publish("leaf", "x", nonce="mine")
        await world.client().handle("leaf", "x").result(timeout="1 minute")
        await world.client().handle("leaf", "x").delete()

        assert (await world.ask("exists", "leaf", "x", nonce="mine")).code == "ok"
        assert (await world.ask("exists", "leaf", "x", nonce="another")).code == "exists"

    play(story)


def test_an_end_is_kept_while_the_parents_owner_is_away_however_short_the_childs_retention_is():
    """Closes: the child's retention is over before its parent has heard of its end; it is deleted, and the parent waits
    for ever. Its retention begins when its end is told."""

    async def story(world: World) -> None:
        app = world.app(parent(1), leaf(world, retention=Retention("1 second", "1 second")))
        await world.start_pod("a", app)
        await world.all_owned()
        subject = subjects.station_request("main", world.station_of("one"), "child_end")
        world.broker.fail_next(subject, DROP_BEFORE, times=20)
        handle = await world.client().create("boss", id="one")
        await world.until(lambda: world.records(r.Ended), "the child has ended")
        await world.passes(15)
        assert world.records(r.Deleted) == []

        assert await handle.result(timeout="10 minutes") == [0]
        await world.until(lambda: world.records(r.Deleted), "the child is deleted")
        await world.quiet()

    play(story)


def test_a_child_that_fails_or_is_terminated_or_deleted_says_so():
    """A parent is never left waiting: deleting a child terminates it first, and waits until its parent knows."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(parent(3), leaf(world, step_s=20)))
        await world.all_owned()
        client = world.client()
        handle = await client.create("boss", id="one")
        await world.until(lambda: len(children_of(world)) == 3, "they are there")
        by_params = {record.params: record.id for record in children_of(world)}
        await client.handle("leaf", by_params[b"\x00"]).terminate()
        await client.handle("leaf", by_params[b"\x01"]).delete()

        assert await handle.result(timeout="2 minutes") == [
            ["Terminated", "it was terminated"], ["Terminated", "it was terminated"], 20]
        with pytest.raises(InstanceNotFound):
            await client.handle("leaf", by_params[b"\x01"]).status()

    play(story)


@pytest.mark.parametrize("after", ["restart", "delete", "terminate"])
def test_the_end_of_a_child_whose_parent_is_another_run_gone_or_over_is_forgotten(after: str):
    """Closes: nobody takes the end, so the child is kept and told of for ever; or another run takes it for its own."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(parent(1), leaf(world, step_s=5)))
        await world.all_owned()
        handle = await world.client().create("boss", id="one")
        await world.until(lambda: world.records(r.ChildCreated), "it waits for its child")
        await getattr(handle, after)()
        if after == "restart":
            assert await handle.result(timeout="1 minute") == [0]
            assert len({record.id for record in children_of(world)}) == 2, "the new run has a child of its own"
        await world.until(lambda: len(world.records(r.Delivered)) == len(children_of(world)), "all is told")
        assert len(world.records(r.ChildEnded)) == (1 if after == "restart" else 0)
        await told(world)
        await world.quiet()

    play(story)


def test_a_parent_that_was_deleted_and_created_anew_has_children_of_its_own():
    """Closes: the new instance of the id makes the same creation as the old one did, and takes over its child."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(parent(1), leaf(world, step_s=5)))
        await world.all_owned()
        handle = await world.client().create("boss", id="one")
        await world.until(lambda: world.records(r.ChildCreated), "it waits for its child")
        await handle.delete()
        handle = await world.client().create("boss", id="one")

        assert await handle.result(timeout="1 minute") == [0]
        assert len({record.id for record in children_of(world)}) == 2
        await told(world)

    play(story)


def test_a_restart_from_a_step_keeps_the_outcomes_of_the_children_before_it():
    """Closes: the kept child is created again; or its step waits for an end that was told to the run before."""

    class Chain(Workflow[Any, Any], name="boss"):
        async def run(self, event: WorkflowEvent[Any], step: Step) -> Any:
            started = await step.start_workflow("side", "leaf", 5)
            first = await step.run_workflow("first", "leaf", 1)
            second = await step.run_workflow("second", "leaf", first)
            return [started.id, first, second]

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(Chain, leaf(world)))
        await world.all_owned()
        handle = await world.client().create("boss", id="one")
        before = await handle.result(timeout="1 minute")

        await handle.restart(from_=StepRef("second", kind="child"))

        assert await handle.result(timeout="1 minute") == before == [before[0], 10, 100]
        assert len(children_of(world)) == 4
        steps = {step.name: step.child for step in (await handle.describe()).steps}
        assert steps["side"] == f"leaf/{before[0]}" and len(set(steps.values())) == 3
        await told(world)

    play(story)


def test_a_paused_parents_children_go_on_and_their_ends_are_kept():
    """Closes: the end is refused or forgotten while the parent stands still."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(parent(2), leaf(world)))
        await world.all_owned()
        handle = await world.client().create("boss", id="one")
        await world.until(lambda: len(world.records(r.ChildCreated)) == 2, "it waits for its children")
        await handle.pause()
        await world.passes(10)
        assert len(world.records(r.ChildEnded)) == 2
        assert (await handle.status()).status == "paused"
        await handle.resume()

        assert await handle.result(timeout="1 minute") == [0, 10]

    play(story)


def test_an_id_of_another_creation_fails_the_step_and_is_not_terminated_with_the_parent():
    """Closes: the parent takes somebody else's instance for its child, waits for its end, or ends it with its own."""

    class Picky(Workflow[Any, Any], name="picky"):
        async def run(self, event: WorkflowEvent[Any], step: Step) -> Any:
            try:
                await step.start_workflow("mine", "leaf", 1, id="taken")
            except StepFailed as error:
                return await step.wait_for_event(error.error_type.rpartition(".")[2], "go")

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(Picky, leaf(world, step_s=30)))
        await world.all_owned()
        client = world.client()
        other = await client.create("leaf", 4, id="taken")
        handle = await client.create("picky", id="one")
        await world.until(lambda: world.records(r.WaitStarted), "its step has failed")
        assert world.records(r.WaitStarted)[0].name == InstanceExists.__name__
        await handle.terminate(children=True)

        assert await other.result(timeout="1 minute") == 40
        await told(world)

    play(story)


def nested(world: World) -> list[type[Workflow[Any, Any]]]:
    """A boss with two children that have two children each, which work for a long time."""

    class Middle(Workflow[Any, Any], name="middle"):
        async def run(self, event: WorkflowEvent[Any], step: Step) -> Any:
            await step.start_workflow("apart", "leaf", 1)
            return await step.run_workflow("below", "leaf", 2)

    return [parent(2, child="middle"), Middle, leaf(world, step_s=1000)]


@pytest.mark.parametrize("moment", [None, 0.0, 0.001, 0.003, 0.01, 0.03])
def test_terminate_takes_the_children_along_and_theirs(moment: float | None):
    """Closes: the parent's owner dies between the acknowledged end and the last child's, and these go on for ever."""

    async def story(world: World) -> None:
        app = world.app(*nested(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("boss", id="one")
        await world.until(lambda: len(children_of(world)) == 4, "all are there")
        await world.passes(1)
        await handle.terminate(children=True)
        if moment is not None:
            await world.passes(moment)
            a.kill()
            await world.start_pod("b", app)
        await world.until(lambda: len(world.records(r.Ended)) == 7, "all have ended")

        assert {record.status for record in world.records(r.Ended)} == {r.Status.TERMINATED}
        await told(world)
        await world.quiet()

    play(story)


def test_terminate_alone_leaves_the_children():
    """They go on, and their ends are forgotten."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(parent(2), leaf(world, step_s=5)))
        await world.all_owned()
        handle = await world.client().create("boss", id="one")
        await world.until(lambda: len(world.records(r.ChildCreated)) == 2, "it waits for its children")
        await handle.terminate()
        await world.until(lambda: len(world.records(r.Ended)) == 3, "all have ended")

        assert sorted(record.status for record in world.records(r.Ended)) == [
            r.Status.COMPLETE, r.Status.COMPLETE, r.Status.TERMINATED]
        await told(world)

    play(story)


@pytest.mark.parametrize("act", ["restart", "delete"])
def test_a_parent_that_took_its_children_along_is_kept_until_they_have_ended(act: str):
    """Closes: terminate(children=True) is acknowledged, the parent is restarted or deleted at once, and nobody knows any
    more which children it had."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(parent(2), leaf(world, step_s=5), steps_workflow(world)))
        await world.all_owned()
        handle = await world.client().create("boss", id="one")
        await world.until(lambda: len(world.records(r.ChildCreated)) == 2, "it waits for its children")
        await handle.terminate(children=True)
        await getattr(handle, act)()

        over = [record for record in world.records(r.Ended) if record.status is r.Status.TERMINATED]
        assert len(over) == 3

    play(story)


def test_a_header_that_names_no_parent_parks_the_creation():
    """Anyone may publish; what cannot be read is said, and stops nobody."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(leaf(world)))
        await world.all_owned()
        await world.bus().publish(subjects.create("main", "leaf", "odd"), b"1", {subjects.PARENT_HEADER: "me"})
        await world.until(world.parked, "it is parked")
        await world.publish("leaf", "fine", b"1")
        assert await world.client().handle("leaf", "fine").result(timeout="1 minute") == 10

    play(story)


def many(count: int) -> AccountRecord:
    return account(max_concurrent=count)


def test_a_thousand_children_at_once_keep_memory_bounded(monkeypatch: pytest.MonkeyPatch):
    """Closes: a thousand creations, or a thousand ends with their outputs, are in flight at once."""
    seen: dict[str, int] = {}

    def watch(what: str, now: Callable[[], int]) -> None:
        seen[what] = max(seen.get(what, 0), now())

    async def story(world: World) -> None:
        node = await world.start_pod("a", world.app(parent(1000), leaf(world, step_s=0.1)))
        await world.all_owned()
        handle = await world.client().create("boss", id="one")
        result = asyncio.ensure_future(handle.result(timeout="10 minutes"))
        while not result.done():
            for station in node.pod.ownership.stations.values():
                watch("ends", lambda station=station: station.outbox._in_flight)
                watch("creations", lambda station=station: 64 - station._creations._room._value)
            await world.passes(0.01)

        assert await result == [number * 10 if number != 13 else ["ValueError", "unlucky"] for number in range(1000)]
        assert len(children_of(world)) == 1000 == len({record.id for record in children_of(world)})
        assert 1 < seen["ends"] <= 16
        assert 1 < seen["creations"] <= 64
        await told(world)
        await world.quiet()

    play(story, account=many(200))
