"""The trace of a run: one line for each thing that happened, with its virtual time. The same plan gives the same lines.

    12.034561 journal 1.0 #17 [2 p1-9c… 5] StepDone(3) Ended(3)     a group was stored, with its records (and serials)
    12.036110 ledger enter w1/i4 s2 attempt 1 on p1 (4)             a callback was entered; (4) is the process
    12.100000 op 7 create w2/i9 -> ok                               a client was told
    14.250000 fault kill of pod 1 (seconds 2.5, how lost)           a fault began; `over` when it was mended
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

from toque._subjects import StationId
from toque.chaos.history import Op
from toque.chaos.ledger import Entry
from toque.storage import records as r
from toque.storage.journal import decode_group, header_of
from toque.storage.ports import Message


class Trace:
    """Collects the lines; the hash says whether two runs were the same."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self.lines: list[str] = []

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:16]

    def note(self, text: str) -> None:
        self.lines.append(f"{self._loop.time() - self._began:.6f} {text}")

    def journal(self, station: StationId, sequence: int, header: r.GroupHeader, records: Sequence[Any]) -> None:
        told = " ".join(f"{type(record).__name__}({record.serial})" for record in records)
        self.note(f"journal {station} #{sequence} [{header.epoch} {header.session} {header.group} {header.crc:08x}] {told}")

    def message(self, message: Message) -> None:
        """A group as the journal holds it."""
        station = StationId.parse(message.subject.split(".", 3)[3])
        self.journal(station, message.sequence, header_of(message), decode_group(message))

    def history(self, line: Entry | Op) -> None:
        if isinstance(line, Op):
            end = f" -> {line.outcome} {line.status} {line.value}".rstrip() if line.returned_ns else ""
            self.note(f"op {line.number} {line.op} {line.workflow}/{line.instance}{end}")
        else:
            what = f" {line.workflow}/{line.instance} {line.step} attempt {line.attempt}" if line.instance else ""
            self.note(f"ledger {line.kind}{what} on {line.pod} ({line.pid}) {line.note}".rstrip())
