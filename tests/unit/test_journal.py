"""The journal: compare-and-append with its three ends, and reading back what was accepted (protocol rules 1, 2, 26)."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

import pytest

from toque import _subjects as subjects
from toque._accounts import ensure_account
from toque._protocol import AccountRecord
from toque._subjects import StationId
from toque.sim.loop import run
from toque.storage import records as r
from toque.storage.journal import APPEND_TIMEOUT_S, Abandoned, Deposed, Journal, JournalBehind, JournalHalted
from toque.storage.memory_broker import DELAY, DROP_BEFORE, LOSE_ANSWER
from toque.storage.memory_bus import MemoryBroker, MemoryBus

STATION = StationId(1, 0)
SUBJECT = subjects.journal("main", STATION)
BODY = r.join_records([r.encode_record(r.Waiting(1, 1, 2, 9))])


class SpyBus(MemoryBus):
    """Notes what is published."""

    def __init__(self, broker):
        super().__init__(broker)
        self.sent = []

    async def publish(self, subject, data, headers=None, *, timeout_s=5.0):
        self.sent.append((subject, data, dict(headers or {})))
        return await super().publish(subject, data, headers, timeout_s=timeout_s)


class Bench:
    """An account's journal on a broker, with one connection that notes what it sends."""

    def __init__(self):
        self.broker = MemoryBroker(random.Random(1))
        self.bus = SpyBus(self.broker)
        self.journal = Journal(self.bus, "main")
        self.may_send = True

    async def opened(self):
        await ensure_account(self.bus, "main", defaults=AccountRecord(name="main"))
        self.bus.sent.clear()
        return self

    async def append(self, group, *, epoch=1, session="a-1", expected=0, body=BODY):
        header = r.GroupHeader(epoch, session, group, r.crc_of(body))
        return await self.journal.append(STATION, header, body, expected=expected, may_send=lambda: self.may_send)

    async def put(self, group, *, epoch=1, session="x-1", body=BODY, header=None):
        """Write past the journal's compare-and-append, as another process would."""
        text = header if header is not None else r.GroupHeader(epoch, session, group, r.crc_of(body)).text()
        ack = await MemoryBus(self.broker).publish(SUBJECT, body, {subjects.GROUP_HEADER: text})
        return ack.sequence

    async def read(self, *, after=None, until=1_000):
        stored = self.stored
        last = min(until, stored[-1].sequence if stored else 0)
        return [group async for group in self.journal.read(STATION, after=after, until=last)]

    @property
    def stored(self):
        return self.broker.stored(subjects.journal_stream("main"), SUBJECT)


