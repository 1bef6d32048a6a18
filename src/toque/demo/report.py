"""The census's page: one self-contained HTML file, light and dark, from a Summary and the Facts of the run.

And the same in short for a terminal (`lines`). Pure functions: text in, text out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import msgspec

from toque.demo.measure import COMPLEXITY_BINS
from toque.demo.plots import Bar, Mark, Series, bars, legend, shortened, stacked_columns
from toque.demo.summary import FileRow, Summary

MODULES_SHOWN = 16
ERRORS_SHOWN = 12
SERIES_COLOURS = ("c1", "c2", "c3", "c4")


class VerdictRow(msgspec.Struct, frozen=True):
    """A verdict of the proof, as shown."""

    id: str
    promise: str
    holds: bool
    checked: int
    broken: int = 0
    note: str = ""


class KillFacts(msgspec.Struct, frozen=True):
    """What the kill did. Times in seconds after the kill, but `at_s`: after the first callback."""

    pod: str
    pid: int
    at_s: float
    stations: int = 0
    cut: int = 0  # attempts that were inside
    moved_s: float = 0.0  # all its stations had another owner
    waiting: int = 0  # instances that went on in another process
    first_s: float = 0.0
    p50_s: float = 0.0
    max_s: float = 0.0


class PodTimeline(msgspec.Struct, frozen=True):
    """How many instances a pod brought to their end, per second of the run."""

    pod: str
    per_second: tuple[int, ...]


class Facts(msgspec.Struct, frozen=True):
    """What is to be said of the run itself."""

    python: str
    machine: str
    started: str
    seconds: float
    pods: int
    slots: int
    instances: int
    steps: int
    found: int
    too_big: tuple[tuple[str, int], ...] = ()
    timeline: tuple[PodTimeline, ...] = ()
    kill: KillFacts | None = None
    verdicts: tuple[VerdictRow, ...] = ()


def page(summary: Summary, facts: Facts) -> str:
    """The whole page."""
    sections = (_header(summary, facts), _tiles(summary, facts), _run(facts), _proof(facts), _complexity(summary),
                _modules(summary), _files(summary), _left_out(summary, facts), _footer(facts))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>Toque: census of Python source</title>'
            f"<style>{_STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n")


def lines(summary: Summary) -> list[str]:
    """The report in a few lines of text."""
    hardest = summary.hardest[0] if summary.hardest else None
    biggest = summary.biggest[0] if summary.biggest else None
    out = [f"{summary.files:,} files, {summary.lines:,} lines ({summary.code_lines:,} code, {summary.comment_lines:,} "
           f"comment), {summary.functions:,} functions, {summary.classes:,} classes",
           "most imported: " + _counted(summary.stdlib, 6)]
    if summary.installed:
        out.append("installed: " + _counted(summary.installed, 6))
    if biggest is not None:
        out.append(f"longest file: {biggest.path} ({biggest.lines:,} lines)")
    if hardest is not None:
        out.append(f"most complex function: {hardest.hardest} in {hardest.path} ({hardest.hardest_complexity})")
    return out


# -- sections ----------------------------------------------------------------------------------------------------------

def _header(summary: Summary, facts: Facts) -> str:
    return (f"<header><h1>Census of the Python source on this machine</h1><p>{summary.files:,} files, each one durable "
            f"instance of four steps, on {facts.pods} pods{' with one killed half-way' if facts.kill else ''}. "
            f"Python {escape(facts.python)}, {escape(facts.machine)}, {escape(facts.started)}.</p></header>")


def _tiles(summary: Summary, facts: Facts) -> str:
    figures = [("files", f"{summary.files:,}"), ("lines", f"{summary.lines:,}"),
               ("functions", f"{summary.functions:,}"), ("classes", f"{summary.classes:,}"),
               ("source", f"{summary.bytes / 1e6:.1f} MB"), ("seconds", f"{facts.seconds:.1f}"),
               ("steps/s", f"{facts.steps / facts.seconds if facts.seconds else 0:,.0f}")]
    return '<div class="tiles">' + "".join(
        f"<div><b>{value}</b><span>{name}</span></div>" for name, value in figures) + "</div>"


def _run(facts: Facts) -> str:
    length = max((len(pod.per_second) for pod in facts.timeline), default=0)
    series = [Series(pod.pod, colour, [*pod.per_second, *[0] * (length - len(pod.per_second))])
              for pod, colour in zip(facts.timeline, SERIES_COLOURS, strict=False)]
    marks = [Mark(facts.kill.at_s, f"{facts.kill.pod} killed")] if facts.kill else []
    plot = stacked_columns(series, [f"{second} s" for second in range(length)], unit="instances", marks=marks)
    return _section("Instances completed per second", legend([(layer.colour, layer.name) for layer in series]) + plot
                    + _kill_text(facts.kill))


def _kill_text(kill: KillFacts | None) -> str:
    if kill is None:
        return ""
    return (f"<p>{escape(kill.pod)} (process {kill.pid}) was killed with SIGKILL {kill.at_s:.1f} s after the first "
            f"callback. It owned {kill.stations} stations and had {kill.cut} callbacks inside. Its stations had new "
            f"owners {kill.moved_s:.2f} s later. {kill.waiting} of its instances went on in another process: the first "
            f"{kill.first_s:.2f} s after the kill, half of them within {kill.p50_s:.2f} s, the last after "
            f"{kill.max_s:.2f} s.</p>")


def _proof(facts: Facts) -> str:
    rows = [(_mark(verdict), f"<b>{escape(verdict.id)}</b> {escape(verdict.promise)}", f"{verdict.checked:,}",
             f"{verdict.broken:,}", escape(verdict.note)) for verdict in facts.verdicts]
    intro = ("<p>Judged from the ledger, a process of its own to which every callback reported that it was entered and "
             "left, and from the client's own log; not from Toque's records.</p>")
    table = _table(("", "promise", "checked", "broken", ""), rows)
    return _section("What was promised, and whether it held", intro + table)


def _mark(verdict: VerdictRow) -> str:
    if verdict.holds:
        return '<span class="good">✓ holds</span>'
    return f'<span class="bad">✗ {"broken" if verdict.broken else "not seen"}</span>'


def _complexity(summary: Summary) -> str:
    highs = [low - 1 for low in COMPLEXITY_BINS[1:]]
    labels = [str(low) if low == high else f"{low}–{high}" for low, high in zip(COMPLEXITY_BINS, highs, strict=False)]
    labels.append(f"{COMPLEXITY_BINS[-1]}+")
    plot = stacked_columns([Series("", "c1", summary.bins)], labels, unit="functions")
    mean = summary.complexity / summary.functions if summary.functions else 0
    return _section("Functions by cyclomatic complexity", plot + f"<p>{mean:.2f} on average: one path, and one more "
                    "for each branch.</p>")


def _modules(summary: Summary) -> str:
    counted = [(count, name, "c1") for name, count in summary.stdlib.items()]
    counted += [(count, name, "c2") for name, count in summary.installed.items()]
    top = sorted(counted, key=lambda row: (-row[0], row[1]))[:MODULES_SHOWN]
    plot = bars([Bar(name, count, colour, f"{name}: imported by {count:,} files") for count, name, colour in top])
    missing = _counted(summary.missing, MODULES_SHOWN)
    text = f"<p>Imported and not installed for the Python that ran the demo: {escape(missing)}.</p>" if missing else ""
    return _section("Most imported modules", legend([("c1", "standard library"), ("c2", "installed")]) + plot
                    + f"<p>{summary.relative_imports:,} imports are relative.</p>" + text)


def _files(summary: Summary) -> str:
    biggest = _table(("file", "lines", "KB"), [(_path(row), f"{row.lines:,}", f"{row.size / 1000:,.0f}")
                                                for row in summary.biggest])
    hardest = _table(("function", "file", "complexity"), [
        (f"<code>{escape(row.hardest)}</code>", _path(row), f"{row.hardest_complexity:,}") for row in summary.hardest])
    return _section("Longest files", biggest) + _section("Most complex functions", hardest)


def _left_out(summary: Summary, facts: Facts) -> str:
    items = [f"{_code(path)} ({size / 1000:,.0f} KB)" for path, size in facts.too_big]
    text = f"<p>{facts.found:,} files were found; {facts.instances:,} of them were chosen, spread over all folders.</p>"
    if items:
        text += f"<p>Left out, because they are too big for the demo: {_some(items)}.</p>"
    if summary.errors:
        errors = [f"{_code(path)} <small>{escape(reason[:90])}</small>" for path, reason in summary.errors]
        some = _some(errors, summary.error_count)
        text += f"<p>{summary.error_count} files are no source for this Python: {some}.</p>"
    return _section("What is not in it", text)


def _footer(facts: Facts) -> str:
    return (f"<footer><p>Gathered by an instance of the workflow <code>report</code>. {facts.slots} slots, "
            f"{facts.steps:,} steps, every checkpoint synced to disk.</p></footer>")


# -- parts -------------------------------------------------------------------------------------------------------------

def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{escape(title)}</th>" for title in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _counted(counts: dict[str, int], shown: int) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:shown])


def _path(row: FileRow) -> str:
    return _code(row.path)


def _code(path: str) -> str:
    return f'<code title="{escape(path)}">{escape(shortened(path, 64))}</code>'


def _some(items: Sequence[str], total: int | None = None) -> str:
    rest = (total or len(items)) - ERRORS_SHOWN
    return ", ".join(items[:ERRORS_SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbf9;--card:#fff;--ink:#1c1c1a;--soft:#5d5d58;--line:#e4e3de;--grid:#ecebe6;
--c1:#2f6fd0;--c2:#e07b39;--c3:#2a9d7c;--c4:#8a5cc2;--good:#1d7a3d;--bad:#c0322b}
@media(prefers-color-scheme:dark){:root{--bg:#161615;--card:#1f1f1d;--ink:#f0efea;--soft:#a8a79f;--line:#353530;
--grid:#2b2b27;--c1:#5b93ea;--c2:#e08a4f;--c3:#3fb392;--c4:#a582d8;--good:#5cc481;--bad:#f0766d}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:940px;margin:0 auto;padding:40px 20px 60px}h1{font-size:30px;line-height:1.2;margin:0 0 8px}
h2{font-size:18px;margin:0 0 12px}p{margin:10px 0 0;color:var(--soft);overflow-wrap:anywhere}header p{margin:0}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px;margin-top:18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(108px,1fr));gap:10px;margin-top:22px}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tiles b{display:block;font-size:20px;white-space:nowrap;font-weight:600;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft)}
svg{display:block;width:100%;min-width:600px;height:auto;
font:12px system-ui,sans-serif}.key{display:inline;width:10px;min-width:0;height:10px;
margin-right:6px}.legend{display:flex;gap:18px;margin:0 0 8px}.c1{fill:var(--c1)}.c2{fill:var(--c2)}.c3{fill:var(--c3)}
.c4{fill:var(--c4)}.grid{stroke:var(--grid)}.axis{stroke:var(--line)}.tick,.value{fill:var(--soft)}
.label{fill:var(--ink)}
.mark{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:4 3}.marktext{fill:var(--bad);font-weight:600}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--soft);font-weight:500}th,td{padding:6px 10px 6px 0;border-bottom:1px solid var(--line);
vertical-align:top}tr:last-child td{border-bottom:0}td{font-variant-numeric:tabular-nums}code{font-size:13px}
.good{color:var(--good);font-weight:600;white-space:nowrap}.bad{color:var(--bad);font-weight:600;white-space:nowrap}
footer p{font-size:14px;margin-top:22px}
"""
