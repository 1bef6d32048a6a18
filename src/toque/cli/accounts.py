"""`toque accounts`: make, list, show and change accounts."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument, Option

from toque._durations import format_ms, to_ms
from toque._protocol import AccountRecord
from toque.cli.connection import Connection
from toque.cli.output import EXIT_OK, Format, say, show_fields, show_json, show_table, whole
from toque.errors import UsageError

OutputOption = Annotated[Format, Option("--output", "-o", help="form of the report")]
NameArgument = Annotated[str, Argument(metavar="NAME", help="name of the account")]
MaxConcurrent = Annotated[int | None, Option("--max-concurrent", metavar="N", help="instances running at once")]
StartRate = Annotated[float | None, Option("--start-rate", metavar="N", help="instances started per second; 0: any "
                                            "(kept, not enforced yet)")]
QueueLimit = Annotated[int | None, Option("--queue-limit", metavar="N", help="instances queued, per workflow")]
Stations = Annotated[int | None, Option("--stations", metavar="N", help="stations: the most pods that share the work; "
                                        "fixed once the account is made")]
Ttl = Annotated[str | None, Option("--ttl", metavar="TIME", help='how long a silent pod keeps its work, e.g. "10s"')]
Tombstones = Annotated[str | None, Option("--tombstones", metavar="TIME", help="how long the id of a deleted instance is "
                                          'remembered, so that a late attempt of its creation makes nothing')]
Replicas = Annotated[int | None, Option("--replicas", metavar="N", help="copies of the streams in a NATS cluster")]


async def create(connection: Connection, name: NameArgument, max_concurrent: MaxConcurrent = None,
                 start_rate: StartRate = None, queue_limit: QueueLimit = None, stations: Stations = None,
                 ttl: Ttl = None, replicas: Replicas = None, tombstones: Tombstones = None,
                 output: OutputOption = Format.TABLE) -> int:
    """Make an account: its streams and its limits. Harmless when it is there already with the same settings.

    Example: toque accounts create shop --max-concurrent 2000 --ttl 10s
    """
    settings = _settings(max_concurrent, start_rate, queue_limit, stations, ttl, replicas, tombstones)
    async with connection.client() as client:
        _show(await client.accounts.create(name, **settings), output)
    return EXIT_OK


async def list_accounts(connection: Connection, output: OutputOption = Format.TABLE) -> int:
    """List the accounts on the server."""
    async with connection.client() as client:
        accounts = await client.accounts.list()
    if output is Format.JSON:
        show_json(whole(accounts))
    elif not accounts:
        say("no accounts on this server; make one with `toque accounts create NAME`, or start a pod: "
            "`toque worker APP`")
    else:
        rows = [[account.name, *_values(account).values()] for account in accounts]
        show_table(["account", *_values(accounts[0])], rows)
    return EXIT_OK


async def describe(connection: Connection, name: NameArgument, output: OutputOption = Format.TABLE) -> int:
    """Show the settings of an account."""
    async with connection.client() as client:
        _show(await client.accounts.describe(name), output)
    return EXIT_OK


async def change(connection: Connection, name: NameArgument, max_concurrent: MaxConcurrent = None,
                 start_rate: StartRate = None, queue_limit: QueueLimit = None, stations: Stations = None,
                 ttl: Ttl = None, replicas: Replicas = None, tombstones: Tombstones = None,
                 output: OutputOption = Format.TABLE) -> int:
    """Change settings of an account; what is not named stays. Running instances are never cut.

    Example: toque accounts set main --max-concurrent 500
    """
    settings = _settings(max_concurrent, start_rate, queue_limit, stations, ttl, replicas, tombstones)
    if not settings:
        raise UsageError("name a setting to change; `toque accounts set --help` lists them")
    async with connection.client() as client:
        _show(await client.accounts.set(name, **settings), output)
    return EXIT_OK


def _settings(max_concurrent: int | None, start_rate: float | None, queue_limit: int | None, stations: int | None,
              ttl: str | None, replicas: int | None, tombstones: str | None) -> dict[str, Any]:
    """Only those that were given."""
    given = {"max_concurrent": max_concurrent, "start_rate": start_rate, "queue_limit": queue_limit,
             "stations": stations, "ttl_s": None if ttl is None else to_ms(ttl, what="--ttl") / 1000,
             "replicas": replicas,
             "tombstones_s": None if tombstones is None else to_ms(tombstones, what="--tombstones") / 1000}
    return {name: value for name, value in given.items() if value is not None}


def _values(account: AccountRecord) -> dict[str, str]:
    return {
        "max concurrent": f"{account.max_concurrent:,}",
        "start rate": f"{account.start_rate:g}/s" if account.start_rate else "unlimited",
        "queue limit": f"{account.queue_limit:,}",
        "stations": str(account.stations),
        "ttl": format_ms(round(account.ttl_s * 1000)),
        "replicas": str(account.replicas),
        "tombstones": format_ms(round(account.tombstones_s * 1000)),
    }


def _show(account: AccountRecord, output: Format) -> None:
    if output is Format.JSON:
        show_json(whole(account))
    else:
        show_fields({"account": account.name, **_values(account)})
