"""`toque queues`, `stations`, `pods` and `workflows`: what an account does just now."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from typer import Argument, Option

from toque._protocol import PodView, RestoredView, StationView
from toque._reports import StationReport
from toque.cli.connection import Connection
from toque.cli.output import (
    EXIT_OK,
    Format,
    age_text,
    bytes_text,
    say,
    show_fields,
    show_json,
    show_table,
    whole,
)
from toque.errors import UsageError

OutputOption = Annotated[Format, Option("--output", "-o", help="form of the report")]
NO_PODS: Final = ("no pods serve the account {account!r}; start one with `toque worker APP --account {account}`, or "
                  "`toque dev APP`")


async def pods(connection: Connection, output: OutputOption = Format.TABLE) -> int:
    """Show the pods: stations, slots, threads, loop lag now and at worst in the last minute, memory."""
    async with connection.client() as client:
        views = await client.pods()
    columns = ["pod", "stations", "slots", "in use", "threads", "loop lag", "worst lag", "memory", "journal", "workflows",
               "process"]
    rows = [[view.pod, len(view.stations), view.slots_leased, view.slots_in_use, _threads(view),
             f"{view.loop_lag_ms:.1f} ms", f"{view.loop_lag_worst_ms:.1f} ms", bytes_text(view.memory_bytes), view.journal,
             _with_versions(view.workflows), f"{view.host}:{view.pid}"] for view in views]
    code = _report([_with_time(view) for view in views], columns, rows, output,
                   empty=NO_PODS.format(account=connection.account),
                   numbers={"stations", "slots", "in use", "threads", "loop lag", "worst lag", "memory"})
    for remark in (remark for view in views for remark in pod_remarks(view)):
        say(remark)
    return code


def _threads(view: PodView) -> str:
    abandoned = f" ({view.threads_abandoned} abandoned)" if view.threads_abandoned else ""
    return f"{view.threads_in_use}{abandoned}"


def pod_remarks(view: PodView) -> Iterator[str]:
    """What is wrong with a pod's loop and threads, and what to do."""
    if view.loop_blocked_by:
        yield (f"the loop of {view.pod} was blocked for {view.loop_lag_worst_ms / 1000:.1f} s in the last minute by "
               f"{view.loop_blocked_by}; its log says what to do")
    if view.threads_abandoned and view.threads_abandoned >= view.threads_max:
        yield (f"all {view.threads_max} threads of {view.pod} are held by callbacks that timed out or were cut: no sync "
               f"callback can be entered there. Restart the pod; its log names the callbacks")


async def stations(connection: Connection, output: OutputOption = Format.TABLE) -> int:
    """Show the stations: owner, epoch, live instances."""
    async with connection.client() as client:
        reports = await client.stations()
    columns = ["station", "owner", "epoch", "live", "in memory", "last sequence", "note"]
    rows = [[report.station, report.pod or "-", *_station_figures(report.view), report.note] for report in reports]
    code = _report(reports, columns, rows, output, empty="the account has no stations yet; start a pod",
                   numbers={"epoch", "live", "in memory", "last sequence"})
    if reports and not any(report.pod for report in reports):
        say(NO_PODS.format(account=connection.account))
    return code


def _station_figures(view: StationView | None) -> list[object]:
    return ["", "", "", ""] if view is None else [view.epoch, view.instances, view.in_memory, view.sequence]


async def describe_station(connection: Connection,
                           station: Annotated[str, Argument(metavar="STATION", help="as `toque stations` lists it")],
                           output: OutputOption = Format.TABLE) -> int:
    """Show a station: owner, journal kept for it, snapshots, last restore.

    Example: toque stations describe 1.0
    """
    async with connection.client() as client:
        reports = {report.station: report for report in await client.stations()}
    report = reports.get(station)
    if report is None:
        raise UsageError(f"there is no station {station!r}; there are {', '.join(reports)}")
    if output is Format.JSON:
        show_json(whole(report))
    else:
        _show_station(report)
    return EXIT_OK


