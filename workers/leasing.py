"""The pod's side of its lease: one periodic request a second, and one at once when work waits for a slot."""

from __future__ import annotations

import asyncio

import msgspec

from toque import _subjects as subjects
from toque._protocol import LeaseAnswer, LeaseRequest
from toque.storage.ports import Bus, BusTimeout, Message, NoResponders, Subscription
from toque.workers.news import listen, within
from toque.workers.session import Session
from toque.workers.slots import SPARE_SLOTS, Slots

PERIOD_S = 1.0
HUNGRY_PAUSE_S = 0.02  # between immediate requests
TIMEOUT_S = 1.0
RETRY_S = 0.1

_answer_decoder = msgspec.msgpack.Decoder(LeaseAnswer)


class Leasing:
    """Keeps `slots.ceiling` at what the Gatekeeper grants this session. At most one request is open."""

    def __init__(self, bus: Bus, account: str, session: Session, slots: Slots, *, slots_max: int) -> None:
        self._bus = bus
        self._account = account
        self._session = session
        self._slots = slots
        self._slots_max = slots_max
        self._number = 0
        self._epoch = 0
        self._target = slots_max
        self._admit = slots_max
        self._told = 0  # the demand of the last request
        self._told_begun = 0
        self._news = asyncio.Event()
        self._nudges: Subscription | None = None
        self.leased = 0
        self.wanted = 0
        self.requests = 0

    async def run(self) -> None:
        """Ask until cancelled."""
        self._nudges = await listen(self._bus, subjects.gatekeeper_nudge(self._account), self._nudged)
        try:
            while True:
                self._news.clear()
                await self._ask()
                if await within(self._news.wait(), PERIOD_S):
                    await asyncio.sleep(HUNGRY_PAUSE_S)
        finally:
            self._slots.set_ceiling(0)
            await self._nudges.close()

    def ask_soon(self) -> None:
        """Work waits and no slot is free: ask at once, unless the Gatekeeper knows (it nudges when it has more)."""
        demand, begun = min(self._slots.demand, self._slots_max), min(self._slots.begun, self._slots_max)
        if demand > max(self.leased, self._told) or begun > max(self.leased, self._told_begun):
            self._news.set()

    def lower_soon(self) -> None:
        """Slots were given back that others wait for: tell it at once."""
        if max(self._needed(), self._slots.in_use) < self.leased:
            self._news.set()

    def _nudged(self, _: Message) -> None:
        self._news.set()

    async def _ask(self) -> None:
        if not self._session.in_time():
            return
        slots = self._slots
        self._number += 1
        demand = min(self._demand(), self._slots_max)
        self._told = demand
        self.wanted = min(max(demand, SPARE_SLOTS), self._slots_max)
        self._told_begun = begun = min(slots.begun, self._slots_max)
        kept = min(self.leased, self._needed())
        ceiling = max(kept, slots.in_use)
        slots.set_ceiling(kept, self._admit)  # lowered first, reported after
        self.leased = min(self.leased, ceiling)  # the rest may be another's as soon as this is sent, answered or not
        request = LeaseRequest(self._session.id, self._number, demand, self.wanted, ceiling, begun)
        self.requests += 1
        try:
            reply = await self._bus.request(subjects.gatekeeper(self._account), msgspec.msgpack.encode(request),
                                            timeout_s=TIMEOUT_S)
            answer = _answer_decoder.decode(reply.data)
        except (BusTimeout, NoResponders, msgspec.MsgspecError):
            self._retry_soon()  # no Gatekeeper just now: what is leased and was not reported as free stays leased
            return
        if answer.code == "ok" and answer.epoch >= self._epoch and self._session.in_time():
            self._epoch = answer.epoch
            self.leased = answer.slots
            self._target = answer.target
            self._admit = answer.admit
            slots.set_ceiling(min(answer.slots, answer.target), answer.admit)

    def _needed(self) -> int:
        """Up to the target: what the pod may fill with new instances, or what had begun, where that is more."""
        return max(0, min(self._target, max(self._admit, self._slots.begun)))

    def _retry_soon(self) -> None:
        asyncio.get_running_loop().call_later(RETRY_S, self._news.set)

    def _demand(self) -> int:
        """What the pod sees; twice as much when every pull came back full, for the queue may be deep."""
        demand = self._slots.demand
        return demand * 2 if demand > self._slots.ceiling else demand
