"""Log lines: their form, their level, and that no payload gets into them."""

from __future__ import annotations

import json
import logging

import pytest

from toque._logging import configure, get_logger


@pytest.fixture(autouse=True)
def restored():
    """What `configure` changes is put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers = handlers
    root.setLevel(level)


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_json_line_has_event_level_time_and_logger(capsys):
    """One object a line, on stderr, with the values that were given."""
    configure(json=True)

    get_logger("toque.pod").warning("station claimed", station="1.0", epoch=3)

    (line,) = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "station claimed", "level": "warning", "logger": "toque.pod", "station": "1.0", "epoch": 3}


def test_a_text_line_has_no_colour_without_a_terminal(capsys):
    """A file or a pipe gets plain text."""
    configure()

    get_logger("toque.pod").info("ready", pods=2)

    text = capsys.readouterr().err
    assert "ready" in text and "pods=2" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("value", [b"hunter2", {"password": "hunter2"}, ["hunter2"], ("hunter2",), object()])
def test_a_value_that_may_be_a_payload_shows_as_its_type(capsys, value):
    """Only short scalars pass, so a payload given by mistake is not printed."""
    configure(json=True)

    get_logger("x").info("done", value=value)

    (line,) = lines(capsys)
    assert line["value"].startswith(f"<{type(value).__name__}")
    assert "hunter2" not in json.dumps(line)


def test_long_text_is_cut(capsys):
    """A message of another system cannot flood the log."""
    configure(json=True)

    get_logger("x").info("failed", error="x" * 100_000)

    assert len(lines(capsys)[0]["error"]) == 2_001


@pytest.mark.parametrize("level", ["warning", "WARNING", logging.WARNING])
def test_lines_below_the_level_are_left_out(capsys, level):
    """The level holds for both kinds of logger."""
    configure(json=True, level=level)

    get_logger("x").info("quiet")
    logging.getLogger("y").info("quiet")
    get_logger("x").warning("loud")

    assert [line["event"] for line in lines(capsys)] == ["loud"]


def test_an_unknown_level_is_refused():
    """The message lists the known ones."""
    with pytest.raises(ValueError, match="unknown log level 'loud'; known are debug, info"):
        configure(level="loud")


def test_lines_of_other_libraries_have_the_same_form(capsys):
    """nats-py and the user's callbacks log through the standard library."""
    configure(json=True)

    logging.getLogger("nats").warning("slow consumer %d", 5)

    (line,) = lines(capsys)
    assert (line["event"], line["logger"], line["level"]) == ("slow consumer 5", "nats", "warning")


def test_a_logger_made_before_configure_obeys_it(capsys):
    """Modules make their loggers when they are imported."""
    early = get_logger("early")
    configure(json=True)

    early.info("hello")

    assert lines(capsys)[0]["logger"] == "early"


def test_configuring_twice_prints_each_line_once(capsys):
    """A second call replaces the first."""
    configure(json=True)
    configure(json=True)

    get_logger("x").info("once")
    logging.getLogger("y").warning("once")

    assert len(lines(capsys)) == 2


@pytest.mark.parametrize("as_json", [True, False])
def test_an_exception_is_shown_without_locals(capsys, as_json):
    """The traceback has lines of source and no values."""
    configure(json=as_json)
    payload = "hunter2"

    try:
        raise ValueError(len(payload))
    except ValueError:
        get_logger("x").exception("failed")

    text = capsys.readouterr().err
    assert "ValueError: 7" in text
    assert "test_logging.py" in text
    assert "payload = 'hunter2'" not in text
