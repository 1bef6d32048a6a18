"""What chaos scenarios run against: a local cluster of their own, or a deployment of the user's with a ledger beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from toque._cluster import DevCluster
from toque.chaos import partition, processes
from toque.chaos.ledger import Ledger
from toque.chaos.links import Link
from toque.chaos.topology import LedgerAt, Topology
from toque.client import Client, Connecting
from toque.errors import UsageError

APP: Final = "toque.chaos.five_steps"
PODS: Final = 3
LEDGER_FILE: Final = "ledger.jsonl"
LEDGER_SOCKET: Final = "socket"
EVERYWHERE: Final = "0.0.0.0"
DEFAULT_PORT: Final = 4222
END_S_MAX: Final = 3.0  # nothing is worth a longer hand-over


@asynccontextmanager
async def own_cluster(directory: Path, *, ttl_s: float, pods: int = PODS, links: bool = False, parted: bool = False,
                      worker_options: Sequence[str] = (), hear: Callable[[str, str], None]) -> AsyncIterator[Topology]:
    """Server, pods and ledger on this host, all ended at the end.

    `links` puts a link between each pod and the server; `parted` gives each pod an address of its own for the server,
    in the network namespace that this process must have entered. Raises SetupError, Unavailable.
    """
    made: dict[str, Link] = {}
    addresses: dict[str, str] = {}

    async def way(pod: str, url: str) -> str:
        port = urlsplit(url).port or DEFAULT_PORT
        if parted:
            addresses[pod] = partition.address_of(len(addresses))
            return f"nats://{addresses[pod]}:{port}"
        if links:
            made[pod] = Link("127.0.0.1", port)
            return await made[pod].open()
        return url

    with await asyncio.to_thread(Ledger.start, directory / LEDGER_FILE) as ledger:
        cluster = DevCluster(APP, directory=directory / "cluster", pods=pods, ttl_s=ttl_s, on_line=hear,
                             env=ledger.environment, way=way, host=EVERYWHERE if parted else "127.0.0.1",
                             worker_options=worker_options)
        await cluster.start()
        try:
            async with Client.connect(cluster.url, name="toque chaos") as client:
                yield Topology(
                    client=client, connect=lambda: Client.connect(cluster.url, name="toque chaos watch"),
                    url=cluster.url, ledger=LedgerAt(ledger.socket, ledger.file), ttl_s=ttl_s,
                    server_pid=lambda: cluster.server_pid, links=made, addresses=addresses,
                    server_port=urlsplit(cluster.url).port or DEFAULT_PORT, monitor_url=cluster.monitor_url,
                    pods_wanted=pods, stores=[pod.data for pod in cluster.pods.values()])
        finally:
            await cluster.stop(END_S_MAX)
            for link in made.values():
                await link.close()


@asynccontextmanager
async def deployment(connect: Callable[[], Connecting], *, url: str, ledger: Path, ttl_s: float | None,
                     restart_log: Path | None) -> AsyncIterator[Topology]:
    """The user's own server and pods. `ledger` is the directory of a running `toque chaos ledger`.

    Raises UsageError (no ledger there), SetupError, BrokerUnavailable.
    """
    place = LedgerAt(ledger / LEDGER_SOCKET, ledger / LEDGER_FILE)
    if not place.socket.exists():
        raise UsageError(f"no ledger runs in {ledger}: start one with `toque chaos ledger --dir {ledger}`, and the pods "
                         "as it says")
    async with connect() as client:
        account = await client.accounts.describe(client.account)
        address = urlsplit(url if "://" in url else f"nats://{url}")
        host, port = address.hostname or "127.0.0.1", address.port or DEFAULT_PORT

        def server_pid() -> int:
            return processes.listener(port) if processes.is_local(host) else 0

        yield Topology(client=client, connect=connect, url=url, ledger=place, ttl_s=ttl_s or account.ttl_s,
                       server_pid=server_pid, restart_log=restart_log)
