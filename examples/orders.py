"""An order: two checks side by side, a payment that is retried, a wait, and a shipment. Typed from end to end.

    toque dev examples/orders.py           # a server and two pods; leave it running
    python examples/orders.py              # in another terminal: one order that ships, one that is refused

A callback may be entered more than once (after a crash, say), so what it does outside carries `ctx.idempotency_key`:
the same for every attempt of the step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from toque import (
    Client,
    InstanceErrored,
    NonRetryableError,
    Retries,
    Step,
    StepContext,
    StepFailed,
    Workflow,
    WorkflowEvent,
)


class Order(msgspec.Struct):
    sku: str
    quantity: int
    card: str


class Receipt(msgspec.Struct):
    payment: str
    parcel: str


@dataclass
class Shop:
    """Stands for what real callbacks share: a database pool, an HTTP client. One for each pod."""

    stock: dict[str, int]
    payments: dict[str, str] = field(default_factory=dict)  # by idempotency key

    async def pay(self, key: str, card: str) -> str:
        if card == "stolen":
            raise NonRetryableError("the bank refuses this card")  # no more attempts: the step fails at once
        return self.payments.setdefault(key, f"payment-{key[:8]}")


@asynccontextmanager
async def lifespan() -> AsyncIterator[Shop]:
    """Entered once in each pod; what it yields is `self.env`."""
    yield Shop(stock={"knife": 10})


class Orders(Workflow[Order, Receipt], name="orders"):
    env: Shop

    async def run(self, event: WorkflowEvent[Order], step: Step) -> Receipt:
        order = event.payload
        in_stock, fraud = await asyncio.gather(step.do("check stock", self.check_stock, order),
                                               step.do("check fraud", self.check_fraud, order))
        if fraud or not in_stock:
            raise ValueError("the order is refused")

        try:
            payment = await step.do("pay", self.pay, order.card, retries=Retries(limit=3, delay="1 second"),
                                    timeout="10 seconds")
        except StepFailed as failure:
            await step.do("tell the customer", self.tell, failure.error_message)
            raise

        await step.sleep("let the customer change their mind", "1 second")

        @step.do("ship")
        async def ship(ctx: StepContext) -> str:
            return f"parcel-{ctx.idempotency_key[:8]}"

        return Receipt(payment, await ship())

    async def check_stock(self, order: Order) -> bool:
        return self.env.stock.get(order.sku, 0) >= order.quantity

    def check_fraud(self, order: Order) -> bool:  # not async: it runs in a thread
        return order.quantity > 1000

    async def pay(self, ctx: StepContext, card: str) -> str:
        if ctx.attempt == 1:
            raise ConnectionError("the bank does not answer")  # any other error: tried again, after a delay
        return await self.env.pay(ctx.idempotency_key, card)

    async def tell(self, reason: str) -> None:
        print(f"the order did not go through: {reason}")


async def main() -> None:
    async with Client.connect() as client:
        good = await client.create(Orders, Order("knife", 2, card="valid"))
        bad = await client.create(Orders, Order("knife", 2, card="stolen"))
        receipt = await good.result(timeout="30 seconds")
        print(f"shipped: {receipt.payment}, {receipt.parcel}")
        try:
            await bad.result(timeout="30 seconds")
        except InstanceErrored as error:
            print(f"refused: {error.error_message}")


if __name__ == "__main__":
    asyncio.run(main())
