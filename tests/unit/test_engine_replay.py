"""Replay equals live (protocol rule 18): an engine cut anywhere goes on from its records as if nothing had happened."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from example_flows import EXAMPLES, NEVER, PARAMS, Example
from unit.engine_host import EngineHost, Recorder, play

from toque._payload import decode
from toque.errors import StepFailed
from toque.storage import records as r
from toque.workflow import Step, StepContext, Workflow, WorkflowEvent

SEEDS = range(25)
LIVES_MAX = 200


def done_steps(host: EngineHost) -> set[tuple[str, int]]:
    return {(record.name, record.occurrence) for record in host.of_kind(r.StepDone)}


async def uncut(example: Example) -> EngineHost:
    host = EngineHost(example.flow, PARAMS, env=Recorder())
    host.create()
    assert await host.output() == example.output
    return host


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_an_example_runs_to_its_output(example: Example) -> None:
    """Without any cut, each callback is entered once per attempt."""

    async def story() -> None:
        host = await uncut(example)

        assert len(set(host.env.entries)) == len(host.env.entries)

    play(story)


@pytest.mark.parametrize("interrupted", [True, False], ids=["killed", "handed over"])
@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_a_cut_after_any_record_changes_nothing(example: Example, interrupted: bool) -> None:
    """Cut after each accepted record in turn: the output is the same, and no checkpointed callback is entered again."""

    async def story(records: int) -> None:
        host = EngineHost(example.flow, PARAMS, env=Recorder())
        host.create()
        await host.cut_after(records, interrupted=interrupted)
        done, entries = done_steps(host), len(host.env.entries)
        host.load()

        assert await host.output() == example.output
        assert not {entry[:2] for entry in host.env.entries[entries:]} & done
        if example.same_order:
            assert host.outcomes == whole.outcomes

    whole = play(lambda: uncut(example))
    for records in range(1, len(whole.records)):
        play(lambda records=records: story(records))


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_cuts_again_and_again_change_nothing(example: Example) -> None:
    """Many lives, each a few records long: the same output, whatever the cuts."""

    async def story(seed: int) -> None:
        rng = random.Random(seed)
        host = EngineHost(example.flow, PARAMS, env=Recorder())
        host.create()
        for _ in range(LIVES_MAX):
            done, entries = done_steps(host), len(host.env.entries)
            await host.cut_after(len(host.records) + rng.randint(1, 4), interrupted=False)
            assert not {entry[:2] for entry in host.env.entries[entries:]} & done
            row = host.row
            if row is not None and row.status.ended:
                break
            if row is None:
                host.create()
            else:
                host.load()

        assert decode(host.of_kind(r.Ended)[0].output, Any, what="output") == example.output

    for seed in range(5):
        play(lambda seed=seed: story(seed))


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_the_whole_journal_replays_without_any_callback(example: Example) -> None:
    """All outcomes recorded, the end not: replay alone comes to the same output, in no time."""

    async def story() -> None:
        whole = await uncut(example)
        host = EngineHost(example.flow, PARAMS, env=Recorder())
        host._keep(whole.records[:-1])
        host.load()

        assert await host.output() == example.output
        assert host.env.entries == []

    play(story)


class Tangle(Workflow[int, list[str]]):
    """A random program of nested gathers, groups, events, queues, locks and failing steps, whose steps share names.

    Each callback returns its own identity, so a result handed to another branch shows in the output.
    """

    async def run(self, event: WorkflowEvent[int], step: Step) -> list[str]:
        self.rng = random.Random(event.payload)
        self.log: list[str] = []
        self.queue: asyncio.Queue[str] = asyncio.Queue()
        self.lock = asyncio.Lock()
        self.events = [asyncio.Event() for _ in range(3)]
        plan = self._plan(depth=3)
        for event_ in self.events:
            plan.append(("set", event_))
        await self._do(step, "root", plan)
        return self.log

    def _plan(self, depth: int) -> list[Any]:
        plan: list[Any] = []
        for _ in range(self.rng.randint(1, 4)):
            kind = self.rng.choice(["do", "do", "do", "fail", "nap", "set", "locked", "put", "get", "both", "group"])
            if kind in ("both", "group") and depth:
                plan.append((kind, [self._plan(depth - 1) for _ in range(self.rng.randint(2, 3))]))
            elif kind == "set":
                plan.append((kind, self.rng.choice(self.events)))
            else:
                plan.append(("do" if kind in ("both", "group") else kind, self.rng.choice(["x", "y"])))
        return plan

    async def _do(self, step: Step, branch: str, plan: list[Any]) -> None:
        for number, (kind, what) in enumerate(plan):
            said = f"{branch}.{number} {kind}"
            match kind:
                case "do":
                    said += " " + await step.do(what, self.env.identity)
                case "fail":
                    try:
                        await step.do(what, self.env.broken, retries=NEVER)
                    except StepFailed as error:
                        said += f" {error.error_message}"
                case "nap":
                    await step.sleep(what, "500 ms")
                case "set":
                    what.set()
                case "locked":
                    async with self.lock:
                        said += " " + await step.do(what, self.env.identity)
                case "put":
                    self.queue.put_nowait(branch)
                case "get":
                    said += " " + (self.queue.get_nowait() if self.queue.qsize() else "nothing")
                case "both":
                    await asyncio.gather(*(self._do(step, f"{said}{n}", part) for n, part in enumerate(what)))
                case "group":
                    async with asyncio.TaskGroup() as group:
                        for n, part in enumerate(what):
                            group.create_task(self._do(step, f"{said}{n}", part))
            self.log.append(said)


class Identities:
    """Callbacks that take a random while and return who they are."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    async def identity(self, ctx: StepContext) -> str:
        await asyncio.sleep(self._rng.choice([0.0, 0.0, 0.1, 0.2, 2.0]))
        return f"{ctx.name}#{ctx.count}"

    async def broken(self, ctx: StepContext) -> str:
        await asyncio.sleep(self._rng.choice([0.0, 0.0, 0.1]))
        raise ConnectionError(f"{ctx.name}#{ctx.count}")


