"""Watching the local nats-server: problems that it writes to its log, and writes that it does not take."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from toque._protocol import PodView

WRITE_DEAD_S: Final = 5.0  # how long pods must report a dead journal before it counts
_LOG_BYTES_MAX: Final = 64 * 1024
_PROBLEM_MARKS: Final = ("[ERR]", "[WRN]", "[FTL]")


class ServerLog:
    """Reads the lines about problems that a nats-server adds to its log, from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_to = path.stat().st_size if path.exists() else 0

    def problems(self) -> list[str]:
        """The new ones: warnings, errors and fatal ones, without time and process id."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            self._read_to = self._read_to if self._read_to <= size else 0  # the log was begun anew
            log.seek(max(self._read_to, size - _LOG_BYTES_MAX))
            text = log.read()
            whole, _, rest = text.rpartition(b"\n")
            self._read_to = size - len(rest)
            lines = whole.decode(errors="replace").splitlines()
            return [_from_mark(line) for line in lines if any(mark in line for mark in _PROBLEM_MARKS)]
        return []


def _from_mark(line: str) -> str:
    return line[line.index("["):] if not line.startswith("[") else line[line.index("[", 1):]


class WriteDeadWatch:
    """Decides from the pods' reports when a server that answers takes no writes (protocol rule 26)."""

    def __init__(self) -> None:
        self.restarts = 0
        """How often it has said so since all pods were well: more than a few, and a restart does not help."""
        self._since: float | None = None

    def seen(self, views: Sequence[PodView], now_s: float) -> str:
        """What the pods complain of, each time they have done so for WRITE_DEAD_S; else "". No reports say nothing."""
        complaint = next((view.journal for view in views if view.journal != "ok"), "")
        if not complaint:
            self._since = None
            self.restarts = 0 if views else self.restarts
            return ""
        self._since = now_s if self._since is None else self._since
        if now_s - self._since <= WRITE_DEAD_S:
            return ""
        self._since = now_s
        self.restarts += 1
        return complaint
