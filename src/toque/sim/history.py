"""What happened in a simulated account: the callbacks that were entered, and what clients asked for and were told.

Both in the format of real runs, with virtual nanoseconds for times: `ledger` holds `toque.chaos.ledger.Entry`, `ops`
holds `toque.chaos.history.Op`. So `toque.chaos.ledger_checks` judges simulated runs too. `entries` are the same
callbacks, each entry with its exit, for a test's own assertions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from toque.chaos.history import Op, OpLog
from toque.chaos.ledger import ENTER, EXIT, MARK, Entry
from toque.chaos.pairing import CUT, KILLED
from toque.sim.process import Process, later_in_thread
from toque.workflow import StepContext


@dataclass
class Visit:
    """A callback that was entered. `left_at` None: still inside; `cut`: it left because its pod was killed."""

    workflow: str
    instance: str
    step: str
    count: int
    attempt: int
    pod: str
    pid: int
    session: str  # of the pod, at the entry
    entered_at: float
    left_at: float | None = None
    outcome: str = ""  # "ok", the type of what it raised, or "cut"

    @property
    def cut(self) -> bool:
        return self.outcome == CUT


@dataclass(frozen=True)
class Stop:
    """A process that was stopped, and when its session had expired by then or would expire, in virtual time.

    `believes`: its clock stood still as well, so it takes its session for a living one afterwards.
    """

    pid: int
    session: str
    at: float
    expires_at: float
    believes: bool


class Operations(OpLog):
    """The log of what clients did, in memory."""

    def __init__(self, clock: Callable[[], int], on_write: Callable[[Op], None]) -> None:
        super().__init__(clock=clock)
        self.all: list[Op] = []
        self._on_write = on_write

    def write(self, op: Op) -> None:
        if len(self.all) < op.number:
            self.all.append(op)
        self._on_write(op)


class History:
    """See the module. `on_line` hears of each ledger entry and each op as it is written (the trace)."""

    def __init__(self, *, on_line: Callable[[Entry | Op], None] = lambda line: None) -> None:
        self.entries: list[Visit] = []
        self.ledger: list[Entry] = []
        self.stops: list[Stop] = []
        self.outside: list[str] = []  # callbacks that no living process ran
        self.on_line = on_line
        self.operations = Operations(now_ns, lambda op: self.on_line(op))

    @property
    def ops(self) -> list[Op]:
        """Every operation, in order of invocation."""
        return self.operations.all

    @contextmanager
    def inside(self, ctx: StepContext) -> Iterator[Visit]:
        """Report the entry now and the exit at the end of the block (of a thread: when that has lasted its time)."""
        process = Process.current()
        if process is None or not process.alive:  # raised alone it would fail the step, and be tried again
            self.outside.append(f"{ctx.workflow_name}/{ctx.instance_id} {ctx.name} ran outside of any living pod")
            raise AssertionError(self.outside[-1])
        visit = Visit(ctx.workflow_name, ctx.instance_id, ctx.name, ctx.count, ctx.attempt, process.name, process.pid,
                      process.session, asyncio.get_running_loop().time())
        self.entries.append(visit)
        self._write(ENTER, visit, ctx.idempotency_key)
        try:
            yield visit
        except BaseException as error:
            later_in_thread(self._left, visit, ctx.idempotency_key, type(error).__name__)
            raise
        later_in_thread(self._left, visit, ctx.idempotency_key, "ok")

    def _left(self, visit: Visit, token: str, outcome: str) -> None:
        if visit.left_at is None:
            visit.left_at, visit.outcome = asyncio.get_running_loop().time(), outcome
            self._write(EXIT, visit, token, outcome)

    def died(self, process: Process) -> None:
        """A process is gone: its callbacks are not inside any more."""
        self.mark(KILLED, process)
        for visit in self.entries:
            if visit.pid == process.pid and visit.left_at is None:
                visit.left_at, visit.outcome = asyncio.get_running_loop().time(), CUT

    def stopped(self, process: Process, *, expires_at: float, believes: bool) -> None:
        """A process is about to be stopped."""
        self.mark("stopped", process)
        self.stops.append(Stop(process.pid, process.session, asyncio.get_running_loop().time(), expires_at, believes))

    def mark(self, note: str, process: Process) -> None:
        """Note what became of a process."""
        self._add(Entry(now_ns(), process.pid, MARK, pod=process.name, pid=process.pid, note=note))

    def _write(self, kind: str, visit: Visit, token: str, note: str = "") -> None:
        step = visit.step if visit.count == 1 else f"{visit.step}#{visit.count}"
        self._add(Entry(now_ns(), visit.pid, kind, visit.workflow, visit.instance, step, visit.attempt, visit.pod,
                        visit.pid, token, note))

    def _add(self, entry: Entry) -> None:
        self.ledger.append(entry)
        self.on_line(entry)

    def entered(self, instance: str | None = None, step: str | None = None, *, pod: str | None = None,
                since: float = 0.0) -> list[Visit]:
        """The callbacks that match, in order of entry."""
        return [visit for visit in self.entries
                if instance in (None, visit.instance) and step in (None, visit.step) and pod in (None, visit.pod)
                and visit.entered_at >= since]

    def times(self, instance: str, step: str) -> int:
        return len(self.entered(instance, step))

    def most_inside(self) -> int:
        """The most instances that were inside callbacks at one time (a sweep line; an exit precedes an entry)."""
        changes = [(visit.entered_at, 1, visit.instance) for visit in self.entries]
        changes += [(visit.left_at, 0, visit.instance) for visit in self.entries if visit.left_at is not None]
        inside: dict[str, int] = {}
        most = 0
        for _, enters, instance in sorted(changes):
            inside[instance] = inside.get(instance, 0) + (1 if enters else -1)
            most = max(most, sum(count > 0 for count in inside.values()))
        return most


def now_ns() -> int:
    """Virtual time."""
    return round(asyncio.get_running_loop().time() * 1e9)
