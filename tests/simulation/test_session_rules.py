"""Sessions, and answers under a deadline (protocol rules 7, 8 and 24)."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from toque import _subjects as subjects
from toque._protocol import Answer, InstanceRequest, encode
from toque.errors import OwnerAway
from toque.sim.checks import check_all, check_chains, check_steps
from toque.sim.process import work_in_thread
from toque.sim.world import TTL_S, World, account, play, steps_workflow
from toque.storage import records as r
from toque.storage.memory_broker import DELAY, DROP_BEFORE, LOSE_ANSWER
from toque.storage.ports import BusTimeout
from toque.workers.keeper_thread import EXIT_FENCED
from toque.workers.session import MARGIN_OF_TTL, RENEWALS_PER_TTL, end_session
from toque.workers.spread import weight
from toque.workflow import Step, StepContext, Workflow, WorkflowEvent

DEADLINE_S = TTL_S * (1 - MARGIN_OF_TTL)


def last_renewal(world: World, session: str) -> float:
    """Virtual time at which the broker took the session's last renewal."""
    message = world.broker.last_message(subjects.control_stream("main"), subjects.control_session("main", session))
    return (message.time_ms - world.broker.epoch_ms) / 1000


# -- rule 7: the session lives as long as the pod's own loop reaches JetStream -----------------------------------------

def test_a_session_is_renewed_five_times_in_its_ttl():
    """Closes: one lost renewal ends a healthy session."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        await world.passes(1)
        times = {last_renewal(world, a.session)}
        until = world.now + 3 * TTL_S
        while world.now < until:
            await world.passes(0.1)
            times.add(last_renewal(world, a.session))

        gaps = [after - before for before, after in zip(sorted(times), sorted(times)[1:], strict=False)]
        assert max(gaps) <= TTL_S / RENEWALS_PER_TTL + 0.1

    play(story)


def test_a_pod_whose_own_connection_is_lost_does_not_keep_its_session():
    """Closes: the keeper goes on renewing for a pod that cannot commit any more, and its instances hang for ever."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entries, "it is inside")
        await world.start_pod("b", app)
        cut = world.now
        a.bus.disconnect()
        await world.until(lambda: world.records(r.Ended), "b has brought it to its end", timeout_s=60)

        assert world.history.entered(pod="b")[0].entered_at <= cut + TTL_S * 1.5 + 2
        a.bus.reconnect()
        await world.quiet()
        check_all(world, "work", ["one"])

    play(story)


def test_nothing_is_entered_from_the_deadline_on():
    """Closes: the pod believes that its session lives until it hears otherwise. Its renewals do not get through here;
    its callbacks stop being entered at 80 % of the TTL, and others enter them only after its session was ended."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=200, step_s=0.3))
        a = await world.start_pod("a", app)
        await world.all_owned()
        for number in range(6):
            await world.publish("work", f"i{number}")
        await world.until(lambda: len(world.history.entries) > 20, "they run")
        await world.start_pod("b", app)
        a.keeper_bus.disconnect()
        renewed = last_renewal(world, a.session)
        old = a.session
        await world.until(lambda: world.history.entered(pod="b"), "b goes on")

        under_old = [entry for entry in world.history.entered(pod="a") if entry.entered_at < renewed + TTL_S]
        assert max(entry.entered_at for entry in under_old) < renewed + DEADLINE_S
        assert max(entry.entered_at for entry in under_old) > renewed + DEADLINE_S - 1, "it stopped too early to tell"
        ended_at = last_renewal(world, old)
        assert world.session_key(old).ended
        assert world.history.entered(pod="b")[0].entered_at >= ended_at >= max(entry.left_at for entry in under_old)
        check_steps(world)

    play(story, account=account(stations=1))


def test_async_callbacks_are_cancelled_at_the_deadline():
    """Closes: a callback entered in time goes on past the TTL, beside the next owner's; or the process has to die of it."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=1, step_s=60))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entries, "it is inside")
        await world.start_pod("b", app)
        a.keeper_bus.disconnect()
        renewed = last_renewal(world, a.session)
        await world.until(lambda: world.history.entered(pod="b"), "b goes on")

        first = world.history.entries[0]
        assert first.left_at is not None
        assert renewed + DEADLINE_S - 0.1 <= first.left_at < renewed + TTL_S - 0.5
        assert a.alive
        assert world.history.most_inside() == 1

    play(story, account=account(stations=1))


