"""Sets messages aside that cannot become an instance, or an event of one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from toque import _subjects as subjects
from toque._logging import get_logger
from toque.storage import records as r
from toque.storage.ports import BusError, BusTimeout, Message, NoResponders
from toque.workers.parking import parked

if TYPE_CHECKING:
    from toque.workers.station import Station

DEAD_RETRY_S = 0.5

_log = get_logger("toque.station")


async def set_aside(station: Station, record: r.Parked | r.EventParked, message: Message, *, kind: str,
                    workflow: str) -> None:
    """Park a message: published first, then recorded; killed between, it is parked again."""
    bus = station.context.bus
    data, headers = parked(message, record.reason, bus.max_payload)
    while True:
        try:
            await bus.publish(subjects.dead(station.account, kind, workflow), data, headers)
            break
        except (BusTimeout, BusError, NoResponders) as error:
            _log.warning("a message could not be parked yet", subject=message.subject, error=str(error))
            await asyncio.sleep(DEAD_RETRY_S)
    _log.warning("message parked", subject=message.subject, reason=record.reason)
    await station.commits.commit(record)
