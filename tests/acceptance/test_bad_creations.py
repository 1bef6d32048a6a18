"""Creations and workflows that are wrong: each error names the thing and says what to do, and nothing else suffers.

One `toque dev` serves all tests here; the last one looks whether anything was lost or left in the queues.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from acceptance.stack import APPS, RunAsync, Said, Stack, Terminal, eventually, toque_here

from toque.chaos.ledger import Ledger
from toque.client import Client
from toque.errors import InstanceErrored, InvalidName, PayloadTooLarge, UnknownWorkflow

pytestmark = pytest.mark.timeout(90)

WORKFLOWS = ("bare-number, blocking, blocking-callback, echo, five-steps, gated, overdue, sleeper, typed, "
             "unencodable")
LEGAL = "legal are letters a-z and A-Z, digits, '_' and '-', and it must not begin with '-'"
BAD_IDS = {
    "a.b": f"instance id 'a.b' has '.' at position 1; {LEGAL}",
    "a*": f"instance id 'a*' has '*' at position 1; {LEGAL}",
    ">": f"instance id '>' has '>' at position 0; {LEGAL}",
    "a b": f"instance id 'a b' has ' ' at position 1; {LEGAL}",
    "a\nb": f"instance id 'a\\nb' has '\\n' at position 1; {LEGAL}",
    "ab\n": f"instance id 'ab\\n' has '\\n' at position 2; {LEGAL}",
    "é": f"instance id 'é' has 'é' at position 0; {LEGAL}",
    "-ab": f"instance id '-ab' has '-' at position 0; {LEGAL}",
    "": "instance id is empty; legal are 1 to 100 characters",
    "x" * 101: f"instance id '{'x' * 39}…' has 101 characters; legal are 1 to 100",
}


class Kitchen:
    """A running `toque dev` with the kitchen app."""

    def __init__(self, stack: Stack, terminal: Terminal) -> None:
        self.stack = stack
        self.terminal = terminal
        self.url: str = json.loads((stack.dev / "dev.json").read_text())["url"]

    def toque(self, *arguments: str) -> Said:
        return toque_here(*arguments, "--nats", self.url)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with Client.connect(self.url) as client:
            yield client


@pytest.fixture(scope="module")
def kitchen(nats_binary: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    directory = tmp_path_factory.mktemp("kitchen")
    with Ledger.start(directory / "ledger.jsonl") as ledger:
        stack = Stack(directory, ledger)
        terminal = Terminal(["dev", str(APPS / "kitchen.py"), "--dir", str(stack.dev)], env=ledger.environment,
                            log=directory / "dev.log")
        try:
            terminal.wait_for("Ctrl-C ends all in order")
            yield Kitchen(stack, terminal)
        finally:
            terminal.close()
            stack.close()


Story = Callable[[Client], Awaitable[Any]]
WithClient = Callable[[Story], Any]


@pytest.fixture
def with_client(kitchen: Kitchen, run_async: RunAsync) -> WithClient:
    """Run a story with a client of the kitchen, and return what it returns."""

    def play(story: Story) -> Any:
        async def scenario() -> Any:
            async with kitchen.client() as client:
                return await story(client)

        return run_async(scenario())

    return play


# -- creations ---------------------------------------------------------------------------------------------------------

def test_an_unknown_workflow_is_named_with_those_that_there_are(kitchen: Kitchen, with_client: WithClient) -> None:
    """The client raises UnknownWorkflow, the command line exits with 1; both name the known ones."""
    message = (f"workflow 'nosuch' has never been served by a pod of account 'main' here (known are {WORKFLOWS}): check "
               "the name and the server, or start a pod; nothing was stored")

    with pytest.raises(UnknownWorkflow) as caught:
        with_client(lambda client: client.create("nosuch", 1))
    said = kitchen.toque("trigger", "nosuch", "1")

    assert str(caught.value) == message
    assert said.code == 1 and said.err.startswith(f"toque: {message}") and not said.out


@pytest.mark.parametrize("instance_id", BAD_IDS, ids=repr)
def test_a_bad_id_is_refused_at_its_first_bad_character(kitchen: Kitchen, with_client: WithClient, instance_id: str) -> None:
    """The client raises InvalidName, the command line exits with 2, in the same words; nothing is sent."""
    with pytest.raises(InvalidName) as caught:
        with_client(lambda client: client.create("echo", 1, id=instance_id))
    said = kitchen.toque("trigger", "echo", "1", f"--id={instance_id}")

    assert str(caught.value) == BAD_IDS[instance_id]
    assert (said.code, said.out, said.err) == (2, "", f"toque: {BAD_IDS[instance_id]}\n")


def test_params_that_are_no_json_are_refused(kitchen: Kitchen) -> None:
    """Exit code 2; the message shows where, and how JSON is put into a shell."""
    said = kitchen.toque("trigger", "echo", "{path: a.py}")

    assert said.code == 2 and not said.out
    assert said.err.startswith("toque: the params '{path: a.py}' are no JSON (JSON is malformed: ")
    assert """single quotes around all of it: '{"path": "a.py"}'""" in said.err


def test_oversized_params_are_refused_by_the_client(kitchen: Kitchen, with_client: WithClient, tmp_path: Path) -> None:
    """More than 1 MiB encoded: PayloadTooLarge with both sizes, exit code 2; the largest that fit go through."""
    too_much = "x" * (1024 * 1024)
    (tmp_path / "large.json").write_text(json.dumps(too_much))
    message = ("params of workflow 'echo' takes 1,048,581 bytes encoded, but at most 1,048,576 are allowed; store it "
               "elsewhere and pass a reference")

    with pytest.raises(PayloadTooLarge) as caught:
        with_client(lambda client: client.create("echo", too_much))
    said = kitchen.toque("trigger", "echo", "--params-file", str(tmp_path / "large.json"))

    async def largest(client: Client) -> int:
        handle = await client.create("echo", too_much[5:])
        return len(await handle.result("20 seconds"))

    assert (str(caught.value), caught.value.size, caught.value.limit) == (message, 1_048_581, 1_048_576)
    assert (said.code, said.out, said.err) == (2, "", f"toque: {message}\n")
    assert with_client(largest) == len(too_much) - 5


def test_params_of_another_form_make_an_errored_instance(kitchen: Kitchen) -> None:
    """A creation whose params do not fit the workflow's type is acknowledged, and says so itself; exit code 1."""
    said = kitchen.toque("trigger", "typed", '{"name": "soup"}', "--wait")

    assert said.code == 1 and not said.out
    assert "cannot be decoded as kitchen.Dish: Object missing required field `portions`" in said.err
    assert "`toque instances describe " in said.err


