"""Doing one thing to many items, so many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


async def for_each(act: Callable[[T], Awaitable[None]], items: Iterator[T], width: int) -> None:
    """Call `act` for each item, `width` at a time. Items are taken one by one, as they are needed.

    The first exception cancels the other calls and is raised.
    """

    async def work(first: T) -> None:
        await act(first)
        for item in items:
            await act(item)

    try:
        async with asyncio.TaskGroup() as group:
            for first in list(islice(items, width)):
                group.create_task(work(first))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
