"""`toque dead`: what is shown of parked messages, which ones a command acts on, and what it answers to a script."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from stand_in_owner import Place, new_place

from toque import _subjects, cli, sim
from toque.cli import dead
from toque.cli.output import EXIT_FAILED, EXIT_OK, EXIT_UNAVAILABLE, EXIT_USAGE, Format, RowFormat
from toque.errors import NotParked, UsageError

Story = Callable[[Any, Place], Coroutine[Any, Any, None]]


def play(story: Story) -> None:
    """The commands get a connection to an in-memory broker on which three messages are parked."""

    async def main() -> None:
        place = await new_place()
        for instance, reason, body in (("one", "for now", b'{"path": "a.py"}'), ("a$b", "no legal form", b"\xff"),
                                       ("two", "for now", b"[1]")):
            origin = f"toque.main.queue.census.1.{_subjects.station_number(instance, 8)}.{instance}"
            await place.owner.bus.publish("toque.main.dead.create.census", body, {
                "Toque-Reason": reason, "Toque-Subject": origin, "Toque-Nonce": instance})
        await story(SimpleNamespace(client=lambda: place.client, account="main"), place)

    sim.run(main(), seed=1)


def parked(place: Place) -> list[int]:
    return [message.sequence for message in place.broker.stored("toque+main+dead")]


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


# -- list and show -----------------------------------------------------------------------------------------------------

def test_a_list_says_which_why_and_whether_a_retry_may_help(capsys):
    """One row each."""

    async def story(connection: Any, place: Place) -> None:
        assert await dead.list_dead(connection) == EXIT_OK

        heading, *rows = capsys.readouterr().out.splitlines()
        assert heading.split()[:4] == ["sequence", "kind", "workflow", "id"]
        assert [row.split()[0] for row in rows] == ["1", "2", "3"]
        assert "may succeed" in rows[0] and "no legal form" in rows[1] and "must fail" in rows[1]

    play(story)


def test_a_list_is_json_or_a_document_a_line(capsys):
    """With everything that the table shows, and more."""

    async def story(connection: Any, place: Place) -> None:
        await dead.list_dead(connection, reason="for now", output=RowFormat.JSON)
        whole = json.loads(capsys.readouterr().out)
        await dead.list_dead(connection, reason="for now", output=RowFormat.NDJSON)
        by_line = lines(capsys.readouterr().out)

        assert whole == by_line
        assert [(row["sequence"], row["id"], row["size"], row["obstacle"]) for row in whole] == [
            (1, "one", 16, ""), (3, "two", 3, "")]
        assert whole[0]["parked_at"].endswith("Z")

    play(story)


def test_a_list_that_is_cut_says_how_to_go_on(capsys):
    """With the sequence to begin behind."""

    async def story(connection: Any, place: Place) -> None:
        await dead.list_dead(connection, limit=2, output=RowFormat.NDJSON)
        first = capsys.readouterr()
        await dead.list_dead(connection, limit=2, after=2, output=RowFormat.NDJSON)
        second = capsys.readouterr()

        assert [row["sequence"] for row in lines(first.out)] == [1, 2]
        assert "--after 2 the next ones" in first.err
        assert [row["sequence"] for row in lines(second.out)] == [3] and second.err == ""

    play(story)


def test_reasons_are_counted(capsys):
    """A row for each kind, workflow and reason."""

    async def story(connection: Any, place: Place) -> None:
        await dead.list_dead(connection, count=True, output=RowFormat.NDJSON)

        assert lines(capsys.readouterr().out) == [
            {"kind": "create", "workflow": "census", "reason": "for now", "messages": 2},
            {"kind": "create", "workflow": "census", "reason": "no legal form", "messages": 1}]

    play(story)


def test_nothing_parked_is_said_on_stderr(capsys):
    """And is an empty list for a program."""

    async def story(connection: Any, place: Place) -> None:
        assert await dead.list_dead(connection, kind="event") == EXIT_OK
        assert "no parked messages like that" in capsys.readouterr().err
        await dead.list_dead(connection, kind="event", output=RowFormat.JSON)
        assert json.loads(capsys.readouterr().out) == []

    play(story)


def test_a_message_is_shown_with_body_and_headers(capsys):
    """The body as JSON, or as bytes where it is none."""

    async def story(connection: Any, place: Place) -> None:
        await dead.show(connection, 1)
        text = capsys.readouterr().out
        await dead.show(connection, 1, output=Format.JSON)
        good = json.loads(capsys.readouterr().out)
        await dead.show(connection, 2, output=Format.JSON)
        bad = json.loads(capsys.readouterr().out)

        assert '{"path":"a.py"}' in text and "Toque-Nonce: one" in text and "may succeed" in text
        assert (good["body"], good["headers"]) == ({"path": "a.py"}, {"Toque-Nonce": "one"})
        assert (bad["body_base64"], "body" in bad) == ("/w==", False)
        with pytest.raises(NotParked):
            await dead.show(connection, 99)

    play(story)


def test_a_body_is_written_byte_by_byte(monkeypatch):
    """Into a file, to be mended and sent anew."""
    out = SimpleNamespace(buffer=io.BytesIO(), flush=lambda: None)

    async def story(connection: Any, place: Place) -> None:
        monkeypatch.setattr(sys, "stdout", out)
        assert await dead.show(connection, 2, body=True) == EXIT_OK
        assert out.buffer.getvalue() == b"\xff"

    play(story)


# -- retry and drop ----------------------------------------------------------------------------------------------------

def test_a_retry_answers_for_each_message(capsys):
    """What went is a line on stdout, what did not a line on stderr, and the exit code says that not all went."""

    async def story(connection: Any, place: Place) -> None:
        assert await dead.retry(connection, ["1", "2", "3"]) == EXIT_USAGE

        shown = capsys.readouterr()
        assert shown.out.splitlines() == ["retried 1", "retried 3"]
        assert "2 was not retried" in shown.err and "position 1" in shown.err
        assert parked(place) == [2] and sorted(place.stored_ids()) == ["one", "two"]

    play(story)


@pytest.mark.parametrize("output", [RowFormat.JSON, RowFormat.NDJSON])
def test_results_are_data_for_a_program(output, capsys):
    """With the kind of error by its name."""

    async def story(connection: Any, place: Place) -> None:
        assert await dead.retry(connection, ["1", "99"], output=output) == EXIT_FAILED

        text = capsys.readouterr().out
        good, bad = json.loads(text) if output is RowFormat.JSON else lines(text)
        assert good == {"sequence": 1, "done": True, "error": None, "message": None}
        assert (bad["sequence"], bad["done"], bad["error"]) == (99, False, "NotParked")

    play(story)


def test_sequences_come_from_standard_input(monkeypatch, capsys):
    """One a line, as `toque dead list … | jq .sequence` prints them; none at all are none, not all."""

    async def story(connection: Any, place: Place) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("1\n3\n"))
        assert await dead.drop(connection, ["-"]) == EXIT_OK
        assert capsys.readouterr().out.splitlines() == ["dropped 1", "dropped 3"]

        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert await dead.drop(connection, ["-"]) == EXIT_OK
        assert parked(place) == [2]

    play(story)


def test_all_that_a_filter_leaves_are_acted_on(capsys):
    """In a script without a question; a second time there is nothing."""

    async def story(connection: Any, place: Place) -> None:
        assert await dead.retry(connection, every=True, reason="for now") == EXIT_OK
        assert parked(place) == [2]
        assert await dead.drop(connection, every=True, workflow="census") == EXIT_OK
        assert parked(place) == []
        capsys.readouterr()
        assert await dead.drop(connection, every=True) == EXIT_OK
        assert "no parked messages" in capsys.readouterr().err

    play(story)


@pytest.mark.parametrize("command", [dead.retry, dead.drop])
def test_a_dry_run_touches_nothing(command, capsys):
    """It shows which ones, and names those that are not there."""

    async def story(connection: Any, place: Place) -> None:
        assert await command(connection, every=True, reason="for now", dry_run=True, output=RowFormat.NDJSON) == EXIT_OK
        assert [row["sequence"] for row in lines(capsys.readouterr().out)] == [1, 3]
        assert await command(connection, ["2", "99"], dry_run=True, output=RowFormat.NDJSON) == EXIT_FAILED
        shown = capsys.readouterr()
        assert [row["sequence"] for row in lines(shown.out)] == [2] and "no message 99" in shown.err
        assert parked(place) == [1, 2, 3] and place.stored() == []

    play(story)


@pytest.mark.parametrize(("answer", "code", "left"), [(False, EXIT_FAILED, [1, 2, 3]), (True, EXIT_OK, [])])
def test_on_a_terminal_all_is_asked_about(answer, code, left, monkeypatch, capsys):
    """With their number; --yes is the answer beforehand, and named ones need none."""
    asked = []

    async def story(connection: Any, place: Place) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("typer.confirm", lambda text: asked.append(text) or answer)

        assert await dead.drop(connection, every=True) == code
        assert asked == ["drop 3 parked messages?"]
        assert parked(place) == left
        await dead.drop(connection, ["3"])
        await dead.drop(connection, every=True, yes=True)
        assert len(asked) == 1 and parked(place) == []

    play(story)


def test_an_owner_that_is_away_is_its_own_exit_code(capsys):
    """3: try again."""

    async def story(connection: Any, place: Place) -> None:
        place.owner.muted = True

        assert await dead.retry(connection, ["1"]) == EXIT_UNAVAILABLE
        assert parked(place) == [1, 2, 3]

    play(story)


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "which messages?"), (["--workflow", "census"], "add --all"), (["7", "--all"], "not both"),
    (["7", "--kind", "create"], "not both"), (["seven"], "'seven' is no sequence"), (["0"], "'0' is no sequence")])
@pytest.mark.parametrize("command", ["retry", "drop"])
def test_wrong_usage_reaches_no_server(command, arguments, said, capsys):
    """It is told before anything is connected to, with what to type instead."""
    assert cli.main(["dead", command, *arguments, "--nats", "nats://127.0.0.1:1"]) == EXIT_USAGE

    assert said in capsys.readouterr().err


def test_an_unknown_kind_is_refused():
    """With those that there are."""

    async def story(connection: Any, place: Place) -> None:
        with pytest.raises(UsageError, match="create, event"):
            await dead.list_dead(connection, kind="step")

    play(story)
