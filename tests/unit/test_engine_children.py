"""Children: created once over crashes, their ends taken once, wherever the parent stands."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from unit.engine_host import EngineHost, Recorder, play, raises_misuse

from toque.errors import BrokerUnavailable, ChildFailed, InstanceExists, StepError, StepTimeout
from toque.storage import records as r
from toque.workers.host import ChildCreation
from toque.workflow import Child, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]


class Leaf(Workflow[int, int], name="leaf"):
    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        return event.payload


class One(Workflow[Any, Any], name="one"):
    """Waits for one child, and says what came of it."""

    async def run(self, event: Event, step: Step) -> Any:
        try:
            return await step.run_workflow("leaf", Leaf, 7)
        except ChildFailed as error:
            return [error.child, error.error_type, error.error_message]


class Three(Workflow[Any, Any], name="three"):
    """Three at once, with equal step names."""

    async def run(self, event: Event, step: Step) -> Any:
        return await asyncio.gather(*[step.run_workflow("leaf", Leaf, number) for number in range(3)])


async def created(host: EngineHost, count: int = 1) -> list[ChildCreation]:
    await host.settle()
    assert len(host.of_kind(r.ChildCreated)) == count
    return host.children


def test_a_parent_waits_without_a_slot_and_gets_the_output():
    """Recorded before it is created, created once, and its end is the step's outcome."""

    async def story() -> None:
        host = EngineHost(One)
        host.create()
        (child,) = await created(host)
        assert host.engine is None and host.slots_given_back == 1
        assert [type(record).__name__ for record in host.records] == ["Admitted", "ChildBegun", "ChildCreated"]
        assert (child.workflow, child.params, child.chosen) == ("leaf", 7, False)

        await host.end_child(child, 49)

        assert await host.output() == 49
        assert len(host.children) == 1

    play(story)


def test_the_output_is_decoded_to_the_childs_result_type():
    """A float where the class says int holds the instance, by name: the code was changed."""

    async def story() -> None:
        host = EngineHost(One)
        host.create()
        (child,) = await created(host)
        host.end_child(child, "no number")
        assert "the output of the child" in await host.held()

    play(story)


@pytest.mark.parametrize("loaded", [False, True])
def test_an_output_that_fits_no_more_holds_the_parent_in_memory_too(loaded):
    """The end is recorded all the same, and counts as soon as the code takes it."""

    class Lenient(Workflow[Any, Any], name="one"):
        async def run(self, event: Event, step: Step) -> Any:
            return await step.run_workflow("leaf", "leaf", 7)

    async def story() -> None:
        host = EngineHost(One, evicts=not loaded)
        host.create()
        (child,) = await created(host)
        host.end_child(child, "no number")
        assert "code:" in await host.held()
        host.load(Lenient)
        assert await host.output() == "no number"

    play(story)


@pytest.mark.parametrize("status, failure, said", [
    (r.Status.ERRORED, r.Failure("ValueError", "bad", "line 1"), ["ValueError", "bad"]),
    (r.Status.TERMINATED, None, ["Terminated", "it was terminated"]),
])
def test_a_child_that_errored_or_was_terminated_raises_child_failed(status, failure, said):
    """With what was recorded of it, and its name."""

    async def story() -> None:
        host = EngineHost(One)
        host.create()
        (child,) = await created(host)
        await host.end_child(child, status=status, failure=failure)
        assert await host.output() == [f"leaf/{child.id}", *said]

    play(story)


def test_each_creation_has_an_id_and_a_nonce_of_its_own_that_replays_repeat():
    """Equal step names, other runs: other children. The same step after a crash: the same one."""

    async def story() -> None:
        host = EngineHost(Three)
        host.create()
        await created(host, 3)
        first = [(child.id, child.nonce) for child in host.children]
        assert len({id_ for id_, _ in first}) == len({nonce for _, nonce in first}) == 3
        assert all(id_.startswith("i1-") for id_, _ in first)

        host.crash()
        host.children.clear()
        host.load(Three)
        host.end_child(ChildCreation("leaf", "", 0, int, None, first[1][1], "three i1 1 child 2 leaf", False), 11)
        await host.settle()
        assert host.children == [], "they were created, and are not created again"

    play(story)


@pytest.mark.parametrize("cut_at", range(1, 8))
def test_a_crash_after_any_record_gives_the_same_end_and_no_second_child(cut_at):
    """Whatever was recorded, creations repeat their nonces, and each end counts once."""

    async def story() -> None:
        host = EngineHost(Three)
        queued: dict[str, ChildCreation] = {}

        async def store(creation: ChildCreation) -> None:
            known = queued.setdefault(creation.id, creation)
            assert known.nonce == creation.nonce

        host.creates = store
        host.create()
        await host.cut_after(cut_at)
        host.load()
        await host.settle()
        for number, child in enumerate(list(queued.values())):
            await host.end_child(child, number * 10)
            await host.settle()
            await host.end_child(child, "a repeat")
        outputs = {child.params: number * 10 for number, child in enumerate(queued.values())}
        assert await host.output() == [outputs[number] for number in range(3)]
        assert len(queued) == len(host.of_kind(r.ChildEnded)) == 3

    play(story)


