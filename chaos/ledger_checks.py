"""Judges a run from the ledger and the client's log: C1, C2, C3, E1, E3, L1, and the recovery gap after a kill.

Pure functions over lists. Each check returns a Verdict with a count of what it looked at: a check that saw nothing does
not hold. An attempt whose process died inside (a `gone`, or a "killed" mark) was *cut*, and ended when the process did.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from toque.chaos.history import COMPLETE, CREATE, FAILED, OK, RESULT, Op
from toque.chaos.ledger import ENTER, EXIT, GONE, MARK, Entry

KILLED = "killed"  # the note of a mark: the process `pid` was killed
CUT = "cut"  # the outcome of a visit whose process died inside
CANCELLED = "CancelledError"  # the outcome of a visit that was ended from outside: shutdown, hand-over
VIOLATIONS_SHOWN = 20

StepOrder = Mapping[str, Mapping[str, int]]  # workflow → step → stage; steps of one stage may run side by side


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
    """A process that was killed, and when."""

    pid: int
    pod: str
    at_ns: int


@dataclass
class Ledgered:
    """A ledger's entries, paired: what the checks read."""

    visits: list[Visit]  # in order of entry
    kills: list[Kill]
    strays: list[str]  # exits without an enter: the ledger itself is damaged

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


# -- creations ---------------------------------------------------------------------------------------------------------

def check_c1(ops: Sequence[Op], expected: Mapping[InstanceKey, str], *,
             statuses: Mapping[InstanceKey, str] = {}) -> Verdict:
    """Each acknowledged creation reached exactly one terminal state, and its result is as computed.

    `expected` holds the value that `result` must show, for the instances whose result was computed apart;
    `statuses` the terminal status, where it is not "complete".
    """
    ends: dict[InstanceKey, set[tuple[str, str]]] = defaultdict(set)
    for op in ops:
        if op.op == RESULT and op.outcome == OK:
            ends[InstanceKey(op.workflow, op.instance)].add((op.status, op.value))
    created = _created(ops)
    verdict = Verdict("C1", "each acknowledged creation reached one terminal state, its result as computed")
    verdict.checked = len(created)
    for key in created:
        _judge_ends(verdict, key, ends.get(key, set()), expected.get(key), statuses.get(key, COMPLETE))
    for key in expected.keys() - set(created):
        verdict.violated(f"{key}: a result was expected, but its creation was never acknowledged")
    verdict.note = f"{len(expected)} results computed apart and compared"
    return verdict


def _judge_ends(verdict: Verdict, key: InstanceKey, ends: set[tuple[str, str]], value: str | None, status: str) -> None:
    if not ends:
        verdict.violated(f"{key}: acknowledged, but no terminal state was seen")
    elif len(ends) > 1:
        verdict.violated(f"{key}: more than one end was seen: {sorted(ends)}")
    else:
        [(found_status, found_value)] = ends
        if found_status != status:
            verdict.violated(f"{key}: ended {found_status}, not {status}: {found_value}")
        elif value is not None and found_value != value:
            verdict.violated(f"{key}: its result is {found_value}, computed {value}")


def check_c2(ops: Sequence[Op], ledger: Ledgered) -> Verdict:
    """One run per id: no step begins twice from its first attempt, has two keys, or is inside two processes at once."""
    verdict = Verdict("C2", "one run per id")
    acknowledged = Counter(_created(ops))
    for key, times in acknowledged.items():
        if times > 1:
            verdict.violated(f"{key}: {times} creations of this id were acknowledged as new")
    for key, visits in ledger.by_instance().items():
        verdict.checked += 1
        for step, of_step in _by_step(visits).items():
            _judge_one_run(verdict, f"{key} step {step!r}", of_step)
    return verdict


def _judge_one_run(verdict: Verdict, what: str, visits: Sequence[Visit]) -> None:
    if len({visit.token for visit in visits}) > 1:
        verdict.violated(f"{what}: more than one idempotency key")
    before: Visit | None = None
    for visit in visits:
        if before is not None:
            if visit.attempt == 1 and not _was_ended_from_outside(before):
                verdict.violated(f"{what}: begun again as attempt 1 after {before.story}")
            if visit.pid != before.pid and _inside_at(before, visit.entered_ns):
                verdict.violated(f"{what}: inside pid {before.pid} and pid {visit.pid} at one time")
        before = visit


