"""When a snapshot is taken, what is told of the journal behind it, and that every export is ended (rule 5)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from toque._subjects import StationId
from toque.sim import loop as sim
from toque.storage import records as r
from toque.storage.journal import Abandoned
from toque.storage.ports import BusTimeout
from toque.workers.snapshot_taker import AGAIN_S, SnapshotRules, SnapshotTaker

STATION = StationId(1, 0)
RULES = SnapshotRules(journal_bytes_min=1_000)


def position(group):
    return r.Position(10 * group, r.GroupHeader(1, "a-1", group, 7))


def row(group, *, journal_bytes=0, size_bytes=0):
    """A counting snapshot of one group, recorded two groups later."""
    record = r.Snapshot(0, 0, 0, 5, f"1-{10 * group}", position(group), 0, size_bytes, 1, 1, journal_bytes)
    return r.SnapshotRow(record, position(group + 2), record.position.sequence)


class Export:
    """Notes that it was closed."""

    def __init__(self):
        self.closed = False

    def close(self):
        self.closed = True


class Setting:
    """One station, and a taker whose store and objects say what the test wants."""

    def __init__(self, *rows, journal_bytes=0, error=None):
        self.now = 100.0
        self.rows, self.journal_bytes, self.error = list(rows), journal_bytes, error
        self.exports, self.read_back = [], []
        store = SimpleNamespace(snapshots=lambda station: self.rows, journal_bytes=lambda station: self.journal_bytes,
                                export=self.export, flush=self.nothing)
        objects = SimpleNamespace(chunk_bytes=300, write=self.write, check=self.check, names=self.names)
        context = SimpleNamespace(clock=SimpleNamespace(boottime=lambda: self.now), store=store, snapshots=objects)
        trim = SimpleNamespace(holds_back=lambda *about: False)
        self.taker = SnapshotTaker(context, trim, RULES)
        self.station = SimpleNamespace(
            id=STATION, frozen=False, in_time=lambda: True, now_ms=lambda: 5, spawn=asyncio.ensure_future,
            commits=SimpleNamespace(tail=position(50), commit=self.nothing))

    def export(self, station, chunk_bytes):
        self.exports.append(Export())
        return self.exports[-1]

    async def write(self, station, export, *, at, may_send):
        if self.error is not None:
            raise self.error
        return row(40).record

    async def check(self, station, record):
        self.read_back.append(record.name)

    async def names(self, station):
        return []

    async def nothing(self, *about):
        pass

    async def tick(self):
        await self.taker.tick([self.station], [STATION], SimpleNamespace(first_sequence=1, stored_bytes=0))
        return len(self.exports)


@pytest.mark.parametrize("error", [None, BusTimeout("no answer"), Abandoned("the deadline")])
def test_every_export_is_closed(error):
    """One that is left open keeps LMDB from ever using its pages again."""

    async def main():
        setting = Setting(journal_bytes=1_000, error=error)

        assert await setting.tick() == 1
        assert setting.exports[0].closed

    sim.run(main(), seed=1)


@pytest.mark.parametrize(("rows", "journal_bytes", "taken"), [
    ([], 999, 0), ([], 1_000, 1), ([row(10, journal_bytes=500)], 1_499, 0), ([row(10, journal_bytes=500)], 1_500, 1),
    ([row(10, journal_bytes=500, size_bytes=4_000)], 4_499, 0), ([row(10, journal_bytes=500, size_bytes=4_000)], 4_500, 1)])
def test_one_is_due_when_the_journal_has_grown_by_as_much_as_the_last_one_was_large(rows, journal_bytes, taken):
    """By the least amount at least: so all snapshots together cost no more than the journal."""

    async def main():
        assert await Setting(*rows, journal_bytes=journal_bytes).tick() == taken

    sim.run(main(), seed=1)


def test_one_that_failed_is_tried_again_after_half_a_minute():
    """Not every second: it may be large, and the server in trouble."""

    async def main():
        setting = Setting(journal_bytes=1_000, error=BusTimeout("no answer"))
        await setting.tick()
        setting.now += AGAIN_S - 1
        assert await setting.tick() == 1

        setting.now += 1
        assert await setting.tick() == 2

    sim.run(main(), seed=1)


def test_the_journal_may_go_behind_the_second_newest_and_the_newest_record_is_the_witness():
    """Were it the second newest's, a broker that lost the newest one could be trimmed behind the only one left."""

    async def main():
        setting = Setting(row(10), row(20, journal_bytes=300), row(30, journal_bytes=600), journal_bytes=900)
        await setting.tick()

        kept = setting.taker.kept[STATION]
        assert (kept.covered, kept.witness, kept.kept_bytes) == (200, position(32), 600)
        assert setting.read_back == ["1-200"]

    sim.run(main(), seed=1)
