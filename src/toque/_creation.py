"""Publishing creations: one at a time and in atomic batches, with outcomes that are true (protocol rules 14 and 17).

A creation carries a nonce. An unknown outcome is settled by publishing the same id and nonce again: refused as a
duplicate, the nonces are compared. The message that lies in the queue may prove that it is ours; that it belongs to
somebody else only the owner may say, since ours may have been admitted and purged before theirs came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from toque import _subjects
from toque._accounts import queue_workflows
from toque._bounded import for_each
from toque._names import check_instance_id, new_instance_id
from toque._payload import decode, encode, payload_max
from toque._protocol import InstanceRequest
from toque._requests import Deadline, Pauses, Silence
from toque._subjects import CONTENT_TYPE_HEADER, NONCE_HEADER, RETENTION_HEADER
from toque.errors import (
    BrokerUnavailable,
    InstanceExists,
    OwnerAway,
    QueueFull,
    SetupError,
    ToqueError,
    TwiceInBatch,
    UnknownWorkflow,
    UsageError,
)
from toque.storage.ports import BATCH_MESSAGES_MAX, BusError, NoResponders
from toque.workflow import Retention

if TYPE_CHECKING:
    from toque._requests import StationAsker
    from toque.storage.ports import Bus, Headers, Message, Randomness

PUBLISH_S_MAX: Final = 5.0  # how long one publish waits for its ack before its outcome counts as unknown
PUBLISH_S_MIN: Final = 0.05
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
BATCHES_IN_FLIGHT: Final = 3  # the server stages them one by one; more would only hold memory
SINGLES_IN_FLIGHT: Final = 64
QUESTIONS_IN_FLIGHT: Final = 256
MESSAGE_OVERHEAD: Final = 160  # bytes of headers and protocol around one message of a batch, roughly


class NewInstance(msgspec.Struct, frozen=True):
    """One creation of a batch. Without an `id` a new one is made."""

    params: Any = None
    id: str | None = None
    retention: Retention | None = None


class BatchResult(msgspec.Struct, frozen=True):
    """What became of one item of a batch: `error` is None when the instance exists now, by this call."""

    index: int
    id: str
    error: ToqueError | None = None

    @property
    def code(self) -> int | None:
        """Cloudflare's code of the error: 10405 the id exists, 10415 twice in one batch. None without one."""
        return getattr(self.error, "code", None)


class Creation(NamedTuple):
    """A creation that is ready to be published. `chosen`: the caller chose the id, so it may exist already."""

    workflow: str
    id: str
    subject: str
    body: bytes
    headers: Headers
    chosen: bool

    @property
    def nonce(self) -> str:
        return self.headers[NONCE_HEADER]


