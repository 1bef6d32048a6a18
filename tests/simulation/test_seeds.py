"""Whole runs of the simulator: some seeds, the plans that once failed, and that a run can be repeated exactly.

`make sim` plays many more seeds; see docs/simulator.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import toque
from toque.sim import plan as p
from toque.sim.draw import FAULTS_MIN, INSTANCES, draw_plan
from toque.sim.play import play_plan
from toque.sim.steering import draw_steering, play_steering
from toque.sim.sweep import play_result, shrink
from toque.sim.verdicts import describe

PLANS = sorted((Path(__file__).parent / "regression_plans").glob("*.json"))
SOURCES = str(Path(toque.__file__).parents[1])
PROGRAM = """
import logging, sys
logging.disable(logging.CRITICAL)
from toque.sim.draw import draw_plan
from toque.sim.play import play_plan
from toque.sim.steering import draw_steering, play_steering
print(*(play_plan(draw_plan(seed)).digest for seed in range(1, 6)))
"""


@pytest.mark.parametrize("seed", range(1, 5))
def test_a_seed_holds(seed):
    """Three pods, some twenty instances and ten or more faults: every verdict holds."""
    outcome = play_plan(draw_plan(seed))

    assert not outcome.broken, f"python -m toque.sim run --seed {seed} --trace\n{describe(outcome.broken)}"


@pytest.mark.parametrize("seed", range(1, 13))
def test_a_steered_seed_holds(seed):
    """Concurrent clients create, pause, resume, restart, terminate, delete and send events: the model allows all of it."""
    outcome = play_steering(draw_steering(seed))

    assert not [verdict for verdict in outcome.broken if verdict.broken], describe(outcome.broken)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_that_once_failed_holds(path):
    """Each is the smallest plan that broke something once; the file's name says what."""
    outcome = play_plan(p.read_plan(path))

    assert not outcome.broken, f"python -m toque.sim run --plan {path} --trace\n{describe(outcome.broken)}"


def test_a_seed_gives_the_same_trace_in_every_process():
    """Nothing depends on hashes, addresses or real time: two processes with other hash seeds agree on every line."""
    digests = [subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": SOURCES, "PYTHONHASHSEED": seed}).stdout.split()
               for seed in ("1", "2")]

    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 5


def test_a_plan_survives_json():
    """What `shrink` prints, `run --plan` plays: the very same plan."""
    for seed in range(50):
        plan = draw_plan(seed)
        assert msgspec.json.decode(p.to_json(plan), type=p.Plan) == plan


def test_every_plan_is_worth_a_run():
    """Some twenty instances and at least ten faults, all of them in the safety phase; over many seeds, of every kind."""
    plans = [draw_plan(seed) for seed in range(200)]

    for plan in plans:
        assert len(plan.creations) >= INSTANCES
        assert len(plan.faults) >= FAULTS_MIN
        assert all(fault.at_s <= plan.safety_s for fault in plan.faults)
    drawn = {fault.kind for plan in plans for fault in plan.faults}
    assert drawn == {p.KILL, p.TERM, p.PAUSE, p.SUSPEND, p.CUT, p.CUT_CLIENTS, p.BROKER, p.WRITE_DEAD, p.MESSAGES, p.LIMIT}


def test_shrinking_leaves_the_faults_that_matter(monkeypatch):
    """A plan that fails for one fault among many is cut down to that one."""
    plan = draw_plan(1)
    guilty = plan.faults[7]

    def play(candidate):
        return play_result_of("X" if guilty in candidate.faults else "")

    monkeypatch.setattr("toque.sim.sweep.play_result", play)

    assert shrink(plan).faults == (guilty,)


def play_result_of(broken):
    result = play_result.__globals__["Result"](1)
    result.broken = (broken,) if broken else ()
    return result
