"""Each check is proven on doctored histories: it holds on the honest run, and breaks on the fault it is there for."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from toque.chaos.history import CREATE, FAILED, OK, RESULT, STATUS, UNKNOWN, Op
from toque.chaos.ledger import ENTER, EXIT, GONE, MARK, OPENED, Entry
from toque.chaos.ledger_checks import check_c1, check_c2, check_c3, check_e1, check_e3, check_l1, check_ledger
from toque.chaos.pairing import CUT, RECORDED_NS_MAX, pair
from toque.chaos.recovery import check_recovery, recoveries
from toque.chaos.verdicts import InstanceKey

STEPS = ("hash", "measure")
ORDER = {"census": {"hash": 0, "measure": 1}}


class Run:
    """Writes the ledger and the log of a run, one nanosecond after the other; doctored by leaving out or adding."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.ops: list[Op] = []
        self.now_ns = 0

    def line(self, kind: str, instance: str = "", step: str = "", *, attempt: int = 1, pid: int = 1, note: str = "",
             token: str | None = None) -> None:
        self.now_ns += 1
        workflow = "census" if instance else ""
        key = f"{instance}:{step}" if token is None else token
        self.entries.append(
            Entry(self.now_ns, pid, kind, workflow, instance, step, attempt, f"pod-{pid}", pid, key, note))

    def visit(self, instance: str, step: str, *, attempt: int = 1, pid: int = 1, note: str = "ok",
              token: str | None = None) -> None:
        self.line(ENTER, instance, step, attempt=attempt, pid=pid, token=token)
        self.line(EXIT, instance, step, attempt=attempt, pid=pid, note=note, token=token)

    def op(self, op: str, instance: str, *, outcome: str = OK, status: str = "", value: str = "") -> None:
        self.now_ns += 1
        self.ops.append(Op(len(self.ops) + 1, op, "census", instance, self.now_ns, self.now_ns, outcome, status, value))

    def created(self, instance: str) -> None:
        self.op(CREATE, instance)

    def ended(self, instance: str, status: str = "complete", value: str = "42") -> None:
        self.op(RESULT, instance, status=status, value=value)

    def whole(self, instance: str, *, pid: int = 1) -> None:
        self.created(instance)
        for step in STEPS:
            self.visit(instance, step, pid=pid)
        self.ended(instance)


@pytest.fixture
def run() -> Run:
    """Three instances: one whole in each of two pods, one that goes on in pod 2 after pod 1 was killed inside it."""
    run = Run()
    run.line(OPENED, pid=1)
    run.line(OPENED, pid=2)
    run.whole("a", pid=1)
    run.whole("b", pid=2)
    run.created("c")
    run.visit("c", "hash", pid=1)
    run.line(ENTER, "c", "measure", pid=1)
    run.line(MARK, pid=1, note="killed")
    run.line(GONE, pid=1)
    run.visit("c", "measure", attempt=2, pid=2)
    run.ended("c")
    return run


def key(instance: str) -> InstanceKey:
    return InstanceKey("census", instance)


EXPECTED = {key("a"): "42", key("c"): "42"}


def test_honest_run_holds_in_every_check(run: Run) -> None:
    """A run with a kill, in which everything went as promised, breaks nothing."""
    ledger = pair(run.entries)

    verdicts = [check_c1(run.ops, EXPECTED), check_c2(run.ops, ledger), check_c3(run.ops, ledger),
                check_e1(run.ops, ledger, ORDER), check_e3(ledger), check_l1(ledger, limit=1),
                check_recovery(ledger, within_s=1.0), check_ledger(ledger)]

    assert [(v.id, v.violations) for v in verdicts if not v.holds] == []
    assert [v.id for v in verdicts] == ["C1", "C2", "C3", "E1", "E3", "L1", "R5", "ledger"]


def test_no_check_holds_on_nothing() -> None:
    """A check that saw no case does not hold."""
    ledger = pair([])

    verdicts = [check_c1([], {}), check_c2([], ledger), check_c3([], ledger), check_e1([], ledger, ORDER),
                check_e3(ledger), check_l1(ledger, limit=1), check_recovery(ledger, within_s=1.0), check_ledger(ledger)]

    assert {verdict.word for verdict in verdicts} == {"NOT SEEN"}


