"""What a parked message holds: enough to try it again, nothing that the server would obey, and never too much."""

from __future__ import annotations

import asyncio

import pytest

from toque import sim
from toque._subjects import CUT_HEADER, parse_origin
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.storage.ports import Message, StreamConfig
from toque.storage.records import MESSAGE_RESERVE
from toque.workers.parking import HEADER_BYTES_MAX, parked

QUEUED = "toque.main.queue.census.1.6.a-1"
ROOM = 1000
OURS = {"Toque-Reason": "why", "Toque-Subject": QUEUED}


def park(headers: dict[str, str] | None = None, data: bytes = b"{}") -> tuple[bytes, dict[str, str]]:
    body, kept = parked(Message(QUEUED, data, headers), "why", ROOM + MESSAGE_RESERVE)
    return body, dict(kept)


def test_the_senders_headers_stay_beside_the_reason() -> None:
    """Content type and nonce are what a retry needs; others may mean something to somebody."""
    own = {"Content-Type": "application/msgpack", "Toque-Nonce": "n", "Trace": "7 é"}

    assert park(own) == (b"{}", {**own, **OURS})
    assert park() == (b"{}", OURS)


def test_no_header_is_kept_that_the_server_would_obey() -> None:
    """A batch, an expected sequence or a TTL would refuse the parked message for ever; a Msg-Id would swallow its retry."""
    obeyed = {name: "1" for name in ("Nats-Batch-Id", "Nats-Expected-Last-Sequence", "Nats-TTL", "nats-msg-id",
                                     "NATS-Rollup")}

    assert park({**obeyed, "Toque-Nonce": "n"}) == (b"{}", {"Toque-Nonce": "n", **OURS})


def test_nobody_can_write_the_reason_beforehand() -> None:
    """Headers of a creation that look like those of a parked message are not taken for them."""
    assert park({"Toque-Reason": "all is well", "Toque-Subject": "elsewhere", "Toque-Cut": "half"}) == (b"{}", OURS)


@pytest.mark.parametrize("headers", [{"Trace": "x" * (HEADER_BYTES_MAX + 1)}, {"Trace": "a\r\nNats-TTL: 1"}, {"a b": "c"},
                                     {"Trace": "\udc80"}], ids=["large", "line-end", "space", "surrogate"])
def test_headers_that_cannot_be_stored_are_left_out_and_that_is_said(headers: dict[str, str]) -> None:
    """The message is parked all the same, and known not to be whole."""
    body, kept = park({**headers, "Toque-Nonce": "n"})

    assert body == b"{}" and kept.keys() == {*OURS, CUT_HEADER}
    assert "headers were left out" in kept[CUT_HEADER]


def test_a_body_that_does_not_fit_is_cut_and_that_is_said() -> None:
    """It is for people to look at then."""
    body, kept = park(data=b"x" * (ROOM + 5))

    assert body == b"x" * ROOM
    assert kept[CUT_HEADER] == f"the body was cut to {ROOM} of {ROOM + 5} bytes"


def test_the_largest_parked_message_is_taken() -> None:
    """A whole body, as many headers as are kept and a long subject fit into max_payload together."""

    async def main() -> None:
        broker = MemoryBroker(asyncio.get_running_loop().rng, max_payload=ROOM + MESSAGE_RESERVE)  # type: ignore[attr-defined]  # the virtual loop's
        bus = MemoryBus(broker)
        await bus.ensure_stream(StreamConfig(name="dead", subjects=["dead"]))
        headers = {f"h{number}": "x" * 60 for number in range(HEADER_BYTES_MAX // 64)}
        message = Message("toque.main.create.census." + "i" * 4000, b"x" * (ROOM + 1), headers)

        data, kept = parked(message, "r" * 200, bus.max_payload)

        assert "h1" in kept
        assert (await bus.publish("dead", data, kept)).sequence == 1

    sim.run(main(), seed=1)


@pytest.mark.parametrize(("subject", "origin"), [
    ("toque.main.queue.census.1.6.50%", ("create", "census", "50%", "toque.main.create.census.50%")),
    ("toque.main.create.census.*", ("create", "census", "*", "toque.main.create.census.*")),
    ("toque.main.create.census.>", ("create", "census", ">", "toque.main.create.census.>")),
    ("toque.main.event.census.a-1.paid", ("event", "census", "a-1", "toque.main.event.census.a-1.paid")),
    ("toque.main.events.1.6.census.a-1.paid", ("event", "census", "a-1", "toque.main.event.census.a-1.paid")),
    ("toque.main.journal.1.6", None), ("elsewhere", None), ("", None)])
def test_the_origin_says_by_which_subject_a_message_came(subject: str, origin: tuple[str, ...] | None) -> None:
    """What was stored under generation and station is published without them again."""
    assert parse_origin(subject) == origin
