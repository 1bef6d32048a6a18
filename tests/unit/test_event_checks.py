"""V1 on doctored histories of events."""

from __future__ import annotations

import pytest

from toque.chaos.event_checks import Received, Sent, check_v1
from toque.chaos.history import FAILED, OK, UNKNOWN


def sent(number: int, *, outcome: str = OK, type: str = "paid", at: int = 0) -> Sent:
    invoked = at or 10 * number
    return Sent("a", type, f"event-{number}", invoked, invoked + 5, outcome)


def received(*numbers: int, type: str = "paid") -> list[Received]:
    return [Received("a", type, f"event-{number}") for number in numbers]


HONEST = [sent(number) for number in range(1, 13)]
ALL = range(1, 13)


def test_events_in_order_hold():
    """More than ten, each once, in the order in which they were acknowledged."""
    verdict = check_v1(HONEST, received(*ALL))

    assert verdict.holds
    assert verdict.checked == 12


@pytest.mark.parametrize("got", [
    pytest.param([*ALL][:-1], id="dropped"),
    pytest.param([*ALL, 12], id="delivered twice"),
    pytest.param([1, 10, 11, 12, 2, 3, 4, 5, 6, 7, 8, 9], id="sorted as text"),
    pytest.param([2, 1, *range(3, 13)], id="reordered"),
    pytest.param([*ALL, 99], id="never sent"),
])
def test_a_doctored_delivery_breaks_it(got):
    """Each fault that a buffer of events can have."""
    assert check_v1(HONEST, received(*got)).broken


def test_an_unknown_event_comes_once_or_not_at_all():
    """Its sender does not know whether it was stored."""
    history = [*HONEST, sent(13, outcome=UNKNOWN)]

    assert check_v1(history, received(*ALL)).holds
    assert check_v1(history, received(*ALL, 13)).holds
    assert check_v1(history, received(*ALL, 13, 13)).broken == 1


def test_a_refused_event_never_comes():
    """What was refused did not happen."""
    assert check_v1([*HONEST, sent(13, outcome=FAILED)], received(*ALL, 13)).broken == 1


def test_there_is_no_order_between_types_or_concurrent_events():
    """FIFO is for each type, and only between an acknowledgement and what was sent after it."""
    other = [sent(20, type="shipped", at=1)]
    at_once = [sent(30, at=500), sent(31, at=501)]

    verdict = check_v1([*HONEST, *other, *at_once],
                       [*received(*ALL, 31, 30), *received(20, type="shipped")])

    assert verdict.holds
