"""`toque instances pause`, `resume`, `restart`, `terminate` and `delete`: one instance, or many at once.

An operation is done when its line says so. Interrupted, the command may be given again: what is done already is then done
once more to no effect (a restart begins another run).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final

import typer
from typer import Argument, Option

from toque.cli.connection import Connection
from toque.cli.instances import WorkflowOption, show_instances
from toque.cli.output import EXIT_FAILED, EXIT_OK, RowFormat, console, exit_code_of, say, show_json, show_line
from toque.cli.selection import CHOSEN_MAX, LIVE, Named, Selection, Workflows, chosen, selection
from toque.client import ENDED, Client, Instance, InstanceStatus, StepRef
from toque.errors import ToqueError, Unavailable, UsageError

IN_FLIGHT: Final = 64  # operations at once
CHUNK: Final = 256  # instances that are acted on before their results are shown
MANY: Final = 2  # so many are asked for before they are deleted
# The statuses in which an operation changes something; docs/control.md has the whole table.
APPLIES: Final[dict[str, AbstractSet[str]]] = {
    "pause": frozenset({"running", "waiting"}),
    "resume": frozenset({"paused", "waitingForPause"}),
    "terminate": LIVE,
    "restart": LIVE | ENDED,
    "delete": LIVE | ENDED,
}

IdsArgument = Annotated[list[str] | None, Argument(
    metavar="[ID…]", help="ids of instances, or `latest`; - reads them from standard input: one a line, or what "
    "`toque instances list -o json` prints", show_default=False)]
AllOption = Annotated[bool, Option("--all", help="all that can be, or those that --workflow and --status leave; queued "
                                   "ones are not among them")]
StatusOption = Annotated[str | None, Option("--status", metavar="STATUS", help="with --all: only those in this status")]
DryRunOption = Annotated[bool, Option("--dry-run", help="only show which ones")]
YesOption = Annotated[bool, Option("--yes", "-y", help="do not ask")]
RowsOption = Annotated[RowFormat, Option("--output", "-o", help="form of the results")]


class Kind(StrEnum):
    """Of a step."""

    DO = "do"
    SLEEP = "sleep"
    EVENT = "event"
    START = "start"
    CHILD = "child"


@dataclass(frozen=True, slots=True)
class Verb:
    """An operation."""

    name: str
    done: str
    act: Callable[[Instance[Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one instance; `error` is None when the operation is done."""

    instance: Named
    error: ToqueError | None


@dataclass(frozen=True, slots=True)
class Manner:
    """How a command was told to go about it."""

    dry_run: bool
    yes: bool
    output: RowFormat


# -- the commands ------------------------------------------------------------------------------------------------------

async def pause(connection: Connection, ids: IdsArgument = None, workflow: WorkflowOption = None, every: AllOption = False,
                status: StatusOption = None, dry_run: DryRunOption = False, yes: YesOption = False,
                output: RowsOption = RowFormat.TABLE) -> int:
    """Let instances stand still until they are resumed: callbacks that are inside finish, nothing more is entered.

    Timers stand still too, and events are kept. A queued one can be paused by its id, and then does not begin.
    Exit code 0 when all are paused, or are about to be.

    \b
    Examples:
      toque instances pause job-17
      toque instances pause --all --workflow census --dry-run
    """
    verb = Verb("pause", "paused", Instance.pause)
    return await _steer(connection, verb, selection(ids, every, workflow, status, APPLIES[verb.name]),
                        Manner(dry_run, yes, output))


async def resume(connection: Connection, ids: IdsArgument = None, workflow: WorkflowOption = None,
                 every: AllOption = False, status: StatusOption = None, dry_run: DryRunOption = False,
                 yes: YesOption = False, output: RowsOption = RowFormat.TABLE) -> int:
    """Let paused instances go on. Their timers are moved by as long as they were paused.

    Nothing happens to one that is not paused; one that has ended is an error.

    \b
    Examples:
      toque instances resume job-17
      toque instances resume --all --status paused
    """
    verb = Verb("resume", "resumed", Instance.resume)
    return await _steer(connection, verb, selection(ids, every, workflow, status, APPLIES[verb.name]),
                        Manner(dry_run, yes, output))


