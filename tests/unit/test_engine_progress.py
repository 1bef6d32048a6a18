"""What an engine reports of its progress, live and replayed."""

from __future__ import annotations

from typing import Any

import msgspec
from unit.engine_host import EngineHost, Recorder, play

from toque.workflow import Step, Workflow, WorkflowEvent


class Speaking(Workflow[Any, Any], name="flow"):
    async def run(self, event: WorkflowEvent[Any], step: Step) -> Any:
        for name in ("a", "b", "c"):
            self.report_progress(name)
            await step.do(name, self.env.work, 1, 1.0)
        return 3


def shown(host: EngineHost) -> Any:
    assert host.engine is not None
    report = host.engine.progress.shown(host.engine.accepted_to) if host.engine.progress else None
    return report and msgspec.msgpack.decode(report.value)


def test_a_replayed_run_reports_from_its_last_outcome_on() -> None:
    """What came before it was told already, or is old; what comes behind it is told again."""

    async def story() -> None:
        host = EngineHost(Speaking, env=Recorder())
        host.create()
        await host.cut_after(3)
        assert host.reports == 3
        host.load()

        assert shown(host) == "c"
        assert host.reports == 4
        await host.output()
        assert host.reports == 4

    play(story)


def test_run_reports_before_its_first_step() -> None:
    """A first run has nothing to replay."""

    async def story() -> None:
        host = EngineHost(Speaking, env=Recorder())
        host.create()
        await host.settle()
        assert host.reports >= 1
        await host.output()

    play(story)
