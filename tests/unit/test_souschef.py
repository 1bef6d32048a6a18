"""What a SousChef calls committed, and what it calls handled: accepted in stream order, still in the stream (rule 11)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from toque._payload import PAYLOAD_MAX
from toque._subjects import StationId
from toque.storage.ports import Message
from toque.workers.souschef import SousChef
from toque.workflow import Step, Workflow, WorkflowEvent


class Work(Workflow[int, int], name="work"):
    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        return event.payload


def souschef(*sequences: int) -> SousChef:
    """One that has begun to admit the messages with these sequences; none of it is accepted yet."""
    serials = iter(range(1, 100))
    owner: Any = SimpleNamespace(
        id=StationId(1, 0), deleting={}, tombstone=lambda workflow, instance_id: None,
        knows=lambda workflow, instance_id: False, new_serial=lambda: next(serials),
        now_ms=lambda: 9, admit=lambda chef, record, into_slot: None, may_admit=lambda: True, in_time=lambda: True,
        payload_max=PAYLOAD_MAX)
    chef = SousChef(owner, "work", Work)
    for sequence in sequences:
        chef.offer(f"i{sequence}", Message("", b"7", sequence=sequence))
        assert chef.admit_next()
    return chef


def test_the_position_stands_before_the_oldest_that_is_not_accepted():
    """Acceptances may come in any order; what is accepted behind an open one is neither committed nor handled yet."""
    chef = souschef(5, 6, 7)

    chef.was_accepted(6)
    assert (chef.committed(9), list(chef.handled)) == (4, [])
    chef.was_accepted(5)
    assert (chef.committed(9), list(chef.handled)) == (6, [5, 6])
    chef.was_accepted(7)
    assert (chef.committed(9), list(chef.handled)) == (9, [5, 6, 7])


def test_what_was_purged_is_not_handled_any_more():
    """Figures take the handled messages from those that lie in the stream."""
    chef = souschef(5, 6, 7)
    for sequence in (5, 6, 7):
        chef.was_accepted(sequence)

    chef.purged(7)

    assert list(chef.handled) == [7]


def test_a_message_that_is_being_admitted_is_not_admitted_again():
    """A fresh consumer brings it once more while its record is on its way."""
    chef = souschef(5)

    chef.offer("i5", Message("", b"7", sequence=5))

    assert not chef.admit_next()
    assert chef.committed(9) == 4


def test_a_message_dropped_for_an_operation_is_handled_with_its_record():
    """Protocol rule 12: until the record that makes the id known is accepted, the message is all there is."""
    chef = souschef()
    chef._owner.knows = lambda workflow, instance_id: True  # type: ignore[method-assign]  # a stand-in
    chef._owner.is_admitting = lambda workflow, instance_id: True  # type: ignore[method-assign]

    chef.offer("i5", Message("", b"7", sequence=5))
    assert not chef.admit_next()
    assert (chef.committed(9), list(chef.handled)) == (4, [])
    chef.was_admitted("i5")

    assert (chef.committed(9), list(chef.handled)) == (9, [5])
