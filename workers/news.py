"""Waiting for news or for a period to pass, whichever comes first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any


async def within(awaitable: Awaitable[Any], seconds: float) -> bool:
    """Wait at most so long. True when it came, False when the time was over (what was awaited is cancelled then)."""
    try:
        async with asyncio.timeout(seconds):  # not wait_for: before Python 3.12 that may swallow a cancellation
            await awaitable
    except TimeoutError:
        return False
    return True
