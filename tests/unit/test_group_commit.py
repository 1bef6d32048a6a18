"""Group commit: one group in flight, nothing folded or told before its acceptance, and bounds (protocol rules 2, 3, 9)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toque._subjects import StationId
from toque.sim.loop import run
from toque.storage import records as r
from toque.storage.group_commit import STORE_LAG_MAX_S, GroupCommit
from toque.storage.journal import Deposed

STATION = StationId(1, 0)
TAIL = r.Position(40, r.GroupHeader(3, "a-1", 7, 0))
GROUP_S = 0.01


class SlowJournal:
    """A journal that accepts a group GROUP_S after it was sent, unless `refuse` is set."""

    def __init__(self):
        self.sent = []  # (header, body, expected)
        self.accepted = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.refuse = None

    async def append(self, station, header, body, *, expected, may_send):
        self.sent.append((header, body, expected))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(GROUP_S)
        finally:
            self.in_flight -= 1
        if self.refuse is not None:
            raise self.refuse
        self.accepted += 1
        return expected + 10

    @property
    def groups(self):
        return [r.decode_records(body) for _, body, _ in self.sent]


class SpyStore:
    """Takes groups; `lag_s` is what the test says."""

    def __init__(self):
        self.applied = []
        self.lag_s = 0.0

    def apply(self, group, on_folded=None):
        self.applied.append(group)


class Heard:
    """A listener that writes down what it hears, and how far the journal was then."""

    def __init__(self, bench, name=""):
        self.bench, self.name = bench, name

    def accepted(self):
        self.bench.heard.append((self.name, self.bench.journal.accepted))


class Bench:
    """A GroupCommit on a slow journal and a store that only notes."""

    def __init__(self):
        self.journal, self.store = SlowJournal(), SpyStore()
        self.heard, self.lost, self.groups_accepted = [], [], []
        self.commits = GroupCommit(self.journal, self.store, STATION, TAIL, may_send=lambda: True,
                                   on_accepted=self._accepted, on_lost=self.lost.append)

    def _accepted(self, group):
        self.groups_accepted.append(group)
        return None

    def add(self, number, *, size=0):
        self.commits.add(record(number, size=size), Heard(self, number))

    async def settled(self):
        while not self.commits.idle:
            await asyncio.sleep(GROUP_S)
        await asyncio.sleep(GROUP_S)


def record(number, *, size=0):
    return r.StepDone(number, 1, 2, 9, r.StepKind.DO, "s", 1, 1, 8, b"x" * size)


def on_bench(check: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        await check(Bench())

    run(main(), seed=1)


def test_records_collect_while_a_group_is_in_flight():
    """One group in flight: what comes meanwhile is the next one, behind it in the chain."""

    async def check(bench):
        bench.add(1)
        await asyncio.sleep(GROUP_S / 2)
        bench.add(2)
        bench.add(3)
        await bench.settled()

        assert [[it.serial for it in group] for group in bench.journal.groups] == [[1], [2, 3]]
        assert bench.journal.most_in_flight == 1
        assert [(header.epoch, header.group, expected) for header, _, expected in bench.journal.sent] == [
            (3, 8, 40), (3, 9, 50)]

    on_bench(check)


def test_records_of_one_moment_make_one_group():
    """Nothing is sent before the present turn of the loop is over."""

    async def check(bench):
        for number in range(1, 6):
            bench.add(number)
        await bench.settled()

        assert len(bench.journal.sent) == 1
        assert bench.journal.sent[0][0].crc == r.crc_of(bench.journal.sent[0][1])

    on_bench(check)


def test_nothing_is_folded_or_told_before_the_acceptance():
    """Rule 3: the store gets a group only after its PubAck, and listeners hear after that, in order."""

    async def check(bench):
        bench.add(1)
        bench.add(2)
        await asyncio.sleep(GROUP_S / 2)
        assert bench.store.applied == []
        assert bench.heard == []

        await bench.settled()
        assert [group.position for group in bench.store.applied] == [r.Position(50, bench.journal.sent[0][0])]
        assert [it.serial for it in bench.store.applied[0].records] == [1, 2]
        assert bench.heard == [(1, 1), (2, 1)]
        assert bench.commits.tail.sequence == 50

    on_bench(check)


def test_a_deposed_owner_hears_once_and_nothing_of_it_leaves():
    """Rule 2: after Deposed nothing is folded, no listener is called, nothing more is sent."""

    async def check(bench):
        bench.journal.refuse = Deposed("a higher epoch")
        bench.add(1)
        await asyncio.sleep(GROUP_S / 2)
        bench.add(2)
        await asyncio.sleep(GROUP_S * 10)
        bench.add(3)
        await asyncio.sleep(GROUP_S * 10)

        assert [str(error) for error in bench.lost] == ["a higher epoch"]
        assert (bench.store.applied, bench.heard) == ([], [])
        assert len(bench.journal.sent) == 1

    on_bench(check)


def test_a_closed_epoch_sends_nothing_more():
    """What was pending is dropped; a group in flight is the next claim's to see."""

    async def check(bench):
        bench.add(1)
        await asyncio.sleep(GROUP_S / 2)
        bench.add(2)
        bench.commits.close()
        await asyncio.sleep(GROUP_S * 10)

        assert len(bench.journal.sent) == 1
        assert (bench.store.applied, bench.heard, bench.lost) == ([], [], [])

    on_bench(check)