# -- results and durations ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("what", "failure"), [
    ("an object", "toque.errors.InvalidPayload: the result of step 'make' cannot be encoded: a value of type object "
                  "cannot be encoded; return or pass plain values, structs, dataclasses or models"),
    ("too much", "toque.errors.PayloadTooLarge: the result of step 'make' takes 1,048,582 bytes encoded, but at most "
                 "1,048,576 are allowed; store it elsewhere and pass a reference"),
])
def test_a_result_that_cannot_be_encoded_fails_its_step_at_once(
        kitchen: Kitchen, with_client: WithClient, what: str, failure: str) -> None:
    """There is no second attempt, though the step has retries, and run() may catch it."""

    async def story(client: Client) -> tuple[str, str]:
        handle = await client.create("unencodable", what)
        return handle.id, await handle.result("10 seconds")

    instance_id, told = with_client(story)

    visits = [visit for visit in kitchen.stack.ledgered().visits if visit.key.instance == instance_id]
    assert told == failure
    assert [(visit.step, visit.attempt, visit.outcome) for visit in visits] == [("make", 1, "ok")]


@pytest.mark.parametrize(("where", "message"), [
    ("sleep", "step.sleep('rest') is the bare number 5, which has no unit: write \"5 seconds\" or timedelta(seconds=5)"),
    ("timeout", "timeout is the bare number 2.5, which has no unit: write \"2.5 seconds\" or timedelta(seconds=2.5)"),
    ("delay", "Retries.delay is the bare number 10, which has no unit: write \"10 seconds\" or timedelta(seconds=10)"),
])
def test_a_bare_number_in_a_workflow_shows_both_forms(with_client: WithClient, where: str, message: str) -> None:
    """The instance ends errored with InvalidDuration; nothing sleeps for milliseconds, or for days."""

    async def story(client: Client) -> InstanceErrored:
        with pytest.raises(InstanceErrored) as caught:
            await (await client.create("bare-number", where)).result("10 seconds")
        return caught.value

    error = with_client(story)

    assert (error.error_type, error.error_message) == ("toque.errors.InvalidDuration", message)