def threaded(world: World):
    """A workflow whose one step runs in a thread; on pod `a` it takes very long."""

    class Threaded(Workflow[int, int], name="work"):
        async def run(self, event: WorkflowEvent[int], step: Step) -> int:
            return await step.do("s1", blocking)

    def blocking(ctx: StepContext) -> int:
        with world.history.inside(ctx) as visit:
            work_in_thread(300.0 if visit.pod == "a" else 0.0)
            return 7

    return world.app(Threaded)


def test_a_process_with_a_thread_inside_ends_with_its_session():
    """Closes: a thread cannot be cancelled, so its callback runs on while the next owner enters it."""

    async def story(world: World) -> None:
        app = threaded(world)
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entries, "it is inside")
        await world.start_pod("b", app)
        a.keeper_bus.disconnect()
        renewed = last_renewal(world, a.session)
        await world.until(lambda: not a.alive, "the process has ended itself")

        assert a.exit_code == EXIT_FENCED
        assert world.now <= renewed + TTL_S + 0.5
        await world.until(lambda: world.records(r.Ended), "b goes on")
        assert world.history.entered(pod="b")[0].entered_at >= renewed + TTL_S

    play(story, account=account(stations=1))


def test_a_broker_outage_longer_than_the_ttl_loses_nothing():
    """Closes: every session expires, and every pod takes every other for dead. All open new sessions and go on."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=6, step_s=1))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        sessions = {a.session, b.session}
        ids = [f"i{number}" for number in range(10)]
        for instance in ids:
            await world.publish("work", instance)
        await world.until(lambda: len(world.history.entered(step="s3")) == 10, "all are in the middle")
        world.broker.stop()
        await world.passes(TTL_S * 2)
        world.broker.start()
        await world.until(lambda: len(world.records(r.Ended)) == 10, "all have ended")

        assert {a.session, b.session}.isdisjoint(sessions)
        assert a.alive
        assert b.alive
        await world.quiet()
        check_all(world, "work", ids)

    play(story)


def test_slots_of_a_session_that_its_own_pod_ended_are_granted_again_at_once():
    """Closes: after an outage that cost every session, each pod had left its callbacks and ended its own session, yet the
    Gatekeeper kept the slots of those sessions until a TTL after it had last heard of them."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world, steps=6, step_s=1)))
        await world.all_owned()
        session = a.session
        for number in range(8):
            await world.publish("work", f"i{number}")
        await world.until(lambda: len(world.history.entered(step="s3")) == 8, "all are in the middle")
        await world.until(lambda: last_renewal(world, session) > world.now - 0.1, "it was renewed just now")
        world.broker.stop()
        await world.passes(DEADLINE_S + 0.2)
        world.broker.start()
        back = world.now
        await world.until(lambda: world.history.entered(since=back), "a callback is entered", timeout_s=TTL_S / 10)

        assert world.session_key(session).ended == "lost"
        await world.until(lambda: len(world.records(r.Ended)) == 8, "all have ended")
        assert world.history.most_inside() <= 8

    play(story, account=account(max_concurrent=8))


def test_a_short_broker_outage_costs_no_session():
    """Closes: a restart of the broker within the TTL makes every pod restore."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=6, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        session = a.session
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered(step="s2"), "it is inside s2")
        world.broker.stop()
        await world.passes(TTL_S / 2)
        world.broker.start()
        await world.until(lambda: world.records(r.Ended), "it has ended")

        assert a.session == session
        assert [world.history.times("one", f"s{step}") for step in range(1, 7)] == [1] * 6
        assert len(world.records(r.Claim)) == world.account.stations

    play(story)


@pytest.mark.parametrize("fault", [LOSE_ANSWER, DROP_BEFORE, DELAY])
def test_a_renewal_without_an_answer_does_not_end_the_session(fault):
    """Closes: a lost answer makes the next renewal fail its compare-and-set, and the pod concludes that it is ended. The
    key is read back from the leader first."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        session = a.session
        world.broker.fail_next(subjects.control_session("main", session), fault, times=2, delay_s=2.5)
        await world.passes(3 * TTL_S)

        assert a.session == session
        assert last_renewal(world, session) > world.now - TTL_S / 2
        assert len(world.records(r.Claim)) == world.account.stations

    play(story)


