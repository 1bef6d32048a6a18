"""Interruptions: attempt numbers grow over them, five of one step are a failed attempt, ten hold (protocol rule 20)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from unit.engine_host import EngineHost, Recorder, play

from toque.errors import StepFailed
from toque.storage import records as r
from toque.storage.fold import INTERRUPTED_TYPE
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]
NEVER_ENDS_S = 1e6


class Stuck(Workflow[Any, Any]):
    """A step that never returns."""

    async def run(self, event: Event, step: Step) -> Any:
        await step.do("stuck", self.env.work, 1, NEVER_ENDS_S, timeout="300 days")


async def entered(host: EngineHost) -> None:
    """Wait until the engine's callbacks are inside."""
    while host.engine is None or not host.engine.inside:
        await asyncio.sleep(0.5)
    await host.settle()


async def killed(flow: type[Workflow[Any, Any]], times: int) -> EngineHost:
    """An instance whose pod was killed so often while a callback was inside; taken up again the last time, too."""
    host = EngineHost(flow, env=Recorder())
    host.create()
    for _ in range(times):
        await entered(host)
        host.crash()
        host.load()
    return host


def test_attempt_numbers_count_interruptions() -> None:
    """The third time it is entered, it is the third attempt, though none has failed."""

    async def story() -> None:
        host = await killed(Stuck, 2)
        await entered(host)

        assert host.env.entries == [("stuck", 1, 1), ("stuck", 1, 2), ("stuck", 1, 3)]
        assert host.of_kind(r.AttemptFailed) == []

    play(story)


def test_a_hand_over_is_no_interruption() -> None:
    """An attempt that was cut by shutdown or hand-over does not count."""

    async def story() -> None:
        host = EngineHost(Stuck, env=Recorder())
        host.create()
        for _ in range(12):
            await entered(host)
            host.crash(interrupted=False)
            host.load()

        assert {entry[2] for entry in host.env.entries} == {1}
        assert host.of_kind(r.AttemptFailed) == []

    play(story)


def test_five_interruptions_are_one_failed_attempt() -> None:
    """It is recorded as such, and the next attempt waits its back-off and has the next number."""

    async def story() -> None:
        host = await killed(Stuck, 5)
        await host.settle()

        (failed,) = host.of_kind(r.AttemptFailed)
        assert (failed.attempt, failed.failure.type) == (5, INTERRUPTED_TYPE)
        assert failed.retry_at - failed.at >= 5_000
        await entered(host)
        assert [entry[2] for entry in host.env.entries] == [1, 2, 3, 4, 5, 6]

    play(story)


