"""A refund that a person approves, after the shop has sent the receipt: two events, and a wait that gives up.

    toque dev examples/refund.py           # a server and two pods; leave it running
    python examples/refund.py              # in another terminal: one approved, one rejected, one that nobody looks at

Decide by hand what is still open: `toque instances approve refund ID "sign off" --by you`.
"""

from __future__ import annotations

import asyncio

import msgspec

from toque import Client, EventTimeout, Step, Workflow, WorkflowEvent


class Receipt(msgspec.Struct):
    number: str
    cents: int


class Refund(Workflow[str, str], name="refund"):
    async def run(self, event: WorkflowEvent[str], step: Step) -> str:
        customer = event.payload
        try:
            receipt = await step.wait_for_event("receipt", "receipt", timeout="3 seconds", result_type=Receipt)
        except EventTimeout:
            return f"{customer}: no receipt"

        decision = await step.wait_for_approval("sign off", timeout="7 days")
        if not decision.approved:
            return f"{customer}: rejected by {decision.by} ({decision.comment})"
        paid = await step.do("pay back", self.pay_back, receipt.cents)
        return f"{customer}: {paid}, approved by {decision.by}"

    async def pay_back(self, cents: int) -> str:
        return f"{cents / 100:.2f} paid back"


async def main() -> None:
    async with Client.connect() as client:
        ada, bob, eve = [await client.create(Refund, name) for name in ("Ada", "Bob", "Eve")]
        await ada.send_event("receipt", Receipt("A-17", 1250))
        await bob.send_event("receipt", Receipt("A-18", 990_000))
        await bob.reject("sign off", by="Mo", comment="too much")  # may be said before anybody asks
        await ada.approve("sign off", by="Mo")
        for refund in (ada, bob, eve):
            print(await refund.result(timeout="30 seconds"))


if __name__ == "__main__":
    asyncio.run(main())