def check_c3(ops: Sequence[Op], ledger: Ledgered) -> Verdict:
    """Nothing runs that nobody asked for, and no refused creation runs."""
    asked: dict[InstanceKey, set[str]] = defaultdict(set)
    for op in ops:
        if op.op == CREATE:
            asked[InstanceKey(op.workflow, op.instance)].add(op.outcome)
    verdict = Verdict("C3", "nothing ran that was refused or never asked for")
    for key in ledger.by_instance():
        verdict.checked += 1
        if key not in asked:
            verdict.violated(f"{key}: ran, but nobody created it")
        elif asked[key] == {FAILED}:
            verdict.violated(f"{key}: ran, though its creation was refused")
    return verdict


def _created(ops: Iterable[Op]) -> list[InstanceKey]:
    return [InstanceKey(op.workflow, op.instance) for op in ops if op.op == CREATE and op.outcome == OK]


# -- callbacks ---------------------------------------------------------------------------------------------------------

def check_e1(ops: Sequence[Op], ledger: Ledgered, order: StepOrder) -> Verdict:
    """No callback is entered again once a later step of its instance has begun, or a client has seen it complete."""
    seen_ended: dict[InstanceKey, int] = {}
    for op in ops:
        if op.op == RESULT and op.outcome == OK:
            key = InstanceKey(op.workflow, op.instance)
            seen_ended[key] = min(op.returned_ns, seen_ended.get(key, op.returned_ns))
    verdict = Verdict("E1", "no callback was entered again after a later step began or a client saw the end")
    for key, visits in ledger.by_instance().items():
        stages = order.get(key.workflow, {})
        _judge_order(verdict, visits, stages, seen_ended.get(key))
    return verdict


def _judge_order(verdict: Verdict, visits: Sequence[Visit], stages: Mapping[str, int], ended_ns: int | None) -> None:
    reached = -1
    for visit in visits:
        verdict.checked += 1
        stage = stages.get(visit.step)
        if stage is None:
            verdict.violated(f"{visit.where}: the check was not told where this step stands")
            continue
        if stage < reached:
            verdict.violated(f"{visit.where}: entered after a later step had begun")
        if ended_ns is not None and visit.entered_ns > ended_ns:
            verdict.violated(f"{visit.where}: entered after a client had seen the instance's end")
        reached = max(reached, stage)


def check_e3(ledger: Ledgered, *, retries: int = 5) -> Verdict:
    """Attempts are bounded by the retry limit and the deaths, and their numbers grow.

    An attempt that was left in order is not repeated unless its process died (before the checkpoint was stored).
    Not for steps that time out: their threads end late, and in vain.
    """
    verdict = Verdict("E3", "attempts were bounded and grew, none was repeated without a death")
    deaths = ledger.deaths
    for key, visits in ledger.by_instance().items():
        for step, of_step in _by_step(visits).items():
            verdict.checked += 1
            _judge_attempts(verdict, f"{key} step {step!r}", of_step, retries, deaths)
    return verdict


def _judge_attempts(verdict: Verdict, what: str, visits: Sequence[Visit], retries: int,
                    deaths: Mapping[int, int]) -> None:
    repeats = 0
    for before, after in itertools.pairwise(visits):
        died = deaths.get(before.pid, after.entered_ns) < after.entered_ns
        repeats += died or _was_ended_from_outside(before)
        if before.outcome == OK and not died:
            verdict.violated(f"{what}: attempt {after.attempt} follows {before.story}, whose process lived")
        lowest = before.attempt if _was_ended_from_outside(before) else before.attempt + 1
        if after.attempt < lowest:
            verdict.violated(f"{what}: attempt {after.attempt} follows {before.story}")
    allowed = 1 + retries + repeats
    if len(visits) > allowed:
        verdict.violated(f"{what}: entered {len(visits)} times, {allowed} allowed")


def _was_ended_from_outside(visit: Visit) -> bool:
    return visit.outcome in (CUT, CANCELLED)


def _inside_at(visit: Visit, at_ns: int) -> bool:
    return visit.left_ns == 0 or visit.left_ns > at_ns


def _by_step(visits: Iterable[Visit]) -> dict[str, list[Visit]]:
    grouped: dict[str, list[Visit]] = defaultdict(list)
    for visit in visits:
        grouped[visit.step].append(visit)
    return grouped


