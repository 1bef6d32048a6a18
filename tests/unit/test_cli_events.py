"""`toque instances send-event`: where its payload comes from, and what is shown of waits and buffers."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from toque.cli.events import read_payload
from toque.cli.instances import awaits_text, buffered_text
from toque.errors import UsageError


def test_a_payload_is_an_argument_a_file_or_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON in each case; none at all is null."""
    (tmp_path / "p.json").write_text('{"amount": 5}')
    monkeypatch.setattr("sys.stdin", io.StringIO("[1, 2]"))

    assert read_payload(None) is None
    assert read_payload('"text"') == "text"
    assert read_payload(f"@{tmp_path / 'p.json'}") == {"amount": 5}
    assert read_payload("-") == [1, 2]


@pytest.mark.parametrize(("text", "said"), [("{amount: 5}", "single quotes"), ("@/nowhere", "cannot be read")])
def test_a_payload_that_is_none_is_refused_with_the_remedy(text: str, said: str) -> None:
    """Before anything is sent."""
    with pytest.raises(UsageError, match=said):
        read_payload(text)


def test_what_an_instance_waits_for_is_said_in_words() -> None:
    """In lists and descriptions."""
    assert awaits_text(["paid"]) == "waiting for event 'paid'"
    assert awaits_text(["paid", "cancelled"]) == "waiting for events 'paid', 'cancelled'"
    assert (awaits_text([]), buffered_text(0)) == ("", "")
    assert buffered_text(1200) == "1,200 events buffered"