def test_c1_breaks_on_an_acknowledged_creation_without_end(run: Run) -> None:
    """An instance that was acknowledged and vanished is found."""
    run.ops = [op for op in run.ops if (op.op, op.instance) != (RESULT, "b")]

    verdict = check_c1(run.ops, EXPECTED)

    assert verdict.violations == ["census/b: acknowledged, but no terminal state was seen"]


def test_c1_breaks_on_two_ends(run: Run) -> None:
    """A result that changed between two reads is found."""
    run.ended("a", value="43")

    assert check_c1(run.ops, {}).broken == 1


def test_c1_breaks_on_a_result_that_is_not_as_computed(run: Run) -> None:
    """A wrong result is found."""
    verdict = check_c1(run.ops, {key("a"): "41"})

    assert verdict.violations == ["census/a: its result is 42, computed 41"]


def test_c1_breaks_on_an_instance_that_errored(run: Run) -> None:
    """An instance that should have completed and errored is found; one that should error is not."""
    run.ops = [msgspec.structs.replace(op, status="errored") if op.op == RESULT and op.instance == "b" else op
               for op in run.ops]

    assert check_c1(run.ops, EXPECTED).broken == 1
    assert check_c1(run.ops, EXPECTED, statuses={key("b"): "errored"}).broken == 0


def test_c1_breaks_when_an_acknowledgement_is_dropped(run: Run) -> None:
    """An instance whose result is expected, but whose creation was never acknowledged, is found."""
    run.ops = [op for op in run.ops if (op.op, op.instance) != (CREATE, "a")]

    assert check_c1(run.ops, EXPECTED).broken == 1


def test_c2_breaks_on_a_doubled_run(run: Run) -> None:
    """A second run of an id, begun from its first step, is found."""
    for step in STEPS:
        run.visit("a", step, pid=2)

    assert check_c2(run.ops, pair(run.entries)).broken == 2


def test_c2_breaks_on_two_idempotency_keys(run: Run) -> None:
    """Attempts of one step with different keys belong to different runs."""
    run.visit("b", "measure", attempt=2, token="another run")

    assert check_c2(run.ops, pair(run.entries)).violations == ["census/b step 'measure': more than one idempotency key"]


def test_c2_breaks_on_one_step_inside_two_processes(run: Run) -> None:
    """Two owners at work on one step at one time are found."""
    run.line(ENTER, "d", "hash", pid=2)
    run.line(ENTER, "d", "hash", attempt=2, pid=3)

    verdict = check_c2(run.ops, pair(run.entries))

    assert verdict.violations == ["census/d step 'hash': inside pid 2 and pid 3 at one time"]


def test_c2_breaks_on_two_acknowledged_creations_of_one_id(run: Run) -> None:
    """An id that was acknowledged as new twice is found."""
    run.created("a")

    assert check_c2(run.ops, pair(run.entries)).broken == 1


def test_c3_breaks_on_a_run_that_nobody_asked_for(run: Run) -> None:
    """An instance that runs without a creation is found."""
    run.visit("ghost", "hash", pid=2)

    assert check_c3(run.ops, pair(run.entries)).violations == ["census/ghost: ran, but nobody created it"]


@pytest.mark.parametrize(("outcome", "broken"), [(FAILED, 1), (UNKNOWN, 0)])
def test_c3_breaks_on_a_refused_creation_that_runs(run: Run, outcome: str, broken: int) -> None:
    """A refused creation must not run; one of unknown outcome may."""
    run.op(CREATE, "d", outcome=outcome)
    run.visit("d", "hash", pid=2)

    assert check_c3(run.ops, pair(run.entries)).broken == broken


def test_e1_breaks_on_a_callback_entered_after_a_later_step(run: Run) -> None:
    """A callback that is entered again after a later step began is found."""
    run.created("d")
    run.visit("d", "hash", pid=2)
    run.visit("d", "measure", pid=2)
    run.visit("d", "hash", attempt=2, pid=2)

    assert check_e1(run.ops, pair(run.entries), ORDER).broken == 1


