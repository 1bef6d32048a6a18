"""What the owner tells of an instance: only what is accepted, from memory and from the index alike."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from unit.engine_host import STATION, EngineHost, Recorder, play

from toque._protocol import Answer, DescribeView, InstanceRequest, InstanceView, Layout, encode
from toque.storage import records as r
from toque.storage.ports import Message
from toque.workers.answers import Answers
from toque.workflow import Retries, Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]


class Flow(Workflow[Any, Any], name="flow"):
    """A step, a long sleep, a step that fails once, and an end."""

    async def run(self, event: Event, step: Step) -> Any:
        await step.do("a", self.env.work, {"x": 1}, 1.0)
        await step.sleep("nap", "1 hour")
        await step.do("flaky", self.env.fail, 1, 5, retries=Retries(delay="1 hour", jitter=False))
        return [1, 2]


class Asking:
    """The owner's answers about the one instance of a host."""

    def __init__(self, host: EngineHost) -> None:
        self.host = host

    async def _ask(self, operation: str, json: bool) -> Answer:
        async def flush() -> None:
            pass

        host = self.host
        store = SimpleNamespace(find=host.store.find, row=host.store.row, history=host.store.history, flush=flush)
        by_id = {("flow", "i1"): host.engine} if host.engine is not None else {}
        control = SimpleNamespace(layout=Layout(generations=[(1, 1)]))
        header = r.GroupHeader(7, "s", 1, 0)
        station: Any = SimpleNamespace(
            id=STATION, account="main", by_id=by_id, missing=lambda row: "", stands_in_line=lambda serial: False,
            context=SimpleNamespace(store=store, pod="pod-a", control=control),
            commits=SimpleNamespace(tail=r.Position(1, header)), epoch=header.epoch)
        request = encode(InstanceRequest(workflow="flow", id="i1"), json=json)
        return await Answers(station)._answer(Message(f"station.{operation}", request), json)

    async def status(self, *, json: bool = True) -> InstanceView:
        answer = await self._ask("status", json)
        assert (answer.code, answer.epoch) == ("ok", 7), answer
        decode = msgspec.json.decode if json else msgspec.msgpack.decode
        return decode(answer.value, type=InstanceView)

    async def describe(self) -> DescribeView:
        answer = await self._ask("describe", True)
        assert answer.code == "ok", answer
        return msgspec.json.decode(answer.value, type=DescribeView)


def created(flow: type[Workflow[Any, Any]] = Flow, **options: Any) -> tuple[EngineHost, Asking]:
    host = EngineHost(flow, {"p": 5}, env=Recorder(), **options)
    host.create()
    return host, Asking(host)


def test_an_instance_is_queued_until_its_creation_is_accepted() -> None:
    """A crash would leave it so; nobody may have heard that it runs."""

    async def story() -> None:
        host, asking = created(by_hand=True)
        view = await asking.status()
        assert (view.status, view.admitted_at, view.created_at) == ("queued", 0, 1_000_000)

        host.accept()
        assert (await asking.status()).status == "running"

    play(story)


def test_an_end_is_told_after_its_acceptance() -> None:
    """Status, output and time of the end come together."""

    class AtOnce(Workflow[Any, Any], name="flow"):
        async def run(self, event: Event, step: Step) -> Any:
            return [1, 2]

    async def story() -> None:
        host, asking = created(AtOnce, by_hand=True)
        host.accept()
        await host.settle()
        view = await asking.status()
        assert (view.status, view.ended_at, bytes(view.output)) == ("running", 0, b"")

        host.accept()
        view = await asking.status()
        assert (view.status, view.ended_at, bytes(view.output)) == ("complete", 1_000_000, b"[1,2]")

    play(story)


def test_a_rest_is_told_after_its_acceptance() -> None:
    """And then when it ends."""

    async def story() -> None:
        host, asking = created(by_hand=True, evicts=False)
        host.accept()
        await asyncio.sleep(2)
        assert host.engine is not None
        assert host.engine.resting
        view = await asking.status()
        assert (view.status, view.wake_at) == ("running", 0)

        host.accept()
        view = await asking.status()
        assert (view.status, view.wake_at) == ("waiting", 1_001_000 + 3_600_001)

    play(story)


