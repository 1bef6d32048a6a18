"""Reads one workflow's queue for all stations of a pod; its SousChefs admit what comes (see `stream_reader`)."""

from __future__ import annotations

from toque import _subjects as subjects
from toque._subjects import StationId
from toque.storage.ports import Bus, Message
from toque.workers.slots import Slots
from toque.workers.souschef import SousChef
from toque.workers.stream_reader import RETRY_S, StreamReader

__all__ = ["RETRY_S", "QueueReader"]


class QueueReader(StreamReader[SousChef]):
    """One workflow's queue at one pod."""

    def __init__(self, bus: Bus, account: str, workflow: str, slots: Slots, *, session: str) -> None:
        super().__init__(bus, account, workflow, subjects.queue_stream(account, workflow), session=session)
        self._slots = slots
        self._untransformed: StationId | None = None  # who parks what the server's transform passes over

    def _own(self, station: StationId) -> str:
        return f"{subjects.queue_prefix(self._account, self.workflow, station)}.*"

    def _filters(self) -> tuple[str, ...]:
        """The subjects of our stations; with station 0 also creations whose id is a wildcard, `*` or `>`.

        The server acknowledges those too, but stores them as they came: no transform, so no station. Unread, they would
        vanish with the next purge.
        """
        filters = [self._own(station) for station in sorted(self._inboxes)]
        self._untransformed = max((station for station in self._inboxes if station.number == 0), default=None)
        if self._untransformed is not None:
            filters.append(subjects.create(self._account, self.workflow, ">"))
        return tuple(filters)

    def _addressee(self, subject: str) -> tuple[StationId | None, str]:
        """The station of a message, and the id in its subject."""
        as_it_came = subjects.create(self._account, self.workflow, "")
        if subject.startswith(as_it_came):
            return self._untransformed, subject.removeprefix(as_it_came)
        token = subjects.parse_queue(subject)
        return token.station, token.instance_id

    def _target(self) -> int:
        """As many as there are slots for, and a bounded prefetch."""
        return self._slots.free + self._slots.prefetch

    def _waiting(self) -> int:
        return sum(souschef.waiting for souschef in self._inboxes.values())

    def _offer(self, message: Message) -> None:
        station, instance_id = self._addressee(message.subject)
        souschef = self._inboxes.get(station) if station is not None else None
        if souschef is not None:
            souschef.offer(instance_id, message)

    def _all_offered(self) -> None:
        self._slots.kick()