def test_e1_breaks_on_a_callback_entered_after_a_client_saw_the_end(run: Run) -> None:
    """The last step, entered again after a client had the result, is found."""
    run.visit("b", "measure", attempt=2, pid=2)

    assert check_e1(run.ops, pair(run.entries), ORDER).broken == 1


@pytest.mark.parametrize(("status", "broken"), [("complete", 1), ("terminated", 1), ("running", 0)])
def test_e1_breaks_on_a_callback_entered_after_a_client_was_told_the_status_of_an_end(status: str, broken: int) -> None:
    """Who asks for the status and is told that it has ended has seen the end as well as who waited for the result."""
    run = Run()
    run.created("d")
    run.visit("d", "measure", note="ValueError")
    run.op(STATUS, "d", status=status)
    run.visit("d", "measure", attempt=2)

    assert check_e1(run.ops, pair(run.entries), ORDER).broken == broken


def test_e1_breaks_on_a_step_it_does_not_know(run: Run) -> None:
    """A step that the checker cannot place is no silent pass."""
    run.visit("d", "surprise", pid=2)

    assert check_e1(run.ops, pair(run.entries), ORDER).broken == 1


def test_e1_lets_steps_of_one_stage_interleave(run: Run) -> None:
    """Two steps side by side may be entered in any order, and again after a failure."""
    run.created("d")
    run.visit("d", "measure", pid=2)
    run.visit("d", "hash", pid=2, note="ValueError")
    run.visit("d", "measure", attempt=2, pid=2)

    assert check_e1(run.ops, pair(run.entries), {"census": {"hash": 0, "measure": 0}}).broken == 0


def test_e3_breaks_on_more_attempts_than_allowed() -> None:
    """A step that is retried beyond its limit is found."""
    run = Run()
    for attempt in range(1, 5):
        run.visit("a", "hash", attempt=attempt, note="ValueError")

    assert check_e3(pair(run.entries), retries=3).broken == 0
    assert check_e3(pair(run.entries), retries=2).broken == 1


def test_e3_breaks_on_an_attempt_number_that_does_not_grow(run: Run) -> None:
    """An attempt number that comes again after a failure is found: the retry count was lost."""
    run.visit("d", "hash", attempt=2, note="ValueError", pid=2)
    run.visit("d", "hash", attempt=2, pid=2)

    assert check_e3(pair(run.entries)).broken == 1


def test_e3_breaks_on_a_repeat_though_the_process_lived(run: Run) -> None:
    """A callback that ended well is not entered again while its process lives."""
    run.visit("d", "hash", pid=2)
    run.visit("d", "hash", attempt=2, pid=2)

    assert check_e3(pair(run.entries)).broken == 1


def test_e3_allows_a_repeat_when_the_process_died_before_the_checkpoint() -> None:
    """At least once: a callback that ended well just before its pod was killed may be entered again."""
    run = Run()
    run.visit("a", "hash", pid=1)
    run.line(MARK, pid=1, note="killed")
    run.visit("a", "hash", attempt=2, pid=2)

    assert check_e3(pair(run.entries), retries=0).broken == 0


def test_e3_breaks_on_a_repeat_when_the_process_died_long_after_the_checkpoint() -> None:
    """A step that ended well before a nap, or beside a long one, is not entered again when its pod is killed much later."""
    run = Run()
    run.visit("a", "hash", pid=1)
    run.now_ns += RECORDED_NS_MAX
    run.line(MARK, pid=1, note="killed")
    run.visit("a", "hash", attempt=2, pid=2)

    assert check_e3(pair(run.entries)).broken == 1
    assert check_e3(pair(run.entries), recorded_ns_max=2 * RECORDED_NS_MAX).broken == 0


def test_l1_breaks_on_over_admission(run: Run) -> None:
    """One instance more inside than there are slots is found."""
    run.line(ENTER, "d", "hash", pid=2)
    run.line(ENTER, "e", "hash", pid=2)
    ledger = pair(run.entries)

    assert check_l1(ledger, limit=2).broken == 0
    assert check_l1(ledger, limit=1).broken == 1


