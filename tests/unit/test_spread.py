"""Where stations should be."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from toque._subjects import StationId
from toque.workers.spread import spread

STATIONS = [StationId(1, number) for number in range(8)]
pods = st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True)
owners = st.dictionaries(st.sampled_from(STATIONS), st.sampled_from("abcdefghxyz"))


@given(pods=pods, owners=owners)
def test_loads_differ_by_one_at_most(pods: list[str], owners: dict[StationId, str]) -> None:
    """Every station has a pod that lives, and no pod has two more than another."""
    wanted = spread(STATIONS, pods, owners)

    loads = Counter({pod: 0 for pod in pods})
    loads.update(wanted.values())
    assert set(wanted) == set(STATIONS)
    assert set(loads) == set(pods)
    assert max(loads.values()) - min(loads.values()) <= 1


@given(pods=pods, owners=owners)
def test_what_is_spread_stays_where_it_is(pods: list[str], owners: dict[StationId, str]) -> None:
    """No needless moves: asking again with the result as the owners changes nothing."""
    wanted = spread(STATIONS, pods, owners)

    assert spread(STATIONS, pods, wanted) == wanted


@given(pods=st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True))
def test_a_new_pod_only_takes(pods: list[str]) -> None:
    """When a pod comes, stations move to it and to nobody else."""
    before = spread(STATIONS, pods, {})

    after = spread(STATIONS, [*pods, "z"], before)

    assert all(after[station] in (before[station], "z") for station in STATIONS)


def test_nobody_is_there() -> None:
    """Without pods nothing is wanted."""
    assert spread(STATIONS, [], {}) == {}
