"""What a stopped process did is told apart from what counts: E1, E3 and L1 on doctored ledgers."""

from __future__ import annotations

from dataclasses import replace

from ledgers import S, ledger, visit

from toque.chaos.ledger_checks import check_e1, check_e3, check_l1
from toque.chaos.pairing import CUT, Lapse, Ledgered, Stop
from toque.chaos.zombies import LATE_PER_STOP_MAX, check_late, overtaken

STEPS = {"census": {"hash": 0, "measure": 1}}
STOP = Stop(pid=1, stopped_ns=10 * S, continued_ns=20 * S)


ZOMBIE = (
    visit("a", "hash", 1, 9.5, 20.1),  # inside at the stop; left after it, in vain
    visit("a", "hash", 2, 13, 14, attempt=2),
    visit("a", "measure", 2, 14, 15),
)


def test_a_visit_that_others_overtook_is_cut_at_the_stop():
    """The zombie's own end of it counts for nothing, and every other check holds."""
    judged = overtaken(ledger(*ZOMBIE), [STOP])

    assert [(found.pid, found.outcome) for found in judged.visits] == [(1, CUT), (2, "ok"), (2, "ok")]
    assert check_e1([], judged, STEPS).holds
    assert check_e3(judged).holds
    assert check_late(judged).holds


def test_a_report_that_arrived_while_the_process_was_stopped_was_sent_before():
    """It lay in the ledger's socket: the visit was inside at the stop as those before it, and is cut like them."""
    on_its_way = (visit("a", "hash", 1, 10.001, 20.1), *ZOMBIE[1:])

    judged = overtaken(ledger(*on_its_way), [STOP])

    assert [found.outcome for found in judged.visits] == [CUT, "ok", "ok"]
    assert judged.late == []
    assert check_l1(judged, limit=1, ttl_s=3).holds


def test_each_stop_of_a_process_counts():
    """One that had been continued a moment before the visit began does not hide the next one."""
    earlier = Stop(pid=1, stopped_ns=8 * S, continued_ns=9 * S)

    judged = overtaken(ledger(*ZOMBIE), [earlier, STOP])

    assert [found.outcome for found in judged.visits] == [CUT, "ok", "ok"]


def test_a_stop_that_cost_nothing_changes_nothing():
    """Nobody entered the instance meanwhile: the visit goes on as if the process had only been slow."""
    visits = (visit("a", "hash", 1, 9.5, 20.1), visit("a", "measure", 1, 20.2, 20.3))

    assert overtaken(ledger(*visits), [STOP]).visits == list(visits)


def test_a_late_entry_of_a_zombie_is_taken_out_and_counted():
    """Its gates were passed before the stop, its report came after it; without that it would break E1."""
    late = visit("b", "hash", 1, 20.01, 20.1)
    others = (visit("b", "hash", 2, 13, 14), visit("b", "measure", 2, 14, 15))

    judged = overtaken(ledger(late, *others), [STOP])

    assert judged.late == [late]
    assert not check_e1([], ledger(late, *others), STEPS).holds
    assert check_e1([], judged, STEPS).holds


def test_what_a_process_enters_under_its_next_session_is_no_late_entry():
    """Its stations were taken over at the end of a short stop, and came back within the second: the instances go on in it
    from where the others left them."""
    visits = [found for number in range(LATE_PER_STOP_MAX + 1) for found in
              (visit(f"i{number}", "hash", 2, 13, 20.1), visit(f"i{number}", "measure", 1, 20.2, 20.3))]

    judged = overtaken(ledger(*visits), [STOP])

    assert judged.late == []
    assert check_late(judged).holds
    assert check_e1([], judged, STEPS).holds


def test_a_zombie_that_enters_many_instances_anew_breaks_it():
    """More than the gates can have let through before the stop."""
    visits = [found for number in range(LATE_PER_STOP_MAX + 1) for found in
              (visit(f"i{number}", "hash", 2, 13, 14), visit(f"i{number}", "hash", 1, 20.01, 20.1, attempt=2))]

    assert check_late(overtaken(ledger(*visits), [STOP])).broken == 1


def test_a_zombie_that_enters_long_after_it_was_continued_has_no_excuse():
    """The visit stays, and breaks E1."""
    visits = (visit("b", "hash", 2, 13, 14), visit("b", "measure", 2, 14, 15), visit("b", "hash", 1, 25, 26))

    judged = overtaken(ledger(*visits), [STOP])

    assert judged.late == []
    assert not check_e1([], judged, STEPS).holds


def over_the_limit(entered: float) -> Ledgered:
    """One instance inside the stopped process, another one in a pod that was given the slot meanwhile."""
    visits = (visit("a", "hash", 1, 9, 20.1), visit("b", "hash", 2, entered, entered + 2))
    return overtaken(ledger(*visits), [STOP])


def test_l1_allows_the_overlap_with_a_stopped_process_alone():
    """The callback inside of it was outside of everybody's reach."""
    assert check_l1(over_the_limit(15), limit=1, ttl_s=3).holds


def test_l1_breaks_on_an_overlap_before_the_stop_or_without_one():
    """Over-admission that no stop explains: it began before it, or it was too short to cost the session."""
    assert check_l1(over_the_limit(9.5), limit=1, ttl_s=3).broken == 1
    assert check_l1(over_the_limit(15), limit=1, ttl_s=60).broken == 1
    assert check_l1(replace(over_the_limit(15), stops=[]), limit=1, ttl_s=3).broken == 1


def test_l1_counts_what_stays_inside_after_the_stop():
    """Its session lived, and it has a slot; or it was lost, and it should have left: in both it is one more inside."""
    visits = (visit("a", "hash", 1, 9, 30), visit("b", "hash", 2, 15, 16), visit("c", "hash", 2, 25, 26))
    stopped_twice = [STOP, replace(STOP, stopped_ns=24 * S, continued_ns=27 * S)]

    assert check_l1(overtaken(ledger(*visits), [STOP]), limit=1, ttl_s=3).broken == 1
    assert check_l1(overtaken(ledger(*visits), stopped_twice), limit=1, ttl_s=3).holds


def test_e3_allows_a_repeat_where_the_session_was_lost_and_nowhere_else():
    """The result was not recorded, though its process lived."""
    visits = (visit("a", "hash", 1, 9, 10.5), visit("a", "hash", 2, 15, 16, attempt=2))
    lapse = Lapse(pid=1, from_ns=10 * S, to_ns=14 * S)

    assert check_e3(ledger(*visits, lapses=[lapse])).holds
    assert check_e3(ledger(*visits)).broken == 1
    assert check_e3(ledger(*visits, lapses=[replace(lapse, pid=2)])).broken == 1
    assert check_e3(ledger(*visits, lapses=[replace(lapse, from_ns=12 * S)])).broken == 1
