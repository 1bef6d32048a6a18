"""The judgement of a whole run, and the page and the exit code made of it."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from toque.chaos.catalog import SCENARIOS
from toque.chaos.faults import Fault, Kind
from toque.chaos.five_steps import STEPS, WORKFLOW
from toque.chaos.history import CREATE, FAILED, OK, RESULT, STATUS, UNKNOWN, Op
from toque.chaos.judging import Evidence, judge, ledger_of
from toque.chaos.ledger import ENTER, EXIT, MARK, Entry
from toque.chaos.load import Load, LoadOptions
from toque.chaos.owner_checks import Sighting
from toque.chaos.pairing import KILLED
from toque.chaos.report import page, picture_of, tenures
from toque.chaos.scenario import Outcome, RunOptions
from toque.chaos.strikes import Injected
from toque.chaos.timeline import tick_s
from toque.cli.chaos import SKIPPED, exit_code

MS = 1_000_000
LIMIT = 4
TTL_S = 3.0


class Story:
    """Writes the history of a run in which pod 1 is killed inside of a callback of instance 1."""

    def __init__(self, instances: int = 6) -> None:
        self.entries: list[Entry] = []
        self.ops: list[Op] = []
        self.now_ns = 1000 * MS
        self.load = Load(LoadOptions(instances=instances, limit=LIMIT, nap_ms=20), None, None, 1)  # type: ignore[arg-type]  # no client: nothing is sent
        self.load.created = instances
        self.fault = Fault(0, Kind.KILL_POD, 1, 0.0, owner_of_zero=True)
        self.injected = Injected(self.fault, "pod-1", 1, ["1.0"], "s1", ended_ns=1, held_by_others=0)
        for number in range(instances):
            self.instance(number)

    def tick(self) -> int:
        self.now_ns += 10 * MS
        return self.now_ns

    def instance(self, number: int) -> None:
        name = self.load.options.id(number)
        self.op(CREATE, name)
        self.op(STATUS, name, "running")
        for step in STEPS:
            pid = 2
            if number == 1 and step == STEPS[2]:
                self.line(ENTER, name, step, 1)
                self.entries.append(Entry(self.tick(), 9, MARK, pod="pod-1", pid=1, note=KILLED))
                self.injected.begun_ns = self.injected.ended_ns = self.now_ns
            attempt = 2 if number == 1 and step == STEPS[2] else 1
            self.line(ENTER, name, step, pid, attempt)
            self.line(EXIT, name, step, pid, attempt)
            self.now_ns += 20 * MS
        value = self.load.expected()[self.load.keys()[number]]
        self.op(RESULT, name, "complete", value)
        self.op(RESULT, name, "complete", value)

    def line(self, kind: str, name: str, step: str, pid: int, attempt: int = 1) -> None:
        note = "ok" if kind == EXIT else ""
        self.entries.append(Entry(self.tick(), pid, kind, WORKFLOW, name, step, attempt, f"pod-{pid}", pid,
                                  f"{name}:{step}", note))

    def op(self, op: str, name: str, status: str = "", value: str = "", *, outcome: str = OK) -> None:
        self.ops.append(Op(len(self.ops) + 1, op, WORKFLOW, name, self.tick(), self.tick(), outcome, status, value))

    @property
    def evidence(self) -> Evidence:
        sightings = [Sighting(1, 2, "1.0", "pod-1", "s1", 1), Sighting(3 * 10**9, 3 * 10**9 + 1, "1.0", "pod-2", "s2", 2)]
        return Evidence.of(self.load, faults=[self.fault], injected=[self.injected], missed=[], ops=self.ops,
                           entries=self.entries, sightings=sightings, ttl_s=TTL_S)

    def outcome(self, **changes: object) -> Outcome:
        evidence = replace(self.evidence, **changes)  # type: ignore[arg-type]  # fields of Evidence
        options = RunOptions(seed=7, command="toque chaos run killing-pods --seed 7 --nats '<&>'")
        return Outcome(SCENARIOS["killing-pods"], options, self.load.options, TTL_S, list(evidence.injected), [], evidence,
                       judge(evidence), 1000 * MS, 12.3)


@pytest.fixture
def story() -> Story:
    return Story()


# -- judging -----------------------------------------------------------------------------------------------------------

def test_an_honest_run_passes(story):
    """Every check saw something, every fault happened; the counts say how much."""
    judgement = judge(story.evidence)

    assert judgement.word == "pass", judgement
    assert {verdict.id for verdict in judgement.verdicts} >= {"C1", "C2", "C3", "E1", "E3", "E5", "L1", "S1", "S3", "P1",
                                                              "R5", "R5g"}
    assert "1 attempt cut" in judgement.counts
    assert "1 fault hit the owner of station 0" in judgement.counts


def test_a_fault_that_did_not_happen_makes_a_run_void(story):
    """Nothing broke, and nothing was proven; the reason is told."""
    judgement = judge(replace(story.evidence, injected=[], missed=["the pod was gone"]))

    assert judgement.word == "VOID"
    assert judgement.void[:2] == ["0 of 1 faults happened", "the pod was gone"]


def test_a_check_that_saw_nothing_makes_a_run_void(story):
    """Here nobody looked at owners."""
    judgement = judge(replace(story.evidence, sightings=[]))

    assert judgement.word == "VOID"
    assert judgement.void == ["P1 saw nothing to judge"]


def test_a_violation_outweighs_void(story):
    """A broken promise is told as such, whatever else is missing."""
    lost = [op for op in story.ops if not (op.op == RESULT and op.instance.endswith("3"))]

    judgement = judge(replace(story.evidence, ops=lost, injected=[]))

    assert judgement.word == "VIOLATED"


def test_an_instance_that_exists_after_an_unknown_outcome_has_to_end_too(story):
    """Its creation was never acknowledged as new, but somebody was told that it exists."""
    name = story.load.options.id(3)
    first = next(op for op in story.ops if op.op == CREATE and op.instance == name)
    first.outcome = UNKNOWN
    story.op(CREATE, name, outcome=FAILED)
    story.load.exist = {story.load.keys()[3]}

    whole = judge(story.evidence)
    without_end = judge(replace(story.evidence, ops=[op for op in story.ops if not (
        op.instance == name and op.op == RESULT)]))

    assert whole.word == "pass"
    assert [verdict.id for verdict in without_end.verdicts if verdict.broken] == ["C1"]


def test_a_server_fault_is_a_lapse_of_every_process(story):
    """And a kill is none: the process is dead."""
    outage = Injected(Fault(1, Kind.STOP_SERVER, 1, 0.0), begun_ns=5, ended_ns=9, answered_ns=9)

    [lapse] = ledger_of(replace(story.evidence, injected=[story.injected, outage])).lapses

    assert (lapse.pid, lapse.from_ns, lapse.to_ns) == (0, 5, 9 + int(TTL_S * 1e9))


# -- the page ----------------------------------------------------------------------------------------------------------

class Tags(HTMLParser):
    """Checks that tags are closed in order, and collects attributes that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "xlink:href")]


