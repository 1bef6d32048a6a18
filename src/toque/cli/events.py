"""`toque instances send-event`, `approve` and `reject`."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from typer import Argument, Option

from toque._names import check_instance_id, check_workflow
from toque.cli.connection import Connection
from toque.cli.output import EXIT_OK
from toque.errors import UsageError

STDIN: Final = "-"
WorkflowArgument = Annotated[str, Argument(metavar="WORKFLOW", help="name of the workflow")]
IdArgument = Annotated[str, Argument(metavar="ID", help="id of the instance")]
NameArgument = Annotated[str, Argument(metavar="NAME", help="name of the step that waits for the approval")]
ByOption = Annotated[str | None, Option("--by", metavar="WHO", help="who decides [default: your login name]")]
CommentOption = Annotated[str, Option("--comment", metavar="TEXT", help="what to say about it")]


async def send_event(
        connection: Connection, workflow: WorkflowArgument, id: IdArgument,
        type: Annotated[str, Argument(metavar="TYPE", help="type of the event")],
        payload: Annotated[str | None, Argument(
            metavar="PAYLOAD", help="payload as JSON; @FILE reads a file, - standard input [default: null]")] = None,
        event_id: Annotated[str | None, Option(
            "--event-id", metavar="ID", help="of a call whose outcome is not known: the same event is kept once")] = None,
        ) -> int:
    """Send an event to an instance: `step.wait_for_event` gets it. It is recorded when this returns.

    Exit code 0 when it is the instance's, 1 when it has ended or there is none, 3 when that is not known.

    \b
    Examples:
      toque instances send-event orders a-1 paid '{"amount": 5}'
      toque instances send-event orders a-1 document @contract.json
    """
    check_workflow(workflow)
    check_instance_id(id)
    value = read_payload(payload)
    async with connection.client() as client:
        await client.handle(workflow, id).send_event(type, value, event_id=event_id)
    print(f"sent {type} to {workflow}/{id}")
    return EXIT_OK


def read_payload(text: str | None) -> Any:
    """The payload of the command line, decoded; None without any. Raises UsageError."""
    if text is None:
        return None
    what = "the payload"
    if text.startswith("@"):
        what = f"the payload in {text[1:]}"
        try:
            text = Path(text[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{what} cannot be read: {error}") from error
    elif text == STDIN:
        what = "the payload on standard input"
        text = sys.stdin.read()
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError as error:
        raise UsageError(f"{what} is no JSON ({error}); texts need double quotes, and the shell single quotes around "
                         """all of it: '{"amount": 5}'""") from error


async def approve(connection: Connection, workflow: WorkflowArgument, id: IdArgument, name: NameArgument,
                  by: ByOption = None, comment: CommentOption = "") -> int:
    """Approve what an instance waits for with `step.wait_for_approval(NAME)`.

    Example: toque instances approve orders a-1 refund --comment 'seen the receipt'
    """
    async with connection.client() as client:
        await client.handle(workflow, id).approve(name, by=by or getpass.getuser(), comment=comment)
    print(f"approved {name!r} of {workflow}/{id}")
    return EXIT_OK


async def reject(connection: Connection, workflow: WorkflowArgument, id: IdArgument, name: NameArgument,
                 by: ByOption = None, comment: CommentOption = "") -> int:
    """Reject what an instance waits for with `step.wait_for_approval(NAME)`.

    Example: toque instances reject orders a-1 refund --comment 'too much'
    """
    async with connection.client() as client:
        await client.handle(workflow, id).reject(name, by=by or getpass.getuser(), comment=comment)
    print(f"rejected {name!r} of {workflow}/{id}")
    return EXIT_OK