class Creator:
    """Publishes the creations of one account."""

    def __init__(self, bus: Bus, account: str, asker: StationAsker, rng: Randomness, now_ms: Callable[[], int]) -> None:
        self._bus = bus
        self._account = account
        self._asker = asker
        self._rng = rng
        self._now_ms = now_ms

    # -- making ---------------------------------------------------------------------------------------------------

    def new_headers(self) -> Headers:
        """The headers of one call of the client. Its nonce tells its creations from any other's of the same id."""
        nonce = f"{self._rng.getrandbits(64):016x}"
        return {CONTENT_TYPE_HEADER: "application/msgpack", NONCE_HEADER: nonce}

    def make(self, workflow: str, params: Any, params_type: Any, instance_id: str | None, headers: Headers,
             retention: Retention | None = None) -> Creation:
        """Raises InvalidName, InvalidPayload, PayloadTooLarge."""
        id_ = new_instance_id(self._now_ms(), self._rng) if instance_id is None else check_instance_id(instance_id)
        body = self._encode(workflow, params, params_type)
        if retention is not None:
            headers = {**headers, RETENTION_HEADER: " ".join(map(str, retention.ms()))}
        return Creation(workflow, id_, _subjects.create(self._account, workflow, id_), body, headers,
                        instance_id is not None)

    def _encode(self, workflow: str, params: Any, params_type: Any) -> bytes:
        what = f"params of workflow {workflow!r}"
        body = encode(params, what=what, limit=payload_max(self._bus.max_payload))
        if params_type is not Any:
            decode(body, params_type, what=what)
        return body

    # -- one ------------------------------------------------------------------------------------------------------

    async def publish(self, creation: Creation, deadline: Deadline, *, unsure: bool = False) -> None:
        """Publish until the outcome is known. `unsure`: an earlier attempt of this very creation may have landed.

        Raises InstanceExists, QueueFull, UnknownWorkflow, SetupError (nothing was stored), BrokerUnavailable (unknown,
        or refused with the reason), OwnerAway (stored or not as its text says).
        """
        pauses = Pauses(self._rng)
        while True:
            try:
                patience_s = max(deadline.left_s(PUBLISH_S_MAX), PUBLISH_S_MIN)
                await self._bus.publish(creation.subject, creation.body, creation.headers, timeout_s=patience_s)
                break
            except BrokerUnavailable as error:
                unsure, trouble = True, str(error)
            except NoResponders as error:
                await self._check_known(creation.workflow)
                trouble = f"the queue of {creation.workflow!r} has no leader just now ({error})"
            except BusError as refusal:
                if refusal.duplicate and unsure:
                    return await self._compare_nonces(creation, deadline)
                if not unsure:
                    raise _refused(creation, refusal) from refusal
                trouble = str(refusal)
            if deadline.passed:
                raise _given_up(creation, trouble, unsure)
            await pauses.wait(deadline)
        if creation.chosen:
            await self.check_unique(creation, deadline)

    async def _check_known(self, workflow: str) -> None:
        """Nobody took the message: because there is no queue, or only because it has no leader just now?

        Raises UnknownWorkflow, SetupError (there is no JetStream).
        """
        try:
            known = await queue_workflows(self._bus, self._account)
        except NoResponders as error:  # nor does anybody take JetStream's own requests
            raise SetupError("JetStream does not answer on this NATS server: start nats-server with -js (or a jetstream "
                             "block in its configuration), and enable it for the account; nothing was stored") from error
        except BrokerUnavailable:
            return
        if workflow in known:
            return
        there_are = f"known are {', '.join(known)}" if known else "no workflow is known here"
        raise UnknownWorkflow(f"workflow {workflow!r} has never been served by a pod of account {self._account!r} here "
                              f"({there_are}): check the name and the server, or start a pod; nothing was stored")

    async def check_unique(self, creation: Creation, deadline: Deadline) -> None:
        """The creation is stored; was the id another creation's before?"""
        code = await self._ask_owner(creation, deadline)
        if code == "exists":
            raise _exists(creation)
        if isinstance(code, Silence):
            raise OwnerAway(f"the creation of {creation.workflow}/{creation.id} is stored; whether the id existed "
                            f"before is not known: {code.reason}")

    async def _compare_nonces(self, creation: Creation, deadline: Deadline) -> None:
        """Refused as a duplicate, after an attempt that may have landed: is the duplicate our own?"""
        queued = await self.queued(creation.workflow, creation.id)
        if queued is not None and queued.header(NONCE_HEADER) == creation.nonce:
            if creation.chosen:  # it is ours, and may be dropped: the id may have been an instance before
                await self.check_unique(creation, deadline)
            return
        code = await self._ask_owner(creation, deadline)
        if code == "exists":
            raise _exists(creation)
        if isinstance(code, Silence):
            raise OwnerAway(f"{creation.workflow}/{creation.id} exists or will; whether from this creation or from "
                            f"another of the same id is not known: {code.reason}")

    async def _ask_owner(self, creation: Creation, deadline: Deadline) -> str | Silence:
        """ "ok" = ours, "exists" = another creation's. An owner that has not seen the message yet is asked again."""
        request = InstanceRequest(workflow=creation.workflow, id=creation.id, nonce=creation.nonce)
        pauses = Pauses(self._rng)
        while True:
            answer = await self._asker.about("exists", request, deadline)
            if isinstance(answer, Silence) or answer.code in ("ok", "exists"):
                return answer if isinstance(answer, Silence) else answer.code
            if deadline.passed:
                return Silence(f"its owner answers {answer.code!r} {answer.message}".rstrip())
            await pauses.wait(deadline)

    async def queued(self, workflow: str, instance_id: str) -> Message | None:
        """The id's message in the queue, if one is found; that none is found proves nothing."""
        stream = _subjects.queue_stream(self._account, workflow)
        try:
            for station in await self._asker.places(instance_id):
                subject = _subjects.queue(self._account, workflow, station, instance_id)
                message = await self._bus.last_message(stream, subject)
                if message is not None:
                    return message
        except (BrokerUnavailable, NoResponders, BusError):
            return None
        return None


