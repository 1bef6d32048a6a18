"""Snapshots on the real server and LMDB: the journal stays short under load, and a pod without a disk has everything."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from toque import _subjects as subjects
from toque._accounts import ensure_account
from toque._app import App
from toque._nats_server import NatsServer
from toque._protocol import AccountRecord
from toque.client import Client, NewInstance
from toque.storage.lmdb_store import LmdbStore
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import NatsOptions
from toque.storage.system import SystemClock
from toque.workers.attempt import Callbacks
from toque.workers.keeper_thread import KeeperThread
from toque.workers.loop_watch import LoopWatch
from toque.workers.pod import Pod
from toque.workers.snapshot_taker import SnapshotRules
from toque.workflow import Step, Workflow, WorkflowEvent

RULES = SnapshotRules(journal_bytes_min=64 * 1024, held_back_bytes_min=1024 * 1024)
RUN_S_MAX = 240.0
POLL_S = 0.05
INSTANCES = 50_000
LOT = 5_000
STATIONS = 4


class Nothing(Workflow[int, int], name="nothing"):
    """One step that does nothing."""

    async def run(self, event: WorkflowEvent[int], step: Step) -> int:
        async def callback() -> int:
            return event.payload

        return await step.do("only", callback)


APP = App(workflows={"nothing": Nothing}, lifespan=None, reference="test", files=[])


@asynccontextmanager
async def pod(name: str, directory: Path, options: NatsOptions) -> AsyncIterator[Pod]:
    """A pod of this process, on a directory of its own."""

    def damaged(error: Exception) -> None:
        raise error

    store = LmdbStore(directory / name, account="main", pod=name, on_damage=damaged)
    bus = await NatsBus.connect(options)
    account, layout = await ensure_account(bus, "main", defaults=AccountRecord(name="main", stations=STATIONS))
    clock, callbacks = SystemClock(), Callbacks(4)
    loop_watch = LoopWatch(clock, ttl_s=account.ttl_s)
    loop_watch.start()
    made = Pod(APP, pod=name, account=account, layout=layout, bus=bus, store=store, clock=clock, rng=random.Random(1),
               make_keeper=lambda session, on_lost: KeeperThread(
                   lambda: NatsBus.connect(options), "main", clock, session, callbacks=callbacks,
                   loop_watch=loop_watch, on_lost=on_lost),
               callbacks=callbacks, loop_watch=loop_watch, snapshot_rules=RULES)
    running = asyncio.ensure_future(made.run(grace_s=5.0))
    try:
        yield made
    finally:
        made.stop()
        await running
        await bus.close()
        store.close()
        callbacks.close()
        loop_watch.close()


async def until(condition, what: str) -> None:
    give_up = time.monotonic() + RUN_S_MAX
    while not await condition():
        assert time.monotonic() < give_up, f"not in time: {what}"
        await asyncio.sleep(POLL_S)


async def ended(client: Client) -> int:
    return sum(queue.counts.get("complete", 0) for report in await client.stations() if report.view
               for queue in report.view.queues)


async def owned(client: Client) -> bool:
    return all(report.view is not None for report in await client.stations())


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
        async with pod("a", directory, options):
            await until(lambda: owned(client), "a has every station")
            for first in range(0, INSTANCES, LOT):
                await client.create_batch("nothing", [NewInstance(1, id=f"i{first + n}") for n in range(LOT)])
                await until(lambda first=first: reached(client, first + LOT), "the lot has ended")
            await until(lambda: trimmed(bus, client), "the journal is short")
        async with pod("b", directory, options):
            await until(lambda: owned(client), "b has every station")
            views = [report.view for report in await client.stations() if report.view]
            assert {view.restored.source for view in views if view.restored} == {"snapshot"}
            assert await ended(client) == INSTANCES
            restored_ms = sum(view.restored_ms for view in views)
            print(f"restored {INSTANCES:,} instances in {restored_ms} ms: "
                  f"{INSTANCES / max(1, restored_ms) * 1000:,.0f} instances/s")
        async with pod("b", directory, options):
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
