"""The demo's APP: one `census` instance per file, and one `report` that gathers their results into a page.

Callbacks are synchronous where they compute, so that they run in threads beside the pod's loop. Each reports to the
ledger that it was entered and left; without a ledger (TOQUE_LEDGER) the app does not start.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import sys
import warnings
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import msgspec

from toque.chaos.ledger import LedgerClient
from toque.client import Client
from toque.demo.measure import (
    Digest,
    FileReport,
    Measures,
    Resolution,
    Symbols,
    hash_file,
    measure_file,
    resolve_imports,
    symbols_of,
)
from toque.demo.report import Facts, page
from toque.demo.summary import Summary, merge, summarise
from toque.workflow import Retries, Step, StepContext, Workflow, WorkflowEvent

STEPS = ("hash", "measure", "symbols", "resolve")
GATHER_BATCH = 250  # results per step of the report
READS_IN_FLIGHT = 32
SWITCH_INTERVAL_S = 0.001  # of threads: computing ones let the pod's loop in sooner than after Python's 5 ms
RETRIES = Retries(limit=3, delay="1 second")


@dataclass
class Kitchen:
    """What the callbacks of one pod share."""

    ledger: LedgerClient
    distributions: Mapping[str, list[str]]  # top-level module → what installed it


@asynccontextmanager
async def lifespan() -> AsyncIterator[Kitchen]:
    warnings.simplefilter("ignore")  # of the files' own syntax
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    distributions = await asyncio.to_thread(importlib.metadata.packages_distributions)
    yield Kitchen(LedgerClient(pod=os.environ.get("TOQUE_POD", "")), distributions)


class FileParams(msgspec.Struct, frozen=True):
    """The file to look at."""

    path: str


class Census(Workflow[FileParams, FileReport], name="census"):
    """Looks at one Python file, in four steps."""

    env: Kitchen

    async def run(self, event: WorkflowEvent[FileParams], step: Step) -> FileReport:
        path = event.payload.path
        digest = await step.do("hash", self.hash, path, retries=RETRIES)
        measures = await step.do("measure", self.measure, path, retries=RETRIES)
        symbols = await step.do("symbols", self.symbols, path, retries=RETRIES)
        resolution = await step.do("resolve", self.resolve, symbols.imports, retries=RETRIES)
        return FileReport(path, digest, measures, symbols, resolution)

    def hash(self, ctx: StepContext, path: str) -> Digest:
        with self.env.ledger.inside(ctx):
            return hash_file(path)

    def measure(self, ctx: StepContext, path: str) -> Measures:
        with self.env.ledger.inside(ctx):
            return measure_file(path)

    def symbols(self, ctx: StepContext, path: str) -> Symbols:
        with self.env.ledger.inside(ctx):
            return symbols_of(path)

    def resolve(self, ctx: StepContext, imports: tuple[str, ...]) -> Resolution:
        with self.env.ledger.inside(ctx):
            return resolve_imports(imports, self.env.distributions)


class ReportParams(msgspec.Struct, frozen=True):
    """Whose results to gather, through which server, and where to write the page."""

    ids: list[str]
    url: str
    page: str
    facts: Facts


class Report(Workflow[ReportParams, Summary], name="report"):
    """Gathers the results of a census in batches, sums them up, writes the page."""

    async def run(self, event: WorkflowEvent[ReportParams], step: Step) -> Summary:
        params = event.payload
        batches = [params.ids[start:start + GATHER_BATCH] for start in range(0, len(params.ids), GATHER_BATCH)]
        parts = await asyncio.gather(*(step.do("gather", gather, params.url, batch) for batch in batches))
        summary = await step.do("sum up", merge, parts)
        await step.do("write page", write_page, Path(params.page), summary, params.facts)
        return summary


async def gather(url: str, ids: Sequence[str]) -> Summary:
    """Sum up the results of these instances; they have all ended."""
    reading = asyncio.Semaphore(READS_IN_FLIGHT)
    async with Client.connect(url, name="census report") as client:

        async def read(instance_id: str) -> FileReport:
            async with reading:
                return await client.handle(Census, instance_id).result()

        return summarise(await asyncio.gather(*map(read, ids)))


def write_page(path: Path, summary: Summary, facts: Facts) -> None:
    """Write the page whole or not at all: entered again after a crash, it writes the same once more."""
    with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".html", delete=False) as file:
        file.write(page(summary, facts))
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
