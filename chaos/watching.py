"""Looks at pods and stations while a scenario runs: who owns what under which epoch, and who has how many slots."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec

from toque.chaos.owner_checks import Sighting
from toque.chaos.topology import Topology
from toque.client import Client
from toque.errors import ToqueError

SAMPLE_S = 0.5
ROUND_S_MAX = 4.0


class PodSample(msgspec.Struct, frozen=True):
    """What a pod said of itself."""

    pod: str
    session: str
    leased: int
    in_use: int
    memory_bytes: int = 0


class Sample(msgspec.Struct, frozen=True):
    """The pods that answered at one moment."""

    at_ns: int
    pods: list[PodSample]


class Watcher:
    """Samples until it is cancelled. Each round has a client of its own, which has no memory that could hide a lower
    epoch. A round without an answer leaves nothing. `file` gets what is seen, a line each.
    """

    def __init__(self, topology: Topology, file: Path) -> None:
        self.samples: list[Sample] = []
        self.sightings: list[Sighting] = []
        self._topology = topology
        self._file = file

    async def run(self) -> None:
        with self._file.open("ab") as log:
            while True:
                seen = len(self.samples), len(self.sightings)
                try:
                    async with asyncio.timeout(ROUND_S_MAX), self._topology.connect() as client:
                        await asyncio.gather(self._look_at_pods(client), self._look_at_stations(client))
                except (ToqueError, TimeoutError, OSError):
                    pass
                for item in (*self.samples[seen[0]:], *self.sightings[seen[1]:]):
                    log.write(msgspec.json.encode(item) + b"\n")
                await asyncio.sleep(SAMPLE_S)

    async def _look_at_pods(self, client: Client) -> None:
        views = await client.pods()
        self.samples.append(Sample(time.monotonic_ns(), [
            PodSample(view.pod, view.session, view.slots_leased, view.slots_in_use, view.memory_bytes) for view in views]))

    async def _look_at_stations(self, client: Client) -> None:
        asked_ns = time.monotonic_ns()
        reports = await client.stations()
        answered_ns = time.monotonic_ns()
        self.sightings += [Sighting(asked_ns, answered_ns, report.station, report.view.pod, report.view.session,
                                    report.view.epoch) for report in reports if report.view is not None]
