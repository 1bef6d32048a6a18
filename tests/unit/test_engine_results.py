"""Results: encoded, checked and decoded before anything sees them; what cannot be recorded fails its step, not the pod."""

from __future__ import annotations

import asyncio
from pathlib import PurePosixPath
from typing import Any

import msgspec
import pytest
from unit.engine_host import EngineHost, Recorder, play, raises_misuse

from toque.errors import StepFailed
from toque.storage import records as r
from toque.workflow import Step, Workflow, WorkflowEvent

Event = WorkflowEvent[Any]


class Point(msgspec.Struct):
    x: int


class Raising(PurePosixPath):
    """Raises something of its own when it is encoded."""

    def __str__(self) -> str:
        raise LookupError("no text")


class Picky(msgspec.Struct):
    """Its own check raises something of its own when it is decoded."""

    x: int

    def __post_init__(self) -> None:
        if self.x > 5:
            raise LookupError("too much")


async def a_set_of_objects() -> Any:
    return {object()}


async def an_open_generator() -> Any:
    return (number for number in range(3))


def a_generator() -> Any:
    yield 1


async def two_megabytes() -> bytes:
    return b"x" * 2_000_000


async def a_text_for_an_int() -> int:
    return "text"  # type: ignore[return-value]  # that is the point


async def an_endless_list() -> Any:
    endless: list[Any] = []
    endless.append(endless)
    return endless


async def raising() -> Any:
    return Raising("a")


async def picky() -> Picky:
    value = Picky(1)
    value.x = 9
    return value


class Caught(Workflow[Any, Any]):
    """Tries one callback, and tells how it failed."""

    async def run(self, event: Event, step: Step) -> Any:
        try:
            await step.do("result", self.env)
        except StepFailed as error:
            return [error.error_type, error.error_message, error.attempts]


