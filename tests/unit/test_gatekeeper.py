"""Gatekeeper: max-min shares, absolute leases, and what is never granted twice (protocol rule 9)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from toque._protocol import AccountRecord, LeaseAnswer, LeaseRequest, SessionRecord
from toque.sim.loop import run
from toque.storage import records as r
from toque.storage.ports import Message
from toque.workers.control import SeenSession
from toque.workers.gatekeeper import Appetite, Gatekeeper, share

TTL_S = 10.0

appetites = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda it: Appetite(it[0], it[0] + it[1])))


@given(st.integers(0, 120), appetites)
def test_shares_are_max_min_of_the_demand(limit, wants):
    """Never above the limit; nobody below its demand while another has more than one slot more than it needs."""
    shares = share(limit, wants)

    assert sum(shares.values()) <= limit
    for session, appetite in wants.items():
        assert 0 <= shares[session] <= max(appetite.wanted, appetite.demand)
        if shares[session] < appetite.demand:
            for other, its in wants.items():
                assert shares[other] <= min(its.demand, shares[session] + 1), f"{other} has more than {session} lacks"


@given(st.integers(0, 120), appetites)
def test_shares_leave_no_slot_idle(limit, wants):
    """L3: all is shared out, or everybody has what it wants."""
    shares = share(limit, wants)

    left = limit - sum(shares.values())
    assert left == 0 or all(shares[session] == appetite.wanted for session, appetite in wants.items())


@given(st.integers(0, 120), appetites, st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50)))
def test_what_had_begun_comes_first(limit, wants, begun):
    """No share above what had begun while any of that is not served; and no more in sum than the limit."""
    wants = {session: replace(its, begun=begun.get(session, 0), demand=max(its.demand, begun.get(session, 0)))
             for session, its in wants.items()}
    shares = share(limit, wants)

    assert sum(shares.values()) <= limit
    if any(shares[session] < its.begun for session, its in wants.items()):
        assert all(shares[session] <= its.begun for session, its in wants.items())


@given(st.integers(0, 120), appetites, st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50)))
def test_no_share_is_above_what_had_begun_and_the_fair_share(limit, wants, begun):
    """L3: a slot that is kept for nothing that had begun can be used by something new."""
    wants = {session: replace(its, begun=begun.get(session, 0), demand=max(its.demand, begun.get(session, 0)))
             for session, its in wants.items()}
    fair = share(limit, {session: replace(its, begun=0) for session, its in wants.items()})

    shares = share(limit, wants)

    assert all(shares[session] <= max(its.begun, fair[session]) for session, its in wants.items())


@given(st.integers(0, 60), st.integers(1, 6))
def test_equal_wishes_get_equal_shares(limit, pods):
    """To within one slot."""
    shares = share(limit, {f"s{number}": Appetite(100, 100) for number in range(pods)})

    assert max(shares.values()) - min(shares.values()) <= 1


# -- the table ---------------------------------------------------------------------------------------------------------

class Bench:
    """A Gatekeeper whose records are accepted when the test says so."""

    def __init__(self, *, limit=10, leases=None):
        self.now = 100.0
        self.control = SimpleNamespace(account=AccountRecord(name="main", max_concurrent=limit, ttl_s=TTL_S),
                                       sessions={}, opened_at=self.now)
        self.records = []
        self.pending = []
        self.answers = {}
        self.nudges = 0
        self.in_time = True
        self.accept_at_once = True
        self.keeper = Gatekeeper(
            leases or {}, self.control, SimpleNamespace(boottime=lambda: self.now), epoch=4, commit=self._commit,
            now_ms=lambda: 9, respond=self._respond, nudge=self._nudge, in_time=lambda: self.in_time)

    def _commit(self, record):
        self.records.append(record)
        accepted = asyncio.get_running_loop().create_future()
        self.pending.append(accepted)
        if self.accept_at_once:
            self.accept()
        return accepted

    def accept(self):
        for accepted in self.pending:
            accepted.set_result(None)
        self.pending.clear()

    def _respond(self, message, data):
        self.answers[message.reply] = msgspec.msgpack.decode(data, type=LeaseAnswer)

    def _nudge(self):
        self.nudges += 1

    def see(self, *sessions, ended="", expired=False):
        for session in sessions:
            record = None if expired else SessionRecord(pod=session, session=session, ttl_s=TTL_S, ended=ended)
            seen = self.control.sessions.get(session)
            if seen is None:
                self.control.sessions[session] = SeenSession(session, record, self.now)
            else:
                seen.record = record

    async def ask(self, session, number, *, demand=0, wanted=0, ceiling=0, begun=0):
        """The answer, or None when there is none yet."""
        request = LeaseRequest(session, number, demand, wanted, ceiling, begun)
        reply = f"{session}-{number}"
        self.answers.pop(reply, None)
        self.keeper.handle(Message("lease", msgspec.msgpack.encode(request), reply=reply))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return self.answers.get(reply)


def on_bench(check, **options):
    async def main():
        await check(Bench(**options))

    run(main(), seed=1)


def test_a_grant_is_sent_only_after_its_record_is_accepted():
    """The next Gatekeeper knows every holding from the journal."""

    async def check(bench):
        bench.see("a")
        bench.accept_at_once = False
        assert await bench.ask("a", 1, demand=4) is None
        assert bench.records == [r.Lease(0, 0, 0, 9, "a", 1, 4)]

        bench.accept()
        await asyncio.sleep(0)
        assert bench.answers["a-1"] == LeaseAnswer(4, 4, 4, 4)

    on_bench(check)


def test_slots_that_come_free_go_to_what_had_begun_first():
    """A pod died: its instances wake in a pod that holds its share, while a new pod has a queue to admit from."""

    async def check(bench):
        bench.see("a", "b", "dead")
        await bench.ask("dead", 1, demand=4)
        await bench.ask("a", 1, demand=6, begun=6)
        assert (await bench.ask("b", 1, demand=50)).slots == 0
        assert (await bench.ask("a", 2, demand=9, ceiling=6, begun=9)).slots == 6

        bench.see("dead", ended="dead")
        bench.keeper.sweep()

        assert (await bench.ask("b", 2, demand=50)).slots == 1
        assert (await bench.ask("a", 3, demand=9, ceiling=6, begun=9)).slots == 9

    on_bench(check)


def test_nothing_new_follows_into_slots_above_the_fair_share():
    """Else a pod that has all would keep all: as its instances end, the holding falls to what the others leave it."""

    async def check(bench):
        bench.see("a", "b")
        await bench.ask("a", 1, demand=10, begun=10)
        await bench.ask("b", 1, demand=10)

        answer = await bench.ask("a", 2, demand=20, ceiling=10, begun=10)
        assert (answer.slots, answer.target, answer.admit) == (10, 10, 5)

        answer = await bench.ask("a", 3, demand=20, ceiling=7, begun=7)
        assert (answer.slots, answer.target, answer.admit) == (7, 7, 5)
        assert (await bench.ask("b", 2, demand=10)).slots == 3

    on_bench(check)


def test_a_lower_limit_holds_for_what_had_begun_too():
    """L5: though instances wake all the time, the targets are within the limit in sum."""

    async def check(bench):
        bench.see("a", "b")
        await bench.ask("a", 1, demand=5, begun=5)
        await bench.ask("b", 1, demand=5, begun=5)

        bench.control.account.max_concurrent = 4
        first = await bench.ask("a", 2, demand=60, ceiling=5, begun=60)
        second = await bench.ask("b", 2, demand=60, ceiling=5, begun=60)

        assert first.target + second.target <= 4 + 1
        assert (await bench.ask("a", 3, demand=60, ceiling=first.target, begun=60)).target == 2

    on_bench(check)


def test_a_repeated_request_does_not_overtake_the_record():
    """The pod asks again after a time-out, while the grant is still on its way to the journal: no answer before it."""

    async def check(bench):
        bench.see("a")
        bench.accept_at_once = False
        await bench.ask("a", 1, demand=4)

        assert await bench.ask("a", 2, demand=4) is None

        bench.accept()
        await asyncio.sleep(0)
        assert bench.answers["a-2"].slots == 4

    on_bench(check)


def test_an_old_number_is_ignored():
    """A request that the network brings late changes nothing: it speaks of a ceiling that no longer holds."""

    async def check(bench):
        bench.see("a")
        await bench.ask("a", 2, demand=8)
        written = len(bench.records)

        assert await bench.ask("a", 1, demand=1, ceiling=0) is None
        assert await bench.ask("a", 2, demand=1, ceiling=0) is None
        assert bench.keeper.granted == 8
        assert len(bench.records) == written

    on_bench(check)


def test_a_number_counts_though_nothing_was_written_for_it():
    """Request 3 left the lease as it was; request 2, late, must not lower what 3 confirmed."""

    async def check(bench):
        bench.see("a")
        await bench.ask("a", 1, demand=8)
        assert (await bench.ask("a", 3, demand=8, ceiling=8)).slots == 8

        assert await bench.ask("a", 2, demand=1, ceiling=1) is None
        assert bench.keeper.granted == 8

    on_bench(check)


def test_a_new_gatekeeper_goes_on_with_the_numbers_of_the_journal():
    """Leases and their numbers outlive the Gatekeeper."""

    async def check(bench):
        bench.see("a", "b")
        assert await bench.ask("a", 5, demand=9, ceiling=6) is None
        assert (await bench.ask("b", 1, demand=10)).slots == 4

    on_bench(check, leases={"a": r.LeaseRow(5, 6)})


def test_a_holding_is_lowered_only_by_the_pods_own_report():
    """L1: what another session was granted counts until it says that it holds itself to less."""

    async def check(bench):
        bench.see("a", "b")
        await bench.ask("a", 1, demand=10)
        first = await bench.ask("b", 1, demand=10)
        assert (first.slots, first.target) == (0, 5)
        assert bench.nudges == 1

        told = await bench.ask("a", 2, demand=10, ceiling=10)
        assert (told.slots, told.target) == (10, 5)
        lowered = await bench.ask("a", 3, demand=10, ceiling=5)
        assert lowered.slots == 5
        assert (await bench.ask("b", 2, demand=10)).slots == 5

    on_bench(check)


def test_a_session_that_is_not_known_gets_nothing():
    """Nor one that has ended or expired."""

    async def check(bench):
        assert (await bench.ask("a", 1, demand=1)).code == "unknown_session"
        bench.see("a", ended="expired")
        assert (await bench.ask("a", 2, demand=1)).code == "unknown_session"
        bench.see("b", expired=True)
        assert (await bench.ask("b", 1, demand=1)).code == "unknown_session"
        assert bench.records == []

    on_bench(check)


def test_slots_of_an_expired_session_wait_for_its_ttl():
    """A TTL after its last renewal was seen, and not before it was ended by somebody's compare-and-set."""

    async def check(bench):
        bench.see("a")
        await bench.ask("a", 1, demand=10)
        bench.now += TTL_S + 1
        bench.see("a", expired=True)
        bench.keeper.sweep()
        assert bench.keeper.granted == 10

        bench.see("a", ended="expired")
        bench.keeper.sweep()
        assert bench.keeper.granted == 0
        assert bench.records[-1] == r.LeaseEnded(0, 0, 0, 9, "a")

    on_bench(check)


