"""What the Engine alone costs: µs per instance of one step and of ten, without journal, store and broker.

    python bench/engine_cost.py [instances] [--profile]

The host accepts records in the next turn of the loop, as a group; callbacks are async and return at once. Prints the
best of several rounds, and the bytes that a running instance takes.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import pstats
import sys
import time
import tracemalloc
from typing import Any

import uvloop

from toque.storage import records as r
from toque.workers.attempt import Callbacks
from toque.workers.engine import Engine
from toque.workers.replay import Replay
from toque.workflow import Step, Workflow, WorkflowEvent

ROUNDS = 5
IN_FLIGHT = 500
MEASURED_FOR_MEMORY = 1_000
ADMITTED_AT_MS = 1_700_000_000_000


class CostHost:
    """Accepts everything in the next turn of the loop. Is the Host of all engines of a round."""

    account = "main"
    env = None
    inside = 0

    def __init__(self, on_ended: Any) -> None:
        self.callbacks = Callbacks(1)
        self._on_ended = on_ended
        self._pending: list[Engine] = []
        self._loop = asyncio.get_running_loop()

    def commit(self, record: r.Record, engine: Engine) -> None:
        if not self._pending:
            self._loop.call_soon(self._accept)
        self._pending.append(engine)

    def _accept(self) -> None:
        accepted, self._pending = self._pending, []
        for engine in accepted:
            engine.accepted()

    def now_ms(self) -> int:
        return ADMITTED_AT_MS

    latest_ms = now_ms

    def random(self) -> float:
        return 0.5

    def may_enter(self) -> bool:
        return True

    may_fire = in_time = may_enter

    def enter_later(self, engine: Engine) -> None:
        raise AssertionError("the gate is always open")

    def engine_rests(self, engine: Engine) -> None:
        raise AssertionError("nothing rests here")

    def engine_ended(self, engine: Engine) -> None:
        assert engine.end is not None and engine.end.status is r.Status.COMPLETE, engine.end

    def engine_left(self, engine: Engine) -> None:
        engine.cut()
        self._on_ended()

    def engine_blocked(self, engine: Engine, reason: str) -> None:
        raise AssertionError(reason)


async def answer(value: int) -> int:
    return value


class Steps(Workflow[int, int], name="steps"):
    """As many steps, one after the other, as its params say."""

    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        total = 0
        for number in range(event.payload):
            total += await step.do("answer", answer, number)
        return total


class Waiter(Workflow[int, int], name="waiter"):
    """Stays inside its first callback, as a running instance does."""

    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        return await step.do("wait", wait_for_ever)


async def wait_for_ever() -> int:
    await asyncio.Event().wait()
    return 0


def engine_of(host: Any, flow: type[Workflow[Any, Any]], serial: int, params: bytes) -> Engine:
    admitted = r.Admitted(serial, 1, 1, ADMITTED_AT_MS, flow._toque_name, f"i{serial}", "", serial, ADMITTED_AT_MS, params,
                          "application/json", "1")
    return Engine(host, flow, serial, Replay([admitted]))


async def run_instances(count: int, steps: int) -> float:
    """Seconds for so many instances, IN_FLIGHT of them at a time."""
    over = asyncio.Event()
    params = str(steps).encode()
    left = count
    started = 0

    def begin() -> None:
        nonlocal started
        if started < count:
            started += 1
            engine_of(host, Steps, started, params).admit()

    def ended() -> None:
        nonlocal left
        left -= 1
        begin()
        if not left:
            over.set()

    host = CostHost(ended)
    gc.collect()
    began = time.process_time()  # other processes do not disturb it
    for _ in range(min(IN_FLIGHT, count)):
        begin()
    await over.wait()
    return time.process_time() - began


async def bytes_per_running_instance() -> float:
    """Python's own memory of an instance that is inside its first callback: engine, loop, tasks, frames, timer."""
    host = CostHost(lambda: None)
    engines = await running(host, 1)  # fills the caches
    gc.collect()
    tracemalloc.start()
    engines += await running(host, MEASURED_FOR_MEMORY)
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for engine in engines:
        engine.cut()
    while host.inside:
        await asyncio.sleep(0)
    return size / MEASURED_FOR_MEMORY


async def running(host: CostHost, count: int) -> list[Engine]:
    """So many instances, each inside its first callback."""
    engines = [engine_of(host, Waiter, serial, b"1") for serial in range(count)]
    for engine in engines:
        engine.admit()
    while not all(engine.inside for engine in engines):
        await asyncio.sleep(0)
    for _ in range(3):  # the callbacks' tasks begin
        await asyncio.sleep(0)
    return engines


def measure(instances: int, steps: int) -> float:
    """µs per instance, the best of the rounds."""
    seconds = min(uvloop.run(run_instances(instances, steps)) for _ in range(ROUNDS))
    return seconds / instances * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instances", nargs="?", type=int, default=5_000)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(lambda: uvloop.run(run_instances(options.instances, 10)))
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
        return
    one, ten = measure(options.instances, 1), measure(max(1, options.instances // 5), 10)
    print(f"python {sys.version.split()[0]}: {one:.1f} µs per instance of one step, {ten:.1f} µs of ten steps "
          f"({(ten - one) / 9:.1f} µs a step), {uvloop.run(bytes_per_running_instance()):,.0f} bytes while running")


if __name__ == "__main__":
    main()
