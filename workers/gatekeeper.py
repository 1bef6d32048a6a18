"""Gatekeeper: leases slots to sessions as absolute numbers (protocol rule 9). A role of station 0's owner.

The leases are records of station 0's journal, so election and fencing come with the station. A grant is sent only after
its record is accepted. What a session was granted stays counted until it reports a lower ceiling, or its session has
ended and a TTL has passed since a renewal of it was last seen (at once when its process is known to be dead).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from toque._protocol import LeaseAnswer, LeaseRequest
from toque.storage.ports import Clock, Message
from toque.storage.records import Lease, LeaseEnded, LeaseRow, Record
from toque.workers.control import ControlWatch

SWEEP_EVERY_S = 0.25
# Ended by whoever knows that nothing is inside of it any more: the holder of the pod directory's lock, or the pod itself,
# which writes "left" as its last act, and "lost" when every callback of the session has left.
PROVEN_ENDS = ("dead", "left", "lost")

_request_decoder = msgspec.msgpack.Decoder(LeaseRequest)


@dataclass(slots=True)
class Appetite:
    """What a session asked for last."""

    demand: int
    wanted: int


def share(limit: int, appetites: Mapping[str, Appetite]) -> dict[str, int]:
    """Max-min shares: first of what is needed, then of what is wanted on top. Pure; the sum is at most the limit."""
    shares = _max_min(limit, {session: appetite.demand for session, appetite in appetites.items()})
    left = limit - sum(shares.values())
    extra = _max_min(left, {
        session: max(0, appetite.wanted - shares[session]) if shares[session] >= appetite.demand else 0
        for session, appetite in appetites.items()
    })
    return {session: shares[session] + extra[session] for session in appetites}


def _max_min(limit: int, wants: Mapping[str, int]) -> dict[str, int]:
    shares = dict.fromkeys(wants, 0)
    left = limit
    waiting = sorted(wants, key=lambda session: (wants[session], session))
    while waiting:
        session = waiting.pop(0)
        fair = left // (len(waiting) + 1)
        shares[session] = min(wants[session], fair)
        left -= shares[session]
    for session in sorted(wants):  # what the division left over
        if left <= 0:
            break
        if shares[session] < wants[session]:
            shares[session] += 1
            left -= 1
    return shares


@dataclass(slots=True)
class _Book:
    leases: dict[str, LeaseRow]
    appetites: dict[str, Appetite] = field(default_factory=dict)


class Gatekeeper:
    """The lease table while its station is owned. `commit` waits for acceptance; `nudge` asks pods to report now."""

    def __init__(self, leases: dict[str, LeaseRow], control: ControlWatch, clock: Clock, *, epoch: int,
                 commit: Callable[[Record], asyncio.Future[None]], now_ms: Callable[[], int],
                 respond: Callable[[Message, bytes], None], nudge: Callable[[], None],
                 in_time: Callable[[], bool]) -> None:
        self._book = _Book(dict(leases))
        self._told: dict[str, int] = {}  # by session: the target of its last answer
        self._accepted: dict[str, asyncio.Future[None]] = {}  # by session: the acceptance of its last record
        self._control = control
        self._clock = clock
        self._epoch = epoch
        self._commit = commit
        self._now_ms = now_ms
        self._respond = respond
        self._nudge = nudge
        self._in_time = in_time
        self._opened_at = clock.boottime()
        self.closed = False

    @property
    def granted(self) -> int:
        """Slots leased out in all."""
        return sum(lease.slots for lease in self._book.leases.values())

    def handle(self, message: Message) -> None:
        """One lease request, answered after its record is accepted."""
        if self.closed:
            return
        try:
            request = _request_decoder.decode(message.data)
        except msgspec.MsgspecError:
            return  # not ours to answer: the caller times out
        if not self._is_live(request.session):
            self._answer(message, LeaseAnswer(self._epoch, 0, 0, code="unknown_session"))
            return
        lease = self._book.leases.get(request.session, LeaseRow(0, 0))
        if request.number <= lease.number:
            return  # an old request, delivered late
        self._book.appetites[request.session] = Appetite(request.demand, max(request.wanted, request.demand))
        slots, target = self._decide(request, lease.slots)
        self._book.leases[request.session] = LeaseRow(request.number, slots)
        self._told[request.session] = target
        if slots != lease.slots:
            record = Lease(0, 0, 0, self._now_ms(), request.session, request.number, slots)
            self._accepted[request.session] = self._commit(record)
        self._answer_when_accepted(message, request.session, LeaseAnswer(self._epoch, slots, target))
        if slots < lease.slots:
            self._nudge_hungry()

    def _decide(self, request: LeaseRequest, held: int) -> tuple[int, int]:
        """The new holding and the target. Lowering needs the pod's own report: its ceiling."""
        shares = self._shares()
        target = shares[request.session]
        held = min(held, max(request.ceiling, 0))
        free = self._control.account.max_concurrent - (
            self.granted - self._book.leases.get(request.session, LeaseRow(0, 0)).slots) - held
        if target <= held:
            return held, target
        slots = held + max(0, min(target - held, free))
        if slots < target and self._unaware(shares):
            self._nudge()  # others hold more than their share: they report, lower, and this one is nudged again
        return slots, target

    def _unaware(self, shares: Mapping[str, int]) -> bool:
        """Whether a living session holds more than its share and has not been told so yet, or was not heard at all."""
        return any(session not in self._told or lease.slots > shares.get(session, 0) != self._told[session]
                   for session, lease in self._book.leases.items() if lease.slots and self._is_live(session))

    def expired(self) -> list[str]:
        """Sessions with slots whose key has expired, and that nobody has ended: those that had no station."""
        return [session for session in self._book.leases
                if (seen := self._control.sessions.get(session)) is not None and seen.expired]

    def _shares(self) -> dict[str, int]:
        """Of the living sessions that have asked, in what the others do not hold: those that died, or were not heard."""
        asking = {session: appetite for session, appetite in self._book.appetites.items() if self._is_live(session)}
        frozen = sum(lease.slots for session, lease in self._book.leases.items() if session not in asking)
        return share(max(0, self._control.account.max_concurrent - frozen), asking)

    def _is_live(self, session: str) -> bool:
        seen = self._control.sessions.get(session)
        return seen is not None and seen.live

    def limits_changed(self) -> None:
        """The account's limit may be another: let every pod report now, so that a lower one holds soon."""
        if not self.closed:
            self._nudge()

    def sweep(self) -> None:
        """Free the slots of ended sessions. Call it each SWEEP_EVERY_S."""
        if self.closed or not self._in_time():
            return
        freed = False
        for session in list(self._book.leases):
            if self._may_free(session):
                del self._book.leases[session]
                self._book.appetites.pop(session, None)
                self._accepted.pop(session, None)
                self._told.pop(session, None)
                self._commit(LeaseEnded(0, 0, 0, self._now_ms(), session))
                freed = True
        if freed:
            self._nudge_hungry()

    def _may_free(self, session: str) -> bool:
        seen = self._control.sessions.get(session)
        now = self._clock.boottime()
        ttl = self._control.account.ttl_s
        if seen is None:  # its key is gone for long: only a new Gatekeeper must still wait
            return now - max(self._opened_at, self._control.opened_at) >= ttl
        if seen.record is None or not seen.record.ended:
            return False
        if seen.record.ended in PROVEN_ENDS:
            return True
        return now - seen.seen_at >= (seen.ttl_s or seen.record.ttl_s)

    def _nudge_hungry(self) -> None:
        if any(appetite.wanted > self._book.leases.get(session, LeaseRow(0, 0)).slots
               for session, appetite in self._book.appetites.items()):
            self._nudge()

    def _answer_when_accepted(self, message: Message, session: str, answer: LeaseAnswer) -> None:
        """The session's last record may still be on its way, though this request changed nothing."""
        accepted = self._accepted.get(session)
        if accepted is None or accepted.done():
            self._answer(message, answer)
        else:
            accepted.add_done_callback(lambda done: None if done.cancelled() else self._answer(message, answer))

    def _answer(self, message: Message, answer: LeaseAnswer) -> None:
        if message.reply and self._in_time():
            self._respond(message, msgspec.msgpack.encode(answer))
