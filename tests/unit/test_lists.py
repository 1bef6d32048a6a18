"""Promises about lists and their cursors: every page goes on where the one before stopped, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in_owner import new_place

from toque import sim
from toque._lists import list_request
from toque._subjects import StationId
from toque.errors import OwnerAway, UsageError
from toque.storage import records as r
from toque.storage.memory_store import MemoryStore
from toque.storage.ports import RowQuery

STATION = StationId(1, 0)


@pytest.mark.parametrize("order", ["oldest", "newest"])
def test_pages_put_together_are_the_list(order):
    """Each instance once, in order, from a cursor alone; its text is safe in a URL."""

    async def main():
        place = await new_place()
        for n in range(230):
            place.owner.put("census", f"n{n}", "running", admitted_at=1_000 + n)
        found, page = [], await place.client.list_page("census", order=order, limit=23)
        while page.cursor is not None:
            assert page.cursor.replace("-", "").replace("_", "").isalnum()
            found += page.rows
            page = await place.client.list_page(cursor=page.cursor, limit=23)

        ids = [row.id for row in found + page.rows]
        assert ids == [f"n{n}" for n in (range(230) if order == "oldest" else reversed(range(230)))]
        assert ids == [row.id async for row in place.client.list("census", order=order, page_size=7)]

    sim.run(main(), seed=1)


def test_a_page_takes_no_more_of_a_station_than_it_gives():
    """Rows that were read and not given come with the next page, though others have come in front of them."""

    async def main():
        place = await new_place()
        for n in range(60):
            place.owner.put("census", f"n{n}", "running", admitted_at=1_000 + n)
        first = await place.client.list_page(order="newest", limit=10)
        for n in range(60, 120):
            place.owner.put("census", f"n{n}", "running", admitted_at=1_000 + n)

        rest = await place.client.list_page(cursor=first.cursor, limit=100)

        assert [row.id for row in first.rows + rest.rows] == [f"n{n}" for n in reversed(range(60))]

    sim.run(main(), seed=1)


def test_a_cursor_belongs_to_its_list():
    """Given with other filters, another order or to another account it is refused, and so is what is none."""

    async def main():
        place = await new_place()
        for n in range(30):
            place.owner.put("census", f"n{n}", "running", admitted_at=1 + n)
        cursor = (await place.client.list_page("census", status="running", limit=5)).cursor

        assert (await place.client.list_page("census", status="running", cursor=cursor)).rows
        for wrong in ({"status": "complete"}, {"order": "newest"}, {"id_prefix": "n"}):
            with pytest.raises(UsageError, match="another list"):
                await place.client.list_page("census", cursor=cursor, **wrong)
        for text in ("x", "%%%", cursor[:-6]):
            with pytest.raises(UsageError, match="no cursor"):
                await place.client.list_page(cursor=text)

    sim.run(main(), seed=1)


@pytest.mark.parametrize(("arguments", "said"), [
    ({"order": "up"}, "newest"), ({"limit": 0}, "1 to 1000"), ({"limit": 1001}, "1 to 1000"),
    ({"status": ["running", "done"]}, "there are running"), ({"created_after": datetime(2026, 1, 1)}, "time zone")])
def test_illegal_pages_are_refused(arguments, said):
    """The error says what is legal."""

    async def main():
        place = await new_place()

        with pytest.raises(UsageError, match=said):
            await place.client.list_page(**arguments)

    sim.run(main(), seed=1)


def test_a_page_with_a_silent_station_is_none():
    """Instead of leaving rows out it raises; the cursor stays good."""

    async def main():
        place = await new_place()
        place.owner.put("census", "a", "running", admitted_at=1)
        await place.owner.close()

        with pytest.raises(OwnerAway, match="incomplete"):
            await place.client.list_page(timeout="2 seconds")
        with pytest.raises(OwnerAway, match="incomplete"):
            await place.client.counts(timeout="2 seconds")

    sim.run(main(), seed=1)


def test_counts_add_up_stations_and_queues():
    """Per workflow and status; what is queued is what lies in the queue, without what the owners are through with."""

    async def main():
        place = await new_place()
        for n in range(40):
            place.owner.put("census", f"n{n}", "running" if n % 4 else "complete")
        place.owner.put("report", "r", "errored")
        for _ in range(20):
            await place.client.create("census")
        place.owner.purgeable = {"census": 2}

        assert await place.client.counts() == {
            "census": {"complete": 10, "queued": 4, "running": 30}, "report": {"errored": 1}}

    sim.run(main(), seed=1)


# -- under change ------------------------------------------------------------------------------------------------------

class Changing:
    """One station's instances, some of which change between any two pages."""

    def __init__(self, store: MemoryStore, rng: random.Random) -> None:
        self.store = store
        self.rng = rng
        self.sequence = 0
        self.rows: dict[int, tuple[int, int]] = {}  # serial → run, seq of those that may change
        self.serial = 0

    def change(self, records: list[r.Record]) -> None:
        self.sequence += 1
        position = r.Position(self.sequence, r.GroupHeader(1, "a-1", self.sequence, self.sequence))
        self.store.apply(r.Group(STATION, position, records))

    def admit(self) -> int:
        self.serial += 1
        workflow = self.rng.choice(["census", "report"])
        self.change([r.Admitted(self.serial, 1, 1, self.serial * 10, workflow, f"i{self.serial}", "n", 0,
                                self.serial * 10, b"1", "application/json")])
        return self.serial

    def step(self) -> None:
        """End an instance, restart it, delete it, or admit another one."""
        serial = self.rng.choice([*self.rows, 0])
        run, seq = self.rows.get(serial, (0, 0))
        if not serial:
            self.admit()
        elif self.rng.random() < 0.3:
            del self.rows[serial]
            self.change([r.Deleted(0, 0, 0, 99, [serial])])
        elif seq % 2:
            self.rows[serial] = (run, seq + 1)
            self.change([r.Ended(serial, run, seq + 1, 99, r.Status.ERRORED, b"")])
        else:
            self.rows[serial] = (run + 1, 1)
            self.change([r.Restarted(serial, run + 1, 1, 99, "", "1")])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), st.booleans(), st.sampled_from([(), (r.Status.RUNNING,), (r.Status.ERRORED,)]),
       st.sampled_from(["", "census"]), st.sampled_from(["", "i1"]), st.integers(1, 7), st.integers(1, 9))