@pytest.mark.parametrize(("fn", "type_", "words"), [
    (a_set_of_objects, "toque.errors.InvalidPayload", ["the result of step 'result' cannot be encoded", "object"]),
    (an_open_generator, "toque.errors.InvalidPayload", ["the result of step 'result' cannot be encoded", "generator"]),
    (a_generator, "toque.errors.InvalidPayload", ["the result of step 'result' cannot be encoded", "generator"]),
    (two_megabytes, "toque.errors.PayloadTooLarge", ["the result of step 'result' takes 2,000,005 bytes", "1,048,576"]),
    (a_text_for_an_int, "toque.errors.InvalidPayload", ["the result of step 'result'", "Expected `int`, got `str`"]),
    (an_endless_list, "toque.errors.InvalidPayload", ["the result of step 'result'", "contains itself"]),
    (raising, "LookupError", ["no text"]),
    (picky, "LookupError", ["too much"]),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_result_that_cannot_be_recorded_fails_its_step_at_once(fn: Any, type_: str, words: list[str]) -> None:
    """Named, catchable, and not tried again: the next attempt would bring the same."""

    async def story() -> None:
        host = EngineHost(Caught, env=fn)
        host.create()
        found_type, message, attempts = await host.output()

        assert found_type == type_
        assert attempts == 1
        assert all(word in message for word in words), message
        assert host.of_kind(r.AttemptFailed) == []

    play(story)


def test_run_gets_the_decoded_value_now_as_on_replay() -> None:
    """Not the callback's own object: what cannot survive a restart does not survive the first time either."""
    made = Point(1)

    async def point() -> Point:
        return made

    async def pair() -> tuple[int, str]:
        return (1, "a")

    async def anything() -> Any:
        return (1, {"a": made})

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            found = await step.do("point", point)
            self.env.append([found is made, found, await step.do("pair", pair), await step.do("any", anything)])
            await step.sleep("nap", "1 hour")
            return None

    async def story() -> None:
        seen: list[Any] = []
        host = EngineHost(Flow, env=seen)
        host.create()
        await host.ended()

        assert seen == [[False, Point(1), (1, "a"), [1, {"a": {"x": 1}}]]] * 2

    play(story)


def test_the_largest_result_fits() -> None:
    """Exactly 1 MiB encoded, and not a byte more."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            fits = await step.do("fits", self.env.work, b"x" * (1024 * 1024 - 5))
            try:
                await step.do("too long", self.env.work, b"x" * (1024 * 1024 - 4))
            except StepFailed as error:
                return [len(fits), error.error_type]

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder())
        host.create()

        assert await host.output() == [1024 * 1024 - 5, "toque.errors.PayloadTooLarge"]

    play(story)


@pytest.mark.parametrize(("value", "words"), [
    (object(), ["the result of Returns/i1 cannot be encoded", "object"]),
    (b"x" * 2_000_000, ["the result of Returns/i1 takes 2,000,005 bytes"]),
], ids=["object", "too large"])
def test_an_output_that_cannot_be_recorded_makes_the_instance_errored(value: Any, words: list[str]) -> None:
    """The failure names the instance and what to do."""

    class Returns(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            await step.do("a", self.env.work)
            return value

    async def story() -> None:
        host = EngineHost(Returns, env=Recorder())
        host.create()

        raises_misuse(await host.failure(), *words)

    play(story)


def test_an_output_that_does_not_fit_the_annotation_makes_the_instance_errored() -> None:
    """Else it would be complete for good, with an output that a typed client can never read."""

    class Returns(Workflow[Any, Point]):
        async def run(self, event: Event, step: Step) -> Point:
            return 5  # type: ignore[return-value]  # that is the point

    async def story() -> None:
        host = EngineHost(Returns)
        host.create()

        failure = await host.failure()

        assert failure.type == "toque.errors.InvalidPayload"
        assert "the result of Returns/i1 cannot be decoded as" in failure.message

    play(story)


def test_an_output_whose_encoder_raises_makes_the_instance_errored() -> None:
    """Encoders are user code."""

    class Returns(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            return Raising("a")

    async def story() -> None:
        host = EngineHost(Returns)
        host.create()

        assert (await host.failure()).type == "LookupError"

    play(story)


def test_an_annotation_that_cannot_be_resolved_is_said_before_any_work_is_done() -> None:
    """At the step's call: the callback is not entered."""
    entered: list[int] = []

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            async def callback() -> Unheard:  # type: ignore[name-defined]  # noqa: F821  # that is the point
                entered.append(1)

            await step.do("x", callback)

    async def story() -> None:
        host = EngineHost(Flow)
        host.create()

        raises_misuse(await host.failure(), "Unheard", "callback", "cannot be resolved")
        assert entered == []

    play(story)


@pytest.mark.parametrize(("params", "words"), [
    (b"\xc1", ["the params of Typed/i1"]), (b"\xa1a", ["the params of Typed/i1", "Expected `int`, got `str`"]),
], ids=["no msgpack", "another type"])
def test_params_that_do_not_fit_make_the_instance_errored(params: bytes, words: list[str]) -> None:
    """An acknowledged creation never vanishes: it ends with the reason."""

    class Typed(Workflow[int, int]):
        async def run(self, event: WorkflowEvent[int], step: Step) -> int:
            return event.payload

    async def story() -> None:
        host = EngineHost(Typed)
        host.params = params
        host.create()

        raises_misuse(await host.failure(), *words)

    play(story)


def test_a_failing_neighbour_does_not_disturb_a_result() -> None:
    """Results of other branches are recorded and handed out all the same."""

    class Flow(Workflow[Any, Any]):
        async def run(self, event: Event, step: Step) -> Any:
            results = await asyncio.gather(step.do("bad", a_set_of_objects), step.do("good", self.env.work, 5, 1.0),
                                           return_exceptions=True)
            return [type(results[0]).__name__, results[1]]

    async def story() -> None:
        host = EngineHost(Flow, env=Recorder())
        host.create()

        assert await host.output() == ["StepFailed", 5]

    play(story)
