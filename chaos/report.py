"""The page of a run: one self-contained HTML file, light and dark, from an Outcome. Pure functions."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape

from toque.chaos.history import OK
from toque.chaos.owner_checks import Sighting
from toque.chaos.pairing import Ledgered
from toque.chaos.scenario import Outcome
from toque.chaos.timeline import Band, Picture, Tenure, colour_of, draw
from toque.chaos.verdicts import Verdict

IN_USE_STEP_NS = 250_000_000
RECOVERY = ("R5", "R5g", "R5b")  # ids of the verdicts that are figures of recovery


def page(outcome: Outcome) -> str:
    """The whole page."""
    title = f"{outcome.scenario.name}, seed {outcome.options.seed}"
    sections = (_header(outcome), _timeline(picture_of(outcome)), _verdicts(outcome), _counts(outcome), _faults(outcome))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>Toque chaos: {escape(title)}</title>'
            f"<style>{_STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n")


# -- the picture -------------------------------------------------------------------------------------------------------

def picture_of(outcome: Outcome) -> Picture:
    """What the timeline shows; times are seconds since the run began."""
    ledger, began_ns = outcome.judgement.ledger, outcome.began_ns
    last_ns = max([visit.left_ns for visit in ledger.visits] + [out.ended_ns for out in outcome.injected] + [began_ns])
    faults = [Band((out.begun_ns - began_ns) / 1e9, (out.ended_ns - began_ns) / 1e9,
                   f"{out.fault.number + 1}: {out.fault}{f' → {out.pod}' if out.pod else ''}")
              for out in outcome.injected]
    return Picture((last_ns - began_ns) / 1e9, faults, _per_second(ledger, began_ns, last_ns),
                   in_use(ledger, began_ns, last_ns), outcome.load.limit, tenures(outcome.evidence.sightings, began_ns))


def _per_second(ledger: Ledgered, began_ns: int, last_ns: int) -> list[int]:
    counts = Counter((visit.left_ns - began_ns) // 10**9 for visit in ledger.visits if visit.outcome == OK)
    return [counts[second] for second in range((last_ns - began_ns) // 10**9 + 1)]


def in_use(ledger: Ledgered, began_ns: int, last_ns: int) -> list[tuple[float, int]]:
    """The most instances inside callbacks in each quarter of a second."""
    edges = sorted(itertools.chain.from_iterable(
        ((visit.entered_ns, 1), (visit.left_ns or last_ns, -1)) for visit in ledger.visits))
    out: list[tuple[float, int]] = []
    inside, place = 0, 0
    for start_ns in range(began_ns, last_ns, IN_USE_STEP_NS):
        most = inside
        while place < len(edges) and edges[place][0] < start_ns + IN_USE_STEP_NS:
            inside += edges[place][1]
            place += 1
            most = max(most, inside)
        out.append(((start_ns - began_ns) / 1e9, most))
    return out


def tenures(sightings: Iterable[Sighting], began_ns: int) -> list[Tenure]:
    """Sightings of one pod and epoch in a row, put together."""
    by_station: dict[str, list[Sighting]] = defaultdict(list)
    for sighting in sightings:
        by_station[sighting.station].append(sighting)
    out: list[Tenure] = []
    for station, seen in sorted(by_station.items()):
        in_order = sorted(seen, key=lambda sighting: sighting.answered_ns)
        for (pod, epoch), group in itertools.groupby(in_order, key=lambda sighting: (sighting.pod, sighting.epoch)):
            times = [(sighting.answered_ns - began_ns) / 1e9 for sighting in group]
            out.append(Tenure(station, pod, epoch, times[0], times[-1]))
    return out


# -- sections ----------------------------------------------------------------------------------------------------------

def _header(outcome: Outcome) -> str:
    word = outcome.word
    command = outcome.options.command
    again = f"<p>Again: <code>{escape(command)}</code></p>" if command else ""
    void = "".join(f"<p>{escape(reason)}</p>" for reason in outcome.judgement.void)
    return (f'<header><h1>{escape(outcome.scenario.name)} <span class="{"good" if outcome.holds else "bad"}">{word}'
            f"</span></h1><p>{escape(outcome.scenario.does)}. Seed {outcome.options.seed}, TTL {outcome.ttl_s:g} s, "
            f"{len(outcome.injected)} faults, {len(outcome.evidence.expected):,} instances, {outcome.lasted_s:.0f} s."
            f"</p>{again}{void}</header>")


def _timeline(picture: Picture) -> str:
    keys = "".join(f'<span><svg class="key" viewBox="0 0 10 10"><rect class="{colour_of(pod, picture.pods)}" width="10" '
                   f'height="10" rx="2"/></svg>{escape(pod)}</span>' for pod in picture.pods)
    legend = ('<p class="legend"><span><svg class="key" viewBox="0 0 10 10"><rect class="fault" width="10" height="10" '
              f'rx="2"/></svg>fault</span>{keys}</p>')
    note = ("<p>Slots in use are instances inside callbacks, as the ledger saw them. A gap in an owner's row is a time in "
            "which nobody answered for the station.</p>")
    return _section("What happened", legend + draw(picture) + note)


def _verdicts(outcome: Outcome) -> str:
    verdicts = outcome.judgement.verdicts
    figures = [verdict for verdict in verdicts if verdict.id in RECOVERY]
    recovery = _section("How long it took", _table(("", "bound", "measured"), [
        (_mark(verdict), escape(verdict.promise), escape(verdict.note)) for verdict in figures])) if figures else ""
    rows = [(_mark(verdict), f"<b>{escape(verdict.id)}</b> {escape(verdict.promise)}", f"{verdict.checked:,}",
             f"{verdict.broken:,}", escape(verdict.note)) for verdict in verdicts]
    intro = ("<p>Judged from the ledger, a process of its own to which every callback reported that it was entered and "
             "left, from the client's own log, and from what the pods answered.</p>")
    return _section("What was promised, and whether it held",
                    intro + _table(("", "promise", "checked", "broken", ""), rows) + _violations(verdicts)) + recovery


def _violations(verdicts: Sequence[Verdict]) -> str:
    found = [f"<li><b>{escape(verdict.id)}</b> {escape(text)}</li>" for verdict in verdicts for text in verdict.violations]
    return f"<ul>{''.join(found)}</ul>" if found else ""


def _counts(outcome: Outcome) -> str:
    items = "".join(f"<li>{escape(count)}</li>" for count in outcome.judgement.counts)
    return _section("What it rests on", f"<ul>{items}</ul>")


def _faults(outcome: Outcome) -> str:
    rows = [(str(out.fault.number + 1), f"{(out.begun_ns - outcome.began_ns) / 1e9:.1f} s", escape(str(out.fault)),
             escape(f"{out.pod} ({out.pid})" if out.pod else f"nats-server ({out.pid})"), f"{out.lasted_s:.2f} s",
             escape(" ".join(out.stations))) for out in outcome.injected]
    return _section("The faults", _table(("", "at", "fault", "hit", "lasted", "stations"), rows))


def _mark(verdict: Verdict) -> str:
    if verdict.holds:
        return '<span class="good">✓ holds</span>'
    return f'<span class="bad">✗ {verdict.word.lower()}</span>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{escape(title)}</th>" for title in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbf9;--card:#fff;--ink:#1c1c1a;--soft:#5d5d58;--line:#e4e3de;--grid:#ecebe6;
--good:#1d7a3d;--bad:#c0322b;--work:#7f8ea3;--use:#2f6fd0;
--p0:#2f6fd0;--p1:#e07b39;--p2:#2a9d7c;--p3:#8a5cc2;--p4:#b8952a;--p5:#c2588f}
@media(prefers-color-scheme:dark){:root{--bg:#161615;--card:#1f1f1d;--ink:#f0efea;--soft:#a8a79f;--line:#353530;
--grid:#2b2b27;--good:#5cc481;--bad:#f0766d;--work:#8494aa;--use:#5b93ea;
--p0:#5b93ea;--p1:#e08a4f;--p2:#3fb392;--p3:#a582d8;--p4:#cdae4c;--p5:#d87cad}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1040px;margin:0 auto;padding:40px 20px 60px}h1{font-size:30px;line-height:1.2;margin:0 0 8px}
h2{font-size:18px;margin:0 0 12px}p,li{color:var(--soft);overflow-wrap:anywhere}p{margin:10px 0 0}header p{margin:4px 0 0}
ul{margin:10px 0 0;padding-left:20px}section{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:20px;margin-top:18px}.scroll{overflow-x:auto}svg{display:block;width:100%;min-width:720px;height:auto;
font:12px system-ui,sans-serif}.key{display:inline;width:10px;min-width:0;height:10px;margin-right:6px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 4px}.rowtitle{fill:var(--ink);font-weight:600}
.tick{fill:var(--soft)}.grid{stroke:var(--grid)}.band{fill:var(--bad);opacity:.1}.fault{fill:var(--bad)}
.work{fill:var(--work)}.use{fill:none;stroke:var(--use);stroke-width:1.5}.limit{stroke:var(--bad);stroke-dasharray:4 3}
.limittext{fill:var(--bad)}.p0{fill:var(--p0)}.p1{fill:var(--p1)}.p2{fill:var(--p2)}.p3{fill:var(--p3)}.p4{fill:var(--p4)}
.p5{fill:var(--p5)}table{border-collapse:collapse;width:100%;font-size:14px}th{text-align:left;color:var(--soft);
font-weight:500}th,td{padding:6px 10px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}td{font-variant-numeric:tabular-nums}code{font-size:14px}
.good{color:var(--good);font-weight:600;white-space:nowrap}.bad{color:var(--bad);font-weight:600;white-space:nowrap}
"""
