"""Paired ledgers made by hand, for the tests of checkers. Times are seconds."""

from __future__ import annotations

from toque.chaos.pairing import Ledgered, Visit
from toque.chaos.verdicts import InstanceKey

S = 1_000_000_000


def key(name: str) -> InstanceKey:
    return InstanceKey("census", name)


def visit(name: str, step: str, pid: int, entered: float, left: float, *, attempt: int = 1, outcome: str = "ok") -> Visit:
    return Visit(key(name), step, attempt, f"pod-{pid}", pid, pid, f"{name}:{step}", int(entered * S), int(left * S),
                 outcome if left else "")


def ledger(*visits: Visit, **rest: object) -> Ledgered:
    ordered = sorted(visits, key=lambda item: item.entered_ns)
    return Ledgered(ordered, [], [], **rest)  # type: ignore[arg-type]  # fields of Ledgered
