"""The figures of recovery on ledgers made by hand."""

from __future__ import annotations

from dataclasses import replace

from ledgers import S, key, ledger, visit

from toque.chaos.pairing import Kill
from toque.chaos.recovery import Bereaved, check_recovery, check_regrants, check_returns, regrant_s


def test_an_instance_of_a_cut_off_pod_may_go_on_in_the_same_process_when_that_is_back():
    """What it entered before counts as with the lost; what it enters later is the recovery."""
    visits = (visit("a", "hash", 1, 9, 10), visit("a", "measure", 1, 16, 17), visit("b", "hash", 1, 16, 17),
              visit("b", "measure", 2, 40, 41))
    loss = Kill(pid=1, pod="pod-1", at_ns=11 * S, back_ns=15 * S)

    assert check_recovery(ledger(*visits), within_s=6, also=[loss]).holds
    assert check_recovery(ledger(*visits), within_s=4, also=[loss]).broken == 1
    assert check_recovery(ledger(*visits), within_s=6, also=[replace(loss, back_ns=0)]).broken == 1


def test_grants_go_on_when_more_are_inside_than_the_others_had_slots():
    """Slots that the survivors held already prove nothing."""
    visits = (visit("a", "hash", 1, 9, 10), visit("b", "hash", 2, 9, 20), visit("c", "hash", 3, 14, 20))
    loss = Bereaved(pid=1, at_ns=10 * S, held_by_others=1)

    assert regrant_s(ledger(*visits), loss) == 4.0
    assert check_regrants(ledger(*visits), [loss], within_s=4.5, created_ns={}).holds


def test_grants_that_come_late_or_never_break_it_where_there_was_work_for_them():
    """Two instances of before the loss still had callbacks to enter after the bound; the others had one slot."""
    waiting = (visit("c", "hash", 2, 21, 22), visit("d", "hash", 2, 22, 23))
    loss = Bereaved(pid=1, at_ns=10 * S, held_by_others=1)
    created = {key("c"): 8 * S, key("d"): 8 * S}

    never = check_regrants(ledger(visit("b", "hash", 2, 9, 20), *waiting), [loss], within_s=9, created_ns=created)
    late = check_regrants(ledger(visit("b", "hash", 2, 9, 21.5), *waiting), [loss], within_s=9, created_ns=created)
    created_later = check_regrants(ledger(*waiting), [loss], within_s=9, created_ns={**created, key("d"): 12 * S})

    assert never.broken == 1
    assert late.broken == 1
    assert (created_later.broken, created_later.checked) == (0, 0)


def test_a_loss_that_another_death_follows_is_not_judged_but_its_own_entry_is_no_other_death():
    """What the second pod held is not free within the bound of the first; the loss itself stands among the kills, too."""
    waiting = (visit("c", "hash", 2, 21, 22), visit("d", "hash", 2, 22, 23))
    loss = Bereaved(pid=1, at_ns=10 * S, held_by_others=1)
    created = {key("c"): 8 * S, key("d"): 8 * S}
    late = ledger(visit("b", "hash", 2, 9, 21.5), *waiting)

    def judged(*kills: Kill) -> int:
        return check_regrants(replace(late, kills=list(kills)), [loss], within_s=9, created_ns=created).broken

    assert judged(Kill(1, "a", 10 * S + 1)) == 1
    assert judged(Kill(1, "a", 10 * S + 1), Kill(3, "c", 15 * S)) == 0
    assert judged(Kill(3, "c", 20 * S)) == 1


def test_the_first_callback_after_the_brokers_return_is_bounded():
    """Counted from when it answered again."""
    visits = (visit("a", "hash", 1, 9, 10), visit("a", "measure", 1, 14, 15))

    assert check_returns(ledger(*visits), [12 * S], within_s=2.5).holds
    assert check_returns(ledger(*visits), [12 * S], within_s=1.5).broken == 1
    assert check_returns(ledger(*visits), [16 * S], within_s=9).broken == 1
