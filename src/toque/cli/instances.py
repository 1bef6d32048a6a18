"""`toque instances list`, `count`, `describe` and `watch`: what is to be seen of instances."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import msgspec
from typer import Argument, Option

from toque import _payload
from toque._durations import to_ms
from toque._lists import ListFilters
from toque._protocol import DescribeView, ErrorView, InstanceView, StepView
from toque._watch import WatchEvent
from toque.cli.connection import Connection
from toque.cli.output import (
    EXIT_FAILED,
    EXIT_OK,
    Format,
    ListFormat,
    RowFormat,
    one_line,
    say,
    show_fields,
    show_json,
    show_line,
    show_table,
    time_text,
)
from toque.client import Client, Instance, InstanceStatus
from toque.errors import InstanceNotFound, UsageError

LIST_PAGE: Final = 500
TIME_HELP: Final = "as ISO 8601, or how long ago: 2026-01-31T12:00, \"2 hours\""
LATEST: Final = "latest"
AWAY_MAX: Final = "1 minute"  # how long `watch` outlasts owners that do not answer
TIME_FIELDS: Final = frozenset({"created_at", "admitted_at", "ended_at", "wake_at", "started_at", "due"})

OutputOption = Annotated[Format, Option("--output", "-o", help="form of the report")]
WorkflowOption = Annotated[str | None, Option("--workflow", "-w", metavar="NAME", help="only of this workflow")]
IdArgument = Annotated[str, Argument(metavar="ID", help=f"id of the instance, or `{LATEST}`")]


# -- list --------------------------------------------------------------------------------------------------------------

async def list_instances(
        connection: Connection, workflow: WorkflowOption = None,
        status: Annotated[list[str] | None, Option(
            "--status", metavar="STATUS", help="running, waiting, waitingForPause, paused, complete, errored or "
                                               "terminated; may be given several times")] = None,
        id_prefix: Annotated[str | None, Option("--id-prefix", metavar="TEXT", help="whose id begins so")] = None,
        created_after: Annotated[str | None, Option("--created-after", metavar="TIME", help=TIME_HELP)] = None,
        created_before: Annotated[str | None, Option("--created-before", metavar="TIME", help=TIME_HELP)] = None,
        ended_after: Annotated[str | None, Option("--ended-after", metavar="TIME", help=TIME_HELP)] = None,
        ended_before: Annotated[str | None, Option("--ended-before", metavar="TIME", help=TIME_HELP)] = None,
        oldest: Annotated[bool, Option("--oldest", help="the oldest first, instead of the newest")] = False,
        limit: Annotated[int, Option("--limit", metavar="N", min=1, help="show so many")] = 50,
        cursor: Annotated[str | None, Option("--cursor", metavar="TEXT", help="go on behind another list's end")] = None,
        output: Annotated[ListFormat, Option("--output", "-o", help="form of the list; `ids` is one id a line, for "
                                                                    "pipes")] = ListFormat.TABLE) -> int:
    """List instances, the newest first. Queued ones are not listed, only counted: `toque instances count`.

    Outputs and errors are not in the list: `toque instances describe ID` shows them.

    Example: toque instances list --workflow census --status errored --created-after "2 hours" -o ids
    """
    filters: ListFilters = {
        "status": status, "id_prefix": id_prefix, "created_after": _moment(created_after),
        "created_before": _moment(created_before), "ended_after": _moment(ended_after),
        "ended_before": _moment(ended_before), "order": "oldest" if oldest else None if cursor else "newest"}
    async with connection.client() as client:
        following = await _show_list(client, workflow, filters, limit, cursor, output)
    if following:
        say(f"there may be more: --limit shows more at once, --cursor {following} the next ones")
    return EXIT_OK


async def _show_list(client: Client, workflow: str | None, filters: ListFilters, limit: int, cursor: str | None,
                     output: ListFormat) -> str | None:
    """Shows the rows, page by page where the format allows it. Returns the cursor behind them."""
    rows: list[InstanceStatus] = []
    left = limit
    while left > 0:
        page = await client.list_page(workflow, cursor=cursor, limit=min(left, LIST_PAGE), **filters)
        left -= len(page.rows)
        cursor = page.cursor
        if output is ListFormat.IDS:
            for row in page.rows:
                print(row.id)
        elif output is ListFormat.NDJSON:
            for row in page.rows:
                show_line(_row(row))
        else:
            rows += page.rows
        if cursor is None:
            break
    if output in (ListFormat.JSON, ListFormat.TABLE):
        show_instances(rows, RowFormat(output), empty="no instances like that; create one with `toque trigger WORKFLOW "
                       "'{…}'`, or see `toque queues` for those that wait for a pod")
    return cursor


def _moment(text: str | None) -> datetime | None:
    """A time as ISO 8601, in the local zone unless it names one; or how long ago. Raises UsageError."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        return datetime.now(UTC) - timedelta(milliseconds=to_ms(text, what="the time"))


