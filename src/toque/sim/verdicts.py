"""Judges a simulated run: by the checkers of real runs, from ledger and log, and by those that know the journal.

Virtual time is exact, and so are these judgements, where real runs need bounds. Two things are known here that no black
box tells: under which session a callback was entered, and when that session had expired for a stopped process.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from toque._payload import decode, decode_params
from toque._subjects import StationId
from toque.chaos.history import CREATE, FAILED, OK, RESULT
from toque.chaos.ledger_checks import check_c1, check_c2, check_c3, check_e1, check_e3, check_l1, check_ledger
from toque.chaos.pairing import CANCELLED, CUT, Kill, Ledgered, pair
from toque.chaos.verdicts import InstanceKey, Verdict
from toque.sim.checks import check_chains, check_folds, check_leases, check_steps
from toque.sim.clients import TERMINATE, Clients, told
from toque.sim.event_verdicts import check_events
from toque.sim.history import Visit
from toque.sim.plan import LIMIT, Plan
from toque.sim.shapes import flat, late_threads, step_order
from toque.sim.world import World
from toque.storage import records as r
from toque.storage.fold import INTERRUPTED_TYPE
from toque.storage.ports import StoreDamaged

NS: Final = 1_000_000_000
SLACK_NS: Final = 1_000_000  # journal times are whole milliseconds


class Facts:
    """What the journal says of every instance."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.admitted: dict[InstanceKey, list[r.Admitted]] = defaultdict(list)
        self.ended: dict[InstanceKey, list[r.Ended]] = defaultdict(list)
        self.records: dict[InstanceKey, list[tuple[int, Any]]] = defaultdict(list)  # with their broker time in ns
        for station in world.stations():
            self._read(station)

    def _read(self, station: StationId) -> None:
        names: dict[int, InstanceKey] = {}
        for message, group in zip(self.world.journal_messages(station), self.world.journal(station), strict=True):
            at_ns = (message.time_ms - self.world.broker.epoch_ms) * 1_000_000
            for record in group.records:
                if isinstance(record, r.Admitted):
                    names[record.serial] = InstanceKey(record.workflow, record.id)
                    self.admitted[names[record.serial]].append(record)
                if record.serial:
                    key = names[record.serial]
                    self.records[key].append((at_ns, record))
                    if isinstance(record, r.Ended):
                        self.ended[key].append(record)


def judge(world: World, plan: Plan, clients: Clients) -> list[Verdict]:
    """Every verdict over a run that is quiet again."""
    facts = Facts(world)
    ledger, honest = ledgered(world)
    ops = world.history.ops
    limit = max([plan.limit, *(fault.times for fault in plan.faults if fault.kind == LIMIT)])
    statuses = {key: ends[0].status.label for key, ends in facts.ended.items()}
    values = {key: _value(ends[0]) for key, ends in facts.ended.items() if ends[0].status is not r.Status.TERMINATED}
    created = {InstanceKey(op.workflow, op.instance) for op in ops if op.op == CREATE and op.outcome == OK}
    late = {shape.name: late_threads(shape) for shape in plan.shapes}
    return [
        check_c1(ops, {key: value for key, value in values.items() if key in created}, statuses=statuses),
        check_c2(ops, honest), check_c3(ops, ledger), check_e1(ops, honest, step_order(plan.shapes)),
        check_e3(_only(honest, lambda visit: visit.step.partition("#")[0] not in late[visit.key.workflow]),
                 retries=plan.retries, recorded_ns_max=math.inf),  # a journal may be write-dead for as long as it takes
        check_l1(honest, limit=limit), check_ledger(ledger),
        _journal_once(facts), _exists(facts, clients), _outputs(facts), _timers(facts, plan), _back_off(facts, plan),
        _terminated(facts, honest), _in_time(world), *check_events(facts, clients),
        _asserted("P1", "each station's journal is one chain of epochs", lambda: check_chains(world)),
        _asserted("E1j", "no callback was entered after its checkpoint stood in the journal", lambda: check_steps(
            world, {(stop.pid, stop.session) for stop in world.history.stops if stop.believes})),
        _asserted("L1j", "never more slots leased than the limit", lambda: check_leases(world, limit)),
        _asserted("D4", "folded state equals a replay of the journal", lambda: check_folds(world)),
        _processes(world),
    ]


