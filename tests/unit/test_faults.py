"""The schedule of faults that a seed makes."""

from __future__ import annotations

import random

import pytest

from toque.chaos.catalog import SCENARIOS
from toque.chaos.faults import LASTS_TTLS, OF_SERVER, Kind, Recipe, schedule

TTL_S = 3.0


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda scenario: scenario.name)
def test_the_same_seed_makes_the_same_faults(scenario):
    """A run repeats from its seed; another seed makes another run."""
    first, again, other = (schedule(scenario.recipe, count=20, seed=seed, ttl_s=TTL_S) for seed in (7, 7, 8))

    assert first == again
    assert first != other


def test_each_kind_comes_about_equally_often():
    """No kind is left out by chance."""
    recipe = SCENARIOS["slow-and-cut-links"].recipe

    kinds = [fault.kind for fault in schedule(recipe, count=10, seed=1, ttl_s=TTL_S)]

    assert {kinds.count(kind) for kind in recipe.kinds} == {2, 3}


@pytest.mark.parametrize("seed", range(20))
def test_the_owner_of_station_zero_is_hit_at_least_once(seed):
    """It is the Gatekeeper, too: its loss is another fault than any pod's. A server has no stations."""
    kills = schedule(Recipe([Kind.KILL_POD]), count=5, seed=seed, ttl_s=TTL_S)
    restarts = schedule(Recipe(sorted(OF_SERVER)), count=5, seed=seed, ttl_s=TTL_S)

    assert any(fault.owner_of_zero for fault in kills)
    assert not any(fault.owner_of_zero for fault in restarts)


@pytest.mark.parametrize("kind", Kind)
def test_a_fault_lasts_as_long_as_its_kind_may(kind):
    """Within the bounds of LASTS_TTLS, in TTLs; a moment for those that have none."""
    low, high = LASTS_TTLS.get(kind, (0.0, 0.0))

    lasting = [fault.lasts_s for seed in range(50) for fault in schedule(Recipe([kind]), count=2, seed=seed, ttl_s=TTL_S)]

    assert min(lasting) >= low * TTL_S - 0.01
    assert max(lasting) <= high * TTL_S + 0.01
    assert len(set(lasting)) > 50 or high == 0


def test_a_schedule_does_not_touch_the_global_source_of_chance():
    """Two runs side by side do not disturb each other's choices."""
    random.seed(5)
    expected = random.random()
    random.seed(5)

    schedule(Recipe([Kind.KILL_POD]), count=9, seed=1, ttl_s=TTL_S)

    assert random.random() == expected
