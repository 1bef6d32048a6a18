"""Judges timers from the ledger: E5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toque.chaos.history import OK
from toque.chaos.pairing import Ledgered
from toque.chaos.verdicts import InstanceKey, Verdict

EARLY_S_MAX = 0.05  # the callback before reports that it is left a moment before its record is made


@dataclass(frozen=True)
class Nap:
    """A sleep of so many seconds between two steps of an instance."""

    before: str
    after: str
    lasts_s: float


def check_e5(ledger: Ledgered, naps: Mapping[InstanceKey, Nap]) -> Verdict:
    """No step behind a sleep is entered before the sleep is over, counted from the first time that it could begin."""
    verdict = Verdict("E5", "no timer fired early")
    latest_s = 0.0
    by_instance = ledger.by_instance()
    for key, nap in naps.items():
        visits = by_instance.get(key, [])
        left = [visit.left_ns for visit in visits if visit.step == nap.before and visit.outcome == OK]
        entered = [visit.entered_ns for visit in visits if visit.step == nap.after]
        if not entered:
            continue
        verdict.checked += 1
        if not left:
            verdict.violated(f"{key}: {nap.after!r} was entered, and {nap.before!r} was never left in order")
            continue
        slept_s = (min(entered) - min(left)) / 1e9
        latest_s = max(latest_s, slept_s - nap.lasts_s)
        if slept_s < nap.lasts_s - EARLY_S_MAX:
            verdict.violated(f"{key}: slept {slept_s:.3f} s of {nap.lasts_s:g} s")
    verdict.note = f"the latest woke {latest_s:.2f} s after its time"
    return verdict
