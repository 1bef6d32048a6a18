"""What the command line prints: nothing that steers a terminal, and exit codes that scripts can rely on."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from rich.text import Text

from toque import errors
from toque.cli import output


@pytest.mark.parametrize(("text", "shown"), [
    ("\x1b[2Jgone", "\\x1b[2Jgone"),
    ("a\rb", "a\\x0db"),
    ("\x9b31mred", "\\x9b31mred"),
    ("\u202etxt.exe", "\\u202etxt.exe"),
    ("two\nlines\tkept", "two\nlines\tkept"),
    ("ünïcode 🍳", "ünïcode 🍳"),
])
def test_text_of_others_cannot_steer_the_terminal(text: str, shown: str) -> None:
    """Control characters and direction marks are shown, everything else stays as it is."""
    assert output.printable(text) == shown


def test_a_cell_is_one_line_of_bounded_length() -> None:
    """A payload cannot break a table."""
    cell = output.one_line("a\nb\r\nc" + "x" * 1000)

    assert cell.startswith("a⏎b⏎c") and len(cell) == output.CELL_LENGTH_MAX


def test_json_is_safe_and_means_the_same() -> None:
    """A terminal would obey nothing of a JSON report, and a program reads the very values."""
    value = {"name": "\x1b[2J\x9b\u202e", "at": datetime(2026, 1, 2, tzinfo=UTC), "n": 1}

    text = output.json_text(value)

    assert not any(character in text for character in "\x1b\x9b\u202e")
    assert json.loads(text) == {"name": value["name"], "at": "2026-01-02T00:00:00Z", "n": 1}


def test_a_table_in_a_pipe_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal there are no colours and no frames, and each row is one line."""
    output.show_table(["id", "note"], [["a", "\x1b[31mred"], ["longer", "x" * 150]])

    lines = capsys.readouterr().out.splitlines()

    assert lines == ["id      note", "a       \\x1b[31mred", "longer  " + "x" * 150]


@pytest.mark.parametrize("width", [40, 50, 60, 80, 120])
def test_a_table_on_a_terminal_breaks_no_word(
        width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """However narrow it is, an id stays whole and can be copied, and so do times and headings."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    columns, row = ["id", "status", "created", "note"], ["01m82k827yqcgr9yhdsdxbzjkv", "errored", "2026-11-22 21:40:25",
                                                         "the reason is told in several words"]

    output.show_table(columns, [row])

    shown = capsys.readouterr().out.replace("\x1b[0m", "").replace("\x1b[1m", "").split()
    assert set(" ".join([*columns, *row]).split()) == set(shown)


@pytest.mark.parametrize(("error", "code"), [
    (errors.InvalidName("bad", kind="account", name="*"), 2),
    (errors.AppError("bad"), 2),
    (errors.UnknownWorkflow("bad"), 1),
    (errors.InstanceNotFound("bad"), 1),
    (errors.SetupError("bad"), 1),
    (errors.OwnerAway("bad"), 3),
    (errors.BrokerUnavailable("bad"), 3),
    (errors.QueueFull("bad"), 3),
    (KeyboardInterrupt(), 130),
    (ZeroDivisionError("bad"), 1),
])
def test_the_exit_code_tells_what_kind_of_error_it_was(error: BaseException, code: int) -> None:
    """Usage, failure, away and Ctrl-C differ, since scripts act differently on them."""
    assert output.exit_code(error) == code


def test_an_error_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback unless it is asked for, and nothing on stdout."""
    monkeypatch.delenv("TOQUE_DEBUG", raising=False)

    code = output.report_error(errors.SetupError("no server: do this"))

    assert (code, capsys.readouterr()) == (1, ("", "toque: no server: do this\n"))


def test_the_traceback_is_there_when_asked_for(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """TOQUE_DEBUG=1 shows where an error came from."""
    monkeypatch.setenv("TOQUE_DEBUG", "1")

    output.report_error(errors.SetupError("no server"))

    assert "SetupError: no server\ntoque: no server\n" in capsys.readouterr().err


def test_no_colour_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is piped or logged holds no escape sequences, even where the environment forces colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")

    output.console().print(Text("plain", style="red"))

    assert capsys.readouterr().out == "plain\n"
