"""Follows the ledger while it grows: how much is done, who is inside, and whose work has not gone on yet."""

from __future__ import annotations

from toque.chaos.five_steps import STEPS
from toque.chaos.ledger import ENTER, EXIT, Entry, LedgerReader
from toque.chaos.pairing import KILLED


class Progress:
    """What the ledger has told so far. `read` takes in what is new."""

    def __init__(self, reader: LedgerReader) -> None:
        self._reader = reader
        self._inside: dict[tuple[str, str], Entry] = {}  # (instance, step) → its enter
        self._last: dict[str, int] = {}  # instance that has not ended → the process that entered it last
        self._killed: dict[int, set[str]] = {}  # pid → instances that were with it, and nobody has entered since
        self.left = 0  # callbacks
        self.entered = 0
        self.ended = 0  # instances whose last callback was left

    def read(self) -> Progress:
        for entry in self._reader.read_new():
            if entry.kind == ENTER:
                self._entered(entry)
            elif entry.note == KILLED:
                self._was_killed(entry.pid)
            elif entry.kind == EXIT and self._inside.pop((entry.instance, entry.step), None) is not None:
                self._left(entry)
        return self

    @property
    def inside(self) -> int:
        return len(self._inside)

    def is_inside(self, pid: int) -> bool:
        return any(enter.pid == pid for enter in self._inside.values())

    def waits_for(self, pid: int) -> set[str]:
        """Instances that were with the killed process, and that nobody has entered since."""
        return self._killed.get(pid, set())

    def _entered(self, entry: Entry) -> None:
        self.entered += 1
        self._inside[entry.instance, entry.step] = entry
        self._last[entry.instance] = entry.pid
        for pid, waiting in self._killed.items():
            if entry.pid != pid:
                waiting.discard(entry.instance)

    def _left(self, entry: Entry) -> None:
        self.left += 1
        if entry.step == STEPS[-1] and entry.note == "ok":
            self.ended += 1
            self._last.pop(entry.instance, None)

    def _was_killed(self, pid: int) -> None:
        self._killed[pid] = {instance for instance, last in self._last.items() if last == pid}
        self._inside = {place: enter for place, enter in self._inside.items() if enter.pid != pid}
