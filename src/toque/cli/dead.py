"""`toque dead`: list, show, retry and drop parked messages."""

from __future__ import annotations

import base64
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Final

import msgspec
import typer
from typer import Argument, Option

from toque import _payload
from toque._dead import DeadContent, DeadMessage, DeadResult
from toque._subjects import CONTENT_TYPE_HEADER
from toque.cli.connection import Connection
from toque.cli.output import (
    EXIT_FAILED,
    EXIT_OK,
    Format,
    RowFormat,
    bytes_text,
    exit_code_of,
    say,
    show_fields,
    show_json,
    show_line,
    show_table,
    time_text,
    whole,
)
from toque.client import Client
from toque.errors import ToqueError, UsageError

STDIN: Final = "-"
CHUNK: Final = 200  # sequences that are acted on before their results are shown
BODY_SHOWN_MAX: Final = 4000  # characters

RowsOption = Annotated[RowFormat, Option("--output", "-o", help="form of the report")]
KindOption = Annotated[str | None, Option("--kind", metavar="KIND", help="only of this kind: create or event")]
WorkflowOption = Annotated[str | None, Option("--workflow", "-w", metavar="NAME", help="only of this workflow")]
ReasonOption = Annotated[str | None, Option("--reason", metavar="TEXT", help="only with this text in the reason")]
SequencesArgument = Annotated[list[str] | None, Argument(
    metavar="[SEQUENCE…]", help="sequences of parked messages, as `toque dead list` shows them; - reads them from "
    "standard input", show_default=False)]
AllOption = Annotated[bool, Option("--all", help="all of them, or those that --kind, --workflow and --reason leave")]
DryRunOption = Annotated[bool, Option("--dry-run", help="only show which ones")]
YesOption = Annotated[bool, Option("--yes", "-y", help="do not ask")]


# -- list and show -----------------------------------------------------------------------------------------------------

async def list_dead(
        connection: Connection, kind: KindOption = None, workflow: WorkflowOption = None, reason: ReasonOption = None,
        limit: Annotated[int, Option("--limit", metavar="N", min=1, help="show so many")] = 50,
        after: Annotated[int, Option("--after", metavar="SEQUENCE", min=0, help="begin behind this one")] = 0,
        count: Annotated[bool, Option("--count", help="how many for which reason, instead of each")] = False,
        output: RowsOption = RowFormat.TABLE) -> int:
    """List parked messages, the oldest first: what could not be accepted, and why.

    With --count one row for each kind, workflow and reason (without --reason, --limit and --after).

    \b
    Examples:
      toque dead list --workflow census --reason "legal form"
      toque dead list --count
      toque dead list --limit 100000 -o ndjson | jq -r .sequence
    """
    async with connection.client() as client:
        if count:
            return await _show_counts(client, kind, workflow, output)
        messages: list[DeadMessage] = []
        async for message in client.dead.list(kind=kind, workflow=workflow, reason_contains=reason, limit=limit + 1,
                                              after=after):
            if len(messages) == limit:
                say(f"there are more: --limit shows more, --after {messages[-1].sequence} the next ones")
                break
            messages.append(message)
            if output is RowFormat.NDJSON:
                show_line(whole(message))
    if output is not RowFormat.NDJSON:
        _show_messages(messages, output, empty=_none(kind, workflow, reason, after))
    return EXIT_OK


def _none(*filters: object) -> str:
    return "no parked messages" + (" like that" if any(filters) else "")


def _show_messages(messages: Sequence[DeadMessage], output: RowFormat, *, empty: str) -> None:
    columns = ["sequence", "kind", "workflow", "id", "parked", "size", "reason", "a retry"]
    rows = [[message.sequence, message.kind, message.workflow, message.id or "", time_text(message.parked_at),
             bytes_text(message.size), message.reason, _prospect(message)] for message in messages]
    _show_rows([whole(message) for message in messages], columns, rows, output, empty=empty)


def _prospect(message: DeadMessage) -> str:
    return "must fail" if message.obstacle else "may succeed"


async def _show_counts(client: Client, kind: str | None, workflow: str | None, output: RowFormat) -> int:
    counts = await client.dead.count(kind=kind, workflow=workflow)
    rows = [[count.kind, count.workflow, count.reason, f"{count.messages:,}"] for count in counts]
    _show_rows(whole(counts), ["kind", "workflow", "reason", "messages"], rows, output, empty=_none(kind, workflow))
    return EXIT_OK


