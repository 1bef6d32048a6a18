"""Broker time is never ahead of the broker."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toque.workers.broker_time import DRIFT_MAX, ERROR_MAX_S, SAMPLE_AGE_MAX_S, BrokerTime

BROKER_AHEAD_MS = 1_000_000


class HandClock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def boottime(self) -> float:
        return self.now


@given(way_out_s=st.floats(0, 0.2), way_back_s=st.floats(0, 0.2), later_s=st.floats(0, 5))
def test_now_is_behind_the_broker_by_the_way_back_at_most(way_out_s: float, way_back_s: float, later_s: float) -> None:
    """E5: whatever the way of a sample took, the time that timers see is not ahead, and behind by its bound at most."""
    clock = HandClock()
    time = BrokerTime(clock)
    sent = clock.now
    server_ms = BROKER_AHEAD_MS + int((sent + way_out_s) * 1000)
    clock.now = sent + way_out_s + way_back_s
    time.sample(sent=sent, received=clock.now, server_ms=server_ms)

    clock.now += later_s

    truth = BROKER_AHEAD_MS + clock.now * 1000
    assert truth - (way_out_s + way_back_s) * 1000 - 8 <= time.now_ms() <= truth


@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2), st.floats(0.1, 12)), min_size=1, max_size=8),
       st.floats(-DRIFT_MAX * 0.999, DRIFT_MAX * 0.999))
def test_broker_time_lies_within_its_bounds(exchanges: list[tuple[float, float, float]], drift: float) -> None:
    """E5: whatever the ways took, and though the pod's clock drifts, a timer that waits for `now_ms` is never early and a
    wait that is counted from `latest_ms` never short."""
    clock = HandClock()
    time = BrokerTime(clock)
    true_ms = float(BROKER_AHEAD_MS)
    for way_out_s, way_back_s, later_s in exchanges:
        sent = clock.now
        clock.now += (way_out_s + way_back_s) * (1 + drift)
        time.sample(sent=sent, received=clock.now, server_ms=int(true_ms + way_out_s * 1000))
        clock.now += later_s * (1 + drift)
        true_ms += (way_out_s + way_back_s + later_s) * 1000

        assert time.now_ms() <= true_ms + 1e-6
        assert time.latest_ms() >= true_ms - 1e-6


def test_without_a_good_sample_it_is_not_ready() -> None:
    """A pod that cannot bound the time to half a second fires nothing."""
    clock = HandClock()
    time = BrokerTime(clock)
    assert not time.ready

    clock.now += ERROR_MAX_S + 0.1
    time.sample(sent=100.0, received=clock.now, server_ms=0)
    assert not time.ready

    time.sample(sent=clock.now, received=clock.now, server_ms=0)
    assert time.ready
    clock.now += SAMPLE_AGE_MAX_S + 0.1
    assert not time.ready


def test_time_does_not_go_back() -> None:
    """A worse sample later gives no earlier time."""
    clock = HandClock()
    time = BrokerTime(clock)
    time.sample(sent=100.0, received=100.0, server_ms=5_000)
    before = time.now_ms()

    clock.now = 106.0
    time.sample(sent=105.8, received=106.0, server_ms=10_900)

    assert time.now_ms() >= before
