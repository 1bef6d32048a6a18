"""What `toque instances list` prints, and which times it understands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from stand_in_owner import new_place

from toque import sim
from toque.cli.instances import _moment, _show_list
from toque.cli.output import ListFormat
from toque.errors import UsageError


def shown(output: ListFormat, limit: int) -> str | None:
    """Print a list of five instances; returns the cursor behind it."""

    async def main() -> str | None:
        place = await new_place()
        for number in range(5):
            place.owner.put("census", f"n{number}", "running", admitted_at=1 + number)
        return await _show_list(place.client, None, {"order": "newest"}, limit, None, output)

    found: Any = sim.run(main(), seed=1)
    return found


def test_ids_stand_alone_on_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """So that other commands can read them; a cursor comes with a list that may go on."""
    assert shown(ListFormat.IDS, 3)
    assert capsys.readouterr().out == "n4\nn3\nn2\n"


def test_ndjson_is_one_document_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole, to the end, with no cursor; outputs and errors, which lists do not carry, are not said to be null."""
    assert shown(ListFormat.NDJSON, 10) is None
    rows = [msgspec.json.decode(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == ["n4", "n3", "n2", "n1", "n0"]
    assert "output" not in rows[0]


def test_a_time_is_a_moment_or_how_long_ago() -> None:
    """With a zone, in the local one without, or back from now."""
    assert _moment("2026-01-31T12:00:00+01:00") == datetime(2026, 1, 31, 11, tzinfo=UTC)
    assert _moment("2026-01-31") == datetime(2026, 1, 31).astimezone()
    ago = _moment("2 hours")
    assert ago is not None and abs(datetime.now(UTC) - ago - timedelta(hours=2)) < timedelta(minutes=1)
    assert _moment(None) is None
    with pytest.raises(UsageError, match="the time"):
        _moment("yesterday")
