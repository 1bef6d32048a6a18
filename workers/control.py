"""Follows the account's control bucket: its record, its layout, and every session with the time of its last renewal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from toque import _subjects as subjects
from toque._protocol import AccountRecord, Layout, SessionRecord
from toque.storage.ports import Bus, Clock, Feed, FeedSpec, Message
from toque.workers.session import decode_session

CREDIT = 1000


@dataclass(slots=True)
class SeenSession:
    """A session as its key last showed it. `record` is None after its expiry, until somebody ends it."""

    session: str
    record: SessionRecord | None
    seen_at: float  # by the pod's own clock: when the last renewal was seen
    ttl_s: float = 0.0  # of the last renewal seen; an expiry marker has none to tell. 0: none was seen

    @property
    def live(self) -> bool:
        return self.record is not None and not self.record.ended

    @property
    def expired(self) -> bool:
        return self.record is None


class ControlWatch:
    """The control bucket, as far as it has been delivered. `on_change` hears the subject's last tokens."""

    def __init__(self, bus: Bus, account: str, clock: Clock, record: AccountRecord, layout: Layout) -> None:
        self._bus = bus
        self._clock = clock
        self._prefix = f"toque.{account}.control."
        self._stream = subjects.control_stream(account)
        self.account = record
        self.layout = layout
        self.sessions: dict[str, SeenSession] = {}
        self.opened_at = clock.boottime()
        self._listeners: list[Callable[[str], None]] = []
        self._feed: Feed | None = None

    def on_change(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with "account", "layout" or "session.<id>" after each change."""
        self._listeners.append(listener)

    async def open(self) -> None:
        spec = FeedSpec(stream=self._stream, filters=(f"{self._prefix}>",), last_per_subject=True, name="control")
        self._feed = await self._bus.open_feed(spec, self._arrived)
        self._feed.want(CREDIT)

    async def close(self) -> None:
        if self._feed is not None:
            await self._feed.close()

    def live_sessions(self) -> list[SessionRecord]:
        return [seen.record for seen in self.sessions.values() if seen.live and seen.record is not None]

    def _arrived(self, messages: Sequence[Message]) -> None:
        if self._feed is not None:
            self._feed.want(len(messages))
        for message in messages:
            what = message.subject.removeprefix(self._prefix)
            if what == "account" and message.data:
                self.account = msgspec.json.decode(message.data, type=AccountRecord)
            elif what == "layout" and message.data:
                self.layout = msgspec.json.decode(message.data, type=Layout)
            elif what.startswith("session."):
                self._see(what.removeprefix("session."), message)
            for listener in self._listeners:
                listener(what)

    def _see(self, session: str, message: Message) -> None:
        record = decode_session(message)
        seen = self.sessions.get(session)
        if record is None and seen is not None and seen.record is not None and seen.record.ended:
            del self.sessions[session]  # it was over long ago, and now its key is gone too
            return
        if seen is None:
            seen = self.sessions[session] = SeenSession(session, record, self._clock.boottime())
        seen.record = record
        if record is not None and not record.ended:
            seen.seen_at = self._clock.boottime()
            seen.ttl_s = record.ttl_s
