"""Asking the owners of stations: where a request goes, how often it is repeated, and which answers count.

An owner may be away (dead, moving, restoring) at any time, so each question is repeated with a growing pause until its
deadline. Only an owner's own words count: silence is never taken for "not found" (protocol rules 16 and 24).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from toque import _subjects
from toque._accounts import no_account, read_layout
from toque._protocol import LONG_POLL_S_MAX, Answer, InstanceRequest, Layout, encode
from toque._subjects import StationId
from toque.errors import BrokerUnavailable
from toque.storage.ports import BusError, NoResponders

if TYPE_CHECKING:
    from toque.storage.ports import Bus, Randomness

ANSWER_S_MAX: Final = 2.0  # how long one request waits for its answer before it is sent again
POLL_MARGIN_S: Final = 1.0  # … beyond the time that the owner may hold a `wait` back
PAUSE_S_MIN: Final = 0.02
PAUSE_S_MAX: Final = 0.5
REQUEST_S_MIN: Final = 0.01  # a deadline that has passed still allows the request under way a moment

_decode_answer = msgspec.msgpack.Decoder(Answer).decode


class Deadline:
    """A point in the running loop's time; None = never. Virtual in the simulator, like all time here."""

    def __init__(self, timeout_s: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._at = None if timeout_s is None else self._loop.time() + timeout_s

    @property
    def passed(self) -> bool:
        return self._at is not None and self._loop.time() >= self._at

    def left_s(self, at_most: float) -> float:
        """Seconds until then, at most so many; 0 when it has passed."""
        return at_most if self._at is None else max(0.0, min(at_most, self._at - self._loop.time()))


class Pauses:
    """Growing, jittered pauses between attempts, so that many waiting clients do not ask in step."""

    def __init__(self, rng: Randomness) -> None:
        self._rng = rng
        self._pause_s = PAUSE_S_MIN

    async def wait(self, deadline: Deadline) -> None:
        pause_s = self._pause_s * (0.5 + self._rng.random())
        self._pause_s = min(self._pause_s * 2, PAUSE_S_MAX)
        await asyncio.sleep(deadline.left_s(pause_s))


@dataclass(frozen=True, slots=True)
class Silence:
    """No answer that counts. `reason` says what is known of why."""

    reason: str


class StationAsker:
    """Asks the owners of one account's stations. Keeps the layout, and the highest epoch seen of each station."""

    def __init__(self, bus: Bus, account: str, rng: Randomness) -> None:
        self._bus = bus
        self._account = account
        self._rng = rng
        self._layout: Layout | None = None
        self._epochs: dict[StationId, int] = {}
        self._created = ""  # which control bucket the two were learnt from

    async def layout(self) -> Layout:
        """The cached layout. Raises SetupError (no such account, newer format), BrokerUnavailable, NoResponders."""
        if self._layout is None:
            created = await self._bucket_created()
            self._layout = await read_layout(self._bus, self._account)
            if created != self._created:  # the account was wiped and made anew: its epochs begin again
                self._created = created
                self._epochs.clear()
        return self._layout

    async def _bucket_created(self) -> str:
        try:
            return (await self._bus.stream_info(_subjects.control_stream(self._account))).created
        except BusError as refusal:
            if refusal.code == BusError.STREAM_NOT_FOUND:
                raise no_account(self._account) from refusal
            raise

    async def stations(self) -> list[StationId]:
        """Every station, those of the newest generation first. Raises as `layout`."""
        generations = reversed((await self.layout()).generations)
        return [StationId(generation, number) for generation, count in generations for number in range(count)]

    async def places(self, instance_id: str) -> list[StationId]:
        """The stations that may have the id, one of each generation, the newest first. Raises as `layout`."""
        generations = reversed((await self.layout()).generations)
        return [StationId(generation, _subjects.station_number(instance_id, count))
                for generation, count in generations]

    async def about(self, operation: str, request: InstanceRequest, deadline: Deadline) -> Answer | Silence:
        """Ask the owner of an instance until an answer counts or the deadline passes.

        "not_found" is returned only when the owner of every generation has said so. For `wait` and `watch` the owner may
        hold the answer back for LONG_POLL_S_MAX or what is left; it may say then that there is nothing new.
        Raises SetupError.
        """
        pauses = Pauses(self._rng)
        while True:
            try:
                answer = await self._ask_generations(operation, request, deadline)
            except (BrokerUnavailable, NoResponders) as error:
                answer = Silence(f"the layout cannot be read: {error}")
            if isinstance(answer, Answer) or deadline.passed:
                return answer
            await pauses.wait(deadline)

    async def _ask_generations(self, operation: str, request: InstanceRequest, deadline: Deadline) -> Answer | Silence:
        """One attempt: the first positive answer, else silence, else the "not_found" of all generations."""
        verdict: Answer | Silence | None = None
        for station in await self.places(request.id):
            body, patience_s = _body(operation, request, deadline)
            answer = await self._once(station, operation, body, patience_s)
            if isinstance(answer, Answer) and answer.code != "not_found":
                return answer
            if not isinstance(verdict, Silence):
                verdict = answer
        assert verdict is not None, "a layout has at least one generation"
        return verdict

    async def at(self, station: StationId, operation: str, body: bytes, deadline: Deadline) -> Answer | Silence:
        """Ask the owner of a station until an answer counts or the deadline passes."""
        pauses = Pauses(self._rng)
        while True:
            try:
                await self.layout()
                answer = await self._once(station, operation, body, deadline.left_s(ANSWER_S_MAX))
            except (BrokerUnavailable, NoResponders) as error:
                answer = Silence(f"the layout cannot be read: {error}")
            if isinstance(answer, Answer) or deadline.passed:
                return answer
            await pauses.wait(deadline)

    async def _once(self, station: StationId, operation: str, body: bytes, patience_s: float) -> Answer | Silence:
        subject = _subjects.station_request(self._account, station, operation)
        try:
            reply = await self._bus.request(subject, body, timeout_s=max(patience_s, REQUEST_S_MIN))
            answer = _decode_answer(reply.data)
        except NoResponders:
            return Silence(f"no pod owns station {station} just now")
        except BrokerUnavailable as error:
            return Silence(f"the owner of station {station} did not answer in time ({error})")
        except msgspec.MsgspecError as error:
            return Silence(f"the answer of station {station} cannot be read ({error})")
        return self._judge(station, answer)

    def _judge(self, station: StationId, answer: Answer) -> Answer | Silence:
        """An answer of a deposed owner is none; neither is "retry", nor that of an owner that is not the right one."""
        if answer.epoch < self._epochs.get(station, 0):
            self._layout = None  # to be read again, in case that the whole account is another one
            return Silence(f"only a former owner of station {station} answered")
        self._epochs[station] = answer.epoch
        if answer.code == "moved":
            self._layout = None
            return Silence(f"what was at station {station} has moved")
        if answer.code == "retry":
            return Silence(f"the owner of station {station} is not ready: {answer.message or 'restoring'}")
        return answer


def _body(operation: str, request: InstanceRequest, deadline: Deadline) -> tuple[bytes, float]:
    """The request, and how long its answer may take; some are held back by the owner, for what is left at most."""
    if operation not in ("wait", "watch"):
        return encode(request, json=False), deadline.left_s(ANSWER_S_MAX)
    wait_s = deadline.left_s(LONG_POLL_S_MAX)
    timed = msgspec.structs.replace(request, wait_s=wait_s)
    return encode(timed, json=False), wait_s + POLL_MARGIN_S
