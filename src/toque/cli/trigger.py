"""`toque trigger`: creates instances, and waits for them if asked to."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from typer import Argument, Option

from toque._durations import to_ms
from toque._names import check_instance_id, check_workflow
from toque.cli.connection import Connection
from toque.cli.instances import as_json
from toque.cli.output import EXIT_FAILED, EXIT_OK, Format, report_error, say, show_json
from toque.client import Client, Instance, NewInstance
from toque.errors import InstanceErrored, InstanceTerminated, ToqueError, UsageError
from toque.workflow import Retention

BATCH_MAX: Final = 20_000  # instances held in memory at once
COUNT_MAX: Final = 10_000_000
WAITING_MAX: Final = 200  # instances asked about at once

OutputOption = Annotated[Format, Option("--output", "-o", help="form of the result")]


async def trigger(
        connection: Connection, workflow: Annotated[str, Argument(metavar="WORKFLOW", help="name of the workflow")],
        params: Annotated[str | None, Argument(metavar="PARAMS", help="params as JSON [default: null]")] = None,
        id: Annotated[str | None, Option("--id", metavar="ID", help="id of the instance [default: a new one]")] = None,
        params_file: Annotated[Path | None, Option("--params-file", metavar="FILE", help="JSON file with the params; "
                                                   "- is standard input")] = None,
        wait: Annotated[bool, Option("--wait", help="wait for the end and print the output")] = False,
        count: Annotated[int, Option("--count", metavar="N", min=1, max=COUNT_MAX,
                                     help="create so many, with new ids")] = 1,
        keep_success: Annotated[str | None, Option(
            "--keep-success", metavar="TIME", help="keep it so long when it is complete [default: as its workflow says; "
            "with --keep-error 7 days]")] = None,
        keep_error: Annotated[str | None, Option(
            "--keep-error", metavar="TIME", help="keep it so long when it errored or was terminated [default: as its "
            "workflow says; with --keep-success 7 days]")] = None,
        output: OutputOption = Format.TABLE) -> int:
    """Create an instance of a workflow.

    Prints its id, or with --wait its output.
    Exit code 0 when it was created (with --wait: when it completed), 1 when not, 3 when that is not known.

    \b
    Examples:
      toque trigger census '{"path": "a.py"}' --wait
      toque trigger census --params-file job.json --id job-17
      toque trigger census '{"path": "a.py"}' --count 1000 --keep-success "1 hour"
    """
    check_workflow(workflow)
    value = read_params(params, params_file)
    if id is not None and count > 1:
        raise UsageError("--id names one instance: leave it out, or leave out --count")
    if id is not None:
        check_instance_id(id)
    new = NewInstance(value, id, _retention(keep_success, keep_error))
    async with connection.client() as client:
        if count > 1:
            return await _many(client, workflow, new, count, wait, output)
        return await _one(client, workflow, new, wait, output)


def _retention(success: str | None, error: str | None) -> Retention | None:
    """None when the options say nothing of it. Raises InvalidDuration, which names the option."""
    for text, option in ((success, "--keep-success"), (error, "--keep-error")):
        if text is not None:
            to_ms(text, what=option)
    given = {"success": success, "error": error}
    kept = {name: text for name, text in given.items() if text is not None}
    return Retention(**kept) if kept else None


def read_params(text: str | None, file: Path | None) -> Any:
    """The params of the command line, decoded; None without any. Raises UsageError."""
    if text is not None and file is not None:
        raise UsageError("give the params as an argument or with --params-file, not both")
    if file is not None:
        text = _content(file)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError as error:
        if file is not None:
            raise UsageError(f"the params in {file} are no JSON ({error})") from error
        raise UsageError(f"the params {text[:80]!r} are no JSON ({error}); texts need double quotes, and the shell "
                         """single quotes around all of it: '{"path": "a.py"}'""") from error


def _content(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the params file {file} cannot be read: {error}") from error


# -- one ---------------------------------------------------------------------------------------------------------------

async def _one(client: Client, workflow: str, new: NewInstance, wait: bool, output: Format) -> int:
    handle = await client.create(workflow, new.params, id=new.id, retention=new.retention)
    await _warn_unserved(client, workflow)
    if wait:
        say(f"created {handle}")
        return await _show_result(handle)
    if output is Format.JSON:
        show_json({"workflow": workflow, "id": handle.id})
    else:
        print(handle.id)
    return EXIT_OK


async def _show_result(handle: Instance[Any]) -> int:
    try:
        show_json(as_json(await handle.result()))
    except (InstanceErrored, InstanceTerminated) as error:
        say(f"toque: {handle} did not complete: {error}; `toque instances describe {handle.id} --workflow "
            f"{handle.workflow}` shows its steps")
        return EXIT_FAILED
    return EXIT_OK


async def _warn_unserved(client: Client, workflow: str) -> None:
    """Created, but nobody would run it: say so."""
    if not any(report.workflow == workflow and report.served for report in await client.workflows()):
        say(f"toque: no pod serves the workflow {workflow!r} just now; what is created stays queued until one does: "
            f"`toque worker APP --account {client.account}`")


# -- many --------------------------------------------------------------------------------------------------------------

async def _many(client: Client, workflow: str, new: NewInstance, count: int, wait: bool, output: Format) -> int:
    began = time.monotonic()
    ids: list[str] = []
    errors: list[ToqueError] = []
    for first in range(0, count, BATCH_MAX):
        batch = [new] * min(BATCH_MAX, count - first)
        for result in await client.create_batch(workflow, batch):
            if result.error is None:
                ids.append(result.id)
            else:
                errors.append(result.error)
        if errors:
            break  # a full queue or a lost server: the rest would end the same way
    took_s = time.monotonic() - began
    await _warn_unserved(client, workflow)
    say(f"created {len(ids):,} instances of {workflow} in {took_s:.2f} s ({len(ids) / took_s:,.0f}/s)")
    if errors:
        say(f"toque: {len(errors):,} of the last batch were not created, {count - len(ids) - len(errors):,} not tried")
        return report_error(errors[0])
    if wait:
        return await _wait_for_all([client.handle(workflow, instance_id) for instance_id in ids], output)
    if output is Format.JSON:
        show_json({"workflow": workflow, "ids": ids})
    else:
        print("\n".join(ids))
    return EXIT_OK


async def _wait_for_all(handles: Sequence[Instance[Any]], output: Format) -> int:
    places = asyncio.Semaphore(WAITING_MAX)

    async def end_of(handle: Instance[Any]) -> str:
        async with places:
            try:
                await handle.result()
            except InstanceErrored:
                return "errored"
            except InstanceTerminated:
                return "terminated"
        return "complete"

    ends = Counter(await asyncio.gather(*map(end_of, handles)))
    if output is Format.JSON:
        show_json(dict(ends))
    else:
        print(", ".join(f"{number:,} {end}" for end, number in sorted(ends.items())))
    return EXIT_OK if set(ends) == {"complete"} else EXIT_FAILED
