"""Sends a parked message again: as the creation or the event that it was, with its own headers.

A creation counts as accepted only when the owner says that the id is this creation's. That our nonce lies in the queue
proves nothing: the message that was parked may still lie there, and leaves with the next purge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from toque import _subjects
from toque._creation import Creation
from toque._names import check_instance_id
from toque._payload import payload_max
from toque._protocol import InstanceRequest, InstanceView
from toque._requests import Deadline, Pauses, Silence
from toque._subjects import (
    CUT_HEADER,
    NONCE_HEADER,
    ORIGIN_HEADER,
    PARKING_HEADERS,
    REQUEST_HEADER,
    SERVER_HEADERS,
    Origin,
)
from toque.errors import (
    BrokerUnavailable,
    InstanceEnded,
    InstanceExists,
    InstanceNotFound,
    InvalidName,
    OwnerAway,
    PayloadTooLarge,
    QueueFull,
    ToqueError,
    UnknownWorkflow,
    UsageError,
)
from toque.storage.ports import BusError, NoResponders

if TYPE_CHECKING:
    from toque._creation import Creator
    from toque._requests import StationAsker
    from toque.storage.ports import Bus, Message, Randomness

PUBLISH_S_MAX: Final = 5.0
ENDED: Final = frozenset({"complete", "errored", "terminated"})
NEVER: Final = "it can only be dropped, or its body sent anew"

_decode_instance = msgspec.msgpack.Decoder(InstanceView).decode


class DeadRetry:
    """Retries of one account's parked messages. Leaves the dead stream as it is: that is the caller's."""

    def __init__(self, bus: Bus, creator: Creator, asker: StationAsker, rng: Randomness) -> None:
        self._bus = bus
        self._creator = creator
        self._asker = asker
        self._rng = rng

    async def run(self, message: Message, deadline: Deadline) -> None:
        """Returns when it is accepted; else raises as `DeadMessages.retry`."""
        origin = _subjects.parse_origin(message.header(ORIGIN_HEADER))
        error = obstacle(origin, message.header(CUT_HEADER), len(message.data), self._bus.max_payload)
        if error is not None or origin is None:
            raise error or UsageError(NEVER)
        if origin.kind == "create":
            await self._create(origin, message, deadline)
        else:
            await self._send(origin, message, deadline)

    # -- creations ------------------------------------------------------------------------------------------------

    async def _create(self, origin: Origin, message: Message, deadline: Deadline) -> None:
        headers = own_headers(message)
        headers.setdefault(NONCE_HEADER, f"dead-{message.sequence}-{message.time_ms}")  # the same in every retry
        creation = Creation(origin.workflow, origin.instance_id, origin.publish, message.data, headers, chosen=True)
        pauses = Pauses(self._rng)
        while True:
            try:
                return await self._creator.publish(creation, deadline)
            except InstanceExists as error:
                if await self._accepted_before(creation, error, deadline):
                    return None
            await pauses.wait(deadline)

    async def _accepted_before(self, creation: Creation, error: InstanceExists, deadline: Deadline) -> bool:
        """The id is taken: by this creation, at an earlier retry? False = by nobody: the parked message itself is there.

        Raises the error when another creation has it, OwnerAway when nobody can say it, or the queue is not purged.
        """
        request = InstanceRequest(workflow=creation.workflow, id=creation.id, nonce=creation.nonce)
        answer = await self._asker.about("exists", request, deadline)
        if isinstance(answer, Silence):
            raise OwnerAway(f"whose instance {creation.workflow}/{creation.id} is, is not known: {answer.reason}")
        if answer.code == "exists":
            raise error
        if answer.code != "ok" and deadline.passed:
            raise OwnerAway(f"the queue of {creation.workflow!r} still holds what was parked of {creation.id}; it leaves "
                            "within seconds: retry it then")
        return answer.code == "ok"

    # -- events ---------------------------------------------------------------------------------------------------

    async def _send(self, origin: Origin, message: Message, deadline: Deadline) -> None:
        """An event for an instance that does not live would only be parked again: its owner is asked before."""
        name = f"{origin.workflow}/{origin.instance_id}"
        request = InstanceRequest(workflow=origin.workflow, id=origin.instance_id)
        answer = await self._asker.about("status", request, deadline)
        if isinstance(answer, Silence):
            raise OwnerAway(f"whether {name} lives is not known: {answer.reason}; the event was not sent")
        if answer.code == "not_found":
            raise InstanceNotFound(f"there is no instance {name}; its event stays parked")
        if answer.code == "ok" and _decode_instance(answer.value).status in ENDED:
            raise InstanceEnded(f"{name} has ended; its event stays parked")
        headers = own_headers(message)
        headers.setdefault(REQUEST_HEADER, f"dead-{message.sequence}-{message.time_ms}")  # the same in every retry
        patience_s = max(deadline.left_s(PUBLISH_S_MAX), 0.05)
        try:
            await self._bus.publish(origin.publish, message.data, headers, timeout_s=patience_s)
        except NoResponders as error:
            raise UnknownWorkflow(f"no stream takes events of {origin.workflow!r}; the event stays parked") from error
        except BusError as refusal:
            if refusal.full:
                raise QueueFull(f"no more events are taken of {origin.workflow!r} just now; this one stays parked: {refusal}"
                                ) from refusal
            raise BrokerUnavailable(f"the server refuses the event for {name}, it stays parked: {refusal}") from refusal


def own_headers(message: Message) -> dict[str, str]:
    """The headers that the message came with."""
    return {name: text for name, text in (message.headers or {}).items()
            if name not in PARKING_HEADERS and not name.lower().startswith(SERVER_HEADERS)}


def obstacle(origin: Origin | None, cut: str, size: int, max_payload: int) -> ToqueError | None:
    """Why the message can never be accepted as it is. `cut`: what it lacks; `size`: bytes of its body."""
    if origin is None:
        return UsageError(f"the subject that it was stored under is neither a creation's nor an event's: {NEVER}")
    if cut:
        return UsageError(f"it is not whole, {cut}: {NEVER}")
    limit = payload_max(max_payload)
    if size > limit:
        return PayloadTooLarge(f"its body has {size} bytes, more than {limit}: {NEVER}", size=size, limit=limit)
    try:
        check_instance_id(origin.instance_id)
    except InvalidName as error:
        return InvalidName(f"{error}: {NEVER}", kind=error.kind, name=error.name)
    return None