@pytest.mark.parametrize("seed", SEEDS)
def test_any_prefix_of_a_tangled_journal_replays(seed: int) -> None:
    """Each prefix fits the code, and the whole journal gives each branch what it had live."""

    async def story() -> None:
        live = EngineHost(Tangle, seed, env=Identities(seed))
        live.create()
        output = await live.output()
        for records in range(1, len(live.records)):
            host = EngineHost(Tangle, seed, env=Identities(seed + records), by_hand=True)
            host._keep(live.records[:records])
            host.load() or host._start()
            assert not host.told, f"after {records} records"
            host.crash()

        host = EngineHost(Tangle, seed, env=Identities(seed))
        host._keep(live.records[:-1])
        host.load()
        assert await host.output() == output

    play(story)


class FailsBesideSuccess(Workflow[int, list[str]]):
    """One branch fails for good in the very turn in which another succeeds; both then open a step of one name."""

    async def run(self, event: WorkflowEvent[int], step: Step) -> list[str]:
        failed = asyncio.Event()

        async def failing() -> None:
            try:
                await step.do("bad", self.env.broken, retries=NEVER)
            except StepFailed:
                failed.set()

        async def follower() -> str:
            await failed.wait()
            return "follower " + await step.do("x", self.env.identity)

        async def succeeding() -> str:
            await step.do("good", self.env.identity)
            return "succeeding " + await step.do("x", self.env.identity)

        results = await asyncio.gather(follower(), failing(), succeeding())
        return [str(result) for result in results]


class AtOnce:
    """All callbacks of a test end in one turn of the pod's loop."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    async def identity(self, ctx: StepContext) -> str:
        await self.event.wait()
        return f"{ctx.name}#{ctx.count}"

    async def broken(self) -> None:
        await self.event.wait()
        raise ConnectionError("broken")


def test_outcomes_of_one_turn_are_handed_out_one_at_a_time() -> None:
    """A failure and a success that come together wake their branches one after the other, as on replay."""

    async def story() -> None:
        live = EngineHost(FailsBesideSuccess, 1, env=AtOnce())
        live.create()
        await live.settle()
        live.env.event.set()
        output = await live.output()

        replayed = EngineHost(FailsBesideSuccess, 1, env=AtOnce())
        replayed._keep(live.records[:-1])
        replayed.load()

        assert await replayed.output() == output

    play(story)


def test_time_and_identity_come_from_the_creation() -> None:
    """The event is the same on every replay."""

    class Told(Workflow[int, list[Any]]):
        async def run(self, event: WorkflowEvent[int], step: Step) -> list[Any]:
            self.env.append(event)
            await step.sleep("nap", "1 day")
            return [event.timestamp.isoformat(), event.instance_id, event.workflow_name, event.payload]

    async def story() -> None:
        events: list[WorkflowEvent[int]] = []
        host = EngineHost(Told, 5, env=events)
        host.create()

        assert await host.output() == ["1970-01-01T00:16:40+00:00", "i1", "Told", 5]
        assert len(events) == 2
        assert events[0] == events[1]

    play(story)