def test_a_renewal_counts_from_when_it_was_sent():
    """Closes: a pod is stopped between sending a renewal and reading its answer, for longer than the TTL. Counted from
    the answer its session would live on: it would commit, enter and answer beside the next owner."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=100, step_s=0.5))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s2"), "it runs")
        b = await world.start_pod("b", app)
        old, before = a.session, last_renewal(world, a.session)
        world.broker._delay_s = (0.1, 0.1)
        await world.until(lambda: last_renewal(world, old) > before, "a renewal has arrived, its answer is on its way")
        a.pause()
        world.broker._delay_s = (0.0001, 0.002)
        await world.until(lambda: world.history.entered("one", pod="b"), "b goes on with the instance")
        a.resume()
        for _ in range(500):
            await world.passes(0.001)
            assert a.session != old or not a.pod.context.session.in_time(), "a's session lives by an answer that is old"

        assert b.alive
        check_chains(world)

    play(story, account=account(stations=1))


def test_nothing_is_entered_by_a_process_that_was_stopped_past_its_session():
    """Closes: a pod is stopped while the acceptance of step s1 is on its way to it, and goes on after its session has
    ended: it reads the acceptance and enters s2, which another pod is inside of already."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s1"), "it is inside s1")
        await world.start_pod("b", app)
        world.broker._delay_s = (0.1, 0.1)
        await world.until(lambda: world.records(r.StepDone), "s1 stands in the journal, its acceptance is on its way")
        a.pause()
        world.broker._delay_s = (0.0001, 0.002)
        await world.until(lambda: world.history.entered("one", "s2", pod="b"), "b is inside s2")
        a.resume()
        resumed = world.now
        await world.until(lambda: world.records(r.Ended), "it has ended")

        assert world.history.entered(pod="a", since=resumed) == []
        assert [world.history.times("one", f"s{step}") for step in (1, 2, 3)] == [1, 1, 1]

    play(story, account=account(stations=1))


def test_a_renewal_whose_key_cannot_be_read_back_concludes_nothing():
    """Closes: a renewal is refused because the answer to the one before was lost, and the leader cannot be asked just
    now: no answer is taken for "somebody ended it"."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        session, control = a.session, subjects.control_stream("main")
        world.broker.fail_next(subjects.control_session("main", session), LOSE_ANSWER)
        await world.until(lambda: not world.broker._faults, "the answer to a renewal is lost")
        world.broker.fail_next(f"$JS.API.STREAM.MSG.GET.{control}", "refuse:10008", times=2)
        await world.until(lambda: not world.broker._faults, "the key could not be read back")
        await world.passes(3 * TTL_S)

        assert a.session == session
        assert last_renewal(world, session) > world.now - TTL_S / 2

    play(story)

    play(story)


def test_a_station_given_up_at_a_deadline_that_a_late_renewal_undid_is_claimed_again():
    """Closes: a renewal sent before the deadline is acknowledged just after it. A commit between the two gives its
    station up; the session lives on, so nobody else may claim it, and its own pod thought it better placed elsewhere:
    the station lay for as long as the session lived."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=600, step_s=0.02))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        loaded, other = (a, b) if len(a.pod.ownership.stations) > len(b.pod.ownership.stations) else (b, a)
        session = loaded.session
        station = next(station for station in sorted(loaded.pod.ownership.stations)
                       if weight(station, other.session) > weight(station, session))
        renewal = subjects.control_session("main", session)
        await world.until(lambda: last_renewal(world, session) > world.now - 0.1, "it was renewed just now")
        world.broker.fail_next(renewal, DROP_BEFORE, times=2)
        world.broker.fail_next(renewal, DELAY, delay_s=DEADLINE_S - 3 * TTL_S / RENEWALS_PER_TTL - 0.1)
        for number in world.ids_at(station, 2):
            await world.publish("work", number)
        await world.until(lambda: not loaded.pod.context.session.in_time(), "the deadline has passed")
        await world.until(lambda: station not in loaded.pod.ownership.stations, "the station is given up", timeout_s=1)
        await world.until(lambda: loaded.pod.context.session.in_time(), "the renewal has come", timeout_s=2)
        await world.all_owned(timeout_s=5)

        assert loaded.session == session
        await world.until(lambda: len(world.records(r.Ended)) == 2, "both have ended")
        check_chains(world)
        check_steps(world)

    play(story, account=account(stations=7))


# -- rule 8: ended by one compare-and-set ------------------------------------------------------------------------------

