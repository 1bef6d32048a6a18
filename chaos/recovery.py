"""How long it took until work went on after a fault, from the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from toque.chaos.pairing import Kill, Ledgered, Visit
from toque.chaos.verdicts import InstanceKey, Verdict


@dataclass
class Recovery:
    """What became of the instances of one killed process."""

    kill: Kill
    cut: int = 0  # attempts that were inside when it died
    gaps_s: list[float] = field(default_factory=list)  # per instance: kill → next entry of a callback elsewhere
    lost: list[InstanceKey] = field(default_factory=list)  # cut, and never entered again

    @property
    def max_s(self) -> float:
        return max(self.gaps_s, default=0.0)

    @property
    def p50_s(self) -> float:
        return median(self.gaps_s) if self.gaps_s else 0.0


def recoveries(ledger: Ledgered, also: Sequence[Kill] = ()) -> list[Recovery]:
    """For each kill: how long its instances waited until a callback of theirs was entered in another process.

    `also`: processes that were lost in another way (stopped, cut off for longer than the bound).
    """
    instances = ledger.by_instance()
    return [_recovery(kill, instances) for kill in (*ledger.kills, *also)]


def _recovery(kill: Kill, instances: Mapping[InstanceKey, Sequence[Visit]]) -> Recovery:
    out = Recovery(kill)
    for key, visits in instances.items():
        earlier = [visit for visit in visits if visit.entered_ns <= kill.at_ns or _with_the_lost(visit, kill)]
        if not earlier or earlier[-1].pid != kill.pid:
            continue
        was_cut = earlier[-1].cut
        out.cut += was_cut
        later = next((visit for visit in visits
                      if visit.entered_ns > kill.at_ns and not _with_the_lost(visit, kill)), None)
        if later is not None:
            out.gaps_s.append((later.entered_ns - kill.at_ns) / 1e9)
        elif was_cut:
            out.lost.append(key)
    return out


def _with_the_lost(visit: Visit, kill: Kill) -> bool:
    """Whether it was entered by the process that was lost, before that was itself again."""
    return visit.pid == kill.pid and not 0 < kill.back_ns < visit.entered_ns


def check_recovery(ledger: Ledgered, *, within_s: float, also: Sequence[Kill] = ()) -> Verdict:
    """Every instance that a kill cut goes on in another process within the bound; `also` as of `recoveries`."""
    verdict = Verdict("R5", f"instances of a lost pod went on elsewhere within {within_s:g} s")
    found = recoveries(ledger, also)
    for recovery in found:
        verdict.checked += len(recovery.gaps_s) + len(recovery.lost)
        for key in recovery.lost:
            verdict.violated(f"{key}: cut by the kill of pid {recovery.kill.pid}, and never entered again")
        for gap in recovery.gaps_s:
            if gap > within_s:
                verdict.violated(f"an instance of pid {recovery.kill.pid} went on after {gap:.2f} s only")
    gaps = [gap for recovery in found for gap in recovery.gaps_s]
    verdict.note = _spread(gaps) or "no instance was waiting"
    return verdict




# -- slots and the broker ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Bereaved:
    """A Gatekeeper that was lost: its process, when, and how many slots the other pods held at that moment."""

    pid: int
    at_ns: int
    held_by_others: int


def regrant_s(ledger: Ledgered, loss: Bereaved) -> float | None:
    """Seconds until more instances were inside of other processes than these had slots: only a new grant does that.

    None: it never happened.
    """
    inside: Counter[InstanceKey] = Counter()
    for at_ns, change, visit in _edges_elsewhere(ledger.visits, loss.pid):
        inside[visit.key] += change
        if not inside[visit.key]:
            del inside[visit.key]
        if at_ns > loss.at_ns and change > 0 and len(inside) > loss.held_by_others:
            return (at_ns - loss.at_ns) / 1e9
    return None


def _edges_elsewhere(visits: Sequence[Visit], pid: int) -> list[tuple[int, int, Visit]]:
    edges: list[tuple[int, int, Visit]] = []
    for visit in visits:
        if visit.pid != pid:
            edges.append((visit.entered_ns, 1, visit))
            edges += [(visit.left_ns, -1, visit)] * bool(visit.left_ns)
    return sorted(edges, key=lambda edge: edge[:2])


def check_regrants(ledger: Ledgered, losses: Sequence[Bereaved], *, within_s: float,
                   created_ns: Mapping[InstanceKey, int]) -> Verdict:
    """After the loss of a Gatekeeper slots are granted again within the bound, where there is work for them.

    `created_ns`: when each instance was acknowledged. A loss after which the others' slots were enough is not judged, nor
    one that is followed by another death within the bound, before slots were granted: what that pod held is not free yet.
    """
    verdict = Verdict("R5g", f"after a Gatekeeper's loss grants went on within {within_s:g} s")
    found: list[float] = []
    for loss in losses:
        gap_s = regrant_s(ledger, loss)
        if gap_s is not None and gap_s <= within_s:
            found.append(gap_s)
        elif any(kill.pid != loss.pid and 0 < kill.at_ns - loss.at_ns < within_s * 1e9 for kill in ledger.kills):
            continue
        elif _in_demand(ledger, loss, within_s, created_ns) > loss.held_by_others:
            when = "were not granted again" if gap_s is None else f"were granted again after {gap_s:.2f} s only"
            verdict.violated(f"after the loss of process {loss.pid} slots {when}")
        else:
            continue
        verdict.checked += 1
    verdict.note = _spread(found)
    return verdict


def _in_demand(ledger: Ledgered, loss: Bereaved, within_s: float, created_ns: Mapping[InstanceKey, int]) -> int:
    """How many instances were there at the loss, and still had callbacks to enter when the bound was over."""
    over_ns = loss.at_ns + int(within_s * 1e9)
    later = {visit.key for visit in ledger.visits if visit.entered_ns > over_ns}
    return sum(created_ns.get(key, over_ns) < loss.at_ns for key in later)


def check_returns(ledger: Ledgered, answered_ns: Sequence[int], *, within_s: float) -> Verdict:
    """Once the broker answers again, callbacks are entered within the bound."""
    verdict = Verdict("R5b", f"callbacks were entered within {within_s:g} s after the broker answered again",
                      len(answered_ns))
    gaps: list[float] = []
    for at_ns in answered_ns:
        following = next((visit for visit in ledger.visits if visit.entered_ns >= at_ns), None)
        if following is None:
            verdict.violated("after the broker had come back nothing was entered any more")
            continue
        gaps.append((following.entered_ns - at_ns) / 1e9)
        if gaps[-1] > within_s:
            verdict.violated(f"the first callback after the broker's return was entered after {gaps[-1]:.2f} s only")
    verdict.note = _spread(gaps)
    return verdict


def _spread(gaps_s: Sequence[float]) -> str:
    return f"p50 {median(gaps_s):.2f} s, longest {max(gaps_s):.2f} s" if gaps_s else ""