def test_a_hold_is_told_after_its_acceptance() -> None:
    """With the reason."""

    class Other(Workflow[Any, Any], name="flow"):
        async def run(self, event: Event, step: Step) -> Any:
            await step.do("b", self.env.work)

    async def story() -> None:
        host, asking = created()
        await asyncio.sleep(2)
        host.crash()
        host.by_hand = True
        host.load(Other)
        await asyncio.sleep(4000)
        view = await asking.status()
        assert (view.status, view.blocked_on) == ("running", "")

        host.accept()
        view = await asking.status()
        assert view.status == "running"
        assert view.blocked_on.startswith("code: flow/i1: the journal holds the outcome of do('a', occurrence 1)")

    play(story)


@pytest.mark.parametrize("at_s", [0.5, 100.0, 3700.0, 10_000.0], ids=["inside", "asleep", "retrying", "ended"])
def test_memory_and_index_tell_the_same(at_s: float) -> None:
    """Whether the instance is in memory, or read from the index, everything accepted."""

    async def story() -> None:
        host, asking = created(evicts=False)
        await asyncio.sleep(at_s)
        in_memory = await asking.status()
        engine, host.engine = host.engine, None
        in_index = await asking.status()
        host.engine = engine

        assert in_memory == in_index
        await host.ended()

    play(story)


def test_an_error_is_told_with_its_type_and_message() -> None:
    """As the failure was recorded."""

    class Broken(Workflow[Any, Any], name="flow"):
        async def run(self, event: Event, step: Step) -> Any:
            raise LookupError("nothing there")

    async def story() -> None:
        host, asking = created(Broken)
        await host.ended()
        view = await asking.status()

        assert (view.status, bytes(view.output)) == ("errored", b"")
        assert view.error is not None
        assert (view.error.type, view.error.message) == ("LookupError", "nothing there")

    play(story)


def test_an_answer_comes_in_the_encoding_of_its_question() -> None:
    """JSON for JSON, msgpack for msgpack, payloads too."""

    async def story() -> None:
        host, asking = created()
        await host.ended()

        assert bytes((await asking.status(json=True)).output) == b"[1,2]"
        assert bytes((await asking.status(json=False)).output) == b"\x92\x01\x02"

    play(story)


def test_a_description_lists_the_steps_as_they_were_recorded() -> None:
    """With status, attempts, times, results and errors."""

    async def story() -> None:
        host, asking = created()
        await asyncio.sleep(100)
        asleep = await asking.describe()
        await asyncio.sleep(3600)
        retrying = await asking.describe()
        await host.ended()
        ended = await asking.describe()

        assert [(step.kind, step.name, step.status) for step in asleep.steps] == [
            ("do", "a", "complete"), ("sleep", "nap", "sleeping")]
        assert (asleep.steps[0].started_at, asleep.steps[0].ended_at) == (1_000_000, 1_001_000)
        assert bytes(asleep.steps[0].output) == b'{"x":1}'
        assert bytes(asleep.params) == b'{"p":5}'
        flaky = retrying.steps[2]
        assert (flaky.status, flaky.attempts, flaky.due - asleep.steps[1].due) == ("retrying", 1, 3_600_001)
        assert flaky.error is not None
        assert flaky.error.type == "ConnectionError"
        assert [(step.name, step.status, step.attempts) for step in ended.steps] == [
            ("a", "complete", 1), ("nap", "complete", 0), ("flaky", "complete", 2)]

    play(story)


def test_a_cancelled_wait_is_shown_as_cancelled() -> None:
    """Not as a sleep that goes on for ever."""

    class Cancels(Workflow[Any, Any], name="flow"):
        async def run(self, event: Event, step: Step) -> Any:
            nap = step.sleep("nap", "1 hour")
            await step.do("a", self.env.work, 1, 5.0)
            nap.cancel()
            await step.sleep("long", "1 day")

    async def story() -> None:
        host, asking = created(Cancels)
        await asyncio.sleep(10)

        steps = (await asking.describe()).steps
        assert [(step.name, step.status, step.due) for step in steps] == [
            ("nap", "cancelled", 0), ("a", "complete", 0), ("long", "sleeping", steps[2].due)]
        await host.ended()

    play(story)
