"""Publishes the creations of children, so many at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from toque import _subjects as subjects
from toque._creation import Creator
from toque._requests import Deadline, StationAsker
from toque.workers.host import ChildCreation

if TYPE_CHECKING:
    from toque.workers.context import PodContext

IN_FLIGHT_MAX = 64
PUBLISH_S_MAX = 20.0


class ChildCreations:
    """Of one station."""

    def __init__(self, context: PodContext) -> None:
        asker = StationAsker(context.bus, context.account, context.rng)
        self._creator = Creator(context.bus, context.account, asker, context.rng, context.broker_time.now_ms)
        self._room = asyncio.Semaphore(IN_FLIGHT_MAX)

    async def create(self, creation: ChildCreation) -> None:
        """See `Host.create_child`. An earlier attempt may have landed, of an owner before, too: nonces decide."""
        headers = {subjects.CONTENT_TYPE_HEADER: "application/msgpack", subjects.NONCE_HEADER: creation.nonce,
                   subjects.PARENT_HEADER: creation.parent}
        made = self._creator.make(creation.workflow, creation.params, creation.params_type, creation.id, headers,
                                  creation.retention)._replace(chosen=creation.chosen)
        async with self._room:
            await self._creator.publish(made, Deadline(PUBLISH_S_MAX), unsure=True)