# -- the ledger, with what only the simulator knows --------------------------------------------------------------------

def ledgered(world: World) -> tuple[Ledgered, Ledgered]:
    """All visits; and those of honest processes, each only as long as its session can have lived.

    In the second, one epoch of a station counts as one process, so an epoch that was lost is a death. A callback inside
    a stopped process is not inside any more once the session has expired; what a process enters that was stopped
    together with its clock, and believes in a session that is over, is left out: no pod could know better, and the
    journal has the last word (see `_journal_once`, `_outputs`).
    """
    whole = pair(world.history.ledger)
    honest = Ledgered([], [], whole.strays)
    deaths: dict[int, int] = {}
    killed = {kill.pid: kill.at_ns for kill in whole.kills}
    epochs = _Epochs(world)
    for visit, entry in zip(whole.visits, world.history.entries, strict=True):
        stops = [stop for stop in world.history.stops if (stop.pid, stop.session) == (entry.pid, entry.session)]
        if any(stop.believes and visit.entered_ns >= stop.at * NS for stop in stops):
            continue
        left_ns, outcome = visit.left_ns, visit.outcome
        for stop in stops:
            over_ns = max(round(stop.expires_at * NS), visit.entered_ns + 1) if stop.expires_at < math.inf else left_ns
            if visit.entered_ns <= stop.at * NS < left_ns and over_ns < left_ns:
                left_ns, outcome = over_ns, CUT
        number, lost_ns = epochs.of(entry, visit.entered_ns)
        honest.visits.append(replace(visit, pid=number, left_ns=left_ns, outcome=outcome))
        if lost_ns or visit.pid in killed:
            deaths[number] = min(lost_ns or killed.get(visit.pid, lost_ns), killed.get(visit.pid, lost_ns))
    honest.kills = [Kill(number, "", at_ns) for number, at_ns in deaths.items()]
    return whole, honest


