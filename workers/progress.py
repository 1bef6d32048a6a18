"""What an instance reports of its progress: the newest value, in memory alone, shown when what came before it holds."""

from __future__ import annotations

from typing import NamedTuple


class Report(NamedTuple):
    """One report. `number` tells it from every other one of its station under this epoch."""

    number: int
    at: int
    value: bytes  # msgpack
    step: str = ""  # whose callback reports; "" = run()
    occurrence: int = 0
    attempt: int = 0


class Progress:
    """Of one instance. A report is shown when every record made before it is accepted (protocol rule 18)."""

    __slots__ = ("_behind", "_pending", "_shown")

    def __init__(self) -> None:
        self._shown: Report | None = None
        self._pending: Report | None = None
        self._behind = 0

    def add(self, report: Report, *, behind: int, accepted_to: int) -> None:
        """`behind`: the last record made before the report, of which so many are accepted."""
        self.shown(accepted_to)  # the one before may be shown by now: else reports could hold each other back
        self._pending, self._behind = report, behind

    def shown(self, accepted_to: int) -> Report | None:
        """The newest one that may be shown."""
        if self._pending is not None and self._behind <= accepted_to:
            self._shown, self._pending = self._pending, None
        return self._shown
