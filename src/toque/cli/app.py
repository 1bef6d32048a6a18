"""The table of commands of `toque`, made with typer. Each command lives in the module of its noun."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from typer import Argument, Option

from toque._cluster import PODS_MAX
from toque._dev_state import DEFAULT_DIRECTORY
from toque._durations import to_ms
from toque._logging import configure
from toque._nats_server import find_server
from toque.cli import accounts, chaos, dead, events, instances, reports, steering, trigger
from toque.cli.connection import alone, with_connection, without_connection
from toque.cli.dev import DevOptions, run_dev
from toque.cli.output import EXIT_INTERRUPTED, EXIT_OK, console
from toque.errors import SetupError, UsageError

PROGRAM: Final = "toque"
# typer has click inside, or beside it, by version; this is click's own root of wrong usage in either.
_CLICK_ERROR: Final[type[Exception]] = next(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

app = typer.Typer(
    name=PROGRAM, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Durable workflows on NATS JetStream. Start with `toque dev APP`, then `toque trigger WORKFLOW`.")
_instances = typer.Typer(rich_markup_mode=None, help="See instances, steer them, and send them events.")
_chaos = typer.Typer(rich_markup_mode=None, help="Break things on purpose, and judge what became of the promises.")
_stations = typer.Typer(rich_markup_mode=None, invoke_without_command=True)
_dead = typer.Typer(rich_markup_mode=None, help="Messages that could not be accepted: see why, retry or drop them.")
_accounts = typer.Typer(rich_markup_mode=None, help="Make and change accounts: tenants with limits of their own.")


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns its exit code. Raises ToqueError, also for wrong usage."""
    configure(level=logging.WARNING)
    if list(arguments) == ["--version"]:  # what everybody tries first
        return version()
    try:
        code = app(args=list(arguments) or ["--help"], prog_name=PROGRAM, standalone_mode=False)
    except typer.Abort:
        return EXIT_INTERRUPTED
    except _CLICK_ERROR as error:
        raise UsageError(_usage(error)) from error
    return code if isinstance(code, int) else EXIT_OK


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else PROGRAM
    message = str(getattr(error, "message", "") or error).rstrip(".")
    formatted = getattr(error, "format_message", lambda: message)().rstrip(".")
    return f"{formatted}; `{command} --help` shows the options"


# -- running -----------------------------------------------------------------------------------------------------------

@app.command()
def dev(
        app: Annotated[str, Argument(metavar="APP", help="module, module:Class, file.py or file.py:Class")],
        pods: Annotated[int, Option("--pods", metavar="N", min=1, max=PODS_MAX, help="worker processes")] = 2,
        port: Annotated[int | None, Option("--port", metavar="PORT", min=1, max=65535,
                                           help="of NATS [default: the last one, or a free one]")] = None,
        monitor_port: Annotated[int | None, Option("--monitor-port", metavar="PORT", min=1, max=65535,
                                                   help="of the server's HTTP monitor [default: as --port]")] = None,
        directory: Annotated[Path, Option("--dir", metavar="DIR", help="keeps everything")] = DEFAULT_DIRECTORY,
        clean: Annotated[bool, Option("--clean", help="delete what the directory holds first")] = False,
        reload: Annotated[bool, Option("--reload", help="restart the pods, one by one, when the code changes")] = False,
        ttl: Annotated[str, Option("--ttl", metavar="TIME", help="how long a silent pod keeps its work")] = "5s",
        account: Annotated[str, Option("--account", metavar="NAME", help="account to serve")] = "main") -> int:
    """Run APP on this machine: a NATS server and pods.

    All of it listens on loopback only, and every write is synced to the disk before it is acknowledged.
    Ctrl-C ends all in order, a second one at once; started again it goes on where it stopped.

    \b
    Examples:
      toque dev census.py
      toque dev census:Census --pods 4 --reload
      toque dev census.py --clean
    """
    options = DevOptions(app=app, pods=pods, port=port, monitor_port=monitor_port, directory=directory, clean=clean,
                         reload=reload, ttl_s=to_ms(ttl, what="--ttl") / 1000, account=account)
    return asyncio.run(run_dev(options))


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def worker() -> int:
    """Run one pod against any NATS server: `toque worker --help`."""
    raise AssertionError("toque.cli.main runs this command without typer")


