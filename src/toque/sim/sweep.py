"""Plays many seeds, in several processes, and makes the plans that failed smaller."""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import msgspec

from toque.errors import ToqueError
from toque.sim import verdicts
from toque.sim.draw import draw_plan
from toque.sim.plan import Fault, Plan
from toque.sim.play import Outcome, play_plan

CHUNK: Final = 5  # seeds that a process takes at once
CRASHED: Final = "crashed"  # the verdict on a plan that could not be played to its end


@dataclass
class Result:
    """What came of one seed, small enough to be sent between processes."""

    seed: int
    digest: str = ""
    broken: tuple[str, ...] = ()  # ids of verdicts
    told: str = ""  # for people
    counts: Counter[str] = field(default_factory=Counter)


def quiet() -> None:
    """Log nothing, for a sweep's pods have much to warn of."""
    logging.disable(logging.CRITICAL)


def play_seed(seed: int) -> Result:
    """Play the seed's own plan."""
    return play_result(draw_plan(seed))


def play_result(plan: Plan) -> Result:
    """Play a plan; a simulator that fails on it is a result too."""
    try:
        outcome = play_plan(plan)
    except (ToqueError, AssertionError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        return Result(plan.seed, "", (CRASHED,), f"  {CRASHED}: {type(error).__name__}: {error}")
    return result_of(outcome)


def result_of(outcome: Outcome) -> Result:
    broken = outcome.broken
    return Result(outcome.plan.seed, outcome.digest, tuple(verdict.id for verdict in broken),
                  verdicts.describe(broken), outcome.counts)


def play_chunk(seeds: list[int], play: Callable[[int], Result] = play_seed) -> list[Result]:
    """Play some seeds. Garbage is collected after the last only: a run makes many objects and little garbage."""
    quiet()
    gc.freeze()  # what there is before stays
    gc.disable()
    try:
        return [play(seed) for seed in seeds]
    finally:
        gc.enable()
        gc.collect()


def sweep(seeds: Iterable[int], *, jobs: int, play: Callable[[int], Result] = play_seed) -> Iterator[Result]:
    """Play the seeds, `jobs` at a time; results come in the order of the seeds. `play` is a module's function."""
    wanted = list(seeds)
    chunks = [wanted[start:start + CHUNK] for start in range(0, len(wanted), CHUNK)]
    if jobs == 1:
        for chunk in chunks:
            yield from play_chunk(chunk, play)
        return
    with ProcessPoolExecutor(jobs) as pool:
        for results in pool.map(partial(play_chunk, play=play), chunks):
            yield from results


@dataclass
class Summary:
    """A whole sweep."""

    seeds: int = 0
    seconds: float = 0.0
    failed: list[Result] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def unseen(self) -> list[str]:
        """What should have happened somewhere, and did not."""
        return verdicts.unseen(self.counts)


def summarise(results: Iterable[Result], on_failure: Callable[[Result], None] = lambda result: None) -> Summary:
    """Take all results; failures are told as they come."""
    summary = Summary()
    began = time.monotonic()
    for result in results:
        summary.seeds += 1
        summary.counts.update(result.counts)
        if result.broken:
            summary.failed.append(result)
            on_failure(result)
    summary.seconds = time.monotonic() - began
    return summary


# -- shrinking ---------------------------------------------------------------------------------------------------------

def shrink(plan: Plan, *, on_step: Callable[[Plan], None] = lambda plan: None) -> Plan:
    """The smallest plan found, by leaving faults out, that still breaks one of the verdicts that this one breaks.

    Delta debugging: halves are left out first, then smaller and smaller parts, in the end single faults. Returns the
    plan as it is when it breaks nothing.
    """
    wanted = set(play_result(plan).broken)
    parts = 2
    while wanted and plan.faults:
        parts = min(parts, len(plan.faults))
        smaller = _smaller(plan, parts, wanted)
        if smaller is not None:
            plan, parts = smaller, max(2, parts - 1)
            on_step(plan)
        elif parts == len(plan.faults):
            break
        else:
            parts *= 2
    return plan


def _smaller(plan: Plan, parts: int, wanted: set[str]) -> Plan | None:
    for part in range(parts):
        low, high = len(plan.faults) * part // parts, len(plan.faults) * (part + 1) // parts
        faults: tuple[Fault, ...] = plan.faults[:low] + plan.faults[high:]
        candidate = msgspec.structs.replace(plan, faults=faults)
        if wanted & set(play_result(candidate).broken):
            return candidate
    return None
