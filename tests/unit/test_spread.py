"""Spread: which pod should have which station. Loads differ by one at most, and nothing moves without need."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from toque._subjects import StationId
from toque.workers.spread import spread

PODS = st.sets(st.sampled_from([f"pod-{letter}" for letter in "abcdefg"]), min_size=1)


@st.composite
def places(draw):
    """Stations, the pods that may have them, and who has them now: some are nobody's, some a pod's that is gone."""
    stations = [StationId(1, number) for number in range(draw(st.integers(1, 20)))]
    pods = draw(PODS)
    anyone = st.sampled_from(sorted(pods | {"gone-1", "gone-2"}))
    owners = draw(st.dictionaries(st.sampled_from(stations), anyone))
    return stations, pods, owners


def loads(wanted, pods):
    counted = Counter(wanted.values())
    return [counted[pod] for pod in pods]


@given(places())
def test_every_station_has_a_pod_and_the_loads_are_even(place):
    """Two pods differ by one station at most, so none has more than its ceiling share."""
    stations, pods, owners = place

    wanted = spread(stations, pods, owners)

    assert set(wanted) == set(stations)
    assert set(wanted.values()) <= pods
    assert max(loads(wanted, pods)) - min(loads(wanted, pods)) <= 1


@given(places())
def test_no_station_moves_without_need(place):
    """As many stay where they are as an even spread allows."""
    stations, pods, owners = place
    living = {station: pod for station, pod in owners.items() if pod in pods}

    wanted = spread(stations, pods, owners)

    moves = sum(wanted[station] != pod for station, pod in living.items())
    assert moves == fewest_moves(len(stations), Counter(living.values()), len(pods))


def fewest_moves(stations, held, pods):
    """What must move: what a pod holds above the even load. So many pods may have one station more."""
    base, more = divmod(stations, pods)
    counts = sorted(held.values(), reverse=True)
    return sum(max(0, count - (base + (1 if place < more else 0))) for place, count in enumerate(counts))


@given(places())
def test_an_even_spread_is_left_alone(place):
    """Computed again from its own result it changes nothing: pods that see the same do not push stations around."""
    stations, pods, owners = place
    wanted = spread(stations, pods, owners)

    assert spread(stations, pods, wanted) == wanted


@given(places(), st.randoms())
def test_all_pods_compute_the_same(place, random):
    """The order in which a pod heard of the others does not matter."""
    stations, pods, owners = place
    shuffled, named, mixed = list(stations), list(pods), list(owners.items())
    for it in (shuffled, named, mixed):
        random.shuffle(it)

    assert spread(shuffled, named, dict(mixed)) == spread(stations, pods, owners)


def test_without_pods_nobody_gets_anything():
    """No pod that may have a station: nothing to do."""
    assert spread([StationId(1, 0)], [], {}) == {}


def test_a_pod_that_joins_takes_its_share_only():
    """8 stations at one pod: four move."""
    stations = [StationId(1, number) for number in range(8)]

    wanted = spread(stations, ["a", "b"], dict.fromkeys(stations, "a"))

    assert Counter(wanted.values()) == {"a": 4, "b": 4}