@pytest.mark.parametrize(("arguments", "option"), [
    (["accounts", "set", "main", "--ttl", "5"], "--ttl"),
    (["worker", str(APPS / "kitchen.py"), "--grace", "5"], "--grace"),
])
def test_a_bare_number_as_an_option_shows_both_forms(kitchen: Kitchen, arguments: list[str], option: str) -> None:
    """Exit code 2, and the account keeps its TTL."""
    said = kitchen.toque(*arguments)

    assert (said.code, said.err) == (
        2, f'toque: {option} is the bare number 5, which has no unit: write "5 seconds" or timedelta(seconds=5)\n')


def test_a_run_that_blocks_the_loop_is_named(kitchen: Kitchen, with_client: WithClient) -> None:
    """The pod's output says that its loop is blocked, and in which function of the app; the instance completes."""

    async def story(client: Client) -> str:
        return str(await (await client.create("blocking", 1.0)).result("20 seconds"))

    assert with_client(story) == "done"
    complaint = complaint_of(kitchen, "blocking")
    assert "run() itself" in complaint and "kitchen.py" in complaint and "block_the_loop" in complaint
    assert "run() must only await steps" in complaint


def test_a_callback_that_blocks_the_loop_is_named(kitchen: Kitchen, with_client: WithClient) -> None:
    """Workflow, instance, step and line, in the pod's output and for a minute in `toque pods`."""

    async def story(client: Client) -> str:
        return str(await (await client.create("blocking-callback", 2.2, id="sleepy")).result("20 seconds"))

    assert with_client(story) == "done"
    complaint = complaint_of(kitchen, "blocking-callback")
    assert "the async callback" in complaint and "sleepy" in complaint and "nap" in complaint
    assert "kitchen.py" in complaint and "plain `def`" in complaint
    shown = kitchen.toque("pods", "-o", "json")
    assert any(view["loop_lag_worst_ms"] > 1000 and "step 'nap' of blocking-callback/sleepy" in view["loop_blocked_by"]
               for view in json.loads(shown.out))
    assert "by the async callback, step 'nap' of blocking-callback/sleepy" in shown.err


def complaint_of(kitchen: Kitchen, workflow: str) -> str:
    """The line that says that this workflow blocks the loop."""
    return next(line for line in kitchen.terminal.text.splitlines()
                if "the pod's loop is blocked" in line and f"workflow={workflow} " in f"{line} ")


def test_a_thread_that_outlives_its_time_out_is_shown_until_it_returns(
        kitchen: Kitchen, with_client: WithClient, tmp_path: Path) -> None:
    """Its late result is refused; it is counted as abandoned; `ctx.cancelled` tells it; its return is logged."""
    gate = tmp_path / "gate"

    async def story(client: Client) -> str:
        handle = await client.create("overdue", str(gate), id="late")
        await eventually(lambda: abandoned(client, 1))
        gate.touch()
        await eventually(lambda: abandoned(client, 0))
        return str(await handle.result("10 seconds"))

    assert with_client(story) == "it was told that the time was over"
    kitchen.terminal.wait_for("an abandoned callback has returned, and is refused")


async def abandoned(client: Client, number: int) -> bool:
    return sum(view.threads_abandoned for view in await client.pods()) == number


# -- afterwards --------------------------------------------------------------------------------------------------------

def test_after_all_of_it_nothing_is_queued_or_lost(kitchen: Kitchen, with_client: WithClient) -> None:
    """The queues are empty, every instance that was created has ended, and no refused id exists."""

    async def story(client: Client) -> list[Any]:
        await eventually(lambda: drained(client))
        assert await (await client.create("echo", "still there")).result("10 seconds") == "still there"
        return [row async for row in client.list()]

    rows = with_client(story)

    assert rows and all(row.ended for row in rows)
    assert not {row.id for row in rows} & set(BAD_IDS)
    assert kitchen.terminal.process.poll() is None


async def drained(client: Client) -> bool:
    return not any(report.queued for report in await client.queues())
