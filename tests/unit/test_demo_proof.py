"""The demo's proof: its parts hold on an honest run and break on a doctored one; the demo shows both."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from toque.chaos.history import COMPLETE, CREATE, OK, RESULT, Op
from toque.chaos.ledger import ENTER, EXIT, MARK, Entry
from toque.chaos.pairing import KILLED, pair
from toque.demo.census import STEPS
from toque.demo.measure import FileReport, report_on
from toque.demo.proof import Evidence, check_summary, digest_of, judge, recompute, rows
from toque.demo.run import timeline
from toque.demo.show import Figures, PlainShow, make_show
from toque.demo.summary import Summary, summarise

S = 10**9


def entry(at_s: float, kind: str, instance: str, step: str, *, attempt: int = 1, pid: int = 1) -> Entry:
    note = {EXIT: "ok", MARK: KILLED}.get(kind, "")
    return Entry(int(at_s * S), pid, kind, "census" if instance else "", instance, step, attempt, "", pid, step, note)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(f"import os\n\n\ndef {name}():\n    return os\n")
    return [str(tmp_path / "a.py"), str(tmp_path / "b.py")]


@pytest.fixture
def evidence(files: list[str]) -> Evidence:
    """Two files; the pod of the second one was killed in its third step."""
    reports = [report_on(path, {}) for path in files]
    entries = []
    for place, step in enumerate(STEPS):
        entries += [entry(place * 0.2, ENTER, "i-a", step, pid=2), entry(place * 0.2 + 0.1, EXIT, "i-a", step, pid=2)]
    entries += [entry(1.0, ENTER, "i-b", "hash"), entry(1.1, EXIT, "i-b", "hash"), entry(1.2, ENTER, "i-b", "measure"),
                entry(1.3, MARK, "", "")]
    for place, step in enumerate(STEPS[1:]):
        attempt = 2 if step == "measure" else 1
        entries += [entry(2.0 + place, ENTER, "i-b", step, attempt=attempt, pid=2),
                    entry(2.5 + place, EXIT, "i-b", step, attempt=attempt, pid=2)]
    ops = [Op(1, CREATE, "census", "i-a", outcome=OK), Op(2, CREATE, "census", "i-b", outcome=OK)]
    ops += [Op(3 + place, RESULT, "census", instance, 9 * S, 10 * S, OK, COMPLETE, digest_of(result))
            for place, (instance, result) in enumerate(zip(("i-a", "i-b"), reports, strict=True))]
    expected = recompute({"i-a": files[0], "i-b": files[1]})
    return Evidence(ops, pair(entries), files, reports, expected)


def broken(evidence: Evidence) -> list[str]:
    return [verdict.id for verdict in judge(evidence, slots=1, within_s=1.0) if not verdict.holds]


def test_an_honest_census_holds(evidence: Evidence) -> None:
    """A census with a kill in it, gone on elsewhere, keeps every promise."""
    assert broken(evidence) == []


def test_a_wrong_result_breaks_c1(evidence: Evidence) -> None:
    """A result that differs from the recomputation by one line is found."""
    wrong = msgspec.structs.replace(evidence.reports[0], path="other")
    changed = msgspec.structs.replace(evidence.ops[2], value=digest_of(wrong))
    evidence.ops = [*evidence.ops[:2], changed, evidence.ops[3]]

    assert broken(evidence) == ["C1"]


@pytest.mark.parametrize("reports", [slice(0, 1), slice(0, 0)])
def test_a_missing_result_breaks_completeness(evidence: Evidence, reports: slice) -> None:
    """A chosen file without a result is missed."""
    evidence.reports = evidence.reports[reports]

    assert broken(evidence) == ["all"]


def test_a_second_result_breaks_completeness(evidence: Evidence) -> None:
    """A file with two results, and a result of a file that was not chosen, are found."""
    twice: list[FileReport] = [*evidence.reports, evidence.reports[0]]
    evidence.reports = [*twice, msgspec.structs.replace(evidence.reports[0], path="other")]

    [verdict] = [verdict for verdict in judge(evidence, slots=1, within_s=1.0) if verdict.id == "all"]

    assert verdict.broken == 2


def test_a_slow_takeover_breaks_r5(evidence: Evidence) -> None:
    """The instance went on 0.7 s after the kill: within 0.6 s that is too late."""
    verdicts = judge(evidence, slots=1, within_s=0.6)

    assert [verdict.id for verdict in verdicts if not verdict.holds] == ["R5"]


def test_a_report_of_other_sums_is_found(evidence: Evidence) -> None:
    """What the report workflow gathered must be what the client has read."""
    own = summarise(evidence.reports)

    assert check_summary(own, own).holds
    assert not check_summary(summarise(evidence.reports[:1]), own).holds
    assert not check_summary(Summary(), Summary()).holds


def test_verdicts_go_to_the_page_as_they_are(evidence: Evidence) -> None:
    """A row for each verdict, with its count."""
    verdicts = judge(evidence, slots=1, within_s=1.0)

    assert [(row.id, row.holds, row.checked) for row in rows(verdicts)] == [
        (verdict.id, verdict.holds, verdict.checked) for verdict in verdicts]


def test_the_timeline_counts_ended_instances_by_pod_and_second(evidence: Evidence) -> None:
    """The last step's exit counts, at its pod, in its second after the first callback."""
    [pod] = timeline(evidence.ledger, 0, {2: "pod-2"})

    assert (pod.pod, pod.per_second) == ("pod-2", (1, 0, 0, 0, 1))


def test_without_a_terminal_progress_is_plain_lines(capsys: pytest.CaptureFixture[str], evidence: Evidence) -> None:
    """Figures come as text, not at every call, but always at the end; verdicts as lines."""
    show = make_show(None)
    for done in (1, 2, 3):
        show.progress(Figures(done, 3, 12.0, running=2, pods=2))
    show.verdicts(judge(evidence, slots=1, within_s=0.6))
    show.close()

    printed = capsys.readouterr().out
    assert isinstance(show, PlainShow)
    assert "1/3 files done, 12 files/s, 2 running, 2 pods" in printed
    assert "2/3" not in printed
    assert "3/3" in printed
    assert "BROKEN    R5" in printed
    assert "holds     C1" in printed
