"""Parked messages, `client.dead`: what could not be accepted is looked at, tried again, or dropped.

They lie in the account's dead stream under their reason until somebody retries or drops them, or 30 days or 256 MiB are
over. A message is named by its sequence there, which never means another one. Reading leaves everything as it is; lists
read headers alone, in pages, and hold nothing open at the server between two of them.
"""

from __future__ import annotations

import asyncio
import builtins
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from toque import _subjects
from toque._accounts import no_account
from toque._dead_retry import DeadRetry, obstacle, own_headers
from toque._durations import Duration, to_ms
from toque._names import check_workflow
from toque._requests import Deadline
from toque._subjects import CUT_HEADER, ORIGIN_HEADER, REASON_HEADER, SIZE_HEADER
from toque.errors import BrokerUnavailable, NotParked, ToqueError, UsageError
from toque.storage.ports import BusError, FeedSpec, StreamInfo
from toque.workflow import Workflow, workflow_name

if TYPE_CHECKING:
    from toque._creation import Creator
    from toque._requests import StationAsker
    from toque.storage.ports import Bus, Message, Randomness

KINDS: Final = ("create", "event")
PAGE_MESSAGES: Final = 1000
POLL_S: Final = 0.05  # how often is looked whether a page is whole, when nothing arrives
IN_FLIGHT_MAX: Final = 32  # of retry_many and drop_many
REASONS_MAX: Final = 1000  # told apart by count()
OTHER_REASONS: Final = "(other reasons)"
TIMEOUT_DEFAULT: Final = "10 seconds"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadMessage:
    """A parked message without its body. Times are UTC, of the broker's clock."""

    sequence: int
    """Names it in the account, for `get`, `retry` and `drop`."""
    kind: str
    """create or event."""
    workflow: str
    id: str | None
    """Of the instance that was to be created, or that the event was for; None when its subject does not tell."""
    subject: str
    """Under which it was stored before it was parked."""
    reason: str
    parked_at: datetime
    size: int
    """Bytes of the body as it is kept."""
    obstacle: str
    """Why a retry is bound to fail; empty when it may succeed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadContent(DeadMessage):
    """A parked message with everything that is kept of it."""

    body: bytes
    headers: Mapping[str, str]
    """Those of its sender, without the ones that the NATS server acts on."""


@dataclass(frozen=True, slots=True)
class DeadResult:
    """What became of one message: `error` is None when it was retried, or dropped, or (for a drop) was gone."""

    sequence: int
    error: ToqueError | None = None


@dataclass(frozen=True, slots=True)
class DeadCount:
    """So many messages of one kind and workflow are parked for one reason."""

    kind: str
    workflow: str
    reason: str
    messages: int


class DeadMessages:
    """`client.dead`: the parked messages of the account.

    Calls raise SetupError when there is no such account, and BrokerUnavailable.
    """

    def __init__(self, bus: Bus, account: str, creator: Creator, asker: StationAsker, rng: Randomness) -> None:
        self._bus = bus
        self._account = account
        self._stream = _subjects.dead_stream(account)
        self._retry = DeadRetry(bus, creator, asker, rng)

    # -- looking --------------------------------------------------------------------------------------------------

    async def list(self, *, kind: str | None = None, workflow: type[Workflow[Any, Any]] | str | None = None,
                   reason_contains: str | None = None, limit: int | None = None, after: int | None = None,
                   timeout: Duration = TIMEOUT_DEFAULT) -> AsyncGenerator[DeadMessage, None]:
        """Parked messages, the oldest first: `async for message in client.dead.list(workflow="census")`.

        `after` is the sequence behind which to begin. What is parked after the call began is not in it, so that a retry
        of all ends. Pages are read while you iterate; `timeout` is for each of them. Raises UsageError, InvalidName.
        """
        if limit is not None and limit < 1:
            raise UsageError(f"limit must be 1 or more, not {limit}")
        filter_ = self._filter(kind, workflow)
        wanted = PAGE_MESSAGES if limit is None or reason_contains else min(limit, PAGE_MESSAGES)
        end = (await self._info()).last_sequence
        position, given = max(after or 0, 0), 0
        while position < end:
            page = await _bounded(self._page(filter_, position, end, wanted), timeout)
            position = page.position
            for message in page.messages:
                found = self._view(message)
                if reason_contains is None or reason_contains in found.reason:
                    yield found
                    given += 1
                    if given == limit:
                        return

    async def get(self, sequence: int, *, timeout: Duration = TIMEOUT_DEFAULT) -> DeadContent:
        """One parked message with its body. Raises NotParked."""
        return await _bounded(self._content(sequence), timeout)

    async def count(self, *, kind: str | None = None, workflow: type[Workflow[Any, Any]] | str | None = None,
                    timeout: Duration = TIMEOUT_DEFAULT) -> builtins.list[DeadCount]:
        """How many messages are parked for what, the most first; reads the headers of all of them.

        Beyond 1,000 different reasons the rest is counted as "(other reasons)". Raises as `list`.
        """
        counts: Counter[tuple[str, str, str]] = Counter()
        async for message in self.list(kind=kind, workflow=workflow, timeout=timeout):
            key = (message.kind, message.workflow, message.reason)
            if key not in counts and len(counts) >= REASONS_MAX:
                key = (message.kind, message.workflow, OTHER_REASONS)
            counts[key] += 1
        return [DeadCount(*key, number) for key, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]

    # -- acting ---------------------------------------------------------------------------------------------------

    async def retry(self, sequence: int, *, timeout: Duration = TIMEOUT_DEFAULT) -> None:
        """Send a parked message again as it came (body, headers, nonce); once it is accepted it is not parked any more.

        Raises, and leaves it parked: NotParked; InvalidName, PayloadTooLarge, UsageError (it can never be accepted: see
        `DeadMessage.obstacle`); InstanceExists (a creation whose id another one took); InstanceNotFound, InstanceEnded
        (an event); QueueFull, UnknownWorkflow; OwnerAway, BrokerUnavailable (not known whether it was accepted: retry
        again). A message that its owner cannot accept for another reason is parked once more, under a new sequence.
        Killed between the two it is accepted *and* parked: retried again, a creation is one instance all the same by
        its id and nonce; an event is delivered twice unless its sender gave it an id.
        """
        message = await self._message(sequence)
        await self._retry.run(message, Deadline(to_ms(timeout, what="timeout") / 1000))
        await self._delete(sequence)

    async def drop(self, sequence: int) -> bool:
        """Delete a parked message for good. False when it was gone already; dropping twice is harmless."""
        return await self._delete(_checked(sequence))

    async def retry_many(self, sequences: Iterable[int], *,
                         timeout: Duration = TIMEOUT_DEFAULT) -> builtins.list[DeadResult]:
        """`retry` each of them, several at once. One result per sequence, in order, each true for itself.

        `timeout` is for each message. Killed meanwhile, some are retried and the others are parked still.
        """
        return await _each(sequences, lambda sequence: self.retry(sequence, timeout=timeout))

    async def drop_many(self, sequences: Iterable[int]) -> builtins.list[DeadResult]:
        """`drop` each of them, several at once. One result per sequence, in order, each true for itself."""
        return await _each(sequences, self.drop)

    # -- reading --------------------------------------------------------------------------------------------------

    def _filter(self, kind: str | None, workflow: type[Workflow[Any, Any]] | str | None) -> str:
        if kind is not None and kind not in KINDS:
            raise UsageError(f"no message of the kind {kind!r} is ever parked; there are {', '.join(KINDS)}")
        if isinstance(workflow, type):
            workflow = workflow_name(workflow)
        return _subjects.dead(self._account, kind or "*", check_workflow(workflow) if workflow is not None else "*")

    async def _info(self) -> StreamInfo:
        try:
            return await self._bus.stream_info(self._stream)
        except BusError as refusal:
            raise self._explained(refusal) from refusal

    async def _page(self, filter_: str, after: int, end: int, wanted: int) -> _Page:
        arrived: builtins.list[Message] = []
        news = asyncio.Event()

        def take(messages: Sequence[Message]) -> None:
            arrived.extend(messages)
            news.set()

        spec = FeedSpec(stream=self._stream, filters=(filter_,), start_sequence=after + 1, name="dead", headers_only=True)
        feed = await self._bus.open_feed(spec, take)
        try:
            feed.want(wanted)
            while len(arrived) < wanted and await feed.clear_to() < end:
                await _wait(news)
        finally:
            await feed.close()
        return _page_of(arrived, after, end, whole=len(arrived) < wanted)

    async def _message(self, sequence: int) -> Message:
        try:
            message = await self._bus.message_at(self._stream, _checked(sequence))
        except BusError as refusal:
            raise self._explained(refusal) from refusal
        if message is None:
            raise NotParked(f"no message {sequence} is parked in the account {self._account!r}: it was retried or dropped, "
                            "or its time was over")
        return message

    async def _content(self, sequence: int) -> DeadContent:
        message = await self._message(sequence)
        return DeadContent(**self._fields(message, len(message.data)), body=message.data, headers=own_headers(message))

    async def _delete(self, sequence: int) -> bool:
        try:
            return await self._bus.delete_message(self._stream, sequence)
        except BusError as refusal:
            raise self._explained(refusal) from refusal

    def _explained(self, refusal: BusError) -> ToqueError:
        return no_account(self._account) if refusal.code == BusError.STREAM_NOT_FOUND else refusal

    def _view(self, message: Message) -> DeadMessage:
        return DeadMessage(**self._fields(message, int(message.header(SIZE_HEADER) or 0)))

    def _fields(self, message: Message, size: int) -> dict[str, Any]:
        subject = message.header(ORIGIN_HEADER)
        origin = _subjects.parse_origin(subject)
        kind, workflow = _subjects.parse_dead(message.subject)
        error = obstacle(origin, message.header(CUT_HEADER), size, self._bus.max_payload)
        return {"sequence": message.sequence, "kind": kind, "workflow": workflow,
                "id": origin.instance_id if origin else None, "subject": subject,
                "reason": message.header(REASON_HEADER), "size": size, "obstacle": str(error or ""),
                "parked_at": datetime.fromtimestamp(message.time_ms / 1000, UTC)}


class _Page(NamedTuple):
    """Messages in order, and the sequence up to which there are no more."""

    messages: list[Message]
    position: int


def _page_of(arrived: Sequence[Message], after: int, end: int, *, whole: bool) -> _Page:
    """A feed may bring a message twice, and what came to the stream meanwhile."""
    messages: list[Message] = []
    position = after
    for message in arrived:
        if position < message.sequence <= end:
            messages.append(message)
            position = message.sequence
    beyond = bool(arrived) and arrived[-1].sequence > end
    return _Page(messages, end if whole or beyond else position)


def _checked(sequence: int) -> int:
    if sequence < 1:
        raise UsageError(f"a parked message has a sequence of 1 or more, not {sequence}")
    return sequence


async def _wait(news: asyncio.Event) -> None:
    """Until something has arrived, or it is time to look."""
    try:
        async with asyncio.timeout(POLL_S):
            await news.wait()
    except TimeoutError:
        return
    news.clear()


async def _bounded(reading: Awaitable[_T], timeout: Duration) -> _T:
    seconds = to_ms(timeout, what="timeout") / 1000
    try:
        async with asyncio.timeout(seconds):
            return await reading
    except TimeoutError as error:
        raise BrokerUnavailable(f"the parked messages could not be read within {seconds:g} s") from error


async def _each(sequences: Iterable[int], act: Callable[[int], Awaitable[Any]]) -> list[DeadResult]:
    """One result per sequence, IN_FLIGHT_MAX at a time. A sequence that stands there twice is acted on once."""
    wanted = list(sequences)
    results: dict[int, DeadResult] = {}
    waiting = iter(dict.fromkeys(wanted))

    async def work() -> None:
        for sequence in waiting:
            try:
                await act(sequence)
                results[sequence] = DeadResult(sequence)
            except ToqueError as error:
                results[sequence] = DeadResult(sequence, error)

    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT_MAX):
            group.create_task(work())
    return [results[sequence] for sequence in wanted]
