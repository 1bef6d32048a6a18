"""The fold: records are values (protocol rule 4), and folded state is what a replay of the journal gives."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toque._subjects import StationId
from toque.storage import fold
from toque.storage import records as r
from toque.storage.folded_store import FoldedReaders
from toque.storage.memory_store import MemoryTables

STATION = StationId(1, 0)
OTHER = StationId(1, 1)
DO = r.StepKind.DO


def admitted(serial=1, *, instance="one", run=1, queue_sequence=1):
    return r.Admitted(serial, run, 1, 10, "census", instance, "n", queue_sequence, 9, b"{}", "application/json")


def done(seq, *, serial=1, run=1, name="a", result=b"\x01"):
    return r.StepDone(serial, run, seq, 20, DO, name, 1, 1, 19, result)


def ended(seq, *, serial=1, run=1, status=r.Status.COMPLETE):
    return r.Ended(serial, run, seq, 30, status, b"\xc0")


def sleeping(seq, due, *, name="nap", idle=True, serial=1):
    return r.SleepStarted(serial, 1, seq, 20, name, 1, due, idle)


class Folded(FoldedReaders):
    """Folds groups into tables, one transaction each, unless told otherwise."""

    def __init__(self):
        self.tables = MemoryTables()
        super().__init__(self.tables)
        self.sequence = 0

    def group(self, *records, station=STATION, sequence=None):
        self.sequence = sequence or self.sequence + 1
        header = r.GroupHeader(1, "s", self.sequence, 0)
        return r.Group(station, r.Position(self.sequence, header), list(records))

    def apply(self, *groups):
        batch = fold.FoldBatch(self.tables)
        for group in groups:
            batch.apply(group)
        self.tables.write(batch.finish())
        return self

    def add(self, *records):
        return self.apply(self.group(*records))


def test_an_admitted_instance_has_its_row_id_and_count():
    """C5: the row, the id and the live mark come with the one record that proves that the instance exists."""
    state = Folded().add(admitted())

    row = state.row(STATION, 1)
    assert row is not None
    assert (row.id, row.status, row.seq) == ("one", r.Status.RUNNING, 1)
    assert state.find(STATION, "census", "one") == 1
    assert [serial for serial, _ in state.unended(STATION)] == [1]
    assert state.counts(STATION) == {("census", "running"): 1}
    assert state.queue_position(STATION, "census") == 1


def test_history_holds_every_record_in_order():
    """Groups cut an instance's records; the history joins them."""
    records = [admitted(), done(2, name="a"), done(3, name="b"), ended(4)]

    state = Folded().add(*records[:2]).add(records[2]).add(records[3])

    assert state.history(STATION, 1) == records


def test_a_group_that_was_applied_is_skipped():
    """Restoring may overlap what is folded already: a position is applied once."""
    state = Folded()
    group = state.group(admitted(), done(2))

    state.apply(group).apply(group)

    assert state.history(STATION, 1) == [admitted(), done(2)]
    assert state.counts(STATION) == {("census", "running"): 1}


def test_a_group_that_was_applied_does_not_bring_old_leases_back():
    """A lease is an absolute number without a sequence: only its group's position tells that it is an old one."""
    state = Folded()
    old, new = state.group(r.Lease(0, 0, 0, 1, "a-1", 1, 10)), state.group(r.Lease(0, 0, 0, 1, "a-1", 2, 4))

    state.apply(old, new).apply(old)

    assert state.leases(STATION) == {"a-1": r.LeaseRow(2, 4)}
    assert state.position(STATION) == new.position


def test_a_record_that_is_not_newer_is_ignored():
    """A late repeat of a record (same sequence in its instance) changes nothing: the first result stays."""
    state = Folded().add(admitted(), done(2, result=b"\x01")).add(done(2, result=b"\x02"))

    assert state.history(STATION, 1) == [admitted(), done(2, result=b"\x01")]


def test_a_second_admission_of_a_serial_is_ignored():
    """One record makes an instance, once."""
    state = Folded().add(admitted(), done(2)).add(admitted(instance="two"))

    row = state.row(STATION, 1)
    assert row is not None
    assert (row.id, row.seq) == ("one", 2)
    assert state.find(STATION, "census", "two") is None


def test_a_record_of_an_older_run_is_ignored():
    """After a restart a late record of the run before must not become part of the new one."""
    state = Folded().add(admitted(run=2)).add(done(2, run=1))

    assert state.history(STATION, 1) == [admitted(run=2)]


def test_a_record_after_the_terminal_one_is_ignored():
    """S1: what has ended stays as it ended."""
    state = Folded().add(admitted(), ended(2)).add(ended(3, status=r.Status.TERMINATED), done(4))

    row = state.row(STATION, 1)
    assert row is not None
    assert (row.status, row.seq) == (r.Status.COMPLETE, 2)
    assert state.history(STATION, 1) == [admitted(), ended(2)]
    assert state.counts(STATION) == {("census", "running"): 0, ("census", "complete"): 1}


def test_a_gap_halts_loudly():
    """A lost record is never skipped over."""
    state = Folded().add(admitted())

    with pytest.raises(fold.FoldError, match=r"record 1\.3 follows 1\.1"):
        state.add(done(3))


def test_a_record_of_nobody_halts_loudly():
    """No row without an Admitted (C5)."""
    with pytest.raises(fold.FoldError, match="nobody admitted"):
        Folded().add(done(2))


