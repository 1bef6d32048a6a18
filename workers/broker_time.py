"""Broker time: what is stored is the server's clock, known with a bound (protocol rule 10).

A sample is a request's send and receive time and the server's own time in the answer. The server made its answer at or
before we received it, so `server time + (now - received)` is never ahead of it: that is what `now_ms` gives, and a timer
that waits for it is never early.
"""

from __future__ import annotations

from math import ceil

from toque.storage.ports import Clock

ERROR_MAX_S = 0.5
SAMPLE_AGE_MAX_S = 10.0
DRIFT_MAX = 0.0005  # of a host's clock against the server's: far more than NTP corrects by slewing
ROUNDING_MS = 2  # the server's time and ours are both cut to whole milliseconds


class BrokerTime:
    """The newest sample, carried on by the pod's clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_ms = 0.0
        self._error_s = float("inf")
        self._sampled_at = 0.0
        self._latest_ms = 0

    def sample(self, *, sent: float, received: float, server_ms: int) -> None:
        """Take a sample; times of the pod's clock in seconds."""
        error = received - sent
        stale = received - self._sampled_at > SAMPLE_AGE_MAX_S / 2
        if error <= max(self._error_s, 0.01) or stale:
            self._offset_ms = server_ms - received * 1000
            self._error_s = error
            self._sampled_at = received

    @property
    def ready(self) -> bool:
        """Whether the bound is good enough to fire timers and take instances."""
        return self._error_s <= ERROR_MAX_S and self._clock.boottime() - self._sampled_at <= SAMPLE_AGE_MAX_S

    @property
    def error_s(self) -> float:
        return self._error_s

    def _drift_s(self) -> float:
        """What the two clocks may have come apart since the sample."""
        return max(0.0, self._clock.boottime() - self._sampled_at) * DRIFT_MAX

    def latest_ms(self) -> int:
        """Broker time in ms, never behind it: a wait counted from here is never short. Only after the first sample."""
        return self.now_ms() + ROUNDING_MS + ceil((self._error_s / (1 - DRIFT_MAX) + 2 * self._drift_s()) * 1000)

    def now_ms(self) -> int:
        """Broker time in ms, never ahead of it, never going back."""
        now = int((self._clock.boottime() - self._drift_s()) * 1000 + self._offset_ms)
        if now > self._latest_ms:
            self._latest_ms = now
        return self._latest_ms
