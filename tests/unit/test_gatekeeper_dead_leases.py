"""What a dead session still holds is nobody's to share, and is freed by the TTL that the session had."""

from __future__ import annotations

from unit.test_gatekeeper import on_bench

from toque._protocol import SessionRecord
from toque.storage import records as r
from toque.workers.control import SeenSession


def test_the_living_share_what_the_dead_do_not_hold() -> None:
    """A pod that comes after a death is not left without a slot until the dead one's are freed: the others give way."""

    async def check(bench):
        bench.see("a", "b", "new")
        bench.see("dead", ended="expired")
        await bench.ask("a", 7, demand=50, ceiling=5)
        await bench.ask("b", 7, demand=50, ceiling=5)

        first = await bench.ask("new", 1, demand=50)
        lowered = [await bench.ask(session, 8, demand=50, ceiling=3) for session in ("a", "b")]
        second = await bench.ask("new", 2, demand=50)

        assert (first.slots, first.target, bench.nudges > 0) == (0, 4, True)
        assert [(answer.slots, answer.target) for answer in lowered] == [(3, 3), (3, 3)]
        assert (second.slots, bench.keeper.granted) == (4, 16)

    leases = {"a": r.LeaseRow(1, 5), "b": r.LeaseRow(1, 5), "dead": r.LeaseRow(1, 6)}
    on_bench(check, limit=16, leases=leases)


def test_a_pod_that_was_not_heard_yet_keeps_its_slots() -> None:
    """A new Gatekeeper hears the pods one after another: the first one is not promised what the others hold."""

    async def check(bench):
        bench.see("a", "b")

        answer = await bench.ask("a", 7, demand=50, ceiling=5)

        assert (answer.slots, answer.target) == (5, 5)

    on_bench(check, limit=10, leases={"a": r.LeaseRow(1, 5), "b": r.LeaseRow(1, 5)})


def test_the_ttl_is_the_sessions_own() -> None:
    """Who ends an expired session cannot read its TTL any more; what counts is that of the last renewal seen."""

    async def check(bench):
        ended = SessionRecord(pod="", session="dead", ended="expired")
        assert ended.ttl_s == 10.0
        bench.control.sessions["dead"] = SeenSession("dead", ended, bench.now, ttl_s=5.0)

        bench.now += 4.9
        bench.keeper.sweep()
        held = bench.keeper.granted
        bench.now += 0.2
        bench.keeper.sweep()

        assert (held, bench.keeper.granted) == (6, 0)

    on_bench(check, limit=10, leases={"dead": r.LeaseRow(1, 6)})
