"""Work for the acceptance tests: five-step instances, with the client's own log of what it asked and was told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path

from acceptance.stack import Stack, assert_holds, eventually

from toque.chaos.five_steps import ORDER, STEPS, WORKFLOW, Order, result_of
from toque.chaos.history import COMPLETE, CREATE, RESULT, History, read_history
from toque.chaos.ledger import EXIT
from toque.chaos.ledger_checks import check_c1, check_c2, check_c3, check_e1, check_ledger
from toque.chaos.load import set_limit
from toque.chaos.pairing import Ledgered
from toque.chaos.verdicts import InstanceKey
from toque.client import Client, NewInstance
from toque.errors import InstanceNotFound, ToqueError

ASKED_AT_ONCE = 100


class Load:
    """So many instances of `toque.chaos.five_steps`, with the numbers 0, 1, 2 …"""

    def __init__(self, stack: Stack, *, callback_ms: int) -> None:
        self._stack = stack
        self._callback_ms = callback_ms
        self._log: Path = stack.directory / "ops.jsonl"
        self._history = History(self._log)
        self._last = -1
        self.ids: list[str] = []  # of the creations that were acknowledged
        self._unsure: list[str] = []  # of those that may have been stored

    async def create(self, client: Client, count: int, *, limit: int) -> None:
        """Set the account's limit, then create instances in a batch; each is acknowledged when this returns."""
        await set_limit(client, limit)
        ids = [self._new_id() for _ in range(count)]
        ops = [self._history.invoke(CREATE, WORKFLOW, id_) for id_ in ids]
        items = [NewInstance(self._order(id_), id=id_) for id_ in ids]
        for op, result in zip(ops, await client.create_batch(WORKFLOW, items), strict=True):
            assert result.error is None, f"{result.id}: {result.error}"
            self._history.ok(op)
            self.ids.append(result.id)

    async def create_one(self, client: Client, *, timeout: str = "30 seconds") -> bool:
        """Create one more; whether it was acknowledged. The log has the outcome either way."""
        id_ = self._new_id()
        try:
            with self._history.recording(CREATE, WORKFLOW, id_):
                await client.create(WORKFLOW, self._order(id_), id=id_, timeout=timeout)
        except ToqueError as error:
            self._stack.say(f"creation of {id_}: {error}")
            self._unsure.append(id_)
            return False
        self.ids.append(id_)
        return True

    async def until_left(self, callbacks: int) -> None:
        """Wait until so many callbacks have been left."""

        def left() -> bool:
            return sum(entry.kind == EXIT for entry in self._stack.entries()) >= callbacks

        await eventually(left)

    async def results(self, client: Client, *, within_s: float = 60.0) -> None:
        """Wait for the end of all of them; of those that are not known to exist, if they do."""
        places = asyncio.Semaphore(ASKED_AT_ONCE)

        async def result_of_one(id_: str) -> None:
            async with places:
                with self._history.recording(RESULT, WORKFLOW, id_) as op:
                    op.value = str(await client.handle(WORKFLOW, id_).result())
                    op.status = COMPLETE

        async def result_if_it_exists(id_: str) -> None:
            with contextlib.suppress(InstanceNotFound):
                await result_of_one(id_)

        async with asyncio.timeout(within_s):
            await asyncio.gather(*map(result_of_one, self.ids), *map(result_if_it_exists, self._unsure))

    def assert_nothing_lost(self, ledger: Ledgered | None = None) -> None:
        """C1, C2, C3 and E1 hold for all of it, judged from the ledger and the log."""
        ops = read_history(self._log)
        ledger = ledger or self._stack.ledgered()
        own = Ledgered([visit for visit in ledger.visits if visit.key.workflow == WORKFLOW], ledger.kills,
                       ledger.strays)
        assert_holds(check_c1(ops, self._expected(self.ids)), check_c2(ops, own), check_c3(ops, own),
                     check_e1(ops, own, ORDER), check_ledger(own))

    def assert_each_step_once(self) -> None:
        """Every callback was entered exactly once, and left in order."""
        visits = [visit for visit in self._stack.ledgered().visits if visit.key.workflow == WORKFLOW]
        seen = sorted((visit.key.instance, visit.step) for visit in visits)
        cut = [visit.where for visit in visits if visit.outcome != "ok"]
        assert not cut, cut
        assert seen == sorted((id_, step) for id_ in self.ids for step in STEPS)

    def _new_id(self) -> str:
        self._last += 1
        return f"order-{self._last:05}"

    def _order(self, id_: str) -> Order:
        return Order(int(id_.removeprefix("order-")), self._callback_ms)

    def _expected(self, ids: Iterable[str]) -> dict[InstanceKey, str]:
        return {InstanceKey(WORKFLOW, id_): str(result_of(self._order(id_))) for id_ in ids}
