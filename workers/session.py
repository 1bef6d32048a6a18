"""A pod's session: one key in the control bucket, renewed by compare-and-set with a TTL (protocol rules 7 and 8).

What a pod holds dies with its session. `Session` is what the pod's loop and the keeper share; `SessionKeeper` renews it,
on a loop and a connection of its own, so that a blocked pod loop is noticed and not hidden.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from toque import _subjects as subjects
from toque._logging import get_logger
from toque._protocol import SessionRecord
from toque.storage.ports import Bus, BusError, BusTimeout, Clock, Headers, Message, NoResponders
from toque.workers.news import within

RENEWALS_PER_TTL = 5
MARGIN_OF_TTL = 0.2  # the deadline lies so much of the TTL before the expiry
EXIT_BEFORE_S = 0.02
ENDED_TTL_S = 3600.0
RETRY_S = 0.1
LOCK_FILE = "lock"
SESSION_FILE = "session"

_log = get_logger("toque.session")
_decoder = msgspec.json.Decoder(SessionRecord)


def ttl_header(seconds: float) -> str:
    """The server cuts a TTL to whole seconds, so a part of one is rounded up: the key must not expire before we think."""
    return f"{math.ceil(seconds)}s"


def decode_session(message: Message) -> SessionRecord | None:
    """The record of a session key; None for an expiry marker."""
    if message.header(subjects.MARKER_HEADER) or not message.data:
        return None
    return _decoder.decode(message.data)


class Session:
    """The state of one session. Attributes are single stores, so both threads may read them."""

    def __init__(self, clock: Clock, record: SessionRecord) -> None:
        self._clock = clock
        self.record = record
        self.roundtrip_at = clock.boottime()  # when the pod's loop last completed a JetStream round trip
        self.deadline = float("-inf")  # nothing is entered, committed, granted or answered from here on
        self.expires_at = float("inf")  # the process exits here if anything still runs
        self.lost = False
        self.quiet = False  # it was lost, and every callback that was entered under it has left

    @property
    def id(self) -> str:
        return self.record.session

    @property
    def ttl_s(self) -> float:
        return self.record.ttl_s

    def in_time(self) -> bool:
        """Whether the session surely lives. Read directly before every act that needs it."""
        return not self.lost and self._clock.boottime() < self.deadline

    @property
    def exit_in_s(self) -> float:
        """When the process has to exit if anything still runs: just before others can see that the key has expired."""
        return self.expires_at - EXIT_BEFORE_S - self._clock.boottime()

    def renewed(self, sent_at: float) -> None:
        self.deadline = sent_at + self.ttl_s * (1 - MARGIN_OF_TTL)
        self.expires_at = sent_at + self.ttl_s


class SessionKeeper:
    """Opens, renews and ends one session. `on_lost` is called once, when it is over without `leave`."""

    def __init__(self, bus: Bus, account: str, clock: Clock, session: Session, *,
                 on_lost: Callable[[str], None]) -> None:
        self._bus = bus
        self._clock = clock
        self._session = session
        self._subject = subjects.control_session(account, session.id)
        self._stream = subjects.control_stream(account)
        self._on_lost = on_lost
        self._sequence = 0
        self._news = asyncio.Event()
        self._left = False
        self.leaving: asyncio.Task[None] | None = None  # the last write, once `leave` was called

    async def open(self) -> None:
        """Write the key. Raises BusTimeout and BusError; after an unknown outcome call it again."""
        message = await self._bus.last_message(self._stream, self._subject)
        self._sequence = message.sequence if message else 0
        sent = self._clock.boottime()
        ack = await self._bus.publish(self._subject, self._body(), self._headers(self._session.ttl_s))
        self._sequence = ack.sequence
        self._session.renewed(sent)

    async def run(self) -> None:
        """Renew until the session is lost or left."""
        interval = self._session.ttl_s / RENEWALS_PER_TTL
        while not self._left:
            await within(self._news.wait(), max(0.0, min(interval, self._session.deadline - self._clock.boottime())))
            self._news.clear()
            if self._left or self._session.lost:
                return
            if self._clock.boottime() - self._session.roundtrip_at < self._session.ttl_s / 2:
                await self._renew()
            if self._clock.boottime() >= self._session.deadline:
                self._lose("it was not renewed in time")
                return

    def announce(self, record: SessionRecord) -> None:
        """Change what the key says, soon. Call it in the keeper's loop."""
        self._session.record = record
        self._news.set()

    async def leave(self) -> None:
        """End the session as the pod's last act."""
        self._left = True
        self._session.lost = True
        self.leaving = asyncio.current_task()
        self._news.set()
        record = msgspec.structs.replace(self._session.record, ended="left", ended_by=self._session.id, stations=[])
        for _ in range(RENEWALS_PER_TTL):
            try:
                await self._bus.publish(self._subject, msgspec.json.encode(record), self._headers(ENDED_TTL_S))
                return
            except BusError as error:
                if error.code != BusError.WRONG_LAST_SEQUENCE or not await self._read_back():
                    return
            except (BusTimeout, NoResponders):
                await asyncio.sleep(RETRY_S)

    async def _renew(self) -> None:
        sent = self._clock.boottime()
        timeout = self._session.ttl_s / RENEWALS_PER_TTL
        try:
            ack = await self._bus.publish(self._subject, self._body(), self._headers(self._session.ttl_s),
                                          timeout_s=timeout)
        except BusError as error:
            if error.code == BusError.WRONG_LAST_SEQUENCE and not await self._read_back():
                self._lose("its key was taken away: it had expired, or somebody ended it")
        except (BusTimeout, NoResponders):
            await asyncio.sleep(RETRY_S)
            self._news.set()
        else:
            self._sequence = ack.sequence
            self._session.renewed(sent)

    async def _read_back(self) -> bool:
        """After a refused CAS: whether the leader's last message of the key is still ours (an answer was lost)."""
        try:
            message = await self._bus.last_message(self._stream, self._subject)
        except (BusTimeout, BusError, NoResponders):
            self._news.set()
            return True  # unknown: the next renewal asks again, and the deadline guards what is done meanwhile
        record = decode_session(message) if message else None
        if message is None or record is None or record.ended:
            return False
        self._sequence = message.sequence
        self._news.set()
        return True

    def _lose(self, why: str) -> None:
        if not self._session.lost:
            self._session.lost = True
            _log.warning("session lost", session=self._session.id, why=why)
            self._on_lost(why)

    def _body(self) -> bytes:
        return msgspec.json.encode(self._session.record)

    def _headers(self, ttl_s: float) -> Headers:
        return {subjects.TTL_HEADER: ttl_header(ttl_s), subjects.EXPECTED_LAST_HEADER: str(self._sequence)}