class BatchCreator:
    """One `create_batch`: cuts the items into atomic batches, and settles what each of them leaves open."""

    def __init__(self, creator: Creator, bus: Bus, workflow: str, params_type: Any, timeout_s: float) -> None:
        self._creator = creator
        self._bus = bus
        self._workflow = workflow
        self._params_type = params_type
        self._timeout_s = timeout_s
        self._headers = creator.new_headers()  # ids are unique within the call, so one nonce serves all
        self._ids: list[str] = []
        self._errors: dict[int, ToqueError] = {}
        self._chosen_ids: set[str] = set()
        self._full: ToqueError | None = None  # the first refusal for a full queue: nothing is tried after it

    async def run(self, items: Sequence[NewInstance]) -> list[BatchResult]:
        """Raises UsageError (something that is no item: nothing is sent), UnknownWorkflow (the answer to each item)."""
        for index, item in enumerate(items):
            if not isinstance(item, NewInstance):
                raise UsageError(f"item {index} of the batch is a {type(item).__name__}, not a NewInstance(params, "
                                 "id=…); nothing was sent")
        await for_each(self._send, self._cut(items), BATCHES_IN_FLIGHT)
        self._raise_if_all_unknown()
        errors = self._errors
        return [BatchResult(index, id_, errors.get(index)) for index, id_ in enumerate(self._ids)]

    def _raise_if_all_unknown(self) -> None:
        unknown = [error for error in self._errors.values() if isinstance(error, UnknownWorkflow)]
        if unknown and len(unknown) == len(self._ids):
            raise unknown[0]

    # -- cutting --------------------------------------------------------------------------------------------------

    def _cut(self, items: Iterable[NewInstance]) -> Iterator[list[tuple[int, Creation]]]:
        batch: list[tuple[int, Creation]] = []
        size = 0
        for index, item in enumerate(items):
            creation = self._make(index, item)
            if creation is None:
                continue
            added = len(creation.subject) + len(creation.body) + MESSAGE_OVERHEAD
            if batch and (len(batch) == BATCH_MESSAGES_MAX or size + added > BATCH_BYTES_MAX):
                yield batch
                batch, size = [], 0
            batch.append((index, creation))
            size += added
        if batch:
            yield batch

    def _make(self, index: int, item: NewInstance) -> Creation | None:
        try:
            if item.id is not None:
                self._check_new_in_call(item.id)
            creation = self._creator.make(self._workflow, item.params, self._params_type, item.id, self._headers,
                                          item.retention)
        except ToqueError as error:
            self._ids.append(str(item.id or ""))
            self._errors[index] = error
            return None
        self._ids.append(creation.id)
        return creation

    def _check_new_in_call(self, instance_id: str) -> None:
        if instance_id in self._chosen_ids:
            raise TwiceInBatch(f"{self._workflow}/{instance_id} stands earlier in the same batch")
        self._chosen_ids.add(instance_id)

    # -- sending --------------------------------------------------------------------------------------------------

    async def _send(self, batch: Sequence[tuple[int, Creation]]) -> None:
        """All of the batch at once if the server takes it, else in smaller parts, in the end one by one."""
        deadline = Deadline(self._timeout_s)
        if self._full is not None:
            self._errors.update((index, QueueFull(str(self._full))) for index, _ in batch)
        elif len(batch) == 1:
            await self._publish_singly(batch, deadline, unsure=False)
        else:
            await self._send_atomically(batch, deadline)

    async def _send_atomically(self, batch: Sequence[tuple[int, Creation]], deadline: Deadline) -> None:
        try:
            messages = [(creation.subject, creation.body, creation.headers) for _, creation in batch]
            await self._bus.publish_batch(messages, timeout_s=PUBLISH_S_MAX)
        except BrokerUnavailable:
            await self._publish_singly(batch, deadline, unsure=True)
        except NoResponders:
            await self._publish_singly(batch, deadline, unsure=False)
        except BusError as refusal:
            await self._send_parts(batch, refusal, deadline)
        else:
            await self._check_chosen(batch, deadline)

    async def _send_parts(self, batch: Sequence[tuple[int, Creation]], refusal: BusError, deadline: Deadline) -> None:
        """A refused batch stored nothing, and the refusal names no message."""
        if refusal.full:
            middle = len(batch) // 2
            await self._send(batch[:middle])
            await self._send(batch[middle:])
            return
        rest = await self._without_queued(batch) if refusal.duplicate else batch
        if len(rest) < len(batch):
            if rest:
                await self._send(rest)
        else:
            await self._publish_singly(batch, deadline, unsure=False)

    async def _without_queued(self, batch: Sequence[tuple[int, Creation]]) -> list[tuple[int, Creation]]:
        """The items whose ids are not in the queue; the others get their error."""
        rest: list[tuple[int, Creation]] = []

        async def look(item: tuple[int, Creation]) -> None:
            index, creation = item
            if await self._creator.queued(self._workflow, creation.id) is None:
                rest.append(item)
            else:
                self._errors[index] = _exists(creation)

        await for_each(look, iter(batch), SINGLES_IN_FLIGHT)
        return sorted(rest, key=lambda item: item[0])

    async def _publish_singly(self, batch: Sequence[tuple[int, Creation]], deadline: Deadline, *,
                              unsure: bool) -> None:
        async def publish(item: tuple[int, Creation]) -> None:
            index, creation = item
            try:
                await self._creator.publish(creation, deadline, unsure=unsure)
            except QueueFull as error:
                self._full = self._errors[index] = error
            except ToqueError as error:
                self._errors[index] = error

        await for_each(publish, iter(batch), SINGLES_IN_FLIGHT)

    async def _check_chosen(self, batch: Sequence[tuple[int, Creation]], deadline: Deadline) -> None:
        async def check(item: tuple[int, Creation]) -> None:
            index, creation = item
            try:
                await self._creator.check_unique(creation, deadline)
            except ToqueError as error:
                self._errors[index] = error

        await for_each(check, (item for item in batch if item[1].chosen), QUESTIONS_IN_FLIGHT)


# -- errors ------------------------------------------------------------------------------------------------------------

def _exists(creation: Creation) -> InstanceExists:
    return InstanceExists(f"an instance {creation.workflow}/{creation.id} exists already, from another creation")


def _refused(creation: Creation, refusal: BusError) -> ToqueError:
    """A first refusal: nothing was stored."""
    if refusal.duplicate:
        return _exists(creation)
    if refusal.full:
        return QueueFull(f"the queue of {creation.workflow!r} is full; {creation.id} was not stored: try again later, "
                         "or raise the account's queue_limit")
    return BrokerUnavailable(f"the server refuses the creation of {creation.workflow}/{creation.id}, nothing was "
                             f"stored: {refusal}")


def _given_up(creation: Creation, trouble: str, unsure: bool) -> BrokerUnavailable:
    known = "whether it was stored is not known" if unsure else "nothing was stored"
    return BrokerUnavailable(f"the creation of {creation.workflow}/{creation.id} was not acknowledged in time; "
                             f"{known}: {trouble}")