def _show_station(report: StationReport) -> None:
    view = report.view
    if view is None:
        show_fields({"station": report.station, "owner": "-", "note": report.note})
        return
    show_fields({
        "station": report.station, "owner": f"{view.pod} ({view.session})", "epoch": view.epoch, "group": view.group,
        "live": view.instances, "in memory": view.in_memory, "last sequence": view.sequence,
        "journal kept": f"{_groups_text(view.journal_groups)}, {bytes_text(view.journal_bytes)}",
        "restored": restored_text(view.restored), "snapshots": len(view.snapshots) or "none yet"})
    if view.snapshots:
        print()
        now_s = time.time()
        rows = [[snapshot.name, snapshot.group, snapshot.sequence, bytes_text(snapshot.size_bytes), snapshot.rows,
                 age_text(max(0.0, now_s - snapshot.taken_at / 1000))] for snapshot in reversed(view.snapshots)]
        show_table(["snapshot", "group", "sequence", "size", "rows", "age"], rows,
                   numbers={"group", "sequence", "size", "rows", "age"})


def restored_text(restored: RestoredView | None) -> str:
    if restored is None:
        return ""
    groups = _groups_text(restored.groups)
    sources = {"local": f"the pod's own disk and {groups} of the journal",
               "snapshot": f"snapshot {restored.snapshot} ({restored.rows:,} rows) and {groups} of the journal",
               "journal": f"the whole journal ({groups})"}
    return f"from {sources.get(restored.source, restored.source)}, in {restored.ms:,} ms"


def _groups_text(groups: int) -> str:
    return f"{groups:,} {'group' if groups == 1 else 'groups'}"


async def workflows(connection: Connection, output: OutputOption = Format.TABLE) -> int:
    """Show the workflows, and the pods that serve them.

    With the version that each pod has. A workflow that no pod serves keeps its queue until one does.
    """
    async with connection.client() as client:
        reports = await client.workflows()
    rows = [[report.workflow, _with_versions(report.pods) or "no pod serves it"] for report in reports]
    return _report(reports, ["workflow", "served by"], rows, output, empty=NO_PODS.format(account=connection.account))


async def queues(connection: Connection, output: OutputOption = Format.TABLE,
                 by_station: Annotated[bool, Option("--stations", help="one row per station: owner, committed "
                                                    "position, lag, instances")] = False) -> int:
    """Show the queue of each workflow.

    How many are queued, the age of the oldest, the limit, and how many messages are parked because they could not
    be accepted (`toque dead list` shows them and why); with --stations, how far each station's owner has got.
    """
    async with connection.client() as client:
        reports = await client.queues(count_stations=by_station)
        unserved = {report.workflow for report in await client.workflows() if not report.served}
    for report in reports:
        if report.queued and report.workflow in unserved:
            say(f"no pod serves the workflow {report.workflow!r}: what is queued waits until one does; start one with "
                f"`toque worker APP --account {connection.account}`")
    empty = NO_PODS.format(account=connection.account)
    if by_station:
        columns = ["workflow", "station", "owner", "queued", "committed", "lag", "prefetched", "instances"]
        rows: list[list[object]] = [
            [report.workflow, part.station, part.pod or "-", _known(part.queued), _known(part.committed),
             _known(part.lag), part.prefetched, _counts(part.counts)] for report in reports for part in report.stations]
        return _report(reports, columns, rows, output, empty=empty,
                       numbers={"queued", "committed", "lag", "prefetched"})
    columns = ["workflow", "queued", "oldest", "limit", "parked", "instances"]
    rows = [[report.workflow, f"{report.queued:,}", _age(report.oldest_age_s), f"{report.limit:,}", f"{report.parked:,}",
             _counts(_total(part.counts for part in report.stations))] for report in reports]
    if output is Format.TABLE and any(report.parked for report in reports):
        say("some messages are parked because they could not be accepted: `toque dead list` shows which and why")
    return _report(reports, columns, rows, output, empty=empty, numbers={"queued", "oldest", "limit", "parked"})


def _report(reports: Sequence[Any], columns: Sequence[str], rows: Sequence[Sequence[object]], output: Format, *,
            empty: str, numbers: AbstractSet[str] = frozenset()) -> int:
    if output is Format.JSON:
        show_json(whole(reports))
    elif not rows:
        say(empty)
    else:
        show_table(columns, rows, numbers=numbers)
    return EXIT_OK


def _with_time(view: PodView) -> dict[str, Any]:
    return {**whole(view), "started_at": datetime.fromtimestamp(view.started_at / 1000, UTC)}


def _with_versions(versions: Mapping[str, str]) -> str:
    """Of workflows or pods: "census 1, report 2"."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {status}" for status, number in counts.items() if number)


def _total(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _known(figure: int | None) -> str:
    return "?" if figure is None else str(figure)


def _age(seconds: float | None) -> str:
    return "" if seconds is None else age_text(seconds)