async def count(connection: Connection, workflow: WorkflowOption = None, output: OutputOption = Format.TABLE) -> int:
    """Count the instances of each workflow and status, the queued ones too.

    Example: toque instances count --workflow census
    """
    async with connection.client() as client:
        counts = await client.counts(workflow)
    if output is Format.JSON:
        show_json(counts)
    else:
        rows = [[name, status, f"{number:,}"] for name, by_status in counts.items()
                for status, number in by_status.items() if number]
        show_table(["workflow", "status", "instances"], rows, numbers={"instances"})
    return EXIT_OK


def show_instances(rows: Sequence[InstanceStatus], output: RowFormat, *, empty: str) -> None:
    """Print rows of a list; `empty` is said when there are none and people look."""
    if output is RowFormat.JSON:
        show_json([_row(row) for row in rows])
    elif output is RowFormat.NDJSON:
        for row in rows:
            show_line(_row(row))
    elif rows:
        show_table(["id", "workflow", "status", "created", "ended", "pod", "note"], [_cells(row) for row in rows])
    else:
        say(empty)


def _row(row: InstanceStatus) -> dict[str, Any]:
    """For JSON, without what lists do not carry: a null would say that there is none."""
    left_out = ("output", "progress", "error")
    return {field.name: getattr(row, field.name) for field in fields(row) if field.name not in left_out}


def _cells(row: InstanceStatus) -> list[object]:
    return [row.id, row.workflow, row.status, time_text(row.created_at), time_text(row.ended_at), row.pod, _note(row)]


def _note(row: InstanceStatus) -> str:
    held = f"blocked on {row.blocked_on}" if row.blocked_on else ""
    return "; ".join(note for note in (held, awaits_text(row.awaits), buffered_text(row.buffered)) if note)


def awaits_text(types: Sequence[str]) -> str:
    """The events that an instance waits for, for people."""
    names = ", ".join(repr(type_) for type_ in types)
    return f"waiting for event{'s' if len(types) > 1 else ''} {names}" if names else ""


def buffered_text(count: int) -> str:
    """The events that came and that no wait has taken, for people."""
    return f"{count:,} event{'s' if count > 1 else ''} buffered" if count else ""


# -- which one ---------------------------------------------------------------------------------------------------------

async def find_instance(client: Client, instance_id: str, workflow: str | None,
                        workflows: Sequence[str] | None = None) -> Instance[Any]:
    """The instance that an ID on the command line means; without a workflow all of the account (`workflows`) are asked.

    Raises InstanceNotFound, UsageError (two workflows have one of this id), OwnerAway.
    """
    if instance_id == LATEST:
        newest = (await client.list_page(workflow, order="newest", limit=1)).rows
        if not newest:
            raise InstanceNotFound("there are no instances yet; create one with `toque trigger WORKFLOW '{…}'`")
        return client.handle(newest[0].workflow, newest[0].id)
    if workflow is not None:
        return await client.get(workflow, instance_id)
    found = [handle async for handle in _everywhere(client, instance_id, workflows)]
    if not found:
        raise InstanceNotFound(f"no workflow of the account {client.account!r} has an instance {instance_id!r}")
    if len(found) > 1:
        raise UsageError(f"the workflows {', '.join(handle.workflow for handle in found)} have an instance "
                         f"{instance_id!r} each: name one with --workflow")
    return found[0]


async def _everywhere(client: Client, instance_id: str,
                      workflows: Sequence[str] | None) -> AsyncIterator[Instance[Any]]:
    for workflow in [report.workflow for report in await client.workflows()] if workflows is None else workflows:
        try:
            yield await client.get(workflow, instance_id)
        except InstanceNotFound:
            continue


# -- describe ----------------------------------------------------------------------------------------------------------

async def describe(connection: Connection, id: IdArgument, workflow: WorkflowOption = None,
                   output: OutputOption = Format.TABLE) -> int:
    """Show an instance: status, params, steps as recorded, output or error.

    Example: toque instances describe latest --workflow census
    """
    async with connection.client() as client:
        view = await (await find_instance(client, id, workflow)).describe()
    if output is Format.JSON:
        show_json(_plain(view))
    else:
        _show(view)
    return EXIT_OK


def _plain(view: DescribeView) -> dict[str, Any]:
    """The description with its payloads decoded and its times readable, for JSON."""
    return {**_fields(view.instance), "interruptions": view.interruptions, "params": _decoded(view.params),
            "steps": [_fields(step) for step in view.steps]}