class _Epochs:
    """Under which epoch of its station a callback was entered, and when that was lost."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._claims: dict[StationId, list[tuple[int, str, int]]] = {}  # (at, session, when it was lost or 0)
        for station in world.stations():
            self._claims[station] = self._read(station)

    def _read(self, station: StationId) -> list[tuple[int, str, int]]:
        claims: list[tuple[int, str, int]] = []
        released = True
        for message, group in zip(self._world.journal_messages(station), self._world.journal(station), strict=True):
            at_ns = (message.time_ms - self._world.broker.epoch_ms) * 1_000_000
            if isinstance(group.records[0], r.Claim):
                if claims and not released:
                    claims[-1] = (*claims[-1][:2], at_ns)
                claims.append((at_ns, group.header.session, 0))
            released = any(isinstance(record, r.Released) for record in group.records)
        return claims

    def of(self, entry: Visit, entered_ns: int) -> tuple[int, int]:
        """A number for the epoch, and when it was lost, 0 = never."""
        station = self._world.station_of(entry.instance)
        found = [(place, lost_ns) for place, (at_ns, session, lost_ns) in enumerate(self._claims[station])
                 if session == entry.session and at_ns <= entered_ns]
        place, lost_ns = found[-1]
        return (station.number + 1) * 100_000 + place, lost_ns


def _only(ledger: Ledgered, wanted: Callable[[Any], bool]) -> Ledgered:
    return Ledgered([visit for visit in ledger.visits if wanted(visit)], ledger.kills, ledger.strays)


# -- the journal -------------------------------------------------------------------------------------------------------

def _asserted(id_: str, promise: str, check: Callable[[], object]) -> Verdict:
    verdict = Verdict(id_, promise, 1)
    try:
        check()
    except AssertionError as error:
        verdict.violated(str(error))
    return verdict


def _journal_once(facts: Facts) -> Verdict:
    """C1 and C2 by the journal, for unknown and unacknowledged creations too."""
    verdict = Verdict("C2j", "every id was admitted once and ended once", len(facts.admitted))
    for key, admitted in facts.admitted.items():
        if len(admitted) != 1:
            verdict.violated(f"{key} was admitted {len(admitted)} times")
        if (times := len(facts.ended.get(key, ()))) != 1:
            verdict.violated(f"{key} ended {times} times")
        if any(isinstance(record, r.Ended) for _, record in facts.records[key][:-1]):
            verdict.violated(f"{key} has records after its end")
        sequences = [record.seq for _, record in facts.records[key]]
        if sequences != list(range(1, len(sequences) + 1)):
            verdict.violated(f"{key} has records {sequences}")
    return verdict


def _exists(facts: Facts, clients: Clients) -> Verdict:
    """Rule 14: of two creators of one id, the one that was told so is the one that runs."""
    verdict = Verdict("C4", "the creation that was acknowledged as new is the one that ran")
    for op in facts.world.history.ops:
        admitted = facts.admitted.get(InstanceKey(op.workflow, op.instance))
        if op.op != CREATE or not admitted or op.outcome not in (OK, FAILED):
            continue
        verdict.checked += 1
        ran = decode_params(admitted[0].params, admitted[0].content_type, Any, what="params")
        mine = clients.params[op.number] == ran
        if op.outcome == OK and not mine:
            verdict.violated(f"{op.workflow}/{op.instance}: created by {clients.params[op.number]}, {ran} ran")
        if op.outcome == FAILED and mine:
            verdict.violated(f"{op.workflow}/{op.instance}: {clients.params[op.number]} was refused, and ran")
    return verdict


def _outputs(facts: Facts) -> Verdict:
    """E2: run() was given the recorded results, each to the branch that asked for it."""
    verdict = Verdict("E2", "every result that run() was given is the one that was recorded")
    for key, ends in facts.ended.items():
        if ends[0].status is not r.Status.COMPLETE:
            continue
        recorded = [decode(record.result, Any, what="a result") for _, record in facts.records[key]
                    if isinstance(record, r.StepDone)]
        given = [(branch, result) for branch, _, result in decode(ends[0].output, Any, what="the output")["lines"]
                 if result[0] != "failed"]
        verdict.checked += len(given)
        if sorted(result for _, result in given) != sorted(recorded):
            verdict.violated(f"{key}: run() was given {sorted(result for _, result in given)}, recorded is "
                             f"{sorted(recorded)}")
        for branch, result in given:
            if result[0] != branch:
                verdict.violated(f"{key}: branch {branch!r} was given {result}")
    return verdict


def _timers(facts: Facts, plan: Plan) -> Verdict:
    """E5: no sleep ended before its time, by the broker's clock, and every one that was begun in earnest ended."""
    verdict = Verdict("E5", "no timer was early")
    lengths = {(shape.name, step.name): step.seconds for shape in plan.shapes for step in flat(shape.steps)
               if step.kind == "sleep"}
    for key, records in facts.records.items():
        started: dict[tuple[str, int], r.SleepStarted] = {}
        shortest = {name: seconds for (workflow, name), seconds in lengths.items() if workflow == key.workflow}
        for at_ns, record in records:
            if isinstance(record, r.SleepStarted):
                started[record.name, record.occurrence] = record
            elif isinstance(record, r.SleepDone):
                verdict.checked += 1
                begun = started[record.name, record.occurrence]
                if at_ns + SLACK_NS < _since(facts, begun.due):
                    verdict.violated(f"{key}: {record} was stored before its time")
                if record.name not in shortest:
                    verdict.violated(f"{key}: {record} is no sleep of it")
    return verdict