def test_a_dead_pods_stations_go_on_within_the_ttl_and_two_seconds():
    """Closes: instances of a killed pod wait longer than its session; nothing of it is claimed before its session was
    ended by a compare-and-set on its key."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=4, step_s=1))
        a, b = await world.start_pod("a", app), await world.start_pod("b", app)
        await world.spread_over(a, b)
        ids = [f"i{number}" for number in range(12)]
        for instance in ids:
            await world.publish("work", instance)
        await world.until(lambda: len(world.history.entered(step="s2")) == 12, "all are inside s2")
        a.kill()
        killed = world.now
        await world.all_owned(timeout_s=TTL_S + 2)
        assert last_renewal(world, a.session) <= world.now, "its key was written again: it was ended"

        key = world.session_key(a.session)
        assert (key.ended, key.ended_by) == ("expired", b.session)
        ended_at = last_renewal(world, a.session)
        claims = [claim for claim in world.records(r.Claim) if claim.session == b.session]
        late = [claim for claim in claims if claim.at > world.broker_ms(killed)]
        assert late
        assert all(claim.at >= world.broker_ms(ended_at) - 5 for claim in late)
        await world.until(lambda: len(world.records(r.Ended)) == 12, "all have ended")
        check_all(world, "work", ids)

    play(story)


def test_only_one_of_many_ends_a_session():
    """Closes: two find the expiry, both act on their own: the later one ends what the earlier one has built on."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        a.kill()
        bus = world.bus()
        await world.until(lambda: world.session_key(a.session) is None, "its key has expired")
        results = await asyncio.gather(*(
            end_session(bus, "main", a.session, reason="expired", by=f"p{number}") for number in range(6)))

        assert len({result.ended_by for result in results}) == 1
        assert world.session_key(a.session).ended_by == results[0].ended_by

    play(story)


def test_a_living_session_is_not_ended_by_others():
    """Closes: a slow watcher takes a key for expired that was just renewed."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()

        assert await end_session(world.bus(), "main", a.session, reason="expired", by="x") is None
        assert world.session_key(a.session).ended == ""

    play(story)


def test_a_renewal_after_the_end_is_refused():
    """Closes: a pod that was stopped past its TTL revives its ended session by its next renewal."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.start_pod("b", app)
        old = a.session
        a.pause()
        await world.until(lambda: world.session_key(old) is not None and world.session_key(old).ended == "expired",
                          "b has ended it")
        a.resume()
        await world.until(lambda: a.session != old, "a has another session")
        await world.passes(TTL_S)

        assert world.session_key(old).ended == "expired"
        check_chains(world)

    play(story)


def test_a_renewal_that_arrives_after_the_end_is_refused():
    """Closes: renewals hang in the network until the session was given up and ended; then they arrive, and the key says
    again that it lives: a session of nobody, to which stations and slots go."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world)))
        await world.all_owned()
        old = a.session
        world.broker.fail_next(subjects.control_session("main", old), DELAY, times=3, delay_s=TTL_S * 3)
        await world.until(lambda: a.session != old, "a has another session")
        assert world.session_key(old).ended
        assert not world.broker._faults, "the story needs renewals that are still under way"
        await world.passes(TTL_S * 3)

        assert world.session_key(old).ended
        check_chains(world)

    play(story)


def test_a_key_that_others_have_ended_is_not_written_again():
    """Closes: a's clock is slow, so it believes that it lives when its session has expired and was ended. Its renewal is
    refused; the key, read back, belongs to nobody any more: renewing above it would revive a session that was buried."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        a = await world.start_pod("a", app, rate=0.3)
        await world.all_owned()
        await world.start_pod("b", app)
        old = a.session
        a.keeper_bus.disconnect()
        await world.until(lambda: (key := world.session_key(old)) and key.ended, "b has ended the session of a")
        assert a.pod.context.session.in_time(), "the story needs a pod that believes it lives"
        a.keeper_bus.reconnect()
        await world.until(lambda: a.session != old, "a has another session")
        await world.passes(TTL_S)

        assert world.session_key(old).ended == "expired"
        check_chains(world)

    play(story)


