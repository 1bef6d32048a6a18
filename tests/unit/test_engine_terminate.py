"""Termination at every point of an instance's life: nothing is entered after it, and a repeat changes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from example_flows import EXAMPLES, PARAMS, Example
from unit.engine_host import EngineHost, Recorder, play

from toque.storage import records as r
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]


class Long(Workflow[Any, Any]):
    """Slow steps, one of them beside a sleep."""

    async def run(self, event: Event, step: Step) -> Any:
        await step.do("a", self.env.work, 1, 10.0)
        await asyncio.gather(step.do("b", self.env.work, 1, 10.0), step.sleep("nap", "15 seconds"))
        await step.do("flaky", self.env.fail, 1, retries=Retries(delay="1 minute"))
        await step.do("c", self.env.work, 1, 10.0)


def long_host(*, by_hand: bool = False) -> EngineHost:
    host = EngineHost(Long, env=Recorder(), by_hand=by_hand)
    host.create()
    return host


async def terminated(host: EngineHost) -> None:
    """Terminate it as a control operation does: in memory, or read back for it."""
    engine = host.engine or host.read_back()
    engine.terminate()
    assert (await host.ended()).status is r.Status.TERMINATED
    await asyncio.sleep(10_000)


def test_before_run_was_entered() -> None:
    """The creation is not accepted yet: it ends without ever having run."""

    async def story() -> None:
        host = long_host(by_hand=True)
        assert host.engine is not None
        host.engine.terminate()
        host.accept()
        await host.settle()

        assert (await host.ended()).status is r.Status.TERMINATED
        assert host.env.entries == []
        assert host.engine is None

    play(story)


def test_while_a_callback_is_inside() -> None:
    """It is cancelled, its result refused; the slot goes back when it is out."""

    async def story() -> None:
        host = long_host()
        await asyncio.sleep(5)
        await terminated(host)

        assert [entry[0] for entry in host.env.entries] == ["a"]
        assert host.of_kind(r.StepDone) == []
        assert host.slots_given_back == 1
        assert host.inside == host.callbacks.inside == host.callbacks.abandoned == 0

    play(story)


def test_while_a_sync_callback_is_inside_its_thread() -> None:
    """A thread cannot be stopped: the end is told at once, the slot goes back when it returns."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            await step.do("a", lambda: 1)

    async def story() -> None:
        host = EngineHost(Flow)
        host.callbacks.by_hand = True
        host.create()
        await host.settle()
        assert host.engine is not None
        host.engine.terminate()
        assert (await host.ended()).status is r.Status.TERMINATED
        assert host.slots_given_back == 0

        host.callbacks.waiting[0]()
        await host.settle()
        assert host.slots_given_back == 1

    play(story)


def test_while_it_rests_out_of_memory() -> None:
    """Read back for it, without entering run()."""

    async def story() -> None:
        host = long_host()
        while host.engine is not None:
            await asyncio.sleep(1)
        entries = len(host.env.entries)
        await terminated(host)

        assert len(host.env.entries) == entries
        assert host.row is not None
        assert host.row.timers == {}

    play(story)


def test_while_a_callback_waits_for_an_acceptance() -> None:
    """Set in memory at once: the callback is not entered, though its predecessors are accepted before the end is."""

    async def story() -> None:
        host = long_host(by_hand=True)
        host.accept()
        await asyncio.sleep(11)
        assert len(host.pending) == 2  # a is done, the nap has begun, b waits for that
        assert host.engine is not None
        host.engine.terminate()
        while host.pending:
            host.accept(1)
            await host.settle()

        assert [entry[0] for entry in host.env.entries] == ["a"]
        assert (await host.ended()).status is r.Status.TERMINATED

    play(story)


def test_while_a_callback_waits_at_the_gate() -> None:
    """The gate opens for nobody."""

    async def story() -> None:
        host = EngineHost(Long, env=Recorder())
        host.gate_open = False
        host.create()
        await host.settle()
        assert host.engine is not None
        host.engine.terminate()
        host.open_gate()
        await host.settle()

        assert host.env.entries == []
        assert (await host.ended()).status is r.Status.TERMINATED

    play(story)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_after_any_record(example: Example) -> None:
    """Whatever the instance is at: one end, and no entry after it."""

    async def story(records: int) -> None:
        host = EngineHost(example.flow, PARAMS, env=Recorder())
        host.create()
        host.accept_until = records
        await host.reached.wait()
        await host.settle()
        host.accept_until = None
        engine = host.engine or host.read_back()
        if engine.ended:  # by itself, with an end that is not accepted yet
            return
        engine.terminate()
        entries = len(host.env.entries)
        host._accept_all()

        assert (await host.ended()).status is r.Status.TERMINATED
        await asyncio.sleep(1e6)
        assert len(host.of_kind(r.Ended)) == 1
        assert len(host.env.entries) == entries

    async def count() -> int:
        host = EngineHost(example.flow, PARAMS, env=Recorder())
        host.create()
        await host.ended()
        return len(host.records)

    for records in range(1, play(count)):
        play(lambda records=records: story(records))


def test_a_repeat_changes_nothing() -> None:
    """Before the acceptance of the end, and after it."""

    async def story() -> None:
        host = long_host(by_hand=True)
        engine = host.engine
        assert engine is not None
        engine.terminate()
        engine.terminate()
        host.accept()
        await host.settle()
        engine.terminate()
        await host.settle()

        assert host.pending == []
        assert len(host.of_kind(r.Ended)) == 1

    play(story)


def test_an_end_of_its_own_comes_first() -> None:
    """run() has returned, its end is pending: termination is too late."""

    class AtOnce(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            return 1

    async def story() -> None:
        host = EngineHost(AtOnce, by_hand=True)
        engine = host.create()
        host.accept()
        await host.settle()
        engine.terminate()
        host.accept()

        assert (await host.ended()).status is r.Status.COMPLETE

    play(story)


def test_finally_blocks_run_when_a_terminated_instance_leaves() -> None:
    """They get no step, and nothing they do counts."""
    seen: list[str] = []

    class Tidy(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            try:
                await step.do("a", self.env.work, 1, 100.0)
            finally:
                seen.append("finally")
                await step.do("clean up", self.env.work)

    async def story() -> None:
        host = EngineHost(Tidy, env=Recorder())
        host.create()
        await asyncio.sleep(1)
        await terminated(host)

        assert seen == ["finally"]
        assert [entry[0] for entry in host.env.entries] == ["a"]

    play(story)