def _since(facts: Facts, ms: int) -> int:
    return (ms - facts.world.broker.epoch_ms) * 1_000_000


def _back_off(facts: Facts, plan: Plan) -> Verdict:
    """E6: a step fails for good after all its retries only, and is not tried again before its time."""
    verdict = Verdict("E6", "failed attempts were counted, and each waited its time")
    for key, records in facts.records.items():
        failures: Counter[tuple[str, int]] = Counter()
        attempts: dict[tuple[str, int], int] = {}
        for _, record in records:
            if not isinstance(record, r.AttemptFailed | r.StepFailed | r.StepDone):
                continue
            step = (record.name, record.occurrence)
            verdict.checked += 1
            if record.attempt <= attempts.get(step, 0):
                verdict.violated(f"{key}: attempt {record.attempt} of {step} after {attempts[step]}")
            attempts[step] = record.attempt
            if isinstance(record, r.AttemptFailed):
                failures[step] += 1
                _judge_wait(verdict, facts, key, record)
            elif isinstance(record, r.StepFailed) and failures[step] != plan.retries:
                verdict.violated(f"{key}: {step} failed for good after {failures[step]} retries")
    return verdict


def _judge_wait(verdict: Verdict, facts: Facts, key: InstanceKey, record: r.AttemptFailed) -> None:
    for visit in facts.world.history.entered(key.instance, record.name):
        if visit.count == record.occurrence and visit.attempt > record.attempt \
                and visit.entered_at * NS + SLACK_NS < _since(facts, record.retry_at):
            verdict.violated(f"{key}: {visit} came before {record.retry_at}")


def _terminated(facts: Facts, ledger: Ledgered) -> Verdict:
    """V4: an acknowledged termination holds."""
    verdict = Verdict("V4", "nothing was entered after an acknowledged termination", 1)
    visits = ledger.by_instance()
    for op in facts.world.history.ops:
        key = InstanceKey(op.workflow, op.instance)
        if op.op != TERMINATE or op.outcome != OK:
            continue
        verdict.checked += 1
        for end in facts.ended.get(key, ()):
            if end.status is not r.Status.TERMINATED:
                verdict.violated(f"{key}: terminated for its client, {end.status.label} in the journal")
        for visit in visits.get(key, ()):
            if visit.entered_ns > op.returned_ns:
                verdict.violated(f"{visit.where}: entered after the termination was acknowledged")
    return verdict


def _in_time(world: World) -> Verdict:
    """Rule 7: the deadline lies before the end, so nothing is entered any more when anybody else may act on it."""
    verdict = Verdict("S7", "no callback was entered under a session that had been ended", len(world.history.entries))
    believes = {(stop.pid, stop.session) for stop in world.history.stops if stop.believes}
    for visit in world.history.entries:
        ended_at = world.sessions_ended.get(visit.session, math.inf)
        if visit.entered_at > ended_at and (visit.pid, visit.session) not in believes:
            verdict.violated(f"{visit}: the session was ended at {ended_at:.3f}")
    return verdict


def _processes(world: World) -> Verdict:
    """Nothing raised where nobody looks, and no pod ended by itself but for a damaged disk."""
    verdict = Verdict("pods", "nothing raised in a pod, and none ended by itself", len(world.nodes))
    for error in world.errors:
        if not isinstance(error, StoreDamaged):  # whoever reads a rotten row raises; the pod ends for it
            verdict.violated(f"raised in the loop: {error!r}")
    for node in world.nodes:
        if node.exited is not None and node.exited.done() and not node.exited.cancelled():
            reason = node.exited.exception()
            if reason is not None and node.served and not node.damaged:
                verdict.violated(f"pod {node.name} ended with {reason!r}")
    return verdict


def _value(end: r.Ended) -> str:
    if end.status is r.Status.COMPLETE:
        return told(decode(end.output, Any, what="the output"))
    failure = end.failure
    assert failure is not None
    return f"{failure.type}: {failure.message}" if failure.message else failure.type


