"""What a checker says: whether a promise held, over how many cases, and what broke it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

VIOLATIONS_SHOWN = 20


class InstanceKey(NamedTuple):
    """An instance as ledger and log name it."""

    workflow: str
    instance: str

    def __str__(self) -> str:
        return f"{self.workflow}/{self.instance}"


@dataclass
class Verdict:
    """Whether a promise held: over `checked` cases, with the violations found (the first ones in words)."""

    id: str
    promise: str
    checked: int = 0
    broken: int = 0
    violations: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def holds(self) -> bool:
        """No violation, and something was looked at."""
        return not self.broken and self.checked > 0

    @property
    def word(self) -> str:
        """holds, BROKEN, or NOT SEEN: nothing happened that it could have been judged from."""
        if self.holds:
            return "holds"
        return "BROKEN" if self.broken else "NOT SEEN"

    def violated(self, what: str) -> None:
        self.broken += 1
        if len(self.violations) < VIOLATIONS_SHOWN:
            self.violations.append(what)
