"""Commit before consequence (protocol rule 18): nothing leaves an instance before all its earlier records are accepted."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from example_flows import EXAMPLES, PARAMS, Example
from unit.engine_host import EngineHost, Recorder, play

from toque.storage import records as r
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]


class Two(Workflow[Any, list[int]]):
    """Two steps; `self.env.entries` shows where run() itself is, too."""

    async def run(self, event: Event, step: Step) -> list[int]:
        self.env.entries.append("run")
        a = await step.do("a", self.env.work, 1)
        self.env.entries.append("after a")
        return [a, await step.do("b", self.env.work, 2)]


def names(recorder: Recorder) -> list[str]:
    return [entry if isinstance(entry, str) else entry[0] for entry in recorder.entries]


async def begun(flow: type[Workflow[Any, Any]], *, env: Recorder | None = None) -> EngineHost:
    """An instance whose creation is accepted, and whose further records are accepted by hand."""
    host = EngineHost(flow, env=env or Recorder(), by_hand=True)
    host.create()
    host.accept()
    await host.settle()
    return host


def test_run_is_entered_after_the_acceptance_of_the_creation() -> None:
    """Not before: the creation might not be there after a crash."""

    async def story() -> None:
        host = EngineHost(Two, env=Recorder(), by_hand=True)
        host.create()
        await host.settle()
        assert names(host.env) == []

        host.accept()
        await host.settle()
        assert names(host.env)[:2] == ["run", "a"]

    play(story)


def test_run_goes_on_with_a_pending_result_but_enters_nothing() -> None:
    """The next callback waits for the acceptance; run() itself does not."""

    async def story() -> None:
        host = await begun(Two)
        assert names(host.env) == ["run", "a", "after a"]
        assert [type(record) for record, _ in host.pending] == [r.StepDone]

        host.accept()
        await host.settle()
        assert names(host.env) == ["run", "a", "after a", "b"]

    play(story)


class Branches(Workflow[Any, list[int]]):
    """Two branches of two steps."""

    async def run(self, event: Event, step: Step) -> list[int]:
        async def branch(name: str, seconds: float) -> int:
            await step.do(name + "1", self.env.work, 1, seconds)
            return int(await step.do(name + "2", self.env.work, 1, seconds))

        return list(await asyncio.gather(branch("a", 1.0), branch("b", 2.0)))


def test_a_callback_of_another_branch_waits_too() -> None:
    """No callback of the instance is entered while any record of it is pending, whoever wrote it."""

    async def story() -> None:
        host = await begun(Branches)
        await asyncio.sleep(3)
        assert names(host.env) == ["a1", "b1"]
        assert len(host.pending) == 2

        host.accept(1)
        await host.settle()
        assert names(host.env) == ["a1", "b1"]

        host.accept()
        await host.settle()
        assert names(host.env) == ["a1", "b1", "a2", "b2"]

    play(story)


class Flaky(Workflow[Any, int]):
    """A step that fails once and is tried again at once."""

    async def run(self, event: Event, step: Step) -> int:
        return int(await step.do("flaky", self.env.fail, 1, 5, retries=Retries(delay="0 s")))


def test_the_next_attempt_waits_for_the_record_of_the_failed_one() -> None:
    """However short the back-off is."""

    async def story() -> None:
        host = await begun(Flaky)
        await asyncio.sleep(10)
        assert host.env.entries == [("flaky", 1, 1)]

        host.accept()
        await host.settle()
        assert host.env.entries == [("flaky", 1, 1), ("flaky", 1, 2)]

    play(story)


class Naps(Workflow[Any, int]):
    """A short sleep, and a long one, before steps."""

    async def run(self, event: Event, step: Step) -> int:
        await step.sleep("short", "200 ms")
        await step.do("a", self.env.work)
        await step.sleep("long", "1 day")
        return int(await step.do("b", self.env.work, 1))


def test_a_callback_after_a_sleep_waits_for_the_records_of_the_sleep() -> None:
    """SleepDone is a record like any other."""

    async def story() -> None:
        host = await begun(Naps)
        await asyncio.sleep(1)
        assert [type(record) for record, _ in host.pending] == [r.SleepStarted, r.SleepDone]
        assert names(host.env) == []

        host.accept()
        await host.settle()
        assert names(host.env) == ["a"]

    play(story)


def test_a_slot_goes_back_after_the_acceptance_of_the_rest() -> None:
    """A resting instance is resting for everybody when the journal says so."""

    async def story() -> None:
        host = await begun(Naps)
        await asyncio.sleep(1)
        host.accept()
        await host.settle()
        assert [type(record) for record, _ in host.pending] == [r.StepDone, r.SleepStarted]
        assert host.engine is not None
        assert host.engine.resting
        assert host.slots_given_back == 0

        host.accept(1)
        assert host.slots_given_back == 0
        host.accept(1)
        assert host.slots_given_back == 1

    play(story)


class AtOnce(Workflow[Any, int]):
    """Ends without any step."""

    async def run(self, event: Event, step: Step) -> int:
        return 1


def test_the_end_is_told_after_its_acceptance() -> None:
    """And the slot goes back then, too."""

    async def story() -> None:
        host = await begun(AtOnce)
        assert [type(record) for record, _ in host.pending] == [r.Ended]
        assert host.told == []
        assert host.slots_given_back == 0

        host.accept()
        assert host.told == ["ended"]
        assert host.slots_given_back == 1

    play(story)


@pytest.mark.parametrize("gate", ["gate_open", "deadline_ahead"])
def test_a_gate_that_closes_during_the_commit_keeps_the_callback_out(gate: str) -> None:
    """All gates are read after the acceptance, directly before the entry."""

    async def story() -> None:
        host = await begun(Two)
        setattr(host, gate, False)
        host.accept()
        await host.settle()
        assert names(host.env) == ["run", "a", "after a"]

        host.deadline_ahead = True
        host.open_gate()
        await host.settle()
        assert names(host.env) == ["run", "a", "after a", "b"]

    play(story)


def test_what_waits_at_a_gate_waits_again_for_new_records() -> None:
    """The gate opens while another branch's record is pending: still nothing is entered."""

    async def story() -> None:
        host = await begun(Branches)
        await asyncio.sleep(1.5)
        host.gate_open = False
        host.accept()
        await asyncio.sleep(1)  # b1 is done meanwhile
        assert len(host.pending) == 1
        host.open_gate()
        await host.settle()
        assert names(host.env) == ["a1", "b1"]

        host.accept()
        await host.settle()
        assert names(host.env) == ["a1", "b1", "a2", "b2"]

    play(story)


