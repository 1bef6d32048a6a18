"""Reads the account's event stream for all stations of a pod (see `stream_reader`)."""

from __future__ import annotations

from toque import _subjects as subjects
from toque._subjects import StationId
from toque.storage.fold import EVENTS_KEY
from toque.storage.ports import Bus, Message
from toque.workers.event_inbox import Arrived, EventInbox
from toque.workers.stream_reader import StreamReader

WINDOW = 2_000  # events that a pod holds which are neither recorded nor parked


class EventReader(StreamReader[EventInbox]):
    """The event stream at one pod."""

    def __init__(self, bus: Bus, account: str, *, session: str) -> None:
        super().__init__(bus, account, EVENTS_KEY, subjects.event_stream(account), session=session)
        self._untransformed: StationId | None = None  # who parks what the server's transform passes over

    def _own(self, station: StationId) -> str:
        return subjects.events_of(self._account, station)

    def _filters(self) -> tuple[str, ...]:
        """With station 0 also events whose subject has a wildcard in it: the server stores those as they came."""
        filters = [self._own(station) for station in sorted(self._inboxes)]
        self._untransformed = max((station for station in self._inboxes if station.number == 0), default=None)
        if self._untransformed is not None:
            filters.append(subjects.event(self._account, "*", "*", ">"))
        return tuple(filters)

    def _target(self) -> int:
        return WINDOW

    def _waiting(self) -> int:
        return sum(inbox.waiting for inbox in self._inboxes.values())

    def _offer(self, message: Message) -> None:
        token = self._token(message.subject)
        inbox = self._inboxes.get(token.station) if token is not None else None
        if token is not None and inbox is not None:
            inbox.offer(Arrived(token.workflow, token.instance_id, token.type, message, self.created))

    def _token(self, subject: str) -> subjects.EventToken | None:
        if not subject.startswith(subjects.event(self._account, "", "", "").rstrip(".") + "."):
            return subjects.parse_event(subject)
        if self._untransformed is None:
            return None
        workflow, instance_id, type_ = subject.split(".", 5)[3:]
        return subjects.EventToken(self._untransformed, workflow, instance_id, type_)
