"""When a server counts as write-dead, and which lines of its log are problems."""

from __future__ import annotations

from pathlib import Path

from toque._protocol import PodView
from toque._server_watch import WRITE_DEAD_S, ServerLog, WriteDeadWatch


def report(journal: str) -> PodView:
    return PodView(pod="pod-1", session="s", stations=[], slots_leased=0, slots_in_use=0, slots_wanted=0,
                   loop_lag_ms=0.0, workflows={}, journal=journal)


SICK, WELL = [report("ok"), report("no space left")], [report("ok")]


def test_a_short_trouble_is_none() -> None:
    """One slow or refused write does not restart the server."""
    watch = WriteDeadWatch()

    said = [watch.seen(SICK, 0.0), watch.seen(SICK, WRITE_DEAD_S), watch.seen(WELL, 6.0), watch.seen(SICK, 7.0)]

    assert said == ["", "", "", ""]


def test_a_lasting_trouble_is_said_with_its_reason() -> None:
    """What the pods report for longer than the limit is handed on, and again only after as long."""
    watch = WriteDeadWatch()
    watch.seen(SICK, 0.0)

    said = [watch.seen(SICK, WRITE_DEAD_S + 0.1), watch.seen(SICK, WRITE_DEAD_S + 0.2)]

    assert (said, watch.restarts) == (["no space left", ""], 1)


def test_silence_is_no_trouble_and_no_health() -> None:
    """While nobody answers, nothing is known: the count of restarts in vain stands, the clock does not run."""
    watch = WriteDeadWatch()
    watch.seen(SICK, 0.0)
    watch.seen(SICK, 6.0)

    said = [watch.seen([], 7.0), watch.seen(SICK, 13.0)]

    assert (said, watch.restarts) == (["", ""], 1)


def test_health_forgets_earlier_restarts() -> None:
    """A server that was healed may be restarted again, days later."""
    watch = WriteDeadWatch()
    for now_s in (0.0, 6.0, 12.0):
        watch.seen(SICK, now_s)

    watch.seen(WELL, 13.0)

    assert watch.restarts == 0


def test_only_new_problems_of_the_server_are_shown(tmp_path: Path) -> None:
    """Information and old lines are left out; a line that is half written comes when it is whole."""
    path = tmp_path / "nats-server.log"
    path.write_text("[7] 2026/01/01 00:00:00.000000 [ERR] old\n")
    log = ServerLog(path)
    with path.open("a") as writer:
        writer.write("[7] 2026/01/01 00:00:01.000000 [INF] fine\n[7] 2026/01/01 00:00:02.000000 [WRN] hot\n[7] 20")

    first = log.problems()
    with path.open("a") as writer:
        writer.write("26/01/01 00:00:03.000000 [ERR] broken\n")

    assert (first, log.problems(), log.problems()) == (["[WRN] hot"], ["[ERR] broken"], [])


def test_a_log_that_was_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    """A log that was moved away for its size does not silence the new one; without a log there is nothing."""
    path = tmp_path / "nats-server.log"
    path.write_text("x" * 10_000 + "\n")
    log = ServerLog(path)

    path.write_text("[7] 2026/01/01 00:00:01.000000 [FTL] no\n")
    shown = log.problems()
    path.unlink()

    assert (shown, log.problems()) == (["[FTL] no"], [])
