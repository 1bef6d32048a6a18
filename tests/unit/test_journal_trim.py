"""Who may trim the journal, up to where, and who holds it back."""

from __future__ import annotations

import random

import msgspec
import pytest

from toque import _subjects as subjects
from toque._accounts import ensure_account
from toque._subjects import StationId
from toque.sim import loop as sim
from toque.storage import records as r
from toque.storage.journal import Journal
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.storage.ports import Message
from toque.workers.journal_trim import JournalTrim, Kept, Told

FIRST, SECOND = StationId(1, 0), StationId(1, 1)
STREAM = subjects.journal_stream("main")


class Setting:
    """A journal of 20 messages, of two stations in turn: odd sequences are FIRST's."""

    def __init__(self, *, owns_first=True):
        self.broker = MemoryBroker(random.Random(1))
        self.bus = MemoryBus(self.broker, "test")
        self.trim = JournalTrim(self.bus, Journal(self.bus, "main"), "main", owns_first=lambda: owns_first,
                                held_back_bytes_min=1_000)
        self.headers = {}

    async def open(self):
        await ensure_account(self.bus, "main")
        for number in range(1, 21):
            header = r.GroupHeader(1, "a-1", (number + 1) // 2, 7)
            ack = await self.bus.publish(subjects.journal("main", FIRST if number % 2 else SECOND), bytes(200),
                                         {subjects.GROUP_HEADER: header.text()})
            self.headers[ack.sequence] = r.Position(ack.sequence, header)
        return self

    def tell(self, station, covered, witness, *, kept_bytes=10, snapshot_bytes=10):
        kept = Kept(covered, witness if isinstance(witness, r.Position) else self.headers[witness], kept_bytes,
                    snapshot_bytes)
        self.trim.heard(Message("s", msgspec.msgpack.encode(Told({str(station): kept}))))

    async def tick(self):
        await self.trim.tick({}, [FIRST, SECOND], await self.info())
        return self.broker._streams[STREAM].first_sequence

    async def info(self):
        return await self.bus.stream_info(STREAM)


@pytest.mark.parametrize(("told", "first"), [
    ({}, 1), ({FIRST: (10, 15)}, 1), ({FIRST: (10, 15), SECOND: (6, 18)}, 7), ({FIRST: (0, 15), SECOND: (6, 18)}, 1)])
def test_the_front_is_cut_up_to_the_lowest_of_all_stations(told, first):
    """One that has told nothing, or needs everything, holds everything."""

    async def main():
        setting = await Setting().open()
        for station, (covered, witness) in told.items():
            setting.tell(station, covered, witness)

        assert await setting.tick() == first

    sim.run(main(), seed=1)


def test_only_the_owner_of_station_0_trims():
    """The others only tell."""

    async def main():
        setting = await Setting(owns_first=False).open()
        setting.tell(FIRST, 10, 15)
        setting.tell(SECOND, 10, 18)

        assert await setting.tick() == 1

    sim.run(main(), seed=1)


def test_what_was_told_never_shrinks():
    """A pod that was deposed tells of older snapshots: they are true, and superseded."""

    async def main():
        setting = await Setting().open()
        setting.tell(FIRST, 10, 15)
        setting.tell(FIRST, 2, 5)
        setting.tell(SECOND, 10, 18)

        assert await setting.tick() == 11

    sim.run(main(), seed=1)


@pytest.mark.parametrize("witness", [
    9, r.Position(15, r.GroupHeader(1, "a-1", 9, 7)), r.Position(99, r.GroupHeader(2, "b", 50, 7))])
def test_nothing_is_trimmed_on_the_word_of_what_the_journal_does_not_hold(witness):
    """Rule 27: the broker lost what was told of, or the witness itself would be cut: a station's last message stays."""

    async def main():
        setting = await Setting().open()
        setting.tell(FIRST, 10, witness)
        setting.tell(SECOND, 10, 18)

        assert await setting.tick() == 1

    sim.run(main(), seed=1)


def test_a_message_of_a_newer_version_is_passed_over():
    """Its stations hold everything."""

    async def main():
        setting = await Setting().open()
        setting.trim.heard(Message("s", b"\xc1"))

        assert await setting.tick() == 1

    sim.run(main(), seed=1)


def test_only_the_lowest_station_holds_the_journal_back_and_only_when_it_is_much():
    """More than the least, than what is needed, and than what all snapshots take; every station must be known."""

    async def main():
        setting = await Setting().open()
        both, info = [FIRST, SECOND], await setting.info()
        setting.tell(FIRST, 2, 15)
        assert not setting.trim.holds_back(FIRST, both, info)
        setting.tell(SECOND, 12, 18)
        assert setting.trim.holds_back(FIRST, both, info)
        assert not setting.trim.holds_back(SECOND, both, info)
        setting.tell(SECOND, 12, 18, snapshot_bytes=10**6)
        assert not setting.trim.holds_back(FIRST, both, info)
        setting.tell(SECOND, 12, 18, kept_bytes=info.stored_bytes - 999)
        assert not setting.trim.holds_back(FIRST, both, info)

    sim.run(main(), seed=1)
