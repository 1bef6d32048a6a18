"""Judges the delivery of events: V1. A pure checker over a history of what was sent and what waits received."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from toque.chaos.history import FAILED, OK, UNKNOWN
from toque.chaos.verdicts import Verdict


class Sent(msgspec.Struct, frozen=True):
    """An event that a client sent: `event` is its own id, different for each."""

    instance: str
    type: str
    event: str
    invoked_ns: int
    returned_ns: int = 0  # 0: never returned
    outcome: str = UNKNOWN  # ok | failed | unknown


class Received(msgspec.Struct, frozen=True):
    """An event that a wait of the instance was given, in the order of its steps."""

    instance: str
    type: str
    event: str


def check_v1(sent: Iterable[Sent], received: Iterable[Received]) -> Verdict:
    """An acknowledged event is delivered exactly once, an unknown one at most once, a refused one never; FIFO per type.

    For instances that took all they were sent: an event that stays buffered at the end counts as lost.
    """
    verdict = Verdict("V1", "each acknowledged event was delivered once, in order for each type")
    got: dict[tuple[str, str], list[str]] = defaultdict(list)
    for delivery in received:
        got[delivery.instance, delivery.type].append(delivery.event)
    asked: dict[tuple[str, str], list[Sent]] = defaultdict(list)
    for event in sent:
        asked[event.instance, event.type].append(event)
    for place in sorted(asked.keys() | got.keys()):
        verdict.checked += len(asked[place])
        where = f"instance {place[0]}, type {place[1]}"
        _judge_counts(verdict, where, asked[place], got[place])
        _judge_order(verdict, where, asked[place], got[place])
    return verdict


def _judge_counts(verdict: Verdict, where: str, asked: Sequence[Sent], got: Sequence[str]) -> None:
    known = {event.event: event for event in asked}
    for name in dict.fromkeys(got):
        if name not in known:
            verdict.violated(f"{where}: received {name}, which nobody sent")
        elif known[name].outcome == FAILED:
            verdict.violated(f"{where}: received {name}, which was refused")
        if got.count(name) > 1:
            verdict.violated(f"{where}: received {name} {got.count(name)} times")
    for event in asked:
        if event.outcome == OK and event.event not in got:
            verdict.violated(f"{where}: {event.event} was acknowledged, and never received")


def _judge_order(verdict: Verdict, where: str, asked: Sequence[Sent], got: Sequence[str]) -> None:
    """What was sent after another had been acknowledged is received after it."""
    known = {event.event: event for event in asked}
    last: Sent | None = None  # the received event that was invoked last
    for name in dict.fromkeys(got):
        event = known.get(name)
        if event is None:
            continue
        if last is not None and event.outcome == OK and event.returned_ns <= last.invoked_ns:
            verdict.violated(f"{where}: received {last.event} before {name}, which had been acknowledged before it")
        if last is None or event.invoked_ns > last.invoked_ns:
            last = event
