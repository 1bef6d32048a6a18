"""The work that a scenario disturbs: creators, waiters and pollers, who write all that they are told into the log.

A first lot is created in a batch, then one after the other until the faults are over; then everything is waited for,
and read once more. Bounded by the options. Every creation is repeated until its outcome is known.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta

from toque.chaos.five_steps import NAP_AFTER, NAP_BEFORE, STEPS, WORKFLOW, Order, result_of
from toque.chaos.history import COMPLETE, CREATE, RESULT, STATUS, History
from toque.chaos.timer_checks import Nap
from toque.chaos.verdicts import InstanceKey
from toque.client import BatchResult, Client, NewInstance
from toque.errors import InstanceExists, InstanceFailed, InstanceNotFound, SetupError, ToqueError, Unavailable
from toque.workflow import Retention

CREATE_TIMEOUT = "10 seconds"
ASKED_AT_ONCE = 200  # results waited for at one time
CREATED_AT_ONCE = 100  # those of a lost pod wait for its successor, and must not hold up the others
POLL_S = 0.1
POLLERS = 4
READ_AGAIN_MAX = 400  # results that are read once more at the end
BY_TWO_EVERY = 3  # one instance in so many is created by two creators at once
NAP_EVERY = 5  # one instance in so many naps
PACE = 0.5  # of what the slots can do: how fast the later instances are created
SLOTS_S_MAX = 60.0
READ_S_MAX = "20 seconds"


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How much work, and of which kind."""

    instances: int = 300
    """Created in a batch, before the first fault."""
    later_max: int = 5000
    """Most instances that are created one by one while faults happen."""
    limit: int = 24
    """Of the account: instances inside callbacks at one time."""
    callback_ms: int = 80
    nap_ms: int = 1500
    ballast_kb: int = 0
    ends_within_s: float = 120.0
    """After the last fault. What has not ended by then counts as lost."""
    prefix: str = "order"
    """Of the instances' ids: different in each run against one deployment."""
    kept_s: float = 0.0
    """How long an instance is kept after its end; 0 = as the workflow says. Not shorter than the longest outage."""

    @property
    def pause_s(self) -> float:
        """Between two later creations."""
        return len(STEPS) * self.callback_ms / 1000 / self.limit / PACE

    def id(self, number: int) -> str:
        return f"{self.prefix}-{number:05}"

    @property
    def retention(self) -> Retention | None:
        kept = timedelta(seconds=self.kept_s)
        return Retention(success=kept, error=kept) if self.kept_s else None

    def order(self, number: int) -> Order:
        nap_ms = 0 if number % NAP_EVERY else self.nap_ms
        return Order(number, self.callback_ms, nap_ms, self.ballast_kb)


