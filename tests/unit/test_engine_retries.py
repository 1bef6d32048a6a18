"""Retries: how often, how long between, and that both survive a crash (invariants E3 and E6)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from unit.engine_host import EngineHost, Recorder, play

from toque._payload import decode
from toque.errors import NonRetryableError, StepFailed
from toque.storage import records as r
from toque.workflow import Retries, Step, StepContext, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]
UNTIL_THE_END = 1_000


def failing(times: int, retries: Retries | None = None) -> type[Workflow[Any, Any]]:
    """One step that fails so often."""

    class Failing(Workflow[Any, Any], name="failing"):
        async def run(self, event: Event, step: Step) -> Any:
            return await step.do("flaky", self.env.fail, times, "done", retries=retries)

    return Failing


async def ended(flow: type[Workflow[Any, Any]], *, jitter: float = 0.0) -> EngineHost:
    host = EngineHost(flow, env=Recorder())
    host.jitter = jitter
    host.create()
    await host.ended()
    return host


def waits_ms(host: EngineHost) -> list[int]:
    """From each failed attempt to the next one's begin, as it was recorded."""
    return [record.retry_at - record.at for record in host.of_kind(r.AttemptFailed)]


def starts_ms(host: EngineHost) -> list[int]:
    kinds = host.of_kind(r.AttemptFailed) + host.of_kind(r.StepDone) + host.of_kind(r.StepFailed)
    return [record.started_at for record in kinds]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_a_step_is_tried_once_more_than_its_limit(limit: int) -> None:
    """Then it has failed, with the last error and the number of attempts."""

    async def story() -> None:
        host = await ended(failing(UNTIL_THE_END, Retries(limit=limit, delay="1 s")))

        assert host.env.entries == [("flaky", 1, number) for number in range(1, limit + 2)]
        (failed,) = host.of_kind(r.StepFailed)
        assert failed.attempt == limit + 1
        assert failed.failure.type == "ConnectionError"
        assert failed.failure.message == f"failure {limit + 1}"

    play(story)


def test_the_last_attempt_may_still_succeed() -> None:
    """A limit of three re-tries allows three failures."""

    async def story() -> None:
        host = await ended(failing(3, Retries(limit=3, delay="1 s")))

        assert decode(host.of_kind(r.Ended)[0].output, str, what="output") == "done"

    play(story)


def test_the_defaults_are_five_retries_from_ten_seconds_doubling() -> None:
    """10, 20, 40, 80, 160 seconds without jitter."""

    async def story() -> None:
        host = await ended(failing(UNTIL_THE_END))

        assert [wait // 1000 for wait in waits_ms(host)] == [10, 20, 40, 80, 160]

    play(story)


@pytest.mark.parametrize(("backoff", "waits_s"), [
    ("constant", [2, 2, 2, 2]), ("linear", [2, 4, 6, 7]), ("exponential", [2, 4, 7, 7]),
])
def test_the_wait_grows_as_told_up_to_its_cap(backoff: Any, waits_s: list[int]) -> None:
    """Constant, linear, exponential; never above the cap."""

    async def story() -> None:
        host = await ended(failing(UNTIL_THE_END, Retries(limit=4, delay="2 s", backoff=backoff, cap="7 s")))

        assert [wait // 1000 for wait in waits_ms(host)] == waits_s

    play(story)


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999])
def test_jitter_takes_off_up_to_a_half(jitter: float) -> None:
    """Never more, and it never lengthens the wait."""

    async def story() -> None:
        host = await ended(failing(1, Retries(delay="10 s")), jitter=jitter)

        (wait,) = waits_ms(host)
        assert 5_000 <= wait <= 10_001  # a millisecond for what the clock may be behind
        assert wait == pytest.approx(10_000 * (1 - jitter / 2), abs=2)

    play(story)


def test_an_attempt_never_begins_before_its_wait_is_over() -> None:
    """By the broker's clock."""

    async def story() -> None:
        host = await ended(failing(4, Retries(limit=4, delay="3 s")), jitter=0.7)

        due = [record.retry_at for record in host.of_kind(r.AttemptFailed)]
        assert all(started >= due for started, due in zip(starts_ms(host)[1:], due, strict=True))

    play(story)


def test_a_wait_survives_a_crash_and_is_not_begun_again() -> None:
    """Killed in the middle of the wait: the next attempt comes when it was due, not earlier, not later."""

    async def story() -> None:
        host = EngineHost(failing(1, Retries(delay="1 hour", jitter=False)), env=Recorder())
        host.create()
        await asyncio.sleep(1800)
        host.crash()
        await asyncio.sleep(600)
        host.load()
        await host.ended()

        (failed,) = host.of_kind(r.AttemptFailed)
        (done,) = host.of_kind(r.StepDone)
        assert done.started_at == failed.retry_at

    play(story)


