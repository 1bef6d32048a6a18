"""Which pod should have which station: bounded-load rendezvous hashing, with as few moves as possible. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

from toque._subjects import StationId


def weight(station: StationId, pod: str) -> int:
    """The rendezvous weight of a pod for a station; higher is better."""
    return zlib.crc32(f"{station}/{pod}".encode())


def spread(stations: Iterable[StationId], pods: Iterable[str],
           owners: Mapping[StationId, str]) -> dict[StationId, str]:
    """The pod that each station should be at.

    `owners` tells where stations are now; owners that are not among `pods` do not count. In the result the loads of two
    pods differ by one station at most, and a station stays where it is unless its pod has too many.
    """
    names = sorted(set(pods))
    wanted: dict[StationId, str] = {}
    if not names:
        return wanted
    loads: dict[str, list[StationId]] = {pod: [] for pod in names}
    homeless: list[StationId] = []
    for station in sorted(stations):
        owner = owners.get(station, "")
        if owner in loads:
            loads[owner].append(station)
        else:
            homeless.append(station)
    for station in homeless:
        _lightest(loads, station).append(station)
    while True:
        heaviest = max(names, key=lambda pod: (len(loads[pod]), pod))
        lightest = min(len(load) for load in loads.values())
        if len(loads[heaviest]) - lightest <= 1:
            break
        moved = min(loads[heaviest], key=lambda station: (weight(station, heaviest), station))
        loads[heaviest].remove(moved)
        _lightest(loads, moved).append(moved)
    for pod, load in loads.items():
        for station in load:
            wanted[station] = pod
    return wanted


def _lightest(loads: dict[str, list[StationId]], station: StationId) -> list[StationId]:
    pod = min(loads, key=lambda name: (len(loads[name]), -weight(station, name), name))
    return loads[pod]
