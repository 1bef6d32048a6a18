"""Broker time: never ahead of the server's clock, never going back, and known to be unknown (protocol rule 10)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toque.workers.broker_time import DRIFT_MAX, ERROR_MAX_S, SAMPLE_AGE_MAX_S, BrokerTime

SERVER_MS = 1_800_000_000_000


class Hand:
    """A clock that is set by hand."""

    def __init__(self, now=100.0):
        self.now = now

    def boottime(self):
        return self.now


def sampled(clock, time, *, way_there=0.01, way_back=0.01, server_ms=SERVER_MS):
    """A request that took its time both ways; the server answered in between."""
    sent = clock.now
    clock.now += way_there + way_back
    time.sample(sent=sent, received=clock.now, server_ms=server_ms)


def test_nothing_is_known_before_the_first_sample():
    """Unready: nothing fires."""
    assert not BrokerTime(Hand()).ready


def test_it_goes_on_with_the_pods_own_clock():
    """Between samples the pod's clock carries it."""
    clock = Hand()
    time = BrokerTime(clock)
    sampled(clock, time)
    assert time.ready
    at = time.now_ms()

    clock.now += 2.5

    assert at + 2_500 - 2_500 * DRIFT_MAX - 1 <= time.now_ms() <= at + 2_500


@given(st.lists(st.tuples(st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0.1, 3)), min_size=1, max_size=8),
       st.floats(-DRIFT_MAX, DRIFT_MAX))
def test_broker_time_lies_within_its_bounds(exchanges, drift):
    """Whatever the ways took, and though the pod's clock drifts: a timer that waits for `now_ms` is never early, a wait
    that is counted from `latest_ms` never short."""
    clock = Hand()
    time = BrokerTime(clock)
    true_s = 0.0
    for way_there, way_back, pause in exchanges:
        sent = clock.now
        clock.now += (way_there + way_back) * (1 + drift)
        time.sample(sent=sent, received=clock.now, server_ms=int(SERVER_MS + (true_s + way_there) * 1000))
        clock.now += pause * (1 + drift)
        true_s += way_there + way_back + pause
        true_ms = SERVER_MS + true_s * 1000

        assert time.now_ms() <= true_ms + 1e-3
        assert time.latest_ms() >= true_ms - 1
        assert time.latest_ms() - time.now_ms() <= time.error_s * 1000 + 20


def test_it_never_goes_back():
    """A worse sample, or a server whose clock was set back, must not let a time come twice."""
    clock = Hand()
    time = BrokerTime(clock)
    sampled(clock, time)
    before = time.now_ms()

    sampled(clock, time, server_ms=SERVER_MS - 60_000)

    assert time.now_ms() >= before


def test_a_wide_bound_is_not_ready():
    """Above 0.5 s nothing fires: an answer may have been made any time within it."""
    clock = Hand()
    time = BrokerTime(clock)

    sampled(clock, time, way_back=ERROR_MAX_S + 0.1)
    assert not time.ready

    sampled(clock, time)
    assert time.ready


def test_an_old_sample_is_not_ready():
    """The clocks drift apart: without samples the bound is lost."""
    clock = Hand()
    time = BrokerTime(clock)
    sampled(clock, time)

    clock.now += SAMPLE_AGE_MAX_S - 0.1
    assert time.ready
    clock.now += 0.2
    assert not time.ready


def test_a_worse_sample_does_not_replace_a_fresh_better_one():
    """The tighter bound is kept while it is fresh, then any sample is better than none."""
    clock = Hand()
    time = BrokerTime(clock)
    sampled(clock, time)
    tight = time.error_s

    clock.now += 1
    sampled(clock, time, way_back=0.3)
    assert time.error_s == tight

    clock.now += SAMPLE_AGE_MAX_S
    sampled(clock, time, way_back=0.3)
    assert time.error_s > tight