# -- what was seen -----------------------------------------------------------------------------------------------------

def counts(world: World, nemesis: Counter[str]) -> Counter[str]:
    """How often things happened that a sweep has to see, or it proves little."""
    seen = Counter(nemesis)
    facts = Facts(world)
    for station in world.stations():
        _count_chain(world, station, seen)
        seen["snapshots"] += len(world.records(r.Snapshot, station))
        seen["trimmed journals"] += len(world.kept_messages(station)) < len(world.journal_messages(station))
    for records in facts.records.values():
        for _, record in records:
            seen[f"{type(record).__name__} records"] += 1
            if isinstance(record, r.AttemptFailed | r.StepFailed):
                seen["timed-out attempts"] += record.failure.type == "TimeoutError"
                seen["interruptions counted as a failure"] += record.failure.type == INTERRUPTED_TYPE
    for op in world.history.ops:
        seen[f"{op.op} {op.outcome}"] += 1
        seen["unknown outcomes"] += op.outcome == "unknown" and op.op != RESULT
    for visit in world.history.entries:
        seen["cut attempts"] += visit.cut
        seen["attempts ended from outside"] += visit.outcome == CANCELLED
        seen["repeated attempts"] += visit.attempt > 1
    broker = world.broker.counts
    seen["lost answers"] = broker["execute then lose the answer"]
    seen["late messages"] = broker["delay"]
    seen["duplicate messages"] = broker["duplicate"]
    seen["dropped messages"] = broker["drop before"]
    seen["fenced or repeated commits"] = sum(count for what, count in broker.items()
                                             if what.startswith("refused 10071") and what.endswith("journal"))
    seen["refused renewals"] = sum(count for what, count in broker.items()
                                   if what.startswith("refused 10071") and what.endswith("control"))
    seen["expired sessions"] = sum(count for what, count in broker.items()
                                   if what.startswith("expired") and what.endswith("control"))
    seen["lost sessions"] = sum(len(node.sessions_lost) for node in world.nodes)
    seen["parked messages"] = len(world.parked())
    return seen


def _count_chain(world: World, station: StationId, seen: Counter[str]) -> None:
    for before, group in itertools.pairwise(world.journal(station)):
        if group.records and isinstance(group.records[0], r.Claim):
            released = any(isinstance(record, r.Released) for record in before.records)
            if released:
                seen["moved stations"] += 1
            elif before.header.session == group.header.session:
                seen["claims above an own epoch"] += 1
            else:
                seen["takeovers"] += 1


EXPECTED: Final = (  # what a sweep has to see
    "kills", "disks lost", "disks stale", "disks torn", "disks rot", "SIGTERMs", "resumed", "zombies", "cut connections",
    "broker restarts", "write-dead streams", "limit changes", "lost answers", "late messages", "duplicate messages",
    "dropped messages", "fenced or repeated commits", "refused renewals", "expired sessions", "lost sessions",
    "takeovers", "moved stations", "claims above an own epoch", "unknown outcomes", "cut attempts",
    "attempts ended from outside", "repeated attempts", "timed-out attempts", "Interrupted records", "Woken records",
    "snapshots", "trimmed journals", "SleepDone records", "StepFailed records", "create failed", "terminate ok")


def unseen(total: Counter[str]) -> list[str]:
    """The counters of EXPECTED that stayed at 0."""
    return [what for what in EXPECTED if not total[what]]


def broken(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Those that do not hold."""
    return [verdict for verdict in verdicts if verdict.broken]


def describe(verdicts: Sequence[Verdict]) -> str:
    """For people: a line for each, and what broke it."""
    lines = []
    for verdict in verdicts:
        lines.append(f"  {verdict.id:7} {verdict.word:9} {verdict.checked:4} {verdict.promise}")
        lines += [f"          {violation}" for violation in verdict.violations]
    return "\n".join(lines)
