"""What is kept of an exception: bounded, encodable, and only the user's own lines."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from toque._failures import MESSAGE_BYTES_MAX, TRACEBACK_BYTES_MAX, TYPE_BYTES_MAX, describe_exception
from toque._payload import decode


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class BrokenNotes(Exception):
    @property
    def __notes__(self):
        raise RuntimeError("no notes")


def raised(error: Exception) -> BaseException:
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


def deep(levels: int) -> None:
    if levels:
        deep(levels - 1)
    raise ValueError("deep")


def test_a_builtin_exception_keeps_its_short_name():
    """Type, message and the line that raised are there."""
    failure = describe_exception(raised(ValueError("bad input")))

    assert (failure.type, failure.message) == ("ValueError", "bad input")
    assert "raise error" in failure.traceback
    assert failure.traceback.endswith("ValueError: bad input\n")


def test_another_exception_is_named_with_its_module():
    """Two libraries may have an error of one name."""
    assert describe_exception(raised(msgspec.ValidationError("x"))).type == "msgspec.ValidationError"


def test_frames_of_toque_and_asyncio_are_left_out():
    """The user sees the user's lines."""
    async def callback() -> None:
        await asyncio.wait_for(fail(), 5)

    async def fail() -> None:
        decode(b"\xc1", int, what="x")

    with pytest.raises(Exception, match="x cannot be decoded") as caught:
        asyncio.run(callback())

    text = describe_exception(caught.value).traceback
    assert "in callback" in text
    assert "in fail" in text
    assert "asyncio/" not in text
    assert "_payload.py" not in text


def test_causes_and_members_of_groups_are_kept():
    """What led to the error, and what a TaskGroup collected, belongs to it."""
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ExceptionGroup("several", [ValueError("one"), OSError("two")]) from error
    except ExceptionGroup as group:
        text = describe_exception(group).traceback

    assert "KeyError: 'first'" in text
    assert "ValueError: one" in text
    assert "OSError: two" in text


def test_locals_are_never_kept():
    """A payload in a variable does not get into the record."""
    payload = "hunter2"

    try:
        raise ValueError(len(payload))
    except ValueError as error:
        assert "hunter2" not in describe_exception(error).traceback


@pytest.mark.parametrize("text", ["x" * 10_000_000, "é" * 100_000, "\ud800" * 100_000, "a\n" * 100_000])
def test_long_messages_are_cut_to_their_bound(text):
    """The bound is in bytes as they are stored, and what is left can be stored."""
    failure = describe_exception(raised(ValueError(text)))

    assert len(failure.message.encode()) <= MESSAGE_BYTES_MAX
    assert failure.message.endswith("…")
    assert len(failure.traceback.encode()) <= TRACEBACK_BYTES_MAX
    assert msgspec.msgpack.encode(failure)


def test_a_deep_traceback_keeps_its_beginning_and_end():
    """A recursion is cut in the middle, and the error is still at the end."""
    try:
        deep(500)
    except ValueError as error:
        failure = describe_exception(error)

    assert len(failure.traceback.encode()) <= TRACEBACK_BYTES_MAX
    assert failure.traceback.startswith("Traceback")
    assert failure.traceback.endswith("ValueError: deep\n")


def test_a_long_chain_is_cut_to_its_bound():
    """A loop of re-raises cannot fill the record."""
    error: BaseException = ValueError("x" * 500)
    for number in range(200):
        try:
            raise KeyError(number) from error
        except KeyError as caught:
            error = caught

    failure = describe_exception(error)

    assert len(failure.traceback.encode()) <= TRACEBACK_BYTES_MAX
    assert failure.traceback.endswith("KeyError: 199\n")


def test_an_exception_whose_text_cannot_be_made_is_still_described():
    """Describing never raises, whatever the exception's own methods do."""
    failure = describe_exception(raised(Broken()))

    assert failure.type.endswith("Broken")
    assert failure.message == "<str() of the exception raised RuntimeError>"


def test_an_exception_whose_traceback_cannot_be_made_is_still_described():
    """Notes are the user's code too."""
    assert describe_exception(raised(BrokenNotes("x"))).message == "x"


def test_a_long_type_name_is_cut():
    """A generated class cannot fill the record either."""
    made = type("E" * 1_000, (Exception,), {})

    assert len(describe_exception(raised(made())).type.encode()) <= TYPE_BYTES_MAX


def test_an_exception_that_was_never_raised_is_described():
    """There is no traceback to show then."""
    assert describe_exception(ValueError("x")).traceback == "ValueError: x\n"