def test_retries_count_on_after_a_crash() -> None:
    """Killed after each failed attempt: the limit and the back-off are those of one life."""

    async def story() -> None:
        host = EngineHost(failing(UNTIL_THE_END, Retries(limit=3, delay="2 s", jitter=False)), env=Recorder())
        host.create()
        while not host.of_kind(r.StepFailed):
            await host.cut_after(len(host.records) + 1, interrupted=False)
            if host.row is None:
                host.create()
            elif not host.of_kind(r.StepFailed):
                host.load()

        failed = host.of_kind(r.AttemptFailed)
        assert [record.retry_at - record.at for record in failed] == [2001, 4001, 8001]
        assert [record.attempt for record in failed] == [1, 2, 3]

    play(story)


def test_the_stored_options_win_over_changed_code() -> None:
    """What was stored with the first failed attempt holds for the step, whatever a new version of the code says."""

    async def story() -> None:
        host = EngineHost(failing(UNTIL_THE_END, Retries(limit=2, delay="1 hour", jitter=False)), env=Recorder())
        host.create()
        await asyncio.sleep(10)
        host.crash()
        host.load(failing(UNTIL_THE_END, Retries(limit=9, delay="1 s", backoff="constant")))
        await host.ended()

        assert len(host.env.entries) == 3
        assert [record.retry_at - record.at for record in host.of_kind(r.AttemptFailed)] == [3_600_001, 3_600_001]
        assert {record.config.limit for record in host.of_kind(r.AttemptFailed)} == {2}

    play(story)


def test_non_retryable_errors_fail_the_step_at_once() -> None:
    """A subclass does, too."""

    class Refused(NonRetryableError):
        pass

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            async def refuse() -> None:
                raise Refused("no")

            try:
                await step.do("refused", refuse)
            except StepFailed as error:
                return [error.attempts, error.error_message, error.error_type.rpartition(".")[2]]

    async def story() -> None:
        host = EngineHost(Flow)
        host.create()

        assert await host.output() == [1, "no", "Refused"]
        assert host.of_kind(r.AttemptFailed) == []

    play(story)


def test_each_occurrence_has_retries_of_its_own() -> None:
    """Steps of one name do not share their failures."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            retries = Retries(limit=1, delay="1 s")
            return await asyncio.gather(*(step.do("flaky", self.env.fail, 1, n, retries=retries) for n in range(3)))

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder())
        host.create()

        assert await host.output() == [0, 1, 2]
        assert sorted(host.env.entries) == [("flaky", n, a) for n in (1, 2, 3) for a in (1, 2)]

    play(story)


def test_a_failure_keeps_type_message_and_traceback() -> None:
    """And the same StepFailed comes on replay."""

    async def explode() -> None:
        raise LookupError("nothing there")

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            try:
                await step.do("explode", explode, retries=Retries(limit=0))
            except StepFailed as error:
                self.env.append((error.step, error.error_type, error.error_message, error.attempts, error.traceback,
                                 str(error)))
            await step.sleep("nap", "1 hour")

    async def story() -> None:
        seen: list[Any] = []
        host = EngineHost(Flow, env=seen)
        host.create()
        await host.ended()

        assert len(seen) == 2
        assert seen[0] == seen[1]
        assert seen[0][:4] == ("explode", "LookupError", "nothing there", 1)
        assert "in explode" in seen[0][4]
        assert seen[0][5] == "step 'explode' failed after 1 attempt: LookupError: nothing there"

    play(story)


def test_the_context_tells_step_occurrence_attempt_and_key() -> None:
    """The idempotency key is the same for every attempt, and differs between steps."""
    seen: list[tuple[str, int, int, str, str, str]] = []

    async def tell(ctx: StepContext, fails: bool) -> None:
        seen.append((ctx.name, ctx.count, ctx.attempt, ctx.idempotency_key, ctx.instance_id, ctx.workflow_name))
        if fails and ctx.attempt == 1:
            raise ConnectionError

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            await step.do("a", tell, True)
            await step.do("a", tell, False)

    async def story() -> None:
        host = EngineHost(Flow)
        host.create()
        await host.ended()

    play(story)

    keys = [entry[3] for entry in seen]
    assert [entry[:3] for entry in seen] == [("a", 1, 1), ("a", 1, 2), ("a", 2, 1)]
    assert keys[0] == keys[1] != keys[2]
    assert seen[0][4:] == ("i1", "Flow")


def test_failed_attempts_are_forgotten_with_their_step() -> None:
    """A loop of failing steps does not grow the engine."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            for n in range(30):
                await step.do("flaky", self.env.fail, 1, n, retries=Retries(delay="100 ms"))

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder())
        engine = host.create()
        await host.ended()

        assert not engine.waits
        assert not engine._open
        assert not engine._unawaited

    play(story)
