"""The way of one instance, and what happens to it when a pod, a session or an answer is lost. One story per promise."""

from __future__ import annotations

import asyncio

import pytest

from toque import _subjects as subjects
from toque.errors import InstanceExists
from toque.sim.checks import check_chains
from toque.sim.world import World, account, play, sleeper_workflow, steps_workflow
from toque.storage import records as r

SEEDS = [1, 2, 3]


@pytest.mark.parametrize("seed", SEEDS)
def test_an_instance_goes_the_whole_way(seed: int) -> None:
    """Created, queued, leased, run, checkpointed, complete: each callback once, and nothing stays in memory."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, "work", steps=3)))
        await world.all_owned()

        handle = await world.client().create("work", 7, id="one")

        assert await handle.result() == 7
        assert [entry.step for entry in world.history.entered("one")] == ["s1", "s2", "s3"]
        await world.quiet()

    play(story, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_pods_instances_go_on_elsewhere(seed: int) -> None:
    """E1: after kill -9 another pod goes on behind the last checkpoint, within the TTL and 2 s, and records the cut."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, "work", steps=3, step_s=1.0))
        a = await world.start_pod("a", app)
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        await world.until(lambda: world.history.entered("one", "s2"), "step s2 was entered")
        b = await world.start_pod("b", app, ttl_s=world.account.ttl_s)
        await world.spread_over(a, b)
        owner = world.owner(world.station_of("one"))
        await world.until(lambda: world.history.entered("one", pod=owner.name), "the owner is inside")

        owner.kill()
        killed_at = world.now

        assert await handle.result() == 7
        assert world.history.times("one", "s1") == 1
        again = [entry for entry in world.history.entered("one", since=killed_at) if entry.pod != owner.name]
        assert again and again[0].entered_at - killed_at <= world.account.ttl_s + 2
        assert world.records(r.Interrupted)
        check_chains(world)

    play(story, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_limit_holds_while_station_zeros_owner_dies(seed: int) -> None:
    """L1: never more instances inside callbacks than the account's limit, over the loss of the Gatekeeper too."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, "work", steps=2, step_s=0.5))
        nodes = [await world.start_pod(name, app) for name in ("a", "b")]
        await world.spread_over(*nodes)
        client = world.client()
        handles = [await client.create("work", number, id=f"i{number}") for number in range(24)]
        await world.until(lambda: len(world.history.entries) > 4, "some have begun")

        world.owner(world.stations()[0]).kill()

        assert [await handle.result() for handle in handles] == list(range(24))
        assert world.history.most_inside() <= 3
        await world.quiet()

    play(story, seed=seed, account=account(max_concurrent=3))


def test_a_hand_over_repeats_no_completed_step() -> None:
    """SIGTERM: what runs is finished, every station is released, and the other pod goes on without an interruption."""

    async def story(world: World) -> None:
        app = world.app(steps_workflow(world, "work", steps=4, step_s=0.5))
        a = await world.start_pod("a", app)
        await world.all_owned()
        client = world.client()
        handles = [await client.create("work", number, id=f"i{number}") for number in range(8)]
        await world.until(lambda: len(world.history.entries) >= 8, "all have begun")
        await world.start_pod("b", app)

        await a.stop()

        assert [await handle.result() for handle in handles] == list(range(8))
        assert all(world.history.times(f"i{number}", f"s{step}") == 1 for number in range(8) for step in range(1, 5))
        assert not world.records(r.Interrupted)
        check_chains(world)

    play(story)


def test_a_lost_journal_answer_is_no_second_group() -> None:
    """Rule 2: an append whose answer was lost is sent again as the same bytes, and accepted once."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, "work", steps=2)))
        await world.all_owned()
        station = world.station_of("one")
        world.broker.fail_next(subjects.journal(world.account.name, station), "execute then lose the answer")

        handle = await world.client().create("work", 7, id="one")

        assert await handle.result(timeout="30 seconds") == 7
        assert [len(world.history.entered("one", step)) for step in ("s1", "s2")] == [1, 1]
        check_chains(world)

    play(story)


def test_a_refused_append_is_kept_and_nothing_is_entered_meanwhile() -> None:
    """Rules 2 and 26: while the journal refuses writes no callback is entered; the group is sent again until it is in."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world, "work", steps=1)))
        await world.all_owned()
        subject = subjects.journal(world.account.name, world.station_of("one"))
        world.broker.fail_next(subject, "refuse:10023", times=5)

        handle = await world.client().create("work", 7, id="one")
        await world.until(lambda: a.pod.context.journal.trouble, "the pod says that the journal refuses")

        assert not world.history.entries
        assert await handle.result(timeout="30 seconds") == 7
        assert a.pod.context.journal.trouble == ""

    play(story)


def test_one_id_runs_once_however_often_it_is_created() -> None:
    """C2: while queued, while running and after its end a second creation of an id changes nothing."""

    async def story(world: World) -> None:
        await world.start_pod("a", world.app(steps_workflow(world, "work")))
        await world.all_owned()
        client = world.client()
        first = await client.create("work", 7, id="one")

        for _ in range(2):
            with pytest.raises(InstanceExists):
                await client.create("work", 8, id="one")
            assert await first.result() == 7
            await world.passes(5)  # the message has left the queue by now: only the index knows the id

        assert world.history.times("one", "s1") == 1
        assert len(world.records(r.Admitted)) == 1

    play(story)


@pytest.mark.parametrize("seed", SEEDS)
def test_sleepers_hold_no_slot_and_wake_on_time(seed: int) -> None:
    """L4 and E5: under a limit of 1 twenty instances sleep at the same time, over the death of their pod too."""

    async def story(world: World) -> None:
        app = world.app(sleeper_workflow(world, "nap", nap="1 minute"))
        await world.start_pod("a", app)
        await world.all_owned()
        client = world.client()
        begun = world.now
        handles = [await client.create("nap", number, id=f"i{number}") for number in range(20)]
        await world.until(lambda: len(world.history.entered(step="before")) == 20, "all have begun")

        world.living[0].kill()
        await world.start_pod("b", app)

        await asyncio.gather(*(handle.result(timeout="10 minutes") for handle in handles))
        assert min(entry.entered_at for entry in world.history.entered(step="after")) >= begun + 60
        assert world.now <= begun + 60 + 30
        assert world.history.most_inside() <= 1

    play(story, seed=seed, account=account(max_concurrent=1))


def test_a_pod_cut_off_gives_up_and_comes_back() -> None:
    """Rule 7: without its server a pod enters nothing past its deadline; with it again it claims and goes on."""

    async def story(world: World) -> None:
        a = await world.start_pod("a", world.app(steps_workflow(world, "work", steps=30, step_s=1.0)))
        await world.all_owned()
        handle = await world.client().create("work", 7, id="one")
        await world.until(lambda: world.history.entered("one", "s3"), "step s3 was entered")

        a.bus.disconnect()
        a.keeper_bus.disconnect()
        cut_at = world.now
        await world.passes(4 * world.account.ttl_s)
        late = [entry for entry in world.history.entries if entry.entered_at > cut_at + world.account.ttl_s]
        a.bus.reconnect()
        a.keeper_bus.reconnect()

        assert not late
        assert await handle.result(timeout="2 minutes") == 7
        check_chains(world)

    play(story)
