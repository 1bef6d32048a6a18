"""Lists that are read page by page while stations change hands and instances are created."""

from __future__ import annotations

import pytest

from toque.client import InstanceStatus
from toque.sim.world import World, account, play, steps_workflow
from toque.storage import fold

RESTING = 60  # instances that are complete before the first page


@pytest.mark.parametrize("order", ["oldest", "newest"])
@pytest.mark.parametrize("away", ["killed", "stopped", "killed without its disk"])
def test_pages_go_on_at_another_owner(order: str, away: str) -> None:
    """Closes: an owner gives a cursor and dies, or hands its stations over; its successor, which has read them back, goes on
    elsewhere in them, or before it has read all: rows are left out, or come again."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=0.2))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        client = world.client()
        ids = [f"i{number}" for number in range(RESTING)]
        for instance in ids:
            await world.publish("work", instance)
        for instance in ids:
            await client.handle("work", instance).result("1 minute")
        page = await client.list_page(order=order, limit=7)  # type: ignore[arg-type]  # one of the two
        rows: list[InstanceStatus] = list(page.rows)
        number = 0
        while page.cursor is not None:
            number += 1
            await world.publish("work", f"later{number}")
            if number == 3 and away == "stopped":
                await a.stop()
            elif number == 3:
                a.kill()
            elif number == 4:
                await world.start_pod("a" if away == "killed" else "c", app)
            page = await client.list_page(cursor=page.cursor, limit=7, timeout="1 minute")
            rows += page.rows

        found = [row.id for row in rows]
        assert number > 5, "the change came in the middle"
        assert len(found) == len(set(found))
        assert set(ids) <= set(found)
        assert {row.status for row in rows if row.id in set(ids)} == {"complete"}

    play(story, account=account(stations=4))


def test_counts_are_those_of_every_accepted_record() -> None:
    """Closes: an owner counts what is folded, and has told the end of an instance that is not."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, steps=1, step_s=0.2)))
        await world.all_owned()
        client = world.client()
        for number in range(1, 21):
            await world.publish("work", f"i{number}")
            await client.handle("work", f"i{number}").result("1 minute")
            assert (await client.counts("work"))["work"]["complete"] == number

        assert await client.counts() == {"work": {"complete": 20, "queued": 0}}

    play(story)


def test_a_disk_from_before_the_table_of_states_is_indexed_at_the_claim() -> None:
    """Closes: a pod takes up what a version without that table left, and lists by status find nothing of it."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=0.2))
        a = await world.start_pod("a", app)
        await world.all_owned()
        client = world.client()
        for number in range(12):
            await world.publish("work", f"i{number}")
            await client.handle("work", f"i{number}").result("1 minute")
        a.kill()
        a.disk.tables.write(tuple(
            dict.fromkeys(rows) if table == fold.STATES else {} for table, rows in enumerate(a.disk.tables.tables)))

        await world.start_pod("a", app)
        found = [row.id async for row in client.list(status="complete", timeout="1 minute")]

        assert sorted(found) == sorted(f"i{number}" for number in range(12))

    play(story)