def test_l1_counts_an_instance_once() -> None:
    """Two callbacks side by side of one instance hold one slot."""
    run = Run()
    run.line(ENTER, "a", "hash")
    run.line(ENTER, "a", "measure")

    assert check_l1(pair(run.entries), limit=1).broken == 0


def test_l1_counts_a_dead_process_until_it_died() -> None:
    """What was inside a killed process holds its slot until the kill, and no longer."""
    run = Run()
    run.line(ENTER, "a", "hash", pid=1)
    run.line(ENTER, "b", "hash", pid=2)
    before_death = pair(run.entries)
    run = Run()
    run.line(ENTER, "a", "hash", pid=1)
    run.line(MARK, pid=1, note="killed")
    run.line(ENTER, "b", "hash", pid=2)
    after_death = pair(run.entries)

    assert check_l1(before_death, limit=1).broken == 1
    assert check_l1(after_death, limit=1).broken == 0


def test_a_lost_connection_cuts_what_was_inside() -> None:
    """Without any mark, the kernel's close of the connection ends the attempt."""
    run = Run()
    run.line(ENTER, "a", "hash", pid=1)
    run.line(GONE, pid=1)

    [visit] = pair(run.entries).visits

    assert (visit.outcome, visit.left_ns) == (CUT, 2)


def test_an_enter_read_after_the_kill_is_cut_at_once() -> None:
    """What a process sent before it died and the ledger read afterwards was never acknowledged: it was never inside."""
    run = Run()
    run.line(MARK, pid=1, note="killed")
    run.line(ENTER, "a", "hash", pid=1)
    run.line(ENTER, "a", "hash", attempt=2, pid=2)
    ledger = pair(run.entries)

    assert [visit.outcome for visit in ledger.visits] == [CUT, ""]
    assert check_l1(ledger, limit=1).broken == 0
    assert check_c2(run.ops, ledger).broken == 0


def test_recovery_measures_from_the_kill_to_the_next_entry_elsewhere(run: Run) -> None:
    """The gap of an instance runs from the kill to its next callback in another process."""
    [recovery] = recoveries(pair(run.entries))

    assert (recovery.kill.pid, recovery.cut, recovery.lost) == (1, 1, [])
    assert recovery.gaps_s == [pytest.approx(2e-9)]


def test_recovery_counts_instances_between_two_steps() -> None:
    """An instance that was in no callback when its pod died waited too."""
    run = Run()
    run.visit("a", "hash", pid=1)
    run.line(MARK, pid=1, note="killed")
    run.visit("a", "measure", pid=2)

    [recovery] = recoveries(pair(run.entries))

    assert (recovery.cut, len(recovery.gaps_s)) == (0, 1)


def test_r5_breaks_on_a_late_and_on_a_lost_instance(run: Run) -> None:
    """An instance that went on too late, or never, is found."""
    late = pair(run.entries)
    lost = pair(entry for entry in run.entries if not (entry.pid == 2 and entry.instance == "c"))

    assert check_recovery(late, within_s=1e-9).broken == 1
    assert check_recovery(lost, within_s=1.0).violations == [
        "census/c: cut by the kill of pid 1, and never entered again"]


def test_ledger_check_breaks_on_strays_and_on_what_is_still_inside(run: Run) -> None:
    """An exit without its enter, and an enter without an end, are found."""
    run.line(EXIT, "d", "hash", pid=2)
    run.line(ENTER, "e", "hash", pid=2)

    assert check_ledger(pair(run.entries)).broken == 2


def test_violations_are_counted_beyond_those_shown(run: Run) -> None:
    """A broken promise is told in twenty examples and one number."""
    for number in range(30):
        run.visit(f"ghost-{number}", "hash", pid=2)

    verdict = check_c3(run.ops, pair(run.entries))

    assert (verdict.broken, len(verdict.violations)) == (30, 20)
    assert replace(verdict, checked=0).holds is False
