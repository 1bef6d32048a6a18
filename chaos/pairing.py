"""A ledger's entries, paired into visits: who was inside of which callback, from when to when, and how it ended.

An attempt whose process died inside (a `gone`, or a "killed" mark) was *cut*, and ended when the process did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from toque.chaos.ledger import ENTER, EXIT, GONE, MARK, Entry
from toque.chaos.verdicts import InstanceKey

KILLED = "killed"  # the note of a mark: the process `pid` was killed
CUT = "cut"  # the outcome of a visit whose process died inside
RECORDED_NS_MAX = 1_000_000_000  # how long a result may wait for its record under load
CANCELLED = "CancelledError"  # the outcome of a visit that was ended from outside: shutdown, hand-over


@dataclass
class Visit:
    """One time that a callback was entered."""

    key: InstanceKey
    step: str
    attempt: int
    pod: str
    pid: int
    connection: int
    token: str
    entered_ns: int
    left_ns: int = 0  # 0: still inside when the ledger ends
    outcome: str = ""  # "ok", the type of what it raised, "cut", or "" when still inside

    @property
    def cut(self) -> bool:
        return self.outcome == CUT

    @property
    def story(self) -> str:
        return f"attempt {self.attempt} ({self.outcome or 'inside'})"

    @property
    def where(self) -> str:
        return f"{self.key} step {self.step!r} attempt {self.attempt} on {self.pod or 'pid'} {self.pid}"


@dataclass(frozen=True)
class Kill:
    """A process that was killed, or lost in another way, and when."""

    pid: int
    pod: str
    at_ns: int
    back_ns: int = 0  # when a process that had only been stopped or cut off was itself again; 0 = never


@dataclass(frozen=True)
class Stop:
    """A process that was stopped (SIGSTOP), and when it was continued."""

    pid: int
    stopped_ns: int
    continued_ns: int

    @property
    def lasted_s(self) -> float:
        return (self.continued_ns - self.stopped_ns) / 1e9


@dataclass(frozen=True)
class Lapse:
    """A time in which a process that lived could not speak to the broker: its session may have ended in it.

    `pid` 0 stands for every process: the broker itself was away.
    """

    pid: int
    from_ns: int
    to_ns: int


@dataclass
class Ledgered:
    """A ledger's entries, paired: what the checks read. `stops` and `lapses` are told by whoever made the faults."""

    visits: list[Visit]  # in order of entry
    kills: list[Kill]
    strays: list[str]  # exits without an enter: the ledger itself is damaged
    stops: list[Stop] = field(default_factory=list)
    lapses: list[Lapse] = field(default_factory=list)
    late: list[Visit] = field(default_factory=list)  # taken out of `visits`: entered by a stopped process, overtaken

    @property
    def cut(self) -> list[Visit]:
        return [visit for visit in self.visits if visit.cut]

    @property
    def deaths(self) -> dict[int, int]:
        """pid → when it died: by a mark, or by what the kernel closed while it was inside."""
        deaths = {kill.pid: kill.at_ns for kill in self.kills}
        for visit in self.cut:
            deaths.setdefault(visit.pid, visit.left_ns)
        return deaths

    def lapsed(self, visit: Visit) -> bool:
        """Whether the result of the visit may have been lost with its process's session."""
        return any(lapse.pid in (0, visit.pid) and lapse.from_ns - RECORDED_NS_MAX <= visit.left_ns <= lapse.to_ns
                   for lapse in self.lapses)

    def by_instance(self) -> dict[InstanceKey, list[Visit]]:
        grouped: dict[InstanceKey, list[Visit]] = defaultdict(list)
        for visit in self.visits:
            grouped[visit.key].append(visit)
        return grouped


class _Pairing:
    """Follows the ledger line by line; knows who is inside."""

    def __init__(self) -> None:
        self.out = Ledgered([], [], [])
        self._open: dict[tuple[int, InstanceKey, str, int], Visit] = {}
        self._dead: set[int] = set()

    def take(self, entry: Entry) -> None:
        if entry.kind == ENTER:
            self._enter(entry)
        elif entry.kind == EXIT:
            self._exit(entry)
        elif entry.kind == GONE:
            self._cut(entry.at_ns, [v for v in self._open.values() if v.connection == entry.connection])
        elif entry.kind == MARK and entry.note == KILLED:
            self.out.kills.append(Kill(entry.pid, entry.pod, entry.at_ns))
            self._dead.add(entry.pid)
            self._cut(entry.at_ns, [v for v in self._open.values() if v.pid == entry.pid])

    def _enter(self, entry: Entry) -> None:
        visit = Visit(InstanceKey(entry.workflow, entry.instance), entry.step, entry.attempt, entry.pod, entry.pid,
                      entry.connection, entry.token, entry.at_ns)
        self.out.visits.append(visit)
        self._open[_place(entry)] = visit
        if entry.pid in self._dead:  # sent before the kill, read after it: never acknowledged, so nothing was done
            self._cut(entry.at_ns, [visit])

    def _exit(self, entry: Entry) -> None:
        visit = self._open.pop(_place(entry), None)
        if visit is not None:
            visit.left_ns, visit.outcome = entry.at_ns, entry.note
        elif entry.pid not in self._dead:
            self.out.strays.append(f"{entry.workflow}/{entry.instance} step {entry.step!r}: exit without an enter")

    def _cut(self, at_ns: int, visits: Iterable[Visit]) -> None:
        for visit in visits:
            visit.left_ns, visit.outcome = at_ns, CUT
            del self._open[visit.connection, visit.key, visit.step, visit.attempt]


def _place(entry: Entry) -> tuple[int, InstanceKey, str, int]:
    return entry.connection, InstanceKey(entry.workflow, entry.instance), entry.step, entry.attempt


def pair(entries: Iterable[Entry]) -> Ledgered:
    """Pair enters with exits, and end what a dead process left open."""
    pairing = _Pairing()
    for entry in entries:
        pairing.take(entry)
    return pairing.out
