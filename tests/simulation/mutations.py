"""Removes one rule of the protocol at a time, and tells how many seeds a sweep takes to catch it. A tool, not a test.

    PYTHONPATH=src python tests/simulation/mutations.py [--seeds 300]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

from toque.sim.draw import draw_plan
from toque.sim.sweep import play_result, quiet
from toque.storage.journal import Deposed, Journal
from toque.workers.attempts import Attempts
from toque.workers.gatekeeper import Gatekeeper
from toque.workers.station import Station

ENTER = Attempts.enter
Mutation = Callable[[], AbstractContextManager[object]]


async def _deposed_by_any_refusal(self, station, header, may_send):
    """10071 is taken for "somebody else has it", without a look at the leader's last message."""
    raise Deposed(f"station {station}: refused")



def _drops_nothing(self, error):
    """A deposed owner goes on with what it has in memory."""


def _enters_at_once(self):
    """Callbacks are entered though earlier records of the instance are only pending."""
    engine, unaccepted = self.engine, self.engine.unaccepted
    engine.unaccepted = 0
    try:
        ENTER(self)
    finally:
        engine.unaccepted += unaccepted


def _frees_at_once(self, session):
    seen = self._control.sessions.get(session)
    return seen is None or seen.record is None or bool(seen.record.ended)


def _knows_nobody(self, workflow, instance_id):
    """A new owner admits whatever lies in the queue."""
    return (workflow, instance_id) in self.by_id


MUTATIONS: dict[str, Mutation] = {
    "2: the leader's last message is read after 10071":
        lambda: mock.patch.object(Journal, "_resolve", _deposed_by_any_refusal),
    "7: the deadline is read directly before a callback is entered":
        lambda: mock.patch.object(Station, "in_time", lambda self: not self.closed),
    "2: a deposed owner drops what it has in memory":
        lambda: mock.patch.object(Station, "_commits_lost", _drops_nothing),
    "9: the Gatekeeper waits a TTL before it grants a dead session's slots again":
        lambda: mock.patch.object(Gatekeeper, "_may_free", _frees_at_once),
    "18: a callback is entered after all earlier records of its instance are accepted":
        lambda: mock.patch.object(Attempts, "enter", _enters_at_once),
    "11: a new owner drops the ids that its journal knows":
        lambda: mock.patch.object(Station, "knows", _knows_nobody),
}


def caught_at(mutation: Mutation, seeds: int) -> tuple[int, str]:
    """The first seed that a mutation breaks, and what; 0 when none does."""
    with mutation():
        for seed in range(1, seeds + 1):
            result = play_result(draw_plan(seed))
            if result.broken:
                return seed, ", ".join(result.broken)
    return 0, f"not in {seeds} seeds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=300)
    options = parser.parse_args()
    quiet()
    print("| rule removed | seeds until caught | broken |\n|---|---|---|")
    for rule, mutation in MUTATIONS.items():
        seed, broken = caught_at(mutation, options.seeds)
        print(f"| {rule} | {seed or '—'} | {broken} |", flush=True)


if __name__ == "__main__":
    main()