def _show_rows(values: Sequence[Any], columns: Sequence[str], rows: Sequence[Sequence[object]], output: RowFormat, *,
               empty: str) -> None:
    if output is RowFormat.JSON:
        show_json(values)
    elif output is RowFormat.NDJSON:
        for value in values:
            show_line(value)
    elif rows:
        show_table(columns, rows, numbers={"sequence", "size", "messages"})
    else:
        say(empty)


async def show(connection: Connection,
               sequence: Annotated[int, Argument(metavar="SEQUENCE", help="of a parked message", min=1)],
               body: Annotated[bool, Option("--body", help="write the body alone, byte by byte")] = False,
               output: Annotated[Format, Option("--output", "-o", help="form of the report")] = Format.TABLE) -> int:
    """Show a parked message: where it was for, why it is parked, whether a retry may succeed, headers and body.

    \b
    Examples:
      toque dead show 17
      toque dead show 17 --body > params.json
    """
    async with connection.client() as client:
        content = await client.dead.get(sequence)
    if body:
        sys.stdout.flush()
        sys.stdout.buffer.write(content.body)
    elif output is Format.JSON:
        show_json(_plain(content))
    else:
        text = _body_text(content)
        show_fields({
            "sequence": content.sequence, "kind": content.kind, "workflow": content.workflow, "id": content.id or "",
            "parked": time_text(content.parked_at), "stored as": content.subject, "reason": content.reason,
            "a retry": f"must fail: {content.obstacle}" if content.obstacle else "may succeed",
            "headers": "\n".join(f"{name}: {value}" for name, value in content.headers.items()),
            "size": bytes_text(content.size),
            "body": text if len(text) <= BODY_SHOWN_MAX else text[:BODY_SHOWN_MAX] + "… (--body writes all of it)"})
    return EXIT_OK


def _plain(content: DeadContent) -> dict[str, Any]:
    """For JSON: the body decoded, or as base64 text where it is neither JSON nor msgpack as it says."""
    values = {field.name: getattr(content, field.name) for field in fields(content) if field.name != "body"}
    decoded = _decoded(content)
    if decoded is None:
        return {**values, "body_base64": base64.b64encode(content.body).decode()}
    return {**values, "body": decoded}


def _body_text(content: DeadContent) -> str:
    decoded = _decoded(content)
    return repr(content.body[:BODY_SHOWN_MAX]) if decoded is None else bytes(decoded).decode()


def _decoded(content: DeadContent) -> msgspec.Raw | None:
    """The body as JSON text; None when it cannot be decoded."""
    content_type = content.headers.get(CONTENT_TYPE_HEADER, "")
    try:
        value = _payload.decode_params(content.body, content_type, Any, what="the body")
        return msgspec.Raw(_payload.to_json(_payload.encode(value, what="the body")))
    except UsageError:
        return None


# -- retry and drop ----------------------------------------------------------------------------------------------------

async def retry(connection: Connection, sequences: SequencesArgument = None, every: AllOption = False,
                kind: KindOption = None, workflow: WorkflowOption = None, reason: ReasonOption = None,
                dry_run: DryRunOption = False, yes: YesOption = False, output: RowsOption = RowFormat.TABLE) -> int:
    """Send parked messages again as they came; those that are accepted are not parked any more.

    What cannot be accepted stays parked, with an error. Retrying again what was interrupted is harmless: a creation is
    one instance, by its id. Exit code 0 when all were accepted.

    \b
    Examples:
      toque dead retry 17 18
      toque dead retry --all --workflow census --dry-run
      toque dead list --reason "params have" -o ndjson | jq .sequence | toque dead retry -
    """
    choice = _Choice(_numbers(sequences), every, kind, workflow, reason)
    async with connection.client() as client:
        return await _act(client, choice, _Verb("retry", "retried", client.dead.retry_many), dry_run, yes, output)


