"""Snapshots on the real server and LMDB: the journal stays short under load, and a pod without a disk has everything."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from pod_here import owned, pod

from toque import _subjects as subjects
from toque._app import App
from toque._nats_server import NatsServer
from toque.client import Client, NewInstance
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import NatsOptions
from toque.workers.snapshot_taker import SnapshotRules
from toque.workflow import Step, Workflow, WorkflowEvent

RULES = SnapshotRules(journal_bytes_min=64 * 1024, held_back_bytes_min=1024 * 1024)
RUN_S_MAX = 240.0
POLL_S = 0.05
INSTANCES = 50_000
LOT = 5_000


class Nothing(Workflow[int, int], name="nothing"):
    """One step that does nothing."""

    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        async def callback() -> int:
            return event.payload

        return await step.do("only", callback)


APP = App(workflows={"nothing": Nothing}, lifespan=None, reference="test", files=[])


async def until(condition, what: str) -> None:
    give_up = time.monotonic() + RUN_S_MAX
    while not await condition():
        assert time.monotonic() < give_up, f"not in time: {what}"
        await asyncio.sleep(POLL_S)


async def ended(client: Client) -> int:
    return sum(queue.counts.get("complete", 0) for report in await client.stations() if report.view
               for queue in report.view.queues)


@pytest.mark.timeout(400)
def test_the_journal_stays_short_and_a_pod_without_a_disk_restores_everything(tmp_path: Path) -> None:
    """50,000 instances of one step: the journal keeps what two snapshots need, and a new pod reads a snapshot and the
    rest; then the same pod again reads its own disk."""

    async def main() -> None:
        server = NatsServer(tmp_path / "nats")
        await server.start()
        try:
            await story(server.url, tmp_path)
        finally:
            await server.stop()

    asyncio.run(main())


async def story(url: str, directory: Path) -> None:
    options = NatsOptions(servers=(url,))
    async with Client.connect(url) as client:
        bus = await NatsBus.connect(options)
        async with pod(APP, "a", directory, options, rules=RULES):
            await until(lambda: owned(client), "a has every station")
            for first in range(0, INSTANCES, LOT):
                await client.create_batch("nothing", [NewInstance(1, id=f"i{first + n}") for n in range(LOT)])
                await until(lambda first=first: reached(client, first + LOT), "the lot has ended")
            await until(lambda: trimmed(bus, client), "the journal is short")
        async with pod(APP, "b", directory, options, rules=RULES):
            await until(lambda: owned(client), "b has every station")
            views = [report.view for report in await client.stations() if report.view]
            assert {view.restored.source for view in views if view.restored} == {"snapshot"}
            assert await ended(client) == INSTANCES
            restored_ms = sum(view.restored_ms for view in views)
            print(f"restored {INSTANCES:,} instances in {restored_ms} ms: "
                  f"{INSTANCES / max(1, restored_ms) * 1000:,.0f} instances/s")
        async with pod(APP, "b", directory, options, rules=RULES):
            await until(lambda: owned(client), "b has every station again")
            views = [report.view for report in await client.stations() if report.view]
            assert {view.restored.source for view in views if view.restored} == {"local"}
            assert await ended(client) == INSTANCES
        await bus.close()


async def reached(client: Client, count: int) -> bool:
    return await ended(client) == count


async def trimmed(bus: NatsBus, client: Client) -> bool:
    """The stream has lost its front, and holds no more than what each station may need behind its second snapshot."""
    info = await bus.stream_info(subjects.journal_stream("main"))
    views = [report.view for report in await client.stations() if report.view]
    snapshots = sum(view.snapshots[-1].size_bytes for view in views if view.snapshots)
    assert all(len(view.snapshots) <= 3 for view in views)
    bound = 2 * sum(max(RULES.journal_bytes_min, view.snapshots[-1].size_bytes if view.snapshots else 0)
                    for view in views) + max(RULES.held_back_bytes_min, snapshots)
    return info.first_sequence > 1 and info.stored_bytes < bound