def test_pages_neither_drop_nor_repeat_what_does_not_change(seed, newest, statuses, workflow, prefix, limit, look_max):
    """Whatever ends, begins again, comes and goes between the pages: none comes twice, and what stays as it is comes."""

    async def main():
        rng = random.Random(seed)
        place = Changing(MemoryStore(), rng)
        for _ in range(40):
            serial = place.admit()
            if rng.random() < 0.5:
                place.change([r.Ended(serial, 1, 2, 99, r.Status.ERRORED, b"")])
            elif rng.random() < 0.5:
                place.rows[serial] = (1, 1)
        await place.store.flush()
        query = RowQuery(newest=newest, statuses=statuses, workflow=workflow, id_prefix=prefix, limit=limit,
                         look_max=look_max)
        unchanged = {serial for serial in range(1, 41) if serial not in place.rows
                     and query.wants(place.store.row(STATION, serial))}
        found: list[int] = []
        after = -1
        while after:
            page = place.store.page(STATION, RowQuery(**{**vars(query), "after": max(0, after)}))
            found += [serial for serial, _ in page.rows]
            after = page.next
            if len(found) < 200:
                place.step()
                await place.store.flush()

        assert len(found) == len(set(found))
        assert found == sorted(found, reverse=newest)
        assert unchanged <= set(found)

    asyncio.run(main())


def test_bounds_of_time_reach_the_owner_as_milliseconds():
    """From the first on, up to the last without it."""
    request = list_request("", {"created_after": datetime(2026, 1, 1, tzinfo=UTC),
                                "ended_before": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(milliseconds=5)})

    assert (request.created_after, request.created_before, request.ended_after) == (1_767_225_600_000, 0, 0)
    assert request.ended_before == 1_767_225_600_005
