"""What `toque pods` remarks below its table, and how `toque stations describe` tells of a restore."""

from __future__ import annotations

import msgspec
import pytest

from toque._protocol import PodView, RestoredView
from toque.cli.reports import pod_remarks, restored_text

WELL = PodView(pod="pod-1", session="s", stations=[], slots_leased=0, slots_in_use=0, slots_wanted=0, loop_lag_ms=0.1,
               workflows={}, threads_in_use=2, threads_max=2)


def test_a_pod_that_is_well_needs_no_remark() -> None:
    """Though all of its threads are at work, and its loop was late once, for nobody's fault."""
    assert list(pod_remarks(msgspec.structs.replace(WELL, loop_lag_worst_ms=80.0, threads_abandoned=1))) == []


def test_a_blocked_loop_is_remarked_with_its_culprit() -> None:
    """How long, and by what."""
    (remark,) = pod_remarks(msgspec.structs.replace(WELL, loop_lag_worst_ms=1630.0, loop_blocked_by="run() itself, a/b"))

    assert remark.startswith("the loop of pod-1 was blocked for 1.6 s in the last minute by run() itself, a/b")


def test_threads_that_are_all_abandoned_are_remarked() -> None:
    """With what to do."""
    (remark,) = pod_remarks(msgspec.structs.replace(WELL, threads_abandoned=2))

    assert remark.startswith("all 2 threads of pod-1 are held") and "Restart the pod" in remark


@pytest.mark.parametrize(("restored", "text"), [
    (RestoredView("journal", groups=1, ms=4), "from the whole journal (1 group), in 4 ms"),
    (RestoredView("local", groups=12, ms=4), "from the pod's own disk and 12 groups of the journal, in 4 ms"),
    (RestoredView("snapshot", "3-88120", 240_113, 212, 1_310),
     "from snapshot 3-88120 (240,113 rows) and 212 groups of the journal, in 1,310 ms"), (None, "")])
def test_a_restore_is_told_in_words(restored: RestoredView | None, text: str) -> None:
    """The whole journal was told as "the whole journal and 1 groups of the journal"."""
    assert restored_text(restored) == text
