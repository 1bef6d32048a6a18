"""Judges what clients were told of instances, from the client's log: S1 and S3."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from toque.chaos.history import COMPLETE, CREATE, FAILED, OK, RESULT, STATUS, Op
from toque.chaos.verdicts import InstanceKey, Verdict

NOT_FOUND = "InstanceNotFound"
RANKS = {"queued": 0, "running": 1, "waiting": 1, "paused": 1, "complete": 2, "errored": 2, "terminated": 2}
ENDED_RANK = 2


def check_s1(ops: Sequence[Op]) -> Verdict:
    """Statuses seen by one client are legal and never go back; an acknowledged instance is never said to be missing."""
    verdict = Verdict("S1", "statuses were legal and went one way only")
    acknowledged = _acknowledged_ns(ops)
    seen: dict[InstanceKey, list[Op]] = defaultdict(list)
    for op in ops:
        key = InstanceKey(op.workflow, op.instance)
        if op.op not in (STATUS, RESULT):
            continue
        if op.outcome == OK:
            seen[key].append(op)
        elif op.outcome == FAILED and NOT_FOUND in op.value and acknowledged.get(key, op.invoked_ns) < op.invoked_ns:
            verdict.violated(f"{key}: an owner said that it does not exist, after its creation was acknowledged")
    for key, of_instance in seen.items():
        verdict.checked += len(of_instance)
        _judge_sequence(verdict, key, sorted(of_instance, key=lambda op: op.returned_ns))
    return verdict


def _judge_sequence(verdict: Verdict, key: InstanceKey, ops: Sequence[Op]) -> None:
    """Only answers whose questions did not overlap have an order: each is compared with the highest known before it."""
    for op in ops:
        if op.status not in RANKS:
            verdict.violated(f"{key}: was told the status {op.status!r}, which there is not")
            return
    for later in ops:
        earlier = [op for op in ops if op.returned_ns <= later.invoked_ns]
        highest = max(earlier, key=lambda op: RANKS[op.status], default=None)
        if highest is None:
            continue
        if RANKS[later.status] < RANKS[highest.status]:
            verdict.violated(f"{key}: was {highest.status}, and {later.status} afterwards")
        elif RANKS[highest.status] == ENDED_RANK and later.status != highest.status:
            verdict.violated(f"{key}: ended {highest.status}, and was {later.status} afterwards")


def check_s3(ops: Sequence[Op]) -> Verdict:
    """The result of an ended instance is the same whenever it is read. Counts instances that were read twice."""
    verdict = Verdict("S3", "results never changed")
    values: dict[InstanceKey, list[str]] = defaultdict(list)
    for op in ops:
        if op.op in (STATUS, RESULT) and op.outcome == OK and op.status == COMPLETE:
            values[InstanceKey(op.workflow, op.instance)].append(op.value)
    for key, found in values.items():
        verdict.checked += len(found) > 1
        if len(set(found)) > 1:
            verdict.violated(f"{key}: its result was {found[0]}, and {next(v for v in found if v != found[0])} later")
    return verdict


def _acknowledged_ns(ops: Sequence[Op]) -> dict[InstanceKey, int]:
    """When the creation of an instance was first acknowledged."""
    first: dict[InstanceKey, int] = {}
    for op in ops:
        if op.op == CREATE and op.outcome == OK:
            first.setdefault(InstanceKey(op.workflow, op.instance), op.returned_ns)
    return first