def on_bench(check: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        await check(await Bench().opened())

    run(main(), seed=1)


def test_an_append_stands_behind_the_tail_it_expected():
    """Epoch, session, group number and CRC travel in the header, the expectation beside it."""

    async def check(bench):
        first = await bench.append(1)
        second = await bench.append(2, expected=first)

        assert [it.sequence for it in bench.stored] == [first, second]
        _, _, headers = bench.bus.sent[1]
        assert headers == {subjects.GROUP_HEADER: f"1 a-1 2 {r.crc_of(BODY):08x}",
                           subjects.EXPECTED_LAST_HEADER: str(first)}
        tail = await bench.journal.tail(STATION)
        assert tail is not None
        assert tail.position == r.Position(second, r.GroupHeader(1, "a-1", 2, r.crc_of(BODY)))

    on_bench(check)


def test_the_tail_says_who_may_claim():
    """None, an owner's group, or a release with its successor."""

    async def check(bench):
        assert await bench.journal.tail(STATION) is None

        body = r.join_records([r.encode_record(r.Released(0, 0, 0, 9, "b-1"))])
        first = await bench.append(1)
        assert (await bench.journal.tail(STATION)).released is None
        await bench.append(2, expected=first, body=body)
        assert (await bench.journal.tail(STATION)).released.successor == "b-1"

    on_bench(check)


@pytest.mark.parametrize("fault", [LOSE_ANSWER, DROP_BEFORE, "refuse:10164", "refuse:10023", "refuse:10077"])
def test_after_an_unknown_outcome_the_same_bytes_are_sent_again(fault):
    """Rule 2: the same body, header and expectation, until it is in; it is in once."""

    async def check(bench):
        bench.broker.fail_next(SUBJECT, fault, times=3)
        sequence = await bench.append(1)

        assert len(bench.stored) == 1
        assert bench.stored[0].sequence == sequence
        assert len(bench.bus.sent) > 1
        assert all(sent == bench.bus.sent[0] for sent in bench.bus.sent)

    on_bench(check)


def test_a_group_that_arrives_after_its_repeat_is_refused():
    """The network delivers the first copy late: the expectation no longer holds."""

    async def check(bench):
        bench.broker.fail_next(SUBJECT, DELAY, delay_s=3 * APPEND_TIMEOUT_S)
        first = await bench.append(1)
        await bench.append(2, expected=first)
        await asyncio.sleep(4 * APPEND_TIMEOUT_S)

        assert [int(it.headers[subjects.GROUP_HEADER].split()[2]) for it in bench.stored] == [1, 2]

    on_bench(check)


def test_a_higher_epoch_deposes():
    """Rule 2: after 10071 the tail of somebody else's higher epoch ends ours."""

    async def check(bench):
        first = await bench.append(1)
        await bench.put(2, epoch=2, session="b-1")

        with pytest.raises(Deposed):
            await bench.append(2, expected=first)
        assert len(bench.stored) == 2

    on_bench(check)


def test_a_claim_that_came_second_is_deposed():
    """Two claim above the same tail: one append is accepted, the other hears that it lost."""

    async def check(bench):
        await bench.put(1, epoch=1, session="b-1")

        with pytest.raises(Deposed):
            await bench.append(1, epoch=1, session="a-1", expected=0)

    on_bench(check)


@pytest.mark.parametrize("foreign", [{"group": 2, "epoch": 1, "session": "a-1"}, {"group": 9, "epoch": 0}])
def test_a_tail_that_cannot_follow_halts_loudly(foreign):
    """Another group under our own epoch, or an older epoch at the tail: nobody goes on."""

    async def check(bench):
        first = await bench.append(1)
        await bench.put(body=r.join_records([]), **foreign)

        with pytest.raises(JournalHalted):
            await bench.append(2, expected=first)

    on_bench(check)


def test_the_tail_is_read_again_until_the_leader_answers():
    """After 10071 nothing is concluded from a failed read."""

    async def check(bench):
        bench.broker.fail_next(SUBJECT, LOSE_ANSWER)
        bench.broker.fail_next("$JS.API.STREAM.MSG.GET.>", "refuse:10008", times=3)

        await bench.append(1)

        assert len(bench.stored) == 1

    on_bench(check)


def test_nothing_is_sent_past_the_deadline():
    """Rule 7: the session is asked directly before each sending, repeats included."""

    async def check(bench):
        bench.may_send = False
        with pytest.raises(Abandoned):
            await bench.append(1)
        assert bench.bus.sent == []

        bench.may_send = True
        bench.broker.fail_next(SUBJECT, "refuse:10023", times=1_000)
        append = asyncio.create_task(bench.append(1))
        await asyncio.sleep(3)
        bench.may_send = False
        tries = len(bench.bus.sent)
        with pytest.raises(Abandoned):
            await append
        assert len(bench.bus.sent) <= tries + 1

    on_bench(check)


def test_nothing_is_concluded_past_the_deadline():
    """Rule 7: the leader cannot tell whether the group is in until the deadline; then it is the next owner's to see."""

    async def check(bench):
        bench.broker.fail_next(SUBJECT, LOSE_ANSWER)
        bench.broker.fail_next("$JS.API.STREAM.MSG.GET.>", "refuse:10008", times=20)
        append = asyncio.create_task(bench.append(1))
        await asyncio.sleep(APPEND_TIMEOUT_S + 0.3)
        bench.may_send = False

        with pytest.raises(Abandoned):
            await append
        assert len(bench.stored) == 1

    on_bench(check)


# -- trouble (rule 26) -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fault", "after_s"), [("refuse:10023", 0.03), (DROP_BEFORE, APPEND_TIMEOUT_S + 0.03)])
def test_trouble_shows_while_writes_do_not_get_through(fault, after_s):
    """A refusal, and silence too; the first accepted append ends it."""

    async def check(bench):
        assert bench.journal.trouble == ""
        bench.broker.fail_next(SUBJECT, fault, times=2)
        append = asyncio.create_task(bench.append(1))
        await asyncio.sleep(after_s)
        assert "journal writes" in bench.journal.trouble

        await append
        assert bench.journal.trouble == ""

    on_bench(check)


def test_a_dead_journal_is_written_when_it_lives_again():
    """Write-dead until the server restarts: the group is kept, and sent again."""

    async def check(bench):
        bench.broker.freeze_stream(subjects.journal_stream("main"))
        append = asyncio.create_task(bench.append(1))
        await asyncio.sleep(20)
        assert bench.journal.trouble
        assert not append.done()

        bench.broker.stop()
        bench.broker.start()
        await append
        assert len(bench.stored) == 1
        assert bench.journal.trouble == ""

    on_bench(check)


def test_trouble_ends_with_the_append_that_had_it():
    """A claim refused for a moment and then lost to another pod must not stop this one for ever."""

    async def check(bench):
        bench.broker.fail_next(SUBJECT, "refuse:10023")
        append = asyncio.create_task(bench.append(1))
        await asyncio.sleep(0.03)
        assert bench.journal.trouble
        await bench.put(1, epoch=1, session="b-1")

        with pytest.raises(Deposed):
            await append
        assert bench.journal.trouble == ""

    on_bench(check)


def test_trouble_of_one_station_is_not_ended_by_another():
    """Each open append counts for itself."""

    async def check(bench):
        bench.broker.fail_next(SUBJECT, "refuse:10023", times=5)
        append = asyncio.create_task(bench.append(1))
        await asyncio.sleep(0.03)
        other = r.GroupHeader(1, "a-1", 1, r.crc_of(BODY))
        await bench.journal.append(StationId(1, 1), other, BODY, expected=0, may_send=lambda: True)
        assert bench.journal.trouble

        await append
        assert bench.journal.trouble == ""

    on_bench(check)


# -- reading back ------------------------------------------------------------------------------------------------------

def test_a_station_is_read_in_order_and_only_its_own():
    """Behind a position, up to a sequence."""

    async def check(bench):
        sequences = [await bench.put(group) for group in (1, 2, 3, 4)]
        await MemoryBus(bench.broker).publish(subjects.journal("main", StationId(1, 1)), BODY, {})

        groups = await bench.read(until=sequences[2])
        assert [group.position.sequence for group in groups] == sequences[:3]
        rest = await bench.read(after=groups[1].position)
        assert [group.position.header.group for group in rest] == [3, 4]

    on_bench(check)


def test_a_group_of_a_passed_epoch_is_ignored():
    """Rule 1: a stalled claimant's group behind a newer epoch is nobody's."""

    async def check(bench):
        await bench.put(1, epoch=1)
        await bench.put(2, epoch=3)
        await bench.put(2, epoch=2)
        await bench.put(3, epoch=3)

        groups = await bench.read()

        assert [(group.position.header.epoch, group.position.header.group) for group in groups] == [(1, 1), (3, 2), (3, 3)]

    on_bench(check)


@pytest.mark.parametrize("damaged", [
    {"group": 3}, {"group": 1}, {"group": 2, "header": f"1 x-1 2 {r.crc_of(BODY) ^ 1:08x}"}, {"group": 2, "header": ""},
    {"group": 2, "body": b"\x91\x01"},
], ids=["a gap", "a number again", "a wrong CRC", "no header", "another format"])
def test_a_damaged_journal_halts_loudly(damaged):
    """Nothing damaged is served, nothing missing is skipped."""

    async def check(bench):
        await bench.put(1)
        await bench.put(**damaged)

        with pytest.raises(JournalHalted):
            await bench.read()

    on_bench(check)


def test_a_position_is_held_only_with_the_very_same_group():
    """Rule 3: epoch, session, group and CRC at that sequence; else the local state is of another history."""

    async def check(bench):
        sequence = await bench.put(1)
        header = r.GroupHeader(1, "x-1", 1, r.crc_of(BODY))

        assert await bench.journal.holds(r.Position(sequence, header))
        assert not await bench.journal.holds(r.Position(sequence, r.GroupHeader(1, "x-1", 1, header.crc ^ 1)))
        assert not await bench.journal.holds(r.Position(sequence, r.GroupHeader(2, "x-1", 1, header.crc)))
        assert not await bench.journal.holds(r.Position(sequence + 1, header))

    on_bench(check)


@pytest.mark.parametrize(("sequence", "group", "behind"), [(2, 2, False), (1, 1, False), (3, 2, True), (2, 3, True)])
def test_a_journal_reaches_what_is_known_by_sequence_and_by_group(sequence, group, behind):
    """Rule 27: a journal of another history may be longer by one of the two, and lack what was accepted all the same."""

    async def check(bench):
        await bench.put(1)
        await bench.put(2)
        tail = await bench.journal.tail(STATION)
        known = r.Position(sequence, r.GroupHeader(1, "x-1", group, r.crc_of(BODY)))

        with pytest.raises(JournalBehind) if behind else contextlib.nullcontext():
            await bench.journal.check_reaches(STATION, known, tail)

    on_bench(check)
