"""How the Gatekeeper shares the slots out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from toque.workers.gatekeeper import Appetite, share

appetites = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.integers(0, 100), st.integers(0, 100)).map(lambda pair: Appetite(pair[0], pair[0] + pair[1])))


@given(limit=st.integers(0, 300), appetites=appetites)
def test_shares_never_exceed_the_limit_nor_a_wish(limit: int, appetites: dict[str, Appetite]) -> None:
    """L1 on paper: the sum is within the limit, and nobody gets more than it wants."""
    shares = share(limit, appetites)

    assert sum(shares.values()) <= limit
    assert all(0 <= shares[name] <= appetites[name].wanted for name in appetites)


@given(limit=st.integers(0, 300), appetites=appetites)
def test_no_slot_is_kept_back_while_one_is_wanted(limit: int, appetites: dict[str, Appetite]) -> None:
    """L3: work-conserving; and what is needed comes before what is only spare."""
    shares = share(limit, appetites)

    wanted = sum(appetite.wanted for appetite in appetites.values())
    assert sum(shares.values()) == min(limit, wanted)
    starving = any(shares[name] < appetite.demand for name, appetite in appetites.items())
    spoilt = any(shares[name] > appetite.demand for name, appetite in appetites.items())
    assert not (starving and spoilt)


@given(limit=st.integers(0, 300), appetites=appetites)
def test_shares_are_max_min_fair(limit: int, appetites: dict[str, Appetite]) -> None:
    """Nobody's need is cut while another, less cut, has more than one slot above it."""
    shares = share(limit, appetites)

    for name, appetite in appetites.items():
        if shares[name] < appetite.demand:
            assert all(min(shares[other], appetites[other].demand) <= shares[name] + 1 for other in appetites)
