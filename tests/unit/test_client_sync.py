"""Promises of the blocking client: it works from any thread, never blocks a loop, and survives interrupts."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from stand_in_owner import StandInOwner

from toque._accounts import ensure_account, ensure_queue_stream
from toque.client import Client, NewInstance
from toque.errors import (
    InstanceNotFound,
    InvalidName,
    MisuseError,
    OwnerAway,
    ResultTimeout,
    SetupError,
    UsageError,
)
from toque.storage.memory_bus import MemoryBroker, MemoryBus
from toque.sync_client import SyncClient, SyncInstance
from toque.workflow import Step, Workflow, WorkflowEvent

NO_SOCKETS = """
import socket, threading
def refuse(*args): raise AssertionError("a connection at import")
socket.socket.connect = socket.socket.connect_ex = refuse
import toque.client, toque.sync_client
client = toque.sync_client.SyncClient("nats://127.0.0.1:1")
client.handle("census", "one")
assert threading.active_count() == 1
"""


class Report(msgspec.Struct):
    lines: int


class Census(Workflow[None, Report], name="census"):
    async def run(self, event: WorkflowEvent[None], step: Step) -> Report:
        return Report(1)


class Place:
    """What a SyncClient connects to: a broker with an owner, on the client's own loop."""

    def __init__(self) -> None:
        self.connections = 0
        self.failures = 0
        self.owner: StandInOwner
        self.loop: asyncio.AbstractEventLoop

    async def connect(self) -> Client:
        self.connections += 1
        if self.failures:
            self.failures -= 1
            raise SetupError("no login")
        self.loop = asyncio.get_running_loop()
        broker = MemoryBroker(random.Random(1))
        bus = MemoryBus(broker)
        account, layout = await ensure_account(bus, "main")
        await ensure_queue_stream(bus, account, layout, "census")
        self.owner = await StandInOwner(bus).open()
        return Client(MemoryBus(broker), owns_bus=True)

    def put(self, *arguments: object, **fields: object) -> None:
        self.loop.call_soon_threadsafe(lambda: self.owner.put(*arguments, **fields))  # type: ignore[arg-type]  # passed on


    def tell(self, *arguments: object, **fields: object) -> None:
        self.loop.call_soon_threadsafe(lambda: self.owner.tell(*arguments, **fields))  # type: ignore[arg-type]  # passed on


@pytest.fixture
def place() -> Place:
    return Place()


@pytest.fixture
def client(place):
    with SyncClient(connect=place.connect) as client:
        yield client


def test_an_instance_goes_its_way(place, client):
    """create, status, result and get, as in the asyncio client."""
    handle = client.create(Census, id="one")
    assert handle.status().status == "queued"

    place.put("census", "one", "complete", output={"lines": 3}, ended_at=1)

    assert handle.result("5 seconds") == Report(3)
    assert client.get(Census, "one").status().output == Report(3)


def test_events_are_watched_as_they_come(place, client):
    """Each is there at once, not by the hundred; leaving the loop ends the watch."""
    client.queues()
    handle = client.handle(Census, "one")
    place.tell("census", "one", "workflow_queued")
    seen = []
    for event in handle.watch():
        seen.append(event.type)
        if len(seen) == 1:
            place.tell("census", "one", "workflow_completed", value={"lines": 3})

    assert seen == ["workflow_queued", "workflow_completed"]
    assert [event.value for event in handle.watch(filter=["workflow_completed"])] == [Report(3)]
    assert next(iter(client.subscribe([handle], cursors={("census", "one"): "1"}))).type == "workflow_completed"


def test_batches_and_lists(place, client):
    """Results per item, and every row of every page."""
    results = client.create_batch("census", (NewInstance(n) for n in range(1500)))
    for result in results:
        place.put("census", result.id, "running", admitted_at=1 + result.index)

    rows = [row.id for row in client.list("census")]

    assert rows == [result.id for result in results]
    assert [row.id for row in client.list(limit=3)] == rows[:3]


def test_accounts_and_reports(client):
    """Everything of the asyncio client is there."""
    client.accounts.create("other", queue_limit=9)
    client.accounts.set("other", queue_limit=10)

    assert client.accounts.describe("other").queue_limit == 10
    assert [account.name for account in client.accounts.list()] == ["main", "other"]
    assert [report.workflow for report in client.queues()] == ["census"]
    assert len(client.stations()) == 8
    assert [report.workflow for report in client.workflows()] == ["census"]
    assert [pod.pod for pod in client.pods()] == ["a", "b"]


def test_a_batch_is_deleted(place, client):
    """With the results of the asyncio client; an error's handle is one of this client."""
    client.queues()
    place.owner.put("census", "a", "running")

    assert [result.code for result in client.delete_batch("census", iter(["a", "none", "a"]))] == [None, 10400, None]
    place.owner.muted = True
    error = client.delete_batch("census", ["b"], timeout="100 milliseconds")[0].error
    assert isinstance(error, OwnerAway) and isinstance(error.handle, SyncInstance)