def test_the_end_of_a_child_outlives_a_crash_before_its_parent_knows_that_it_was_created():
    """Closes: the parent's owner dies between the publication and its record; the end comes first, and is forgotten."""

    async def story() -> None:
        host = EngineHost(One)
        host.create()
        await host.cut_after(2)  # ChildBegun
        (child,) = host.children or [await first_creation(host)]
        host.crash(interrupted=False)
        accepted = host.end_child(child, 5)
        await host.settle()
        assert accepted.done()
        host.engine = None
        host.load()
        assert await host.output() == 5
        assert len(host.children) <= 1

    async def first_creation(host: EngineHost) -> ChildCreation:
        host.load()
        (child,) = (await created(host))[:1]
        return child

    play(story)


def test_an_end_that_comes_while_the_creation_is_still_under_way_counts():
    """The answer to the publication is late, the child was quick."""

    async def story() -> None:
        host = EngineHost(One)
        stuck = asyncio.Event()

        async def late(creation: ChildCreation) -> None:
            await stuck.wait()

        host.creates = late
        host.create()
        await host.settle()
        await host.end_child(host.children[0], 5)
        assert await host.output() == 5
        assert host.of_kind(r.ChildCreated) == []

    play(story)


def test_ends_of_other_runs_and_other_creations_change_nothing():
    """They are acknowledged, so that nobody sends them for ever."""

    async def story() -> None:
        host = EngineHost(One)
        host.create()
        (child,) = await created(host)
        before = len(host.records)
        await host.end_child(child._replace(nonce="other"), 1)
        await host.end_child(child._replace(parent=child.parent.replace(" 1 child", " 2 child")), 2)
        await host.end_child(child._replace(parent=child.parent.replace("leaf", "nothing")), 3)
        assert len(host.records) == before
        await host.end_child(child, 4)
        assert await host.output() == 4

    play(story)


def test_an_end_is_taken_once_though_the_parent_has_no_slot_yet():
    """Closes: the answer is lost, the end is sent again while the parent waits for a slot, and is recorded twice."""

    async def story() -> None:
        host = EngineHost(One, evicts=False)
        host.create()
        (child,) = await created(host)
        assert host.engine is not None and host.engine.resting
        first, again = host.end_child(child, 4), host.end_child(child, 4)
        await asyncio.gather(first, again)
        assert await host.output() == 4
        assert len(host.of_kind(r.ChildEnded)) == 1

    play(story)


def test_an_end_for_a_resting_parent_waits_for_a_slot_over_a_change_of_owner(monkeypatch: pytest.MonkeyPatch):
    """Closes: run() goes on without a slot; or the pod dies before there is one, and the next owner's index says that the
    parent has nothing to do for a year."""

    async def story() -> None:
        host = EngineHost(One, evicts=False)
        host.create()
        (child,) = await created(host)
        monkeypatch.setattr(host, "engine_called", lambda engine: None)  # no slot is free
        monkeypatch.setattr(host, "_schedule_wake", lambda: None)
        await host.end_child(child, 4)
        await host.settle()
        assert type(host.records[-1]) is r.ChildEnded, "it went on without a slot"
        assert host.row is not None and host.row.status is r.Status.WAITING
        assert 0 < host.row.wake_at <= host.now_ms()

        monkeypatch.undo()
        host.crash()
        host.load()
        assert await host.output() == 4

    play(story)


def test_an_end_during_a_pause_is_kept_for_its_end():
    """Closes: a paused parent goes on, or misses the end."""

    async def story() -> None:
        host = EngineHost(One)
        host.create()
        (child,) = await created(host)
        host.read_back().pause("p")
        await host.settle()
        await host.end_child(child, 4)
        await host.settle()
        assert host.row is not None and host.row.status is r.Status.PAUSED

        engine = host.read_back()
        engine.resumed("q", 1000)
        host.accept()
        host.load()
        assert await host.output() == 4

    play(story)


def test_a_time_out_of_the_wait_is_final_and_the_child_goes_on():
    """Its end comes later, and changes nothing."""

    class Impatient(Workflow[Any, Any], name="impatient"):
        async def run(self, event: Event, step: Step) -> Any:
            try:
                return await step.run_workflow("leaf", Leaf, 7, timeout="10 seconds")
            except StepTimeout as error:
                await step.sleep("on", "1 minute")
                return str(error)

    async def story() -> None:
        host = EngineHost(Impatient)
        host.create()
        (child,) = await created(host)
        await asyncio.sleep(11)
        await host.end_child(child, 4)
        assert await host.output() == "step 'leaf': the child did not end in time"
        assert host.of_kind(r.ChildEnded) == []

    play(story)