def test_a_page_is_whole_and_loads_nothing(story):
    """One file, no resource from anywhere, colours for light and for dark."""
    text = page(story.outcome())
    tags = Tags(text)

    assert tags.open == []
    assert tags.loads == []
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme:dark" in text


def test_a_page_names_seed_command_and_every_verdict(story):
    """What a reader needs to believe it, and to repeat it; what others wrote is escaped."""
    outcome = story.outcome()
    text = page(outcome)

    assert "Seed 7" in text
    assert "toque chaos run killing-pods --seed 7 --nats &#x27;&lt;&amp;&gt;&#x27;" in text
    for verdict in outcome.judgement.verdicts:
        assert f"<b>{verdict.id}</b>" in text
    assert "1 attempt cut" in text


def test_a_page_of_a_violated_run_shows_the_violation(story):
    """Not only that there was one."""
    outcome = story.outcome(ops=[op for op in story.ops if op.op != RESULT])

    text = page(outcome)

    assert "VIOLATED" in text
    assert "acknowledged, but no terminal state was seen" in text


def test_the_picture_shows_what_the_ledger_saw(story):
    """Every callback in its second, never more in use than there were, the fault where it was, owners in a row."""
    outcome = story.outcome()
    picture = picture_of(outcome)

    assert sum(picture.per_second) == sum(visit.outcome == OK for visit in outcome.judgement.ledger.visits)
    assert max(count for _, count in picture.in_use) == 1
    assert picture.faults[0].begins_s == pytest.approx((story.injected.begun_ns - 1000 * MS) / 1e9)
    assert [(tenure.pod, tenure.epoch) for tenure in picture.tenures] == [("pod-1", 1), ("pod-2", 2)]


def test_sightings_of_one_owner_are_one_row():
    """A new epoch of the same pod begins another."""
    seen = [Sighting(at, at + 1, "1.0", "pod-1", "s", epoch) for at, epoch in ((0, 1), (10, 1), (20, 2), (30, 2))]

    assert [(tenure.epoch, tenure.begins_s * 1e9, tenure.ends_s * 1e9) for tenure in tenures(seen, 0)] == [
        (1, 1, 11), (2, 21, 31)]


@pytest.mark.parametrize(("lasts_s", "expected"), [(0.0, 1), (11.0, 1), (13.0, 2), (59.0, 5), (700.0, 100)])
def test_ticks_are_round_and_few(lasts_s, expected):
    """Twelve at most."""
    assert tick_s(lasts_s) == expected


# -- the exit code -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "code"), [
    (["pass"], 0), (["VIOLATED"], 1), (["VOID"], 4), ([SKIPPED], 4), (["pass", SKIPPED], 0), (["pass", "VOID"], 4),
    (["VOID", "VIOLATED"], 1),
])
def test_the_exit_code_says_pass_violated_or_void(words, code):
    """Scenarios that could not run here do not spoil those that did; alone they prove nothing."""
    assert exit_code({str(number): word for number, word in enumerate(words)}) == code
