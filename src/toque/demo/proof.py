"""Judges a census from the ledger, the client's log and a recomputation: what was promised, and whether it held."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from toque.chaos.history import Op
from toque.chaos.ledger_checks import check_c1, check_c2, check_c3, check_e1, check_e3, check_l1, check_ledger
from toque.chaos.pairing import Ledgered
from toque.chaos.recovery import check_recovery
from toque.chaos.verdicts import InstanceKey, Verdict
from toque.demo.census import RETRIES, STEPS
from toque.demo.measure import FileReport, report_on
from toque.demo.report import VerdictRow
from toque.demo.summary import Summary

CENSUS = "census"
ORDER = {CENSUS: {step: stage for stage, step in enumerate(STEPS)}}
SAMPLE_SHARE = 0.03
SAMPLE_MIN = 30


@dataclass
class Evidence:
    """All that the proof reads."""

    ops: Sequence[Op]  # the client's log
    ledger: Ledgered
    files: Sequence[str]  # the files chosen
    reports: Sequence[FileReport]  # the results that the client read
    expected: Mapping[InstanceKey, str] = field(default_factory=dict)  # digests of results that were computed apart


def digest_of(report: FileReport) -> str:
    """Tells two results apart."""
    return blake2b(msgspec.msgpack.encode(report), digest_size=12).hexdigest()


def recompute(instances: Mapping[str, str]) -> dict[InstanceKey, str]:
    """Do the work of a sample of the instances (id → path) once more, outside of Toque. Takes about a second."""
    size = max(SAMPLE_MIN, int(len(instances) * SAMPLE_SHARE))
    sample = sorted(instances.items(), key=lambda item: blake2b(item[1].encode(), digest_size=8).digest())[:size]
    distributions = importlib.metadata.packages_distributions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {InstanceKey(CENSUS, instance): digest_of(report_on(path, distributions)) for instance, path in sample}


def judge(evidence: Evidence, *, slots: int, within_s: float) -> list[Verdict]:
    """Every promise of the demo. One that nothing spoke of does not hold."""
    ops, ledger = evidence.ops, evidence.ledger
    return [
        check_complete(evidence),
        check_c1(ops, evidence.expected),
        check_c2(ops, ledger),
        check_c3(ops, ledger),
        check_e1(ops, ledger, ORDER),
        check_e3(ledger, retries=RETRIES.limit),
        check_l1(ledger, limit=slots),
        check_recovery(ledger, within_s=within_s),
        check_ledger(ledger),
    ]


def check_complete(evidence: Evidence) -> Verdict:
    """Nothing is missing: every file that was chosen has exactly one result, and nothing else has."""
    verdict = Verdict("all", "every file has exactly one result", len(evidence.files))
    results = Counter(report.path for report in evidence.reports)
    for path in evidence.files:
        if results[path] != 1:
            verdict.violated(f"{path} has {results[path]} results")
    for path in results.keys() - set(evidence.files):
        verdict.violated(f"{path} has a result, but was not chosen")
    return verdict


def check_summary(gathered: Summary, own: Summary) -> Verdict:
    """What the report workflow gathered is what the client has read."""
    verdict = Verdict("report", "the report workflow summed up the same results", gathered.files)
    if gathered != own:
        verdict.violated(f"the report counts {gathered.files} files and {gathered.lines} lines, "
                         f"the client {own.files} and {own.lines}")
    return verdict


def rows(verdicts: Sequence[Verdict]) -> tuple[VerdictRow, ...]:
    """The verdicts as the page shows them."""
    return tuple(VerdictRow(verdict.id, verdict.promise, verdict.holds, verdict.checked, verdict.broken, verdict.note)
                 for verdict in verdicts)
