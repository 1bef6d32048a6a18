"""The watch on the control bucket: account, layout and sessions, with the time of each session's last renewal."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import msgspec

from toque import _subjects as subjects
from toque._accounts import ensure_account, update_account
from toque._protocol import AccountRecord, SessionRecord
from toque.sim.loop import VirtualClock, run
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.workers.control import ControlWatch
from toque.workers.session import ENDED_TTL_S, end_session, ttl_header

SOON_S = 0.1
TTL_S = 5.0


class Bench:
    """An account on a broker, a watch on one connection and a writer on another."""

    def __init__(self):
        self.broker = MemoryBroker(random.Random(1))
        self.bus, self.writer = MemoryBus(self.broker), MemoryBus(self.broker)
        self.clock = VirtualClock(asyncio.get_running_loop())
        self.heard = []

    async def opened(self):
        account, layout = await ensure_account(self.writer, "main", defaults=AccountRecord(name="main"))
        self.watch = ControlWatch(self.bus, "main", self.clock, account, layout)
        self.watch.on_change(self.heard.append)
        await self.watch.open()
        return self

    async def renew(self, session="a-1", **fields):
        record = SessionRecord(pod="a", session=session, ttl_s=TTL_S, **fields)
        await self.writer.publish(subjects.control_session("main", session), msgspec.json.encode(record),
                                  {subjects.TTL_HEADER: ttl_header(TTL_S)})
        await asyncio.sleep(SOON_S)


def on_bench(check: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        await check(await Bench().opened())

    run(main(), seed=1)


def test_a_session_is_live_from_its_first_key_on():
    """With what its key says."""

    async def check(bench):
        await bench.renew(stations=["1.0"])

        assert [record.stations for record in bench.watch.live_sessions()] == [["1.0"]]
        assert "session.a-1" in bench.heard

    on_bench(check)


def test_the_time_of_the_last_renewal_is_the_watchers_own():
    """Rule 9: slots come back a TTL after a renewal was last seen, by the Gatekeeper's clock; an end is no renewal."""

    async def check(bench):
        await bench.renew()
        first = bench.watch.sessions["a-1"].seen_at
        await asyncio.sleep(1)
        await bench.renew()
        renewed = bench.watch.sessions["a-1"].seen_at
        assert renewed >= first + 1

        await asyncio.sleep(1)
        await end_session(bench.writer, "main", "a-1", reason="dead", by="test", over_live=True)
        await asyncio.sleep(SOON_S)
        assert bench.watch.sessions["a-1"].seen_at == renewed
        assert not bench.watch.sessions["a-1"].live

    on_bench(check)


def test_an_expired_session_is_not_live():
    """The marker that the server leaves says so; nobody has ended it yet."""

    async def check(bench):
        await bench.renew()
        await asyncio.sleep(TTL_S + 1)

        seen = bench.watch.sessions["a-1"]
        assert seen.expired
        assert not seen.live
        assert bench.watch.live_sessions() == []

    on_bench(check)


def test_an_ended_session_is_forgotten_when_its_key_is_gone():
    """Else a pod's memory grows with every session that ever was, and an ended one would look expired."""

    async def check(bench):
        await bench.renew()
        await end_session(bench.writer, "main", "a-1", reason="left", by="a", over_live=True)
        await asyncio.sleep(SOON_S)
        assert bench.watch.sessions["a-1"].record.ended == "left"
        await asyncio.sleep(ENDED_TTL_S + 2)

        assert not bench.watch.sessions

    on_bench(check)


def test_a_watch_that_opens_late_knows_every_session():
    """Also those that have expired: a new Gatekeeper must wait for them."""

    async def check(bench):
        await bench.renew("a-1")
        await asyncio.sleep(TTL_S + 1)
        await bench.renew("b-1")
        late = ControlWatch(MemoryBus(bench.broker), "main", bench.clock, bench.watch.account, bench.watch.layout)
        await late.open()
        await asyncio.sleep(SOON_S)

        assert {session: seen.live for session, seen in late.sessions.items()} == {"a-1": False, "b-1": True}
        assert late.sessions["a-1"].seen_at >= late.opened_at

    on_bench(check)


def test_limits_change_while_the_pod_runs():
    """`toque accounts set` reaches every pod."""

    async def check(bench):
        await update_account(bench.writer, "main", max_concurrent=7)
        await asyncio.sleep(SOON_S)

        assert bench.watch.account.max_concurrent == 7
        assert "account" in bench.heard

    on_bench(check)


def test_more_changes_than_the_credit_all_arrive():
    """The feed is asked for as much as it has brought."""

    async def check(bench):
        for number in range(1_200):
            bench.writer.emit(subjects.control_session("main", f"s-{number}"), msgspec.json.encode(
                SessionRecord(pod="a", session=f"s-{number}")))
        await asyncio.sleep(5)

        assert len(bench.watch.live_sessions()) == 1_200

    on_bench(check)


def test_the_watch_goes_on_after_the_connection_was_lost():
    """What changed meanwhile is seen after it is back."""

    async def check(bench):
        bench.bus.disconnect()
        await bench.renew()
        assert bench.watch.sessions == {}

        bench.bus.reconnect()
        await asyncio.sleep(SOON_S)
        assert len(bench.watch.live_sessions()) == 1

    on_bench(check)
