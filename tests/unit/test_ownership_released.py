"""A released station waits two seconds for its named successor: from the release on, whoever looks at it and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from toque.sim.loop import run
from toque.storage import records as r
from toque.storage.journal import Tail
from toque.workers.ownership import RELEASED_ANYONE_S, Ownership

RELEASED_AT_MS = 1_000_000
STATION: Any = "1.4"


def looks_at(*, after_ms: int, successor_lives: bool) -> bool:
    """Whether a pod that sees the station for the first time, so long after its release, may claim it."""

    async def main() -> bool:
        sessions = {"successor": SimpleNamespace(live=successor_lives)}
        context: Any = SimpleNamespace(
            session=SimpleNamespace(id="me"), control=SimpleNamespace(sessions=sessions),
            broker_time=SimpleNamespace(now_ms=lambda: RELEASED_AT_MS + after_ms))
        ownership = Ownership(context, on_change=lambda: None, on_station=lambda station: None,
                              on_gone=lambda station: None, on_halted=lambda error: None)
        released = r.Released(0, 0, 0, RELEASED_AT_MS, "successor")
        tail = Tail(r.Position(9, r.GroupHeader(3, "former", 7, 0)), "", released)
        return await ownership._may_claim(STATION, tail)

    return run(main(), seed=1)


def test_a_pod_that_comes_late_does_not_begin_the_wait_anew() -> None:
    """A successor that lives and does not claim costs two seconds once, not two for each pod that joins meanwhile."""
    assert looks_at(after_ms=int(RELEASED_ANYONE_S * 1000), successor_lives=True)


def test_a_living_successor_has_two_seconds() -> None:
    """Within them nobody else takes the station."""
    assert not looks_at(after_ms=int(RELEASED_ANYONE_S * 1000) - 1, successor_lives=True)


def test_a_dead_successor_is_not_waited_for() -> None:
    """Its session is ended, so anybody may claim at once."""
    assert looks_at(after_ms=0, successor_lives=False)