def check_l1(ledger: Ledgered, *, limit: int) -> Verdict:
    """Instances inside callbacks at one time never exceed the limit; what died inside counts until it died."""
    verdict = Verdict("L1", f"never more than {limit} instances inside callbacks", len(ledger.visits))
    inside: Counter[InstanceKey] = Counter()
    most = 0
    for at_ns, change, visit in _edges(ledger.visits):
        inside[visit.key] += change
        if not inside[visit.key]:
            del inside[visit.key]
        most = max(most, len(inside))
        if change > 0 and len(inside) > limit:
            verdict.violated(f"{len(inside)} instances inside at {at_ns} ns, when {visit.where} was entered")
    verdict.note = f"at most {most} at one time"
    return verdict


def _edges(visits: Sequence[Visit]) -> list[tuple[int, int, Visit]]:
    """Every (time, +1 entered or -1 left, visit) in order; at one instant leaving comes first."""
    edges: list[tuple[int, int, Visit]] = []
    for visit in visits:
        if visit.left_ns == visit.entered_ns:  # sent by a process that was dead by then: it was never inside
            continue
        edges.append((visit.entered_ns, 1, visit))
        if visit.left_ns:
            edges.append((visit.left_ns, -1, visit))
    return sorted(edges, key=lambda edge: edge[:2])


# -- recovery ----------------------------------------------------------------------------------------------------------

@dataclass
class Recovery:
    """What became of the instances of one killed process."""

    kill: Kill
    cut: int = 0  # attempts that were inside when it died
    gaps_s: list[float] = field(default_factory=list)  # per instance: kill → next entry of a callback elsewhere
    lost: list[InstanceKey] = field(default_factory=list)  # cut, and never entered again

    @property
    def max_s(self) -> float:
        return max(self.gaps_s, default=0.0)

    @property
    def p50_s(self) -> float:
        return median(self.gaps_s) if self.gaps_s else 0.0


def recoveries(ledger: Ledgered) -> list[Recovery]:
    """For each kill: how long its instances waited until a callback of theirs was entered in another process."""
    instances = ledger.by_instance()
    return [_recovery(kill, instances) for kill in ledger.kills]


def _recovery(kill: Kill, instances: Mapping[InstanceKey, Sequence[Visit]]) -> Recovery:
    out = Recovery(kill)
    for key, visits in instances.items():
        earlier = [visit for visit in visits if visit.entered_ns <= kill.at_ns or visit.pid == kill.pid]
        if not earlier or earlier[-1].pid != kill.pid:
            continue
        was_cut = earlier[-1].cut
        out.cut += was_cut
        later = next((visit for visit in visits if visit.entered_ns > kill.at_ns and visit.pid != kill.pid), None)
        if later is not None:
            out.gaps_s.append((later.entered_ns - kill.at_ns) / 1e9)
        elif was_cut:
            out.lost.append(key)
    return out


def check_recovery(ledger: Ledgered, *, within_s: float) -> Verdict:
    """Every instance that a kill cut goes on in another process within the bound."""
    verdict = Verdict("R5", f"instances of a killed pod went on elsewhere within {within_s:g} s")
    found = recoveries(ledger)
    for recovery in found:
        verdict.checked += len(recovery.gaps_s) + len(recovery.lost)
        for key in recovery.lost:
            verdict.violated(f"{key}: cut by the kill of pid {recovery.kill.pid}, and never entered again")
        for gap in recovery.gaps_s:
            if gap > within_s:
                verdict.violated(f"an instance of pid {recovery.kill.pid} went on after {gap:.2f} s only")
    gaps = [gap for recovery in found for gap in recovery.gaps_s]
    verdict.note = f"p50 {median(gaps):.2f} s, longest {max(gaps):.2f} s" if gaps else "no instance was waiting"
    return verdict


def check_ledger(ledger: Ledgered) -> Verdict:
    """The ledger itself is whole: every exit has its enter, and nobody is inside at the end."""
    verdict = Verdict("ledger", "every exit in the ledger has its enter, and nobody is inside at its end")
    verdict.checked = len(ledger.visits)
    for stray in ledger.strays:
        verdict.violated(stray)
    for visit in ledger.visits:
        if not visit.left_ns:
            verdict.violated(f"{visit.where}: still inside when the ledger ended")
    return verdict