async def terminate(connection: Connection, ids: IdsArgument = None, workflow: WorkflowOption = None,
                    every: AllOption = False, status: StatusOption = None, dry_run: DryRunOption = False,
                    yes: YesOption = False, output: RowsOption = RowFormat.TABLE,
                    children: Annotated[bool, Option("--children", help="the children of their present runs too, and "
                                                     "theirs")] = False) -> int:
    """End instances without a result. A queued one never starts; a running callback is cancelled.

    \b
    Examples:
      toque instances terminate latest --workflow census
      toque instances terminate --all --status waiting --dry-run
    """
    verb = Verb("terminate", "terminated", lambda handle: handle.terminate(children=children))
    return await _steer(connection, verb, selection(ids, every, workflow, status, APPLIES[verb.name]),
                        Manner(dry_run, yes, output))


async def restart(
        connection: Connection, ids: IdsArgument = None, workflow: WorkflowOption = None,
        from_: Annotated[str | None, Option(
            "--from", metavar="NAME[:COUNT]", help="keep the results of the steps that began before this one; COUNT: "
            "which of that name [default: the first]")] = None,
        from_kind: Annotated[Kind | None, Option("--from-kind", help="of the step of --from [default: do]")] = None,
        every: AllOption = False, status: StatusOption = None, dry_run: DryRunOption = False, yes: YesOption = False,
        output: RowsOption = RowFormat.TABLE) -> int:
    """Begin another run of instances with the same params, from the start or from a step.

    What runs is cut first, so any status will do.

    \b
    Examples:
      toque instances restart job-17
      toque instances restart job-17 --from "fetch page:3"
      toque instances list --status errored -o json | toque instances restart -
    """
    ref = step_ref(from_, from_kind)
    verb = Verb("restart", "restarted", lambda handle: handle.restart(from_=ref))
    return await _steer(connection, verb, selection(ids, every, workflow, status, APPLIES[verb.name]),
                        Manner(dry_run, yes, output))


async def delete(connection: Connection, ids: IdsArgument = None, workflow: WorkflowOption = None, every: AllOption = False,
                 status: StatusOption = None, dry_run: DryRunOption = False, yes: YesOption = False,
                 output: RowsOption = RowFormat.TABLE) -> int:
    """Forget instances: nothing of them goes on, nothing of them is kept, and their ids are free.

    A running one is cut. On a terminal it asks before it deletes more than one; --yes answers beforehand.

    \b
    Examples:
      toque instances delete job-17
      toque instances delete --all --workflow census --status complete --dry-run
      toque instances list --status errored -o ndjson | toque instances delete -
    """
    verb = Verb("delete", "deleted", Instance.delete)
    return await _steer(connection, verb, selection(ids, every, workflow, status, APPLIES[verb.name]),
                        Manner(dry_run, yes, output))


def step_ref(text: str | None, kind: Kind | None) -> StepRef | None:
    """The step of --from; None without one. Raises UsageError."""
    if text is None:
        if kind is not None:
            raise UsageError("--from-kind says of what kind the step of --from is: name the step too")
        return None
    name, colon, count = text.rpartition(":")
    counted = bool(colon) and count.isascii() and count.isdecimal()
    if not counted:
        name, count = text, "1"
    if not name or int(count) < 1:
        raise UsageError(f"--from {text!r} names no step: it takes NAME, or NAME:COUNT with COUNT from 1 on; "
                         "`toque instances describe ID` shows the steps")
    return StepRef(name, int(count), (kind or Kind.DO).value)


# -- acting ------------------------------------------------------------------------------------------------------------

async def _steer(connection: Connection, verb: Verb, choice: Selection, manner: Manner) -> int:
    async with connection.client() as client:
        if manner.dry_run:
            return await _rehearse(client, choice, manner.output)
        instances, more = await chosen(client, choice)
        if not manner.yes and _must_ask(verb, choice, instances) and not typer.confirm(
                f"{verb.name} {_number(instances)}?"):
            say(f"nothing was {verb.done}")
            return EXIT_FAILED
        results = await _act(client, verb, instances, manner.output)
    if manner.output is RowFormat.JSON:
        show_json([_row(result) for result in results])
    _remark(verb, choice, results, left=len(instances) - len(results), more=more)
    failed = exit_code_of([result.error for result in results])
    return EXIT_FAILED if failed == EXIT_OK and more else failed


