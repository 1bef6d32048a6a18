"""The lock on a pod's directory, which proves its process dead, and what may be done with that proof (rule 8)."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import msgspec

from toque import _subjects as subjects
from toque._accounts import ensure_account
from toque._protocol import AccountRecord, SessionRecord
from toque.sim.loop import run
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.workers.session import DirectoryLock, decode_session, end_dead_session


def test_a_directory_is_locked_by_one_process(tmp_path):
    """The second one is told so; when the first is gone it gets the directory."""
    first, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path)

    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()


def test_the_directory_knows_its_last_session(tmp_path):
    """Written before the session is opened, so that a process that dies at once leaves it behind."""
    lock = DirectoryLock(tmp_path)
    assert lock.last_session() == ""

    lock.remember_session("a-1")
    lock.remember_session("a-2")
    lock.release()

    assert DirectoryLock(tmp_path).last_session() == "a-2"


def on_account(check: Callable[[MemoryBus], Awaitable[None]]) -> None:
    async def main() -> None:
        bus = MemoryBus(MemoryBroker(random.Random(1)))
        await ensure_account(bus, "main", defaults=AccountRecord(name="main"))
        record = SessionRecord(pod="a", session="a-1", ttl_s=10.0)
        await bus.publish(subjects.control_session("main", "a-1"), msgspec.json.encode(record))
        await check(bus)

    run(main(), seed=1)


async def ended(bus: MemoryBus) -> str:
    message = await bus.last_message(subjects.control_stream("main"), subjects.control_session("main", "a-1"))
    assert message is not None
    record = decode_session(message)
    assert record is not None
    return record.ended


def test_a_dead_pods_session_is_ended_at_once(tmp_path):
    """Nobody has its directory: no process of it lives."""
    lock = DirectoryLock(tmp_path)
    lock.remember_session("a-1")
    lock.release()

    async def check(bus: MemoryBus) -> None:
        assert await end_dead_session(bus, "main", tmp_path) == "a-1"
        assert await ended(bus) == "dead"

    on_account(check)


def test_the_session_of_a_living_process_is_left_alone(tmp_path):
    """Another process of the pod was started meanwhile, and has the directory."""
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    lock.remember_session("a-1")

    async def check(bus: MemoryBus) -> None:
        assert await end_dead_session(bus, "main", tmp_path) == ""
        assert await ended(bus) == ""

    on_account(check)
    lock.release()
