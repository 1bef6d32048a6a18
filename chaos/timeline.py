"""The one picture of a run, as inline SVG: faults, callbacks per second, slots in use, and who owned which station.

Pure: a `Picture` in, text out. Colours are classes of the page's style sheet; marks say their numbers in a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 960
LEFT, RIGHT = 92, 12
GAP = 30
FAULT_ROW = 18
PLOT_HEIGHT = 96
STATION_ROW = 15
AXIS_HEIGHT = 26
TICKS_MAX = 12
POD_COLOURS = 6  # classes p0 to p5, used again by further pods
MARK_WIDTH_MIN = 3.0


@dataclass(frozen=True)
class Band:
    """A fault, from when to when, in seconds of the run."""

    begins_s: float
    ends_s: float
    text: str


@dataclass(frozen=True)
class Tenure:
    """A time in which a pod was seen to own a station under one epoch."""

    station: str
    pod: str
    epoch: int
    begins_s: float
    ends_s: float


@dataclass(frozen=True)
class Picture:
    """All that is drawn."""

    lasts_s: float
    faults: Sequence[Band]
    per_second: Sequence[int]
    """Callbacks left in order, for each second."""
    in_use: Sequence[tuple[float, int]]
    """(second, instances inside callbacks from then on)."""
    limit: int
    tenures: Sequence[Tenure]

    @property
    def pods(self) -> list[str]:
        return sorted({tenure.pod for tenure in self.tenures})

    @property
    def stations(self) -> list[str]:
        return sorted({tenure.station for tenure in self.tenures})


def colour_of(pod: str, pods: Sequence[str]) -> str:
    return f"p{pods.index(pod) % POD_COLOURS}"


def draw(picture: Picture) -> str:
    """The picture, as wide as the page."""
    height = 0
    parts: list[str] = []
    rows = (("faults", FAULT_ROW, _faults), ("callbacks/s", PLOT_HEIGHT, _throughput),
            ("slots in use", PLOT_HEIGHT, _slots), ("owners", max(1, len(picture.stations)) * STATION_ROW, _owners))
    for title, row_height, make in rows:
        top = height + GAP
        parts.append(f'<text class="rowtitle" x="{LEFT}" y="{top - 8}">{title}</text>')
        parts += make(picture, top)
        height = top + row_height
    parts += _axis(picture, height)
    bands = [_band(picture, band, height) for band in picture.faults]
    return (f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {height + AXIS_HEIGHT}" role="img" '
            f'aria-label="timeline of the run">{"".join(bands)}{"".join(parts)}</svg></div>')


def _x(picture: Picture, at_s: float) -> float:
    share = min(max(at_s / picture.lasts_s, 0.0), 1.0) if picture.lasts_s else 0.0
    return LEFT + (WIDTH - LEFT - RIGHT) * share


def _band(picture: Picture, band: Band, height: int) -> str:
    """The fault as a pale band over all rows."""
    x = _x(picture, band.begins_s)
    width = max(_x(picture, band.ends_s) - x, 1.0)
    return f'<rect class="band" x="{x:.1f}" y="{GAP}" width="{width:.1f}" height="{height - GAP}"/>'


def _faults(picture: Picture, top: int) -> Iterator[str]:
    for band in picture.faults:
        x = _x(picture, band.begins_s)
        width = max(_x(picture, band.ends_s) - x, MARK_WIDTH_MIN)
        yield (f'<rect class="fault" x="{x:.1f}" y="{top}" width="{width:.1f}" height="{FAULT_ROW}" rx="2">'
               f"<title>{escape(band.text)}, from {band.begins_s:.1f} s to {band.ends_s:.1f} s</title></rect>")


def _throughput(picture: Picture, top: int) -> Iterator[str]:
    most = max(picture.per_second, default=0) or 1
    yield from _scale(most, top)
    for second, count in enumerate(picture.per_second):
        x, height = _x(picture, second), PLOT_HEIGHT * count / most
        width = max(_x(picture, second + 1) - x - 1, 0.8)
        yield (f'<rect class="work" x="{x:.1f}" y="{top + PLOT_HEIGHT - height:.1f}" width="{width:.1f}" '
               f'height="{height:.1f}"><title>second {second}: {count:,} callbacks</title></rect>')


def _slots(picture: Picture, top: int) -> Iterator[str]:
    most = max([picture.limit, *(count for _, count in picture.in_use)])
    yield from _scale(most, top)
    points: list[str] = []
    before = 0
    for at_s, count in picture.in_use:
        x = _x(picture, at_s)
        points += [f"{x:.1f},{top + PLOT_HEIGHT * (1 - value / most):.1f}" for value in (before, count)]
        before = count
    yield f'<polyline class="use" points="{" ".join(points)}"/>'
    y = top + PLOT_HEIGHT * (1 - picture.limit / most)
    yield (f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
           f'<text class="limittext" x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">limit {picture.limit}</text>')


def _owners(picture: Picture, top: int) -> Iterator[str]:
    stations, pods = picture.stations, picture.pods
    for place, station in enumerate(stations):
        yield (f'<text class="tick" x="{LEFT - 8}" y="{top + place * STATION_ROW + 11}" text-anchor="end">'
               f"{escape(station)}</text>")
    for tenure in picture.tenures:
        x = _x(picture, tenure.begins_s)
        width = max(_x(picture, tenure.ends_s) - x, 1.0)
        y = top + stations.index(tenure.station) * STATION_ROW
        text = (f"station {tenure.station}: {tenure.pod}, epoch {tenure.epoch}, seen from {tenure.begins_s:.1f} s to "
                f"{tenure.ends_s:.1f} s")
        yield (f'<rect class="{colour_of(tenure.pod, pods)}" x="{x:.1f}" y="{y}" width="{width:.1f}" '
               f'height="{STATION_ROW - 3}"><title>{escape(text)}</title></rect>')


def _scale(most: int, top: int) -> Iterator[str]:
    for share in (0.0, 0.5, 1.0):
        y = top + PLOT_HEIGHT * (1 - share)
        yield (f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
               f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{most * share:,.0f}</text>')


def _axis(picture: Picture, top: int) -> Iterator[str]:
    step = tick_s(picture.lasts_s)
    for number in range(int(picture.lasts_s / step) + 1):
        x = _x(picture, number * step)
        yield (f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + 4}"/>'
               f'<text class="tick" x="{x:.1f}" y="{top + 18}" text-anchor="middle">{number * step:g} s</text>')


def tick_s(lasts_s: float) -> float:
    """A round number of seconds between ticks, so that there are at most TICKS_MAX."""
    least = max(lasts_s / TICKS_MAX, 1.0)
    power: float = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
