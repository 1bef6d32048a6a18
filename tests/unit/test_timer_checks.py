"""E5 on doctored ledgers."""

from __future__ import annotations

import pytest
from ledgers import key, ledger, visit

from toque.chaos.timer_checks import Nap, check_e5

NAPS = {key("a"): Nap("hash", "measure", 2.0)}


@pytest.mark.parametrize(("woken", "holds"), [(12.0, True), (30.0, True), (11.9, False)])
def test_e5_breaks_on_an_early_timer_only(woken, holds):
    """A late one is told in the note."""
    verdict = check_e5(ledger(visit("a", "hash", 1, 9, 10), visit("a", "measure", 2, woken, woken + 1)), NAPS)

    assert verdict.holds is holds
    assert verdict.checked == 1


def test_e5_counts_from_the_first_time_that_the_step_was_done():
    """A stopped process may leave the step long after others have, and the sleep began with theirs."""
    visits = (visit("a", "hash", 2, 9, 10), visit("a", "hash", 1, 9.5, 11.9), visit("a", "measure", 2, 12, 13))

    assert check_e5(ledger(*visits), NAPS).holds


def test_e5_breaks_when_the_step_before_was_never_done():
    """Nothing to count from: the sleep was skipped with it."""
    visits = (visit("a", "hash", 1, 9, 10, outcome="ValueError"), visit("a", "measure", 2, 30, 31))

    assert check_e5(ledger(*visits), NAPS).broken == 1


def test_e5_does_not_hold_without_a_sleeper():
    """Silence proves nothing."""
    assert not check_e5(ledger(visit("b", "hash", 1, 9, 10)), NAPS).holds
