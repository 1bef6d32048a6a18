"""A data directory that is somebody else's: refused with the name of whose it is, and left as it was."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import lmdb
import msgspec
import pytest
from acceptance.stack import RunAsync, Stack, eventually, toque

from toque._nats_server import NatsServer
from toque.chaos.five_steps import WORKFLOW, Order, result_of
from toque.client import Client
from toque.storage.lmdb_store import Identity, _seal, _unseal
from toque.storage.records import FORMAT

pytestmark = pytest.mark.timeout(90)

APP = "toque.chaos.five_steps"


async def worker_refused(stack: Stack, server: NatsServer, data: Path, *options: str) -> str:
    """What a pod says that ends with exit code 1 instead of serving."""
    done = await asyncio.to_thread(lambda: toque(
        "worker", APP, "--nats", server.url, "--data", str(data), *options, env=stack.ledger.environment))
    assert done.returncode == 1, done
    return done.stderr


def change_format(data: Path, format_: int) -> None:
    """Write another format into the identity of a pod's store."""
    with lmdb.open(str(data / "store"), max_dbs=16, map_size=1 << 30) as environment:
        meta = environment.open_db(b"meta")
        with environment.begin(write=True, db=meta) as transaction:
            identity = msgspec.msgpack.decode(_unseal(b"identity", transaction.get(b"identity", b"")), type=Identity)
            changed = msgspec.msgpack.encode(msgspec.structs.replace(identity, format=format_))
            transaction.put(b"identity", _seal(b"identity", changed))


def test_a_pods_directory_is_its_own(stack: Stack, run_async: RunAsync) -> None:
    """Refused: two pods at once, another pod, another account, a newer format. Afterwards its owner goes on with it."""
    data = stack.directory / "pods" / "one"

    async def scenario() -> None:
        async with stack.server() as server, Client.connect(server.url) as client:
            one = await stack.worker("one", server, data=data)
            await stack.serving(client, "one")
            handle = await client.create(WORKFLOW, Order(1), id="kept")
            await handle.result("20 seconds")

            at_once = await worker_refused(stack, server, data, "--pod", "one")
            one.send(signal.SIGTERM)
            assert await one.exit_code() == 0
            another_pod = await worker_refused(stack, server, data, "--pod", "two")
            another_account = await worker_refused(stack, server, data, "--pod", "one", "--account", "other")
            change_format(data, FORMAT + 1)
            newer = await worker_refused(stack, server, data, "--pod", "one")
            change_format(data, FORMAT)

            assert at_once == (f"toque: {data} is in use by another pod process. Give each pod its own --data "
                               "directory\n")
            assert another_pod == (f"toque: {data}/store belongs to pod 'one' of account 'main', not to pod 'two' of "
                                   "account 'main'. Give each pod its own --data directory.\n")
            assert another_account == (f"toque: {data}/store belongs to pod 'one' of account 'main', not to pod 'one' "
                                       "of account 'other'. Give each pod its own --data directory.\n")
            assert newer == (f"toque: {data}/store was written in format {FORMAT + 1}; this version reads up to "
                             f"{FORMAT}. Upgrade toque, or give another --data directory.\n")
            assert [account.name for account in await client.accounts.list()] == ["main"]
            await stack.worker("one", server, data=data)
            assert await client.handle(WORKFLOW, "kept").result("20 seconds") == result_of(Order(1))
            assert not stack.said("set aside")

    run_async(scenario(), timeout_s=80)


def test_a_pods_directory_must_be_one(stack: Stack, run_async: RunAsync) -> None:
    """A file where the directory should be is named, with the reason of the system."""

    async def scenario() -> None:
        file = stack.directory / "file"
        file.write_text("not a directory")
        async with stack.server() as server:
            said = await worker_refused(stack, server, file / "pod")
        assert said.startswith(f"toque: {file}/pod cannot be used as a pod's directory: Not a directory.")

    run_async(scenario(), timeout_s=80)


def test_the_directory_of_toque_dev_is_one_accounts(stack: Stack, run_async: RunAsync) -> None:
    """Another account, a newer format, or what is none of ours: exit code 1, nothing changed, nothing deleted."""

    async def scenario() -> None:
        async with stack.running(pods=1):
            await eventually(lambda: (stack.dev / "directory.json").exists())

    run_async(scenario(), timeout_s=60)
    identity = stack.dev / "directory.json"
    written = identity.read_text()

    def dev(*options: str) -> str:
        done = toque("dev", APP, "--dir", str(stack.dev), *options, env=stack.ledger.environment)
        assert done.returncode == 1, done
        return done.stderr

    other = dev("--account", "other")
    identity.write_text(written.replace('"format": 1', '"format": 2'))
    newer = dev()
    identity.unlink()
    foreign = dev("--clean")

    assert other == (f"toque: {stack.dev} belongs to the account 'main', not 'other': give another with --dir, or wipe "
                     "it with --clean\n")
    assert newer == (f"toque: {identity} has format 2; this version of Toque knows formats up to 1: run the version "
                     "that wrote it, or wipe the directory with --clean\n")
    assert f"{stack.dev} holds " in foreign and "was not made by `toque dev`: name another with --dir" in foreign
    assert (stack.dev / "nats").is_dir() and (stack.dev / "pods").is_dir()
