"""Draws plots as inline SVG. Colours are classes of the page's style sheet; marks say their numbers in a tooltip."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 860
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 4, 26, 34
_COLUMNS_HEIGHT = 240
_ROW = 24
_LABEL_WIDTH = 190
_VALUE_WIDTH = 64
_TICKS = 4


@dataclass(frozen=True)
class Series:
    """One layer of stacked columns. `colour` is a class: c1 to c4."""

    name: str
    colour: str
    values: Sequence[int]


@dataclass(frozen=True)
class Mark:
    """A moment on the horizontal axis, in columns from the left."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart."""

    label: str
    value: int
    colour: str = "c1"
    hint: str = ""


def stacked_columns(series: Sequence[Series], labels: Sequence[str], *, unit: str, marks: Sequence[Mark] = (),
                    labels_shown: int = 10) -> str:
    """Columns, one for each label, with the series on top of each other."""
    totals = [sum(values) for values in zip(*(layer.values for layer in series), strict=True)]
    scale = _Scale(len(labels), nice_ceiling(max(totals, default=0)))
    parts = [*_grid(scale), *_column_labels(scale, labels, labels_shown)]
    for place in range(len(labels)):
        parts += _column(scale, place, series, labels[place], unit)
    parts += [_mark(scale, mark) for mark in marks]
    return _svg(_COLUMNS_HEIGHT, parts)


def bars(rows: Sequence[Bar]) -> str:
    """Horizontal bars with their label on the left and their value behind."""
    most = max((row.value for row in rows), default=0) or 1
    room = WIDTH - _LABEL_WIDTH - _VALUE_WIDTH
    parts: list[str] = []
    for place, row in enumerate(rows):
        y = place * _ROW
        length = max(room * row.value / most, 1.0)
        parts.append(f'<g><title>{escape(row.hint or f"{row.label}: {row.value:,}")}</title>'
                     f'<text class="label" x="{_LABEL_WIDTH - 10}" y="{y + 16}" text-anchor="end">'
                     f'{escape(shortened(row.label, 26))}</text>'
                     f'<path class="{row.colour}" d="{_bar_path(_LABEL_WIDTH, y + 4, length, _ROW - 8)}"/>'
                     f'<text class="value" x="{_LABEL_WIDTH + length + 6:.1f}" y="{y + 16}">{row.value:,}</text></g>')
    return _svg(max(len(rows), 1) * _ROW, parts)


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(colour, name) pairs as a line of HTML."""
    keys = "".join(f'<span><svg class="key" viewBox="0 0 10 10"><rect class="{colour}" width="10" height="10" rx="2"/>'
                   f"</svg>{escape(name)}</span>" for colour, name in entries)
    return f'<p class="legend">{keys}</p>'


def nice_ceiling(value: float) -> int:
    """Where an axis with four ticks ends: the next four times a whole, round number."""
    tick = max(math.ceil(value / _TICKS), 1)
    power = 10 ** math.floor(math.log10(tick))
    factors = (1, 2, 3, 5, 10) if power == 1 else (1, 1.5, 2, 2.5, 3, 5, 10)
    return _TICKS * int(next(factor * power for factor in factors if factor * power >= tick))


def shortened(text: str, length: int) -> str:
    """The text, its beginning cut off where it is longer."""
    return text if len(text) <= length else "…" + text[-(length - 1):]


# -- stacked columns ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Scale:
    """From columns and values to the picture's coordinates."""

    columns: int
    top: int

    @property
    def step(self) -> float:
        return (WIDTH - _LEFT - _RIGHT) / max(self.columns, 1)

    def x(self, column: float) -> float:
        return _LEFT + column * self.step

    def y(self, value: float) -> float:
        return _TOP + (_COLUMNS_HEIGHT - _TOP - _BOTTOM) * (1 - value / self.top)


def _grid(scale: _Scale) -> Iterator[str]:
    for tick in range(_TICKS + 1):
        value = scale.top * tick / _TICKS
        y = scale.y(value)
        kind = "axis" if tick == 0 else "grid"
        yield f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,.0f}</text>'


def _column_labels(scale: _Scale, labels: Sequence[str], shown: int) -> Iterator[str]:
    stride = max(1, math.ceil(len(labels) / shown))
    for place in range(0, len(labels), stride):
        yield (f'<text class="tick" x="{scale.x(place + 0.5):.1f}" y="{_COLUMNS_HEIGHT - 14}" text-anchor="middle">'
               f"{escape(labels[place])}</text>")


def _column(scale: _Scale, place: int, series: Sequence[Series], label: str, unit: str) -> Iterator[str]:
    gap = min(2.0, scale.step * 0.2)
    below = 0
    for layer in series:
        value = layer.values[place]
        if value:
            top, bottom = scale.y(below + value), scale.y(below)
            height = max(bottom - top - (1.0 if below else 0.0), 0.5)
            what = f"{layer.name}, " if layer.name else ""
            yield (f'<rect class="{layer.colour}" x="{scale.x(place) + gap / 2:.1f}" y="{top:.1f}" '
                   f'width="{scale.step - gap:.1f}" height="{height:.1f}" rx="1.5">'
                   f"<title>{escape(f'{what}{label}: {value:,} {unit}')}</title></rect>")
        below += value


def _mark(scale: _Scale, mark: Mark) -> str:
    x = scale.x(mark.at)
    anchor = "end" if x > WIDTH * 0.7 else "start"
    return (f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{_COLUMNS_HEIGHT - _BOTTOM}"/>'
            f'<text class="marktext" x="{x + (-6 if anchor == "end" else 6):.1f}" y="{_TOP - 10}" '
            f'text-anchor="{anchor}">{escape(mark.text)}</text>')


def _bar_path(x: float, y: float, length: float, height: float) -> str:
    """A bar with its far end rounded."""
    round_ = min(3.0, length)
    return (f"M{x},{y}h{length - round_:.1f}q{round_},0 {round_},{round_}v{height - 2 * round_:.1f}"
            f"q0,{round_} -{round_},{round_}h-{length - round_:.1f}z")


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg></div>'
