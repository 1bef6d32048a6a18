"""P1 on doctored sightings."""

from __future__ import annotations

from toque.chaos.owner_checks import Sighting, check_p1


def seen(at: int, pod: str, epoch: int, *, station: str = "1.0", answered: int = 0) -> Sighting:
    return Sighting(at, answered or at + 1, station, pod, f"{pod}-session-{epoch}", epoch)


HONEST = [seen(10, "pod-1", 1), seen(20, "pod-1", 1), seen(30, "pod-2", 2), seen(40, "pod-2", 2),
          seen(30, "pod-1", 1, station="1.1")]


def test_owners_that_follow_each_other_hold():
    """Each epoch has one owner, and they grow; stations are apart from each other."""
    verdict = check_p1(HONEST)

    assert verdict.holds
    assert verdict.checked == 5
    assert "2 stations, 1 changes" in verdict.note


def test_two_owners_of_one_epoch_break_it():
    """A station whose claim was not fenced."""
    twice = Sighting(50, 51, "1.0", "pod-3", "pod-3-session", 2)

    assert check_p1([*HONEST, twice]).broken == 1


def test_an_epoch_that_goes_back_breaks_it():
    """A former owner that answers after the next one has."""
    assert check_p1([*HONEST, seen(50, "pod-1", 1)]).broken == 1


def test_questions_that_overlapped_have_no_order():
    """The former owner was asked before anybody had heard of the next one."""
    assert check_p1([*HONEST, seen(29, "pod-1", 1, answered=60)]).holds


def test_no_sightings_do_not_hold():
    """Silence proves nothing."""
    assert not check_p1([]).holds
