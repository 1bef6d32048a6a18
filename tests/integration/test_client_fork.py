"""Promises of the blocking client in processes that fork, as Celery's and gunicorn's do."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid

from toque import _subjects
from toque._accounts import ensure_account, ensure_queue_stream
from toque.storage.nats_bus import NatsBus
from toque.storage.nats_options import NatsOptions

FORKS = """
import os, sys, threading
from toque.sync_client import SyncClient

client = SyncClient(sys.argv[1], account=sys.argv[2])
client.create("census", {"made in": "parent"}, id="parent")
handle = client.handle("census", "parent")

def child(number):
    assert threading.active_count() == 1
    client.create("census", {"made in": number}, id=None)
    client.create_batch("census", [])
    client.close()
    os._exit(0)

children = []
for number in range(4):
    pid = os.fork()
    if pid == 0:
        try:
            child(number)
        finally:
            os._exit(1)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
assert codes == [0] * 4, codes
client.create("census", {"made in": "parent"})
client.close()
"""

FORKS_IN_A_CALL = """
import multiprocessing, sys, threading
from toque.sync_client import SyncClient

client = SyncClient(sys.argv[1], account=sys.argv[2])

def create(number):
    return client.create("census", number).id

if __name__ == "__main__":
    stop = threading.Event()
    def keep_creating():
        while not stop.is_set():
            client.create("census")
    busy = threading.Thread(target=keep_creating)
    busy.start()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        ids = pool.map(create, range(30))
    stop.set()
    busy.join()
    assert len(set(ids)) == 30
    print("\\n".join(ids))
"""


def run_script(script: str, url: str, account: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, url, account], timeout=50,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


class QueueOf:
    """A new account with a queue, and a look into it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.account = f"f{uuid.uuid4().hex[:12]}"

    async def __aenter__(self) -> QueueOf:
        self.bus = await NatsBus.connect(NatsOptions(servers=(self.url,)))
        account, layout = await ensure_account(self.bus, self.account)
        await ensure_queue_stream(self.bus, account, layout, "census")
        self.owner = await self.bus.subscribe(f"toque.{self.account}.station.*.*.exists",
                                              lambda message: self.bus.respond(message, b"\x81\xa5epoch\x01"))
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in await self.bus.list_streams(f"toque+{self.account}+"):
            await self.bus.delete_stream(stream)
        await self.bus.close()

    async def ids(self) -> set[str]:
        info = await self.bus.stream_info(_subjects.queue_stream(self.account, "census"),
                                          subjects_filter=f"toque.{self.account}.queue.>")
        return {_subjects.parse_queue(subject).instance_id for subject in info.subjects}


def test_parents_and_children_use_one_client_object(nats_url, run_async):
    """Each child makes its own connection and thread; the parent's goes on undisturbed."""

    async def main():
        async with QueueOf(nats_url) as queue:
            await asyncio.to_thread(run_script, FORKS, nats_url, queue.account)

            assert len(await queue.ids()) == 6

    run_async(main(), timeout_s=55)


def test_a_fork_in_the_middle_of_another_thread_s_call_is_safe(nats_url, run_async):
    """A lock held by a thread that the child does not have blocks nobody, and ids are never made twice."""

    async def main():
        async with QueueOf(nats_url) as queue:
            made = await asyncio.to_thread(run_script, FORKS_IN_A_CALL, nats_url, queue.account)

            assert set(made.split()) <= await queue.ids()

    run_async(main(), timeout_s=55)
