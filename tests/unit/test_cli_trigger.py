"""Params on the command line."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stand_in_owner import new_place

from toque import _subjects, errors, sim
from toque.cli.trigger import read_params, trigger


def test_params_are_json() -> None:
    """What stands on the command line is decoded; nothing at all means no params."""
    assert read_params('{"path": "a.py", "n": [1, null]}', None) == {"path": "a.py", "n": [1, None]}
    assert read_params(None, None) is None


def test_params_come_from_a_file_or_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Params too long for a command line have another way."""
    (tmp_path / "p.json").write_text('{"n": 1}')
    monkeypatch.setattr("sys.stdin", io.StringIO("[2]"))

    assert read_params(None, tmp_path / "p.json") == {"n": 1}
    assert read_params(None, Path("-")) == [2]


@pytest.mark.parametrize("text", ["{'path': 1}", "path", "{", ""])
def test_params_that_are_no_json_are_refused(text: str) -> None:
    """The error shows what was got, and how to quote it."""
    with pytest.raises(errors.UsageError, match=r"are no JSON .*double quotes"):
        read_params(text, None)


def test_a_params_file_needs_no_advice_about_the_shell(tmp_path: Path) -> None:
    """How to quote is said where there are quotes."""
    file = tmp_path / "p.json"
    file.touch()

    with pytest.raises(errors.UsageError, match=r"p\.json are no JSON \(.*\)$"):
        read_params(None, file)


def test_params_are_given_once(tmp_path: Path) -> None:
    """It is never a guess which of two was meant."""
    with pytest.raises(errors.UsageError, match="not both"):
        read_params("{}", tmp_path / "p.json")


def test_a_params_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The error names the file."""
    with pytest.raises(errors.UsageError, match=r"gone\.json cannot be read"):
        read_params(None, tmp_path / "gone.json")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("kept", "header"), [
    ({}, ""), ({"keep_success": "1 hour", "keep_error": "2 days"}, "3600000 172800000"),
    ({"keep_error": "1 minute"}, "604800000 60000")])
def test_how_long_it_is_kept_goes_with_the_creation(count: int, kept: dict[str, str], header: str) -> None:
    """Of one or of many; without the options its workflow decides."""

    async def main() -> None:
        place = await new_place()
        connection: Any = SimpleNamespace(client=lambda: place.client, account="main")

        await trigger(connection, "census", "null", count=count, **kept)

        assert [message.header(_subjects.RETENTION_HEADER) for message in place.stored()] == [header] * count

    sim.run(main(), seed=1)
