"""The bench's APP: workflows whose callbacks do nothing, so that what is measured is the engine."""

from __future__ import annotations

from toque import Step, Workflow, WorkflowEvent

ONE_STEP, TEN_STEPS, MANY_STEPS = "one-step", "ten-steps", "many-steps"


async def add_one(number: int) -> int:
    return number + 1


class OneStep(Workflow[int, int], name=ONE_STEP):
    """One step."""

    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        return await step.do("add", add_one, event.payload)


class TenSteps(Workflow[int, int], name=TEN_STEPS):
    """Ten steps, one after the other."""

    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        number = event.payload
        for _ in range(10):
            number = await step.do("add", add_one, number)
        return number


class ManySteps(Workflow[int, int], name=MANY_STEPS):
    """As many steps, one after the other, as the params say."""

    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        number = 0
        for _ in range(event.payload):
            number = await step.do("add", add_one, number)
        return number
