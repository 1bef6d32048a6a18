"""Draws a plan from a seed.

As a swarm: the seed first decides which kinds of faults exist in its run at all, and how many there are. So some runs
see only message faults, some only kills, and some all at once, and rare combinations are not drowned in frequent ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from toque.sim import plan as p
from toque.storage.memory_broker import DELAY, DROP_BEFORE, DUPLICATE, LOSE_ANSWER, REFUSE

PODS: Final = 3
FAULTS_MIN: Final = 10
FAULTS_MAX: Final = 16
KINDS_MIN: Final = 2
INSTANCES: Final = 20
TTLS_S: Final = (2, 2, 3)
EVENT_RUNS: Final = 0.5  # of all runs
LIMITS: Final = (3, 6, 12, 50, 50)
SNAPSHOT_BYTES: Final = (0, 1_000, 5_000)
DRIFT_MAX: Final = 0.0003  # below what broker time allows for
SKEW_S_MAX: Final = 100_000.0
WEIGHTS: Final = {p.KILL: 4, p.TERM: 2, p.PAUSE: 4, p.SUSPEND: 1, p.CUT: 3, p.CUT_CLIENTS: 1, p.BROKER: 2, p.WRITE_DEAD: 1,
                  p.MESSAGES: 6, p.LIMIT: 1}
JETSTREAM_FAULTS: Final = (DROP_BEFORE, LOSE_ANSWER, LOSE_ANSWER, DELAY, DUPLICATE, f"{REFUSE}10164", f"{REFUSE}10023")
REQUEST_FAULTS: Final = (DROP_BEFORE, LOSE_ANSWER, DELAY, DUPLICATE)
SUBJECTS: Final = {  # what message faults are drawn for, and which
    "toque.main.journal.>": (*JETSTREAM_FAULTS, f"{REFUSE}10071"),
    "toque.main.control.session.*": (*JETSTREAM_FAULTS, f"{REFUSE}10071"),
    "toque.main.create.>": JETSTREAM_FAULTS,
    "toque.main.gatekeeper.lease": REQUEST_FAULTS,
    "toque.main.station.>": REQUEST_FAULTS,
    "toque.main.pods.positions": REQUEST_FAULTS,
    "$JS.API.CONSUMER.CREATE.>": REQUEST_FAULTS,
    "$JS.API.STREAM.MSG.GET.>": REQUEST_FAULTS,
    "$JS.API.STREAM.INFO.>": REQUEST_FAULTS,
    "$JS.API.STREAM.PURGE.>": REQUEST_FAULTS,
}


def draw_plan(seed: int) -> p.Plan:
    """The plan of a seed; always the same one."""
    rng = random.Random(seed)
    ttl_s = rng.choice(TTLS_S)
    safety_s = ttl_s * rng.uniform(3.5, 6)
    shapes = tuple(_shape(rng, f"w{number}") for number in range(1, rng.randint(1, 2) + 1))
    kinds = _kinds(rng)
    limit = rng.choice(LIMITS)
    slowest_ms = rng.choice((1.0, 2.0, 2.0, 20.0))
    snapshot_bytes = rng.choice(SNAPSHOT_BYTES)
    faults = _faults(rng, kinds, ttl_s=ttl_s, safety_s=safety_s, workflows=[shape.name for shape in shapes], limit=limit)
    stations, retries = rng.choice((2, 3, 4)), rng.randint(2, 3)
    retry_delay_s = round(rng.choice((0.2, 0.5, 2.0)), 3)
    clocks = tuple(_clock(rng) for _ in range(PODS))
    creations = _creations(rng, [shape.name for shape in shapes], safety_s)
    shapes, creations, faults = _with_events(random.Random(f"events {seed}"), shapes, creations, faults, ttl_s,
                                             safety_s)
    return p.Plan(
        seed=seed, ttl_s=ttl_s, stations=stations, limit=limit, retries=retries,
        retry_delay_s=retry_delay_s, delay_ms=(0.1, slowest_ms), safety_s=round(safety_s, 3),
        clocks=clocks, shapes=shapes,
        creations=creations, faults=faults,
        snapshot_bytes=snapshot_bytes,
        knobs=f"ttl {ttl_s} s, limit {limit}, delays to {slowest_ms:g} ms, faults: {', '.join(kinds)}")


def _clock(rng: random.Random) -> p.HostClock:
    return p.HostClock(round(rng.uniform(0, SKEW_S_MAX), 3), 1 + round(rng.uniform(-DRIFT_MAX, DRIFT_MAX), 6))


# -- load --------------------------------------------------------------------------------------------------------------

def _shape(rng: random.Random, name: str) -> p.Shape:
    steps: list[p.StepShape] = []
    for number in range(1, rng.randint(1, 4) + 1):
        drawn = rng.random()
        if drawn < 0.55:
            steps.append(_step(rng, f"s{number}"))
        elif drawn < 0.7:
            steps.append(_sleep(rng, f"z{number}"))
        else:
            steps.append(_branches(rng, f"s{number}"))
    return p.Shape(name, (*steps, _step(rng, "last")))


def _sleep(rng: random.Random, name: str) -> p.StepShape:
    return p.StepShape(name, kind="sleep", seconds=round(rng.choice((0.3, 1.2, 2.0, 4.0)) * rng.uniform(0.7, 1.3), 3))


def _step(rng: random.Random, name: str) -> p.StepShape:
    seconds = round(rng.choice((0.0, 0.05, 0.3, 1.2)) * rng.uniform(0.5, 1.5), 3)
    drawn = rng.random()
    sync = rng.random() < 0.2
    if drawn < 0.1:
        return p.StepShape(name, seconds=seconds, sync=sync, fails=rng.randint(1, 2))
    if drawn < 0.13:
        return p.StepShape(name, seconds=seconds, sync=sync, fails=99, caught=rng.random() < 0.7)
    if drawn < 0.2:
        return p.StepShape(name, seconds=seconds, sync=sync, hangs=1, timeout_s=round(seconds + rng.uniform(0.2, 1), 3))
    return p.StepShape(name, seconds=seconds, sync=sync)


def _branches(rng: random.Random, name: str) -> p.StepShape:
    """The branches call steps of the same names, so that only the order of their results tells them apart."""
    branches = []
    for _ in range(rng.randint(2, 3)):
        branch = [_step(rng, f"{name}b")]
        if rng.random() < 0.4:
            branch.append(_sleep(rng, f"{name}z"))
        if rng.random() < 0.5:
            branch.append(_step(rng, f"{name}c"))
        branches.append(tuple(branch))
    return p.StepShape(name, kind=rng.choice(("gather", "group")), branches=tuple(branches))


def _with_events(rng: random.Random, shapes: Sequence[p.Shape], creations: Sequence[p.Creation],
                 faults: Sequence[p.Fault], ttl_s: int, safety_s: float) -> tuple[
                     tuple[p.Shape, ...], tuple[p.Creation, ...], tuple[p.Fault, ...]]:
    """In some of the runs: waits for events in the workflows, events for the instances, faults on their ways.

    Drawn apart, so that the other runs are what they were before there were events.
    """
    if rng.random() >= EVENT_RUNS:
        return tuple(shapes), tuple(creations), tuple(faults)
    waits: dict[str, int] = {}
    drawn: list[p.Shape] = []
    for shape in shapes:
        steps = list(shape.steps)
        waits[shape.name] = rng.randint(1, 3)
        for number in range(waits[shape.name]):
            timeout_s = rng.choice((0.5, 2.0, 20.0, 20.0))
            steps.insert(rng.randrange(len(steps)), p.StepShape(f"e{number}", kind="event", timeout_s=timeout_s))
        drawn.append(msgspec.structs.replace(shape, steps=tuple(steps)))
    sent = [msgspec.structs.replace(creation, events=_sendings(rng, creation, waits[creation.workflow]))
            for creation in creations]
    more = [p.Fault(round(rng.uniform(0.0, safety_s), 3), p.MESSAGES, seconds=_times(rng, ttl_s, 0.1, 2), how=how,
                    subject="toque.main.event.>", times=rng.choice((1, 2, 5)))
            for how in rng.sample(JETSTREAM_FAULTS, rng.randint(0, 3))]
    return tuple(drawn), tuple(sent), tuple(sorted((*faults, *more), key=lambda fault: fault.at_s))


def _sendings(rng: random.Random, creation: p.Creation, waits: int) -> tuple[p.Sending, ...]:
    """About as many as there are waits, from before the creation on."""
    return tuple(p.Sending(round(max(0.0, creation.at_s + rng.uniform(-1.0, 8.0)), 3), f"{creation.id}-{number}",
                           rng.choice(("request", "request", "plain")))
                 for number in range(rng.randint(max(0, waits - 1), waits + 1)))


def _creations(rng: random.Random, workflows: Sequence[str], safety_s: float) -> tuple[p.Creation, ...]:
    creations: list[p.Creation] = []
    batches = 0
    while len(creations) < INSTANCES:
        at_s = round(rng.uniform(0.0, safety_s * 0.85), 3)
        workflow = rng.choice(workflows)
        how = rng.choice(("create", "create", "create", "twice", "batch", "plain"))
        batches += how == "batch"
        for _ in range(rng.randint(2, 5) if how == "batch" else 1):
            ends_at_s = round(at_s + rng.uniform(0, 10), 3) if rng.random() < 0.1 else 0.0
            creations.append(p.Creation(at_s, workflow, f"i{len(creations) + 1}", how,
                                        batches if how == "batch" else 0, ends_at_s))
    return tuple(creations)


# -- faults ------------------------------------------------------------------------------------------------------------

def _kinds(rng: random.Random) -> list[str]:
    kinds = [kind for kind in WEIGHTS if rng.random() < 0.5]
    while len(kinds) < KINDS_MIN:
        kinds = sorted({*kinds, rng.choice(sorted(WEIGHTS))})
    return kinds


def _faults(rng: random.Random, kinds: Sequence[str], *, ttl_s: int, safety_s: float, workflows: Sequence[str],
            limit: int) -> tuple[p.Fault, ...]:
    draw: dict[str, Callable[[float], p.Fault]] = {
        p.KILL: lambda at_s: p.Fault(at_s, p.KILL, rng.randrange(PODS), _times(rng, ttl_s, 0.05, 2), _disk(rng),
                                     age_s=_times(rng, ttl_s, 0.2, 2)),
        p.TERM: lambda at_s: p.Fault(at_s, p.TERM, rng.randrange(PODS), _times(rng, ttl_s, 0.05, 1)),
        p.PAUSE: lambda at_s: _pause(rng, at_s, ttl_s),
        p.SUSPEND: lambda at_s: p.Fault(at_s, p.SUSPEND, rng.randrange(PODS), _times(rng, ttl_s, 0.5, 3), _moment(rng)),
        p.CUT: lambda at_s: p.Fault(at_s, p.CUT, rng.randrange(PODS), _times(rng, ttl_s, 0.05, 4),
                                    rng.choice(p.CONNECTIONS)),
        p.CUT_CLIENTS: lambda at_s: p.Fault(at_s, p.CUT_CLIENTS, seconds=_times(rng, ttl_s, 0.05, 1)),
        p.BROKER: lambda at_s: p.Fault(at_s, p.BROKER, seconds=_times(rng, ttl_s, 0.1, 1.5)),
        p.WRITE_DEAD: lambda at_s: p.Fault(at_s, p.WRITE_DEAD, seconds=_times(rng, ttl_s, 0.1, 1.5),
                                           subject=rng.choice(("journal", *workflows))),
        p.MESSAGES: lambda at_s: _message_fault(rng, at_s, ttl_s),
        p.LIMIT: lambda at_s: p.Fault(at_s, p.LIMIT, times=max(1, rng.choice((limit // 2, limit, limit * 2)))),
    }
    count = rng.randint(FAULTS_MIN, FAULTS_MAX)
    times = sorted(round(rng.uniform(0.0, safety_s), 3) for _ in range(count))
    weights = [WEIGHTS[kind] for kind in kinds]
    return tuple(draw[rng.choices(kinds, weights)[0]](at_s) for at_s in times)


def _times(rng: random.Random, ttl_s: int, low: float, high: float) -> float:
    """So many TTLs; short and long ones alike."""
    return float(round(ttl_s * low * (high / low) ** rng.random(), 3))


def _pause(rng: random.Random, at_s: float, ttl_s: int) -> p.Fault:
    """One that begins in the midst of a commit is the more interesting the longer it is."""
    how = _moment(rng)
    return p.Fault(at_s, p.PAUSE, rng.randrange(PODS), _times(rng, ttl_s, 1.2 if how else 0.1, 3), how)


def _moment(rng: random.Random) -> str:
    return rng.choice(("", p.COMMIT))


def _disk(rng: random.Random) -> str:
    return rng.choice(("same", "same", *p.DISKS))


def _message_fault(rng: random.Random, at_s: float, ttl_s: int) -> p.Fault:
    subject = rng.choice(list(SUBJECTS))
    how = rng.choice(SUBJECTS[subject])
    return p.Fault(at_s, p.MESSAGES, seconds=_times(rng, ttl_s, 0.1, 2) if how in (DELAY, DUPLICATE) else 0.0, how=how,
                   subject=subject, times=rng.choice((1, 1, 1, 2, 5)))