def test_numbers_grow_over_failures_and_interruptions() -> None:
    """Interrupted twice, failed, interrupted: no number is given twice."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            return await step.do("x", self.env.fail, 3, "done", 1.0, retries=Retries(delay="100 ms"))

    async def story() -> None:
        host = await killed(Flow, 2)
        await host.cut_after(len(host.records) + 1)
        assert len(host.of_kind(r.AttemptFailed)) == 1
        host.load()

        assert await host.output() == "done"
        numbers = [entry[2] for entry in host.env.entries]
        assert numbers == sorted(set(numbers))

    play(story)


def test_the_step_fails_for_good_when_its_interrupted_attempts_are_used_up() -> None:
    """Without re-tries five interruptions make it fail, and run() can catch that and go on."""

    class OneTry(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            try:
                await step.do("stuck", self.env.work, 1, NEVER_ENDS_S, retries=Retries(limit=0))
            except StepFailed as error:
                return [error.error_type, error.attempts, await step.do("mend", self.env.work, "mended")]

    async def story() -> None:
        host = await killed(OneTry, 5)

        assert await host.output() == [INTERRUPTED_TYPE, 5, "mended"]

    play(story)


def test_ten_interruptions_without_progress_hold_the_instance() -> None:
    """A step that kills its pod does so ten times at most; nothing is entered from then on."""

    async def story() -> None:
        host = await killed(Stuck, 10)
        await host.held()
        entries = len(host.env.entries)
        for _ in range(3):
            host.crash()
            host.load()
            await host.held()

        assert entries == len(host.env.entries) == 10
        assert len(host.of_kind(r.Blocked)) == 1
        assert len(host.of_kind(r.Interrupted)) == 10

    play(story)


def test_progress_makes_interruptions_count_anew() -> None:
    """Nine at one position, nine at the next: it is not held."""

    class TwoSlow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            first = await step.do("a", self.env.work, 1, 10.0)
            return [first, await step.do("b", self.env.work, 2, 10.0)]

    async def story() -> None:
        host = await killed(TwoSlow, 9)
        while not host.of_kind(r.StepDone):
            await asyncio.sleep(1)
        for _ in range(9):
            await entered(host)
            host.crash()
            host.load()

        assert await host.output() == [1, 2]
        assert next(entry[2] for entry in host.env.entries if entry[0] == "b") == 1

    play(story)


class Beside(Workflow[Any, Any]):
    """A stuck step beside a loop that makes progress."""

    async def run(self, event: Event, step: Step) -> Any:
        async def loop() -> None:
            for _ in range(100):
                await step.do("tick", self.env.work, 1, 1.0)

        await asyncio.gather(step.do("stuck", self.env.work, 1, NEVER_ENDS_S, timeout="300 days"), loop())


def test_numbers_grow_though_a_neighbour_makes_progress() -> None:
    """The other branch's results do not make the stuck step's interruptions undone."""

    async def story() -> None:
        host = EngineHost(Beside, env=Recorder())
        host.create()
        for _ in range(4):
            await asyncio.sleep(2.5)
            host.crash()
            host.load()
        await host.settle()

        assert [entry[2] for entry in host.env.entries if entry[0] == "stuck"] == [1, 2, 3, 4, 5]

    play(story)


def test_a_step_opened_later_begins_at_its_first_attempt() -> None:
    """Interruptions before it was open are not its own."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            await step.do("a", self.env.work, 1, 5.0)
            await step.do("b", self.env.work, 1, 5.0)

    async def story() -> None:
        host = await killed(Flow, 3)
        await host.cut_after(len(host.records) + 1)  # a is done
        host.load()
        await host.ended()

        assert host.env.entries == [("a", 1, 1), ("a", 1, 2), ("a", 1, 3), ("a", 1, 4), ("b", 1, 1), ("b", 1, 2)]

    play(story)


def test_a_retry_that_is_interrupted_five_times_fails_again() -> None:
    """The count begins anew with each failed attempt."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            await step.do("x", self.env.fail, 1, "done", 3.0, retries=Retries(limit=5, delay="100 ms"))

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder())
        host.create()
        await asyncio.sleep(3.05)
        assert len(host.of_kind(r.AttemptFailed)) == 1
        for _ in range(5):
            await entered(host)
            host.crash()
            host.load()
        await host.ended()

        failures = [(record.attempt, record.failure.type) for record in host.of_kind(r.AttemptFailed)]
        assert failures == [(1, "ConnectionError"), (6, INTERRUPTED_TYPE)]

    play(story)


def test_a_waiting_instance_is_not_interrupted() -> None:
    """It held no slot; its retry comes when it is due, with the next number."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            return await step.do("x", self.env.fail, 1, "done", retries=Retries(delay="1 hour"))

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder())
        host.create()
        await asyncio.sleep(10)
        for _ in range(12):
            host.crash()
            host.load()

        assert await host.output() == "done"
        assert [entry[2] for entry in host.env.entries] == [1, 2]

    play(story)


@pytest.mark.parametrize("beside", ["callback", "sleep"])
def test_an_interrupted_attempt_beside_other_steps_does_not_rest_too_early(beside: str) -> None:
    """The record of the failed attempt must not say that the instance waits while another callback is entered."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            async def other() -> None:
                await step.do("quick", self.env.work, 1, 1.0)
                if beside == "callback":
                    await step.do("other", self.env.work, 2, 60.0)
                else:
                    await step.sleep("other", "1 day")

            await asyncio.gather(step.do("stuck", self.env.work, 1, 30.0, retries=Retries(delay="1 hour")), other())

    async def story() -> None:
        host = await killed(Flow, 4)
        await asyncio.sleep(1.5)  # quick is done, the other step is open
        host.crash()
        host.load()
        await host.settle()

        assert [record.failure.type for record in host.of_kind(r.AttemptFailed)] == [INTERRUPTED_TYPE]
        assert host.row is not None
        assert host.row.status is (r.Status.RUNNING if beside == "callback" else r.Status.WAITING)
        assert (host.engine is not None and host.engine.inside == 1) == (beside == "callback")
        await host.ended()

    play(story)
