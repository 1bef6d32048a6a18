"""Durations: which texts are taken, and what a wrong one is told."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toque._durations import DAY_MS, DURATION_MAX_MS, HOUR_MS, MINUTE_MS, SECOND_MS, WEEK_MS, format_ms, to_ms
from toque.errors import InvalidDuration


@pytest.mark.parametrize(("text", "ms"), [
    ("5 seconds", 5_000), ("1 second", 1_000), ("5s", 5_000), ("5 s", 5_000), ("  5 seconds  ", 5_000),
    ("10 minutes", 10 * MINUTE_MS), ("1 minute", MINUTE_MS), ("10m", 10 * MINUTE_MS),
    ("2 hours", 2 * HOUR_MS), ("1 hour", HOUR_MS), ("2h", 2 * HOUR_MS),
    ("3 days", 3 * DAY_MS), ("1 day", DAY_MS), ("1d", DAY_MS),
    ("2 weeks", 2 * WEEK_MS), ("1 week", WEEK_MS), ("1w", WEEK_MS),
    ("500ms", 500), ("500 milliseconds", 500), ("1 millisecond", 1),
    ("1.5 hours", 90 * MINUTE_MS), ("0.1 seconds", 100), ("0 seconds", 0), ("+5 seconds", 5_000),
])
def test_a_text_of_number_and_unit_is_taken(text, ms):
    """Each unit has a singular, a plural and a short form; decimals are exact."""
    assert to_ms(text, what="delay") == ms


@pytest.mark.parametrize(("value", "ms"), [
    (timedelta(seconds=5), 5_000), (timedelta(0), 0), (timedelta(milliseconds=1), 1),
    (timedelta(days=365), DURATION_MAX_MS),
])
def test_a_timedelta_is_taken(value, ms):
    """A timedelta is the other form of a duration."""
    assert to_ms(value, what="delay") == ms


@pytest.mark.parametrize("value", ["0.0001 seconds", "0.1 ms", timedelta(microseconds=999)])
def test_parts_of_a_millisecond_are_rounded_up(value):
    """A timer is never early, so what is left of a millisecond counts as one."""
    assert to_ms(value, what="delay") == 1


@pytest.mark.parametrize("value", [5, 5.0, "5", " 5 ", "5.0"])
def test_a_bare_number_is_refused_and_both_forms_are_shown(value):
    """A number without a unit could mean seconds or milliseconds, so it means nothing."""
    with pytest.raises(InvalidDuration) as caught:
        to_ms(value, what="timeout")

    number = str(value).strip()
    assert str(caught.value).startswith(f"timeout is the bare number {number}")
    assert f'"{number} seconds"' in str(caught.value)
    assert f"timedelta(seconds={number})" in str(caught.value)


@pytest.mark.parametrize("value", [None, True, b"5 seconds", [5], object()])
def test_what_is_no_duration_at_all_is_refused_by_its_type(value):
    """The message names the type, not the value."""
    with pytest.raises(InvalidDuration, match=f"not {type(value).__name__}$"):
        to_ms(value, what="delay")


@pytest.mark.parametrize("text", ["1 month", "2 months", "1 year", "3 years", "1y"])
def test_calendar_units_are_refused_with_a_hint(text):
    """Months and years differ in length; the message says to count in days."""
    with pytest.raises(InvalidDuration, match=r'count in days or weeks, for example "30 days"'):
        to_ms(text, what="delay")


@pytest.mark.parametrize(("text", "unit"), [
    ("5 secnods", "secnods"), ("5 Seconds", "Seconds"), ("5 M", "M"), ("5 µs", "µs"),
])
def test_an_unknown_unit_is_named_and_the_known_ones_listed(text, unit):
    """A misspelt or capitalised unit never becomes another duration silently."""
    with pytest.raises(InvalidDuration, match=f"'{unit}' is no unit; units are milliseconds, .* in lower case"):
        to_ms(text, what="delay")


@pytest.mark.parametrize("text", [
    "", " ", "soon", "seconds", "1 2 seconds", "1h30m", "1e3 seconds", "٥ seconds", "5\nseconds", "5 seconds\n",
    "1,5 s", "inf seconds", "nan s", "5_0 s", "9" * 10_000 + " s",
])
def test_another_text_is_refused_with_an_example(text):
    """Whatever is not a plain decimal number and a unit is no duration, and a long text is cut in the message."""
    with pytest.raises(InvalidDuration, match='for example "5 seconds"') as caught:
        to_ms(text, what="delay")

    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["-5 seconds", timedelta(seconds=-5), timedelta(microseconds=-1), "-1 ms", "-0.1 ms"])
def test_a_negative_duration_is_refused(value):
    """Time does not run backwards, not even by less than a millisecond."""
    with pytest.raises(InvalidDuration, match="must be zero or more"):
        to_ms(value, what="delay")


def test_zero_is_refused_where_it_is_meaningless():
    """The caller gives the least that makes sense."""
    with pytest.raises(InvalidDuration, match="timeout is '0 seconds', but it must be at least 1 millisecond"):
        to_ms("0 seconds", what="timeout", minimum_ms=1)


@pytest.mark.parametrize("value", ["366 days", "53 weeks", timedelta.max, "9" * 50 + " weeks"])
def test_more_than_a_year_is_refused(value):
    """The bound is 365 days, and the message says so."""
    with pytest.raises(InvalidDuration, match="the longest duration is 365 days"):
        to_ms(value, what="delay")


@pytest.mark.parametrize(("ms", "text"), [
    (0, "0 milliseconds"), (1, "1 millisecond"), (999, "999 milliseconds"), (SECOND_MS, "1 second"),
    (1_500, "1.5 seconds"), (59_999, "59.999 seconds"), (MINUTE_MS, "1 minute"),
    (90_000, "1 minute 30 seconds"), (HOUR_MS, "1 hour"),
    (HOUR_MS + 5_000, "1 hour"), (DAY_MS + 2 * HOUR_MS + 5 * MINUTE_MS, "1 day 2 hours"),
    (DURATION_MAX_MS, "365 days"), (-1_500, "-1.5 seconds"),
])
def test_milliseconds_are_shown_in_their_largest_units(ms, text):
    """What is shown is short: one unit with decimals below a minute, the two largest from there on."""
    assert format_ms(ms) == text


@given(st.integers(0, MINUTE_MS - 1))
def test_what_is_shown_below_a_minute_reads_back(ms):
    """A text of one unit is exact."""
    assert to_ms(format_ms(ms), what="delay") == ms
