"""What counts of an instance's history: its newest run, and what a restart in the middle keeps of the run before.

Pure. A restart from a step keeps the outcomes of those steps that began before it, the events that they got and the
children that they made; ties are broken by the order of the records. Everything else of earlier runs counts no more,
buffered events included.
"""

from __future__ import annotations

from collections.abc import Sequence

from toque.storage import records as r
from toque.storage.fold import step_key

Outcome = r.StepDone | r.StepFailed | r.SleepDone | r.WaitDone | r.WaitTimedOut | r.ChildEnded


def newest_run(history: Sequence[r.Record]) -> list[r.Record]:
    """The Admitted record, what is kept of earlier runs, and the records of the newest one. `history` is not empty."""
    counted: list[r.Record] = []
    for record in history:
        if type(record) is r.Restarted:
            counted = [counted[0], *(_kept(counted, record.from_key) if record.from_key else ())]
        counted.append(record)
    return counted


def step_of(record: r.Record) -> str:
    """The identity of the step that a record speaks of; "" for one that speaks of none."""
    match record:
        case r.StepDone() | r.StepFailed() | r.AttemptFailed() | r.StepCancelled() | r.ChildBegun():
            return step_key(record.step, record.name, record.occurrence)
        case r.SleepStarted() | r.SleepDone():
            return step_key(r.StepKind.SLEEP, record.name, record.occurrence)
        case r.WaitStarted() | r.WaitDone() | r.WaitTimedOut():
            return step_key(r.StepKind.EVENT, record.name, record.occurrence)
        case r.ChildCreated() | r.ChildEnded():
            return step_key(r.StepKind.CHILD, record.name, record.occurrence)
        case _:
            return ""


def began_at(record: r.Record) -> int:
    """When the step began that this record, the first one of it, speaks of; ms."""
    return getattr(record, "started_at", record.at)


def _kept(counted: Sequence[r.Record], from_key: str) -> list[r.Record]:
    begins: dict[str, tuple[int, int]] = {}
    for place, record in enumerate(counted):
        if key := step_of(record):
            begins.setdefault(key, (began_at(record), place))
    limit = begins.get(from_key, (0, 0))
    kept = {id(record) for record in counted if isinstance(record, Outcome) and begins[step_of(record)] < limit}
    steps = {step_of(record) for record in counted if id(record) in kept}
    kept |= {id(record) for record in counted if isinstance(record, r.ChildBegun) and step_of(record) in steps}
    events = {(record.run, record.event) for record in counted if isinstance(record, r.WaitDone) and id(record) in kept}
    return [record for record in counted
            if id(record) in kept or (isinstance(record, r.EventReceived) and (record.run, record.seq) in events)]