@app.command()
def demo(
        directory: Annotated[Path | None, Option("--dir", metavar="DIR", help="where it makes a directory for itself "
                                                 "[default: that of temporary files]")] = None,
        pods: Annotated[int, Option("--pods", metavar="N", min=2, max=PODS_MAX, help="worker processes")] = 2,
        report: Annotated[Path, Option("--report", metavar="DIR", help="where the report goes")] = Path("demo-report"),
        seconds: Annotated[float, Option("--seconds", metavar="S", min=1, help="how long the work should last")] = 30.0,
        keep: Annotated[bool, Option("--keep", help="keep the directory afterwards")] = False) -> int:
    """Watch real work survive a killed pod.

    Takes a census of this machine's Python source, one instance per file, kills a pod half-way, and proves from a
    ledger of its own that nothing was lost or done twice.
    """
    from toque.demo.run import run_demo  # and all that the census needs

    place = directory or Path(tempfile.gettempdir())
    return asyncio.run(run_demo(directory=place, pods=pods, report=report, seconds=seconds, keep=keep,
                                console=console()))


@app.command()
def version() -> int:
    """Show the versions of Toque, Python and NATS."""
    print(f"toque {_own_version()}")
    print(f"python {sys.version.split()[0]}")
    try:
        server = find_server()
        print(f"nats-server {server.version} ({server.path})")
    except SetupError as error:
        print(f"nats-server: {error}")
    return EXIT_OK


def _own_version() -> str:
    try:
        return importlib.metadata.version("toque")
    except importlib.metadata.PackageNotFoundError:
        return "(run from its source, not installed)"


# -- the account -------------------------------------------------------------------------------------------------------

app.command("trigger")(with_connection(trigger.trigger))
app.add_typer(_instances, name="instances")
app.command("queues")(with_connection(reports.queues))
app.add_typer(_dead, name="dead")
app.add_typer(_stations, name="stations")
app.command("pods")(with_connection(reports.pods))
app.command("workflows")(with_connection(reports.workflows))
app.add_typer(_accounts, name="accounts")
app.add_typer(_chaos, name="chaos")

_instances.command("list")(with_connection(instances.list_instances))
_instances.command("count")(with_connection(instances.count))
_instances.command("describe")(with_connection(instances.describe))
_instances.command("watch")(with_connection(instances.watch))
_instances.command("pause")(with_connection(steering.pause))
_instances.command("resume")(with_connection(steering.resume))
_instances.command("restart")(with_connection(steering.restart))
_instances.command("terminate")(with_connection(steering.terminate))
_instances.command("delete")(with_connection(steering.delete))
_instances.command("send-event")(with_connection(events.send_event))
_instances.command("approve")(with_connection(events.approve))
_instances.command("reject")(with_connection(events.reject))

_dead.command("list")(with_connection(dead.list_dead))
_dead.command("show")(with_connection(dead.show))
_dead.command("retry")(with_connection(dead.retry))
_dead.command("drop")(with_connection(dead.drop))

_stations.callback()(alone(with_connection(reports.stations)))
_stations.command("describe")(with_connection(reports.describe_station))

_accounts.command("create")(with_connection(accounts.create, in_account=False))
_accounts.command("list")(with_connection(accounts.list_accounts, in_account=False))
_accounts.command("describe")(with_connection(accounts.describe, in_account=False))
_accounts.command("set")(with_connection(accounts.change, in_account=False))

_chaos.command("list")(without_connection(chaos.list_scenarios))
_chaos.command("run")(with_connection(chaos.run))
_chaos.command("soak")(without_connection(chaos.soak))
_chaos.command("ledger")(without_connection(chaos.keep_ledger))
