"""Records: what is written can be read back, by later versions too, and a group's header tells the chain."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from toque.storage import records as r

FAILURE = r.Failure("ValueError", "no", "trace")
CONFIG = r.RetryConfig(5, 10_000, "exponential", 3_600_000, True, 600_000)
EXAMPLES = [
    r.Admitted(1, 1, 1, 9, "census", "one", "nonce", 7, 8, b"{}", "application/json", "2"),
    r.StepDone(1, 1, 2, 9, r.StepKind.DO, "hash", 1, 1, 8, b"\xc0"),
    r.AttemptFailed(1, 1, 3, 9, r.StepKind.DO, "hash", 2, 1, 8, FAILURE, 99, CONFIG, True),
    r.StepFailed(1, 1, 4, 9, r.StepKind.DO, "hash", 2, 6, 8, FAILURE, True),
    r.SleepStarted(1, 1, 5, 9, "nap", 1, 99, True),
    r.SleepDone(1, 1, 6, 9, "nap", 1),
    r.Waiting(1, 1, 7, 9),
    r.Interrupted(1, 1, 8, 9, "a-1"),
    r.Woken(1, 1, 9, 9),
    r.Ended(1, 1, 10, 9, r.Status.ERRORED, b"", FAILURE),
    r.Blocked(1, 1, 11, 9, "code: changed"),
    r.StepCancelled(1, 1, 12, 9, r.StepKind.DO, "hash", 3),
    r.Claim(0, 0, 0, 9, "a", "a-1"),
    r.Released(0, 0, 0, 9, "b-1"),
    r.Lease(0, 0, 0, 9, "a-1", 3, 64),
    r.LeaseEnded(0, 0, 0, 9, "a-1"),
    r.Parked(0, 0, 0, 9, "census", 7, "toque.main.queue.census.1.0.$", "the id has no legal form"),
    r.Snapshot(0, 0, 0, 9, "3-88", r.Position(88, r.GroupHeader(3, "a-1", 40, 77)), 99, 700_000, 2, 1_200, 512_000),
    r.EventReceived(1, 1, 13, 9, "paid", "e-1", b"\x07", 8, 5),
    r.WaitStarted(1, 1, 14, 9, "payment", 1, "paid", 99, True),
    r.WaitDone(1, 1, 15, 9, "payment", 1, 13, 8),
    r.WaitTimedOut(1, 1, 16, 9, "refund", 1, 8),
    r.PauseAsked(1, 1, 17, 9, "q-1"),
    r.Paused(1, 1, 18, 9, ""),
    r.Resumed(1, 1, 19, 9, "q-2", 500),
    r.Deleted(0, 0, 0, 9, [1, 2]),
    r.Restarted(1, 2, 1, 9, "q-3", "2", "1:1:hash"),
    r.EventParked(0, 0, 0, 9, 5, "toque.main.events.1.0.census.one.paid", "no such instance"),
    r.ChildBegun(1, 1, 20, 9, r.StepKind.CHILD, "part", 1, "leaf", "one-8f3c"),
    r.ChildCreated(1, 1, 21, 9, "part", 1, 700_000, True),
    r.ChildEnded(1, 1, 22, 9, "part", 1, 2, r.Status.ERRORED, b"", r.Failure("ValueError", "no")),
    r.Delivered(0, 0, 0, 9, 3, 1, r.Errand.END),
]
TAGS = {"Admitted": 1, "StepDone": 2, "AttemptFailed": 3, "StepFailed": 4, "SleepStarted": 5, "SleepDone": 6,
        "Waiting": 7, "Interrupted": 8, "Woken": 9, "Ended": 10, "Blocked": 11, "StepCancelled": 12, "Claim": 20,
        "Released": 21, "Lease": 22, "LeaseEnded": 23, "Parked": 24, "Snapshot": 25, "EventReceived": 13, "WaitStarted": 14,
        "WaitDone": 15, "WaitTimedOut": 16, "PauseAsked": 17, "Paused": 18, "Resumed": 19, "Deleted": 26, "Restarted": 27,
        "EventParked": 28, "ChildBegun": 29, "ChildCreated": 30, "ChildEnded": 31, "Delivered": 32}


def test_there_is_an_example_of_every_record():
    """A new kind of record gets its example here, and with it the tests below."""
    assert {type(example) for example in EXAMPLES} == set(get_args(r.AnyRecord))


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_a_record_survives_the_journal(record):
    """Encoded into a group's body and decoded again it is equal, and of the same kind."""
    found = r.decode_records(r.join_records([r.encode_record(record)]))

    assert found == [record]
    assert type(found[0]) is type(record)


def test_the_numbers_of_the_kinds_never_change():
    """A stored journal names kinds by number: a number that moved would read old records as others."""
    assert {kind.__name__: kind.__struct_config__.tag for kind in get_args(r.AnyRecord)} == TAGS


@pytest.mark.parametrize("missing", [3])
def test_records_written_before_a_field_was_added_still_decode(missing):
    """New fields come at the end, with a default."""
    parts = msgspec.msgpack.decode(r.encode_record(EXAMPLES[0]))
    older = msgspec.msgpack.encode(parts[:-missing])

    found = r.decode_records(r.join_records([older]))[0]

    assert isinstance(found, r.Admitted)
    assert (found.id, found.version) == ("one", "")


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 65_535, 65_536])
def test_joined_records_are_one_msgpack_array(count):
    """At every length at which the array's head changes its form."""
    encoded = r.encode_record(EXAMPLES[6])

    assert r.decode_records(r.join_records([encoded] * count)) == [EXAMPLES[6]] * count


@pytest.mark.parametrize("body", [b"", b"\x00", b"\x91\x01", b"{}", b"\x91\x91\xcc\xff"])
def test_a_body_that_holds_no_records_is_refused(body):
    """Damage is an error, never an empty group."""
    with pytest.raises(msgspec.MsgspecError):
        r.decode_records(body)


def test_a_header_survives_its_text_form():
    """The header travels as text: "epoch session group crc"."""
    header = r.GroupHeader(7, "pod-1-0af3", 12, 0x00AB12CD)

    assert header.text() == "7 pod-1-0af3 12 00ab12cd"
    assert r.GroupHeader.parse(header.text()) == header


@pytest.mark.parametrize("text", ["", "7", "7 a 12", "7 a 12 zz", "x a 12 00", "7 a 12 00 extra"])
def test_another_text_is_no_header(text):
    """Somebody else's message in the journal is noticed."""
    with pytest.raises(ValueError):
        r.GroupHeader.parse(text)


def test_the_terminal_statuses_are_the_ended_ones():
    """Everything else is live."""
    assert [status.label for status in r.Status if status.ended] == ["complete", "errored", "terminated"]


def test_a_row_wakes_at_its_soonest_wait():
    """0 = it waits for nothing."""
    row = r.InstanceRow("census", "one", "", 1, 1, r.Status.WAITING, 0, 0, timers={"2:1:a": 30, "2:1:b": 20})

    assert row.wake_at == 20
    assert r.InstanceRow("census", "two", "", 1, 1, r.Status.RUNNING, 0, 0).wake_at == 0
