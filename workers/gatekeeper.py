"""Gatekeeper: leases slots to sessions as absolute numbers (protocol rule 9). A role of station 0's owner.

The leases are records of station 0's journal, so election and fencing come with the station. A grant is sent only after
its record is accepted. What a session was granted stays counted until it reports a lower ceiling, or its session has
ended and a TTL has passed since a renewal of it was last seen (at once when its process is known to be dead).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

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
    """What a session asked for last. `begun`: of the demand, what runs, or had begun and waits for a slot."""

    demand: int
    wanted: int
    begun: int = 0


def share(limit: int, appetites: Mapping[str, Appetite]) -> dict[str, int]:
    """Max-min shares: of what had begun, then of what is needed, then of what is wanted. Pure; at most the limit in sum."""
    shares = dict.fromkeys(appetites, 0)
    shares = _filled(limit, shares, {session: its.begun for session, its in appetites.items()})
    shares = _filled(limit, shares, {session: its.demand for session, its in appetites.items()})
    return _filled(limit, shares, {session: its.wanted for session, its in appetites.items()})


def _filled(limit: int, floors: Mapping[str, int], wants: Mapping[str, int]) -> dict[str, int]:
    """Each up to its want, the lowest first, none below its floor; the floors are within the limit."""
    def at(level: int) -> dict[str, int]:
        return {session: max(floor, min(wants[session], level)) for session, floor in floors.items()}

    low, high = 0, max(wants.values(), default=0)
    shares = at(high)
    if sum(shares.values()) <= limit:
        return shares
    while low < high:  # the highest level that the limit allows
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(at(middle).values()) <= limit else (low, middle - 1)
    shares = at(low)
    left = limit - sum(shares.values())
    for session in sorted(wants, reverse=True):  # what is less than one each
        if left > 0 and shares[session] <= low < wants[session]:
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
        self._told: dict[str, int] = {}  # by session: how far its last answer let it admit
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
            self._answer(message, LeaseAnswer(self._epoch, 0, 0, 0, code="unknown_session"))
            return
        lease = self._book.leases.get(request.session, LeaseRow(0, 0))
        if request.number <= lease.number:
            return  # an old request, delivered late
        self._book.appetites[request.session] = Appetite(
            max(request.demand, request.begun), max(request.wanted, request.demand, request.begun), request.begun)
        slots, target, admit = self._decide(request, lease.slots)
        self._book.leases[request.session] = LeaseRow(request.number, slots)
        self._told[request.session] = admit
        if slots != lease.slots:
            record = Lease(0, 0, 0, self._now_ms(), request.session, request.number, slots)
            self._accepted[request.session] = self._commit(record)
        self._answer_when_accepted(message, request.session, LeaseAnswer(self._epoch, slots, target, admit))
        if slots < lease.slots:
            self._nudge_hungry()

    def _decide(self, request: LeaseRequest, held: int) -> tuple[int, int, int]:
        """The new holding, the target and how far new instances go. Lowering needs the pod's own report: its ceiling.

        Instances that had begun, of any pod, come before new ones; what they hold above a fair share no new one follows
        into (decision 0010).
        """
        shares, fair = self._shares(), self._shares(fair=True)
        target, admit = shares[request.session], fair[request.session]
        held = min(held, max(request.ceiling, 0))
        free = self._control.account.max_concurrent - (
            self.granted - self._book.leases.get(request.session, LeaseRow(0, 0)).slots) - held
        slots = held + max(0, min(target - held, free))
        if slots < admit and self._unaware(fair):
            self._nudge()  # others hold more than their share: they report, lower, and this one is nudged again
        return slots, target, admit

    def _unaware(self, shares: Mapping[str, int]) -> bool:
        """Whether a living session holds more than its share and has not been told so yet, or was not heard at all."""
        return any(session not in self._told or lease.slots > shares.get(session, 0) != self._told[session]
                   for session, lease in self._book.leases.items() if lease.slots and self._is_live(session))

    def expired(self) -> list[str]:
        """Sessions with slots whose key has expired, and that nobody has ended: those that had no station."""
        return [session for session in self._book.leases
                if (seen := self._control.sessions.get(session)) is not None and seen.expired]

    def _shares(self, *, fair: bool = False) -> dict[str, int]:
        """Of the living sessions that have asked, in what the others do not hold: those that died, or were not heard.

        `fair`: as if nothing had begun.
        """
        asking = {session: appetite for session, appetite in self._book.appetites.items() if self._is_live(session)}
        frozen = sum(lease.slots for session, lease in self._book.leases.items() if session not in asking)
        if fair:
            asking = {session: replace(appetite, begun=0) for session, appetite in asking.items()}
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
