"""Stored data of every format so far is read by today's code, and means what it meant when it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from fixtures.make import STORIES, make
from fixtures.reading import (
    FIXTURES,
    control,
    control_value,
    counting,
    journal,
    known_part,
    read,
    replayed,
    restored,
    stories,
)

from toque._protocol import AccountRecord, Layout, SessionRecord
from toque.storage import records as r

FORMATS = [FIXTURES / f"format-{number}" for number in range(1, r.FORMAT + 1)]
OF_BYTES = ("crc", "size_bytes", "chunks", "journal_bytes", "rows")
every_story = pytest.mark.parametrize("folder", stories(), ids=lambda folder: str(folder.relative_to(FIXTURES)))


def expected(folder: Path) -> Any:
    return json.loads((folder / "expected.json").read_text())


@every_story
def test_stored_data_means_what_it_meant(folder: Path) -> None:
    """Journal messages, the LMDB environment and the control bucket; fields added since have their defaults."""
    meaning = expected(folder)

    assert known_part(read(folder), meaning) == meaning


@every_story
def test_the_journal_folds_into_what_the_environment_holds(folder: Path) -> None:
    """A pod that reads the old journal anew stands where one stands that kept its old environment."""
    meaning = expected(folder)["store"]

    assert known_part(replayed(folder), meaning) == meaning


@pytest.mark.parametrize("format_", FORMATS, ids=lambda path: path.name)
def test_a_stored_snapshot_restores_what_the_journal_folds_up_to_it(format_: Path) -> None:
    """A pod that has only the object stands where one stood that had folded every group before it."""
    folders = [file.parent for file in format_.glob("*/snapshot.json")]

    assert folders, "no format is without a stored snapshot object"
    for folder in folders:
        station, record = counting(folder)
        assert record.chunks > 1
        assert restored(folder) == replayed(folder, until=record.position.sequence)
        assert restored(folder)[str(station)]["instances"]


def test_every_kind_of_record_is_stored_in_the_present_format() -> None:
    """A new kind needs a story in tests/fixtures/make.py, and one run of that script."""
    stored = {type(record) for folder in stories() if folder.parent == FORMATS[-1]
              for group in journal(folder) for record in group.records}

    assert stored == set(get_args(r.AnyRecord))


@pytest.mark.parametrize("format_", FORMATS, ids=lambda path: path.name)
def test_every_kind_of_control_value_is_stored_in_each_format(format_: Path) -> None:
    """Account, layout, sessions that live and have ended, and an expiry marker."""
    values = [control_value(message) for folder in stories() if folder.parent == format_
              and (folder / "control.json").exists() for message in control(folder)]

    assert {type(value) for value in values} == {AccountRecord, Layout, SessionRecord, type(None)}
    assert {value.ended for value in values if isinstance(value, SessionRecord)} >= {"", "left", "dead"}


@pytest.mark.parametrize("name", STORIES)
def test_every_story_has_its_data_and_can_still_be_told(name: str, tmp_path: Path) -> None:
    """The script makes today what means the same as what is stored: it has not been changed behind its data."""
    make(name, tmp_path / name)

    meaning = without_bytes(expected(FORMATS[-1] / name))
    assert known_part(without_bytes(read(tmp_path / name)), meaning) == meaning


def without_bytes(value: Any) -> Any:
    """A field or a table that was added since changes bytes and rows and how many they are, and nothing else."""
    if isinstance(value, dict):
        return {key: without_bytes(part) for key, part in value.items() if key not in OF_BYTES}
    return [without_bytes(part) for part in value] if isinstance(value, list) else value
