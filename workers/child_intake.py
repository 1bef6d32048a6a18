"""Takes the ends of children for the instances of one station, from the owners of the children's stations.

Answered when the record is accepted, or when the end changes nothing: then the child's owner may forget it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from toque._protocol import Answer, ChildEndRequest
from toque.errors import Unavailable
from toque.storage import records as r
from toque.workers.children import ChildEnd
from toque.workers.engine import Engine
from toque.workers.finder import Finder

if TYPE_CHECKING:
    from toque.workers.station import Station


class ChildIntake:
    """See the module."""

    def __init__(self, station: Station, finder: Finder) -> None:
        self._station = station
        self._finder = finder

    async def take(self, request: ChildEndRequest) -> Answer:
        """Raises Unavailable, BusError: nothing is known of the parent, and nothing was recorded."""
        station = self._station
        if station.frozen and not station.inside:
            raise Unavailable("the station is being handed over")  # with ever new records it could never be released
        found = await self._finder.loaded(request.workflow, request.id)
        if found is None:
            return Answer(station.epoch, "not_found")
        if isinstance(found, r.Status):
            return Answer(station.epoch, "ended")
        given: asyncio.Future[asyncio.Future[None] | None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(self._give, found, child_end(request), given)  # it runs the instance
        accepted = await given
        if accepted is not None:
            await accepted
            station.leave_if_idle(found)
            return Answer(station.epoch)
        while found.unaccepted:
            await station.commits.next_acceptance()  # its end is told when that is accepted
        return Answer(station.epoch, "ended")

    def _give(self, engine: Engine, end: ChildEnd, given: asyncio.Future[asyncio.Future[None] | None]) -> None:
        if given.cancelled():
            return
        if engine.ended:
            given.set_result(None)
        elif engine.closed or engine.blocked:
            given.set_exception(Unavailable("the instance is being read back"))
        else:
            given.set_result(engine.children.end(end))


def child_end(request: ChildEndRequest) -> ChildEnd:
    """Raises KeyError for a status that is none."""
    error = request.error
    failure = r.Failure(error.type, error.message, error.traceback) if error is not None else None
    return ChildEnd(request.run, request.step, request.occurrence, request.nonce, request.child_run,
                    r.Status.of(request.status), request.output, failure)
