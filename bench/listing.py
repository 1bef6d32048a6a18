"""What lists cost and keep while instances are created: pages of many instances under a steady rate of creations.

    python bench/listing.py [--instances 100000] [--rate 1000] [--json FILE]

The instances are complete before; then, with creations at the rate, the first page is asked for again and again, and the
list is read to its end from both ends and by a filter. A row that is missing or comes twice fails the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop
from throughput import APP, ONE_STEP, commit, machine

from toque import Client, NewInstance
from toque._cluster import DevCluster

FIRST_PAGES = 300
PAGE_ROWS = 100
FILLED_S_MAX = 300.0
LISTED_S_MAX = 400.0
TICK_S = 0.05


async def fill(client: Client, instances: int) -> set[str]:
    """Create so many, and wait until all are complete. Their ids."""
    results = await client.create_batch(ONE_STEP, [NewInstance(number) for number in range(instances)], timeout="2 minutes")
    ids = {result.id for result in results if result.error is None}
    async with asyncio.timeout(FILLED_S_MAX):
        while (await client.counts(ONE_STEP)).get(ONE_STEP, {}).get("complete", 0) < len(ids):
            await asyncio.sleep(1)
    return ids


class Creations:
    """Creates at a steady rate, over its own connection."""

    def __init__(self, client: Client, rate: float) -> None:
        self._client = client
        self._rate = rate
        self.created = 0
        self.begun = time.monotonic()

    @property
    def reached(self) -> float:
        """Creations each second, so far."""
        return self.created / (time.monotonic() - self.begun)

    async def run(self) -> None:
        while True:
            due = round((time.monotonic() - self.begun) * self._rate) - self.created
            if due > 0:
                results = await self._client.create_batch(ONE_STEP, [NewInstance(number) for number in range(due)])
                self.created += sum(result.error is None for result in results)
            await asyncio.sleep(TICK_S)


@asynccontextmanager
async def creating(url: str, rate: float) -> AsyncIterator[Creations]:
    async with Client.connect(url) as client:
        creations = Creations(client, rate)
        task = asyncio.ensure_future(creations.run())
        try:
            yield creations
        finally:
            task.cancel()


async def first_pages(client: Client, **filters: Any) -> dict[str, float]:
    """Milliseconds of a first page."""
    times_ms = []
    for _ in range(FIRST_PAGES):
        begun = time.perf_counter()
        page = await client.list_page(ONE_STEP if filters else None, limit=PAGE_ROWS, order="newest", **filters)
        times_ms.append((time.perf_counter() - begun) * 1000)
        assert len(page.rows) == PAGE_ROWS
        await asyncio.sleep(TICK_S / 5)
    quantiles = statistics.quantiles(times_ms, n=100)
    return {"p50_ms": round(quantiles[49], 1), "p99_ms": round(quantiles[98], 1), "max_ms": round(max(times_ms), 1)}


async def whole_list(client: Client, ids: set[str], **filters: Any) -> dict[str, float]:
    """Read to the end, page by page; what is missing and what came twice of those that do not change."""
    seen: dict[str, int] = {}
    pages, rows, cursor = 0, 0, None
    begun = time.perf_counter()
    async with asyncio.timeout(LISTED_S_MAX):
        while cursor is not None or not pages:
            page = await client.list_page(cursor=cursor, limit=PAGE_ROWS, **({} if cursor else filters))
            pages, rows, cursor = pages + 1, rows + len(page.rows), page.cursor
            for row in page.rows:
                seen[row.id] = seen.get(row.id, 0) + 1
    took_s = time.perf_counter() - begun
    return {"pages": pages, "rows": rows, "took_s": round(took_s, 1), "ms_per_page": round(took_s / pages * 1000, 1),
            "dropped": len(ids - seen.keys()), "repeated": sum(times > 1 for times in seen.values())}


async def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The figures by name, printed as they come."""
    figures: dict[str, Any] = {}
    cluster = DevCluster(APP, directory=directory, pods=2, on_line=lambda who, text: None)
    await cluster.start()
    try:
        async with Client.connect(cluster.url) as client:
            ids = await fill(client, options.instances)
            async with creating(cluster.url, options.rate) as creations:
                await asyncio.sleep(2)
                for name, measuring in {
                    "first page, newest": first_pages(client),
                    "first page, newest, complete ones of a workflow": first_pages(client, status="complete"),
                    "list, newest first": whole_list(client, ids, order="newest"),
                    "list, oldest first, complete ones": whole_list(client, ids, order="oldest", status="complete"),
                }.items():
                    figures[name] = await measuring | {"created_per_s": round(creations.reached)}
                    print(f"{name:<50}{figures[name]}", flush=True)
    finally:
        await cluster.stop()
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What lists cost and keep while instances are created.")
    parser.add_argument("--instances", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=1_000.0, help="creations each second meanwhile")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="toque-listing-") as directory:
        figures = uvloop.run(run(options, Path(directory)))
    if options.json:
        document = {"bench": "listing", "commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "machine": machine(), "instances": options.instances, "figures": figures}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if any(figure.get("dropped") or figure.get("repeated") for figure in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
