"""What a deletion leaves: a tombstone, and nothing else; and what restarts do to rows and history."""

from __future__ import annotations

import pytest

from toque._subjects import StationId
from toque.storage import fold
from toque.storage import records as r
from toque.storage.folded_store import FoldedReaders
from toque.storage.memory_store import MemoryTables

STATION = StationId(1, 0)
PREFIX = fold.station_key(STATION)


class State(FoldedReaders):
    """Folded groups, each in a transaction of its own unless they are given together."""

    def __init__(self) -> None:
        self.tables = MemoryTables()
        super().__init__(self.tables)
        self._sequence = 0

    def add(self, *groups: list[r.Record]) -> None:
        batch = fold.FoldBatch(self.tables)
        for records in groups:
            self._sequence += 1
            header = r.GroupHeader(1, "a-1", self._sequence, 0)
            batch.apply(r.Group(STATION, r.Position(self._sequence, header), records))
        self.tables.write(batch.finish())

    def rows_of(self, *tables: int) -> int:
        return sum(len(self.tables.tables[table]) for table in tables)


def admitted(serial: int, id: str = "one", at: int = 10) -> r.Admitted:
    return r.Admitted(serial, 1, 1, at, "work", id, f"n-{serial}", serial, at, b"7", "application/json")


def ended(serial: int, seq: int, delete_at: int = 99) -> r.Ended:
    return r.Ended(serial, 1, seq, 20, r.Status.COMPLETE, b"\x07", None, delete_at)


STEP = r.StepDone(1, 1, 2, 15, r.StepKind.DO, "s", 1, 1, 14, b"\x01")
EVERYTHING = (fold.ROWS, fold.HISTORY, fold.IDS, fold.LIVE, fold.TIMERS, fold.DELETIONS)


@pytest.mark.parametrize("together", [True, False])
def test_nothing_of_a_deleted_instance_is_left_but_its_tombstone(together):
    """In the transaction that stored it, or in a later one."""
    groups = [[admitted(1)], [STEP], [r.SleepStarted(1, 1, 3, 16, "nap", 1, 999, True)],
              [r.Deleted(0, 0, 0, 30, [1], "q-1")]]
    state = State()
    for part in ([groups] if together else [[group] for group in groups]):
        state.add(*part)

    assert state.rows_of(*EVERYTHING) == 0
    assert state.find(STATION, "work", "one") is None
    assert state.tombstone(STATION, "work", "one") == r.TombRow("n-1", 30, "q-1", 30 + r.TOMBSTONE_MS)
    assert state.highest_serial(STATION) == 1
    assert sum(state.counts(STATION).values()) == 0


def test_late_records_of_a_deleted_instance_change_nothing():
    """A terminal record that was pending when somebody deleted it is no record of an unknown instance."""
    state = State()
    state.add([admitted(1)], [r.Deleted(0, 0, 0, 30, [1])], [STEP, ended(1, 3)])

    assert state.rows_of(*EVERYTHING) == 0


def test_an_instance_that_has_ended_stands_among_those_to_be_deleted():
    """By when its retention is over; a restart takes it away from there."""
    state = State()
    state.add([admitted(1)], [ended(1, 2, 50)], [admitted(2, "two")], [ended(2, 2, 40)])

    assert state.to_delete(STATION, 39, 10) == []
    assert state.to_delete(STATION, 50, 10) == [2, 1]
    state.add([r.Restarted(2, 2, 1, 30, "q", "1")])
    assert state.to_delete(STATION, 50, 10) == [1]
    assert {serial for serial, _ in state.unended(STATION)} == {2}


def test_an_ended_instance_without_a_time_is_kept():
    """Stored before there was retention."""
    state = State()
    state.add([admitted(1)], [ended(1, 2, 0)])

    assert state.to_delete(STATION, 1 << 60, 10) == []


def test_old_tombstones_are_forgotten_with_later_deletions():
    """A day later; the newer one of an id stays."""
    day = r.TOMBSTONE_MS
    state = State()
    state.add([admitted(1), admitted(2, "two")], [r.Deleted(0, 0, 0, 30, [1, 2])])
    state.add([admitted(3, "one")], [r.Deleted(0, 0, 0, 1000, [3])])
    assert not state.tombs_due(STATION, day)
    assert state.tombs_due(STATION, day + 31)

    state.add([r.Deleted(0, 0, 0, day + 40, [])])

    assert state.tombstone(STATION, "work", "two") is None
    assert state.tombstone(STATION, "work", "one") == r.TombRow("n-3", 1000, "", 1000 + day)
    state.add([r.Deleted(0, 0, 0, 2 * day, [])])
    assert state.rows_of(fold.TOMBS, fold.TOMB_DUE) == 0


def test_a_restart_from_the_start_frees_the_history_of_earlier_runs():
    """But for the creation; a restart from a step keeps it, for its results count."""
    state = State()
    state.add([admitted(1)], [STEP], [r.Restarted(1, 2, 1, 30, "q", "1")],
              [r.StepDone(1, 2, 2, 35, r.StepKind.DO, "s", 1, 1, 34, b"\x02")])
    assert [(record.run, record.seq) for record in state.history(STATION, 1)] == [(1, 1), (2, 1), (2, 2)]

    state.add([r.Restarted(1, 3, 1, 40, "q", "1", "1:1:s")])
    assert [(record.run, record.seq) for record in state.history(STATION, 1)] == [(1, 1), (2, 1), (2, 2), (3, 1)]

    state.add([r.Restarted(1, 4, 1, 50, "q", "1")])
    assert [(record.run, record.seq) for record in state.history(STATION, 1)] == [(1, 1), (4, 1)]


def test_records_of_an_earlier_run_count_no_more():
    """A result that was on its way when the instance was restarted."""
    state = State()
    state.add([admitted(1)], [r.Restarted(1, 2, 1, 30, "q", "1")], [STEP])

    row = state.row(STATION, 1)
    assert row is not None
    assert (row.run, row.seq) == (2, 1)


def test_a_restart_that_skips_a_run_halts_loudly():
    """A record is missing before it."""
    state = State()
    state.add([admitted(1)])

    with pytest.raises(fold.FoldError, match="run 3 follows 1"):
        state.add([r.Restarted(1, 3, 1, 30, "q", "1")])


def test_a_resume_moves_every_open_timer():
    """By the length of the pause; a paused instance is not among those that wake."""
    state = State()
    state.add([admitted(1)], [r.SleepStarted(1, 1, 2, 16, "nap", 1, 100, True)], [r.Paused(1, 1, 3, 20, "q-1")])
    assert state.due(STATION, 1 << 60, 10) == []

    state.add([r.Resumed(1, 1, 4, 70, "q-2", 50)], [r.Waiting(1, 1, 5, 70)])

    assert state.due(STATION, 1 << 60, 10) == [(150, 1)]
    row = state.row(STATION, 1)
    assert row is not None
    assert row.requests == ["q-1", "q-2"]
