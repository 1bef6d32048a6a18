"""Waiting for news: for a period at most, or on a subject."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from toque.storage.ports import Bus, BusError, BusTimeout, Message, NoResponders, Subscription

LISTEN_AGAIN_S = 0.1


async def within(awaitable: Awaitable[Any], seconds: float) -> bool:
    """Wait at most so long. True when it came, False when the time was over (what was awaited is cancelled then)."""
    try:
        async with asyncio.timeout(seconds):  # not wait_for: before Python 3.12 that may swallow a cancellation
            await awaitable
    except TimeoutError:
        return False
    return True


async def listen(bus: Bus, subject: str, handler: Callable[[Message], None]) -> Subscription:
    """Subscribe as soon as there is a connection: a pod must not end because it was cut off at that moment."""
    while True:
        try:
            return await bus.subscribe(subject, handler)
        except (BusTimeout, BusError, NoResponders):
            await asyncio.sleep(LISTEN_AGAIN_S)
