"""`toque instances pause|resume|restart|terminate|delete`: which instances are meant, and what a script is told of each."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from stand_in_owner import Place, new_place

from toque import sim
from toque._protocol import Answer
from toque.cli import selection, steering
from toque.cli.output import EXIT_FAILED, EXIT_OK, EXIT_UNAVAILABLE, RowFormat
from toque.cli.selection import Named, read_names
from toque.errors import InstanceNotFound, UsageError

Story = Callable[[Any, Place], Coroutine[Any, Any, None]]
STATUSES = {"r": "running", "w": "waiting", "p": "paused", "c": "complete"}


def play(story: Story) -> None:
    """The commands get a connection to an owner that has an instance in each of four statuses, r, w, p and c."""

    async def main() -> None:
        place = await new_place()
        for number, (instance, status) in enumerate(STATUSES.items(), 1):
            place.owner.put("census", instance, status, admitted_at=number, ended_at=9 if status == "complete" else 0)
        await story(SimpleNamespace(client=lambda: place.client, account="main"), place)

    sim.run(main(), seed=1)


def statuses(place: Place) -> dict[str, str]:
    return {id_: view.status for (_, id_), view in place.owner.instances.items()}


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def in_terminal(monkeypatch: pytest.MonkeyPatch, answer: bool) -> list[str]:
    """As if somebody sat there who gives this answer; returns the questions."""
    questions: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(steering.typer, "confirm", lambda question: questions.append(question) or answer)
    return questions


# -- by id -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("command", "instance", "line", "after"), [
    (steering.pause, "r", "paused census/r", "paused"), (steering.resume, "p", "resumed census/p", "running"),
    (steering.terminate, "w", "terminated census/w", "terminated"), (steering.restart, "c", "restarted census/c", "running"),
    (steering.delete, "c", "deleted census/c", None)])
@pytest.mark.parametrize("workflow", ["census", None])
def test_one_instance_is_steered_by_its_id(command, instance, line, after, workflow, capsys):
    """A line says so, with the workflow that it was found in."""

    async def story(connection: Any, place: Place) -> None:
        assert await command(connection, [instance], workflow=workflow) == EXIT_OK

        assert capsys.readouterr().out == f"{line}\n"
        assert statuses(place).get(instance) == after

    play(story)


def test_each_instance_has_a_line_and_one_failure_is_exit_1(capsys):
    """In the order of the ids; those behind the failure are still done, and the failure says why."""

    async def story(connection: Any, place: Place) -> None:
        assert await steering.pause(connection, ["w", "none", "c", "r"], workflow="census") == EXIT_FAILED

        shown = capsys.readouterr()
        assert shown.out.splitlines() == ["paused census/w", "paused census/r"]
        assert "census/none was not paused: there is no instance" in shown.err
        assert "census/c was not paused: census/c has ended already (it is complete)" in shown.err

    play(story)


def test_a_program_gets_a_result_for_each(capsys):
    """Whole as JSON, or a document a line as they come."""

    async def story(connection: Any, place: Place) -> None:
        await steering.pause(connection, ["r", "none"], workflow="census", output=RowFormat.JSON)
        whole = json.loads(capsys.readouterr().out)
        await steering.pause(connection, ["r", "none"], workflow="census", output=RowFormat.NDJSON)
        by_line = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

        assert whole == by_line
        assert whole[0] == {"workflow": "census", "id": "r", "done": True, "error": None, "message": None}
        assert (whole[1]["id"], whole[1]["done"], whole[1]["error"]) == ("none", False, "InstanceNotFound")

    play(story)


def test_the_latest_one_can_be_meant(capsys):
    """By the word `latest`."""

    async def story(connection: Any, place: Place) -> None:
        await steering.delete(connection, ["latest"])

        assert capsys.readouterr().out == "deleted census/c\n"

    play(story)


def test_an_id_that_is_in_no_workflow_is_an_error(capsys):
    """After every workflow was asked; and nothing is asked of a bad id."""

    async def story(connection: Any, place: Place) -> None:
        assert await steering.delete(connection, ["none"]) == EXIT_FAILED
        assert "no workflow of the account 'main' has an instance 'none'" in capsys.readouterr().err

    play(story)


def test_owners_that_are_away_are_exit_3(monkeypatch, capsys):
    """Trying again may help. When nobody answers for a whole chunk the others are not tried."""
    monkeypatch.setattr(steering, "CHUNK", 2)

    async def story(connection: Any, place: Place) -> None:
        place.owner.muted = True
        assert await steering.pause(connection, ["r", "w", "p"], workflow="census") == EXIT_UNAVAILABLE

        shown = capsys.readouterr().err
        assert shown.count("was not paused") == 2 and "1 more were not tried" in shown

    play(story)


def test_a_restart_names_its_step():
    """NAME or NAME:COUNT, and of what kind."""

    async def story(connection: Any, place: Place) -> None:
        await steering.restart(connection, ["c"], workflow="census")
        await steering.restart(connection, ["c"], workflow="census", from_="fetch page")
        await steering.restart(connection, ["c"], workflow="census", from_="at 10:30:2", from_kind=steering.Kind.SLEEP)

        assert place.owner.restarts == [("c", "", 1, "do"), ("c", "fetch page", 1, "do"), ("c", "at 10:30", 2, "sleep")]

    play(story)


def test_a_step_that_is_not_in_the_history_is_said_so(capsys):
    """Exit code 1."""

    async def story(connection: Any, place: Place) -> None:
        assert await steering.restart(connection, ["c"], workflow="census", from_="nowhere") == EXIT_FAILED
        assert "census/c was not restarted: step 'nowhere' is not in the history" in capsys.readouterr().err

    play(story)


def test_children_are_taken_along_when_they_are_asked_for(monkeypatch):
    """The call says so; without the option it says nothing of them."""
    asked: list[bool] = []

    async def terminate(handle: Any, *, children: bool = False) -> None:
        asked.append(children)

    async def story(connection: Any, place: Place) -> None:
        monkeypatch.setattr("toque.client.Instance.terminate", terminate)
        await steering.terminate(connection, ["w"], workflow="census", children=True)
        await steering.terminate(connection, ["r"], workflow="census")

        assert asked == [True, False]

    play(story)


# -- many --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("command", "changed"), [
    (steering.pause, ["r", "w"]), (steering.resume, ["p"]), (steering.terminate, ["r", "w", "p"]),
    (steering.restart, ["r", "w", "p", "c"]), (steering.delete, ["r", "w", "p", "c"])])
def test_all_means_those_that_the_operation_is_good_for(command, changed, capsys):
    """What has ended is not paused, and what is not paused is not resumed; so none of them is an error."""

    async def story(connection: Any, place: Place) -> None:
        assert await command(connection, every=True, output=RowFormat.NDJSON) == EXIT_OK

        assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == changed

    play(story)


def test_filters_narrow_what_all_means(capsys):
    """By status and by workflow."""

    async def story(connection: Any, place: Place) -> None:
        place.owner.put("other", "r2", "running")
        await steering.terminate(connection, every=True, status="running", workflow="census")
        shown = capsys.readouterr()

        assert shown.out == "terminated census/r\n" and shown.err == "terminated 1 of 1 instance\n"
        assert statuses(place)["r2"] == "running" and statuses(place)["w"] == "waiting"
        assert await steering.terminate(connection, every=True, status="running", workflow="census") == EXIT_OK
        assert capsys.readouterr().err == "no instances like that\n"

    play(story)


def test_what_cannot_be_done_with_a_status_is_refused():
    """Before anything is asked; queued ones are not listed, and a status that there is none of is said so."""

    async def story(connection: Any, place: Place) -> None:
        for status, why in (("paused", "running, waiting"), ("queued", "not listed"), ("broken", "no instance has")):
            with pytest.raises(UsageError, match=why):
                await steering.pause(connection, every=True, status=status)

    play(story)


def test_a_dry_run_shows_and_changes_nothing(capsys):
    """With filters or with ids; an id that is not there is an error."""

    async def story(connection: Any, place: Place) -> None:
        before = statuses(place)
        assert await steering.pause(connection, every=True, dry_run=True, output=RowFormat.JSON) == EXIT_OK
        assert [row["id"] for row in json.loads(capsys.readouterr().out)] == ["r", "w"]
        assert await steering.delete(connection, ["c", "none"], workflow="census", dry_run=True) == EXIT_FAILED
        shown = capsys.readouterr()

        assert "census" in shown.out and "complete" in shown.out and "there is no instance census/none" in shown.err
        assert statuses(place) == before

    play(story)


def test_more_than_a_command_takes_is_said_so(monkeypatch, capsys):
    """The oldest ones are done; exit code 1, for there are others."""
    monkeypatch.setattr(selection, "CHOSEN_MAX", 2)
    monkeypatch.setattr(steering, "CHOSEN_MAX", 2)

    async def story(connection: Any, place: Place) -> None:
        assert await steering.delete(connection, every=True) == EXIT_FAILED

        assert list(statuses(place)) == ["p", "c"]
        assert "there are more than 2" in capsys.readouterr().err

    play(story)


def test_a_terminal_shows_how_far_it_has_come(monkeypatch, capsys):
    """Where the results go somewhere else; the results themselves stay whole."""
    monkeypatch.setattr(steering, "CHUNK", 2)

    async def story(connection: Any, place: Place) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        await steering.restart(connection, every=True, output=RowFormat.NDJSON)

        shown = capsys.readouterr()
        assert [json.loads(line)["done"] for line in shown.out.splitlines()] == [True] * 4
        assert "restart" in shown.err and "4/4" in shown.err

    play(story)


# -- asking ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [{"ids": ["r", "w"]}, {"every": True}])
def test_many_are_deleted_on_a_terminal_only_when_somebody_agrees(arguments, monkeypatch, capsys):
    """Not with --yes, and not one alone."""

    async def story(connection: Any, place: Place) -> None:
        questions = in_terminal(monkeypatch, False)
        assert await steering.delete(connection, **arguments) == EXIT_FAILED
        assert len(place.owner.instances) == 4 and "nothing was deleted" in capsys.readouterr().err
        await steering.delete(connection, ["c"])
        assert len(questions) == 1 and questions[0].startswith("delete ")
        await steering.delete(connection, yes=True, **{**arguments, "ids": arguments.get("ids")})
        assert len(questions) == 1

    play(story)


def test_a_script_is_taken_at_its_word(monkeypatch):
    """Nobody is asked where nobody can answer; nor is anybody about instances that were named, but for a delete."""

    async def story(connection: Any, place: Place) -> None:
        monkeypatch.setattr(steering.typer, "confirm", lambda question: pytest.fail(f"asked {question!r}"))
        await steering.delete(connection, every=True, status="complete")
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        await steering.pause(connection, ["r", "w"])
        assert statuses(place) == {"r": "paused", "w": "paused", "p": "paused"}

    play(story)


# -- standard input ----------------------------------------------------------------------------------------------------

def test_ids_come_from_standard_input(monkeypatch, capsys):
    """Beside those that were typed, each once."""

    async def story(connection: Any, place: Place) -> None:
        typed(monkeypatch, "w\n\n r \nw\n")
        await steering.pause(connection, ["r", "-"], workflow="census")

        assert capsys.readouterr().out == "paused census/r\npaused census/w\n"

    play(story)


def test_an_empty_standard_input_is_no_error(monkeypatch, capsys):
    """A list that found nothing is piped into it."""

    async def story(connection: Any, place: Place) -> None:
        for nothing in ("", "[]\n"):
            typed(monkeypatch, nothing)
            assert await steering.delete(connection, ["-"]) == EXIT_OK
            assert "standard input names no instances" in capsys.readouterr().err

    play(story)


@pytest.mark.parametrize("text", [
    '[{"id": "a", "workflow": "census", "status": "paused"}, {"id": "b", "workflow": "nap"}]',
    '{"id":"a","workflow":"census"}\n{"id":"b","workflow":"nap"}\n',
    '[{"workflow": "census", "ids": ["a"]}, {"workflow": "nap", "ids": ["b"]}]'])
def test_what_other_commands_print_as_json_is_understood(text):
    """Lists and results of `toque instances`, ids of `toque trigger`; the workflow comes with them."""
    assert read_names(text, None) == [Named("a", "census"), Named("b", "nap")]


def test_ids_alone_get_the_workflow_of_the_option():
    """As lines, or as a JSON list."""
    assert read_names("a\nb", "census") == read_names('["a", "b"]', "census") == [Named("a", "census"), Named("b", "census")]


@pytest.mark.parametrize(("text", "why"), [
    ('{"status": "paused"}', "names no instance"), ('[{"id": 7}]', "names no instance"), ("[1, 2", "begins like JSON"),
    ('{"id": "a", "workflow": "nap"}', "--workflow says 'census'")])
def test_what_names_no_instance_is_said_before_anything_is_done(text, why):
    """With what stood there."""
    with pytest.raises(UsageError, match=why):
        read_names(text, "census")


def test_a_lost_race_is_not_a_lost_chunk(capsys):
    """An instance that goes away while many are steered is one error among the results."""

    async def story(connection: Any, place: Place) -> None:
        place.owner.say = [Answer(1, "not_found")]
        assert await steering.delete(connection, ["r", "w"], workflow="census", output=RowFormat.JSON) == EXIT_FAILED

        results = json.loads(capsys.readouterr().out)
        assert sorted(result["error"] or "" for result in results) == ["", InstanceNotFound.__name__]

    play(story)
