"""The disk under the server's store runs full in the middle of the work: refused explicitly, shown, healed, nothing lost.

The store lies on a small tmpfs, which only root may mount; elsewhere the test is skipped with that reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance.load import Load
from acceptance.stack import APPS, RunAsync, Stack, eventually, toque

from toque.client import Client
from toque.errors import BrokerUnavailable, InstanceNotFound

pytestmark = pytest.mark.timeout(150)

DISK = "64m"
FILLER = "filler"
WRITE_DEAD = ("the server does not answer journal writes", "the server refuses journal writes",
              "no new session can be opened")
CHUNK = bytes(256 * 1024)
LARGE = "x" * 100_000  # fits into no page of the file system that is allocated already


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 64 MiB."""
    place = tmp_path / "nats"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)],
                             capture_output=True, text=True, check=False)
    if mounted.returncode:
        reason = f"a small file system cannot be mounted here (user {os.geteuid()}): {mounted.stderr.strip()}"
        if os.environ.get("CI") == "true" and os.geteuid() == 0:
            pytest.fail(reason)
        pytest.skip(reason)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    """Use up every byte that is left."""
    with (disk / FILLER).open("ab", buffering=0) as file:
        for size in (len(CHUNK), 1):
            with contextlib.suppress(OSError):
                while file.write(CHUNK[:size]):
                    pass


def jetstream_on(disk: Path) -> str:
    """A configuration whose limit lies above the disk, so that the disk itself says no."""
    return f'jetstream {{ store_dir: "{disk}", sync_interval: always, max_file_store: 1GB }}'


def test_a_full_disk_loses_nothing(stack: Stack, small_disk: Path, run_async: RunAsync) -> None:
    """Creations end refused or unknown, pods show the dead journal; space and a restart of the server heal it.

    It lasts longer than the TTL, so that every session ends meanwhile. A small message may still fit into a page that
    its stream has; acknowledged then, it is not lost either.
    """

    async def scenario() -> None:
        load = Load(stack, callback_ms=50)
        async with stack.server(extra_config=jetstream_on(small_disk)) as server, Client.connect(server.url) as client:
            for name in ("one", "two"):
                await stack.worker(name, server, "--ttl", "2s", app=str(APPS / "kitchen.py"))
            await stack.serving(client, "one", "two")
            await load.create(client, 200, limit=20)
            await load.until_left(200)

            await eventually(lambda: full_and_shown(small_disk, server.url))
            await asyncio.gather(*(load.create_one(client, timeout="1 second") for _ in range(4)))
            with pytest.raises(BrokerUnavailable):
                await client.create("echo", LARGE, id="large", timeout="1 second")
            await eventually(lambda: stack.said("session over", "one") and stack.said("session over", "two"))
            entered = len(stack.ledgered().visits)
            (small_disk / FILLER).unlink()
            await server.stop()
            await server.start()

            await load.results(client)
            assert entered < 5 * 200, "the work was done before the disk ran full"
            assert all(worker.child.alive for worker in stack.workers.values())
            load.assert_nothing_lost()
            await eventually(lambda: shows_health(server.url))
            assert await runs_once_or_never(client)

    run_async(scenario(), timeout_s=140)


async def runs_once_or_never(client: Client) -> bool:
    """What became of the large creation, whose outcome was unknown."""
    try:
        return len(await client.handle("echo", "large").result("20 seconds")) == len(LARGE)
    except InstanceNotFound:
        return True


async def full_and_shown(disk: Path, url: str) -> bool:
    """Fill what the server has freed since the last time; whether `toque pods` shows a write-dead journal by now."""
    await asyncio.to_thread(fill, disk)
    table = await pods_table(url)
    return any(words in table for words in WRITE_DEAD)


async def shows_health(url: str) -> bool:
    table = await pods_table(url)
    return not any(words in table for words in WRITE_DEAD) and " ok " in table


async def pods_table(url: str) -> str:
    done = await asyncio.to_thread(lambda: toque("pods", "--nats", url))
    return done.stdout