async def drop(connection: Connection, sequences: SequencesArgument = None, every: AllOption = False,
               kind: KindOption = None, workflow: WorkflowOption = None, reason: ReasonOption = None,
               dry_run: DryRunOption = False, yes: YesOption = False, output: RowsOption = RowFormat.TABLE) -> int:
    """Delete parked messages for good. One that is gone already counts as dropped.

    \b
    Examples:
      toque dead drop 17
      toque dead drop --all --reason "legal form" --dry-run
      toque dead drop --all --workflow census --yes
    """
    choice = _Choice(_numbers(sequences), every, kind, workflow, reason)
    async with connection.client() as client:
        return await _act(client, choice, _Verb("drop", "dropped", client.dead.drop_many), dry_run, yes, output)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which messages a command is to act on, as it was typed. `sequences` is None when none were named."""

    sequences: Sequence[int] | None
    every: bool
    kind: str | None
    workflow: str | None
    reason: str | None

    def __post_init__(self) -> None:
        filters = any((self.kind, self.workflow, self.reason))
        if self.sequences is not None and (self.every or filters):
            raise UsageError("name sequences, or --all with filters, not both")
        if self.sequences is None and not self.every:
            hint = "add --all to mean all of those" if filters else "name sequences, - for standard input, or --all"
            raise UsageError(f"which messages? {hint}; `toque dead list` shows them")


@dataclass(frozen=True, slots=True)
class _Verb:
    """What is done to them."""

    name: str
    done: str
    act: Callable[[Sequence[int]], Awaitable[list[DeadResult]]]


async def _act(client: Client, choice: _Choice, verb: _Verb, dry_run: bool, yes: bool, output: RowFormat) -> int:
    if dry_run:
        return await _rehearse(client, choice, output)
    sequences = await _chosen(client, choice)
    if choice.every and sequences and not yes and not _agreed(verb, len(sequences)):
        say(f"nothing was {verb.done}")
        return EXIT_FAILED
    results: list[DeadResult] = []
    for first in range(0, len(sequences), CHUNK):
        chunk = await verb.act(sequences[first:first + CHUNK])
        results += chunk
        _show_results(chunk, verb, output)
    if output is RowFormat.JSON:
        show_json([_result(result) for result in results])
    if not sequences:
        say(_no_match(choice))
    return exit_code_of(result.error for result in results)


async def _chosen(client: Client, choice: _Choice) -> list[int]:
    if choice.sequences is not None:
        return list(choice.sequences)
    return [message.sequence async for message in _listed(client, choice)]


def _listed(client: Client, choice: _Choice) -> AsyncIterator[DeadMessage]:
    return client.dead.list(kind=choice.kind, workflow=choice.workflow, reason_contains=choice.reason)


def _no_match(choice: _Choice) -> str:
    return _none(choice.kind, choice.workflow, choice.reason)


def _numbers(sequences: Sequence[str] | None) -> list[int] | None:
    """None when none were named. Raises UsageError for what is no sequence, before anything is done."""
    if not sequences:
        return None
    words = [word for text in sequences for word in (sys.stdin.read().split() if text == STDIN else [text])]
    for word in words:
        if not (word.isascii() and word.isdecimal() and int(word)):
            raise UsageError(f"{word!r} is no sequence: `toque dead list` shows them, in its first column")
    return [int(word) for word in words]


def _agreed(verb: _Verb, number: int) -> bool:
    """Asks only where somebody can answer: a script is taken at its word."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return True
    return typer.confirm(f"{verb.name} {number:,} parked messages?")


async def _rehearse(client: Client, choice: _Choice, output: RowFormat) -> int:
    """Show what would be acted on. Those that are not there are errors."""
    if choice.every:
        _show_messages([message async for message in _listed(client, choice)], output, empty=_no_match(choice))
        return EXIT_OK
    found: list[DeadMessage] = []
    missing: list[DeadResult] = []
    for sequence in choice.sequences or ():
        try:
            content = await client.dead.get(sequence)
            found.append(DeadMessage(**{field.name: getattr(content, field.name) for field in fields(DeadMessage)}))
        except ToqueError as error:
            missing.append(DeadResult(sequence, error))
            say(f"toque: {error}")
    _show_messages(found, output, empty="none of them is parked")
    return exit_code_of(result.error for result in missing)


def _show_results(results: Sequence[DeadResult], verb: _Verb, output: RowFormat) -> None:
    """One line each; errors on stderr, where the results are lines for people."""
    for result in results:
        if output is RowFormat.NDJSON:
            show_line(_result(result))
        elif output is RowFormat.TABLE and result.error is None:
            print(f"{verb.done} {result.sequence}")
        elif output is RowFormat.TABLE:
            say(f"toque: {result.sequence} was not {verb.done}: {result.error}")


def _result(result: DeadResult) -> Mapping[str, Any]:
    error = result.error
    return {"sequence": result.sequence, "done": error is None, "error": type(error).__name__ if error else None,
            "message": str(error) if error else None}