def test_nothing_follows_the_seal():
    """Released is the last record of an epoch: later ones are dropped, and a second seal tells of the first."""

    async def check(bench):
        bench.add(1)
        released = bench.commits.seal(r.Released(0, 0, 0, 9, "b-1"))
        bench.add(2)
        again = bench.commits.seal(r.Released(0, 0, 0, 9, "c-1"))
        await bench.settled()

        assert [type(it).__name__ for group in bench.journal.groups for it in group] == ["StepDone", "Released"]
        assert released.done()
        assert again is released

    on_bench(check)


def test_no_group_is_sent_while_the_store_lags():
    """Rule 3: LMDB lags by 1 s at most; the journal waits for it."""

    async def check(bench):
        bench.store.lag_s = STORE_LAG_MAX_S + 0.1
        bench.add(1)
        await asyncio.sleep(1)
        assert bench.journal.sent == []

        bench.store.lag_s = 0.0
        await bench.settled()
        assert len(bench.journal.sent) == 1

    on_bench(check)


@pytest.mark.parametrize("size", [0, 2_000])
def test_it_is_full_with_more_than_a_group_pending(size):
    """Rule 9: no callback is entered behind more than one full group, by records or by bytes."""

    async def check(bench):
        bench.add(0)
        await asyncio.sleep(GROUP_S / 2)  # in flight
        added = 0
        while not bench.commits.full:
            bench.add(1, size=size)
            added += 1
        assert added == (r.GROUP_RECORDS_MAX + 1 if not size else pytest.approx(r.GROUP_BYTES_MAX / size, rel=0.03))

        room = []
        bench.commits.when_room(lambda: room.append(bench.commits.full))
        await bench.settled()
        assert room == [False]

    on_bench(check)


@given(st.lists(st.sampled_from([0, 10, 5_000, 200_000, 520_000, 600_000]), max_size=40))
def test_a_group_keeps_its_bounds_and_the_order(sizes):
    """Rule 17: 512 records and 512 KiB at most, or one record; nothing is lost, doubled or moved."""

    async def check(bench):
        for number, size in enumerate(sizes):
            bench.add(number, size=size)
        await bench.settled()

        assert [it.serial for group in bench.journal.groups for it in group] == list(range(len(sizes)))
        for (_, body, _), group in zip(bench.journal.sent, bench.journal.groups, strict=True):
            assert len(group) <= r.GROUP_RECORDS_MAX
            assert len(body) <= r.GROUP_BYTES_MAX + 8 or len(group) == 1

    on_bench(check)


def test_many_small_records_are_cut_by_their_number():
    """512 to a group."""

    async def check(bench):
        for number in range(1_200):
            bench.add(number)
        await bench.settled()

        assert [len(group) for group in bench.journal.groups] == [512, 512, 176]

    on_bench(check)
