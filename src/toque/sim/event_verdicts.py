"""Judges the events of a simulated run by its journal: V1 and V2, and that run() was given what was matched."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toque import _subjects as subjects
from toque._payload import decode
from toque.chaos.history import FAILED, OK, Op
from toque.chaos.verdicts import InstanceKey, Verdict
from toque.sim.clients import EVENT, Clients
from toque.storage import records as r

if TYPE_CHECKING:
    from toque.sim.verdicts import Facts

BEHIND_MS = 50  # how far a pod's broker time may be behind, and how long an acknowledgement is on its way


def check_events(facts: Facts, clients: Clients) -> list[Verdict]:
    """Every verdict over events."""
    return [_delivered(facts, clients), _ordered(facts, clients), _matched(facts), _timed_out(facts, clients),
            _given(facts)]


def _received(facts: Facts, key: InstanceKey) -> list[r.EventReceived]:
    return [record for _, record in facts.records.get(key, ()) if isinstance(record, r.EventReceived)]


def _sent(facts: Facts, clients: Clients) -> dict[InstanceKey, list[tuple[Op, str]]]:
    found: dict[InstanceKey, list[tuple[Op, str]]] = defaultdict(list)
    for op in facts.world.history.ops:
        if op.op == EVENT:
            found[InstanceKey(op.workflow, op.instance)].append((op, clients.events[op.number]))
    return found


def _delivered(facts: Facts, clients: Clients) -> Verdict:
    """An acknowledged event is the instance's, once, or was parked; a refused one is not."""
    verdict = Verdict("V1", "each acknowledged event was recorded once, or parked, and none was recorded twice")
    parked = {message.header(subjects.REQUEST_HEADER) for message in facts.world.parked()}
    for key, sent in _sent(facts, clients).items():
        ids = [record.event_id for record in _received(facts, key)]
        for op, event_id in sent:
            verdict.checked += 1
            accepted = any(other.outcome == OK for other, id_ in sent if id_ == event_id)
            if ids.count(event_id) > 1:
                verdict.violated(f"{key}: event {event_id} was recorded {ids.count(event_id)} times")
            if op.outcome == OK and event_id not in ids and event_id not in parked:
                verdict.violated(f"{key}: event {event_id} was acknowledged, and is not there")
            if op.outcome == FAILED and event_id in ids and not accepted:
                verdict.violated(f"{key}: event {event_id} was refused, and is there")
    return verdict


def _ordered(facts: Facts, clients: Clients) -> Verdict:
    """Sent by request after another was acknowledged so: it comes after it."""
    verdict = Verdict("V1o", "events came in the order of their acknowledgements")
    for key, sent in _sent(facts, clients).items():
        places = {record.event_id: place for place, record in enumerate(_received(facts, key)) if not record.sequence}
        began: dict[str, Op] = {}  # by the event's id: the first attempt to send it
        for op, event_id in sent:
            began.setdefault(event_id, op)
        for op, event_id in sent:
            verdict.checked += 1
            late = [other for id_, other in began.items() if op.outcome == OK and op.returned_ns <= other.invoked_ns
                    and places.get(id_, math.inf) < places.get(event_id, 0)]
            for other in late:
                verdict.violated(f"{key}: what op {op.number} sent came behind what op {other.number} sent later")
    return verdict


def _matched(facts: Facts) -> Verdict:
    """The matches of the journal: each event to one wait, and the first of its type that was there."""
    verdict = Verdict("V1m", "each event was given to one wait, the first of its type first; each wait had one outcome")
    for key, records in facts.records.items():
        buffers: dict[str, list[int]] = defaultdict(list)
        types: dict[int, str] = {}
        decided: set[tuple[str, int]] = set()
        for _, record in records:
            if isinstance(record, r.EventReceived):
                buffers[record.type].append(record.seq)
                types[record.seq] = record.type
            elif isinstance(record, r.WaitDone | r.WaitTimedOut):
                verdict.checked += 1
                if (record.name, record.occurrence) in decided:
                    verdict.violated(f"{key}: a second outcome of a wait, {record}")
                decided.add((record.name, record.occurrence))
                if isinstance(record, r.WaitDone):
                    _take(verdict, key, buffers[types.get(record.event, "")], record)
    return verdict


def _take(verdict: Verdict, key: InstanceKey, buffer: list[int], record: r.WaitDone) -> None:
    if record.event not in buffer:
        verdict.violated(f"{key}: {record} took an event that is not there, or was taken before")
    elif buffer[0] != record.event:
        verdict.violated(f"{key}: {record} took a later event than {buffer[0]}")
    if record.event in buffer:
        buffer.remove(record.event)


def _timed_out(facts: Facts, clients: Clients) -> Verdict:
    """V2 and rule 23: no wait timed out early, nor while an event of its type was there or acknowledged before."""
    verdict = Verdict("V2", "an event that was acknowledged before the deadline won against the time-out")
    sent = _sent(facts, clients)
    for key, records in facts.records.items():
        acknowledged = {event_id: op.returned_ns for op, event_id in sent.get(key, ()) if op.outcome == OK}
        for place, (_, record) in enumerate(records):
            if isinstance(record, r.WaitTimedOut):
                verdict.checked += 1
                _judge_time_out(verdict, facts, key, [entry for _, entry in records], place, acknowledged)
    return verdict


def _judge_time_out(verdict: Verdict, facts: Facts, key: InstanceKey, records: Sequence[Any], place: int,
                    acknowledged: dict[str, int]) -> None:
    out: r.WaitTimedOut = records[place]
    (begun,) = [record for record in records[:place] if isinstance(record, r.WaitStarted)
                and (record.name, record.occurrence) == (out.name, out.occurrence)]
    if out.at + 1 < begun.due:
        verdict.violated(f"{key}: {out} was early, due at {begun.due}")
    taken = {record.event for record in records[:place] if isinstance(record, r.WaitDone)}
    for number, record in enumerate(records):
        if not isinstance(record, r.EventReceived) or record.type != begun.type or record.seq in taken:
            continue
        acked_ms = acknowledged.get(record.event_id, 0) // 1_000_000
        in_time = acked_ms and acked_ms + facts.world.broker.epoch_ms + BEHIND_MS < begun.due
        if number < place or in_time:
            verdict.violated(f"{key}: {out} though {record} was there, or acknowledged, before")


def _given(facts: Facts) -> Verdict:
    """run() got the events that the journal matched, in that order."""
    verdict = Verdict("E2e", "every event that run() was given is the one that was matched")
    for key, ends in facts.ended.items():
        if ends[0].status is not r.Status.COMPLETE:
            continue
        payloads = {record.seq: decode(record.payload, Any, what="an event") for record in _received(facts, key)}
        matched = [payloads[record.event] if isinstance(record, r.WaitDone) else None for _, record in facts.records[key]
                   if isinstance(record, r.WaitDone | r.WaitTimedOut)]
        given = decode(ends[0].output, Any, what="the output")["events"]
        verdict.checked += len(given)
        if given != matched:
            verdict.violated(f"{key}: run() was given {given}, the journal matched {matched}")
    return verdict