def test_parked_messages_are_seen_to(place, client):
    """Every call of `client.dead`, with the answers of the asyncio client."""
    client.queues()
    for instance in ("one", "two", "a$b"):
        headers = {"Toque-Subject": f"toque.main.queue.census.1.0.{instance}", "Toque-Reason": "for a test"}
        parking = place.owner.bus.publish("toque.main.dead.create.census", b"7", headers)
        asyncio.run_coroutine_threadsafe(parking, place.loop).result(5)
    dead = client.dead

    assert [message.id for message in dead.list(workflow=Census)] == ["one", "two", "a$b"]
    assert [message.sequence for message in dead.list(kind="create", reason_contains="test", after=1, limit=1)] == [2]
    assert dead.get(1).body == b"7"
    assert [count.messages for count in dead.count()] == [3]
    dead.retry(1)
    assert [type(result.error) for result in dead.retry_many([2, 3])] == [type(None), InvalidName]
    assert (dead.drop(3), dead.drop(3)) == (True, False)
    assert dead.drop_many([3])[0].error is None
    assert list(dead.list()) == []


def test_making_a_client_connects_nothing(place):
    """The first call does; what needs no answer needs no connection."""
    client = SyncClient(connect=place.connect)
    handle = client.handle("census", "one")

    with pytest.raises(InvalidName):
        client.handle("census", "a.b")

    assert str(handle) == "census/one"
    assert place.connections == 0


def test_importing_connects_nothing():
    """Neither the import nor making a client opens a socket or a thread."""
    subprocess.run([sys.executable, "-c", NO_SOCKETS], check=True, timeout=50,
                   env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_a_running_loop_is_not_blocked(place, client):
    """Called from inside a loop's thread it raises and names the other client."""

    async def main():
        client.create("census")

    with pytest.raises(MisuseError, match=r"Client\.connect"):
        asyncio.run(main())

    assert place.connections == 0


def test_threads_share_one_connection(place, client):
    """Many first calls at once make one connection, and each gets its own answer."""
    with ThreadPoolExecutor(8) as threads:
        handles = list(threads.map(lambda n: client.create("census", n, id=f"n{n}"), range(40)))

    assert [handle.id for handle in handles] == [f"n{n}" for n in range(40)]
    assert place.connections == 1


def test_a_connection_that_fails_is_tried_again_by_the_next_call(place, client):
    """The first error is raised to whoever called, and nothing is left behind."""
    place.failures = 1
    threads = threading.active_count()

    with pytest.raises(SetupError, match="no login"):
        client.create("census")

    assert threading.active_count() == threads
    assert client.create("census").workflow == "census"


def test_an_interrupt_leaves_the_client_usable(place, client):
    """Ctrl-C during a call ends that call, also on the loop, and the next one works."""
    client.create("census", id="one")
    place.put("census", "one", "running")
    place.loop.call_soon_threadsafe(interrupt_when_waiting, place)

    with pytest.raises(KeyboardInterrupt):
        client.get("census", "one").result()

    assert client.handle("census", "one").status().status == "running"
    assert not [task for task in asyncio.all_tasks(place.loop) if "Instance.result" in repr(task)]


def interrupt_when_waiting(place: Place) -> None:
    """Runs on the client's loop: SIGINT to this process as soon as the owner was asked to hold an answer back."""
    if any(operation == "wait" for _, operation in place.owner.asked):
        os.kill(os.getpid(), signal.SIGINT)
    else:
        place.loop.call_soon(interrupt_when_waiting, place)


def test_errors_carry_blocking_handles(place, client):
    """The handle of an error is one that its reader can use."""
    client.create("census", id="one")
    place.put("census", "one", "running")

    with pytest.raises(ResultTimeout) as caught:
        client.handle(Census, "one").result("100 ms")

    assert isinstance(caught.value.handle, SyncInstance)
    assert caught.value.handle.status().status == "running"


def test_items_of_a_batch_carry_blocking_handles(place, client):
    """So do the errors inside of results."""
    client.stations()
    asyncio.run_coroutine_threadsafe(place.owner.close(), place.loop).result(5)

    [result] = client.create_batch("census", [NewInstance(1, "one")], timeout="200 ms")

    assert isinstance(result.error, OwnerAway)
    assert isinstance(result.error.handle, SyncInstance)


def test_mistakes_and_lost_races_are_raised_as_they_are(client):
    """The errors are those of the asyncio client."""
    with pytest.raises(InstanceNotFound):
        client.get("census", "nobody")
    with pytest.raises(UsageError):
        list(client.list(status="done"))


def test_a_closed_client_says_so(place, client):
    """Closing twice is fine; later calls are mistakes."""
    client.create("census")

    client.close()
    client.close()

    with pytest.raises(MisuseError, match="closed"):
        client.create("census")


def test_closing_ends_a_call_of_another_thread(place, client):
    """A waiting thread hears that the client was closed, at once."""
    client.create("census", id="one")
    place.put("census", "one", "running")
    asked = threading.Event()
    place.loop.call_soon_threadsafe(tell_when_waiting, place, asked)

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.handle("census", "one").result)
        assert asked.wait(10)
        client.close()

        with pytest.raises((MisuseError, OwnerAway)):
            waiting.result(10)


def tell_when_waiting(place: Place, asked: threading.Event) -> None:
    if any(operation == "wait" for _, operation in place.owner.asked):
        asked.set()
    else:
        place.loop.call_soon(tell_when_waiting, place, asked)
