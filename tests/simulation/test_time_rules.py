"""Broker time: timers are never early, and unknown time fires nothing (protocol rule 10)."""

from __future__ import annotations

import pytest

from toque import _subjects as subjects
from toque.sim.world import World, account, play, sleeper_workflow
from toque.storage import records as r
from toque.storage.memory_broker import DELAY

# -- rule 10: broker time ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("skew_s", "rate"), [(86_400.0, 1.0), (-500.0, 1.0004), (0.0, 0.9996)])
def test_a_timer_is_never_early_whatever_the_pods_clock_says(skew_s, rate):
    """Closes: due times are the broker's; a pod whose clock is off or runs fast would fire before them."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(sleeper_workflow(world, nap="30 seconds")), skew_s=skew_s, rate=rate)
        await world.all_owned()
        await world.publish("nap", "one")
        await world.until(lambda: world.records(r.Ended), "it has ended", timeout_s=60)

        due = world.records(r.SleepStarted)[0].due
        woken = world.broker_ms(world.history.entered("one", "after")[0].entered_at)
        assert due <= woken < due + 2_000
        assert world.records(r.SleepDone)[0].at >= due
        assert a.alive

    play(story)


def test_timers_do_not_fire_while_broker_time_is_unknown():
    """Closes: a pod that cannot bound broker time to 0.5 s fires by guess. It waits until it can."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(sleeper_workflow(world, nap="20 seconds")))
        await world.all_owned()
        await world.publish("nap", "one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        info = f"$JS.API.STREAM.INFO.{subjects.journal_stream('main')}"
        world.broker.fail_next(info, DELAY, times=40, delay_s=0.9)
        await world.until(lambda: not a.pod.context.broker_time.ready, "broker time is not known")
        await world.until(lambda: world.now > 1_000 + 24, "it is due")
        unknown = not a.pod.context.broker_time.ready
        assert world.history.times("one", "after") == 0

        await world.until(lambda: world.records(r.Ended), "it has ended", timeout_s=100)
        assert unknown

    play(story)


def test_timers_of_what_cannot_run_here_hide_no_others(monkeypatch):
    """Closes: more sleepers of a workflow that the pod does not have are due than one look at the timers brings up: those
    behind them are never seen, and sleep for ever."""
    monkeypatch.setattr("toque.workers.station.TIMERS_PER_SCAN", 3)

    async def story(world: World) -> None:
        kept = sleeper_workflow(world, "kept", nap="25 seconds")
        a = await world.start_pod("a", world.app(sleeper_workflow(world, "gone", nap="20 seconds"), kept))
        await world.all_owned()
        for number in range(4):
            await world.publish("gone", f"gone{number}")
        await world.publish("kept", "one")
        await world.until(lambda: len(world.records(r.SleepStarted)) == 5, "all are asleep")
        due = max(record.due for record in world.records(r.SleepStarted))
        await a.stop()
        await world.start_pod("a", world.app(kept))
        await world.until(lambda: world.records(r.Ended), "the one that can run has ended")

        assert world.records(r.SleepDone)[0].at <= due + 1000

    play(story, account=account(stations=1))

    play(story)


def test_a_near_wait_does_not_end_while_broker_time_is_unknown():
    """Closes: a wait of less than a second stays in memory, with its slot, and ends by the pod's own clock."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(sleeper_workflow(world, nap="0.1 seconds", step_s=14)))
        await world.all_owned()
        await world.publish("nap", "one")
        await world.until(lambda: world.history.entered("one", "before"), "it is inside")
        info = f"$JS.API.STREAM.INFO.{subjects.journal_stream('main')}"
        world.broker.fail_next(info, DELAY, times=40, delay_s=0.6)
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        assert not world.records(r.SleepStarted)[0].idle, "the story needs a wait that is near"
        await world.passes(3)
        assert not a.pod.context.broker_time.ready, "the story needs a pod that does not know broker time"
        assert not world.records(r.SleepDone)

        await world.until(lambda: world.records(r.Ended), "it has ended", timeout_s=100)

    play(story)


def test_a_server_clock_that_jumps_forward_only_hurries():
    """Closes: stored times mixed with the pod's own. A jump of the server's clock moves all due times alike."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(sleeper_workflow(world, nap="1 hour")))
        await world.all_owned()
        await world.publish("nap", "one")
        await world.until(lambda: world.records(r.SleepStarted), "it sleeps")
        world.broker.epoch_ms += 3_600_000
        await world.until(lambda: world.records(r.Ended), "it has ended", timeout_s=30)

        assert world.records(r.SleepDone)[0].at >= world.records(r.SleepStarted)[0].due

    play(story)