async def interrupted_once() -> EngineHost:
    """The flow Two, interrupted inside its first callback; records are accepted by hand from here on."""
    host = EngineHost(Two, env=Recorder())
    host.create()
    await host.cut_after(1)
    host.env.entries.clear()
    host.by_hand = True
    host.load()
    await host.settle()
    return host


def test_an_interrupted_instance_gets_its_result_after_the_acceptance() -> None:
    """Else a run() that kills its pod would do so before its progress is recorded, each time."""

    async def story() -> None:
        host = await interrupted_once()
        assert names(host.env) == ["run", "a"]
        assert len(host.pending) == 1

        host.accept()
        await host.settle()
        assert names(host.env)[:3] == ["run", "a", "after a"]

    play(story)


def test_after_progress_results_come_at_once_again() -> None:
    """The interruption was at another position."""

    async def story() -> None:
        host = await interrupted_once()
        host.accept()
        await host.settle()

        assert names(host.env) == ["run", "a", "after a", "b"]
        assert [type(record) for record, _ in host.pending] == [r.StepDone, r.Ended]

    play(story)


def test_what_is_not_accepted_is_as_if_it_had_not_been() -> None:
    """A result that run() has seen, but the journal has not, is lost with the pod: its callback is entered again."""

    async def story() -> None:
        host = await begun(Two)
        assert "after a" in names(host.env)
        host.crash()
        host.by_hand = False
        host.load()

        assert await host.output() == [1, 2]
        assert names(host.env) == ["run", "a", "after a", "run", "a", "after a", "b"]

    play(story)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_slow_and_split_commits_change_nothing(example: Example) -> None:
    """Whatever the commits' delays and sizes, each gate is read with everything accepted, and the output is the same."""

    async def story(seed: int) -> None:
        rng = random.Random(seed)
        host = EngineHost(example.flow, PARAMS, env=Recorder())
        host.accept_delay_s = lambda: rng.choice([0.0, 0.002, 0.3, 2.0])
        host.group_max = lambda: rng.randint(1, 3)
        host.create()

        assert await host.output() == example.output
        assert len(set(host.env.entries)) == len(host.env.entries)

    for seed in range(4):
        play(lambda seed=seed: story(seed))
