"""Durations: a `timedelta` or a text such as "5 seconds", never a bare number; whole milliseconds inside Toque.

Parts of a millisecond are rounded up, so that a timer is never early.
"""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import ROUND_UP, Decimal
from functools import lru_cache
from typing import TypeAlias

from toque.errors import InvalidDuration

Duration: TypeAlias = timedelta | str

SECOND_MS = 1_000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
WEEK_MS = 7 * DAY_MS
DURATION_MAX_MS = 365 * DAY_MS
TEXT_LENGTH_MAX = 64

_UNITS_MS = {
    "ms": 1, "millisecond": 1, "milliseconds": 1,
    "s": SECOND_MS, "second": SECOND_MS, "seconds": SECOND_MS,
    "m": MINUTE_MS, "minute": MINUTE_MS, "minutes": MINUTE_MS,
    "h": HOUR_MS, "hour": HOUR_MS, "hours": HOUR_MS,
    "d": DAY_MS, "day": DAY_MS, "days": DAY_MS,
    "w": WEEK_MS, "week": WEEK_MS, "weeks": WEEK_MS,
}
_CALENDAR_UNITS = frozenset({"month", "months", "mo", "year", "years", "y"})
_TEXT = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?) *([^\s0-9]*)", re.ASCII)
_UNIT_LIST = "milliseconds, seconds, minutes, hours, days, weeks (or ms, s, m, h, d, w)"


def to_ms(value: Duration, *, what: str, minimum_ms: int = 0) -> int:
    """The whole milliseconds of a duration; `what` names it in errors.

    Raises InvalidDuration for a bare number, an unknown unit, less than `minimum_ms` or more than 365 days.
    """
    if isinstance(value, timedelta):
        ms = _whole_ms(Decimal((value.days * 86_400 + value.seconds) * 1_000_000 + value.microseconds) / 1_000)
    elif isinstance(value, str):
        ms = _parse(value, what)
    else:
        raise InvalidDuration(_not_a_duration(value, what))
    if ms < minimum_ms:
        raise InvalidDuration(f"{what} is {_shown(value)}, but it must be {_at_least(minimum_ms)}")
    if ms > DURATION_MAX_MS:
        raise InvalidDuration(f"{what} is {_shown(value)}, but the longest duration is {format_ms(DURATION_MAX_MS)}")
    return ms


def format_ms(ms: int) -> str:
    """A readable text: "250 milliseconds", "1.5 seconds", "2 minutes"; from a minute on, its two largest units."""
    if ms < 0:
        return "-" + format_ms(-ms)
    if ms < SECOND_MS:
        return _count(ms, "millisecond")
    if ms < MINUTE_MS:
        return _count(ms // SECOND_MS, "second") if ms % SECOND_MS == 0 else f"{ms / SECOND_MS:g} seconds"
    parts = []
    for name, unit in (("day", DAY_MS), ("hour", HOUR_MS), ("minute", MINUTE_MS), ("second", SECOND_MS)):
        number, ms = divmod(ms, unit)
        if number:
            parts.append(_count(number, name))
        elif parts:
            break
        if len(parts) == 2:
            break
    return " ".join(parts)


@lru_cache(maxsize=1024)
def _parse(text: str, what: str) -> int:
    match = _TEXT.fullmatch(text.strip(" ")) if len(text) <= TEXT_LENGTH_MAX else None
    if match is None:
        raise InvalidDuration(f'{what} is {_shown(text)}, which is no duration: write "<number> <unit>", for example '
                              f'"5 seconds"; units are {_UNIT_LIST}')
    number, unit = match.groups()
    if not unit:
        raise InvalidDuration(_not_a_duration(text, what))
    if unit in _CALENDAR_UNITS:
        raise InvalidDuration(f"{what} is {_shown(text)}, but months and years differ in length: "
                              f'count in days or weeks, for example "30 days"')
    if unit not in _UNITS_MS:
        raise InvalidDuration(f"{what} is {_shown(text)}, but {unit!r} is no unit; units are {_UNIT_LIST}, "
                              f"in lower case")
    return _whole_ms(Decimal(number) * _UNITS_MS[unit])


def _whole_ms(exact: Decimal) -> int:
    """Rounded away from zero: a timer is never early, and less than nothing does not become a legal zero."""
    return int(exact.to_integral_value(ROUND_UP))


def _not_a_duration(value: object, what: str) -> str:
    is_number = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    if not is_number:
        return f'{what} must be a timedelta or a text such as "5 seconds", not {type(value).__name__}'
    number = str(value).strip()[:TEXT_LENGTH_MAX]
    return (f"{what} is the bare number {number}, which has no unit: "
            f'write "{number} seconds" or timedelta(seconds={number})')


def _at_least(minimum_ms: int) -> str:
    return "zero or more" if minimum_ms == 0 else f"at least {format_ms(minimum_ms)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= TEXT_LENGTH_MAX else text[:TEXT_LENGTH_MAX] + "…"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"
