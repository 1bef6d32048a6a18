"""Which report of an instance is shown, and when."""

from __future__ import annotations

from toque.workers.progress import Progress, Report


def test_a_report_is_shown_when_every_record_before_it_is_accepted():
    """What stands in a pending group may be lost; nobody may hear of what came behind it."""
    progress = Progress()
    progress.add(Report(1, 0, b"a"), behind=0, accepted_to=0)
    progress.add(Report(2, 0, b"b"), behind=3, accepted_to=2)

    assert progress.shown(2) == Report(1, 0, b"a")
    assert progress.shown(3) == Report(2, 0, b"b")


def test_reports_do_not_hold_each_other_back():
    """One that reports with each record is shown all the same: the last report whose records are accepted."""
    progress = Progress()
    for number in range(1, 10):
        progress.add(Report(number, 0, b""), behind=number, accepted_to=number - 1)

    assert progress.shown(8) == Report(8, 0, b"")


def test_nothing_is_shown_before_the_first():
    """None, not an empty value."""
    assert Progress().shown(7) is None
