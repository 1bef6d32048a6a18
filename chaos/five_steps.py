"""The work that chaos scenarios disturb: an APP with one workflow of five steps, each of which reports to the ledger.

Four callbacks are async, one runs in a thread, so that both kinds are inside when a pod dies. An instance may nap
between two steps, and its callbacks may hold memory. Without a ledger (TOQUE_LEDGER) the app does not start.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import msgspec

from toque.chaos.ledger import AsyncLedgerClient, LedgerClient
from toque.workflow import Retries, Step, StepContext, Workflow, WorkflowEvent

WORKFLOW = "five-steps"
STEPS = ("take", "wash", "chop", "cook", "serve")
IN_THREAD = "chop"
NAP_BEFORE, NAP_AFTER = "chop", "cook"  # the steps around the nap
ORDER = {WORKFLOW: {step: stage for stage, step in enumerate(STEPS)}}
RETRIES = Retries(limit=3, delay="1 second")
IN_THREAD_MS_MAX = 100  # a pod has few threads: longer, and they would be what bounds a crowd


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
    """`number` decides the result; each callback takes `callback_ms` and holds `ballast_kb` of memory meanwhile.

    The one in a thread takes IN_THREAD_MS_MAX at most.
    """

    number: int
    callback_ms: int = 50
    nap_ms: int = 0  # a sleep between NAP_BEFORE and NAP_AFTER; 0 = none
    ballast_kb: int = 0


class FiveSteps(Workflow[Order, int], name=WORKFLOW):
    """Passes a number through five steps; the result tells whether each of them ran, in order, on the one before."""

    env: Reporters

    async def run(self, event: WorkflowEvent[Order], step: Step) -> int:
        order, number = event.payload, event.payload.number
        for name in STEPS:
            if name == NAP_AFTER and order.nap_ms:
                await step.sleep("nap", timedelta(milliseconds=order.nap_ms))
            callback = self.in_thread if name == IN_THREAD else self.on_loop
            number = await step.do(name, callback, number, order, retries=RETRIES)
        return number

    async def on_loop(self, ctx: StepContext, number: int, order: Order) -> int:
        async with self.env.of_loop.inside(ctx):
            with _holding(order.ballast_kb):
                await asyncio.sleep(order.callback_ms / 1000)
            return follow(number, ctx.name)

    def in_thread(self, ctx: StepContext, number: int, order: Order) -> int:
        with self.env.of_threads.inside(ctx):
            with _holding(order.ballast_kb):
                time.sleep(min(order.callback_ms, IN_THREAD_MS_MAX) / 1000)
            return follow(number, ctx.name)


@contextmanager
def _holding(kb: int) -> Iterator[None]:
    """Memory that was never used before, each page of it touched, for as long as the body runs."""
    if not kb:
        yield
        return
    with mmap.mmap(-1, 1024 * kb) as held:
        held[::mmap.PAGESIZE] = bytes(len(held[::mmap.PAGESIZE]))
        yield


def follow(number: int, step: str) -> int:
    """What a step makes of the number that the step before it made."""
    return zlib.crc32(f"{step} {number}".encode())


def result_of(order: Order) -> int:
    """The result of an instance, computed apart."""
    number = order.number
    for name in STEPS:
        number = follow(number, name)
    return number
