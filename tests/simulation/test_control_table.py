"""docs/control.md says what each operation does in each status: every cell is tried on a running pod."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from toque.cli.steering import APPLIES
from toque.client import Instance
from toque.errors import InstanceEnded, InstanceNotFound
from toque.sim.world import World, account, play, sleeper_workflow, steps_workflow
from toque.storage import records as r
from toque.workflow import Step, Workflow, WorkflowEvent

PAGE = (Path(__file__).parents[2] / "docs" / "control.md").read_text()
REFUSED, GONE, NO_EFFECT = "refused", "gone", "no effect"


def table() -> dict[str, dict[str, str]]:
    """What the page says: operation → status → outcome."""
    lines = [line for line in PAGE.split("## In every status")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


class Short(Workflow[int, int], name="short"):
    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        return 1 // event.payload


async def one_in_each_status(world: World) -> dict[str, Instance[Any]]:
    """An instance in each status there is, the queued one first. Two are inside callbacks, and use up the slots."""
    client = world.client()
    handles: dict[str, Instance[Any]] = {}
    for status, workflow, params in (("complete", "short", 1), ("errored", "short", 0), ("waiting", "nap", 1),
                                     ("paused", "nap", 1), ("terminated", "nap", 1)):
        handles[status] = await client.create(workflow, params, id=status)
    await world.until(lambda: len(world.records(r.SleepStarted)) == 3, "those that sleep do")
    await world.until(lambda: len(world.records(r.Ended)) == 2, "those that end by themselves have ended")
    await handles["paused"].pause()
    await handles["terminated"].terminate()
    for status in ("running", "waitingForPause"):
        handles[status] = await client.create("work", 1, id=status)
        await world.until(lambda status=status: world.history.entered(status), "it is inside")
    await handles["waitingForPause"].pause()
    handles["queued"] = await client.create("work", 1, id="queued")
    for status, handle in handles.items():
        assert (await handle.status()).status == status
    return dict(sorted(handles.items(), key=lambda item: item[0] != "queued"))


async def outcome(handle: Instance[Any], operation: str, before: str) -> str:
    """In the words of the page."""
    run = (await handle.status()).run
    try:
        await getattr(handle, operation)()
        status = await handle.status()
    except InstanceEnded as error:
        assert before in str(error)
        assert (await handle.status()).status == before
        return REFUSED
    except InstanceNotFound:
        return GONE
    same = (status.status, status.run) == (before, run)
    return NO_EFFECT if same else status.status


@pytest.mark.parametrize("operation", table())
def test_an_operation_does_in_each_status_what_the_page_says(operation):
    """Closes: a transition that nobody has thought of. Queued first, for the others make room for it."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=2, step_s=600.0), Short,
                                             sleeper_workflow(world, nap="2 hours")))
        await world.all_owned()
        handles = await one_in_each_status(world)

        found = {status: await outcome(handle, operation, status) for status, handle in handles.items()}

        assert found == table()[operation]

    play(story, account=account(max_concurrent=2))


def test_the_page_has_every_operation_and_every_status():
    """So that a new one of either cannot be forgotten."""
    assert list(table()) == list(APPLIES)
    assert all(set(row) == {status.label for status in r.Status} for row in table().values())


@pytest.mark.parametrize("operation", table())
def test_the_command_line_means_those_for_which_something_happens(operation):
    """`--all` of `toque instances` passes over the others; queued ones are not listed."""
    changed = {status for status, told in table()[operation].items() if told not in (NO_EFFECT, REFUSED)}

    assert APPLIES[operation] == changed - {"queued"}
