"""The journal: compare-and-append of groups, the ownership record at its tail, and reading a station back.

Claim, commit and release are one operation here (protocol rules 1 and 2). An append has three ends: accepted at a
sequence, `Deposed` by a higher epoch, or `JournalHalted` when the tail is nothing that may follow from our own chain.
Anything else (time-outs, refusals, a write-dead stream) is answered by sending the very same bytes again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import NamedTuple

import msgspec

from toque import _subjects as subjects
from toque._logging import get_logger
from toque._subjects import StationId
from toque.errors import ToqueError
from toque.storage.ports import Bus, BusError, BusTimeout, FeedSpec, Message, NoResponders
from toque.storage.records import Claim, Group, GroupHeader, Position, Released, Snapshot, crc_of, decode_records

RESEND_AFTER_S = (0.05, 0.1, 0.2, 0.5, 1.0)
APPEND_TIMEOUT_S = 2.0
READ_AHEAD = 256

_log = get_logger("toque.journal")


class Deposed(ToqueError):
    """Another owner has a higher epoch: whatever this one has not committed is lost, and nothing of it has left."""


class JournalHalted(ToqueError):
    """The journal holds something that cannot follow from what we know. Nobody may go on without an operator."""


class JournalGap(JournalHalted):
    """Groups are missing between what was read and what comes next: they were trimmed, or lost."""


class JournalBehind(JournalHalted):
    """The journal ends before a group that was accepted once: the broker lost it (protocol rule 27)."""

    def __init__(self, station: StationId, tail: Tail | None, known: Position) -> None:
        end = tail.position.header.group if tail else 0
        self.station = station
        self.first, self.last = end + 1, known.header.group
        lost = (f"groups {self.first} to {self.last} ({self.last - end}) are missing" if self.last > end else
                f"its group {end} stands at sequence {tail.position.sequence if tail else 0}, below one that was used")
        super().__init__(
            f"station {station}: the journal ends at group {end}, and this pod's store holds its groups up to "
            f"{self.last} (epoch {known.header.epoch}, sequence {known.sequence}): {lost}. Was the broker restored from "
            f"an older disk? Give it the newer one back. To go on without what is missing, stop the pods and delete "
            f"their --data directories")


class Abandoned(ToqueError):
    """The owner's session came to its deadline while an append was open: its outcome stays unknown."""


class Tail(NamedTuple):
    """A station's last journal message, which is its ownership record."""

    position: Position
    claimed_by: str  # pod of a claim that is itself the tail, else ""
    released: Released | None  # set when the owner released the station


