"""What leaves a queue stream, and when: up to the lowest committed position of all stations (protocol rule 11)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest

from toque import _subjects as subjects
from toque._subjects import StationId
from toque.sim.loop import run
from toque.storage.ports import Message, StreamInfo
from toque.workers.queue_purge import DEEP, DEEP_TICKS, LUMP_MAX, LUMP_MIN, Positions, QueuePurge, lump

STATIONS = [StationId(1, 0), StationId(1, 1)]
QUEUE = subjects.queue_stream("main", "work")
LIMIT = 100_000


class Stream:
    """The part of a bus that a purge needs, over one stream that a test describes."""

    def __init__(self) -> None:
        self.created = "first"
        self.messages = 100
        self.first_sequence = 1
        self.purged: list[tuple[str, str, int]] = []
        self.told: list[bytes] = []

    async def stream_info(self, stream: str) -> StreamInfo:
        return StreamInfo(self.created, self.messages, self.first_sequence, 10**6, 0, {}, {})

    async def purge(self, stream: str, pattern: str, below_sequence: int) -> None:
        self.purged.append((stream, pattern, below_sequence))
        self.first_sequence = below_sequence

    def emit(self, subject: str, data: bytes) -> None:
        assert subject == subjects.queue_positions("main")
        self.told.append(data)


class Reader:
    """This pod's own reader, and the positions that it would tell."""

    workflow = "work"

    def __init__(self, positions: dict[StationId, int]) -> None:
        self.created = "first"
        self.at = positions
        self.backlog_max = 0

    async def positions(self) -> dict[StationId, int]:
        return self.at

    async def clear_backlog(self, handled_max: int) -> None:
        self.backlog_max = handled_max


class Bench:
    """The purge of one pod, which owns station 0 unless a test says otherwise."""

    def __init__(self) -> None:
        self.stream = Stream()
        self.owns_first = True
        self.purge = QueuePurge(self.stream, "main", owns_first=lambda: self.owns_first)  # type: ignore[arg-type]

    def hear(self, *, created: str = "first", **positions: int) -> None:
        """Some pod tells: `s0=5` for station 1.0."""
        told = {f"1.{name[1:]}": position for name, position in positions.items()}
        self.purge.heard(Message("", msgspec.msgpack.encode(Positions({"work": (created, told)}))))

    async def tick(self, *readers: Reader) -> None:
        await self.purge.tick(readers, STATIONS, LIMIT)  # type: ignore[arg-type]  # a stand-in

    @property
    def below(self) -> list[int]:
        return [below for _, _, below in self.stream.purged]


def on_bench(check: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        await check(Bench())

    run(main(), seed=1)


def test_the_lowest_position_of_all_stations_is_the_cut():
    """One cut at the front, over all subjects: no holes."""

    async def check(bench: Bench) -> None:
        bench.hear(s0=7, s1=4)

        await bench.tick()

        assert bench.stream.purged == [(QUEUE, ">", 5)]

    on_bench(check)


def test_a_station_that_has_told_nothing_holds_the_purge_back():
    """Its creations may lie anywhere in the stream."""

    async def check(bench: Bench) -> None:
        bench.hear(s0=7)

        await bench.tick()

        assert bench.below == []

    on_bench(check)


def test_only_the_owner_of_station_0_purges():
    """The others tell and leave it to that one."""

    async def check(bench: Bench) -> None:
        bench.owns_first = False
        bench.hear(s0=7, s1=4)

        await bench.tick(Reader({STATIONS[1]: 4}))

        assert bench.below == []
        assert msgspec.msgpack.decode(bench.stream.told[0], type=Positions).workflows == {"work": ("first", {"1.1": 4})}

    on_bench(check)


def test_a_position_outlives_the_pod_that_told_it():
    """It counts accepted records only, so it is true whoever owns the station; a lower one is older, or starts anew."""

    async def check(bench: Bench) -> None:
        bench.hear(s0=7, s1=4)
        bench.hear(s1=0)

        await bench.tick()

        assert bench.below == [5]

    on_bench(check)


def test_positions_of_a_stream_that_is_gone_are_void():
    """The stream was made anew: what lies at these sequences now was read by nobody."""

    async def check(bench: Bench) -> None:
        bench.hear(s0=7, s1=4)
        bench.stream.created = "second"

        await bench.tick()
        bench.hear(created="second", s0=7)
        await bench.tick()

        assert bench.below == []

    on_bench(check)


def test_positions_of_the_new_stream_do_not_mix_with_those_of_the_old():
    """A station that has told of the old stream only has told nothing of this one; later a lower cut is no old one."""

    async def check(bench: Bench) -> None:
        bench.hear(s0=90, s1=80)
        await bench.tick()
        bench.stream.created, bench.stream.first_sequence = "second", 1

        bench.hear(created="second", s0=7)
        await bench.tick()
        assert bench.below == [81]
        bench.hear(created="second", s1=4)
        await bench.tick()

        assert bench.below == [81, 5]

    on_bench(check)


def test_a_deep_stream_is_purged_now_and_then():
    """Each purge stalls it for longer: it takes what has come together in DEEP_TICKS."""

    async def check(bench: Bench) -> None:
        bench.stream.messages = DEEP + 1
        for second in range(3 * DEEP_TICKS):
            bench.hear(s0=second + 1, s1=second + 1)
            await bench.tick()

        assert len(bench.below) == 3

    on_bench(check)


def test_nothing_is_purged_twice():
    """What does not move costs no request."""

    async def check(bench: Bench) -> None:
        bench.hear(s0=7, s1=4)

        await bench.tick()
        await bench.tick()

        assert bench.below == [5]

    on_bench(check)


@pytest.mark.parametrize(("queue_limit", "stations", "messages"), [
    (100_000, 1, 5_000), (100_000, 8, LUMP_MIN), (2_000_000, 8, LUMP_MAX), (0, 0, LUMP_MIN)])
def test_the_lump_is_a_share_of_the_queue_limit(queue_limit, stations, messages):
    """5 % of it over all stations, within bounds; a reader may hold twice as many back."""
    assert lump(queue_limit, stations) == messages

    async def check(bench: Bench) -> None:
        reader = Reader(dict.fromkeys(STATIONS, 1))
        await bench.tick(reader)
        assert reader.backlog_max == 2 * lump(LIMIT, len(STATIONS))

    on_bench(check)