def test_a_creation_that_is_refused_for_now_is_tried_again_and_the_wait_counts_from_its_success():
    """A full queue; the time-out is not used up by it."""

    async def story() -> None:
        host = EngineHost(One)
        tries: list[str] = []

        async def full_twice(creation: ChildCreation) -> None:
            tries.append(creation.nonce)
            if len(tries) < 3:
                raise BrokerUnavailable("full")

        host.creates = full_twice
        host.create()
        await asyncio.sleep(60)
        assert len(tries) == 3 and len(set(tries)) == 1
        assert host.row is not None and len(host.row.timers) == 1
        assert host.row.wake_at > host.now_ms() + 300 * 24 * 3600 * 1000, "the time of an attempt still stands there"
        await host.end_child(host.children[-1], 1)
        assert await host.output() == 1

    play(story)


def test_an_id_of_another_creation_fails_the_step_at_once():
    """No attempt will ever have another answer."""

    class Chosen(Workflow[Any, Any], name="chosen"):
        async def run(self, event: Event, step: Step) -> Any:
            try:
                return await step.run_workflow("leaf", Leaf, 7, id="mine")
            except StepError as error:
                return error.error_type

    async def story() -> None:
        host = EngineHost(Chosen)

        async def taken(creation: ChildCreation) -> None:
            assert creation.id == "mine" and creation.chosen
            raise InstanceExists("it exists")

        host.creates = taken
        host.create()
        assert (await host.output()).endswith("InstanceExists")
        assert len(host.children) == 1

    play(story)


def test_start_workflow_gives_a_name_and_does_not_wait():
    """The name is the step's result, so it is the same after a crash, and the child is not created again."""

    class Starter(Workflow[Any, Any], name="starter"):
        async def run(self, event: Event, step: Step) -> Any:
            child = await step.start_workflow("go", Leaf, 3)
            assert type(child) is Child
            await step.sleep("a while", "1 minute")
            return [child.workflow, child.id]

    async def story() -> None:
        host = EngineHost(Starter)
        host.create()
        await host.settle()
        host.crash()
        host.load()
        assert await host.output() == ["leaf", host.children[0].id]
        assert len(host.children) == 1

    play(story)


def test_a_cancelled_step_takes_no_end():
    """Closes: an end meets a step that run() has given up, and run() is handed an outcome it does not know."""

    class Race(Workflow[Any, Any], name="race"):
        async def run(self, event: Event, step: Step) -> Any:
            slow = step.run_workflow("slow", Leaf, 1)
            assert await step.run_workflow("quick", Leaf, 2) == 2
            slow.cancel()
            await step.sleep("on", "1 minute")
            return "done"

    async def story() -> None:
        host = EngineHost(Race)
        host.create()
        slow, quick = await created(host, 2)
        await host.end_child(quick, 2)
        await host.settle()
        await host.end_child(slow, 1)
        await host.settle()
        assert len(host.of_kind(r.ChildEnded)) == 1
        assert await host.output() == "done"

    play(story)


def test_other_code_that_wants_another_child_is_held():
    """Closes: the step is renamed to another workflow under a live instance, which then waits for the wrong child."""

    class Other(Workflow[Any, Any], name="one"):
        async def run(self, event: Event, step: Step) -> Any:
            return await step.run_workflow("leaf", "another", 7)

    async def story() -> None:
        host = EngineHost(One)
        host.create()
        await host.cut_after(2)
        host.load(Other)
        assert "for the child leaf/" in await host.held()

    play(story)


def test_a_step_beside_goes_on_while_a_child_works():
    """A parent with a callback inside keeps its slot; an end that comes then is handed out at once."""

    class Both(Workflow[Any, Any], name="both"):
        async def run(self, event: Event, step: Step) -> Any:
            return await asyncio.gather(step.do("work", self.env.work, 1, 5.0), step.run_workflow("leaf", Leaf, 2))

    async def story() -> None:
        host = EngineHost(Both, env=Recorder())
        host.create()
        (child,) = await created(host)
        assert host.engine is not None and host.engine.has_slot
        await host.end_child(child, 2)
        assert await host.output() == [1, 2]
        assert host.slots_given_back == 1

    play(story)


@pytest.mark.parametrize("wrong", [5, Workflow, int, "no legal name!"])
def test_what_is_no_workflow_is_refused_at_the_call(wrong):
    """Before anything is recorded of it."""

    class Wrong(Workflow[Any, Any], name="wrong"):
        async def run(self, event: Event, step: Step) -> Any:
            return await step.run_workflow("leaf", wrong, 7)

    async def story() -> None:
        host = EngineHost(Wrong)
        host.create()
        raises_misuse(await host.failure(), "workflow")
        assert host.of_kind(r.ChildBegun) == []

    play(story)