def _fields(view: InstanceView | StepView) -> dict[str, Any]:
    fields = msgspec.structs.asdict(view)
    times = {name: _time(fields[name]) for name in TIME_FIELDS & fields.keys()}
    payloads = {name: _decoded(value) for name, value in fields.items() if isinstance(value, msgspec.Raw)}
    return {**fields, **times, **payloads}


def _decoded(raw: msgspec.Raw) -> Any:
    data = bytes(raw)
    return msgspec.json.decode(_payload.to_json(data)) if data else None


def as_json(value: Any) -> Any:
    """A decoded payload as JSON would hold it: bytes as base64 text, keys as text."""
    return msgspec.json.decode(_payload.to_json(_payload.encode(value, what="the payload")))


def _time(ms: int) -> datetime | None:
    return datetime.fromtimestamp(ms / 1000, UTC) if ms else None


def _show(view: DescribeView) -> None:
    instance = view.instance
    show_fields({
        "instance": f"{instance.workflow}/{instance.id}", "parent": instance.parent, "status": instance.status,
        "blocked on": instance.blocked_on, "waits": awaits_text(instance.awaits).removeprefix("waiting "),
        "events": buffered_text(instance.buffered), "created": time_text(_time(instance.created_at)),
        "admitted": time_text(_time(instance.admitted_at)), "wakes": time_text(_time(instance.wake_at)),
        "ended": time_text(_time(instance.ended_at)), "station": instance.station, "pod": instance.pod,
        "interruptions": view.interruptions or "", "params": _payload_text(view.params),
        "output": _payload_text(instance.output), "error": _error_text(instance.error),
        "traceback": instance.error.traceback.rstrip() if instance.error else ""})
    if view.steps:
        print()
        rows = [[step.kind, step_name(step), step.status, step.attempts or "", time_text(_time(step.started_at)),
                 _took(step), _step_note(step)] for step in view.steps]
        show_table(["kind", "step", "status", "attempts", "started", "took", "output or error"], rows,
                   numbers={"attempts", "took"})


def step_name(step: StepView) -> str:
    """Name, and which of that name it is when it is not the first."""
    return step.name if step.occurrence == 1 else f"{step.name} ({step.occurrence})"


def _payload_text(raw: msgspec.Raw) -> str:
    data = bytes(raw)
    return _payload.to_json(data).decode() if data else ""


def _took(step: StepView) -> str:
    done = step.started_at and step.ended_at
    return f"{step.ended_at - step.started_at:,} ms" if done else ""


def _step_note(step: StepView) -> str:
    if step.error is not None:
        return _error_text(step.error)
    if step.child and not step.ended_at:
        return step.child
    if not step.due or step.ended_at:
        return _payload_text(step.output)
    event = f"for event {step.event!r}, " if step.event else ""
    return f"{event}due {time_text(_time(step.due))}"


def _error_text(error: ErrorView | None) -> str:
    if error is None:
        return ""
    return f"{error.type}: {error.message}" if error.message else error.type


# -- watch -------------------------------------------------------------------------------------------------------------

async def watch(connection: Connection, id: IdArgument, workflow: WorkflowOption = None,
                output: OutputOption = Format.TABLE) -> int:
    """Follow an instance to its end, showing its events as they are recorded: those that are kept first.

    Exit code 0 when it completed, 1 when it errored or was terminated. With -o json only its end is shown.

    Example: toque instances watch latest
    """
    async with connection.client() as client:
        handle = await find_instance(client, id, workflow)
        wanted = ["workflow_completed"] if output is Format.JSON else None
        async for event in handle.watch(filter=wanted, timeout=AWAY_MAX):
            if output is not Format.JSON:
                print(event_line(event), flush=True)
        view = await handle.describe()
    if output is Format.JSON:
        show_json(_plain(view))
    return EXIT_OK if view.instance.status == "complete" else EXIT_FAILED


def event_line(event: WatchEvent) -> str:
    """An event for people: when, what, of which step, and what it brought."""
    step = f"{event.step} ({event.count})" if event.count > 1 else event.step
    shown = event.value is not None or event.type == "workflow_completed"
    value = _payload.to_json(_payload.encode(event.value, what="the value")).decode() if shown else ""
    parts = [time_text(event.at), event.type, step, f"attempt {event.attempt}" if event.attempt else "",
             event.event_type, _after(event), event.reason, _error_text(event.error), value]
    return "  ".join(one_line(part) for part in parts if part)


def _after(event: WatchEvent) -> str:
    if event.retry_delay_ms is not None:
        return f"again in {event.retry_delay_ms:,} ms"
    return f"for {event.duration_ms:,} ms" if event.duration_ms else ""