class Journal:
    """The journal stream of one account, over one bus."""

    def __init__(self, bus: Bus, account: str) -> None:
        self._bus = bus
        self._account = account
        self._stream = subjects.journal_stream(account)
        self._behind: dict[StationId, JournalBehind] = {}
        self._troubles: dict[StationId, str] = {}  # by station with an append under way that does not get through

    @property
    def trouble(self) -> str:
        """Why appends do not get through; "" = they do."""
        return next(iter(self._troubles.values()), "")

    async def tail(self, station: StationId) -> Tail | None:
        """The station's ownership record, read from the stream's leader. None = nobody ever had it."""
        message = await self._bus.last_message(self._stream, subjects.journal(self._account, station))
        if message is None:
            return None
        records = decode_group(message)
        first = records[0] if records else None
        return Tail(
            Position(message.sequence, header_of(message)),
            first.pod if isinstance(first, Claim) else "",
            first if isinstance(first, Released) else None,
        )

    async def holds(self, position: Position) -> bool:
        """Whether the journal still has this very group at this sequence."""
        message = await self._bus.message_at(self._stream, position.sequence)
        return message is not None and message.header(subjects.GROUP_HEADER) == position.header.text()

    async def check_reaches(self, station: StationId, known: Position | None, tail: Tail | None) -> None:
        """Whether the journal still ends at or behind a group known as accepted (protocol rule 27).

        Raises JournalBehind; from then on until it holds that very group again, for others who do not know of it may go
        on over the loss.
        """
        if known is None:
            return
        if tail is None or tail.position.sequence < known.sequence \
                or tail.position.header.group < known.header.group:
            self._behind[station] = JournalBehind(station, tail, known)
        elif station in self._behind and await self.holds(known):
            del self._behind[station]
        if station in self._behind:
            raise self._behind[station]

    async def trimmed(self, position: Position) -> bool:
        """Whether the journal's front lies behind this place."""
        info = await self._bus.stream_info(self._stream)
        return position.sequence < info.first_sequence

    async def counting(self, station: StationId, name: str, *, after: int, until: int) -> Snapshot | None:
        """The record by which the snapshot `name` counts, looked for behind the sequence `after`."""
        epoch = 0
        async with aclosing(self._messages(station, after, until)) as messages:
            async for message in messages:
                if header_of(message).epoch < epoch:
                    continue
                epoch = header_of(message).epoch
                for record in decode_group(message):
                    if isinstance(record, Snapshot) and record.name == name:
                        return record
        return None

    async def append(self, station: StationId, header: GroupHeader, body: bytes, *, expected: int,
                     may_send: Callable[[], bool]) -> int:
        """Append one group behind the `expected` sequence. Returns its sequence once it is accepted.

        Raises Deposed, JournalHalted, Abandoned. Killed at any point: the group is in the journal or it is not, and
        the next owner's claim decides which.
        """
        try:
            return await self._append(station, header, body, expected, may_send)
        finally:  # an append that has ended, however, says nothing about the next one
            self._set_trouble(station, "")

    async def _append(self, station: StationId, header: GroupHeader, body: bytes, expected: int,
                      may_send: Callable[[], bool]) -> int:
        subject = subjects.journal(self._account, station)
        headers = {subjects.GROUP_HEADER: header.text(), subjects.EXPECTED_LAST_HEADER: str(expected)}
        tries = 0
        while True:
            if not may_send():
                raise Abandoned(f"station {station}: the session's deadline has passed")
            try:
                ack = await self._bus.publish(subject, body, headers, timeout_s=APPEND_TIMEOUT_S)
            except BusError as error:
                if error.code == BusError.WRONG_LAST_SEQUENCE:
                    return await self._resolve(station, header, may_send)
                self._set_trouble(station, f"the server refuses journal writes: {error}")
            except BusTimeout:
                self._set_trouble(station, "the server does not answer journal writes")
            except NoResponders:
                self._set_trouble(station, f"there is no stream {self._stream}")
            else:
                return ack.sequence
            await asyncio.sleep(RESEND_AFTER_S[min(tries, len(RESEND_AFTER_S) - 1)])
            tries += 1

    async def _resolve(self, station: StationId, header: GroupHeader, may_send: Callable[[], bool]) -> int:
        """After 10071: the leader's last message says whether the group is in, or who else is."""
        while True:
            if not may_send():
                raise Abandoned(f"station {station}: the session's deadline has passed")
            try:
                tail = await self.tail(station)
                break
            except (BusTimeout, BusError, NoResponders):
                await asyncio.sleep(RESEND_AFTER_S[0])
        if tail is not None and tail.position.header == header:
            return tail.position.sequence
        if tail is not None and tail.position.header.epoch >= header.epoch \
                and tail.position.header.session != header.session:
            raise Deposed(f"station {station}: epoch {tail.position.header.epoch} of session "
                          f"{tail.position.header.session} stands above epoch {header.epoch}")
        found = tail.position.header.text() if tail else "nothing"
        raise JournalHalted(f"station {station}: group {header.text()!r} was refused, and the journal's tail is "
                            f"{found!r}, which does not follow from it")

    async def read(self, station: StationId, *, after: Position | None, until: int) -> AsyncGenerator[Group, None]:
        """The accepted groups behind `after`, up to and with the sequence `until`, in order.

        Groups of an epoch below one already seen are ignored (protocol rule 1). Raises JournalGap at a gap in the group
        numbers, JournalHalted for a damaged group.
        """
        chain = after
        async with aclosing(self._messages(station, after.sequence if after else 0, until)) as messages:
            async for message in messages:
                group = _next_group(station, chain, message)
                if group is not None:
                    chain = group.position
                    yield group

    async def _messages(self, station: StationId, after: int, until: int) -> AsyncGenerator[Message, None]:
        """The station's messages behind the sequence `after`, up to and with `until`."""
        if after >= until:
            return
        arrived: asyncio.Queue[Sequence[Message]] = asyncio.Queue()
        done = after
        feed = await self._bus.open_feed(
            FeedSpec(stream=self._stream, filters=(subjects.journal(self._account, station),),
                     start_sequence=done + 1, name=f"restore-{station.generation}-{station.number}"),
            arrived.put_nowait,
        )
        try:
            feed.want(READ_AHEAD)
            while done < until:
                messages = await arrived.get()
                feed.want(len(messages))
                for message in messages:
                    if done < message.sequence <= until:
                        done = message.sequence
                        yield message
        finally:
            await feed.close()

    def _set_trouble(self, station: StationId, trouble: str) -> None:
        before = self.trouble
        if trouble:
            self._troubles[station] = trouble
        else:
            self._troubles.pop(station, None)
        if trouble and not before:
            _log.error("journal write-dead", why=trouble,
                       remedy="free disk space and restart nats-server; nothing acknowledged is lost meanwhile")
        elif before and not self.trouble:
            _log.info("journal takes writes again")


def header_of(message: Message) -> GroupHeader:
    try:
        return GroupHeader.parse(message.header(subjects.GROUP_HEADER))
    except ValueError:
        raise JournalHalted(f"journal message {message.sequence} has no {subjects.GROUP_HEADER} header: somebody else "
                            f"wrote to {message.subject}") from None


def decode_group(message: Message) -> list[object]:
    """The message's records, its CRC checked."""
    header = header_of(message)
    if crc_of(message.data) != header.crc:
        raise JournalHalted(f"journal message {message.sequence} fails its CRC: the broker's disk is damaged")
    try:
        return list(decode_records(message.data))
    except msgspec.MsgspecError as error:
        raise JournalHalted(f"journal message {message.sequence} holds records of another format: {error}") from error


def _next_group(station: StationId, chain: Position | None, message: Message) -> Group | None:
    header = header_of(message)
    if chain is not None and header.epoch < chain.header.epoch:
        return None
    if header.group != (chain.header.group + 1 if chain else 1):
        raise JournalGap(f"station {station}: group {header.group} at sequence {message.sequence} follows group "
                         f"{chain.header.group if chain else 0}")
    records = decode_group(message)
    return Group(station, Position(message.sequence, header), records)  # type: ignore[arg-type]  # decoded as such