def test_a_waiting_instance_stands_in_the_table_of_timers_once():
    """Under its soonest due time, and no more when it runs or has ended."""
    state = Folded().add(admitted(), sleeping(2, 500, idle=False), sleeping(3, 300, name="b"))
    assert state.due(STATION, 10_000, 10) == [(300, 1)]

    state.add(r.Woken(1, 1, 4, 300), r.SleepDone(1, 1, 5, 300, "b", 1))
    assert state.due(STATION, 10_000, 10) == []

    state.add(r.Waiting(1, 1, 6, 300))
    assert state.due(STATION, 10_000, 10) == [(500, 1)]

    state.add(ended(7))
    assert state.due(STATION, 10_000, 10) == []


def test_an_interruption_counts_until_there_is_progress():
    """Protocol rule 20: at one position."""
    state = Folded().add(admitted(), r.Interrupted(1, 1, 2, 20, "s"), r.Interrupted(1, 1, 3, 20, "t"))
    row = state.row(STATION, 1)
    assert row is not None
    assert row.interruptions == 2

    state.add(done(4))
    row = state.row(STATION, 1)
    assert row is not None
    assert row.interruptions == 0


def test_stations_do_not_see_each_other():
    """Every key begins with its station, and dropping one leaves the other."""
    state = Folded()
    state.apply(state.group(admitted()), state.group(admitted(instance="two"), station=OTHER))

    state.tables.drop(fold.station_key(STATION))

    assert state.row(STATION, 1) is None
    assert state.position(STATION) is None
    assert state.find(OTHER, "census", "two") == 1


def test_leases_are_kept_by_session_until_they_end():
    """Absolute numbers: the last one counts."""
    state = Folded().add(r.Lease(0, 0, 0, 1, "a-1", 1, 10), r.Lease(0, 0, 0, 1, "a-1", 2, 4),
                         r.Lease(0, 0, 0, 1, "b-1", 1, 5))
    assert state.leases(STATION) == {"a-1": r.LeaseRow(2, 4), "b-1": r.LeaseRow(1, 5)}

    state.add(r.LeaseEnded(0, 0, 0, 1, "a-1"))
    assert state.leases(STATION) == {"b-1": r.LeaseRow(1, 5)}


# -- whatever the groups are -------------------------------------------------------------------------------------------

@st.composite
def journals(draw):
    """The records of a few instances, each a legal history, woven into each other."""
    histories = []
    for serial in range(1, draw(st.integers(1, 4)) + 1):
        records = [admitted(serial, instance=f"i{serial}", queue_sequence=serial)]
        for seq in range(2, draw(st.integers(1, 7)) + 1):
            kind = draw(st.sampled_from(["done", "sleep", "woken", "interrupted", "waiting"]))
            records.append({
                "done": done(seq, serial=serial, name=f"s{seq}"),
                "sleep": sleeping(seq, draw(st.integers(1, 99)), name=f"n{seq}", serial=serial),
                "woken": r.Woken(serial, 1, seq, 20), "waiting": r.Waiting(serial, 1, seq, 20),
                "interrupted": r.Interrupted(serial, 1, seq, 20, "s"),
            }[kind])
        if draw(st.booleans()):
            records.append(ended(len(records) + 1, serial=serial))
        histories.append(records)
    woven = []
    while any(histories):
        queue = draw(st.sampled_from([records for records in histories if records]))
        woven.append(queue.pop(0))
    return woven


def cut(records, places):
    """The same records in groups cut at these places."""
    bounds = sorted({place % (len(records) + 1) for place in places} | {0, len(records)})
    return [records[start:end] for start, end in pairwise(bounds)]


def folded(groups, *, transactions):
    """Fold groups, so many to a transaction, each transaction twice."""
    state = Folded()
    made = [state.group(*records) for records in groups]
    for start in range(0, len(made), transactions):
        state.apply(*made[start:start + transactions]).apply(*made[start:start + transactions])
    return state


@given(journals(), st.lists(st.integers(0, 50), max_size=6), st.integers(1, 4))
def test_folding_is_a_replay_however_it_was_cut(records, places, transactions):
    """Groups per transaction, and groups applied twice, make no difference (rule 3)."""
    groups = cut(records, places)

    expected = folded(groups, transactions=len(groups) or 1)
    found = folded(groups, transactions=transactions)

    assert found.tables.tables == expected.tables.tables


@given(journals(), st.lists(st.integers(0, 50), max_size=6))
def test_the_index_agrees_with_the_history(records, places):
    """S3: lists, counts, live marks and timers say what the records say."""
    state = folded(cut(records, places), transactions=1)
    serials = {record.serial for record in records}

    rows = {serial: state.row(STATION, serial) for serial in serials}
    assert all(row is not None for row in rows.values())
    assert {serial: state.history(STATION, serial) for serial in serials} == {
        serial: [record for record in records if record.serial == serial] for serial in serials}
    assert Counter(row.status.label for row in rows.values()) == Counter(
        {status: count for (_, status), count in state.counts(STATION).items() if count})
    assert {serial for serial, _ in state.unended(STATION)} == {
        serial for serial, row in rows.items() if not row.status.ended}
    assert sorted(state.due(STATION, 10_000, 100)) == sorted(
        (row.wake_at, serial) for serial, row in rows.items()
        if row.status is r.Status.WAITING and row.wake_at)
    assert state.highest_serial(STATION) == max(serials)
