"""The verdicts on a run, what they rest on in counts, and the figures of recovery: from ledger, log and sightings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from toque.chaos.faults import CUTTING_OFF, DEADLY, OF_SERVER, Fault, Kind
from toque.chaos.five_steps import ORDER, RETRIES
from toque.chaos.history import CREATE, FAILED, OK, STATUS, UNKNOWN, Op
from toque.chaos.ledger import Entry
from toque.chaos.ledger_checks import check_c1, check_c2, check_c3, check_e1, check_e3, check_l1, check_ledger
from toque.chaos.load import Load, LoadOptions
from toque.chaos.owner_checks import Sighting, check_p1
from toque.chaos.pairing import CANCELLED, Kill, Lapse, Ledgered, Stop, pair
from toque.chaos.recovery import Bereaved, check_recovery, check_regrants, check_returns
from toque.chaos.status_checks import check_s1, check_s3
from toque.chaos.strikes import Injected
from toque.chaos.timer_checks import Nap, check_e5
from toque.chaos.verdicts import InstanceKey, Verdict
from toque.chaos.zombies import check_late, overtaken

DEATH_MARGIN_S = 2.0  # beyond the TTL: pod lost → each of its instances goes on
GATEKEEPER_MARGIN_S = 3.0  # beyond the TTL: Gatekeeper lost → slots are granted again
BROKER_S_MAX = 3.0  # broker answers again → a callback is entered


@dataclass(frozen=True)
class Evidence:
    """All that a run is judged from."""

    faults: Sequence[Fault]  # planned
    injected: Sequence[Injected]  # made
    missed: Sequence[str]  # why others were not
    ops: Sequence[Op]
    entries: Sequence[Entry]
    sightings: Sequence[Sighting]
    load: LoadOptions
    ttl_s: float
    expected: dict[InstanceKey, str]
    existing: frozenset[InstanceKey] = frozenset()
    naps: dict[InstanceKey, Nap] = field(default_factory=dict)

    @classmethod
    def of(cls, load: Load, **rest: object) -> Evidence:
        """With what the load knows."""
        return cls(load=load.options, expected=load.expected(), existing=frozenset(load.exist), naps=load.naps(),
                   **rest)  # type: ignore[arg-type]  # the fields of this class, named by the caller


@dataclass
class Judgement:
    """Verdicts, and the counts that show that they are not empty."""

    verdicts: list[Verdict]
    counts: list[str]
    ledger: Ledgered
    void: list[str]
    """Why the run proves nothing, if it does not."""

    @property
    def word(self) -> str:
        """pass, VIOLATED, or VOID: the faults did not happen, or there was nothing to judge from."""
        if any(verdict.broken for verdict in self.verdicts):
            return "VIOLATED"
        return "VOID" if self.void else "pass"


def judge(evidence: Evidence) -> Judgement:
    """Every promise that the scenario can see. One that nothing spoke of makes the run void."""
    ledger = ledger_of(evidence)
    created = {InstanceKey(op.workflow, op.instance) for op in evidence.ops if op.op == CREATE and op.outcome == OK}
    known = created | evidence.existing
    expected = {key: value for key, value in evidence.expected.items() if key in known}
    verdicts = [
        check_c1(evidence.ops, expected, existing=sorted(evidence.existing - created)),
        check_c2(evidence.ops, ledger),
        check_c3(evidence.ops, ledger),
        check_e1(evidence.ops, ledger, ORDER),
        check_e3(ledger, retries=RETRIES.limit),
        check_e5(ledger, evidence.naps),
        check_l1(ledger, limit=evidence.load.limit, ttl_s=evidence.ttl_s),
        check_s1(evidence.ops),
        check_s3(evidence.ops),
        check_p1(evidence.sightings),
        *_recoveries(evidence, ledger),
        check_ledger(ledger),
    ]
    void = [f"{verdict.id} saw nothing to judge" for verdict in verdicts if not verdict.checked]
    if len(evidence.injected) < len(evidence.faults):
        void = [f"{len(evidence.injected)} of {len(evidence.faults)} faults happened", *evidence.missed, *void]
    return Judgement(verdicts, counts_of(evidence, ledger), ledger, void)


def ledger_of(evidence: Evidence) -> Ledgered:
    """The ledger, with what the faults did to processes told beside it."""
    injected = evidence.injected
    stops = [Stop(out.pid, out.begun_ns, out.ended_ns) for out in injected if out.fault.kind is Kind.STOP_POD]
    lapse_ns = int(evidence.ttl_s * 1e9)
    lapses = [Lapse(0 if out.fault.kind in OF_SERVER else out.pid, out.begun_ns, out.ended_ns + lapse_ns)
              for out in injected if out.fault.kind not in DEADLY]
    return replace(overtaken(pair(evidence.entries), stops), lapses=lapses)


# -- recovery ----------------------------------------------------------------------------------------------------------

def _recoveries(evidence: Evidence, ledger: Ledgered) -> list[Verdict]:
    """Those that the faults of this run give something to see for."""
    kinds = {fault.kind for fault in evidence.faults}
    out: list[Verdict] = []
    if kinds & DEADLY or any(lost_for_long(injected, evidence.ttl_s) for injected in evidence.injected):
        within_s = evidence.ttl_s + DEATH_MARGIN_S
        also = [Kill(injected.pid, injected.pod, injected.begun_ns, injected.ended_ns) for injected in evidence.injected
                if lost_for_long(injected, evidence.ttl_s)]
        awake = replace(ledger, visits=[visit for visit in ledger.visits if visit.key not in evidence.naps])
        out.append(check_recovery(awake, within_s=within_s, also=also))
    losses = [Bereaved(injected.pid, injected.begun_ns, min(injected.held_by_others, evidence.load.limit - 1))
              for injected in evidence.injected if injected.owned_zero and injected.fault.kind in DEADLY]
    if losses:
        created_ns = {key: op.returned_ns for op in evidence.ops if op.op == CREATE and op.outcome == OK
                      and (key := InstanceKey(op.workflow, op.instance)) not in evidence.naps}
        out.append(check_regrants(ledger, losses, within_s=evidence.ttl_s + GATEKEEPER_MARGIN_S, created_ns=created_ns))
    if kinds & OF_SERVER:
        out.append(check_returns(ledger, [injected.answered_ns for injected in evidence.injected
                                          if injected.answered_ns], within_s=BROKER_S_MAX))
    if Kind.STOP_POD in kinds:
        out.append(check_late(ledger))
    return out


def lost_for_long(out: Injected, ttl_s: float) -> bool:
    """Whether a pod was stopped or cut off for longer than its work may wait."""
    return out.fault.kind in CUTTING_OFF and out.lasted_s > ttl_s + DEATH_MARGIN_S


# -- counts ------------------------------------------------------------------------------------------------------------

def counts_of(evidence: Evidence, ledger: Ledgered) -> list[str]:
    """What happened, in numbers: a run in which nothing happened proves nothing."""
    injected, ops = evidence.injected, evidence.ops
    kinds = list(dict.fromkeys(out.fault.kind for out in injected))
    creations = [op for op in ops if op.op == CREATE]
    lines = [_count(sum(out.fault.kind is kind for out in injected), str(kind)) for kind in kinds]
    lines += [
        _count(sum(out.owned_zero for out in injected), "fault hit the owner of station 0",
               "faults hit the owner of station 0"),
        _count(len(ledger.cut), "attempt cut", "attempts cut"),
        _count(sum(visit.outcome == CANCELLED for visit in ledger.visits), "attempt ended from outside",
               "attempts ended from outside"),
        _count(sum(out.came_back for out in injected if out.fault.kind is Kind.STOP_POD), "zombie came back",
               "zombies came back"),
        _count(sum(out.lost_session for out in injected), "session was lost and followed by another",
               "sessions were lost and followed by others"),
        _count(len(ledger.late), "late entry of a zombie", "late entries of zombies"),
        _count(sum(op.outcome == UNKNOWN for op in creations), "creation with an unknown outcome",
               "creations with unknown outcomes"),
        _count(sum(op.outcome == UNKNOWN for op in ops if op.op != CREATE), "question without an answer",
               "questions without answers"),
        _count(sum(op.outcome == FAILED for op in creations), "second creator was told that the id exists",
               "second creators were told that the id exists"),
        _count(len(evidence.expected), "instance", "instances"),
        _count(len(ledger.visits), "callback entered", "callbacks entered"),
        _count(sum(op.op == STATUS for op in ops), "status asked", "statuses asked"),
    ]
    return [line for line in lines if line]


def _count(number: int, one: str, many: str = "") -> str:
    """"3 zombies came back"; nothing for none."""
    if not number:
        return ""
    return f"{number:,} {one if number == 1 else many or one}"
