"""A pod of this process on a real server and LMDB, for integration tests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from toque._accounts import ensure_account
from toque._app import App
from toque._protocol import AccountRecord
from toque.client import Client
from toque.storage.lmdb_store import LmdbStore
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import NatsOptions
from toque.storage.system import SystemClock
from toque.workers.attempt import Callbacks
from toque.workers.keeper_thread import KeeperThread
from toque.workers.loop_watch import LoopWatch
from toque.workers.pod import Pod
from toque.workers.snapshot_taker import SnapshotRules

STATIONS = 4
RULES = SnapshotRules()


@asynccontextmanager
async def pod(app: App, name: str, directory: Path, options: NatsOptions, *,
              rules: SnapshotRules = RULES) -> AsyncIterator[Pod]:
    """A pod of this process, on a directory of its own."""

    def damaged(error: Exception) -> None:
        raise error

    store = LmdbStore(directory / name, account="main", pod=name, on_damage=damaged)
    bus = await NatsBus.connect(options)
    account, layout = await ensure_account(bus, "main", defaults=AccountRecord(name="main", stations=STATIONS))
    clock, callbacks = SystemClock(), Callbacks(4)
    loop_watch = LoopWatch(clock, ttl_s=account.ttl_s)
    loop_watch.start()
    made = Pod(app, pod=name, account=account, layout=layout, bus=bus, store=store, clock=clock, rng=random.Random(1),
               make_keeper=lambda session, on_lost: KeeperThread(
                   lambda: NatsBus.connect(options), "main", clock, session, callbacks=callbacks,
                   loop_watch=loop_watch, on_lost=on_lost),
               callbacks=callbacks, loop_watch=loop_watch, snapshot_rules=rules)
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


async def owned(client: Client) -> bool:
    """Whether every station has an owner."""
    return all(report.view is not None for report in await client.stations())
