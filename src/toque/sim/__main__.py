"""The simulator's command line: `python -m toque.sim run|sweep|steer|shrink`. See docs/simulator.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from toque.sim import verdicts
from toque.sim.draw import draw_plan
from toque.sim.plan import Plan, read_plan, to_json
from toque.sim.play import play_plan
from toque.sim.steering import draw_steering, play_steering, steer_seed
from toque.sim.sweep import Result, play_result, quiet, shrink, summarise, sweep

OK, VIOLATED, BLIND, USAGE = 0, 1, 3, 2
SEEDS_FOR_COUNTERS = 200  # a sweep of so many seeds must have seen everything


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 all held, 1 a verdict is broken, 3 a long sweep has not seen what it should, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="toque.sim", description="Plays seeded accounts in virtual time.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="play one plan and judge it")
    _add_plan(run)
    run.add_argument("--trace", action="store_true", help="print everything that happened")
    many = commands.add_parser("sweep", help="play many seeds")
    many.add_argument("--seeds", type=_seeds, default=range(1, 501), metavar="A-B")
    many.add_argument("--jobs", type=_jobs, default=2)
    steered = commands.add_parser("steer", help="play many seeds of clients that steer a few instances, against a model")
    steered.add_argument("--seeds", type=_seeds, default=range(1, 501), metavar="A-B")
    steered.add_argument("--jobs", type=_jobs, default=2)
    steered.add_argument("--trace", action="store_true", help="print everything that happened in the first one, only")
    smaller = commands.add_parser("shrink", help="find the smallest plan that breaks the same")
    _add_plan(smaller)
    options = parser.parse_args(arguments)
    quiet()
    if options.command == "sweep":
        return _sweep(options.seeds, options.jobs)
    if options.command == "steer":
        return _steer(options.seeds, options.jobs, trace=options.trace)
    try:
        plan = read_plan(options.plan) if options.plan else draw_plan(options.seed)
    except (OSError, msgspec.MsgspecError) as error:
        print(f"{options.plan}: {error}", file=sys.stderr)
        return USAGE
    return _run(plan, trace=options.trace) if options.command == "run" else _shrink(plan)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int)
    which.add_argument("--plan", type=Path, help="a plan as JSON, as `shrink` prints it")


def _seeds(text: str) -> range:
    first, _, last = text.partition("-")
    try:
        seeds = range(int(first), int(last or first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of seeds, as 1-500 is") from None
    if not seeds:
        raise argparse.ArgumentTypeError(f"there are no seeds from {first} to {last}")
    return seeds


def _jobs(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes: 1 or more")
    return int(text)


def _run(plan: Plan, *, trace: bool) -> int:
    print(f"seed {plan.seed}: {plan.knobs}", flush=True)
    for fault in plan.faults:
        print(f"  {fault.at_s:8.3f} {fault}")
    outcome = play_plan(plan)
    if trace:
        print("\n".join(outcome.trace))
    print(f"trace {outcome.digest}, {len(outcome.trace)} lines, {outcome.virtual_s:.1f} s of virtual time")
    print(verdicts.describe(outcome.verdicts))
    return VIOLATED if outcome.broken else OK


def _sweep(seeds: range, jobs: int) -> int:
    print(f"seeds {seeds.start} to {seeds.stop - 1}, {jobs} at a time", flush=True)
    summary = summarise(sweep(seeds, jobs=jobs), _tell)
    print(f"{summary.seeds} seeds in {summary.seconds:.0f} s, {len(summary.failed)} failed")
    for what, count in sorted(summary.counts.items()):
        print(f"  {count:8} {what}")
    unseen = summary.unseen
    if unseen:
        print(f"not seen in this sweep: {', '.join(unseen)}")
    if summary.failed:
        return VIOLATED
    return BLIND if unseen and summary.seeds >= SEEDS_FOR_COUNTERS else OK


def _steer(seeds: range, jobs: int, *, trace: bool) -> int:
    if trace:
        outcome = play_steering(draw_steering(seeds.start))
        print("\n".join(outcome.trace), verdicts.describe(outcome.verdicts), sep="\n")
        return VIOLATED if outcome.broken else OK
    summary = summarise(sweep(seeds, jobs=jobs, play=steer_seed), _tell_steered)
    print(f"{summary.seeds} seeds in {summary.seconds:.0f} s, {len(summary.failed)} failed")
    for what, count in sorted(summary.counts.items()):
        print(f"  {count:8} {what}")
    return VIOLATED if summary.failed else OK


def _tell_steered(result: Result) -> None:
    print(f"seed {result.seed} broke {', '.join(result.broken)}; repeat: python -m toque.sim steer --seeds {result.seed} "
          f"--trace\n{result.told}", flush=True)


def _tell(result: Result) -> None:
    print(f"seed {result.seed} broke {', '.join(result.broken)}; repeat: python -m toque.sim run --seed {result.seed} "
          f"--trace\n{result.told}", flush=True)


def _shrink(plan: Plan) -> int:
    smallest = shrink(plan, on_step=lambda found: print(f"{len(found.faults)} faults still break it", file=sys.stderr))
    if smallest is plan and not play_result(plan).broken:
        print("the plan breaks nothing: here it is as it was", file=sys.stderr)
    print(to_json(smallest).decode(), end="")
    return OK


if __name__ == "__main__":
    sys.exit(main())