def test_a_restarted_pod_ends_its_dead_session_at_once():
    """Closes: a pod that was killed and started again waits out its own TTL. Its directory's lock proves the death."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=3, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered(step="s2"), "it is inside s2")
        a.kill()
        killed = world.now
        again = await world.start_pod("a", app)
        await world.all_owned()

        assert world.now - killed < 2
        assert world.session_key(a.session).ended == "dead"
        await world.until(lambda: world.records(r.Ended), "it has ended")
        assert again.alive
        assert [world.history.times("one", step) for step in ("s1", "s2", "s3")] == [1, 2, 1]

    play(story)


# -- rule 24: answers --------------------------------------------------------------------------------------------------

async def ask(world: World, instance: str, operation: str = "status", *, timeout_s: float = 1.0) -> Answer:
    request = encode(InstanceRequest("work", instance), json=False)
    subject = subjects.station_request("main", world.station_of(instance), operation)
    reply = await world.bus().request(subject, request, timeout_s=timeout_s)
    return msgspec.msgpack.decode(reply.data, type=Answer)


def test_answers_carry_the_epoch_of_their_owner():
    """Closes: a client cannot tell the answers of two owners apart."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entries, "it runs")
        first = await ask(world, "one")
        a.kill()
        await world.start_pod("b", app)
        await world.all_owned()
        second = await ask(world, "one")

        assert (first.code, first.epoch) == ("ok", 1)
        assert (second.code, second.epoch) == ("ok", 2)
        assert (await ask(world, "two")).code == "not_found"

    play(story)


def test_no_answer_leaves_past_the_deadline():
    """Closes: an owner that cannot renew says "running" or "not found" while another already runs its station."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world, steps=1, step_s=60)), rate=1.0)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entries, "it runs")
        a.keeper_bus.disconnect()
        renewed = last_renewal(world, a.session)
        client = world.client()
        await world.until(lambda: world.now > renewed + DEADLINE_S + 0.1, "the deadline has passed")
        with pytest.raises(OwnerAway):
            await client.handle("work", "one").status(timeout="1 second")

    play(story)


def test_a_request_that_lay_before_a_stopped_pod_is_not_answered():
    """Closes: a pod is stopped with a request at its door, and goes on after its session has ended: it says "running", as
    it remembers, of an instance that another pod has brought to its end."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, steps=2, step_s=1))
        a = await world.start_pod("a", app)
        await world.all_owned()
        await world.publish("work", "one")
        await world.until(lambda: world.history.entered("one", "s1"), "it is inside s1")
        await world.start_pod("b", app)
        a.pause()
        asking = asyncio.ensure_future(ask(world, "one", timeout_s=TTL_S * 3))
        await world.until(lambda: world.records(r.Ended), "b has brought it to its end")
        a.resume()

        with pytest.raises(BusTimeout):
            await asking

    play(story, account=account(stations=1))


def test_a_client_believes_no_lower_epoch():
    """Closes: an answer that an old owner gave, or gives, arrives after a newer one."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        await world.start_pod("a", app, ttl_s=None)
        await world.all_owned()
        client = world.client()
        handle = await client.create("work", 7, id="one")
        assert await handle.result() == 7
        world.nodes[0].kill()
        await world.start_pod("b", app)
        await world.all_owned()
        assert (await handle.status()).status == "complete"

        impostor = world.bus()
        stale = encode(Answer(1, "not_found"), json=False)
        station = world.station_of("one")
        world.living[0].kill()
        await impostor.subscribe(subjects.station_request("main", station, "*"),
                                 lambda message: impostor.respond(message, stale))
        with pytest.raises(OwnerAway):
            await handle.status(timeout="2 seconds")

    play(story, account=account(stations=2))


def test_sigterm_before_the_first_session_ends_at_once():
    """Closes: the broker does not answer while the pod starts, and SIGTERM waits until it does."""

    async def story(world: World) -> None:
        await world.ensure_account()
        world.broker.fail_next("toque.main.control.session.>", DROP_BEFORE, times=1_000)
        starting = asyncio.ensure_future(world.start_pod("a", world.app(steps_workflow(world))))
        await world.passes(3)
        asked = world.now
        await world.nodes[0].stop()
        starting.cancel()

        assert world.now - asked < 1
        assert world.nodes[0].exit_code == 0

    play(story)


def test_a_pod_warns_of_another_of_its_name(caplog):
    """A pod name is for one pod: two of them look like one in every report. It is told once, and not of one's own."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world))
        await world.start_pod("a", app)
        await world.all_owned()
        assert "of this pod's name" not in caplog.text
        world.disks.pop("a")
        world.nodes[0].name = "first a"
        await world.start_pod("a", app)
        await world.passes(TTL_S)

        assert caplog.text.count("of this pod's name") == 2  # each of the other

    play(story)