def test_slots_of_a_session_that_others_ended_wait_too():
    """Its pod may still be inside callbacks until its TTL is over."""

    async def check(bench):
        bench.see("a")
        await bench.ask("a", 1, demand=10)
        bench.now += 2
        bench.see("a", ended="expired")
        bench.keeper.sweep()
        assert bench.keeper.granted == 10

        bench.now += TTL_S
        bench.keeper.sweep()
        assert bench.keeper.granted == 0

    on_bench(check)


def test_slots_of_a_proven_death_come_back_at_once():
    """Its directory's lock was free, or the pod itself ended it, when all its callbacks had left."""

    async def check(bench):
        bench.see("a", "b", "c")
        await bench.ask("a", 1, demand=3)
        await bench.ask("b", 1, demand=3)
        await bench.ask("c", 1, demand=3)
        bench.see("a", ended="dead")
        bench.see("b", ended="left")
        bench.see("c", ended="lost")
        bench.keeper.sweep()

        assert bench.keeper.granted == 0

    on_bench(check)


def test_a_new_gatekeeper_waits_a_ttl_for_a_session_it_never_saw():
    """Its key is gone, but its process may have been alive a moment ago."""

    async def check(bench):
        bench.keeper.sweep()
        assert bench.keeper.granted == 6
        bench.now += TTL_S + 0.1
        bench.keeper.sweep()
        assert bench.keeper.granted == 0

    on_bench(check, leases={"gone": r.LeaseRow(5, 6)})


