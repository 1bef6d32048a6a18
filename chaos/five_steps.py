"""The work that chaos scenarios disturb: an APP with one workflow of five steps, each of which reports to the ledger.

Four callbacks are async, one runs in a thread, so that both kinds are inside when a pod dies. Without a ledger
(TOQUE_LEDGER) the app does not start.
"""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec

from toque.chaos.ledger import AsyncLedgerClient, LedgerClient
from toque.workflow import Retries, Step, StepContext, Workflow, WorkflowEvent

WORKFLOW = "five-steps"
STEPS = ("take", "wash", "chop", "cook", "serve")
IN_THREAD = "chop"
ORDER = {WORKFLOW: {step: stage for stage, step in enumerate(STEPS)}}
RETRIES = Retries(limit=3, delay="1 second")


@dataclass
class Reporters:
    """The pod's connections to the ledger."""

    of_loop: AsyncLedgerClient
    of_threads: LedgerClient


@asynccontextmanager
async def lifespan() -> AsyncIterator[Reporters]:
    pod = os.environ.get("TOQUE_POD", "")
    reporters = Reporters(await AsyncLedgerClient.connect(pod=pod), LedgerClient(pod=pod))
    yield reporters
    await reporters.of_loop.close()


class Order(msgspec.Struct, frozen=True):
    """`number` decides the result; each callback takes `callback_ms`."""

    number: int
    callback_ms: int = 50


class FiveSteps(Workflow[Order, int], name=WORKFLOW):
    """Passes a number through five steps; the result tells whether each of them ran, in order, on the one before."""

    env: Reporters

    async def run(self, event: WorkflowEvent[Order], step: Step) -> int:
        number, pause_s = event.payload.number, event.payload.callback_ms / 1000
        for name in STEPS:
            callback = self.in_thread if name == IN_THREAD else self.on_loop
            number = await step.do(name, callback, number, pause_s, retries=RETRIES)
        return number

    async def on_loop(self, ctx: StepContext, number: int, pause_s: float) -> int:
        async with self.env.of_loop.inside(ctx):
            await asyncio.sleep(pause_s)
            return follow(number, ctx.name)

    def in_thread(self, ctx: StepContext, number: int, pause_s: float) -> int:
        with self.env.of_threads.inside(ctx):
            time.sleep(pause_s)
            return follow(number, ctx.name)


def follow(number: int, step: str) -> int:
    """What a step makes of the number that the step before it made."""
    return zlib.crc32(f"{step} {number}".encode())


def result_of(order: Order) -> int:
    """The result of an instance, computed apart."""
    number = order.number
    for name in STEPS:
        number = follow(number, name)
    return number