def _must_ask(verb: Verb, choice: Selection, instances: Sequence[Named]) -> bool:
    """Only where somebody can answer: a script is taken at its word."""
    grave = choice.every or (verb.name == "delete" and len(instances) >= MANY)
    return bool(instances) and grave and sys.stdin.isatty() and sys.stdout.isatty()


async def _act(client: Client, verb: Verb, instances: Sequence[Named], output: RowFormat) -> list[Result]:
    """In order, and shown in order. Ends early when no owner answers for any of a chunk."""
    workflows = Workflows(client)
    await workflows.read(instances)
    places = asyncio.Semaphore(IN_FLIGHT)

    async def one(named: Named) -> Result:
        async with places:
            try:
                handle = await workflows.handle(named)
                named = Named(handle.id, handle.workflow)
                await verb.act(handle)
            except ToqueError as error:
                return Result(named, error)
            return Result(named, None)

    results: list[Result] = []
    with _progress(verb, len(instances), output) as advance:
        for first in range(0, len(instances), CHUNK):
            chunk = await asyncio.gather(*map(one, instances[first:first + CHUNK]))
            results += chunk
            _show(chunk, verb, output)
            advance(len(results))
            if all(isinstance(result.error, Unavailable) for result in chunk):
                break
    return results


@contextmanager
def _progress(verb: Verb, total: int, output: RowFormat) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal while much is done, unless the results themselves are seen there."""
    lines_seen = output is not RowFormat.JSON and sys.stdout.isatty()
    if lines_seen or total <= CHUNK or not sys.stderr.isatty():
        yield lambda completed: None
        return
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console(error=True), transient=True,
                  redirect_stdout=False) as bar:
        task = bar.add_task(verb.name, total=total)
        yield lambda completed: bar.update(task, completed=completed)


# -- showing -----------------------------------------------------------------------------------------------------------

async def _rehearse(client: Client, choice: Selection, output: RowFormat) -> int:
    """Show what would be acted on. Those that are not there are errors."""
    if choice.every:
        show_instances([row async for row in choice.rows(client)], output, empty="no instances like that")
        return EXIT_OK
    found: list[InstanceStatus] = []
    errors: list[ToqueError | None] = []
    instances, _ = await chosen(client, choice)
    workflows = Workflows(client)
    await workflows.read(instances)
    for named in instances:
        try:
            found.append(await (await workflows.handle(named)).status())
        except ToqueError as error:
            errors.append(error)
            say(f"toque: {error}")
    show_instances(found, output, empty="none of them is there")
    return exit_code_of(errors)


def _show(results: Sequence[Result], verb: Verb, output: RowFormat) -> None:
    """One line each; errors on stderr, where the results are lines for people."""
    for result in results:
        if output is RowFormat.NDJSON:
            show_line(_row(result))
        elif output is RowFormat.TABLE and result.error is None:
            print(f"{verb.done} {result.instance}")
        elif output is RowFormat.TABLE:
            say(f"toque: {result.instance} was not {verb.done}: {result.error}")


def _row(result: Result) -> Mapping[str, Any]:
    error = result.error
    return {"workflow": result.instance.workflow, "id": result.instance.id, "done": error is None,
            "error": type(error).__name__ if error else None, "message": str(error) if error else None}


def _remark(verb: Verb, choice: Selection, results: Sequence[Result], *, left: int, more: bool) -> None:
    if not results:
        say("no instances like that" if choice.every else "standard input names no instances")
    if left:
        say(f"toque: no owner answered for any of the last ones: {left:,} more were not tried")
    if more:
        say(f"toque: there are more than {CHOSEN_MAX:,}: these were the oldest")
    done = sum(result.error is None for result in results)
    if choice.every and results:
        say(f"{verb.done} {done:,} of {_number(results)}")


def _number(instances: Sequence[object]) -> str:
    return f"{len(instances):,} instance{'' if len(instances) == 1 else 's'}"