@dataclass
class Load:
    """The work of one run; what is known of it is in the log, and here in short."""

    options: LoadOptions
    client: Client
    history: History
    seed: int
    created: int = 0
    """Numbers below this were asked for."""
    ended: int = 0
    exist: set[InstanceKey] = field(default_factory=set)
    """Instances that a creator was told to exist already, without any acknowledgement as new."""
    _asking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(ASKED_AT_ONCE))

    async def work(self, faults: Awaitable[None]) -> None:
        """Create, wait for all, read again; `faults` ends when the last fault is over. TimeoutError: not all ended."""
        over = asyncio.Event()
        polling = [asyncio.ensure_future(self._poll(place)) for place in range(POLLERS)]
        try:
            async with asyncio.timeout(None) as deadline, asyncio.TaskGroup() as group:
                bounded = group.create_task(self._bound(faults, over))
                for number in await self._create_batch():
                    group.create_task(self._wait_for(number))
                await self._create_later(group, over)
                await bounded
                deadline.reschedule(asyncio.get_running_loop().time() + self.options.ends_within_s)
        finally:
            for task in polling:
                task.cancel()
            await asyncio.gather(*polling, return_exceptions=True)

    async def _bound(self, faults: Awaitable[None], over: asyncio.Event) -> None:
        try:
            await faults
        finally:
            over.set()

    # -- what is to come out -------------------------------------------------------------------------------------------

    def keys(self) -> list[InstanceKey]:
        return [InstanceKey(WORKFLOW, self.options.id(number)) for number in range(self.created)]

    def expected(self) -> dict[InstanceKey, str]:
        """The result of each instance, computed apart."""
        return {key: str(result_of(self.options.order(number))) for number, key in enumerate(self.keys())}

    def naps(self) -> dict[InstanceKey, Nap]:
        lasts_s = self.options.nap_ms / 1000
        return {key: Nap(NAP_BEFORE, NAP_AFTER, lasts_s) for number, key in enumerate(self.keys())
                if self.options.order(number).nap_ms}

    # -- creating ------------------------------------------------------------------------------------------------------

    async def _create_batch(self) -> list[int]:
        """The first lot; what was not acknowledged is created again, one by one."""
        numbers = range(self.options.instances)
        self.created = len(numbers)
        ops = [self.history.invoke(CREATE, WORKFLOW, self.options.id(number)) for number in numbers]
        items = [NewInstance(self.options.order(number), id=self.options.id(number), retention=self.options.retention)
                 for number in numbers]
        results: list[BatchResult] = await self.client.create_batch(WORKFLOW, items)
        for op, result in zip(ops, results, strict=True):
            if result.error is None:
                self.history.ok(op)
            else:
                self.history.unknown(op, repr(result.error))
        for number, result in zip(numbers, results, strict=True):
            if result.error is not None:
                await self._create(number)
        return list(numbers)

    async def _create_later(self, group: asyncio.TaskGroup, over: asyncio.Event) -> None:
        """At a steady pace until the faults are over."""
        places = asyncio.Semaphore(CREATED_AT_ONCE)

        async def create_and_wait(number: int) -> None:
            async with places:
                creators = 1 if number % BY_TWO_EVERY else 2
                await asyncio.gather(*(self._create(number) for _ in range(creators)))
            await self._wait_for(number)

        while not over.is_set() and self.created < self.options.instances + self.options.later_max:
            async with places:
                group.create_task(create_and_wait(self.created))
                self.created += 1
            await asyncio.sleep(self.options.pause_s)

    async def _create(self, number: int) -> None:
        """Until the outcome is known: it was created, or it exists."""
        id_ = self.options.id(number)
        while True:
            try:
                with self.history.recording(CREATE, WORKFLOW, id_):
                    await self.client.create(WORKFLOW, self.options.order(number), id=id_,
                                             retention=self.options.retention, timeout=CREATE_TIMEOUT)
                return
            except InstanceExists:
                self.exist.add(InstanceKey(WORKFLOW, id_))
                return
            except ToqueError:  # the log has what it was
                await asyncio.sleep(POLL_S)

    # -- waiting and looking -------------------------------------------------------------------------------------------

    async def _wait_for(self, number: int) -> None:
        """Until its end is known; a server that is away is asked again."""
        async with self._asking:
            while not await self._read_result(number, None):
                await asyncio.sleep(POLL_S)
        self.ended += 1

    async def _read_result(self, number: int, timeout: str | None) -> bool:
        handle = self.client.handle(WORKFLOW, self.options.id(number))
        try:
            with self.history.recording(RESULT, WORKFLOW, handle.id) as op:
                op.value = str(await handle.result(timeout))
                op.status = COMPLETE
        except (Unavailable, InstanceNotFound):
            return False  # the log has what it was
        except InstanceFailed:
            return True
        return True

    async def read_again(self) -> None:
        """Read results a second time, long after: they must be the same. Only the last ones, where others are deleted."""
        there = range(max(0, self.created - READ_AGAIN_MAX) if self.options.kept_s else 0, self.created)
        numbers = random.Random(self.seed).sample(there, min(len(there), READ_AGAIN_MAX))
        async with asyncio.TaskGroup() as group:
            for number in numbers:
                group.create_task(self._read_once_more(number))

    async def _read_once_more(self, number: int) -> None:
        async with self._asking:
            await self._read_result(number, READ_S_MAX)

    async def _poll(self, place: int) -> None:
        """Ask for the status of instances that are under way, one after the other."""
        rng = random.Random(self.seed * POLLERS + place)
        while True:
            await asyncio.sleep(POLL_S)
            if not self.created:
                continue
            newest = rng.randrange(max(0, self.created - self.options.instances), self.created)
            handle = self.client.handle(WORKFLOW, self.options.id(newest))
            try:
                with self.history.recording(STATUS, WORKFLOW, handle.id) as op:
                    found = await handle.status()
                    op.status, op.value = found.status, "" if found.output is None else str(found.output)
            except ToqueError:
                continue  # the log has what it was


async def set_limit(client: Client, limit: int) -> None:
    """Set the account's limit, and wait until no more slots than that are leased: pods report once a second."""
    await client.accounts.set(client.account, max_concurrent=limit)
    await _until(lambda: _leased_at_most(client, limit), f"the pods still hold more than {limit} slots")


async def _leased_at_most(client: Client, limit: int) -> bool:
    return sum(view.slots_leased for view in await client.pods()) <= limit


async def _until(condition: Callable[[], Awaitable[bool]], otherwise: str) -> None:
    """Raises Unavailable with `otherwise` after SLOTS_S_MAX."""
    deadline = time.monotonic() + SLOTS_S_MAX
    while not await _holds(condition):
        if time.monotonic() > deadline:
            raise Unavailable(f"{otherwise} after {SLOTS_S_MAX:g} s")
        await asyncio.sleep(POLL_S)


async def _holds(condition: Callable[[], Awaitable[bool]]) -> bool:
    try:
        return await condition()
    except SetupError:  # no pod has made the account yet
        return False
