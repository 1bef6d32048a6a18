"""Judges who owned which station, from what the owners themselves answered over time: P1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from toque.chaos.verdicts import Verdict


class Sighting(msgspec.Struct, frozen=True):
    """An owner's answer about its station: asked and answered at CLOCK_MONOTONIC in nanoseconds."""

    asked_ns: int
    answered_ns: int
    station: str
    pod: str
    session: str
    epoch: int


def check_p1(sightings: Iterable[Sighting]) -> Verdict:
    """Each epoch of a station belongs to one session, and epochs only grow."""
    by_station: dict[str, list[Sighting]] = defaultdict(list)
    for sighting in sightings:
        by_station[sighting.station].append(sighting)
    verdict = Verdict("P1", "one owner for each station and epoch, and epochs only grew")
    moves = 0
    for station, seen in sorted(by_station.items()):
        verdict.checked += len(seen)
        _judge_owners(verdict, station, seen)
        _judge_growth(verdict, station, seen)
        moves += len({sighting.epoch for sighting in seen}) - 1
    verdict.note = f"{len(by_station)} stations, {moves} changes of epoch seen"
    return verdict


def _judge_owners(verdict: Verdict, station: str, seen: Sequence[Sighting]) -> None:
    owners: dict[int, str] = {}
    for sighting in seen:
        owner = owners.setdefault(sighting.epoch, sighting.session)
        if owner != sighting.session:
            verdict.violated(f"station {station}: epoch {sighting.epoch} was that of {owner} and of {sighting.session}")


def _judge_growth(verdict: Verdict, station: str, seen: Sequence[Sighting]) -> None:
    """Of two questions of which one was answered before the other was asked, the later may not see a lower epoch."""
    answered = sorted(seen, key=lambda sighting: sighting.answered_ns)
    highest = 0
    place = 0
    for sighting in sorted(seen, key=lambda sighting: sighting.asked_ns):
        while place < len(answered) and answered[place].answered_ns <= sighting.asked_ns:
            highest = max(highest, answered[place].epoch)
            place += 1
        if sighting.epoch < highest:
            verdict.violated(f"station {station}: {sighting.pod} answered with epoch {sighting.epoch}, after epoch "
                             f"{highest} had been seen")
