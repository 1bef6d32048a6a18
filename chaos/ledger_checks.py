"""Judges a run from the ledger and the client's log: C1, C2, C3, E1, E3, L1.

Pure functions over lists. Each check returns a Verdict with a count of what it looked at: a check that saw nothing does
not hold.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from toque.chaos.history import COMPLETE, CREATE, FAILED, OK, RESULT, STATUS, Op
from toque.chaos.pairing import CANCELLED, CUT, RECORDED_NS_MAX, Ledgered, Stop, Visit
from toque.chaos.status_checks import ENDED_RANK, RANKS
from toque.chaos.verdicts import InstanceKey, Verdict
from toque.chaos.zombies import LATE_NS_MAX

SESSION_SHARE = 0.5  # of the TTL: a stop that was shorter cannot have cost the session

StepOrder = Mapping[str, Mapping[str, int]]  # workflow → step → stage; steps of one stage may run side by side


# -- creations ---------------------------------------------------------------------------------------------------------

def check_c1(ops: Sequence[Op], expected: Mapping[InstanceKey, str], *,
             statuses: Mapping[InstanceKey, str] = {}, existing: Iterable[InstanceKey] = ()) -> Verdict:
    """Each acknowledged creation reached exactly one terminal state, and its result is as computed.

    `expected` holds the value that `result` must show, for the instances whose result was computed apart;
    `statuses` the terminal status, where it is not "complete"; `existing` the instances of which no creation was
    acknowledged as new, but a later one was told that they exist.
    """
    ends: dict[InstanceKey, set[tuple[str, str]]] = defaultdict(set)
    for op in ops:
        if op.op == RESULT and op.outcome == OK:
            ends[InstanceKey(op.workflow, op.instance)].add((op.status, op.value))
    created = list(dict.fromkeys([*_created(ops), *existing]))
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
        if op.outcome == OK and _tells_the_end(op):
            key = InstanceKey(op.workflow, op.instance)
            seen_ended[key] = min(op.returned_ns, seen_ended.get(key, op.returned_ns))
    verdict = Verdict("E1", "no callback was entered again after a later step began or a client saw the end")
    for key, visits in ledger.by_instance().items():
        stages = order.get(key.workflow, {})
        _judge_order(verdict, visits, stages, seen_ended.get(key))
    return verdict


def _tells_the_end(op: Op) -> bool:
    return op.op == RESULT or (op.op == STATUS and RANKS.get(op.status) == ENDED_RANK)


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


def check_e3(ledger: Ledgered, *, retries: int = 5, recorded_ns_max: float = RECORDED_NS_MAX) -> Verdict:
    """Attempts are bounded by the retry limit and the deaths, and their numbers grow.

    An attempt that was left in order is not repeated unless its process died, or lost its session, before the
    checkpoint was stored: within `recorded_ns_max` of it.
    Not for steps that time out: their threads end late, and in vain.
    """
    verdict = Verdict("E3", "attempts were bounded and grew, none was repeated without a death")
    deaths = ledger.deaths

    def lost(before: Visit, after: Visit) -> bool:
        died_ns = deaths.get(before.pid, after.entered_ns)
        return died_ns < min(after.entered_ns, before.left_ns + recorded_ns_max) or ledger.lapsed(before)

    for key, visits in ledger.by_instance().items():
        for step, of_step in _by_step(visits).items():
            verdict.checked += 1
            _judge_attempts(verdict, f"{key} step {step!r}", of_step, retries, lost)
    return verdict


def _judge_attempts(verdict: Verdict, what: str, visits: Sequence[Visit], retries: int,
                    lost: Callable[[Visit, Visit], bool]) -> None:
    repeats = 0
    for before, after in itertools.pairwise(visits):
        was_lost = lost(before, after)
        repeats += was_lost or _was_ended_from_outside(before)
        if before.outcome == OK and not was_lost:
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


def check_l1(ledger: Ledgered, *, limit: int, ttl_s: float = 0.0) -> Verdict:
    """Instances inside callbacks at one time never exceed the limit; what died inside counts until it died.

    The one overlap that is allowed: a callback that was inside a *stopped* process does not count during the stop and
    LATE_NS_MAX after it, when that was long enough to cost the session (SESSION_SHARE of `ttl_s`; 0 = every stop was).
    Its late result has to lose, which C1 and E1 see.
    """
    verdict = Verdict("L1", f"never more than {limit} instances inside callbacks", len(ledger.visits))
    stops = [stop for stop in ledger.stops if stop.lasted_s >= SESSION_SHARE * ttl_s]
    inside: Counter[InstanceKey] = Counter()
    most = 0
    for at_ns, change, visit in _edges(ledger.visits, stops):
        inside[visit.key] += change
        if not inside[visit.key]:
            del inside[visit.key]
        most = max(most, len(inside))
        if change > 0 and len(inside) > limit:
            verdict.violated(f"{len(inside)} instances inside at {at_ns} ns, when {visit.where} was entered")
    verdict.note = f"at most {most} at one time"
    return verdict


def _edges(visits: Sequence[Visit], stops: Sequence[Stop]) -> list[tuple[int, int, Visit]]:
    """Every (time, +1 entered or -1 left, visit) in order; at one instant leaving comes first."""
    edges: list[tuple[int, int, Visit]] = []
    for visit in visits:
        for from_ns, to_ns in _counted(visit, stops):
            edges.append((from_ns, 1, visit))
            edges += [(to_ns, -1, visit)] * bool(to_ns)
    return sorted(edges, key=lambda edge: edge[:2])


def _counted(visit: Visit, stops: Sequence[Stop]) -> Iterator[tuple[int, int]]:
    """From when to when the visit counts; 0 = to the end of the ledger.

    Not while its process was stopped, nor in the moment that it had to leave afterwards; but what is inside after that
    has not lost its slot, or goes on without one.
    """
    from_ns = visit.entered_ns
    for stop in sorted(stops, key=lambda stop: stop.stopped_ns):
        if stop.pid != visit.pid or stop.continued_ns < from_ns or not _inside_at(visit, stop.stopped_ns):
            continue
        if stop.stopped_ns > from_ns:  # else: sent by a process that was stopped by then
            yield from_ns, stop.stopped_ns
        from_ns = stop.continued_ns + LATE_NS_MAX
        if not _inside_at(visit, from_ns):
            return
    if visit.left_ns != from_ns:  # else: sent by a process that was dead by then: it was never inside
        yield from_ns, visit.left_ns


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