def test_a_lowered_limit_asks_everybody_to_lower():
    """L5: nothing new is granted above it, and who holds too much is told its target."""

    async def check(bench):
        bench.see("a", "b")
        await bench.ask("a", 1, demand=5)
        await bench.ask("b", 1, demand=5)
        bench.control.account = AccountRecord(name="main", max_concurrent=2, ttl_s=TTL_S)

        told = await bench.ask("a", 2, demand=5, ceiling=5)
        assert (told.slots, told.target) == (5, 1)
        assert (await bench.ask("a", 3, demand=5, ceiling=1)).slots == 1

    on_bench(check)


def test_a_deposed_gatekeeper_says_nothing():
    """Past the deadline no answer leaves, and nothing is swept."""

    async def check(bench):
        bench.see("a")
        bench.in_time = False
        assert await bench.ask("a", 1, demand=5) is None
        bench.see("a", ended="dead")
        bench.keeper.sweep()
        assert not any(isinstance(record, r.LeaseEnded) for record in bench.records)

        bench.keeper.closed = True
        assert await bench.ask("a", 2, demand=5) is None

    on_bench(check)


def test_a_request_without_a_reply_or_sense_is_harmless():
    """Anybody may publish anything on the subject."""

    async def check(bench):
        bench.see("a")
        bench.keeper.handle(Message("lease", b"\xc1", reply="x"))
        bench.keeper.handle(Message("lease", msgspec.msgpack.encode(LeaseRequest("a", 1, 3, 3, 0))))
        await asyncio.sleep(0)

        assert bench.answers == {}

    on_bench(check)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12), st.integers(0, 12)), max_size=30), st.integers(1, 12))
def test_what_is_granted_never_exceeds_the_limit(requests, limit):
    """Whatever the pods ask for, whatever ceilings they report."""

    async def check(bench):
        bench.see("a", "b", "c")
        for number, (session, demand, ceiling) in enumerate(requests, 1):
            await bench.ask(session, number, demand=demand, ceiling=ceiling)
            assert bench.keeper.granted <= limit
        leases = {}
        for record in bench.records:
            leases[record.session] = record.slots
            assert sum(leases.values()) <= limit

    on_bench(check, limit=limit)
