"""docs/states.md says what the fold does: statuses, edges and the effect of every record."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from toque._subjects import StationId
from toque.storage import fold
from toque.storage import records as r

PAGE = (Path(__file__).parents[2] / "docs" / "states.md").read_text()
STATION = StationId(1, 0)
HEADER = r.GroupHeader(1, "a-1", 1, 0)
FAILURE = r.Failure("ValueError", "no")
CONFIG = r.RetryConfig(5, 10_000, "exponential", 3_600_000, True, 600_000)
DO, AT = r.StepKind.DO, 1_000
ADMITTED = r.Admitted(1, 1, 1, AT, "census", "a", "", 1, AT, b"null", "application/json", "1")

SAMPLES: dict[str, r.Record] = {
    "`StepDone`": r.StepDone(1, 1, 2, AT, DO, "s", 1, 1, AT, b"\xc0"),
    "`StepFailed`": r.StepFailed(1, 1, 2, AT, DO, "s", 1, 1, AT, FAILURE),
    "`SleepDone`": r.SleepDone(1, 1, 2, AT, "s", 1),
    "`AttemptFailed`": r.AttemptFailed(1, 1, 2, AT, DO, "s", 1, 1, AT, FAILURE, AT + 1, CONFIG),
    "`AttemptFailed` (idle)": r.AttemptFailed(1, 1, 2, AT, DO, "s", 1, 1, AT, FAILURE, AT + 1, CONFIG, True),
    "`SleepStarted`": r.SleepStarted(1, 1, 2, AT, "s", 1, AT + 1),
    "`SleepStarted` (idle)": r.SleepStarted(1, 1, 2, AT, "s", 1, AT + 1, True),
    "`Waiting`": r.Waiting(1, 1, 2, AT),
    "`Woken`": r.Woken(1, 1, 2, AT),
    "`StepCancelled`": r.StepCancelled(1, 1, 2, AT, DO, "s", 1),
    "`Interrupted`": r.Interrupted(1, 1, 2, AT, "a-1"),
    "`Blocked`": r.Blocked(1, 1, 2, AT, "code: changed"),
    "`EventReceived`": r.EventReceived(1, 1, 2, AT, "paid", "e-1", b"\x07", AT),
    "`WaitStarted`": r.WaitStarted(1, 1, 2, AT, "s", 1, "paid", AT + 1),
    "`WaitStarted` (idle)": r.WaitStarted(1, 1, 2, AT, "s", 1, "paid", AT + 1, True),
    "`WaitDone`": r.WaitDone(1, 1, 2, AT, "s", 1, 1, AT),
    "`WaitTimedOut`": r.WaitTimedOut(1, 1, 2, AT, "s", 1, AT),
    "`ChildBegun`": r.ChildBegun(1, 1, 2, AT, r.StepKind.CHILD, "s", 1, "leaf", "a-1"),
    "`ChildCreated`": r.ChildCreated(1, 1, 2, AT, "s", 1, AT + 1),
    "`ChildCreated` (idle)": r.ChildCreated(1, 1, 2, AT, "s", 1, AT + 1, True),
    "`ChildEnded`": r.ChildEnded(1, 1, 2, AT, "s", 1, 1, r.Status.COMPLETE, b"\x07"),
    "`PauseAsked`": r.PauseAsked(1, 1, 2, AT, "q-1"),
    "`Paused`": r.Paused(1, 1, 2, AT, "q-1"),
    "`Resumed`": r.Resumed(1, 1, 2, AT, "q-2", 5),
    "`Ended` (complete)": r.Ended(1, 1, 2, AT, r.Status.COMPLETE, b"\xc0"),
    "`Ended` (errored)": r.Ended(1, 1, 2, AT, r.Status.ERRORED, b"", FAILURE),
    "`Ended` (terminated)": r.Ended(1, 1, 2, AT, r.Status.TERMINATED),
    "`Restarted`": r.Restarted(1, 2, 1, AT, "q-3", "1"),
}


def table(heading: str, columns: int) -> list[list[str]]:
    """The rows of the first table after a text, without heading and ruler."""
    lines = [line for line in PAGE.split(heading)[1].split("\n\n## ")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert all(len(row) == columns for row in rows)
    return rows


def status_rows() -> list[list[str]]:
    lines = PAGE.split("## Edges")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


def folded(*records: r.Record) -> r.InstanceRow:
    """The row of instance 1 after these records, each a group of its own, folded from nothing."""
    batch = fold.FoldBatch(Nothing())
    for number, record in enumerate(records, 1):
        header = msgspec.structs.replace(HEADER, group=number)
        batch.apply(r.Group(STATION, r.Position(number, header), [record]))
    data = batch.finish()[fold.ROWS][fold.serial_key(fold.station_key(STATION), 1)]
    assert data is not None
    return fold.decode_row(data)


class Nothing:
    """An empty store."""

    def get(self, table: int, key: bytes) -> bytes | None:
        return None


def status_after(record: r.Record, before: r.Status) -> str:
    row = r.InstanceRow("census", "a", "", 1, 1, before, AT, AT)
    fold.advance_row(row, record)
    return row.status.label


def test_the_page_lists_every_status() -> None:
    """With what is stored (queued never is) and what is final."""
    listed = {row[0].strip("`"): (row[1], row[2]) for row in status_rows()}

    assert listed == {status.label: ("no" if status is r.Status.QUEUED else "yes", "yes" if status.ended else "no")
                      for status in r.Status}


def test_every_record_of_an_instance_has_a_sample_here() -> None:
    """A new record type cannot be forgotten: what the fold takes for an instance is in the table."""
    stations_own = {r.Claim, r.Released, r.Lease, r.LeaseEnded, r.Parked, r.Snapshot, r.Deleted, r.EventParked,
                    r.Delivered}

    assert {type(record) for record in SAMPLES.values()} | {r.Admitted} == set(r.AnyRecord.__args__) - stations_own


@pytest.mark.parametrize("row", table("## What each record does", 5), ids=lambda row: row[0])
def test_a_record_does_what_the_page_says(row: list[str]) -> None:
    """From each status of a live instance, by `advance_row`."""
    label, *after = row
    before = (r.Status.RUNNING, r.Status.WAITING, r.Status.WAITING_FOR_PAUSE, r.Status.PAUSED)

    assert [status_after(SAMPLES[label], status) for status in before] == after


def test_the_table_of_records_is_complete() -> None:
    """Each sample has its row, once."""
    assert [row[0] for row in table("## What each record does", 5)] == list(SAMPLES)


@pytest.mark.parametrize("row", table("## Edges", 4), ids=lambda row: f"{row[0]} {row[1]} {row[2]}")
def test_an_edge_is_one_that_the_fold_makes(row: list[str]) -> None:
    """Each edge of the page leads where it says."""
    before, after, record = (cell.replace("`", "") for cell in row[:3])
    if before == "–":
        assert (after, record) == ("queued", "none")
        return
    if before == "queued":
        ending = [SAMPLES["`Ended` (terminated)"]] if "Ended" in record else []
        assert folded(ADMITTED, *ending).status.label == after
        return
    name = f"`{record.split()[0]}`" + (f" ({after})" if record == "Ended" else re.sub(r"^\w+", "", record))

    assert status_after(SAMPLES[name], r.Status.of(before)) == after


def test_every_change_of_status_is_an_edge() -> None:
    """From running, whatever changes the status is listed; from the others, what an owner writes is."""
    edges = {(row[0].strip("`"), row[1].strip("`")) for row in table("## Edges", 4)}
    changes = {("running", after) for record in SAMPLES.values()
               if (after := status_after(record, r.Status.RUNNING)) != "running"}

    assert changes <= edges
    assert {edge for edge in edges if edge[0] == "waiting"} == {
        ("waiting", "running"), ("waiting", "terminated"), ("waiting", "errored"), ("waiting", "paused")}


@pytest.mark.parametrize("end", ["complete", "errored", "terminated"])
def test_nothing_leads_out_of_a_final_status(end: str) -> None:
    """Records behind the terminal one change nothing; only a new run begins anew."""
    late = [msgspec.structs.replace(record, seq=3) for record in SAMPLES.values() if type(record) is not r.Restarted]

    for record in late:
        assert folded(ADMITTED, SAMPLES[f"`Ended` ({end})"], record).status.label == end
