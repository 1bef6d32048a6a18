"""Watching instances: the events of one in order, page by page from its owner, and those of many merged.

Nothing is remembered anywhere for a watcher: its place is the cursor of the last event, which any owner understands. So
a watcher may be killed and go on with it later, and a take-over in the middle is only a pause.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec

from toque import _payload
from toque._durations import Duration, to_ms
from toque._protocol import WATCH_TYPES, ErrorView, WatchPage, WatchRequest, WatchView
from toque._requests import Deadline, Pauses, Silence
from toque.errors import OwnerAway, TooManyWatchers, UsageError

if TYPE_CHECKING:
    from toque.client import Instance

HELD_S_MIN: Final = 1.0  # an owner that held a page back so long is asked again at once
SUBSCRIBED_MAX: Final = 1_000  # instances of one subscription
EVENTS_AHEAD: Final = 100  # of a subscription: read, and not taken yet

_decode_page = msgspec.msgpack.Decoder(WatchPage).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchEvent:
    """Something that happened to an instance, as it is recorded. Which fields are set depends on the type."""

    workflow: str
    id: str
    cursor: str
    """Pass it to `watch` to go on behind this event; valid as long as the instance is kept."""
    type: str
    """workflow_started, step_completed, … : see docs/watching.md."""
    at: datetime
    """UTC, of the broker's clock."""
    run: int
    """Grows with each restart."""
    kind: str = ""
    """Of the step: do, sleep or event."""
    step: str = ""
    """Its name."""
    count: int = 0
    """Which step of this kind and name, from 1."""
    attempt: int = 0
    value: Any = None
    """Params (workflow_started of the first run), output (workflow_completed, step_completed), report (progress)."""
    error: ErrorView | None = None
    reason: str = ""
    """Why it is held (workflow_blocked)."""
    event_type: str = ""
    """That a wait is for."""
    duration_ms: int = 0
    """Of a sleep, or until a wait times out."""
    retry_delay_ms: int | None = None
    """Until the next attempt (attempt_errored); None = there is none."""


async def watch(handle: Instance[Any], cursor: str | None, filter: Collection[str] | None,
                timeout: Duration | None) -> AsyncGenerator[WatchEvent, None]:
    """See `Instance.watch`."""
    client = handle._client
    timeout_s = None if timeout is None else to_ms(timeout, what="timeout") / 1000
    request = WatchRequest(handle.workflow, handle.id, request=client._request_id(), cursor=cursor or "",
                           types=_types(filter))
    loop = asyncio.get_running_loop()
    pauses = Pauses(client._rng)
    while True:
        asked_at = loop.time()
        page = await _page(handle, request, timeout_s)
        for view in page.events:
            yield _event(handle, view)
        if page.ended:
            return
        request.cursor = page.cursor
        if page.progress is not None:
            request.progress = page.reported
            page.progress.cursor = page.cursor
            yield _event(handle, page.progress)
        if page.events or page.progress is not None:
            pauses = Pauses(client._rng)
        elif loop.time() - asked_at < HELD_S_MIN:  # not held back: a leaving owner, say
            await pauses.wait(Deadline(None))


async def _page(handle: Instance[Any], request: WatchRequest, timeout_s: float | None) -> WatchPage:
    answer = await handle._client._ask(handle, "watch", request, Deadline(timeout_s))
    if isinstance(answer, Silence):
        raise OwnerAway(f"watch of {handle} found no answer: {answer.reason}", handle=handle)
    if answer.code == "busy":
        raise TooManyWatchers(f"{handle} cannot be watched just now: {answer.message}", handle=handle)
    return _decode_page(answer.value)


async def subscribe(handles: Iterable[Instance[Any]], cursors: Mapping[tuple[str, str], str],
                    filter: Collection[str] | None, timeout: Duration | None) -> AsyncGenerator[WatchEvent, None]:
    """See `Client.subscribe`."""
    watched = {(handle.workflow, handle.id): handle for handle in handles}
    if len(watched) > SUBSCRIBED_MAX:
        raise UsageError(f"a subscription takes {SUBSCRIBED_MAX:,} instances at most, not {len(watched):,}")
    events: asyncio.Queue[WatchEvent] = asyncio.Queue(EVENTS_AHEAD)

    async def follow(handle: Instance[Any], cursor: str | None) -> None:
        async with aclosing(watch(handle, cursor, filter, timeout)) as told:
            async for event in told:
                await events.put(event)

    tasks = {asyncio.create_task(follow(handle, cursors.get(key))) for key, handle in watched.items()}
    try:
        async for event in _merged(events, set(tasks)):
            yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _merged(events: asyncio.Queue[WatchEvent], going: set[asyncio.Task[None]]) -> AsyncGenerator[WatchEvent, None]:
    """What the tasks bring, until the last has ended. Raises what ended one otherwise, behind what they brought before."""
    getting = asyncio.create_task(events.get())
    try:
        while going or not events.empty() or getting.done():
            await asyncio.wait({getting, *going}, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                yield getting.result()
                getting = asyncio.create_task(events.get())
                continue
            for task in [task for task in going if task.done()]:
                going.discard(task)
                task.result()
    finally:
        getting.cancel()


def _types(filter: Collection[str] | None) -> list[str]:
    wanted = [filter] if isinstance(filter, str) else list(filter or ())
    unknown = sorted(set(wanted) - set(WATCH_TYPES))
    if unknown:
        raise UsageError(f"there are no events of type {', '.join(unknown)}; the types are {', '.join(WATCH_TYPES)}")
    return wanted


def _event(handle: Instance[Any], view: WatchView) -> WatchEvent:
    type_ = handle.result_type if view.type == "workflow_completed" else Any
    what = f"the value of {view.type} of {handle}"
    value = _payload.decode(bytes(view.value), type_, what=what) if view.value else None
    return WatchEvent(
        workflow=handle.workflow, id=handle.id, cursor=view.cursor, type=view.type,
        at=datetime.fromtimestamp(view.at / 1000, UTC), run=view.run, kind=view.kind, step=view.step, count=view.count,
        attempt=view.attempt, value=value, error=view.error, reason=view.reason, event_type=view.event_type,
        duration_ms=view.duration_ms, retry_delay_ms=view.retry_delay_ms)
