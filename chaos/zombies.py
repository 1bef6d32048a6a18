"""What a stopped process (SIGSTOP) did after others had taken its work over: told apart from what counts.

Nothing can be undone inside of a stopped process. A callback that was inside ends when the process is continued; one
whose gates were passed just before the stop reports its entry after it. If another process has entered the instance
meanwhile, such a visit is *overtaken*: it counts as cut at the stop, or not at all. Its result has to lose, which the
other checks see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from toque.chaos.pairing import CUT, Ledgered, Stop, Visit
from toque.chaos.verdicts import Verdict

LATE_PER_STOP_MAX = 3  # callbacks whose gates were passed before the stop, and that report their entry after it
LATE_NS_MAX = 1_000_000_000  # after the process was continued; later ones have no excuse


def overtaken(ledger: Ledgered, stops: Sequence[Stop]) -> Ledgered:
    """The ledger with the overtaken visits of stopped processes cut at the stop, or moved to `late`."""
    by_instance = ledger.by_instance()
    out = replace(ledger, visits=[], stops=list(stops), late=[])
    for visit in ledger.visits:
        stop = next((stop for stop in stops if _touches(visit, stop)
                     and _entered_elsewhere(by_instance[visit.key], visit, stop)), None)
        if stop is None:
            out.visits.append(visit)
        elif visit.entered_ns > stop.continued_ns:
            out.late.append(visit)
        else:  # a report that arrived while the process was stopped had been sent before the stop
            out.visits.append(replace(visit, left_ns=max(stop.stopped_ns, visit.entered_ns), outcome=CUT))
    return out


def _touches(visit: Visit, stop: Stop) -> bool:
    """Whether the visit was under way in the process at the stop, or began while it was stopped or just after."""
    ended_before = visit.left_ns != 0 and visit.left_ns <= stop.stopped_ns
    began_later = visit.entered_ns > stop.continued_ns + LATE_NS_MAX
    return visit.pid == stop.pid and not ended_before and not began_later


def _entered_elsewhere(visits: Sequence[Visit], visit: Visit, stop: Stop) -> bool:
    """Whether another process entered the instance after the stop, and before the visit began or was over.

    Whoever took it over goes on from what was recorded, so what had passed its gates before the stop is entered by both.
    A step that only this process has entered, after it was continued, is one of its next session: the station came back.
    """
    late = visit.entered_ns > stop.continued_ns
    until_ns = visit.entered_ns if late else visit.left_ns
    others = [other for other in visits if other.pid != visit.pid and other.entered_ns > stop.stopped_ns
              and (until_ns == 0 or other.entered_ns < until_ns)]
    return any(other.step == visit.step for other in others) if late else bool(others)


def check_late(ledger: Ledgered) -> Verdict:
    """A process that was stopped past its session enters nothing but what its gates had passed before the stop."""
    verdict = Verdict("L1z", f"a zombie entered nothing new: at most {LATE_PER_STOP_MAX} late entries for each stop")
    verdict.checked = len(ledger.stops)
    per_stop: Counter[Stop] = Counter()
    for visit in ledger.late:
        per_stop[next(stop for stop in ledger.stops if _touches(visit, stop))] += 1
    for stop, count in per_stop.items():
        if count > LATE_PER_STOP_MAX:
            verdict.violated(f"process {stop.pid}, stopped for {stop.lasted_s:.2f} s, entered {count} callbacks of "
                             f"instances that others had taken over")
    verdict.note = f"{len(ledger.late)} late entries"
    return verdict