async def end_session(bus: Bus, account: str, session: str, *, reason: str, by: str,
                      over_live: bool = False) -> SessionRecord | None:
    """End a session by one compare-and-set on its key (protocol rule 8).

    Only over its expiry marker, or, with `over_live`, over the living key: that is for whoever holds the pod
    directory's lock and so knows that the process is dead. Returns the ended record, ours or an earlier one; None when
    the session lives. Raises BusTimeout.
    """
    subject = subjects.control_session(account, session)
    while True:
        message = await bus.last_message(subjects.control_stream(account), subject)
        record = decode_session(message) if message else None
        if record is not None and record.ended:
            return record
        if record is not None and not over_live:
            return None
        base = record or SessionRecord(pod="", session=session)
        ended = msgspec.structs.replace(base, ended=reason, ended_by=by, stations=[])
        headers = {subjects.TTL_HEADER: ttl_header(ENDED_TTL_S),
                   subjects.EXPECTED_LAST_HEADER: str(message.sequence if message else 0)}
        try:
            await bus.publish(subject, msgspec.json.encode(ended), headers)
        except BusError as error:
            if error.code != BusError.WRONG_LAST_SEQUENCE:
                raise
        else:
            return ended


class DirectoryLock:
    """The exclusive lock on a pod's directory: whoever has it knows that no process of that pod lives.

    The kernel drops it with the process, however that ends.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._file = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def acquire(self) -> bool:
        """False when a living process has it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        os.close(self._file)

    def last_session(self) -> str:
        """The session that the directory's last process opened; "" without one."""
        path = self._directory / SESSION_FILE
        return path.read_text().strip() if path.exists() else ""

    def remember_session(self, session: str) -> None:
        """Write down the session before it is opened."""
        temporary = self._directory / f"{SESSION_FILE}.new"
        temporary.write_text(session)
        temporary.replace(self._directory / SESSION_FILE)


async def end_dead_session(bus: Bus, account: str, directory: Path, *, by: str = "supervisor") -> str:
    """End the session of a pod whose process is dead, at once instead of after its TTL.

    Returns the session's id, or "" when there was none or another process has the directory already.
    """
    lock = DirectoryLock(directory)
    try:
        if not lock.acquire():
            return ""
        session = lock.last_session()
        if session:
            await end_session(bus, account, session, reason="dead", by=by, over_live=True)
        return session
    finally:
        lock.release()
